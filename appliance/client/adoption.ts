import { formatEndpoint } from '../protocol/address.ts';
import { admit, fail, joinFailed, letGo } from './joins.ts';
import { sample } from './repair.ts';
import { isQuestion, onFound } from './rescue.ts';
import { rest } from './revival.ts';
import { fill, whyUnmanaged } from './slots.ts';
import {
  type Command,
  type Connection,
  type Event,
  enter,
  inUse,
  isGone,
  keepId,
  NO_ENTRIES,
  NOTHING,
  newPath,
  pathIs,
  type State,
  sameTuple,
  type Tuple,
} from './state.ts';
import { prefixOf, rememberLife } from './worth.ts';

/** Takes connections into care, from an event or from a reading of the kernel, and lets go of them. Pure. */

/** Connections kept in mind; more than a host with 2^16 ephemeral ports to one server has. */
const MOST_CONNECTIONS = 65_536;

export const DENIED = 'the server forbids joins to its first address (RFC 8684, flag C)';

/** Takes a connection into care; null when there are too many. */
export function connect(state: State, token: number, tuple: Tuple, now: number): Connection | null {
  if (state.connections.size >= MOST_CONNECTIONS) return null;
  const connection: Connection = {
    token,
    local: tuple.local,
    remote: tuple.remote,
    server: formatEndpoint(tuple.remote),
    home: tuple.local.address,
    since: now,
    establishedAt: null,
    unsure: false,
    unmanaged: whyUnmanaged(state.rules, tuple),
    full: false,
    commanded: false,
    doubtedAt: null,
    paths: [
      newPath({ kind: 'direct', detour: null, local: tuple.local, remote: tuple.remote, state: 'joining', since: now }),
    ],
    announced: NO_ENTRIES,
    ids: NO_ENTRIES,
    leases: new Set(),
    book: null,
    restUntil: now,
    dumped: null,
    prefix: prefixOf(tuple.remote.address),
    revival: null,
    unanswered: [],
    settledAt: Number.NEGATIVE_INFINITY,
    leaving: NOTHING,
    roomAt: Number.NEGATIVE_INFINITY,
    stranded: [],
    ghostsUntil: Number.NEGATIVE_INFINITY,
  };
  state.connections.set(token, connection);
  return connection;
}

/** Lets go of everything but the direct path of a connection that turned out not to be ours to extend. */
export function drop(state: State, connection: Connection, now: number, out: Command[]): void {
  for (const path of connection.paths) {
    if (path.kind !== 'direct' && path.state !== 'active') enter(path, 'failed', now, connection.unmanaged ?? '');
  }
  letGo(state, connection, now, out);
  state.due.delete(connection.token);
}

/** The connection is gone. */
export function forget(state: State, token: number, now: number, out: Command[]): void {
  const connection = state.connections.get(token);
  if (!connection) return;
  state.connections.delete(token);
  state.due.delete(token);
  rest(state, connection);
  if (connection.unmanaged === null && connection.establishedAt !== null)
    rememberLife(state.experience, connection.prefix, now - connection.establishedAt);
  letGo(state, connection, now, out);
}

type Dump = Extract<Event, { kind: 'dump' }>;

/** Brings what we believe in line with what the kernel has. What changed after the question was asked is left alone. */
export function onDump(
  state: State,
  { connections: dumped, askedAt, present = new Set(dumped.map(({ token }) => token)) }: Dump,
  now: number,
  out: Command[],
): void {
  for (const { token, since } of present ? [...state.connections.values()] : []) {
    if (!present?.has(token) && since < askedAt) forget(state, token, now, out);
  }
  for (const one of dumped) {
    if (!one.initiated || isQuestion(state, one.remote)) continue;
    const known = state.connections.get(one.token);
    // Nothing moved since it was looked at: of many connections, most.
    if (known?.dumped === one && known.book?.idle && now < known.restUntil) continue;
    const connection = known ?? connect(state, one.token, one, now);
    if (!connection) return;
    if (!known) onFound(state, connection, out);
    connection.dumped = one;
    if (connection.doubtedAt !== null && connection.doubtedAt < askedAt && connection.unmanaged === null) {
      connection.unmanaged = "the kernel's own path manager has this connection (it is older than the agent)";
      drop(state, connection, now, out);
      out.push({ kind: 'note', token: one.token, level: 'info', what: 'unmanageable' });
    }
    for (const path of [...connection.paths]) {
      if (!inUse(path) || path.since >= askedAt || one.subflows.some((subflow) => pathIs(path, subflow))) continue;
      if (path.kind !== 'direct')
        joinFailed(state, connection, path, 'it closed while events were lost', 'lost', now, out);
      else fail(connection, path, 'it closed while events were lost', now);
    }
    for (const subflow of one.subflows) {
      if (
        !subflow.established ||
        (connection.leaving.size > 0 && connection.leaving.has(formatEndpoint(subflow.local)))
      )
        continue;
      if (connection.stranded.some((tuple) => sameTuple(tuple, subflow))) continue;
      if (!known && subflow.joined && isGone(state, subflow.local.address)) {
        // Out of a predecessor's tunnel: it ends as soon as another one works.
        connection.stranded.push({ local: subflow.local, remote: subflow.remote });
        continue;
      }
      if (subflow.localId !== 0) keepId(connection, subflow.local.address, subflow.localId);
      const path = admit(state, connection, subflow, now, out, true);
      if (!path) continue;
      // Its end, or a change of ours, may be younger than what the kernel said.
      if (path.state !== 'joining' && path.since >= askedAt && known !== undefined) continue;
      if (inUse(path)) {
        if (subflow.backup !== (path.state === 'backup'))
          enter(path, subflow.backup ? 'backup' : 'active', now, path.why);
        continue;
      }
      enter(path, subflow.backup ? 'backup' : 'active', now);
      connection.restUntil = now;
      path.local = subflow.local;
      path.remote = subflow.remote;
      if (path.kind !== 'direct') connection.commanded = true;
    }
    if (connection.establishedAt === null && one.subflows.some((flow) => flow.established && flow.fullyEstablished)) {
      connection.establishedAt = now;
      const direct = connection.paths[0];
      // Adopted without its first subflow: it was lost while nobody watched.
      if (direct?.state === 'joining') fail(connection, direct, 'it closed while no agent ran', now);
    }
    if (connection.establishedAt === null) continue;
    let rests = false;
    if (connection.unmanaged === null && connection.doubtedAt === null && !connection.unsure)
      rests = sample(state, connection, one, now, out);
    if (!rests) fill(state, connection, now, out);
  }
}
