import pLimit from 'p-limit';
import { type Address, type Prefix, readAddress, writeAddress } from '../protocol/address.ts';
import { type Namespace, ownNamespace } from './namespaces.ts';
import { attribute, CREATE, integer, NetlinkError, openNetlink, PROTOCOL, readAttributes, u8, u32 } from './netlink.ts';
import {
  AF_INET,
  AF_INET6,
  HELD,
  LINK,
  LINK_UP,
  MESSAGE,
  OWNER,
  ROUTE,
  ROUTE_LOCAL,
  ROUTE_UNICAST,
  RULE,
  SCOPE_LINK,
} from './rtnetlink.ts';

/**
 * Interfaces, addresses, routes and rules that this program makes (rtnetlink). Routes and rules carry a protocol number of
 * ours, so that nothing of anybody else is ever taken for ours.
 */

export type LinkInfo = {
  readonly name: string;
  readonly index: number;
  /** As `ip link add ... type` has it (`wireguard`, `tun`); null for one without. */
  readonly kind: string | null;
  /** Bytes. */
  readonly mtu: number;
};

/** A unicast route of some table, or an address of this host (its table is 255). */
export type RouteInfo = {
  readonly to: Prefix;
  readonly table: number;
  /** Null when there are several next hops. */
  readonly index: number | null;
};

/** Packets from one address are looked up in a table of their own. */
export type Rule = { readonly from: Address; readonly table: number; readonly priority: number };

/** A rule of anybody: what it takes up. `own` is the whole rule when it is one of ours. */
export type RuleInfo = {
  readonly family: 4 | 6;
  readonly priority: number;
  readonly table: number;
  readonly own: Rule | null;
};

export type Links = {
  /** @throws NetlinkError */
  links(): Promise<readonly LinkInfo[]>;
  /** Hands over every route of both families, as it comes: there may be very many. @throws NetlinkError */
  routes(each: (route: RouteInfo) => void): Promise<void>;
  /** @throws NetlinkError */
  rules(): Promise<readonly RuleInfo[]>;
  /** Makes an interface, which is down. @throws NetlinkError: ENOTSUP for a kind that this kernel does not have, EEXIST */
  add(name: string, kind: string): Promise<void>;
  /** Takes an interface away, and with it its addresses and routes. Harmless when there is none. @throws NetlinkError */
  remove(name: string): Promise<void>;
  /** Sets its MTU and puts it up, without a link-local address. @throws NetlinkError */
  raise(index: number, mtu: number): Promise<void>;
  /**
   * Gives it an address. A `quiet` one is never chosen as a source by itself: only what is bound to it leaves from it.
   * @throws NetlinkError: EACCES or EPERM where IPv6 is switched off; EEXIST
   */
  assign(index: number, address: Address, length: number, quiet: boolean): Promise<void>;
  /** Takes it back. Harmless when it is gone. @throws NetlinkError */
  withdraw(index: number, address: Address, length: number): Promise<void>;
  /** Sends everything that is looked up in `table` over the interface. @throws NetlinkError */
  addDefault(table: number, index: number, family: 4 | 6): Promise<void>;
  /** @throws NetlinkError: EEXIST */
  addRule(rule: Rule): Promise<void>;
  /** Harmless when there is none. @throws NetlinkError */
  removeRule(rule: Rule): Promise<void>;
  close(): void;
};

/** IFLA_INFO_KIND */
const INFO_KIND = 1;
/** IFLA_INET6_ADDR_GEN_MODE inside IFLA_AF_SPEC, and IN6_ADDR_GEN_MODE_NONE. */
const MODE = 8;
const MODE_NONE = 1;

/** `IFA_F_*` */
const HELD_NO_DAD = 0x02;
const HELD_NO_PREFIX_ROUTE = 0x200;
const FOREVER = 0xffffffff;

/** `FR_ACT_TO_TBL` */
const RULE_LOOKUP = 1;
/** `RT_TABLE_UNSPEC`: the long form counts. */
const TABLE_UNSPEC = 0;

const familyNumber = (family: 4 | 6): number => (family === 4 ? AF_INET : AF_INET6);
const widthOf = (family: 4 | 6): number => (family === 4 ? 32 : 128);

const GONE: readonly string[] = ['ENODEV', 'ENOENT', 'EADDRNOTAVAIL', 'ESRCH'];

