import { createHmac, createSecretKey, hkdfSync, type KeyObject, timingSafeEqual } from 'node:crypto';
import { type Endpoint, readAddress, writeAddress } from './address.ts';

/** Control protocol v2: the bytes, and nothing that needs a clock, a socket or a secret store. Layout: docs/protocol.md. */

/** Every datagram, both ways: an answer is never longer than its question. */
export const MESSAGE_BYTES = 96;
const MAC_BYTES = 16;
const MAC_OFFSET = MESSAGE_BYTES - MAC_BYTES;
const MAGIC = 0xd7;
export const VERSION = 2;
const RESPONSE_BIT = 0x80;
export const PROTOCOL_TCP = 6;
export const COOKIE_BYTES = 16;
export const SECRET_BYTES = 32;

export const TYPE = { HELLO: 1, LEASE: 2, RELEASE: 3, PING: 4 } as const;

export const RESULT = {
  OK: 0,
  CHALLENGE: 1,
  NOT_AUTHORIZED: 32,
  DENIED_DESTINATION: 33,
  BAD_ADDRESS: 34,
  UNSUPPORTED: 35,
  MALFORMED: 36,
  NO_RESOURCES: 64,
  QUOTA: 65,
  RATE: 66,
  DRAINING: 67,
  INTERNAL: 68,
} as const;
export type Result = (typeof RESULT)[keyof typeof RESULT];
export type Refusal = Exclude<Result, 0 | 1>;
export type ResultName = keyof typeof RESULT;

/** `RESULT`'s name for a number from the wire, or `result-N`. */
export function resultName(result: number): string {
  for (const [name, value] of Object.entries(RESULT)) if (value === result) return name;
  return `result-${result}`;
}

/** How long a refusal of this kind lasts, seconds: 32 to 63 is lasting, 64 and up is passing. */
export function defaultRetryAfter(result: Refusal): number {
  return result < 64 ? 1800 : 30;
}

/** Direction keys of one shared secret. */
export type Keys = { readonly id: number; readonly c2s: Uint8Array; readonly s2c: Uint8Array };

/**
 * Derives both direction keys (HKDF-SHA256, RFC 5869) from a 32-byte secret.
 * @throws RangeError when the secret has another length: a shorter one could be guessed.
 */
export function deriveKeys(id: number, secret: Uint8Array): Keys {
  if (secret.length !== SECRET_BYTES) throw new RangeError(`a secret has ${SECRET_BYTES} bytes, not ${secret.length}`);
  const salt = Buffer.alloc(4);
  salt.writeUInt32BE(id);
  const derive = (info: string): Uint8Array => new Uint8Array(hkdfSync('sha256', secret, salt, info, 32));
  return { id, c2s: derive('detour-ctl/2 c2s mac'), s2c: derive('detour-ctl/2 s2c mac') };
}

export type Request = {
  /** A number of `TYPE`, or one this version does not know. */
  readonly type: number;
  readonly flags: number;
  readonly keyId: number;
  readonly session: bigint;
  readonly sequence: bigint;
  readonly cookie: Uint8Array;
  /** Lifetime wanted, seconds; 0 where none applies. */
  readonly lifetime: number;
  readonly vmin: number;
  readonly vmax: number;
  /** Null in HELLO and PING. IPv4-mapped addresses have become IPv4. */
  readonly destination: Endpoint | null;
  /** Detour port the client would like back; 0 for any. */
  readonly suggestedPort: number;
  /** IP protocol of the destination: `PROTOCOL_TCP`, or 0 without one. */
  readonly protocol: number;
};

export type Response = {
  readonly type: number;
  readonly result: number;
  readonly keyId: number;
  readonly session: bigint;
  readonly sequence: bigint;
  readonly epoch: bigint;
  /** Seconds since the router started. */
  readonly uptime: number;
  /** Lifetime granted, or retry-after with a refusal; seconds. */
  readonly lifetime: number;
  /** The client as the router saw it. */
  readonly observed: Endpoint;
  readonly port: number;
  readonly capabilityPort: number;
  readonly flags: number;
  readonly cookie: Uint8Array;
};

/** Why a datagram is no request of this version; each a counter of the router. */
export type Malformation = 'length' | 'magic' | 'version' | 'reserved';

const view = (bytes: Uint8Array): DataView => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);

const prepared = new WeakMap<Uint8Array, KeyObject>();

/** The key in the form that `createHmac` takes at once: from bytes it needs seven times as long (24 us, not 3). */
export function hmacKey(bytes: Uint8Array): KeyObject {
  const known = prepared.get(bytes);
  if (known) return known;
  const key = createSecretKey(bytes);
  prepared.set(bytes, key);
  return key;
}

function mac(key: Uint8Array, ...parts: Uint8Array[]): Uint8Array {
  const hmac = createHmac('sha256', hmacKey(key));
  for (const part of parts) hmac.update(part);
  return hmac.digest().subarray(0, MAC_BYTES);
}

const macOf = (message: Uint8Array): Uint8Array => message.subarray(MAC_OFFSET);

const isZero = (bytes: Uint8Array): boolean => bytes.every((byte) => byte === 0);

