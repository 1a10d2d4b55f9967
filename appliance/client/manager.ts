import { formatEndpoint, sameAddress, sameEndpoint } from '../protocol/address.ts';
import { connect, DENIED, drop, forget, onDump } from './adoption.ts';
import { considerTunnels, onTunnelDown, onTunnelGone, onTunnelUp } from './enrolment.ts';
import { onDetourAdded, onDetourDown, onDetourRemoved, onDetourUp, onLeaseGranted, onLeaseRefused } from './fleet.ts';
import { admit, fail, joinFailed, joinIfLeased, retire, trimIdle } from './joins.ts';
import { begun } from './paths.ts';
import { makeRoom } from './repair.ts';
import { isQuestion, onAnswer, onBegin, onRescueEvent, reconsider } from './rescue.ts';
import { rest } from './revival.ts';
import { onNetworkChanged, onSourcesFound, sweep } from './roaming.ts';
import { fill, joinTimeout } from './slots.ts';
import { onAnnounced, onRemoved } from './spares.ts';
import {
  addressKey,
  type Command,
  type Connection,
  type ConnectionEvent,
  type Event,
  enter,
  isGone,
  keepId,
  LIMIT_WINDOW_MS,
  leaseKey,
  pathOf,
  remove,
  rttOf,
  type State,
  type SubflowEvent,
  sameTuple,
} from './state.ts';

/**
 * Decides which subflows every MPTCP connection of this host should have. Pure: what happens comes in as events, what
 * to do goes out as commands, and every completion of a command is an event again.
 *
 * `step` changes the state it is given instead of returning a new one: with 10,000 connections a copy of the maps per
 * event would cost more than everything else the agent does. The state has one owner, the daemon, and nobody else
 * writes to it.
 */

/** A place that was given up this recently may still be taken in the server's eyes. */
const UNSETTLED_MS = 1_000;
const ECONNREFUSED = 111;

/** Takes one event at `now` and says what to do about it, in order. */
export function step(state: State, event: Event, now: number): Command[] {
  const out: Command[] = [];
  switch (event.kind) {
    case 'created':
    case 'established':
      onConnection(state, event, now, out);
      break;
    case 'closed':
      forget(state, event.token, now, out);
      break;
    case 'subflow-established':
      onSubflowEstablished(state, event, now, out);
      break;
    case 'subflow-closed':
      onSubflowClosed(state, event, now, out);
      break;
    case 'subflow-priority': {
      const path = pathOf(state.connections.get(event.token), event);
      if (path && (path.state === 'active' || path.state === 'backup'))
        enter(path, event.backup ? 'backup' : 'active', now);
      break;
    }
    case 'events-lost':
      out.push({ kind: 'dump' });
      break;
    case 'dump':
      onDump(state, event, now, out);
      break;
    case 'network-changed':
      onNetworkChanged(state, event, now, out);
      reconsider(state, now);
      break;
    case 'sources-found':
      onSourcesFound(state, event, now, out);
      break;
    case 'create-failed':
      onCreateFailed(state, event, now, out);
      break;
    case 'detour-added':
      onDetourAdded(state, event, now, out);
      break;
    case 'detour-removed':
      onDetourRemoved(state, event.detour, now, out);
      break;
    case 'detour-up':
      onDetourUp(state, event, now, out);
      break;
    case 'detour-down':
      onDetourDown(state, event.detour, event.why, now, out);
      break;
    case 'lease-granted':
      onLeaseGranted(state, event, now, out);
      break;
    case 'lease-refused':
      onLeaseRefused(state, event, now, out);
      break;
    case 'lease-lost': {
      const lease = state.leases.get(leaseKey(event.detour, formatEndpoint(event.server)));
      if (lease?.state === 'granted') lease.state = 'asked';
      break;
    }
    case 'tunnel-up':
      onTunnelUp(state, event, now, out);
      break;
    case 'tunnel-down':
      onTunnelDown(state, event, now, out);
      break;
    case 'tunnel-gone':
      onTunnelGone(state, event, now, out);
      break;
    case 'addresses-gone':
      for (const address of event.addresses) state.gone.add(addressKey(address));
      break;
    case 'connecting':
    case 'direct-tried':
    case 'relay-tried':
    case 'translated':
    case 'redirect-failed':
    case 'redirections-found':
      onRescueEvent(state, event, now, out);
      break;
    case 'tick':
      onTick(state, now, out);
      break;
    case 'announced': {
      // Unless asked for, what a server announces is not ours to act on: a hostile one would choose our destinations.
      const connection = state.connections.get(event.token);
      if (connection && onAnnounced(state, connection, event, now)) fill(state, connection, now, out);
      break;
    }
    case 'removed': {
      const connection = state.connections.get(event.token);
      const path = connection && onRemoved(connection, event.remoteId);
      if (!path) break;
      retire(connection, path, 'the server took its address back', now, out);
      fill(state, connection, now, out);
      break;
    }
    case 'listener-created':
    case 'listener-closed':
      break;
  }
  return out;
}

