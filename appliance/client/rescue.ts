import { type Endpoint, formatEndpoint, sameAddress, sameEndpoint } from '../protocol/address.ts';
import { fail, letGoLease, trimIdle, wantLease } from './joins.ts';
import { MOST_REDIRECTIONS } from './redirect.ts';
import { fill, whyUnmanaged } from './slots.ts';
import {
  type Case,
  type Command,
  type Connection,
  type Detour,
  detourAt,
  inUse,
  isNatural,
  leaseKey,
  newPath,
  type Path,
  RETRY_LONGEST_MS,
  type Rescue,
  type RescueEvent,
  type State,
} from './state.ts';

/**
 * Reaches servers through detours while they do not answer directly (DETOUR_RESCUE), for new connections alone. Pure.
 *
 *   a SYN waits -> ask the server directly; meanwhile get leases, and ask the server through each of them
 *               -> no answer directly, one through a detour: new connections go there
 *               -> it answers directly: they no longer do
 *
 * Only what has answered an MPTCP handshake of ours through a detour is led there: a detour that relays joins alone, or
 * a server that does not speak MPTCP, would turn waiting into failing.
 */

/** A SYN seen to wait for longer makes us ask. It is sent again after 1 s (RFC 6298), and until then all must be settled. */
const SUSPECT_MS = 100;
/** A server that has not answered a question for this long does not answer. With the above, and looks, 500 to 800 ms. */
const DEAD_MS = 350;
/** Answers that take this long count when the next ones are waited for. */
const SLOW_MS = 100;
/** A question is one SYN: it ends before the kernel would send another. */
const DIRECT_WAIT_MS = 950;
const RELAY_WAIT_MS = 950;
/** Questions to a rescued server: this often at first, later at a twentieth of the time it has been away. */
const ASK_FIRST_MS = 1_000;
const ASK_LONGEST_MS = 10_000;
const ASK_SHARE = 20;
/** After an answer a SYN may have been lost by chance; it is repeated after a second. */
const CALM_MS = 1_000;
/** A connection that began this soon after a rescue may have been led elsewhere still; a subflow may be silent for reasons of its own. */
const LATE_MS = 10_000;
/** A SYN that left by a detour and has waited for this long, while no other was answered, gets no answer there either. */
const RELAY_FAILED_MS = 1_500;
/** Detours asked at once about one server. */
const MOST_TRIALS = 3;
/** Detours that have not answered yet may still. */
const DETOURS_WAIT_MS = 10_000;
const PAUSE_FIRST_MS = 10_000;
const PAUSE_LONGEST_MS = 120_000;
/** A rescue that nobody has used for so long ends. */
const UNUSED_MS = 600_000;
/** One that nothing could be done about is forgotten sooner. */
const FORGOTTEN_MS = 30_000;
/** The kernel's elements live for 60 s. */
const REFRESH_MS = 20_000;
/** How often we look whether connections that were led elsewhere are left. */
const LEFT_MS = 1_000;
const MOST_CASES = 256;
/** Servers used lately are asked all at once this often at most, and so many of them. */
const SWEEP_EVERY_MS = 30_000;
const MOST_SWEPT = 32;
/** Names and times kept of servers that are not cases. */
const MOST_REMEMBERED = 1_024;
/** SYNs looked at; more of them waiting at once is a scan. */
const MOST_WAITING = 4_096;
const NFT_PAUSE_MS = 60_000;
/** A server that could not be rescued is asked again only if somebody has wanted to go there this recently. */
const RECENT_MS = 2_000;
/** Connections found at the start have said by then whether they were led elsewhere. */
const FOUND_MS = 5_000;
/** A detour that grants leases again this soon is waited for. */
const SOON_MS = 2_000;
const NO_DETOUR = 'no detour that has an address of its family answers';
const NOT_RELAYED =
  'no detour reaches it for new connections: set DETOUR_RELAY=mptcp on one of them; the server has to speak Multipath TCP';

/** The user of leases that no connection uses; tokens are not negative. */
const USER = -1;

