import { formatEndpoint, sameAddress } from '../protocol/address.ts';
import { considerTunnels, onMark } from './enrolment.ts';
import { confirm, release } from './joins.ts';
import { reconsider } from './rescue.ts';
import { fill } from './slots.ts';
import { type Command, type Event, enter, leaseKey, noTraffic, ownsAddress, remove, type State } from './state.ts';
import { forgetDetour, forgive } from './worth.ts';

/** What detours report of themselves and of their leases, and what that means to the connections. Pure. */

/** Refusals that say of all leases that they will not do here, and nothing of where they would lead (docs/protocol.md, Results). */
const USELESS: readonly string[] = ['BAD_ADDRESS', 'NO_RESOURCES'];

/** A source names a detour, or says its name or rank anew. */
export function onDetourAdded(
  state: State,
  event: Extract<Event, { kind: 'detour-added' }>,
  now: number,
  out: Command[],
): void {
  const known = state.detours.get(event.detour);
  if (known) {
    known.name = event.name;
    known.rank = event.rank ?? null;
    considerTunnels(state, now, out);
    for (const connection of state.connections.values()) fill(state, connection, now, out);
    return;
  }
  state.detours.set(event.detour, {
    key: event.detour,
    name: event.name,
    endpoint: event.endpoint,
    address: event.endpoint.address,
    via: event.via ?? null,
    rank: event.rank ?? null,
    state: 'starting',
    why: 'it has not answered yet',
    rttMs: null,
    epoch: null,
    local: null,
    upSince: now,
    pausedUntil: 0,
    tunnels: 0,
    useless: null,
    capability: null,
    inband: 'unknown',
    inbandMisses: 0,
    ...noTraffic(),
  });
  for (const connection of state.connections.values()) {
    for (const path of connection.paths) {
      if (
        path.kind === 'nat' &&
        path.detour === null &&
        path.remote &&
        sameAddress(path.remote.address, event.endpoint.address) &&
        (event.via === undefined || (path.local && ownsAddress(state, event.via, path.local.address)))
      ) {
        path.detour = event.detour;
        if (path.state === 'active' || path.state === 'backup') path.why = '';
      }
    }
  }
}

/** No source names it any more: what runs through it lives on, nothing new goes there. */
export function onDetourRemoved(state: State, key: string, now: number, out: Command[]): void {
  if (!state.detours.delete(key)) return;
  forgetDetour(state.experience, key);
  for (const [id, lease] of state.leases) {
    if (lease.detour !== key) continue;
    for (const token of lease.users) state.connections.get(token)?.leases.delete(id);
    release(state, id, out);
  }
  for (const connection of state.connections.values()) {
    for (const path of [...connection.paths]) {
      if (path.detour !== key) continue;
      if (path.state === 'active' || path.state === 'backup' || path.state === 'joining') {
        // What is there, or on its way, lives on until it ends; nothing new goes there.
        path.detour = null;
        path.why = 'its detour is no longer configured; it lives on until it ends';
      } else remove(connection, path);
    }
    fill(state, connection, now, out);
  }
  considerTunnels(state, now, out);
}

