/**
 * One address type for the whole program. Text exists only at the edges (settings, nft, logs); everything that
 * decides compares numbers, so no spelling of an address can slip past a rule written for another spelling.
 */

/** An IPv4 or IPv6 address. `value` is the address as an unsigned integer of 32 or 128 bits. */
export type Address = { readonly family: 4 | 6; readonly value: bigint };

/** A transport address. `port` is 0 to 65535. */
export type Endpoint = { readonly address: Address; readonly port: number };

/** An inclusive range of ports. */
export type PortRange = { readonly first: number; readonly last: number };

/** `length` leading bits of `address` are significant; the others are zero. */
export type Prefix = { readonly address: Address; readonly length: number };

/** A destination rule `CIDR[:ports]`. No ports means all ports. */
export type DestinationRule = { readonly prefix: Prefix; readonly ports: readonly PortRange[] };

const V4_MAPPED = 0xffffn;

const bits = (family: 4 | 6): number => (family === 4 ? 32 : 128);

function parseV4(text: string): bigint | null {
  const parts = text.split('.');
  if (parts.length !== 4) return null;
  let value = 0n;
  for (const part of parts) {
    // No leading zeros: inet_aton reads them as octal, and two readings of one text are a bypass.
    if (!/^(0|[1-9]\d{0,2})$/.test(part)) return null;
    const octet = Number(part);
    if (octet > 255) return null;
    value = (value << 8n) | BigInt(octet);
  }
  return value;
}

function parseV6(text: string): bigint | null {
  let head = text;
  const tail4 = text.lastIndexOf(':');
  if (text.includes('.')) {
    const v4 = parseV4(text.slice(tail4 + 1));
    if (v4 === null) return null;
    head = `${text.slice(0, tail4 + 1)}${(v4 >> 16n).toString(16)}:${(v4 & 0xffffn).toString(16)}`;
  }
  const halves = head.split('::');
  if (halves.length > 2) return null;
  const groups = (half: string | undefined): string[] => (half ? half.split(':') : []);
  const left = groups(halves[0]);
  const right = groups(halves[1]);
  const missing = 8 - left.length - right.length;
  if (halves.length === 2 ? missing < 1 : missing !== 0) return null;
  let value = 0n;
  for (const group of [...left, ...Array<string>(missing).fill('0'), ...right]) {
    if (!/^[0-9a-f]{1,4}$/i.test(group)) return null;
    value = (value << 16n) | BigInt(`0x${group}`);
  }
  return value;
}

/**
 * Reads a literal address. IPv4-mapped IPv6 (`::ffff:0:0/96`, RFC 4291 2.5.5.2) becomes IPv4, because that is what the
 * kernel will send. Zones (`%eth0`) and names are refused. Null when the text is no address.
 */
export function parseAddress(text: string): Address | null {
  if (!text.includes(':')) {
    const value = parseV4(text);
    return value === null ? null : { family: 4, value };
  }
  const value = parseV6(text);
  return value === null ? null : unmap(value);
}

function unmap(value: bigint): Address {
  return value >> 32n === V4_MAPPED ? { family: 4, value: value & 0xffffffffn } : { family: 6, value };
}

/** Canonical text: dotted quad, or RFC 5952 (lower case, longest run of zero groups shortened). */
export function formatAddress(address: Address): string {
  if (address.family === 4) {
    const value = Number(address.value);
    return `${value >>> 24}.${(value >>> 16) & 255}.${(value >>> 8) & 255}.${value & 255}`;
  }
  const groups = Array.from({ length: 8 }, (_, i) => Number((address.value >> BigInt(112 - 16 * i)) & 0xffffn));
  let best = { start: -1, length: 1 };
  for (let start = 0; start < 8; start++) {
    let end = start;
    while (end < 8 && groups[end] === 0) end++;
    if (end - start > best.length) best = { start, length: end - start };
  }
  const text = (from: number, to: number): string =>
    groups
      .slice(from, to)
      .map((group) => group.toString(16))
      .join(':');
  return best.start < 0 ? text(0, 8) : `${text(0, best.start)}::${text(best.start + best.length, 8)}`;
}

/** `1.2.3.4:443` or `[2001:db8::1]:443`. */
export function formatEndpoint({ address, port }: Endpoint): string {
  return address.family === 4 ? `${formatAddress(address)}:${port}` : `[${formatAddress(address)}]:${port}`;
}

/** Reads `1.2.3.4:443` or `[v6]:443`; null when it is not one. Port 1 to 65535. */
export function parseEndpoint(text: string): Endpoint | null {
  const match = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text);
  if (!match) return null;
  const address = parseAddress(match[1] ?? match[2] ?? '');
  const port = Number(match[3]);
  if (!address || port < 1 || port > 65535) return null;
  if ((match[1] !== undefined) !== (match[1] ?? match[2] ?? '').includes(':')) return null;
  return { address, port };
}

/** Reads `a.b.c.d/n`, `v6/n` or a bare address (a host). Null when host bits are set or the length is out of range. */
export function parsePrefix(text: string): Prefix | null {
  const slash = text.indexOf('/');
  const address = parseAddress(slash < 0 ? text : text.slice(0, slash));
  if (!address) return null;
  if (slash < 0) return { address, length: bits(address.family) };
  const digits = text.slice(slash + 1);
  if (!/^\d{1,3}$/.test(digits)) return null;
  // A mapped prefix was written with 128 bits in mind.
  const mapped = address.family === 4 && text.includes(':');
  const length = Number(digits) - (mapped ? 96 : 0);
  if (length < 0 || length > bits(address.family)) return null;
  const prefix = { address, length };
  return networkOf(address, length) === address.value ? prefix : null;
}

