import { sameAddress, sameEndpoint } from '../protocol/address.ts';
import { considerTunnels, renewTunnels } from './enrolment.ts';
import { destroy, fail } from './joins.ts';
import { reopenBook } from './paths.ts';
import { fill } from './slots.ts';
import {
  addressKey,
  type Command,
  type Connection,
  type Event,
  enter,
  inUse,
  isGone,
  type Path,
  remove,
  type State,
} from './state.ts';

/** What a change of this host's own network means to its connections. Pure. */

/** Lost addresses kept in mind: temporary ones of IPv6 come and go for as long as the agent runs. */
const MOST_GONE = 1_024;

/** How long Linux keeps a connection whose other end is silent while there is something to send (tcp_retries2, 15). */
const GHOSTS_MS = 924_600;

const WHY = 'this host lost the address it was made from';

/**
 * Paths from addresses that are gone end at once (the kernel would keep them for a quarter of an hour), and are made
 * again from wherever the kernel would now connect from. Whatever only waits for its turn gets it: the reason may be gone.
 */
export function onNetworkChanged(
  state: State,
  { addresses, links }: Extract<Event, { kind: 'network-changed' }>,
  now: number,
  out: Command[],
): void {
  const present = new Set(addresses.map(addressKey));
  for (const key of state.present) if (!present.has(key)) state.gone.add(key);
  for (const key of state.gone) if (present.has(key) || state.gone.size > MOST_GONE) state.gone.delete(key);
  state.present = present;
  state.links = links;
  for (const detour of state.detours.values()) {
    // Its session looks up the way anew, and says from where with its next answer.
    if (detour.local && isGone(state, detour.local)) detour.local = null;
  }
  // On another network leases may do, and the address inside a tunnel may be somebody's.
  for (const detour of state.detours.values()) detour.useless = null;
  considerTunnels(state, now, out);
  renewTunnels(state, out);
  const servers = new Map<string, Connection['remote']['address']>();
  for (const connection of state.connections.values()) {
    if (connection.unmanaged !== null || connection.establishedAt === null) continue;
    strand(state, connection, now, out);
    if (connection.revival) connection.revival = { tries: 0, at: now, called: true };
    servers.set(addressKey(connection.remote.address), connection.remote.address);
    fill(state, connection, now, out);
  }
  if (servers.size > 0) out.push({ kind: 'find-sources', servers: [...servers.values()] });
}

/** The direct paths that are missing are made from where the kernel says. */
export function onSourcesFound(
  state: State,
  { sources }: Extract<Event, { kind: 'sources-found' }>,
  now: number,
  out: Command[],
): void {
  const found = new Map(sources.map(({ server, local }) => [addressKey(server), local]));
  for (const connection of state.connections.values()) {
    const local = found.get(addressKey(connection.remote.address));
    const [direct] = connection.paths;
    if (!local || sameAddress(local, connection.home)) continue;
    connection.home = local;
    if (direct?.state !== 'failed') continue;
    const spare = connection.paths.find(
      (path) => path.kind === 'spare' && inUse(path) && path.local !== null && sameAddress(path.local.address, local),
    );
    if (spare?.remote && sameEndpoint(spare.remote, connection.remote)) {
      // What ran beside the direct path is the direct path now.
      enter(direct, spare.state, now);
      direct.local = spare.local;
      remove(connection, spare);
    } else direct.retryAt = now;
    fill(state, connection, now, out);
  }
}

/** Destroys what is stranded, once something else works: a connection without any subflow would have nothing to go on with. */
export function sweep(state: State, connection: Connection, out: Command[]): void {
  const works = ({ local }: Path): boolean => local !== null && !isGone(state, local.address);
  if (connection.stranded.length === 0 || !connection.paths.some((path) => inUse(path) && works(path))) return;
  for (const tuple of connection.stranded) destroy(connection, tuple, out);
  connection.stranded = [];
}

function strand(state: State, connection: Connection, now: number, out: Command[]): void {
  const before = connection.stranded.length;
  for (const path of [...connection.paths]) {
    const { local, remote, failures } = path;
    const waits = path.kind === 'direct' && path.state === 'joining' && isGone(state, connection.home);
    if (inUse(path) && local && remote && isGone(state, local.address)) {
      connection.stranded.push({ local, remote });
      connection.ghostsUntil = now + GHOSTS_MS;
      connection.full = false;
    } else if (!waits) {
      if (path.kind === 'direct' && path.state === 'failed') path.retryAt = now;
      continue;
    }
    fail(connection, path, WHY, now);
    path.failures = failures;
    path.retryAt = now;
    // Its lease was for the old address: it goes on when its detour has granted another.
    path.buried = path.kind === 'nat';
    connection.commanded = true;
    out.push({ kind: 'joined', token: connection.token, detour: path.detour, outcome: 'lost', why: WHY });
    if (path.kind !== 'direct' && path.detour === null) remove(connection, path);
  }
  if (connection.book && connection.stranded.length > before) connection.book = reopenBook(connection.book, now);
  sweep(state, connection, out);
}
