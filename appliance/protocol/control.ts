import { createHmac, createSecretKey, hkdfSync, type KeyObject, timingSafeEqual } from 'node:crypto';
import { type Address, type Endpoint, readAddress, writeAddress } from './address.ts';

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

export const TYPE = { HELLO: 1, LEASE: 2, RELEASE: 3, PING: 4, TUNNEL: 5, ANNOUNCE: 6 } as const;

/** In the flags of TUNNEL and RELEASE: bytes 48 to 79 are a WireGuard public key, not a destination. */
export const FLAG_PEER = 1;
/** In the flags of RELEASE: it is an announcement that is given up, not a lease. */
export const FLAG_ANNOUNCED = 2;
/** Of WireGuard (Curve25519). */
export const PUBLIC_KEY_BYTES = 32;

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
  /** In TUNNEL and RELEASE with `FLAG_PEER`, where there is no destination. */
  readonly peer?: Peer;
};

/** A client's end of a tunnel. */
export type Peer = {
  /** `PUBLIC_KEY_BYTES` long. */
  readonly publicKey: Uint8Array;
  /** Which of the addresses that the router has for this key; 0 to 65,535, the first that suits the client. 0 in RELEASE. */
  readonly choice: number;
};

/** What an OK to TUNNEL says: without `FLAG_PEER` the router's end, with it the client's addresses. */
export type TunnelGrant =
  | {
      readonly kind: 'router';
      readonly publicKey: Uint8Array;
      /** UDP port of the tunnels. */
      readonly port: number;
      /** UDP port of this protocol inside them, which may be another one outside. */
      readonly control: number;
    }
  | {
      readonly kind: 'client';
      /** Of each family that the tunnel carries. `length` is of the tunnel's network, whose first address is the router's. */
      readonly v6: TunnelAddress | null;
      readonly v4: TunnelAddress | null;
      /** Largest packet inside the tunnel, bytes; 0: the client may choose. */
      readonly mtu: number;
      readonly cookie: Uint8Array;
    };
export type TunnelAddress = { readonly address: Address; readonly length: number };

/** What every answer begins with. */
type Head = {
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
};

/** Every answer but an OK to TUNNEL. */
export type Response = Head & {
  /** The client as the router saw it. */
  readonly observed: Endpoint;
  readonly port: number;
  readonly capabilityPort: number;
  /** `tunnelMark` of the router's WireGuard key; 0 when it offers no tunnels. */
  readonly flags: number;
  readonly cookie: Uint8Array;
};

/** An OK to TUNNEL. */
export type TunnelResponse = Head & { readonly tunnel: TunnelGrant };

/** 16 bits that tell one WireGuard key of a router from the next: a client sees in any answer that its tunnel has no other end. */
export function tunnelMark(publicKey: Uint8Array): number {
  return view(publicKey).getUint16(0) || 1;
}

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
  if (request.peer) {
    data.setUint16(46, request.peer.choice);
    bytes.set(request.peer.publicKey, 48);
  } else {
    if (request.destination) {
      writeAddress(request.destination.address, bytes, 48);
      data.setUint16(64, request.destination.port);
    }
    data.setUint16(66, request.suggestedPort);
    data.setUint8(68, request.protocol);
  }
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
  const [type, flags, choice] = [data.getUint8(2), data.getUint8(3), data.getUint16(46)];
  const hasPeer = flags === FLAG_PEER && (type === TYPE.TUNNEL || type === TYPE.RELEASE);
  if (choice !== 0 && !(hasPeer && type === TYPE.TUNNEL)) return 'reserved';
  if (!hasPeer && !isZero(bytes.subarray(69, MAC_OFFSET))) return 'reserved';
  const destination =
    hasPeer || isZero(bytes.subarray(48, 66)) ? null : { address: readAddress(bytes, 48), port: data.getUint16(64) };
  return {
    type,
    flags,
    keyId: data.getUint32(4),
    session: data.getBigUint64(8),
    sequence: data.getBigUint64(16),
    cookie: bytes.slice(24, 40),
    lifetime: data.getUint32(40),
    vmin: data.getUint8(44),
    vmax: data.getUint8(45),
    destination,
    suggestedPort: hasPeer ? 0 : data.getUint16(66),
    protocol: hasPeer ? 0 : data.getUint8(68),
    ...(hasPeer ? { peer: { publicKey: new Uint8Array(bytes.subarray(48, MAC_OFFSET)), choice } } : {}),
  };
}

/** Whether the holder of `keys` wrote this request (constant time). Call only after `decodeRequest` accepted it. */
export function requestIsAuthentic(bytes: Uint8Array, keys: Keys): boolean {
  return timingSafeEqual(mac(keys.c2s, bytes.subarray(0, MAC_OFFSET)), macOf(bytes));
}

