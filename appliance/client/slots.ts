import { contains, covers, parsePrefix, sameAddress } from '../protocol/address.ts';
import { bury, join, joinIfLeased, retire, start } from './joins.ts';
import {
  type Candidate,
  type Decision,
  type Explanation,
  explain,
  openBook,
  type Present,
  place,
  type Situation,
} from './paths.ts';
import { sparesOf, wayThrough } from './spares.ts';
import {
  type Command,
  type Connection,
  type Detour,
  draw,
  enter,
  entranceOf,
  insideOf,
  inUse,
  isGone,
  isLive,
  isSilent,
  leaseKey,
  livePaths,
  type Path,
  type PathKind,
  pathKey,
  RETRY_FIRST_MS,
  type Rules,
  rttOf,
  type State,
  siteOf,
  type Tunnel,
  type Tuple,
} from './state.ts';
import { DIRECT, minimumAge } from './worth.ts';

/** Which detours may serve a connection now, and how its places are given to them. Pure: the choice itself is in paths.ts. */

/** SYNs are sent again after 1 and 3 s (RFC 6298): a join that is silent for this long is not going to answer. */
const JOIN_TIMEOUT_MS = 5_000;
/** One without a lease is given up before the answer to its second SYN: with a lease the same path is there a round trip later. */
const INBAND_TIMEOUT_MS = 1_000;

/** How long an answer to a path's join is waited for, ms. */
export const joinTimeout = (state: State, path: Path): number =>
  path.inband ? INBAND_TIMEOUT_MS + 3 * rttOf(state, path) : JOIN_TIMEOUT_MS;

/** More than any order of a source (RFC 2782: 16 bits of weight). */
const ORDERS = 2 ** 32;

/** Another path's end has reached the server by then, usually. */
const SETTLE_MS = 20;

const LOCAL = ['127.0.0.0/8', '169.254.0.0/16', '0.0.0.0/8', '::/127', 'fe80::/10'].map((text) => {
  const prefix = parsePrefix(text);
  if (!prefix) throw new Error(`not a prefix: ${text}`);
  return prefix;
});

/** Why connections to a server are left alone; null when they are not. */
export function whyUnmanaged({ targets, exclude }: Rules, { local, remote }: Tuple): string | null {
  if (LOCAL.some((prefix) => contains(prefix, remote.address)) || sameAddress(local.address, remote.address)) {
    return 'the server is on this host or link';
  }
  if (exclude.some((rule) => covers(rule, remote))) return 'the server is excluded (DETOUR_EXCLUDE)';
  if (targets.length > 0 && !targets.some((rule) => covers(rule, remote)))
    return 'the server is no target (DETOUR_TARGETS)';
  return null;
}

/** Whether a connection lacks paths it could have, and why, for people; null when it lacks none. */
export function shortfall(state: State, connection: Connection): string | null {
  if (connection.unmanaged !== null) return connection.unmanaged;
  if (connection.full) return 'the server accepts no more subflows';
  if (livePaths(connection) >= state.rules.maxPaths) return null;
  const family = connection.remote.address.family;
  if ([...state.tunnels.values()].some((tunnel) => insideOf(tunnel, family) !== null))
    return 'no further detour is usable';
  if (![...state.detours.values()].some((one) => one.address.family === family))
    return `no detour has an IPv${family} address`;
  return 'no further detour is usable';
}

/** An idle connection can wait longer for what it lacks, and there may be very many. */
const IDLE_RETRY_MS = 2_000;

/**
 * Starts as many paths as the connection still may have, and notes when to look again. Called whenever something
 * changed that could allow one more.
 */
export function fill(state: State, connection: Connection, now: number, out: Command[]): void {
  if (connection.unmanaged !== null || connection.doubtedAt !== null || connection.unsure) return;
  const direct = connection.paths[0];
  if (
    direct?.kind === 'direct' &&
    direct.state === 'failed' &&
    direct.retryAt <= now &&
    connection.establishedAt !== null &&
    !isGone(state, connection.home)
  ) {
    join(connection, direct, connection.remote, connection.home, now, out);
  }
  for (const path of connection.paths) {
    if (path.state === 'requested') joinIfLeased(state, connection, path, now, out);
  }
  let soonest = moveBack(state, connection, now, out);
  if (limitOf(state, connection) > livePaths(connection)) {
    const age = state.terms.minAgeMs ?? minimumAge(state.experience, connection.prefix);
    const { situation, next } = survey(state, connection, now);
    soonest = Math.min(soonest, next);
    if (connection.establishedAt === null ? age > 0 : connection.establishedAt + age > now) {
      // Too young. Before ESTABLISHED there is nothing to wait for but that event.
      if (connection.establishedAt !== null) soonest = Math.min(soonest, connection.establishedAt + age);
    } else if (situation.candidates.length > 0) {
      connection.book ??= openBook(now);
      const placed = place(state.terms, state.experience, connection.book, situation, now, () => draw(state));
      for (const decision of placed) carryOut(state, connection, decision, now, out);
      // What holds the rest back (too many attempts, failures of other connections) passes with time.
      const held = situation.candidates.length > placed.length && livePaths(connection) < situation.limit;
      if (held && connection.establishedAt !== null)
        soonest = Math.min(soonest, now + (connection.book.idle ? IDLE_RETRY_MS : RETRY_FIRST_MS));
    }
  }
  for (const path of connection.paths) {
    if (path.state === 'joining' && connection.establishedAt !== null)
      soonest = Math.min(soonest, path.since + joinTimeout(state, path));
    if (path.state === 'requested' && connection.settledAt > now) soonest = Math.min(soonest, connection.settledAt);
    if (path.state === 'requested' && path.turnAt > now) soonest = Math.min(soonest, path.turnAt);
    if (path.kind === 'direct' && path.state === 'failed' && !isGone(state, connection.home))
      soonest = Math.min(soonest, path.retryAt);
  }
  if (soonest < Number.POSITIVE_INFINITY) state.due.set(connection.token, soonest);
  else state.due.delete(connection.token);
}

