import { type Address, type Endpoint, formatEndpoint, sameAddress, sameEndpoint } from '../protocol/address.ts';
import { revived } from './revival.ts';
import { spareFrom, sparesOf, wayThrough } from './spares.ts';
import {
  addressKey,
  type Command,
  type Connection,
  type Detour,
  detourAt,
  enter,
  insideOf,
  inUse,
  isLive,
  type JoinOutcome,
  keepId,
  type Lease,
  leaseKey,
  livePaths,
  newPath,
  type Path,
  pathKey,
  pathOf,
  RETRY_FIRST_MS,
  RETRY_LONGEST_MS,
  remove,
  rttOf,
  type Spare,
  STABLE_MS,
  type State,
  type Traffic,
  type Tuple,
} from './state.ts';
import { forgive } from './worth.ts';

/** Makes and ends the subflows of a connection, and sees to the leases that they need. Pure: see manager.ts. */

/** A router drops what is above 50 SYN/s, burst 100 (docs/protocol.md, quotas); a dropped one costs a second. */
const SYN_EVERY_MS = 1_000 / 45;
const SYN_BURST = 80;
/** After so many in a row without an answer, this far apart, until one is answered. */
const PATIENT_JOINS = 100;
const SYN_SELDOM_MS = 500;

/** The direct path's close may be the connection's own end, whose event follows at once. */
const GUARDIAN_DELAY_MS = 50;

/** Joins that fail to this many servers in a row say that the detour is at fault (a NAT that maps UDP and TCP differently). */
const SUSPEND_AFTER_SERVERS = 3;
const SUSPEND_FIRST_MS = 30_000;
const SUSPEND_LONGEST_MS = 600_000;

/** A detour that takes longer to answer was out of reach: the first repetition of a question leaves after 250 ms. */
const LATE_MS = 240;

/** Leases stay for a while after their last connection, so that the next one to the same server need not ask. */
const IDLE_LEASE_MS = 600_000;

/** A router grants 256 leases per key by default; half of that may be kept on suspicion. */
const IDLE_LEASES = 128;

/** A lease this close to its end may be gone by the time the SYN arrives. */
const LEASE_MARGIN_MS = 1_000;

/** The connection needs its leases no longer; those without another user stay idle for a while. */
export function letGo(state: State, connection: Connection, now: number, out: Command[]): void {
  for (const key of connection.leases) letGoLease(state, key, connection.token, now, out);
  connection.leases.clear();
  trimIdle(state, now, out);
}

/** `user` needs a lease no longer; without another one it stays idle for a while. */
export function letGoLease(state: State, key: string, user: number, now: number, out: Command[]): void {
  const lease = state.leases.get(key);
  if (!lease?.users.delete(user) || lease.users.size > 0) return;
  if (lease.state === 'refused') release(state, key, out);
  else state.idle.set(key, now);
}

export function release(state: State, key: string, out: Command[]): void {
  const lease = state.leases.get(key);
  state.leases.delete(key);
  state.idle.delete(key);
  if (lease) out.push({ kind: 'release-lease', detour: lease.detour, server: lease.server });
}

/** Releases idle leases that are too many or too old. */
export function trimIdle(state: State, now: number, out: Command[]): void {
  for (const [key, since] of state.idle) {
    if (state.idle.size <= IDLE_LEASES && now - since < IDLE_LEASE_MS) break;
    release(state, key, out);
  }
}

/** Gives the connection a path by this way: asks for a lease if one is needed, and joins as soon as it may. */
export function start(
  state: State,
  connection: Connection,
  way: Detour | Spare,
  backup: boolean,
  now: number,
  out: Command[],
): void {
  const kind = 'remote' in way ? way.kind : 'nat';
  const carrier = 'remote' in way ? state.tunnels.get(way.key) : way;
  if (carrier?.state === 'suspended') carrier.state = 'up';
  let path = connection.paths.find((one) => one.kind === kind && one.detour === way.key);
  if (!path) {
    path = newPath({
      kind,
      detour: way.key,
      local: null,
      remote: null,
      state: 'requested',
      since: now,
    });
    connection.paths.push(path);
  }
  enter(path, 'requested', now, kind === 'nat' ? 'waiting for a lease' : 'waiting for the connection');
  path.reserve = backup;
  path.turnAt = 0;
  path.local = null;
  // Where joins are known to name their server, nobody need be asked beforehand.
  const needsNoLease =
    !('remote' in way) && way.inband === 'works' && inbandPort(state, way, connection, path, now) !== null;
  if (kind === 'nat' && !needsNoLease) use(state, connection, way.key, out);
  joinIfLeased(state, connection, path, now, out);
}