/** Takes an event of the rescue's own. */
export function onRescueEvent(state: State, event: RescueEvent, now: number, out: Command[]): void {
  const { rescue } = state;
  if (!rescue) return;
  switch (event.kind) {
    case 'connecting':
      onConnecting(state, rescue, event.waiting, now);
      break;
    case 'direct-tried':
      onDirectTried(state, rescue, event, now, out);
      break;
    case 'relay-tried': {
      const trials = rescue.cases.get(formatEndpoint(event.server))?.trials;
      if (trials?.get(event.detour) === 'asking') trials.set(event.detour, event.reached ? 'reached' : 'failed');
      break;
    }
    case 'translated':
      onTranslated(state, event.token, event.via, now, out);
      break;
    case 'redirect-failed':
      rescue.pausedUntil = now + NFT_PAUSE_MS;
      for (const one of rescue.cases.values()) {
        if (one.via) end(one, event.why, out);
      }
      // Nobody knows what the kernel has now.
      rescue.published = '?';
      break;
    case 'redirections-found':
      rescue.present = true;
      rescue.publishedAt = now + FOUND_MS - LEFT_MS;
      out.push({ kind: 'redirect', servers: [], stuck: [], keep: true });
      break;
  }
  advance(state, rescue, now, out);
}

/** A live connection's direct path is silent: whether new ones would get through is worth a question. */
export function suspect({ rescue }: State, server: Endpoint, now: number): void {
  if (rescue) open(rescue, server, now, LATE_MS);
}

/** Whether a connection is a question of ours: it goes to a leased port, which no application knows. */
export const isQuestion = ({ rescue }: State, remote: Endpoint): boolean =>
  rescue !== null && rescue.questions.size > 0 && rescue.questions.has(formatEndpoint(remote));

/** A connection begins: it may have been led elsewhere, also by what has just ended. */
export function onBegin({ rescue }: State, connection: Connection, now: number, out: Command[]): void {
  if (!rescue || connection.unmanaged !== null) return;
  remember(rescue.known, connection.server, { server: connection.remote, at: now });
  const one = rescue.cases.get(connection.server);
  if (one) {
    one.wantedAt = now;
    one.metAt = now;
  }
  const calm = rescue.calm.get(connection.server);
  if (one?.via || (calm !== undefined && now - calm < LATE_MS)) askTranslation(connection, out);
}

/** A connection was found that began unseen. */
export function onFound({ rescue }: State, connection: Connection, out: Command[]): void {
  if (rescue?.present) askTranslation(connection, out);
}

const askTranslation = (connection: Connection, out: Command[]): void => {
  const { token, local, remote } = connection;
  connection.unsure = true;
  out.push({ kind: 'ask-translation', token, local, remote });
};

/** This host is elsewhere, or a detour is there that was not: what was found out about servers may hold no longer. */
export function reconsider({ rescue }: State, now: number): void {
  for (const one of rescue?.cases.values() ?? []) {
    one.askAt = Math.min(one.askAt, now);
    one.pausedUntil = Math.min(one.pausedUntil, now);
  }
}

/** `calmMs`: for how long an answer of the server's holds. */
function open(rescue: Rescue, server: Endpoint, now: number, calmMs = CALM_MS): Case | null {
  const key = formatEndpoint(server);
  const known = rescue.cases.get(key);
  if (known) {
    known.wantedAt = now;
    return known;
  }
  if (rescue.cases.size >= MOST_CASES || now - (rescue.calm.get(key) ?? Number.NEGATIVE_INFINITY) < calmMs) return null;
  const one: Case = {
    server,
    since: now,
    silentSince: null,
    asking: false,
    askAt: now,
    trials: new Map(),
    refusal: null,
    via: null,
    metAt: Number.NEGATIVE_INFINITY,
    wantedAt: now,
    pausedUntil: Number.NEGATIVE_INFINITY,
    failures: 0,
  };
  rescue.cases.set(key, one);
  return one;
}