function onConnection(state: State, event: ConnectionEvent, now: number, out: Command[]): void {
  if (event.serverSide || isQuestion(state, event.remote)) return;
  let connection = state.connections.get(event.token) ?? null;
  if (connection && event.kind === 'created') {
    // The kernel uses a token again only after its connection is gone: we missed the end.
    forget(state, event.token, now, out);
    connection = null;
  }
  connection ??= connect(state, event.token, event, now);
  if (!connection) return;
  if (event.kind === 'created') onBegin(state, connection, now, out);
  if (event.denyJoinId0) connection.unmanaged ??= DENIED;
  if (event.kind === 'established') establish(state, connection, now, out);
  fill(state, connection, now, out);
}

function establish(state: State, connection: Connection, now: number, out: Command[]): void {
  if (connection.establishedAt !== null) return;
  connection.establishedAt = now;
  const first = connection.paths.find(({ led }) => led) ?? connection.paths[0];
  if (first) enter(first, 'active', now);
  if (connection.unmanaged !== null) {
    drop(state, connection, now, out);
    return;
  }
  if (connection.book) begun(connection.book, now);
  state.livelyAt = now;
  for (const path of connection.paths) if (path.state === 'requested') joinIfLeased(state, connection, path, now, out);
}

function onSubflowEstablished(state: State, event: SubflowEvent, now: number, out: Command[]): void {
  const connection = state.connections.get(event.token);
  if (!connection) return;
  const path = admit(state, connection, event, now, out);
  if (!path) return;
  enter(path, event.backup || path.reserve ? 'backup' : 'active', now);
  path.local = event.local;
  path.remote = event.remote;
  path.retryAt = 0;
  if (path.kind !== 'direct') connection.commanded = true;
  // The direct path has its place; whether there is one more, only trying tells.
  else if (now < connection.ghostsUntil) connection.full = false;
  if (path.kind === 'direct') onAnswer(state, connection.server, now, out);
  if (event.localId !== 0) keepId(connection, event.local.address, event.localId);
  out.push({ kind: 'joined', token: event.token, detour: path.detour, outcome: 'established', why: path.why });
  const carrier = path.detour === null ? undefined : (state.detours.get(path.detour) ?? state.tunnels.get(path.detour));
  sweep(state, connection, out);
  if (carrier) {
    carrier.failedServers.clear();
    carrier.unansweredJoins = 0;
    carrier.suspensions = 0;
    carrier.suspendedUntil = 0;
    if (carrier.state === 'suspended') carrier.state = 'up';
    if ('useless' in carrier) {
      carrier.useless = null;
      if (path.inband) {
        carrier.inband = 'works';
        carrier.inbandMisses = 0;
      }
    }
  }
  fill(state, connection, now, out);
}