function encodeHead(head: Head): { bytes: Uint8Array; data: DataView } {
  const bytes = new Uint8Array(MESSAGE_BYTES);
  const data = view(bytes);
  data.setUint8(0, MAGIC);
  data.setUint8(1, VERSION);
  data.setUint8(2, head.type | RESPONSE_BIT);
  data.setUint8(3, head.result);
  data.setUint32(4, head.keyId);
  data.setBigUint64(8, head.session);
  data.setBigUint64(16, head.sequence);
  data.setBigUint64(24, head.epoch);
  data.setUint32(32, head.uptime);
  data.setUint32(36, head.lifetime);
  return { bytes, data };
}

/** Writes the answer to `request` (its bytes: the MAC binds the answer to exactly that question). */
export function encodeResponse(response: Response | TunnelResponse, keys: Keys, request: Uint8Array): Uint8Array {
  const { bytes, data } = encodeHead(response);
  if ('tunnel' in response) writeGrant(response.tunnel, bytes, data);
  else {
    writeAddress(response.observed.address, bytes, 40);
    data.setUint16(56, response.observed.port);
    data.setUint16(58, response.port);
    data.setUint16(60, response.capabilityPort);
    data.setUint16(62, response.flags);
    bytes.set(response.cookie, 64);
  }
  bytes.set(mac(keys.s2c, bytes.subarray(0, MAC_OFFSET), macOf(request)), MAC_OFFSET);
  return bytes;
}

function writeGrant(grant: TunnelGrant, bytes: Uint8Array, data: DataView): void {
  if (grant.kind === 'router') {
    bytes.set(grant.publicKey, 40);
    data.setUint16(72, grant.port);
    data.setUint16(74, grant.control);
    return;
  }
  const { v6, v4, mtu, cookie } = grant;
  if (v6) writeAddress(v6.address, bytes, 40);
  if (v4) data.setUint32(56, Number(v4.address.value));
  data.setUint8(60, v6?.length ?? 0);
  data.setUint8(61, v4?.length ?? 0);
  data.setUint16(62, mtu);
  bytes.set(cookie, 64);
}

/**
 * Reads the answer to `request`. Null for anything else: garbage, an answer to another question, a forgery, a grant of
 * addresses that are none.
 */
export function decodeAnswer(bytes: Uint8Array, keys: Keys, request: Uint8Array): Response | TunnelResponse | null {
  if (bytes.length !== MESSAGE_BYTES) return null;
  const data = view(bytes);
  if (data.getUint8(0) !== MAGIC || data.getUint8(1) !== VERSION) return null;
  const [type, flags] = [view(request).getUint8(2), view(request).getUint8(3)];
  if (data.getUint8(2) !== (type | RESPONSE_BIT)) return null;
  // Key id, session and sequence are echoed; compared before the MAC because it is cheaper.
  if (!Buffer.from(bytes.subarray(4, 24)).equals(request.subarray(4, 24))) return null;
  if (!timingSafeEqual(mac(keys.s2c, bytes.subarray(0, MAC_OFFSET), macOf(request)), macOf(bytes))) return null;
  const head: Head = {
    type,
    result: data.getUint8(3),
    keyId: data.getUint32(4),
    session: data.getBigUint64(8),
    sequence: data.getBigUint64(16),
    epoch: data.getBigUint64(24),
    uptime: data.getUint32(32),
    lifetime: data.getUint32(36),
  };
  if (type === TYPE.TUNNEL && head.result === RESULT.OK) {
    const tunnel = readGrant(flags, bytes, data);
    return tunnel && { ...head, tunnel };
  }
  return {
    ...head,
    observed: { address: readAddress(bytes, 40), port: data.getUint16(56) },
    port: data.getUint16(58),
    capabilityPort: data.getUint16(60),
    flags: data.getUint16(62),
    cookie: bytes.slice(64, 80),
  };
}

/** As `decodeAnswer`, for who asks for no tunnels. */
export function decodeResponse(bytes: Uint8Array, keys: Keys, request: Uint8Array): Response | null {
  const answer = decodeAnswer(bytes, keys, request);
  return answer && 'tunnel' in answer ? null : answer;
}

function readGrant(flags: number, bytes: Uint8Array, data: DataView): TunnelGrant | null {
  if (flags !== FLAG_PEER) {
    const [port, control] = [data.getUint16(72), data.getUint16(74)];
    if (port === 0 || control === 0) return null;
    return { kind: 'router', publicKey: new Uint8Array(bytes.subarray(40, 72)), port, control };
  }
  const first = readAddress(bytes, 40);
  const v6 = first.family === 6 ? tunnelAddress(first, data.getUint8(60)) : undefined;
  const v4 = tunnelAddress({ family: 4, value: BigInt(data.getUint32(56)) }, data.getUint8(61));
  if (v6 === undefined || v4 === undefined || (v6 === null && v4 === null)) return null;
  return { kind: 'client', v6, v4, mtu: data.getUint16(62), cookie: bytes.slice(64, 80) };
}

/** Null without an address; undefined for one in no network that has room for two ends. */
function tunnelAddress(address: Address, length: number): TunnelAddress | null | undefined {
  if (address.value === 0n && length === 0) return null;
  return length >= 1 && length < (address.family === 4 ? 32 : 128) - 1 ? { address, length } : undefined;
}
