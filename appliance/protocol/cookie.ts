import { createHmac, timingSafeEqual } from 'node:crypto';
import { type Address, writeAddress } from './address.ts';
import { COOKIE_BYTES, hmacKey } from './control.ts';

/** Seconds a cookie is good for, and after which its key is replaced (docs/protocol.md, Cookie). */
export const COOKIE_LIFETIME = 120;

const TICK_BYTES = 4;
const LABEL = Buffer.from('detour-ctl/2 cookie');

/** What a cookie proves: that this sender receives at this address, for this key and session. */
export type CookieSubject = {
  readonly address: Address;
  readonly port: number;
  readonly keyId: number;
  readonly session: bigint;
};

/** One cookie key; `born` is the router's monotonic time of its making, ms. Ticks count seconds from there. */
export type CookieKey = { readonly key: Uint8Array; readonly born: number };

/** What is authenticated: address (16), port (2), key id (4), tick (4), session (8). Written anew for every cookie. */
const scratch = new Uint8Array(34);
const fields = new DataView(scratch.buffer);
const TICK_AT = 22;

/** `tick (4) || HMAC-SHA256(...)[0..11]`; `tick` in seconds since the key was made. */
export function makeCookie(key: Uint8Array, tick: number, subject: CookieSubject): Uint8Array {
  writeAddress(subject.address, scratch);
  fields.setUint16(16, subject.port);
  fields.setUint32(18, subject.keyId);
  fields.setUint32(TICK_AT, tick);
  fields.setBigUint64(26, subject.session);
  const mac = createHmac('sha256', hmacKey(key)).update(LABEL).update(scratch).digest();
  const cookie = new Uint8Array(COOKIE_BYTES);
  cookie.set(scratch.subarray(TICK_AT, TICK_AT + TICK_BYTES));
  cookie.set(mac.subarray(0, COOKIE_BYTES - TICK_BYTES), TICK_BYTES);
  return cookie;
}

/**
 * The current cookie key and its predecessor. No state per client: that is the point of a cookie.
 * `random` supplies fresh keys, `now` is monotonic milliseconds.
 */
export class CookieJar {
  #current: CookieKey;
  #previous: CookieKey | null = null;
  readonly #random: (bytes: number) => Uint8Array;

  constructor(random: (bytes: number) => Uint8Array, now: number) {
    this.#random = random;
    this.#current = { key: random(32), born: now };
  }

  #rotate(now: number): void {
    const age = now - this.#current.born;
    if (age < COOKIE_LIFETIME * 1000) return;
    // Idle for more than one period: the predecessor's cookies have all run out.
    this.#previous = age < 2 * COOKIE_LIFETIME * 1000 ? this.#current : null;
    this.#current = { key: this.#random(32), born: now };
  }

  /** A cookie for `subject`, good for `COOKIE_LIFETIME` seconds from `now`. */
  issue(subject: CookieSubject, now: number): Uint8Array {
    this.#rotate(now);
    return makeCookie(this.#current.key, Math.floor((now - this.#current.born) / 1000), subject);
  }

  /** Whether `cookie` was issued to `subject` at most `COOKIE_LIFETIME` seconds ago (constant time in the MAC). */
  accepts(cookie: Uint8Array, subject: CookieSubject, now: number): boolean {
    this.#rotate(now);
    const tick = new DataView(cookie.buffer, cookie.byteOffset, cookie.byteLength).getUint32(0);
    return [this.#current, this.#previous].some((candidate) => {
      if (!candidate) return false;
      const age = Math.floor((now - candidate.born) / 1000) - tick;
      if (age < 0 || age > COOKIE_LIFETIME) return false;
      return timingSafeEqual(makeCookie(candidate.key, tick, subject), cookie);
    });
  }
}
