import { type Address, contains, type Prefix } from '../protocol/address.ts';
import { GRACE, SHORTEST_LIFETIME } from './leases.ts';

/**
 * Who has which addresses inside the tunnels until when. A table that decides and remembers; it takes the time as an
 * argument, and changes only when its owner says that the kernel has followed (`commit`). Times are monotonic
 * milliseconds, lifetimes seconds as on the wire. A tunnel is (key, WireGuard public key).
 */

export type Networks = {
  /** The first address of each is the router's. Null: that family is not carried. */
  readonly v4: Prefix | null;
  readonly v6: Prefix | null;
  /** In place of `v4` for clients whose own network covers that; null where it cannot be had. */
  readonly reserve: Prefix | null;
};

export type Tunnel = {
  /** A key's id. */
  readonly owner: number;
  readonly publicKey: Uint8Array;
  readonly v4: Address | null;
  readonly v6: Address | null;
  /** docs/protocol.md, Tunnels. */
  readonly choice: number;
  /** Since when it has these addresses, as far as this router knows. */
  readonly since: number;
  readonly expires: number;
};

export type TunnelAsk = {
  readonly owner: number;
  readonly publicKey: Uint8Array;
  readonly choice: number;
  /** Seconds wanted; 0 for the default. */
  readonly lifetime: number;
};

export type TunnelPlan =
  | {
      readonly kind: 'grant';
      readonly tunnel: Tunnel;
      /** Seconds granted from the commit on. */
      readonly lifetime: number;
      /** What it was before, with other addresses; null for a new one, and for the same again. */
      readonly instead: Tunnel | null;
      readonly renewal: boolean;
    }
  /** Nothing to do in the kernel: what is there lasts long enough. */
  | { readonly kind: 'settled'; readonly tunnel: Tunnel }
  | {
      readonly kind: 'refused';
      readonly result: 'NOT_AUTHORIZED' | 'NO_RESOURCES' | 'QUOTA' | 'RATE';
      /** Seconds; null for what is usual. */
      readonly retryAfter: number | null;
    };

/** Largest packet inside a tunnel that fits into the 1,500 bytes of an Ethernet: without 40 of IPv6, 8 of UDP, 32 of WireGuard. */
export const TUNNEL_MTU = 1_420;
export const TUNNELS_PER_KEY = 8;
/** Of all keys together: peers of WireGuard, each some kilobytes of the kernel's memory. */
export const MOST_TUNNELS = 1_024;
const DEFAULT_LIFETIME = 600;
const NEW_PER_SECOND = 1;
const NEW_BURST = 16;
/** What has this share of its lifetime left need not be renewed. */
const FRESH = 0.9;
const QUARANTINE_MS = 120_000;
/** Addresses given up that are remembered at once; beyond that the oldest are forgotten early. */
const QUARANTINES = 4_096;

const widthOf = (family: 4 | 6): number => (family === 4 ? 32 : 128);

/** The router's own address in a network. */
export const gatewayOf = ({ address: { family, value } }: Prefix): Address => ({ family, value: value + 1n });

const addressKey = ({ family, value }: Address): string => `${family}:${value}`;
const keyText = (publicKey: Uint8Array): string =>
  publicKey.reduce((text, byte) => text + byte.toString(16).padStart(2, '0'), '');

/** 64 bits that spread whatever they are made of (FNV-1a, with the finaliser of MurmurHash3); no secret is in them. */
function hash(parts: readonly number[], seed: bigint): bigint {
  const mask = (1n << 64n) - 1n;
  let value = 0xcbf29ce484222325n ^ seed;
  for (const part of parts) value = ((value ^ BigInt(part)) * 0x100000001b3n) & mask;
  value = ((value ^ (value >> 33n)) * 0xff51afd7ed558ccdn) & mask;
  value = ((value ^ (value >> 33n)) * 0xc4ceb9fe1a85ec53n) & mask;
  return value ^ (value >> 33n);
}

type Account = { tokens: number; refilled: number };