/** The port of a detour to which a join names its server itself; null where it needs a lease. */
function inbandPort(state: State, detour: Detour, { remote }: Connection, path: Path, now: number): number | null {
  const { capability, inband, address } = detour;
  if (!state.rules.inband || capability === null || inband === 'fails' || path.leaseOnly) return null;
  if (remote.address.family !== 4 || address.family !== 4) return null;
  return capability.expiresAt - LEASE_MARGIN_MS > now ? capability.port : null;
}

/** Makes the connection a user of the lease, and asks for it when there is none. */
function use(state: State, connection: Connection, detour: string, out: Command[]): void {
  const lease = wantLease(state, detour, connection.remote, connection.token, Number.POSITIVE_INFINITY, out);
  connection.leases.add(leaseKey(lease.detour, connection.server));
}

/** Makes `user` a user of the lease. It is asked for when there is none, and again when it was refused and `now` allows. */
export function wantLease(
  state: State,
  detour: string,
  server: Endpoint,
  user: number,
  now: number,
  out: Command[],
): Lease {
  const key = leaseKey(detour, formatEndpoint(server));
  let lease = state.leases.get(key);
  if (!lease) {
    lease = {
      detour,
      server,
      state: 'asked',
      port: 0,
      grantedAt: 0,
      expiresAt: 0,
      retryAt: 0,
      why: '',
      users: new Set(),
    };
    state.leases.set(key, lease);
    out.push({ kind: 'want-lease', detour, server });
  } else if (lease.state === 'refused' && lease.retryAt <= now) {
    lease.state = 'asked';
    out.push({ kind: 'want-lease', detour, server });
  }
  lease.users.add(user);
  state.idle.delete(key);
  return lease;
}

/** How far apart SYNs to a detour are: it is asked less often while it drops them. */
const synEvery = ({ unansweredJoins }: Traffic): number =>
  unansweredJoins < PATIENT_JOINS ? SYN_EVERY_MS : SYN_SELDOM_MS;

/** When the detour may be sent the next SYN. */
const synAt = ({ synsUntil }: Traffic): number => synsUntil - SYN_EVERY_MS * SYN_BURST;

/** Whether a path may send its SYN now; otherwise it has been given a turn. */
function takeTurn(traffic: Traffic, path: Path, now: number): boolean {
  if (path.turnAt > now) return false;
  if (synAt(traffic) > now) {
    traffic.turnsUntil = Math.max(traffic.turnsUntil, synAt(traffic)) + synEvery(traffic);
    path.turnAt = traffic.turnsUntil;
    path.why = 'waiting for its turn: many connections at once';
    return false;
  }
  path.turnAt = 0;
  traffic.synsUntil = Math.max(traffic.synsUntil, now) + synEvery(traffic);
  return true;
}

/** Joins when the lease stands, if one is needed, and the detour may be sent a SYN; otherwise the path waits. */
export function joinIfLeased(state: State, connection: Connection, path: Path, now: number, out: Command[]): void {
  if (path.kind === 'spare') {
    if (connection.establishedAt === null || connection.settledAt > now) return;
    const spare = sparesOf(state, connection).find(({ key }) => key === path.detour);
    if (spare) join(connection, path, spare.remote, spare.local, now, out, spare.index);
    else fail(connection, path, 'that way is no longer there', now);
    return;
  }
  if (path.kind === 'vpn') {
    const tunnel = path.detour === null ? undefined : state.tunnels.get(path.detour);
    const way = tunnel && wayThrough(connection, tunnel);
    if (connection.establishedAt === null || connection.settledAt > now || !tunnel || !way) return;
    if (takeTurn(tunnel, path, now)) join(connection, path, way.remote, way.local, now, out);
    return;
  }
  const detour = path.detour === null ? undefined : state.detours.get(path.detour);
  if (!detour?.local || connection.establishedAt === null) return;
  const lease = state.leases.get(leaseKey(detour.key, connection.server));
  const leased = lease?.state === 'granted' && lease.expiresAt - LEASE_MARGIN_MS > now ? lease.port : null;
  // One that is older than the connection costs nothing more; another was asked for in case that naming the server does not work.
  const isCached = leased !== null && lease !== undefined && lease.grantedAt < connection.since;
  const named = isCached ? null : inbandPort(state, detour, connection, path, now);
  const port = named ?? leased;
  if (port === null) {
    // What it was to do without is not there any more.
    if (!lease) use(state, connection, detour.key, out);
    return;
  }
  if (connection.settledAt > now || !takeTurn(detour, path, now)) return;
  path.inband = named !== null;
  const index = state.links?.find(({ name }) => name === detour.via)?.index;
  join(connection, path, { address: detour.address, port }, detour.local, now, out, index);
}

