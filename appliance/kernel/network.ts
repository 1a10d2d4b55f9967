import pLimit from 'p-limit';
import { type Address, readAddress } from '../protocol/address.ts';
import { addressBytes } from './links.ts';
import type { Namespace } from './namespaces.ts';
import { attribute, integer, NetlinkError, openNetlink, PROTOCOL, readAttributes } from './netlink.ts';
import {
  AF_INET,
  AF_INET6,
  HELD,
  LINK,
  LINK_LOOPBACK,
  LINK_RUNNING,
  LINK_UP,
  MESSAGE,
  OWNER,
  ROUTE,
  ROUTE_BLACKHOLE,
  ROUTE_UNICAST,
  RULE,
  SCOPE_LINK,
} from './rtnetlink.ts';

/**
 * Interfaces, addresses and routes of this process's network namespace (rtnetlink). Reading and listening need no privilege and
 * change nothing.
 */

/** An address that packets can leave from now: its interface is up and has its carrier, and nobody else has the address. */
export type InterfaceAddress = {
  readonly address: Address;
  readonly interface: string;
  readonly index: number;
  /** Still good for what runs, not to be used for anything new (RFC 4862). */
  readonly deprecated: boolean;
};

/** A default route of the main table; the lowest metric wins. */
export type DefaultRoute = { readonly family: 4 | 6; readonly index: number; readonly metric: number };

/** Where the kernel would send packets to some address, and from which address of this host. */
export type Route = { readonly source: Address; readonly index: number };

/** See `newsOf`. */
export type NetworkNews = 'way' | 'link';

export type Network = {
  /** Every usable address but those of the loopback and link-local ones. @throws NetlinkError */
  addresses(): Promise<readonly InterfaceAddress[]>;
  /** Reads all routes of the main table. @throws NetlinkError */
  defaults(): Promise<readonly DefaultRoute[]>;
  /** Null when there is no way; with `from`, of what an application bound to that address would send. @throws NetlinkError */
  route(to: Address, from?: Address): Promise<Route | null>;
  /** Stops listening. */
  close(): void;
};

/** `RTNLGRP_*`: links, IPv4 addresses, routes and rules, IPv6 addresses, routes and rules. */
const GROUPS = [1, 5, 7, 8, 9, 11, 19] as const;

/** `IFA_F_*` */
const HELD_DAD_FAILED = 0x08;
const HELD_DEPRECATED = 0x20;
const HELD_TENTATIVE = 0x40;
const HELD_OPTIMISTIC = 0x04;

/** `RT_TABLE_MAIN` */
const TABLE_MAIN = 254;
/** struct rtnexthop */
const HOP = { BYTES: 8, INDEX: 4 } as const;

/**
 * What a notification may change: `way`, where packets of this host go; `link`, which may have changed the usable
 * addresses, or have been one of many on a host of containers. Null for local and link-local entries, which come with
 * every one of those, and for what this program made.
 */
export function newsOf(type: number, payload: Buffer): NetworkNews | null {
  switch (type) {
    case MESSAGE.NEWLINK:
    case MESSAGE.DELLINK:
      return 'link';
    case MESSAGE.NEWRULE:
    case MESSAGE.DELRULE:
      return readAttributes(payload, RULE.BYTES).get(RULE.PROTOCOL)?.[0] === OWNER ? null : 'way';
    case MESSAGE.NEWADDR:
    case MESSAGE.DELADDR:
      return payload.length >= HELD.BYTES && (payload[HELD.SCOPE] ?? 0) < SCOPE_LINK ? 'link' : null;
    case MESSAGE.NEWROUTE:
    case MESSAGE.DELROUTE: {
      if (payload.length < ROUTE.BYTES) return null;
      const kind = payload[ROUTE.TYPE] ?? 0;
      if (payload[ROUTE.PROTOCOL] === OWNER) return null;
      // Refusals matter like ways.
      if (kind !== ROUTE_UNICAST && kind < ROUTE_BLACKHOLE) return null;
      const to = readAttributes(payload, ROUTE.BYTES).get(ROUTE.TO);
      // fe80::/10 and ff00::/8
      const near = to?.[0] === 0xff || (to?.[0] === 0xfe && ((to[1] ?? 0) & 0xc0) === 0x80);
      return payload[0] === AF_INET6 && near ? null : 'way';
    }
    default:
      return null;
  }
}

/**
 * Listens for changes, of which `onNews` is told one by one, without their content: bursts are the caller's to join.
 * @throws NetlinkError
 */
