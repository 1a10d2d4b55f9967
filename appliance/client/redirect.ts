import { type Endpoint, formatAddress, formatEndpoint } from '../protocol/address.ts';

/**
 * How new connections of this host are led through a detour, as text for nft: one table of our own, `inet
 * detour_rescue`, whose rules are constant and whose maps say which server is reached where. It exists only while a
 * map has an element, or a connection lives that was led so: without a rule that needs it the kernel stops translating.
 * Every command is on a line of its own, and made of numbers and addresses only.
 */

const NAME = 'detour_rescue';
export const RESCUE_TABLE = `inet ${NAME}`;

/** A server, and where the SYNs to it go instead. Both are of one family. */
export type Redirection = { readonly server: Endpoint; readonly to: Endpoint };

/** More servers than this are not rescued at once. */
export const MOST_REDIRECTIONS = 64;
/** Seconds after which an element goes by itself: an agent that was killed leads nobody astray for longer. */
const LIFETIME_S = 60;

const MAPS = { 4: 'servers4', 6: 'servers6' } as const;
/** The table and a map that it has whenever it is there. */
export const REDIRECTIONS = [NAME, MAPS[4]] as const;
const SYN = 'tcp flags & (fin|syn|rst|ack) == syn';
/** MP_CAPABLE, RFC 8684 3.1: joins to the server itself stay what they are. */
const CAPABLE = 'tcp option mptcp subtype 0';

const hex = (value: number): string => `0x${(value >>> 0).toString(16).padStart(8, '0')}`;

/**
 * The transaction after which just these servers are reached elsewhere, each for the next 60 s. Connections that exist
 * keep their translation. What carries our mark is left alone.
 */
export function renderRedirections(
  servers: readonly Redirection[],
  { mark, mask }: { readonly mark: number; readonly mask: number },
): string {
  const setMark = `ct mark set ct mark and ${hex(~mask)} or ${hex(mark)}`;
  const families = [
    { family: 4, ip: 'ip', type: 'ipv4_addr' },
    { family: 6, ip: 'ip6', type: 'ipv6_addr' },
  ] as const;
  const lines = [
    `add table ${RESCUE_TABLE}`,
    ...families.map(({ family, type }) => {
      const key = `${type} . inet_service`;
      return `add map ${RESCUE_TABLE} ${MAPS[family]} { type ${key} : ${key}; flags timeout; size ${MOST_REDIRECTIONS}; }`;
    }),
    ...families.map(({ family }) => `flush map ${RESCUE_TABLE} ${MAPS[family]}`),
    `add chain ${RESCUE_TABLE} output { type nat hook output priority -100; policy accept; }`,
    `add chain ${RESCUE_TABLE} leaving { type nat hook postrouting priority srcnat; policy accept; }`,
    `flush chain ${RESCUE_TABLE} output`,
    `flush chain ${RESCUE_TABLE} leaving`,
    ...families.map(
      ({ family, ip }) =>
        `add rule ${RESCUE_TABLE} output meta mark and ${hex(mask)} != ${hex(mark)} ${SYN} ${CAPABLE} ` +
        `${ip} daddr . tcp dport @${MAPS[family]} ${setMark} dnat ${ip} to ${ip} daddr . tcp dport map @${MAPS[family]}`,
    ),
    // The source address was chosen for the server; the lease is for the one that leads to the detour.
    `add rule ${RESCUE_TABLE} leaving ct status dnat ct mark and ${hex(mask)} == ${hex(mark)} masquerade`,
    ...servers.map(({ server, to }) => {
      const { address, port } = server;
      const element = `${formatAddress(address)} . ${port} timeout ${LIFETIME_S}s : ${formatAddress(to.address)} . ${to.port}`;
      if (address.family !== to.address.family) throw new Error(`${formatEndpoint(server)} is of another family`);
      return `add element ${RESCUE_TABLE} ${MAPS[address.family]} { ${element} }`;
    }),
  ];
  return `${lines.join('\n')}\n`;
}

/** The transaction that leaves nothing of it; it succeeds when there is nothing, too. */
export const REMOVE_REDIRECTIONS = `add table ${RESCUE_TABLE}\ndelete table ${RESCUE_TABLE}\n`;