/** Asks the kernel for the subflow. The outcome is an event, or nothing at all (see `JOIN_TIMEOUT_MS`). */
export function join(
  connection: Connection,
  path: Path,
  remote: Endpoint,
  local: Address,
  now: number,
  out: Command[],
  index?: number,
): void {
  const localId = idOf(connection, local);
  path.from = local;
  if (localId === null) {
    fail(connection, path, 'the connection has no address id left', now);
    return;
  }
  enter(path, 'joining', now, 'waiting for the handshake');
  path.since = now;
  path.remote = remote;
  path.local = null;
  path.led = false;
  if (path.ghost) {
    // The way is open again: the server hears of the old one's end before it hears of the new one.
    out.push({ kind: 'abort-subflow', ...path.ghost });
    path.ghost = null;
    connection.settledAt = Math.max(connection.settledAt, now);
  }
  const first = path.kind !== 'direct' && path.failures === 0 && connection.establishedAt === now;
  out.push({
    kind: 'create-subflow',
    token: connection.token,
    localId,
    local,
    remote,
    backup: path.reserve,
    ...(index === undefined ? {} : { index }),
    establishedAt: first ? now : null,
  });
}

/** Ids are 8 bits; 0 is the connection's own address, and one address has one id for the life of the connection. */
export function idOf(connection: Connection, local: Address): number | null {
  if (sameAddress(local, connection.local.address)) return 0;
  const key = addressKey(local);
  const known = connection.ids.get(key);
  if (known !== undefined) return known;
  const used = new Set(connection.ids.values());
  for (let id = 1; id <= 255; id++) {
    if (used.has(id)) continue;
    keepId(connection, local, id);
    return id;
  }
  return null;
}

/** The path is gone; it may be tried again after a back-off that doubles with each failure in a row. */
export function fail(connection: Connection, path: Path, why: string, now: number): void {
  const wasUsed = path.state === 'active' || path.state === 'backup';
  const lived = wasUsed ? now - path.since : 0;
  path.failures = lived >= STABLE_MS ? 1 : path.failures + 1;
  connection.restUntil = now;
  enter(path, 'failed', now, why);
  path.local = path.kind === 'direct' ? path.local : null;
  const backoff = Math.min(RETRY_FIRST_MS * 2 ** Math.min(path.failures - 1, 10), RETRY_LONGEST_MS);
  path.retryAt = now + (path.kind === 'direct' && path.failures === 1 ? GUARDIAN_DELAY_MS : backoff);
  // A path is gone, so the server has room for one again, however short its life was.
  if (wasUsed) connection.full = false;
}

/** A join through a detour did not work: note it, find out about the lease, and try the next one. */
export function joinFailed(
  state: State,
  connection: Connection,
  path: Path,
  why: string,
  outcome: JoinOutcome,
  now: number,
  out: Command[],
): void {
  const named = path.inband && path.state === 'joining' && path.detour !== null ? state.detours.get(path.detour) : null;
  if (named) {
    resortToLease(state, connection, path, named, why, outcome, now, out);
    return;
  }
  const began = path.since;
  fail(connection, path, why, now);
  connection.commanded = true;
  out.push({ kind: 'joined', token: connection.token, detour: path.detour, outcome, why: path.why });
  if (path.kind === 'spare') return;
  const carrier = path.detour === null ? undefined : (state.detours.get(path.detour) ?? state.tunnels.get(path.detour));
  if (!carrier) {
    // Nobody will try it again.
    remove(connection, path);
    return;
  }
  if (outcome === 'timeout') carrier.unansweredJoins++;
  if (outcome !== 'lost' && isSuspended(carrier, connection.server, now)) {
    carrier.state = 'suspended';
    carrier.why =
      path.kind === 'vpn'
        ? `joins through it fail (${why})`
        : `joins through it fail (${why}); a NAT that gives UDP and TCP different addresses does this`;
  }
  if (path.kind === 'vpn') {
    ask(state, connection, path, out);
    return;
  }
  const detour = carrier;
  if ('useless' in detour && (outcome === 'timeout' || detour.state === 'suspended')) detour.useless = why;
  const lease = state.leases.get(leaseKey(detour.key, connection.server));
  // One that was confirmed after a join began still stood then, and many joins may fail in the meantime.
  if (lease?.state === 'granted' && (outcome === 'lost' || lease.grantedAt <= began)) {
    // Whoever is not known at that port answers with a reset, or nobody does: the lease may be gone.
    lease.state = 'asked';
    out.push({ kind: 'doubt-lease', detour: detour.key, server: connection.remote });
  }
}

