import { type Address, contains, type Prefix, sameAddress } from '../protocol/address.ts';

/** Names and numbers of the tunnels on this host, and which addresses in them are of use here. Pure. */

/** What every interface of ours begins with; by it and its kind a leftover is known. */
export const TUNNEL_PREFIX = 'dtv-';
/** Letters of the detour's name that people still know it by; the rest of IFNAMSIZ's 15 makes the name nobody else's. */
const READABLE = 5;
const UNIQUE = 6;
/** Tunnels of one namespace: tables from `FIRST_TABLE` and rules from `FIRST_PRIORITY` on, before those of main (32766). */
export const MOST_TUNNELS = 32;
export const FIRST_TABLE = 45_700;
export const FIRST_PRIORITY = 4_570;
/** A shorter prefix is no network but a part of the Internet, as of a VPN for everything. */
const SHORTEST = { 4: 8, 6: 16 } as const;

/**
 * The interface of a detour's tunnel. It has `place`, the namespace, in it: wireguard-go's sockets lie in one folder for the whole
 * host.
 */
export function tunnelName(detour: string, place: string): string {
  const readable = detour
    .toLowerCase()
    .replace(/[^a-z0-9]/g, '')
    .slice(0, READABLE);
  let hash = 0xcbf29ce484222325n;
  for (const letter of `${detour}\n${place}`)
    hash = ((hash ^ BigInt(letter.codePointAt(0) ?? 0)) * 0x100000001b3n) & 0xffffffffffffffffn;
  const unique = (hash % 36n ** BigInt(UNIQUE)).toString(36).padStart(UNIQUE, '0');
  return `${TUNNEL_PREFIX}${readable}${unique}`;
}

export const isTunnelName = (name: string): boolean => name.startsWith(TUNNEL_PREFIX);

/** A table and the priority of the rules that lead to it. */
export type Slot = { readonly table: number; readonly priority: number };

/** Whether the numbers are out of the range that is documented as ours. */
export const isOurSlot = ({ table, priority }: Slot): boolean =>
  table >= FIRST_TABLE && table < FIRST_TABLE + MOST_TUNNELS && priority - FIRST_PRIORITY === table - FIRST_TABLE;

/** The first pair that nobody uses, neither for routes nor for rules; null when all are taken. */
export function freeSlot(rules: readonly Slot[], tables: ReadonlySet<number>): Slot | null {
  const priorities = new Set(rules.map(({ priority }) => priority));
  const looked = new Set(rules.map(({ table }) => table));
  for (let n = 0; n < MOST_TUNNELS; n++) {
    const slot = { table: FIRST_TABLE + n, priority: FIRST_PRIORITY + n };
    if (!priorities.has(slot.priority) && !looked.has(slot.table) && !tables.has(slot.table)) return slot;
  }
  return null;
}

/**
 * The network that an address inside a tunnel lies in on this host, or the one that another tunnel has already, as a host: with
 * the address here, that network's own host of that address could not be reached any more. Null when there is none.
 */
export function clashOf(address: Address, networks: readonly Prefix[], taken: readonly Address[]): Prefix | null {
  const { family } = address;
  const network = networks.find((one) => one.length >= SHORTEST[one.address.family] && contains(one, address));
  if (network) return network;
  return taken.some((other) => sameAddress(other, address)) ? { address, length: family === 4 ? 32 : 128 } : null;
}