function onConnecting(
  state: State,
  rescue: Rescue,
  waiting: Extract<RescueEvent, { kind: 'connecting' }>['waiting'],
  now: number,
): void {
  const before = new Map(rescue.waiting);
  rescue.waiting.clear();
  for (const { token, local, remote } of waiting) {
    if (rescue.waiting.size >= MOST_WAITING) break;
    const known = before.get(token);
    if (!known && (isQuestion(state, remote) || whyUnmanaged(state.rules, { local, remote }) !== null)) continue;
    const since = known?.since ?? now;
    rescue.waiting.set(token, { local, remote, since });
    const key = formatEndpoint(remote);
    const one = rescue.cases.get(key);
    if (one) one.wantedAt = now;
    else if (now - since >= Math.max(SUSPECT_MS, 1.5 * (rescue.slow.get(key) ?? 0))) open(rescue, remote, now);
    if (!one?.via || since <= one.via.since) continue;
    if (now - Math.max(since, one.metAt) >= RELAY_FAILED_MS) one.trials.set(one.via.detour, 'failed');
  }
}

function onDirectTried(
  state: State,
  rescue: Rescue,
  { server, answered, tookMs }: Extract<RescueEvent, { kind: 'direct-tried' }>,
  now: number,
  out: Command[],
): void {
  const key = formatEndpoint(server);
  const one = rescue.cases.get(key);
  if (!one) return;
  one.asking = false;
  if (!answered) {
    one.askAt = now - tookMs + Math.min(Math.max((now - one.since) / ASK_SHARE, ASK_FIRST_MS), ASK_LONGEST_MS);
    return;
  }
  if (tookMs >= SLOW_MS) remember(rescue.slow, key, tookMs);
  else rescue.slow.delete(key);
  onAnswer(state, key, now, out);
}

/** A server (`formatEndpoint`) has answered directly, be it a question or a join: nobody need be led elsewhere. */
export function onAnswer(state: State, key: string, now: number, out: Command[]): void {
  const { rescue } = state;
  const one = rescue?.cases.get(key);
  if (!rescue || !one) return;
  remember(rescue.calm, key, now);
  close(state, rescue, one, 'it answers directly', now, out);
  for (const connection of state.connections.values()) {
    const direct = connection.paths[0];
    if (direct?.state !== 'failed' || connection.server !== key) continue;
    direct.retryAt = now;
    fill(state, connection, now, out);
  }
}

function remember<T>(map: Map<string, T>, key: string, value: T): void {
  map.delete(key);
  map.set(key, value);
  const [oldest] = map.keys();
  if (map.size > MOST_REMEMBERED && oldest !== undefined) map.delete(oldest);
}

function close(state: State, rescue: Rescue, one: Case, why: string, now: number, out: Command[]): void {
  rescue.cases.delete(formatEndpoint(one.server));
  releaseLeases(state, one, now, out);
  if (one.via) end(one, why, out);
}

function releaseLeases(state: State, { server }: Case, now: number, out: Command[]): void {
  for (const detour of state.detours.keys())
    letGoLease(state, leaseKey(detour, formatEndpoint(server)), USER, now, out);
  trimIdle(state, now, out);
}

/** Does what is due for every case, and tells the kernel when something changed. */
function advance(state: State, rescue: Rescue, now: number, out: Command[]): void {
  let led = 0;
  for (const one of [...rescue.cases.values()]) {
    if (one.via && now - one.wantedAt >= UNUSED_MS && isUsed(state, one)) one.wantedAt = now;
    if (now - one.wantedAt >= (one.via ? UNUSED_MS : FORGOTTEN_MS)) {
      close(state, rescue, one, 'nobody has wanted to go there for ten minutes', now, out);
      continue;
    }
    const resting = one.failures > 0 && one.silentSince === null && now - one.wantedAt >= RECENT_MS;
    if (now < one.pausedUntil || now < rescue.pausedUntil || resting) continue;
    if (!one.asking && one.askAt <= now) {
      one.asking = true;
      one.silentSince ??= now;
      out.push({ kind: 'try-direct', server: one.server, waitMs: DIRECT_WAIT_MS });
    }
    const { way, pending, why } = seek(state, rescue, one, now, out);
    const patience = Math.max(DEAD_MS, 2 * (rescue.slow.get(formatEndpoint(one.server)) ?? 0));
    if (one.silentSince === null || now - one.silentSince < patience) continue;
    if (way && led < MOST_REDIRECTIONS) {
      led++;
      lead(rescue, one, way, now, out);
      continue;
    }
    if (one.via) end(one, why, out);
    if (!way && !pending) giveUp(state, one, why, now, out);
  }
  publish(state, rescue, now, out);
}