/** So many in a row that nobody answers, after others that were, say that the network has changed its mind about the option. */
const INBAND_MISSES = 3;

/** A join that named its server did not work: the same path is made by a lease, at once. */
function resortToLease(
  state: State,
  connection: Connection,
  path: Path,
  detour: Detour,
  why: string,
  outcome: JoinOutcome,
  now: number,
  out: Command[],
): void {
  // A reset may be the server's, and says nothing of the way; silence is what a network does that drops SYNs or their options.
  if (outcome === 'timeout') {
    detour.inbandMisses++;
    if (detour.inband === 'unknown' || detour.inbandMisses >= INBAND_MISSES) {
      detour.inband = 'fails';
      out.push({ kind: 'note', token: connection.token, level: 'info', what: 'inband-fails' });
    }
  }
  connection.commanded = true;
  out.push({ kind: 'joined', token: connection.token, detour: path.detour, outcome, why: `in-band: ${why}` });
  path.leaseOnly = true;
  start(state, connection, detour, path.reserve, now, out);
}

/** Counts a join that failed; whether there are no more to be tried for a while. */
function isSuspended(traffic: Traffic, server: string, now: number): boolean {
  traffic.failedServers.add(server);
  if (traffic.failedServers.size < SUSPEND_AFTER_SERVERS) return false;
  traffic.failedServers.clear();
  traffic.suspendedUntil =
    now + Math.min(SUSPEND_FIRST_MS * 2 ** Math.min(traffic.suspensions, 10), SUSPEND_LONGEST_MS);
  traffic.suspensions++;
  return true;
}

/**
 * Which path an established subflow is. One that nobody waits for any more (its place is taken, or its detour serves the
 * connection already) is destroyed, and there is none; so it is for subflows that are not to a detour of ours.
 */
export function admit(
  state: State,
  connection: Connection,
  { local, remote }: Tuple,
  now: number,
  out: Command[],
  adopt = false,
): Path | null {
  const known = pathOf(connection, { local, remote });
  if (known && (known.kind === 'direct' || isLive(known))) return known;
  const inside = [...state.tunnels.values()].some((tunnel) => {
    const own = insideOf(tunnel, local.address.family);
    return own !== null && sameAddress(own, local.address);
  });
  if (inside) {
    // Out of a tunnel it is no direct path, and one that answers too late has lost its place.
    destroy(connection, { local, remote }, out);
    return null;
  }
  if (sameEndpoint(remote, connection.remote)) {
    const direct = connection.paths[0];
    if (!direct) return null;
    if (connection.revival && inUse(direct)) {
      // The way is back; the old subflow would sit out its retransmission timeout.
      if (direct.local) {
        destroy(connection, { local: direct.local, remote }, out);
        out.push({ kind: 'abort-subflow', local: direct.local, remote });
      }
      for (const one of connection.unanswered) {
        if (sameEndpoint(one.local, local)) continue;
        out.push({ kind: 'destroy-subflow', token: connection.token, local: one.local, remote: one.remote });
      }
      connection.unanswered = [];
      revived(state, connection, now);
      direct.since = now;
      return direct;
    }
    if (!inUse(direct)) return direct;
    const other = adopt && !sameAddress(local.address, connection.home) && !known;
    const key = other ? spareFrom(state, local.address) : null;
    if (key !== null) {
      const path = newPath({ kind: 'spare', detour: key, local, remote, state: 'joining', since: now });
      connection.paths.push(path);
      return path;
    }
    // A second one, answered too late: it would take a place that the server counts.
    if (!sameEndpoint(local, connection.local)) destroy(connection, { local, remote }, out);
    return null;
  }
  const detour = detourAt(state, remote.address, local.address)?.key ?? null;
  // Found at the start, it may be a predecessor's, by a detour whose name is not resolved yet.
  if (detour === null && !known && !adopt) return null;
  const same =
    known ?? connection.paths.find((path) => path.kind === 'nat' && detour !== null && path.detour === detour);
  const taken = same !== undefined && isLive(same);
  const counted = detour !== null || same?.kind === 'spare';
  if (counted && (taken || connection.full || livePaths(connection) >= state.rules.maxPaths)) {
    if (same && !taken) {
      enter(same, 'retired', now, 'it answered too late');
      same.local = local;
      same.remote = remote;
    }
    destroy(connection, { local, remote }, out);
    return null;
  }
  if (same) return same;
  const path = newPath({ kind: 'nat', detour, local, remote, state: 'joining', since: now });
  connection.paths.push(path);
  return path;
}

