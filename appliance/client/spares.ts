import {
  type Address,
  contains,
  covers,
  type Endpoint,
  embedsIPv4,
  formatEndpoint,
  parsePrefix,
  sameAddress,
} from '../protocol/address.ts';
import {
  type Connection,
  type Event,
  insideOf,
  isGone,
  ownsAddress,
  type Path,
  type Rules,
  type Spare,
  type State,
  type Tunnel,
} from './state.ts';

/** Ways to the server itself besides the direct one, for which nobody has to grant anything. Pure. */

/** Addresses kept of those that one server announces. */
const MOST_ANNOUNCED = 8;

/** Announcements looked at, of all servers together; a server may send any number of them. */
const ANNOUNCED_PER_S = 64;

/** Where no server that is open to the public can be (the special-purpose registries of RFC 6890). */
const NOT_PUBLIC = [
  '0.0.0.0/8',
  '10.0.0.0/8',
  '100.64.0.0/10',
  '127.0.0.0/8',
  '169.254.0.0/16',
  '172.16.0.0/12',
  '192.0.0.0/24',
  '192.0.2.0/24',
  '192.88.99.0/24',
  '192.168.0.0/16',
  '198.18.0.0/15',
  '198.51.100.0/24',
  '203.0.113.0/24',
  '224.0.0.0/3',
].map(read);
/** Global unicast (RFC 4291 2.4), and in it what is for documentation, benchmarks and the like. */
const GLOBAL6 = read('2000::/3');
const NOT_PUBLIC6 = ['2001::/23', '2001:db8::/32', '3fff::/20'].map(read);
/** Not even `DETOUR_TARGETS` opens these. */
const NEVER = ['0.0.0.0/8', '127.0.0.0/8', '169.254.0.0/16', '224.0.0.0/3', '::/127', 'fe80::/10', 'ff00::/8'].map(
  read,
);

function read(text: string) {
  const prefix = parsePrefix(text);
  if (!prefix) throw new Error(`not a prefix: ${text}`);
  return prefix;
}

function mayBeServer({ targets, exclude }: Rules, at: Endpoint): boolean {
  const { address } = at;
  if (NEVER.some((prefix) => contains(prefix, address)) || embedsIPv4(address)) return false;
  if (exclude.some((rule) => covers(rule, at))) return false;
  if (targets.length > 0) return targets.some((rule) => covers(rule, at));
  if (address.family === 4) return !NOT_PUBLIC.some((prefix) => contains(prefix, address));
  return contains(GLOBAL6, address) && !NOT_PUBLIC6.some((prefix) => contains(prefix, address));
}

/** A server names a further address of its own (RFC 8684 3.4.1). True when it was new and may be used. */
export function onAnnounced(
  state: State,
  connection: Connection,
  { remoteId, remote }: Extract<Event, { kind: 'announced' }>,
  now: number,
): boolean {
  if (!state.rules.kinds.includes('announced') || connection.unmanaged !== null) return false;
  if (now - state.announced.since >= 1_000) state.announced = { since: now, count: 0 };
  if (state.announced.count >= ANNOUNCED_PER_S) return false;
  state.announced.count++;
  const known = connection.announced.get(remoteId);
  if (known === undefined && connection.announced.size >= MOST_ANNOUNCED) return false;
  // Without a port it means the connection's own.
  const at = { address: remote.address, port: remote.port || connection.remote.port };
  const text = formatEndpoint(at);
  if (at.address.family !== connection.remote.address.family || text === connection.server) return false;
  if (!mayBeServer(state.rules, at) || state.present.has(`${at.address.family}:${at.address.value}`)) return false;
  if ([...connection.announced.values()].some((other) => formatEndpoint(other) === text)) return false;
  connection.announced = new Map(connection.announced).set(remoteId, at);
  return true;
}

const announcedKey = (at: Endpoint): string => `announced@${formatEndpoint(at)}`;

/** The server takes it back (RFC 8684 3.4.2): the path there, if there is one. */
export function onRemoved(connection: Connection, remoteId: number): Path | undefined {
  const at = connection.announced.get(remoteId);
  if (!at) return undefined;
  connection.announced = new Map([...connection.announced].filter(([id]) => id !== remoteId));
  return connection.paths.find(({ kind, detour }) => kind === 'spare' && detour === announcedKey(at));
}

const linkKey = (name: string): string => `direct@${name}`;

/** What a path to the server from an address of a chosen interface is called; null when it is none. */
export const spareFrom = (state: State, local: Address): string | null => {
  const link = state.links?.find(({ name }) => ownsAddress(state, name, local));
  return link ? linkKey(link.name) : null;
};

/** Every such way of a connection: over the other chosen interfaces, and to what the server announced. */
export function sparesOf(state: State, { home, remote, announced, paths: [direct] }: Connection): Spare[] {
  const spares: Spare[] = [];
  for (const { name, index, v4, v6 } of state.links ?? []) {
    const local = remote.address.family === 4 ? v4 : v6;
    const used = local && (sameAddress(local, home) || (direct?.local && sameAddress(local, direct.local.address)));
    if (local && !used && !isGone(state, local))
      spares.push({ kind: 'spare', key: linkKey(name), local, remote, index });
  }
  for (const at of announced.values()) spares.push({ kind: 'spare', key: announcedKey(at), local: home, remote: at });
  return spares;
}

/** The way to the connection's server through a tunnel; null when there is none now. */
export function wayThrough({ remote }: Connection, tunnel: Tunnel): Spare | null {
  const carries = tunnel.state === 'up' || tunnel.state === 'suspended';
  const local = carries ? insideOf(tunnel, remote.address.family) : null;
  return local && { kind: 'vpn', key: tunnel.key, local, remote };
}