/** A detour that came back must stay so long before connections move back to it: one that flaps would move them each time. */
const STAYS_MS = 5_000;

/**
 * Gives up one path by a detour that its source wants used only while no better one is up, once a better one is up again: when
 * that is in use already, or needs the place. One at a time, and none while another path is under way.
 * @returns when to look again, as far as time alone decides
 */
function moveBack(state: State, connection: Connection, now: number, out: Command[]): number {
  let next = Number.POSITIVE_INFINITY;
  if (connection.establishedAt === null) return next;
  if (connection.paths.some(({ state: at }) => at === 'requested' || at === 'joining')) return next;
  for (const path of connection.paths) {
    const detour = inUse(path) ? carrierOf(state, path) : undefined;
    if (!detour?.rank || !isReserve(state, detour, now)) continue;
    const { source, preference } = detour.rank;
    const better = [...state.detours.values()].filter(
      ({ rank, state: at, address }) =>
        rank?.source === source &&
        rank.preference < preference &&
        at === 'up' &&
        address.family === detour.address.family,
    );
    const used = connection.paths.some((one) => {
      const by = inUse(one) ? carrierOf(state, one) : undefined;
      return by !== undefined && better.includes(by);
    });
    const full = livePaths(connection) >= limitOf(state, connection) && (connection.book?.attempts ?? 1) >= 1;
    let wanted = used;
    for (const one of better) {
      const at = Math.max(usableAt(state, connection, one, now), one.upSince + STAYS_MS);
      if (at > now) next = Math.min(next, at);
      else wanted ||= full;
    }
    if (!wanted) continue;
    carryOut(
      state,
      connection,
      { act: 'retire', detour: pathKey(path), why: 'a detour that its source prefers is up again' },
      now,
      out,
    );
    connection.settledAt = now + SETTLE_MS + rttOf(state, path);
    return now + RETRY_FIRST_MS;
  }
  return next;
}

/**
 * Whether its source wants others used before this detour, and one of them is up. One that has not answered yet still
 * may: at the start the first of several answers must not decide.
 */
export function isReserve(state: State, { rank, address }: Detour, now: number): boolean {
  if (rank === null || rank.preference === 0) return false;
  for (const other of state.detours.values()) {
    if (other.rank?.source !== rank.source || other.rank.preference >= rank.preference) continue;
    if (other.address.family !== address.family) continue;
    if (other.state === 'starting' || (other.state === 'up' && other.pausedUntil <= now)) return true;
  }
  return false;
}

/** When this detour may serve this connection as far as time alone decides; infinite when something else must happen first. */
function usableAt(state: State, connection: Connection, detour: Detour, now: number): number {
  const never = Number.POSITIVE_INFINITY;
  if (!state.rules.kinds.includes('nat')) return never;
  if (detour.state !== 'up' && detour.state !== 'suspended') return never;
  if (detour.local === null || detour.local.family !== connection.remote.address.family) return never;
  // The server is the detour: it would relay to itself, which routers refuse.
  if (sameAddress(detour.address, connection.remote.address)) return never;
  const path = connection.paths.find((one) => one.kind === 'nat' && one.detour === detour.key);
  if (path && isLive(path)) return never;
  if (isReserve(state, detour, now)) return never;
  let at = Math.max(path?.retryAt ?? 0, detour.suspendedUntil);
  const lease = state.leases.get(leaseKey(detour.key, connection.server));
  if (lease?.state === 'refused') at = Math.max(at, lease.retryAt);
  if (lease?.state !== 'granted') at = Math.max(at, detour.pausedUntil);
  return at;
}

/** The detour that a path runs through, by a lease or by a tunnel. */
function carrierOf(state: State, { kind, detour }: Path): Detour | undefined {
  if (detour === null || (kind !== 'nat' && kind !== 'vpn')) return undefined;
  const tunnel = state.tunnels.get(detour);
  return tunnel ? entranceOf(state, tunnel.site) : state.detours.get(detour);
}