/** It answered. */
export function onDetourUp(
  state: State,
  event: Extract<Event, { kind: 'detour-up' }>,
  now: number,
  out: Command[],
): void {
  const detour = state.detours.get(event.detour);
  if (!detour) return;
  const changed =
    detour.state === 'starting' ||
    detour.state === 'down' ||
    detour.epoch !== event.epoch ||
    detour.local === null ||
    !sameAddress(detour.local, event.local);
  detour.rttMs = event.rttMs;
  detour.epoch = event.epoch;
  detour.local = event.local;
  detour.tunnels = event.tunnels ?? 0;
  detour.capability = event.capability ?? null;
  onMark(state, detour, out);
  if (!changed) {
    considerTunnels(state, now, out);
    return;
  }
  if (detour.state === 'starting' || detour.state === 'down') detour.upSince = now;
  // What stalled while it was away can be made again.
  if (detour.state === 'down') out.push({ kind: 'dump' });
  forgive(state.experience, detour.key);
  // A new epoch, address or life: what failed before says nothing about now.
  detour.state = 'up';
  detour.why = '';
  detour.pausedUntil = 0;
  detour.suspendedUntil = 0;
  detour.suspensions = 0;
  detour.failedServers.clear();
  detour.unansweredJoins = 0;
  detour.useless = null;
  detour.inband = 'unknown';
  detour.inbandMisses = 0;
  considerTunnels(state, now, out);
  reconsider(state, now);
  for (const connection of state.connections.values()) {
    for (const path of connection.paths) if (path.detour === detour.key && path.state === 'failed') path.retryAt = now;
    fill(state, connection, now, out);
  }
}

/** It does not answer any more. */
export function onDetourDown(state: State, key: string, why: string, now: number, out: Command[]): void {
  const detour = state.detours.get(key);
  if (!detour) return;
  detour.state = 'down';
  detour.why = why;
  const { rank } = detour;
  // It may be the last of its rank: those behind it get their turn.
  const opensReserve =
    rank !== null &&
    [...state.detours.values()].some(
      (one) => one.rank?.source === rank.source && one.rank.preference > rank.preference,
    );
  for (const connection of state.connections.values()) {
    let waited = opensReserve;
    for (const path of connection.paths) {
      if (path.detour !== key || path.state !== 'requested') continue;
      // Not the path's fault: it costs no back-off, and `detour-up` starts it again.
      enter(path, 'failed', now, `the detour does not answer: ${why}`);
      path.retryAt = now;
      waited = true;
    }
    if (waited) fill(state, connection, now, out);
  }
}

/** A lease stands: whoever waited for it joins, and what was buried is made again. */
export function onLeaseGranted(
  state: State,
  event: Extract<Event, { kind: 'lease-granted' }>,
  now: number,
  out: Command[],
): void {
  const lease = state.leases.get(leaseKey(event.detour, formatEndpoint(event.server)));
  if (!lease) return;
  lease.state = 'granted';
  lease.port = event.port;
  lease.grantedAt = now;
  lease.expiresAt = event.expiresAt;
  lease.why = '';
  for (const token of lease.users) {
    const connection = state.connections.get(token);
    const path = connection?.paths.find((one) => one.kind === 'nat' && one.detour === event.detour);
    if (connection && path && confirm(state, connection, path, now, out)) fill(state, connection, now, out);
  }
}

/** No lease: whoever waited for it tries others. */
export function onLeaseRefused(
  state: State,
  event: Extract<Event, { kind: 'lease-refused' }>,
  now: number,
  out: Command[],
): void {
  const lease = state.leases.get(leaseKey(event.detour, formatEndpoint(event.server)));
  const detour = state.detours.get(event.detour);
  if (detour && event.everywhere) detour.pausedUntil = Math.max(detour.pausedUntil, event.retryAt);
  if (detour && USELESS.includes(event.why)) detour.useless = `no lease: ${event.why}`;
  considerTunnels(state, now, out);
  if (!lease) return;
  lease.state = 'refused';
  lease.retryAt = event.retryAt;
  lease.why = event.why;
  if (lease.users.size === 0) release(state, leaseKey(event.detour, formatEndpoint(event.server)), out);
  for (const token of [...lease.users]) {
    const connection = state.connections.get(token);
    const path = connection?.paths.find((one) => one.kind === 'nat' && one.detour === event.detour);
    if (!connection || path?.state !== 'requested') continue;
    enter(path, 'failed', now, `no lease: ${event.why}`);
    path.retryAt = event.retryAt;
    out.push({ kind: 'joined', token, detour: event.detour, outcome: 'refused', why: path.why });
    fill(state, connection, now, out);
  }
}
