import type { Endpoint } from './address.ts';

/** Control protocol v1, the thesis's MProxy: 12 bytes each way, IPv4, unauthenticated (docs/protocol.md, Version 1). */
export const LEGACY_BYTES = 12;
const LEGACY_VERSION = 1;
const OP = { REQUEST: 0, RESPONSE: 1 } as const;

/** `port` is the detour port: proposed by the client (0 for any), or the one to use. */
export type LegacyMessage = { readonly destination: Endpoint; readonly port: number };

function encode(op: number, { destination, port }: LegacyMessage): Uint8Array {
  const bytes = new Uint8Array(LEGACY_BYTES);
  const data = new DataView(bytes.buffer);
  data.setUint8(0, LEGACY_VERSION);
  data.setUint8(1, op);
  data.setUint32(4, Number(destination.address.value));
  data.setUint16(8, destination.port);
  data.setUint16(10, port);
  return bytes;
}

function decode(op: number, bytes: Uint8Array): LegacyMessage | null {
  if (bytes.length !== LEGACY_BYTES) return null;
  const data = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  if (data.getUint8(0) !== LEGACY_VERSION || data.getUint8(1) !== op) return null;
  const destination: Endpoint = { address: { family: 4, value: BigInt(data.getUint32(4)) }, port: data.getUint16(8) };
  return { destination, port: data.getUint16(10) };
}

export const encodeLegacyRequest = (message: LegacyMessage): Uint8Array => encode(OP.REQUEST, message);
export const encodeLegacyResponse = (message: LegacyMessage): Uint8Array => encode(OP.RESPONSE, message);
/** Null on anything that is no v1 request. */
export const decodeLegacyRequest = (bytes: Uint8Array): LegacyMessage | null => decode(OP.REQUEST, bytes);
/** Null on anything that is no v1 response. */
export const decodeLegacyResponse = (bytes: Uint8Array): LegacyMessage | null => decode(OP.RESPONSE, bytes);
