import { sameAddress, sameEndpoint } from '../protocol/address.ts';
import { ask, idOf, retire } from './joins.ts';
import { decide, openBook, postpone } from './paths.ts';
import { suspect } from './rescue.ts';
import { nextTry } from './revival.ts';
import { carryOut, survey } from './slots.ts';
import {
  type Command,
  type Connection,
  type DumpedConnection,
  draw,
  inUse,
  isSilent,
  LIMIT_WINDOW_MS,
  type Path,
  pathIs,
  pathKey,
  REST_MS,
  rttOf,
  type State,
} from './state.ts';
import { blackHoled, DIRECT, type Flow, fold, type Reading } from './worth.ts';

/** Finds the paths through which nothing gets, in what the kernel counted, and makes them again. Pure. */

/** Below this (ten segments a second) a connection that receives carries too little to wonder why a path is silent. */
const LEAST_RATE = 10 * 1448;

/** A server hears of a place that was given up within a round trip; where it cannot be told at once, within a few seconds. */
const ROOM_MS = 5_000;

/** A server may prefer other paths to the direct one for a while. */
const DIRECT_SILENT_MS = 2_000;

/** The server takes no more, and the direct path goes first: gives up the weakest of the others. */
export function makeRoom(state: State, connection: Connection, direct: Path, now: number, out: Command[]): void {
  // A place that is given up is free when the server has heard of it; to give up another meanwhile could cost all of them.
  if (now < connection.roomAt) {
    direct.retryAt = Math.min(direct.retryAt, now + LIMIT_WINDOW_MS);
    return;
  }
  const rate = (path: Path): number => connection.book?.observation.flows.get(pathKey(path))?.smooth ?? 0;
  const [weakest] = connection.paths
    .filter((path) => path.kind !== 'direct' && inUse(path))
    .sort((a, b) => rate(a) - rate(b));
  if (!weakest) return;
  const why = 'the server takes no more paths, and the direct one goes first';
  retire(connection, weakest, why, now, out);
  connection.full = true;
  connection.roomAt = now + ROOM_MS;
  direct.retryAt = now + LIMIT_WINDOW_MS + rttOf(state, weakest);
  out.push({ kind: 'decided', token: connection.token, act: 'retire', detour: weakest.detour, why });
}

/**
 * Folds what the kernel counted into what is known, and acts on it.
 * @returns whether it rests: nothing moved and nothing is to be done, which is so of most of many connections most of the time
 */
export function sample(
  state: State,
  connection: Connection,
  dumped: DumpedConnection,
  now: number,
  out: Command[],
): boolean {
  const readings: Reading[] = [];
  const unsure = new Set<string>();
  for (const path of connection.paths) {
    if (path.state !== 'active' && path.state !== 'backup') continue;
    const subflow = dumped.subflows.find((one) => pathIs(path, one));
    if (!subflow?.established) continue;
    const key = pathKey(path);
    // A receiver that takes nothing lets the kernel's back-off grow, but neither these nor what is in flight.
    readings.push({ ...subflow, path: key, backoff: subflow.timeouts });
    if (subflow.timeouts === 0 && subflow.unacked === 0) unsure.add(key);
  }
  connection.unanswered = dumped.subflows.filter(
    ({ joined, established, local, remote }) =>
      joined && !established && sameEndpoint(remote, connection.remote) && sameAddress(local.address, connection.home),
  );
  // With one path and nothing to add there is nothing to choose.
  if (readings.length === 0 || (readings.length < 2 && state.detours.size === 0)) return false;
  connection.book ??= openBook(now, readings.length > 1);
  const { book } = connection;
  const { observation } = book;
  const before = observation.bytes;
  fold(observation, readings, now);
  const waiting = connection.paths.some(({ state: at }) => at === 'requested');
  if (waiting) postpone(book, now);
  const lively =
    observation.bytes > before ||
    readings.some(({ unacked, backoff }) => unacked > 0 || backoff > 0) ||
    (book.trial !== null && !waiting) ||
    connection.revival !== null ||
    connection.paths.some(({ suspectAt }) => suspectAt !== null);
  if (lively) state.livelyAt = now;
  else if (book.idle && now < connection.restUntil) return true;
  connection.restUntil = lively ? now : now + REST_MS;
  const silent = weigh(state, connection, unsure, now, out);
  if (isSilent(observation.flows.get(DIRECT), now)) suspect(state, connection.remote, now);
  // All of them at once is this host's trouble, and destroying them would leave nothing.
  if (silent >= readings.length) return false;
  revive(state, connection, now, out);
  const { situation } = survey(state, connection, now);
  for (const decision of decide(state.terms, state.experience, book, situation, now, () => draw(state)))
    carryOut(state, connection, decision, now, out);
  return false;
}

/**
 * A path that carried and has fallen silent may be a black hole, or one that the server does not choose; only the sender
 * of unacknowledged data knows. So its detour is asked, and the direct path gets the benefit of the doubt for longer.
 * @returns how many are silent beyond doubt
 */
function weigh(state: State, connection: Connection, unsure: ReadonlySet<string>, now: number, out: Command[]): number {
  const observation = connection.book?.observation;
  if (!observation) return 0;
  const carrying = observation.raw > LEAST_RATE && observation.tilt < 0;
  let silent = 0;
  for (const path of connection.paths) {
    const flow = observation.flows.get(pathKey(path));
    if (!flow || flow.silentSince === null || (unsure.has(flow.path) && !carrying)) {
      path.suspectAt = null;
      if (flow) flow.silentSince = null;
    } else if (unsure.has(flow.path) && !isCondemned(state, path, flow, now)) {
      if (path.suspectAt === null && (!isAsked(path) || blackHoled(flow, now))) {
        path.suspectAt = now;
        if (isAsked(path)) ask(state, connection, path, out);
      }
      if (path.suspectAt !== null) flow.silentSince = null;
    } else {
      if (path.suspectAt !== null) flow.silentSince = path.suspectAt;
      if (blackHoled(flow, now)) silent++;
    }
  }
  return silent;
}

/** Whether a suspicion has become a certainty. A late answer of its detour is one, too: see `onLeaseGranted`. */
function isCondemned(state: State, path: Path, flow: Flow, now: number): boolean {
  if (path.suspectAt === null) return false;
  if (!isAsked(path)) return now - path.suspectAt >= Math.max(DIRECT_SILENT_MS, 10 * flow.rttMs);
  if (path.detour === null) return true;
  const tunnel = state.tunnels.get(path.detour);
  return path.kind === 'vpn' ? tunnel?.state !== 'up' : state.detours.get(path.detour)?.state === 'down';
}

/** Whether there is somebody who can be asked what became of a path. */
const isAsked = ({ kind }: Path): boolean => kind === 'nat' || kind === 'vpn';

/**
 * While the direct path is silent and others carry, tries a fresh one now and then: one that is answered proves that the
 * way is back, and takes its place.
 */
function revive(state: State, connection: Connection, now: number, out: Command[]): void {
  const next = nextTry(state, connection, now);
  if (next === 'none') return;
  const { token, remote, home: local } = connection;
  if (next === 'instead') {
    for (const one of connection.unanswered)
      out.push({ kind: 'destroy-subflow', token, local: one.local, remote: one.remote });
  }
  const localId = idOf(connection, local);
  if (localId === null) return;
  out.push({ kind: 'create-subflow', token, localId, local, remote, backup: false, establishedAt: null });
  out.push({ kind: 'decided', token, act: 'repair', detour: null, why: 'no answer on the direct path' });
}