/** Writes a request and its MAC. */
export function encodeRequest(request: Request, keys: Keys): Uint8Array {
  const bytes = new Uint8Array(MESSAGE_BYTES);
  const data = view(bytes);
  data.setUint8(0, MAGIC);
  data.setUint8(1, VERSION);
  data.setUint8(2, request.type);
  data.setUint8(3, request.flags);
  data.setUint32(4, request.keyId);
  data.setBigUint64(8, request.session);
  data.setBigUint64(16, request.sequence);
  bytes.set(request.cookie, 24);
  data.setUint32(40, request.lifetime);
  data.setUint8(44, request.vmin);
  data.setUint8(45, request.vmax);
  if (request.destination) {
    writeAddress(request.destination.address, bytes, 48);
    data.setUint16(64, request.destination.port);
  }
  data.setUint16(66, request.suggestedPort);
  data.setUint8(68, request.protocol);
  bytes.set(mac(keys.c2s, bytes.subarray(0, MAC_OFFSET)), MAC_OFFSET);
  return bytes;
}

/**
 * Reads a datagram from an unknown sender. Only its shape is checked, the cheapest test first; nothing in it is to
 * be believed before `requestIsAuthentic`.
 */
export function decodeRequest(bytes: Uint8Array): Request | Malformation {
  if (bytes.length !== MESSAGE_BYTES) return 'length';
  const data = view(bytes);
  if (data.getUint8(0) !== MAGIC) return 'magic';
  if (data.getUint8(1) !== VERSION) return 'version';
  if (data.getUint16(46) !== 0 || !isZero(bytes.subarray(69, MAC_OFFSET))) return 'reserved';
  return {
    type: data.getUint8(2),
    flags: data.getUint8(3),
    keyId: data.getUint32(4),
    session: data.getBigUint64(8),
    sequence: data.getBigUint64(16),
    cookie: bytes.slice(24, 40),
    lifetime: data.getUint32(40),
    vmin: data.getUint8(44),
    vmax: data.getUint8(45),
    destination: isZero(bytes.subarray(48, 66)) ? null : { address: readAddress(bytes, 48), port: data.getUint16(64) },
    suggestedPort: data.getUint16(66),
    protocol: data.getUint8(68),
  };
}

/** Whether the holder of `keys` wrote this request (constant time). Call only after `decodeRequest` accepted it. */
export function requestIsAuthentic(bytes: Uint8Array, keys: Keys): boolean {
  return timingSafeEqual(mac(keys.c2s, bytes.subarray(0, MAC_OFFSET)), macOf(bytes));
}

/** Writes the answer to `request` (its bytes: the MAC binds the answer to exactly that question). */
export function encodeResponse(response: Response, keys: Keys, request: Uint8Array): Uint8Array {
  const bytes = new Uint8Array(MESSAGE_BYTES);
  const data = view(bytes);
  data.setUint8(0, MAGIC);
  data.setUint8(1, VERSION);
  data.setUint8(2, response.type | RESPONSE_BIT);
  data.setUint8(3, response.result);
  data.setUint32(4, response.keyId);
  data.setBigUint64(8, response.session);
  data.setBigUint64(16, response.sequence);
  data.setBigUint64(24, response.epoch);
  data.setUint32(32, response.uptime);
  data.setUint32(36, response.lifetime);
  writeAddress(response.observed.address, bytes, 40);
  data.setUint16(56, response.observed.port);
  data.setUint16(58, response.port);
  data.setUint16(60, response.capabilityPort);
  data.setUint16(62, response.flags);
  bytes.set(response.cookie, 64);
  bytes.set(mac(keys.s2c, bytes.subarray(0, MAC_OFFSET), macOf(request)), MAC_OFFSET);
  return bytes;
}

/**
 * Reads the answer to `request`. Null for anything else: garbage, an answer to another question, a forgery.
 */
export function decodeResponse(bytes: Uint8Array, keys: Keys, request: Uint8Array): Response | null {
  if (bytes.length !== MESSAGE_BYTES) return null;
  const data = view(bytes);
  if (data.getUint8(0) !== MAGIC || data.getUint8(1) !== VERSION) return null;
  if (data.getUint8(2) !== (view(request).getUint8(2) | RESPONSE_BIT)) return null;
  // Key id, session and sequence are echoed; compared before the MAC because it is cheaper.
  if (!Buffer.from(bytes.subarray(4, 24)).equals(request.subarray(4, 24))) return null;
  if (!timingSafeEqual(mac(keys.s2c, bytes.subarray(0, MAC_OFFSET), macOf(request)), macOf(bytes))) return null;
  return {
    type: data.getUint8(2) & ~RESPONSE_BIT,
    result: data.getUint8(3),
    keyId: data.getUint32(4),
    session: data.getBigUint64(8),
    sequence: data.getBigUint64(16),
    epoch: data.getBigUint64(24),
    uptime: data.getUint32(32),
    lifetime: data.getUint32(36),
    observed: { address: readAddress(bytes, 40), port: data.getUint16(56) },
    port: data.getUint16(58),
    capabilityPort: data.getUint16(60),
    flags: data.getUint16(62),
    cookie: bytes.slice(64, 80),
  };
}