export function openNetwork(namespace: Namespace, onNews: (news: NetworkNews) => void): Network {
  const questions = openNetlink(PROTOCOL.ROUTE, { namespace });
  const events = openNetlink(PROTOCOL.ROUTE, {
    namespace,
    onNotification: ({ type, payload }) => {
      const news = newsOf(type, payload);
      if (news !== null) onNews(news);
    },
    onLost: () => onNews('way'),
  });
  for (const group of GROUPS) events.join(group);

  async function links(): Promise<Map<number, { name: string; usable: boolean }>> {
    const found = new Map<number, { name: string; usable: boolean }>();
    await questions.dump('listing interfaces', MESSAGE.GETLINK, Buffer.alloc(LINK.BYTES), (record) => {
      if (record.length < LINK.BYTES) return;
      const flags = record.readUInt32LE(LINK.FLAGS);
      const name = readAttributes(record, LINK.BYTES).get(LINK.NAME)?.toString('latin1').replace(/\0+$/, '') ?? '';
      const usable = (flags & LINK_UP) !== 0 && (flags & LINK_RUNNING) !== 0 && (flags & LINK_LOOPBACK) === 0;
      found.set(record.readInt32LE(LINK.INDEX), { name, usable });
    });
    return found;
  }

  // One dump at a time: the kernel answers EBUSY to a second one on the same socket.
  const inTurn = pLimit(1);
  async function read(): Promise<readonly InterfaceAddress[]> {
    const known = await links();
    const found: InterfaceAddress[] = [];
    await questions.dump('listing addresses', MESSAGE.GETADDR, Buffer.alloc(HELD.BYTES), (record) => {
      const one = readHeld(record);
      const link = one === null ? undefined : known.get(one.index);
      if (one !== null && link?.usable) found.push({ ...one, interface: link.name });
    });
    return found;
  }

  async function readDefaults(): Promise<readonly DefaultRoute[]> {
    const found: DefaultRoute[] = [];
    for (const family of [AF_INET, AF_INET6]) {
      const header = Buffer.alloc(ROUTE.BYTES);
      header[0] = family;
      await questions.dump('listing routes', MESSAGE.GETROUTE, header, (record) => found.push(...readDefault(record)));
    }
    return found;
  }

  return {
    addresses: () => inTurn(read),
    defaults: () => inTurn(readDefaults),
    async route(to, from) {
      const header = Buffer.alloc(ROUTE.BYTES);
      header[0] = to.family === 4 ? AF_INET : AF_INET6;
      header[ROUTE.TO_LENGTH] = to.family === 4 ? 32 : 128;
      const parts = [header, attribute(ROUTE.TO, addressBytes(to))];
      if (from) {
        header[ROUTE.FROM_LENGTH] = to.family === 4 ? 32 : 128;
        parts.push(attribute(ROUTE.FROM, addressBytes(from)));
      }
      try {
        const [answer] = await questions.request('asking for a route', MESSAGE.GETROUTE, Buffer.concat(parts));
        return answer ? readRoute(answer, from ?? null) : null;
      } catch (error) {
        // Of its own: no way (ENETUNREACH, EHOSTUNREACH), forbidden (EACCES), or `from` is not this host's (EINVAL).
        if (error instanceof NetlinkError && NO_WAY.includes(error.code)) return null;
        throw error;
      }
    },
    close() {
      events.close();
      questions.close();
    },
  };
}

const NO_WAY: readonly string[] = ['ENETUNREACH', 'EHOSTUNREACH', 'ENETDOWN', 'EACCES', 'EINVAL', 'ESRCH', 'ENODEV'];

const addressOf = (bytes: Buffer | undefined): Address | null => {
  if (bytes?.length === 4) return { family: 4, value: BigInt(bytes.readUInt32BE()) };
  return bytes?.length === 16 ? readAddress(bytes) : null;
};

/** One record of RTM_GETADDR; null when packets cannot leave from it, or not across a link. */
export function readHeld(record: Buffer): Omit<InterfaceAddress, 'interface'> | null {
  if (record.length < HELD.BYTES || (record[HELD.SCOPE] ?? 0) >= SCOPE_LINK) return null;
  const attributes = readAttributes(record, HELD.BYTES);
  const flags = integer(attributes.get(HELD.ALL_FLAGS)) ?? record[HELD.FLAGS] ?? 0;
  if ((flags & HELD_DAD_FAILED) !== 0) return null;
  if ((flags & HELD_TENTATIVE) !== 0 && (flags & HELD_OPTIMISTIC) === 0) return null;
  const address = addressOf(attributes.get(HELD.LOCAL) ?? attributes.get(HELD.ADDRESS));
  const deprecated = (flags & HELD_DEPRECATED) !== 0;
  return address && { address, index: record.readUInt32LE(HELD.INDEX), deprecated };
}

/** One record of RTM_GETROUTE: the interfaces of a default route, or nothing. */
export function readDefault(record: Buffer): DefaultRoute[] {
  if (record.length < ROUTE.BYTES || record[ROUTE.TO_LENGTH] !== 0 || record[ROUTE.TYPE] !== ROUTE_UNICAST) return [];
  if (record[ROUTE.TABLE] !== TABLE_MAIN) return [];
  const attributes = readAttributes(record, ROUTE.BYTES);
  const family = record[0] === AF_INET ? 4 : 6;
  const metric = integer(attributes.get(ROUTE.METRIC)) ?? 0;
  const index = integer(attributes.get(ROUTE.OUT));
  if (index !== null) return [{ family, index, metric }];
  const hops = attributes.get(ROUTE.MANY) ?? Buffer.alloc(0);
  const found: DefaultRoute[] = [];
  for (let at = 0; at + HOP.BYTES <= hops.length; ) {
    found.push({ family, index: hops.readInt32LE(at + HOP.INDEX), metric });
    at += Math.max(HOP.BYTES, hops.readUInt16LE(at));
  }
  return found;
}

function readRoute(record: Buffer, from: Address | null): Route | null {
  if (record.length < ROUTE.BYTES || (record[ROUTE.TYPE] ?? 0) >= ROUTE_BLACKHOLE) return null;
  const attributes = readAttributes(record, ROUTE.BYTES);
  // The answer to a question with a source does not repeat it as the preferred one.
  const source = from ?? addressOf(attributes.get(ROUTE.SOURCE));
  const index = integer(attributes.get(ROUTE.OUT));
  return source && index !== null ? { source, index } : null;
}