/** Gives a path up for a better one. */
export function retire(connection: Connection, path: Path, why: string, now: number, out: Command[]): void {
  if (!path.local || !path.remote || (path.state !== 'active' && path.state !== 'backup')) {
    remove(connection, path);
    return;
  }
  const { local, remote } = path;
  destroy(connection, { local, remote }, out);
  out.push({ kind: 'abort-subflow', local, remote });
  enter(path, 'retired', now, why);
}

/**
 * Destroys a path through which nothing gets. Left alone it would sit out its retransmission timeout when it comes back;
 * made again it works at once. That waits until its detour has answered.
 */
export function bury(state: State, connection: Connection, path: Path, why: string, now: number, out: Command[]): void {
  if (path.local && path.remote) {
    path.ghost = { local: path.local, remote: path.remote };
    destroy(connection, path.ghost, out);
  }
  const failures = now - path.since >= STABLE_MS ? 0 : path.failures;
  fail(connection, path, why, now);
  path.failures = failures + 1;
  if (failures === 0) path.retryAt = now;
  path.buried = true;
  connection.commanded = true;
  out.push({ kind: 'joined', token: connection.token, detour: path.detour, outcome: 'lost', why });
  out.push({ kind: 'decided', token: connection.token, act: 'repair', detour: path.detour, why });
  ask(state, connection, path, out);
}

/**
 * Its detour has answered for a path: a suspicion is cleared, or has become a certainty.
 * @returns whether the path waited for that, to be made or to be made again
 */
export function confirm(state: State, connection: Connection, path: Path, now: number, out: Command[]): boolean {
  if (path.suspectAt !== null) {
    // At once: the way to the detour is fine, and the server merely prefers others. Late: it was dead all the while.
    const flow = connection.book?.observation.flows.get(pathKey(path));
    if (now - path.suspectAt > LATE_MS + 3 * rttOf(state, path) && isLive(path))
      bury(state, connection, path, 'nothing came through, nor from its detour', now, out);
    else if (flow) flow.used = false;
    path.suspectAt = null;
  }
  if (!path.buried) return path.state === 'requested' && path.turnAt <= now;
  path.buried = false;
  if (path.detour !== null) forgive(state.experience, path.detour);
  return true;
}

/** Asks the path's detour whether it is there, and the lease or the tunnel with it. */
export function ask(state: State, connection: Connection, path: Path, out: Command[]): void {
  const tunnel = path.detour === null ? undefined : state.tunnels.get(path.detour);
  if (tunnel) out.push({ kind: 'doubt-tunnel', site: tunnel.site });
  if (path.detour === null || !state.detours.has(path.detour)) return;
  use(state, connection, path.detour, out);
  const lease = state.leases.get(leaseKey(path.detour, connection.server));
  if (lease?.state !== 'granted') return;
  lease.state = 'asked';
  out.push({ kind: 'doubt-lease', detour: path.detour, server: connection.remote });
}

export function destroy(connection: Connection, { local, remote }: Tuple, out: Command[]): void {
  connection.leaving = new Set(connection.leaving).add(formatEndpoint(local));
  out.push({ kind: 'destroy-subflow', token: connection.token, local, remote });
}