/** Opens a socket in the namespace; changes need CAP_NET_ADMIN there. @throws NetlinkError */
export function openLinks(namespace: Namespace = ownNamespace): Links {
  const socket = openNetlink(PROTOCOL.ROUTE, { namespace });
  // One dump at a time: the kernel answers EBUSY to a second one on the same socket.
  const inTurn = pLimit(1);
  const change = async (what: string, type: number, payload: readonly Buffer[], flags = 0): Promise<void> => {
    await socket.request(what, type, Buffer.concat(payload), flags);
  };
  const drop = async (what: string, type: number, payload: readonly Buffer[]): Promise<void> => {
    try {
      await change(what, type, payload);
    } catch (error) {
      if (!(error instanceof NetlinkError) || !GONE.includes(error.code)) throw error;
    }
  };
  return {
    links: () =>
      inTurn(async () => {
        const found: LinkInfo[] = [];
        await socket.dump('listing interfaces', MESSAGE.GETLINK, Buffer.alloc(LINK.BYTES), (record) => {
          const link = readLink(record);
          if (link) found.push(link);
        });
        return found;
      }),
    routes: (each) =>
      inTurn(async () => {
        for (const family of [AF_INET, AF_INET6]) {
          const header = Buffer.alloc(ROUTE.BYTES);
          header[0] = family;
          await socket.dump('listing routes', MESSAGE.GETROUTE, header, (record) => {
            const route = readRoute(record);
            if (route) each(route);
          });
        }
      }),
    rules: () =>
      inTurn(async () => {
        const found: RuleInfo[] = [];
        for (const family of [AF_INET, AF_INET6]) {
          const header = Buffer.alloc(RULE.BYTES);
          header[0] = family;
          const dumped = socket.dump('listing rules', MESSAGE.GETRULE, header, (record) => {
            const rule = readRule(record);
            if (rule) found.push(rule);
          });
          // A kernel without IPv6 has none of its rules.
          await dumped.catch((error: unknown) => {
            if (family === AF_INET || !(error instanceof NetlinkError)) throw error;
          });
        }
        return found;
      }),
    add: (name, kind) =>
      change(
        `making interface ${name}`,
        MESSAGE.NEWLINK,
        [Buffer.alloc(LINK.BYTES), linkName(name), attribute(LINK.INFO, [attribute(INFO_KIND, Buffer.from(kind))])],
        CREATE,
      ),
    remove: (name) => drop(`removing interface ${name}`, MESSAGE.DELLINK, [Buffer.alloc(LINK.BYTES), linkName(name)]),
    async raise(index, mtu) {
      const header = Buffer.alloc(LINK.BYTES);
      header.writeInt32LE(index, LINK.INDEX);
      const quiet = attribute(LINK.FAMILIES, [attribute(AF_INET6, [attribute(MODE, u8(MODE_NONE))])]);
      // Refused where the kernel has no IPv6, and then there is no address of it either.
      await change('keeping an interface from making addresses', MESSAGE.NEWLINK, [header, quiet]).catch(
        () => undefined,
      );
      const up = Buffer.from(header);
      up.writeUInt32LE(LINK_UP, LINK.FLAGS);
      up.writeUInt32LE(LINK_UP, LINK.CHANGE);
      await change('putting an interface up', MESSAGE.NEWLINK, [up, attribute(LINK.MTU, u32(mtu))]);
    },
    assign: (index, address, length, quiet) =>
      change('adding an address', MESSAGE.NEWADDR, addressMessage(index, address, length, quiet), CREATE),
    withdraw: (index, address, length) =>
      drop('removing an address', MESSAGE.DELADDR, addressMessage(index, address, length, false)),
    addDefault(table, index, family) {
      const header = Buffer.alloc(ROUTE.BYTES);
      header[0] = familyNumber(family);
      header[ROUTE.TABLE] = TABLE_UNSPEC;
      header[ROUTE.PROTOCOL] = OWNER;
      header[ROUTE.SCOPE] = family === 4 ? SCOPE_LINK : 0;
      header[ROUTE.TYPE] = ROUTE_UNICAST;
      const parts = [header, attribute(ROUTE.LONG_TABLE, u32(table)), attribute(ROUTE.OUT, u32(index))];
      return change('adding a route', MESSAGE.NEWROUTE, parts, CREATE);
    },
    addRule: (rule) => change('adding a rule', MESSAGE.NEWRULE, ruleMessage(rule), CREATE),
    removeRule: (rule) => drop('removing a rule', MESSAGE.DELRULE, ruleMessage(rule)),
    close: () => socket.close(),
  };
}

const linkName = (name: string): Buffer => attribute(LINK.NAME, Buffer.from(`${name}\0`));