export class Tunnels {
  readonly #networks: Networks;
  /** Longest lifetime granted, seconds. */
  readonly #longest: number;
  readonly #byKey = new Map<string, Tunnel>();
  readonly #byAddress = new Map<string, Tunnel>();
  readonly #freed = new Map<string, { readonly until: number; readonly key: string }>();
  readonly #accounts = new Map<number, Account>();

  constructor(networks: Networks, longest: number) {
    this.#networks = networks;
    this.#longest = longest;
  }

  get size(): number {
    return this.#byKey.size;
  }

  all(): readonly Tunnel[] {
    return [...this.#byKey.values()];
  }

  of(owner: number): readonly Tunnel[] {
    return this.all().filter((tunnel) => tunnel.owner === owner);
  }

  get(publicKey: Uint8Array): Tunnel | null {
    return this.#byKey.get(keyText(publicKey)) ?? null;
  }

  /** Plans to create or renew a tunnel. Nothing else may be planned before it was committed or given up. */
  plan({ owner, publicKey, choice, lifetime: wanted }: TunnelAsk, now: number): TunnelPlan {
    const lifetime = Math.min(Math.max(wanted || DEFAULT_LIFETIME, SHORTEST_LIFETIME), this.#longest);
    const held = this.get(publicKey);
    // WireGuard knows peers by this key alone: it would become the other one's tunnel.
    if (held && held.owner !== owner) return { kind: 'refused', result: 'NOT_AUTHORIZED', retryAfter: null };
    if (held && held.choice === choice) {
      if (held.expires - now >= lifetime * FRESH * 1000) return { kind: 'settled', tunnel: held };
      return { kind: 'grant', tunnel: held, lifetime, instead: null, renewal: true };
    }
    if (!held) {
      if (this.of(owner).length >= TUNNELS_PER_KEY) return { kind: 'refused', result: 'QUOTA', retryAfter: null };
      if (this.size >= MOST_TUNNELS) return { kind: 'refused', result: 'NO_RESOURCES', retryAfter: null };
    }
    const account = this.#account(owner, now);
    if (account.tokens < 1) return { kind: 'refused', result: 'RATE', retryAfter: 1 / NEW_PER_SECOND };
    const { v4, reserve, v6 } = this.#networks;
    const odd = choice % 2 === 1;
    const four = this.#draw(odd ? (reserve ?? v4) : v4, publicKey, choice, now);
    const six = this.#draw(v6, publicKey, choice, now);
    if ((four ?? six) === null) return { kind: 'refused', result: 'NO_RESOURCES', retryAfter: null };
    account.tokens -= 1;
    const tunnel = { owner, publicKey, v4: four, v6: six, choice, since: now, expires: now };
    return { kind: 'grant', tunnel, lifetime, instead: held, renewal: false };
  }

  /** The kernel has done what was planned, at the latest at `now`. */
  commit({ tunnel, lifetime, instead, renewal }: TunnelPlan & { readonly kind: 'grant' }, now: number): Tunnel {
    if (instead) this.#drop(instead, now);
    const granted = { ...tunnel, since: renewal ? tunnel.since : now, expires: now + lifetime * 1000 };
    this.#keep(granted);
    return granted;
  }

  /** It is gone from the kernel; its addresses go to nobody else for a while. */
  remove(tunnel: Tunnel, now: number): void {
    if (this.get(tunnel.publicKey)) this.#drop(tunnel, now);
  }

  /** What is over by now, and still to be taken out of the kernel; and forgets quarantines and idle accounts. */
  over(now: number): readonly Tunnel[] {
    for (const [address, { until }] of this.#freed) if (until <= now) this.#freed.delete(address);
    for (const [owner, account] of this.#accounts) {
      this.#refill(account, now);
      if (account.tokens >= NEW_BURST) this.#accounts.delete(owner);
    }
    return this.all().filter(({ expires }) => expires + GRACE * 1000 <= now);
  }

  /**
   * Takes over what was found in the kernel, `remaining` seconds before it expires there. False when it contradicts what is
   * known, or lies in no network of ours: it belongs to nobody and ought to be removed.
   */
  adopt(found: Omit<Tunnel, 'since' | 'expires'>, remaining: number, now: number): boolean {
    const { v4, v6 } = found;
    const { v4: first, reserve, v6: only } = this.#networks;
    const inside = (address: Address | null, ...networks: readonly (Prefix | null)[]): boolean =>
      address === null || networks.some((network) => network !== null && contains(network, address));
    if ((v4 ?? v6) === null || !inside(v4, first, reserve) || !inside(v6, only)) return false;
    if (this.size >= MOST_TUNNELS || this.get(found.publicKey)) return false;
    for (const address of [v4, v6]) if (address && this.#byAddress.has(addressKey(address))) return false;
    this.#keep({ ...found, since: now, expires: now + Math.max(0, remaining - GRACE) * 1000 });
    return true;
  }

  #keep(tunnel: Tunnel): void {
    this.#byKey.set(keyText(tunnel.publicKey), tunnel);
    for (const address of [tunnel.v4, tunnel.v6]) if (address) this.#byAddress.set(addressKey(address), tunnel);
  }

  #drop(tunnel: Tunnel, now: number): void {
    const key = keyText(tunnel.publicKey);
    this.#byKey.delete(key);
    for (const address of [tunnel.v4, tunnel.v6]) {
      if (!address) continue;
      this.#byAddress.delete(addressKey(address));
      this.#freed.delete(addressKey(address));
      this.#freed.set(addressKey(address), { until: now + QUARANTINE_MS, key });
    }
    for (const oldest of this.#freed.keys()) {
      if (this.#freed.size <= QUARANTINES) break;
      this.#freed.delete(oldest);
    }
  }

  /** A free address of the network, for the same key and choice the same; null when there is none. */
  #draw(network: Prefix | null, publicKey: Uint8Array, choice: number, now: number): Address | null {
    if (!network) return null;
    const { family, value } = network.address;
    const size = 1n << BigInt(widthOf(family) - network.length);
    // Without the network's own address, the router's, and the last one, which is a broadcast in IPv4.
    const places = size - 3n;
    if (places < 1n) return null;
    const start = hash([...publicKey, choice], BigInt(family)) % places;
    const key = keyText(publicKey);
    const tries = places < BigInt(QUARANTINES) * 4n ? Number(places) : QUARANTINES * 4;
    for (let step = 0; step < tries; step++) {
      const address: Address = { family, value: value + 2n + ((start + BigInt(step)) % places) };
      // What this very client has is what it does not want.
      if (this.#byAddress.has(addressKey(address))) continue;
      const freed = this.#freed.get(addressKey(address));
      if (!freed || freed.until <= now || freed.key === key) return address;
    }
    return null;
  }

  #account(owner: number, now: number): Account {
    const account = this.#accounts.get(owner) ?? { tokens: NEW_BURST, refilled: now };
    this.#accounts.set(owner, account);
    this.#refill(account, now);
    return account;
  }

  #refill(account: Account, now: number): void {
    account.tokens = Math.min(NEW_BURST, account.tokens + ((now - account.refilled) / 1000) * NEW_PER_SECOND);
    account.refilled = now;
  }
}

/** A network of `wanted` that meets one of `taken`, with that one; null when all are free. */
export function overlapping(
  wanted: readonly Prefix[],
  taken: readonly Prefix[],
): { readonly network: Prefix; readonly other: Prefix } | null {
  for (const network of wanted) {
    const other = taken.find(
      (one) => one.length > 0 && (contains(one, network.address) || contains(network, one.address)),
    );
    if (other) return { network, other };
  }
  return null;
}

/** The network, of those, that an address lies in. */
export const networkOf = (address: Address, networks: readonly (Prefix | null)[]): Prefix | null =>
  networks.find((network) => network !== null && contains(network, address)) ?? null;