function networkOf(address: Address, length: number): bigint {
  const host = BigInt(bits(address.family) - length);
  return (address.value >> host) << host;
}

/** The prefix of `length` bits that contains `address`. */
export function prefixOf(address: Address, length: number): Prefix {
  return { address: { family: address.family, value: networkOf(address, length) }, length };
}

/** `10.0.0.0/8`; always with a length, as nft prints and reads it. */
export function formatPrefix({ address, length }: Prefix): string {
  return `${formatAddress(address)}/${length}`;
}

/** Whether `address` lies in `prefix`; never across families. */
export function contains(prefix: Prefix, address: Address): boolean {
  return prefix.address.family === address.family && networkOf(address, prefix.length) === prefix.address.value;
}

/** Whether the rule covers this endpoint. */
export function covers(rule: DestinationRule, { address, port }: Endpoint): boolean {
  if (!contains(rule.prefix, address)) return false;
  return rule.ports.length === 0 || rule.ports.some(({ first, last }) => first <= port && port <= last);
}

export function sameAddress(a: Address, b: Address): boolean {
  return a.family === b.family && a.value === b.value;
}

export function sameEndpoint(a: Endpoint, b: Endpoint): boolean {
  return a.port === b.port && sameAddress(a.address, b.address);
}

const word = (bytes: Uint8Array, at: number): number =>
  (((bytes[at] ?? 0) << 24) | ((bytes[at + 1] ?? 0) << 16) | ((bytes[at + 2] ?? 0) << 8) | (bytes[at + 3] ?? 0)) >>> 0;

/**
 * Reads 16 network-order bytes; IPv4-mapped becomes IPv4, everything else stays IPv6. By words, because each step of a
 * bigint is garbage, and this is done for every datagram.
 */
export function readAddress(bytes: Uint8Array, offset = 0): Address {
  const [a, b, c, d] = [
    word(bytes, offset),
    word(bytes, offset + 4),
    word(bytes, offset + 8),
    word(bytes, offset + 12),
  ];
  if (a === 0 && b === 0 && c === 0xffff) return { family: 4, value: BigInt(d) };
  return { family: 6, value: (BigInt(a) << 96n) | (BigInt(b) << 64n) | (BigInt(c) << 32n) | BigInt(d) };
}

/** Writes 16 network-order bytes, IPv4 as `::ffff:a.b.c.d`. */
export function writeAddress({ family, value }: Address, bytes: Uint8Array, offset = 0): void {
  if (family === 4) {
    bytes.fill(0, offset, offset + 10);
    bytes.fill(0xff, offset + 10, offset + 12);
    writeWord(Number(value), bytes, offset + 12);
    return;
  }
  for (let at = 0; at < 4; at++) {
    writeWord(Number((value >> BigInt(96 - 32 * at)) & 0xffffffffn), bytes, offset + 4 * at);
  }
}

function writeWord(value: number, bytes: Uint8Array, at: number): void {
  bytes[at] = value >>> 24;
  bytes[at + 1] = (value >>> 16) & 255;
  bytes[at + 2] = (value >>> 8) & 255;
  bytes[at + 3] = value & 255;
}

/** Prefixes whose addresses carry an IPv4 address inside, each a second spelling of a destination. */
const EMBEDDING = [
  '::/96', // IPv4-compatible, RFC 4291 2.5.5.1
  '::ffff:0:0:0/96', // IPv4-translated, RFC 2765
  '64:ff9b::/96', // NAT64, RFC 6052
  '64:ff9b:1::/48', // local NAT64, RFC 8215
  '2001::/32', // Teredo, RFC 4380
  '2002::/16', // 6to4, RFC 3056
].map((text) => {
  const prefix = parsePrefix(text);
  if (!prefix) throw new Error(`not a prefix: ${text}`);
  return prefix;
});

/**
 * Whether an IPv6 address is another way to write an IPv4 destination (RFC 4291 2.5.5.1, RFC 2765, 3056, 4380, 5214,
 * 6052, 8215). IPv4-mapped addresses never get here: they became IPv4 when they were read. `::` and `::1` are no
 * embeddings (RFC 4291 2.5.2, 2.5.3).
 */
export function embedsIPv4(address: Address): boolean {
  if (address.family === 4 || address.value <= 1n) return false;
  // ISATAP interface identifiers 0000:5efe and 0200:5efe, RFC 5214 6.1, under any prefix.
  const identifier = (address.value >> 32n) & 0xffffffffn;
  if (identifier === 0x5efen || identifier === 0x02005efen) return true;
  return EMBEDDING.some((prefix) => contains(prefix, address));
}

/** An address as 8 or 32 hex digits, for places where only letters and digits may be. */
export const hexOfAddress = ({ family, value }: Address): string =>
  value.toString(16).padStart(family === 4 ? 8 : 32, '0');

/** Reads what `hexOfAddress` wrote; null for anything else. */
export function addressFromHex(text: string): Address | null {
  if (!/^([0-9a-f]{8}|[0-9a-f]{32})$/.test(text)) return null;
  return { family: text.length === 8 ? 4 : 6, value: BigInt(`0x${text}`) };
}