function addressMessage(index: number, address: Address, length: number, quiet: boolean): Buffer[] {
  const { family } = address;
  const header = Buffer.alloc(HELD.BYTES);
  header[0] = familyNumber(family);
  header[HELD.LENGTH] = length;
  // IPv4 chooses no source of a narrower scope than the destination's (inet_select_addr), IPv6 none that is deprecated
  // (RFC 6724, rule 3) while there is another.
  if (family === 4 && quiet) header[HELD.SCOPE] = SCOPE_LINK;
  header.writeUInt32LE(index, HELD.INDEX);
  const bytes = addressBytes(address);
  const parts = [header, attribute(HELD.LOCAL, bytes), attribute(HELD.ADDRESS, bytes)];
  if (family === 6) {
    parts.push(attribute(HELD.ALL_FLAGS, u32(HELD_NO_DAD | (quiet ? HELD_NO_PREFIX_ROUTE : 0))));
    if (quiet) parts.push(attribute(HELD.LIFETIMES, Buffer.concat([u32(0), u32(FOREVER), u32(0), u32(0)])));
  }
  return parts;
}

function ruleMessage({ from, table, priority }: Rule): Buffer[] {
  const header = Buffer.alloc(RULE.BYTES);
  header[0] = familyNumber(from.family);
  header[RULE.FROM_LENGTH] = widthOf(from.family);
  header[RULE.ACTION] = RULE_LOOKUP;
  return [
    header,
    attribute(RULE.FROM, addressBytes(from)),
    attribute(RULE.PRIORITY, u32(priority)),
    attribute(RULE.LONG_TABLE, u32(table)),
    attribute(RULE.PROTOCOL, u8(OWNER)),
  ];
}

/** An address without the mapped form: 4 or 16 bytes. */
export function addressBytes(address: Address): Buffer {
  const bytes = Buffer.alloc(16);
  writeAddress(address, bytes);
  return address.family === 4 ? bytes.subarray(12) : bytes;
}

function readLink(record: Buffer): LinkInfo | null {
  if (record.length < LINK.BYTES) return null;
  const attributes = readAttributes(record, LINK.BYTES);
  const text = (bytes: Buffer | undefined): string => bytes?.toString('latin1').replace(/\0+$/, '') ?? '';
  const info = readAttributes(attributes.get(LINK.INFO) ?? Buffer.alloc(0));
  return {
    name: text(attributes.get(LINK.NAME)),
    index: record.readInt32LE(LINK.INDEX),
    kind: text(info.get(INFO_KIND)) || null,
    mtu: integer(attributes.get(LINK.MTU)) ?? 0,
  };
}

/** The prefix at the beginning of an attribute; without one it is everything. */
function readPrefix(family: 4 | 6, bytes: Buffer | undefined, length: number): Prefix {
  const whole = Buffer.alloc(16);
  bytes?.copy(whole, 0, 0, family === 4 ? 4 : 16);
  const address: Address =
    family === 4 ? { family, value: BigInt(whole.readUInt32BE()) } : { family, value: wide(whole) };
  return { address, length };
}

/** As it stands: a route to ::ffff:0:0/96 is one of IPv6. */
const wide = (bytes: Buffer): bigint => (bytes.readBigUInt64BE() << 64n) | bytes.readBigUInt64BE(8);

/** One record of RTM_GETROUTE; null for what leads nowhere. */
export function readRoute(record: Buffer): RouteInfo | null {
  if (record.length < ROUTE.BYTES) return null;
  const type = record[ROUTE.TYPE];
  if (type !== ROUTE_UNICAST && type !== ROUTE_LOCAL) return null;
  const family = record[0] === AF_INET ? 4 : 6;
  const attributes = readAttributes(record, ROUTE.BYTES);
  return {
    to: readPrefix(family, attributes.get(ROUTE.TO), record[ROUTE.TO_LENGTH] ?? 0),
    table: integer(attributes.get(ROUTE.LONG_TABLE)) ?? record[ROUTE.TABLE] ?? 0,
    index: integer(attributes.get(ROUTE.OUT)),
  };
}

/** One record of RTM_GETRULE. */
export function readRule(record: Buffer): RuleInfo | null {
  if (record.length < RULE.BYTES) return null;
  const family = record[0] === AF_INET ? 4 : 6;
  const attributes = readAttributes(record, RULE.BYTES);
  // The rule for `local` has priority 0, which is not sent.
  const priority = integer(attributes.get(RULE.PRIORITY)) ?? 0;
  const table = integer(attributes.get(RULE.LONG_TABLE)) ?? record[RULE.TABLE] ?? 0;
  const source = attributes.get(RULE.FROM);
  const isOurs =
    integer(attributes.get(RULE.PROTOCOL)) === OWNER &&
    record[RULE.ACTION] === RULE_LOOKUP &&
    record[RULE.FROM_LENGTH] === widthOf(family) &&
    source !== undefined;
  const from: Address | null = !isOurs
    ? null
    : family === 4
      ? { family, value: BigInt(source.readUInt32BE()) }
      : readAddress(source);
  return { family, priority, table, own: from && { from, table, priority } };
}