/** As `usableAt`, for a tunnel. */
function passableAt(state: State, connection: Connection, tunnel: Tunnel, now: number): number {
  const never = Number.POSITIVE_INFINITY;
  const entrance = entranceOf(state, tunnel.site);
  if (!wayThrough(connection, tunnel) || !entrance || isReserve(state, entrance, now)) return never;
  if (sameAddress(entrance.address, connection.remote.address)) return never;
  const path = connection.paths.find((one) => one.kind === 'vpn' && one.detour === tunnel.key);
  if (path && isLive(path)) return never;
  return Math.max(path?.retryAt ?? 0, tunnel.suspendedUntil);
}

/** How many extra subflows it may have: the setting, or what the server took. */
const limitOf = (state: State, connection: Connection): number =>
  connection.full ? Math.min(state.rules.maxPaths, livePaths(connection)) : state.rules.maxPaths;

/** A source's order counts among detours; the setting's before it, when there is one. */
const orderOf = (state: State, kind: PathKind, order: number): number =>
  state.rules.ordered ? state.rules.kinds.indexOf(kind) * ORDERS + order : order;

/** One connection as the chooser sees it, and when more detours may be usable. */
export function survey(state: State, connection: Connection, now: number): { situation: Situation; next: number } {
  const direct = connection.paths[0];
  const present: Present[] = [];
  for (const path of connection.paths) {
    if (!isLive(path)) continue;
    const detour = path.detour ?? pathKey(path);
    const at = path.state === 'active' || path.state === 'backup' ? path.state : 'pending';
    const known = carrierOf(state, path);
    present.push({ detour, name: known ? siteOf(known) : detour, state: at });
  }
  const candidates: Candidate[] = [];
  let next = Number.POSITIVE_INFINITY;
  for (const detour of state.detours.values()) {
    const at = usableAt(state, connection, detour, now);
    if (at > now) next = Math.min(next, at);
    else {
      const { key, address, rttMs, rank } = detour;
      candidates.push({ key, name: siteOf(detour), address, rttMs, order: orderOf(state, 'nat', rank?.order ?? 0) });
    }
  }
  for (const tunnel of state.tunnels.values()) {
    const at = passableAt(state, connection, tunnel, now);
    const entrance = entranceOf(state, tunnel.site);
    if (at > now || !entrance) next = Math.min(next, at);
    else {
      const { key, rttMs } = tunnel;
      const order = orderOf(state, 'vpn', entrance.rank?.order ?? 0);
      candidates.push({ key, name: siteOf(entrance), address: entrance.address, rttMs, order });
    }
  }
  const rttMs = connection.book?.observation.flows.get(DIRECT)?.rttMs ?? 0;
  for (const { key, remote } of sparesOf(state, connection)) {
    const path = connection.paths.find((one) => one.kind === 'spare' && one.detour === key);
    if (path && isLive(path)) continue;
    const at = path?.retryAt ?? 0;
    if (at > now) next = Math.min(next, at);
    else candidates.push({ key, name: key, address: remote.address, rttMs, order: orderOf(state, 'announced', 0) });
  }
  const alive = connection.establishedAt === null || direct?.state === 'active' || direct?.state === 'backup';
  return {
    situation: {
      prefix: connection.prefix,
      ageMs: connection.establishedAt === null ? 0 : now - connection.establishedAt,
      limit: limitOf(state, connection),
      directAlive: alive && !isSilent(connection.book?.observation.flows.get(DIRECT), now),
      present,
      candidates,
    },
    next,
  };
}

/** For people: every path a connection has or could have, and why it is used or not. Empty for those left alone. */
export function explainPaths(state: State, connection: Connection, now: number): Explanation[] {
  if (connection.unmanaged !== null || connection.establishedAt === null || !connection.book) return [];
  const { situation } = survey(state, connection, now);
  return explain(state.terms, state.experience, connection.book, situation, now);
}

export function carryOut(state: State, connection: Connection, decision: Decision, now: number, out: Command[]): void {
  const { act, why } = decision;
  const key = decision.act === 'replace' ? decision.by : decision.detour;
  const path = connection.paths.find((one) => one.kind !== 'direct' && pathKey(one) === decision.detour && isLive(one));
  const tunnel = state.tunnels.get(key);
  const detour =
    state.detours.get(key) ??
    (tunnel ? wayThrough(connection, tunnel) : sparesOf(state, connection).find((one) => one.key === key));
  switch (decision.act) {
    case 'add':
      if (!detour) return;
      start(state, connection, detour, decision.backup, now, out);
      break;
    case 'replace':
      if (!path || !detour) return;
      retire(connection, path, why, now, out);
      connection.settledAt = now + SETTLE_MS + rttOf(state, path);
      start(state, connection, detour, false, now, out);
      break;
    case 'retire':
      if (!path) return;
      if (isSilent(connection.book?.observation.flows.get(decision.detour), now))
        bury(state, connection, path, why, now, out);
      else retire(connection, path, why, now, out);
      break;
    case 'backup':
    case 'restore': {
      if (!path?.local || !path.remote) return;
      const backup = act === 'backup';
      enter(path, backup ? 'backup' : 'active', now);
      path.reserve = backup;
      out.push({ kind: 'set-backup', token: connection.token, local: path.local, remote: path.remote, backup });
      break;
    }
  }
  out.push({ kind: 'decided', token: connection.token, act, detour: key, why });
}
