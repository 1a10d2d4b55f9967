import { type Connection, isSilent, RETRY_LONGEST_MS, type State } from './state.ts';
import { DIRECT } from './worth.ts';

/**
 * When to try a silent direct path anew, on a fresh subflow, because the old one would sit out a retransmission timeout of many
 * seconds when the way is back. Pure.
 *
 * Every destroyed subflow, also one that was never answered, makes the kernel send all unacknowledged data of the
 * connection again (docs/kernel-notes.md). So a try is left alone: its SYN leaves once a second for five seconds
 * (net.ipv4.tcp_syn_linear_timeouts, Linux 6.5), and two tries half a second apart ask twice a second.
 */

/** A pair of tries lasts for as long as the kernel repeats their SYNs every second. */
const PAIR_MS = 5_000;
const APART_MS = 500;
/** For so long it is asked twice a second, then less and less often. */
const BRISK_MS = 60_000;
const BRISK_TRIES = (2 * BRISK_MS) / PAIR_MS;
/** Connections that another one's success calls go one after the other: the kernel takes their SYNs in one burst each. */
const CALL_EVERY_MS = 10;

/**
 * Whether the direct path of the connection is to be tried now: because it is silent and its next try is due, `another` one
 * beside those that wait for an answer, or `instead` of them. Of the connections to one server one tries for all; the
 * others follow when it was answered.
 */
export function nextTry(state: State, connection: Connection, now: number): 'none' | 'another' | 'instead' {
  const direct = connection.paths[0];
  if (direct?.state !== 'active' || !isSilent(connection.book?.observation.flows.get(DIRECT), now)) {
    rest(state, connection);
    return 'none';
  }
  connection.revival ??= { tries: 0, at: now, called: false };
  const { revival } = connection;
  if (revival.at > now) return 'none';
  const scout = state.scouts.get(connection.server);
  const other = scout === undefined || scout === connection.token ? undefined : state.connections.get(scout);
  if (other?.revival && !revival.called) return 'none';
  if (!other?.revival) state.scouts.set(connection.server, connection.token);
  revival.tries++;
  revival.at = now + pauseAfter(revival.tries);
  return revival.tries > BRISK_TRIES ? 'instead' : 'another';
}

function pauseAfter(tries: number): number {
  if (tries < BRISK_TRIES) return tries % 2 === 1 ? APART_MS : PAIR_MS - APART_MS;
  return Math.min(PAIR_MS * 2 ** Math.min(tries - BRISK_TRIES + 1, 10), RETRY_LONGEST_MS);
}

/** A try was answered, so the way is back: other connections are called. The others of its own are the caller's to end. */
export function revived(state: State, connection: Connection, now: number): void {
  connection.revival = null;
  if (state.scouts.get(connection.server) !== connection.token) return;
  state.scouts.delete(connection.server);
  let at = now;
  for (const other of state.connections.values()) {
    if (!other.revival || other.server !== connection.server) continue;
    other.revival = { tries: 0, at, called: true };
    at += CALL_EVERY_MS;
  }
}

/** The direct path needs no trying any more, or the connection is gone: another one may try for the others. */
export function rest(state: State, connection: Connection): void {
  connection.revival = null;
  if (state.scouts.get(connection.server) === connection.token) state.scouts.delete(connection.server);
}