const isUsed = (state: State, { server }: Case): boolean =>
  [...state.connections.values()].some(({ remote }) => sameEndpoint(remote, server));

type Way = { readonly detour: string; readonly to: Endpoint };

/** Finds out through which detours the server answers, a few at a time, the nearest first. */
function seek(
  state: State,
  rescue: Rescue,
  one: Case,
  now: number,
  out: Command[],
): { readonly way: Way | null; readonly pending: boolean; readonly why: string } {
  const { server, trials, via } = one;
  const current = via && wayBy(state, one, via.detour, now);
  if (current) return { way: current, pending: false, why: '' };
  const order = ({ rank, rttMs }: Detour): number => (rank?.preference ?? 0) * 1e6 + (rttMs ?? 0);
  const near = [...state.detours.values()]
    .filter((detour) => mayRelay(detour, server) && isNatural(state, detour))
    .sort((a, b) => order(a) - order(b));
  let way: Way | null = null;
  const starting = [...state.detours.values()].some(({ state: at }) => at === 'starting');
  let pending = near.length === 0 && starting && now - one.since < DETOURS_WAIT_MS;
  let asked = 0;
  for (const { key, address, pausedUntil } of near) {
    if (trials.get(key) === 'failed') continue;
    if (++asked > MOST_TRIALS) break;
    if (pausedUntil > now && !state.leases.has(leaseKey(key, formatEndpoint(server)))) {
      if (pausedUntil - now <= SOON_MS) pending = true;
      one.refusal ??= 'it grants none for now';
      continue;
    }
    const lease = wantLease(state, key, server, USER, now, out);
    if (lease.state === 'refused') {
      trials.set(key, 'failed');
      one.refusal = lease.why;
      continue;
    }
    const found = wayBy(state, one, key, now);
    if (found) way ??= found;
    else pending = true;
    if (trials.has(key) || lease.state !== 'granted' || lease.expiresAt <= now) continue;
    trials.set(key, 'asking');
    const to = { address, port: lease.port };
    rescue.questions.add(formatEndpoint(to));
    const [oldest] = rescue.questions;
    if (rescue.questions.size > MOST_REMEMBERED && oldest !== undefined) rescue.questions.delete(oldest);
    out.push({ kind: 'try-relay', server, detour: key, remote: to, waitMs: RELAY_WAIT_MS });
  }
  const why = near.length === 0 ? NO_DETOUR : one.refusal === null ? NOT_RELAYED : `no lease: ${one.refusal}`;
  return { way, pending, why };
}

/** The way through a detour, if the server has answered there and the lease stands. */
function wayBy(state: State, { server, trials }: Case, key: string, now: number): Way | null {
  const detour = state.detours.get(key);
  const lease = state.leases.get(leaseKey(key, formatEndpoint(server)));
  if (trials.get(key) !== 'reached' || !detour || !mayRelay(detour, server)) return null;
  // One that is being asked for again is good for as long as nobody says otherwise.
  if (!lease || lease.state === 'refused' || lease.port === 0 || lease.expiresAt <= now) return null;
  return { detour: key, to: { address: detour.address, port: lease.port } };
}

const mayRelay = ({ state, local, address }: Detour, server: Endpoint): boolean =>
  state === 'up' && local?.family === server.address.family && !sameAddress(address, server.address);

function lead(rescue: Rescue, one: Case, { detour, to }: Way, now: number, out: Command[]): void {
  const { via, server } = one;
  if (via?.detour === detour && sameEndpoint(via.to, to)) return;
  sweep(rescue, now);
  out.push({ kind: 'rescue', what: via ? 'moved' : 'began', server, detour, why: 'it does not answer directly' });
  one.via = { detour, to, since: now };
  one.failures = 0;
}