function onSubflowClosed(state: State, event: SubflowEvent, now: number, out: Command[]): void {
  const connection = state.connections.get(event.token);
  if (!connection) return;
  const local = formatEndpoint(event.local);
  const ours = connection.leaving.has(local);
  if (ours) connection.leaving = new Set([...connection.leaving].filter((one) => one !== local));
  connection.stranded = connection.stranded.filter((tuple) => !sameTuple(tuple, event));
  const path = pathOf(connection, event);
  // One that never got its answer before its address was lost; the path waits for another one.
  if (path?.local === null && isGone(state, event.local.address)) return;
  if (!path || path.state === 'failed' || (ours && path.state !== 'retired')) return;
  if (path.state === 'retired') {
    remove(connection, path);
    return;
  }
  const lived = now - path.since;
  /** As a server does that takes no more of them. */
  const atOnce = event.error === 0 && !path.led && lived <= LIMIT_WINDOW_MS + 2 * rttOf(state, path);
  if (path.kind === 'direct') {
    fail(connection, path, closing(event.error), now);
    rest(state, connection);
    if (atOnce && !sameEndpoint(event.local, connection.local)) makeRoom(state, connection, path, now, out);
    out.push({ kind: 'note', token: event.token, level: 'info', what: 'direct-lost' });
  } else if (path.state === 'joining') {
    joinFailed(
      state,
      connection,
      path,
      closing(event.error),
      event.error === ECONNREFUSED ? 'refused' : 'failed',
      now,
      out,
    );
  } else if (atOnce && now < connection.settledAt + UNSETTLED_MS) {
    // Not the limit, but the path whose place it takes: the server had not heard of its end.
    joinFailed(state, connection, path, 'the server had not let go of the path before it', 'failed', now, out);
  } else if (atOnce && now < connection.ghostsUntil) {
    fail(connection, path, 'the server still counts paths from the address that this host lost', now);
    connection.full = false;
    out.push({ kind: 'joined', token: event.token, detour: path.detour, outcome: 'limit', why: path.why });
  } else if (atOnce) {
    connection.full = true;
    fail(connection, path, 'the server accepts no more subflows', now);
    connection.full = true;
    out.push({ kind: 'joined', token: event.token, detour: path.detour, outcome: 'limit', why: path.why });
    out.push({ kind: 'note', token: event.token, level: 'info', what: 'server-limit' });
  } else {
    joinFailed(state, connection, path, closing(event.error), 'lost', now, out);
  }
  fill(state, connection, now, out);
}

const closing = (error: number): string => (error === 0 ? 'closed by the other end' : `closed with error ${error}`);

function onCreateFailed(
  state: State,
  event: Extract<Event, { kind: 'create-failed' }>,
  now: number,
  out: Command[],
): void {
  const connection = state.connections.get(event.token);
  const path = connection?.paths.find(
    ({ state: at, remote, from }) =>
      at === 'joining' &&
      remote !== null &&
      from !== null &&
      sameEndpoint(remote, event.remote) &&
      sameAddress(from, event.local),
  );
  if (!connection || !path) return;
  if (event.code === 'EINVAL' && !connection.commanded && path.kind !== 'direct') {
    // The kernel's answer both to a token that is gone and to a connection of its own path manager.
    connection.doubtedAt = now;
    out.push({ kind: 'dump' });
  }
  fail(connection, path, `the kernel refused the subflow: ${event.code}`, now);
  // Its address went while nobody watched.
  if (event.code === 'EADDRNOTAVAIL' && path.kind === 'direct')
    out.push({ kind: 'find-sources', servers: [connection.remote.address] });
  if (path.kind !== 'direct')
    out.push({ kind: 'joined', token: event.token, detour: path.detour, outcome: 'failed', why: path.why });
  fill(state, connection, now, out);
}

function onTick(state: State, now: number, out: Command[]): void {
  for (const [token, at] of state.due) {
    if (at > now) continue;
    state.due.delete(token);
    const connection = state.connections.get(token);
    if (!connection || connection.unmanaged !== null) continue;
    for (const path of [...connection.paths]) {
      if (path.state !== 'joining' || connection.establishedAt === null || path.since + joinTimeout(state, path) > now)
        continue;
      // An unreachable detour raises no event. The kernel's own attempt goes on; if it succeeds after all, we hear of it.
      if (path.kind === 'direct') fail(connection, path, 'the handshake got no answer', now);
      else joinFailed(state, connection, path, 'the handshake got no answer', 'timeout', now, out);
    }
    fill(state, connection, now, out);
  }
  trimIdle(state, now, out);
  considerTunnels(state, now, out);
}