/** Where one server is out of reach others often are: those used lately are asked before somebody has to wait for them. */
function sweep(rescue: Rescue, now: number): void {
  if (now - rescue.sweptAt < SWEEP_EVERY_MS) return;
  rescue.sweptAt = now;
  const lately = [...rescue.known.values()].filter(({ at }) => now - at < UNUSED_MS);
  for (const { server } of lately.slice(-MOST_SWEPT)) open(rescue, server, now);
}

function end(one: Case, why: string, out: Command[]): void {
  out.push({ kind: 'rescue', what: 'ended', server: one.server, detour: one.via?.detour ?? null, why });
  one.via = null;
}

/** Nothing leads there. It is asked again later, if somebody still wants to go there. */
function giveUp(state: State, one: Case, why: string, now: number, out: Command[]): void {
  if (one.failures === 0) out.push({ kind: 'rescue', what: 'impossible', server: one.server, detour: null, why });
  one.pausedUntil = now + Math.min(PAUSE_FIRST_MS * 2 ** Math.min(one.failures, 10), PAUSE_LONGEST_MS);
  one.failures++;
  one.silentSince = null;
  one.askAt = one.pausedUntil;
  one.trials.clear();
  one.refusal = null;
  releaseLeases(state, one, now, out);
}

function publish(state: State, rescue: Rescue, now: number, out: Command[]): void {
  if (now < rescue.pausedUntil) return;
  const led = [...rescue.cases.values()].flatMap(({ server, via }) => (via ? [{ server, via }] : []));
  const text = led.map(({ server, via }) => `${formatEndpoint(server)} ${formatEndpoint(via.to)}`).join();
  const age = now - rescue.publishedAt;
  const due = led.length > 0 ? age >= REFRESH_MS : rescue.present && age >= LEFT_MS;
  if (text === rescue.published && !due) return;
  const keep = led.length > 0 || needsRedirections(state);
  rescue.publishedAt = now;
  // What keeps the table goes by itself; until then there is nothing to tell.
  if (text === rescue.published && led.length === 0 && keep) return;
  rescue.published = text;
  rescue.present = keep;
  const fresh = new Set(led.filter(({ via }) => via.since === now).map(({ server }) => formatEndpoint(server)));
  out.push({
    kind: 'redirect',
    servers: led.map(({ server, via }) => ({ server, to: via.to })),
    stuck: [...rescue.waiting.values()].filter(({ remote }) => fresh.has(formatEndpoint(remote))),
    keep,
  });
}

/** Whether connections live, or may live, that the kernel has to go on translating. */
export const needsRedirections = (state: State): boolean =>
  [...state.connections.values()].some(({ unsure, paths }) => unsure || paths.some(isLed));

const isLed = (path: Path): boolean => path.led && (inUse(path) || path.state === 'joining');

/** A connection's first subflow goes through a detour: it is that detour's path, and the direct one is still to be made. */
function onTranslated(state: State, token: number, via: Endpoint | null, now: number, out: Command[]): void {
  const connection = state.connections.get(token);
  if (!connection) return;
  connection.unsure = false;
  if (via) divert(state, connection, via, now);
  fill(state, connection, now, out);
}

function divert(state: State, connection: Connection, via: Endpoint, now: number): void {
  const [direct] = connection.paths;
  if (!direct?.local || !sameEndpoint(direct.local, connection.local) || direct.state === 'failed') return;
  const detour = detourAt(state, via.address, connection.local.address)?.key ?? null;
  const { state: at, since } = direct;
  const path = newPath({ kind: 'nat', detour, local: direct.local, remote: connection.remote, state: at, since });
  path.led = true;
  direct.local = null;
  fail(connection, direct, 'the server did not answer directly', now);
  // It is made as soon as the server answers directly; this is for those whose rescuer is gone.
  direct.retryAt = now + RETRY_LONGEST_MS;
  connection.paths.push(path);
}
