import type { Address } from '../protocol/address.ts';
import {
  applicationLimited,
  type Belief,
  beliefs,
  blackHoled,
  DIRECT,
  type Experience,
  type Flow,
  fold,
  minimumAge,
  type Observation,
  observe,
  remember,
  rememberAdditive,
  rememberDirect,
  rememberFailure,
  rememberTrial,
  takeTrial,
  trialLeft,
} from './worth.ts';

/**
 * Which paths a connection should have. One decision at a time, each an experiment with a beginning and a verdict: what
 * the whole connection carried before, and what it carries now. docs/path-selection.md argues the choice, with figures.
 */

/** What the choice looks at. Everything else about a detour is somebody else's concern. */
export type Candidate = {
  readonly key: string;
  /** Several addresses of one detour share its name; one connection uses one of them. */
  readonly name: string;
  readonly address: Address;
  /** Smoothed round trip of control messages, ms; null before the first answer. */
  readonly rttMs: number | null;
  /** Free places go to those of a lower order first, whatever is known of them (RFC 2782, weight). */
  readonly order?: number;
};

export type Mode = 'aggregate' | 'backup' | 'failover';

/** How candidates are ranked: a sample, a bound or just the mean of what is believed; `draw` gives numbers in [0, 1). */
export type Score = (belief: Belief, draw: () => number) => number;

/** What holds for all connections. */
export type Terms = {
  readonly mode: Mode;
  /** Connections younger than this, counted from ESTABLISHED, are left alone; null: as long as their destination's mostly live. */
  readonly minAgeMs: number | null;
  readonly score: Score;
};

/** A detour's subflow of this connection. `pending` is asked for but not established; `backup` says how it is flagged. */
export type Present = {
  readonly detour: string;
  readonly name: string;
  readonly state: 'pending' | 'active' | 'backup';
};

/** One connection now, as the manager sees it. */
export type Situation = {
  /** `prefixOf` its server. */
  readonly prefix: string;
  /** Since ESTABLISHED. */
  readonly ageMs: number;
  /** How many extra subflows it may have: the setting, or less once the server refused one. */
  readonly limit: number;
  /** The direct path is established and not taken for a black hole. */
  readonly directAlive: boolean;
  readonly present: readonly Present[];
  /** Usable for this connection now and not present: up, of its family, not backing off. */
  readonly candidates: readonly Candidate[];
};

/** What to do, with the reason for people (`detour explain`). `replace` is retire and add in one, so that the slot is free. */
export type Decision =
  | { readonly act: 'add'; readonly detour: string; readonly backup: boolean; readonly why: string }
  | { readonly act: 'replace'; readonly detour: string; readonly by: string; readonly why: string }
  | { readonly act: 'retire'; readonly detour: string; readonly why: string }
  | { readonly act: 'backup'; readonly detour: string; readonly why: string }
  | { readonly act: 'restore'; readonly detour: string; readonly why: string };

/** What one connection has to remember between decisions; made by `openBook`, changed by `decide` alone. */
export type Book = {
  /** Given to `fold` with every sample. */
  readonly observation: Observation;
  /** The application, not the network, sets the pace; and since when. */
  idle: boolean;
  idleSince: number;
  trial: Trial | null;
  /** Share of its own rate that each path adds, as far as this connection found out, and when it did. */
  additive: ReadonlyMap<string, { readonly share: number; readonly at: number }>;
  /** What it carries as a rule; falling well below it is a reason to look. */
  level: number;
  parked: ReadonlyMap<string, Parked>;
  /** What was carried up to two moments, the last a second or two ago, and by which paths; from here harm is judged. */
  marks: readonly Mark[];
  markedFor: string;
  /** A path held up the rest: free places are not filled before this, and the next time for longer. */
  fillAt: number;
  fillPauseMs: number;
  /** Goodput that may be spent on experiments, in ms of all that the connection carries. */
  budget: number;
  /** Joins that may be tried. */
  attempts: number;
  paidAt: number;
  /** Not before: the next draw, the next look at whether a path helps, the next note into the experience. */
  drawAt: number;
  probeAt: number;
  noteAt: number;
  probeEveryMs: number;
  /** Why each path or candidate is as it is. */
  readonly why: Map<string, string>;
};

type Trial = {
  readonly kind: 'add' | 'replace' | 'park' | 'restore';
  readonly detours: readonly string[];
  /** Of `replace`: who had the place, and what that was worth. */
  readonly displaced: string | null;
  readonly displacedWorth: number;
  readonly before: number;
  /** What the paths on trial carried themselves before. */
  readonly ownBefore: number;
  readonly reliable: boolean;
  /** What every path carried that is not on trial. */
  readonly others: ReadonlyMap<string, number>;
  readonly since: number;
  /** Totals at the ends of the intervals measured so far; empty until the paths are in use. */
  readonly cuts: { readonly at: number; readonly bytes: number; readonly own: number }[];
};

/** Counters of an observation at one moment. */
type Mark = { readonly at: number; readonly bytes: number; readonly direct: number; readonly stoodMs: number };

/** A path we made backup: it costs nothing there and may be wanted again. */
type Parked = {
  readonly total: number;
  againAt: number;
  everyMs: number;
  readonly reason: 'gain' | 'latency' | 'harm';
};

/** Of all goodput, this share may be spent on trials; saved up for at most `MOST_BUDGET_MS`. */
const SPEND = 0.05;
/** Where detours win nothing, only this part of it: looking for them must not cost what they do not bring. */
const LEAST_SPEND = 0.2;
const MOST_BUDGET_MS = 10_000;
const FIRST_BUDGET_MS = 10_000;
/** What a trial takes, about: join, slow start and measurement. */
const TRIAL_MS = 3_500;
/** Joins per connection: so many at once, and one more every so often. */
const MOST_ATTEMPTS = 8;
const ATTEMPT_EVERY_MS = 12_000;
/** Between two looks at the candidates. A new draw at every sample would find an improbable one soon. */
const DRAW_EVERY_MS = 3_000;
/** A path is asked to prove itself this often at first, then twice as seldom each time it did. */
const PROBE_FIRST_MS = 60_000;
const PROBE_LONGEST_MS = 600_000;
const PARK_FIRST_MS = 30_000;
const PARK_LONGEST_MS = 600_000;
const NOTE_EVERY_MS = 5_000;
/** Joins that did not come about by then will not: the manager gives them up after 5 s. */
const PENDING_MS = 7_000;
/** An interval of a trial: this long, or this many round trips. */
const CUT_MS = 1_000;
const CUT_ROUND_TRIPS = 8;
const LONGEST_CUT_MS = 3_000;
/** Harm is judged over this long at least, or this many round trips of the direct path; and marks are this far apart. */
const HARM_MS = 400;
const HARM_ROUND_TRIPS = 6;
const MARK_MS = 1_000;
/** The direct path must have worked for this long for its rate while it worked to mean something. */
const WORKED_MS = 50;
/** A connection that carries less than this share of what its direct path would carry alone is held up. */
const HELD_UP = 0.8;
/** A path that carries more than this share of it is waited for, so many times as long. */
const PROMISING = 0.3;
const PATIENCE = 4;
/** A receiver cannot tell what holds it up: a new path that carries less than this share of the direct one is suspected. */
const SMALL = 0.15;
const SMALL_MS = 700;
const MOST_CUTS = 6;
/** A trial that costs this much is ended before its time. */
const BRAKE_MS = 1_000;
/** What one attempt that did harm counts for: it is not repeated for a minute. */
const HARM = 6;
/** As long as it is this likely that a detour still does harm, other connections take it in reserve only. */
const HARM_HOLDS = 0.5;
/** A path that was given its place back, or the direct one that was dead, needs this long to show again what it carries. */
const SETTLE_MS = 5_000;
/** A candidate that carries less than this share of what it replaced, after slow start, is not waited for. */
const HOPELESS = 0.5;
/** Still growing by more than this between two intervals: slow start is not over. */
const GROWTH = 1.12;
/** Differences below this share of the total are noise. */
const MARGIN = 0.03;
/** A candidate has to promise this much more than what it would replace. */
const PROMISE = 1.1;
/** How far off a measured change of the total is, as a share of the total; and how much of its own rate a path adds. */
const BLUR = 0.05;
const EXPECTED_SHARE = 0.85;
const SHARE_DEVIATION = 0.4;
/** No candidate is tried for less than this share of the total. */
const GAIN = 0.05;
/** Detours that add less than this share of their own rate share its bottleneck with another path. */
const SHARING = 0.7;
/** Reading a direct path's rate takes this long after the connection began, or after paths changed. */
const STEADY_MS = 3_000;
/** When nothing speaks against the first paths, they are asked what they add after this. */
const UNHURRIED_MS = 8_000;
/** Paths whose delays differ by less than this factor, or by less than a queue, are about as long as each other. */
const EVEN = 2.5;
const EVEN_MS = 60;
/** As wide as the direct path: at its best it carries this share of it. */
const WIDE = 0.5;
/** An application that pauses for less is not yet one that sets the pace. */
const IDLE_MS = 5_000;
/** Of an idle connection: this much slower than the direct path is slower. */
const SLOWER = 1.25;
const SLOWER_MS = 5;
/** In place of a time: measured together with others, which says little about each. */
const AMBIGUOUS = 1;
/** Well below what it carries as a rule; and how much of that is kept per sample. */
const FALL = 0.6;
const LEVEL_KEPT = 0.995;
/** In `failover`, detours stay this long after the direct path is back. */
const FAILOVER_MS = 10_000;

/** Few connections have entries, so these maps are replaced and not changed, and all the others share one that is empty. */
const NONE: ReadonlyMap<string, never> = new Map<string, never>();

const withEntry = <V>(map: ReadonlyMap<string, V>, key: string, value: V): ReadonlyMap<string, V> =>
  new Map(map).set(key, value);

const withoutEntry = <V>(map: ReadonlyMap<string, V>, key: string): ReadonlyMap<string, V> =>
  map.has(key) ? new Map([...map].filter(([other]) => other !== key)) : map;

/** @param adopted whether there are paths already, of which nothing is known */
export function openBook(now: number, adopted = false): Book {
  return {
    observation: observe(),
    idle: false,
    idleSince: now,
    trial: null,
    additive: NONE,
    level: 0,
    parked: NONE,
    marks: [],
    markedFor: '',
    fillAt: now,
    fillPauseMs: STEADY_MS,
    budget: FIRST_BUDGET_MS,
    attempts: MOST_ATTEMPTS,
    paidAt: now,
    drawAt: now,
    probeAt: adopted ? now + STEADY_MS : Number.POSITIVE_INFINITY,
    noteAt: now + NOTE_EVERY_MS,
    probeEveryMs: PROBE_FIRST_MS,
    why: new Map(),
  };
}

/**
 * The book of a connection whose paths now run from another place: what it carried there is no measure for here, but what it tried
 * and put aside still counts.
 */
export function reopenBook({ parked, budget, attempts, paidAt, why }: Book, now: number): Book {
  return { ...openBook(now), parked, budget, attempts, paidAt, why };
}

/**
 * Thompson sampling: each candidate is ranked by one draw from what is believed of it, so it is tried as often as it
 * is likely to be the best.
 */
export const thompson: Score = ({ measured, noise, holds, usual, spread }, draw) =>
  draw() < holds ? measured + noise * normal(draw) : usual * Math.exp(spread * normal(draw));

/** Box and Muller's transform of two uniform draws. */
function normal(draw: () => number): number {
  return Math.sqrt(-2 * Math.log(1 - draw())) * Math.cos(2 * Math.PI * draw());
}

/**
 * What to do about one connection now. Called after every sample, and whenever a slot or a candidate came or went; it
 * reads `situation` anew each time, so a decision that could not be carried out is simply taken again.
 */
export function decide(
  terms: Terms,
  experience: Experience,
  book: Book,
  situation: Situation,
  now: number,
  draw: () => number,
): Decision[] {
  const turn: Turn = { terms, experience, book, situation, now, draw, out: [] };
  pay(turn);
  if (tooYoung(turn)) return [];
  if (terms.mode === 'failover' && !failing(turn)) return turn.out;
  pace(turn);
  if (bury(turn)) {
    const gone = new Set(turn.out.map(({ detour }) => detour));
    turn.situation = { ...situation, present: situation.present.filter(({ detour }) => !gone.has(detour)) };
  }
  mark(turn);
  if (relieve(turn)) return turn.out;
  if (book.trial) judge(turn, book.trial);
  if (book.trial) return turn.out;
  note(turn);
  if (terms.mode === 'aggregate' && turn.out.length === 0) {
    if (book.idle) easeIdle(turn);
    else {
      unpark(turn);
      if (!book.trial) probe(turn);
    }
  }
  if (!book.trial && turn.out.length === 0) fill(turn);
  if (!book.trial && turn.out.length === 0 && terms.mode !== 'failover') improve(turn);
  return turn.out;
}

/**
 * Uses free places alone, at once and without a sample: when a connection begins, and when a place or a candidate came.
 * A trial that is under way is given up, because what it is compared with changes.
 */
export function place(
  terms: Terms,
  experience: Experience,
  book: Book,
  situation: Situation,
  now: number,
  draw: () => number,
): Decision[] {
  const turn: Turn = { terms, experience, book, situation, now, draw, out: [] };
  if (tooYoung(turn) || (terms.mode === 'failover' && situation.directAlive)) return [];
  pay(turn);
  fill(turn);
  return turn.out;
}

/** What was prepared waits for a lease, for its turn or for ESTABLISHED: a trial that could not begin has not failed. */
export function postpone(book: Book, now: number): void {
  if (book.trial && book.trial.cuts.length === 0) book.trial = { ...book.trial, since: now };
}

/** The connection was established just now: whatever its subflows carried when they are first read, they carried since. */
export function begun(book: Book, now: number): void {
  fold(book.observation, [], now);
  postpone(book, now);
}

type Turn = {
  readonly terms: Terms;
  readonly experience: Experience;
  readonly book: Book;
  /** Without what this turn let go of already. */
  situation: Situation;
  readonly now: number;
  readonly draw: () => number;
  readonly out: Decision[];
};

const tooYoung = ({ terms, experience, situation }: Turn): boolean =>
  situation.ageMs < (terms.minAgeMs ?? minimumAge(experience, situation.prefix));

function pay(turn: Turn): void {
  const { book, now } = turn;
  const ms = now - book.paidAt;
  book.paidAt = now;
  const { smooth } = book.observation;
  const won = smooth > 0 ? 1 - rateOf(turn, DIRECT) / smooth : 0;
  book.budget = Math.min(MOST_BUDGET_MS, book.budget + ms * SPEND * Math.min(1, Math.max(LEAST_SPEND, 2 * won)));
  book.attempts = Math.min(MOST_ATTEMPTS, book.attempts + ms / ATTEMPT_EVERY_MS);
}

function pace({ book, now }: Turn): void {
  const idle = book.observation.readings > 1 && applicationLimited(book.observation, book.idle);
  if (idle !== book.idle) book.idleSince = now;
  book.idle = idle;
}

/** In `failover` mode: whether there is something to do; detours that are not needed any more are let go. */
function failing({ situation, book, now, out }: Turn): boolean {
  if (!situation.directAlive) {
    book.idleSince = now;
    return true;
  }
  if (now - book.idleSince >= FAILOVER_MS) {
    for (const { detour, state } of situation.present) {
      if (state !== 'pending') out.push({ act: 'retire', detour, why: 'the direct path works again' });
    }
  }
  return false;
}

const rateOf = ({ book }: Turn, path: string): number => book.observation.flows.get(path)?.smooth ?? 0;

/** What the connection would miss without this path, bytes/s, as far as is known. */
function worthOf(turn: Turn, { detour, state }: Present): number {
  if (state === 'backup') return 0;
  const flow = turn.book.observation.flows.get(detour);
  if (!flow || blackHoled(flow, turn.now)) return 0;
  // A path that has just collapsed is worth what it carries now, one that peaks what it carries as a rule.
  return Math.min(flow.raw * 1.5, flow.smooth) * additiveOf(turn, detour);
}

function additiveOf({ book, experience, situation, now }: Turn, detour: string): number {
  const own = book.additive.get(detour);
  if (own) return own.share;
  const [belief] = beliefs(experience, situation.prefix, [detour], 0, now);
  return belief?.additive ?? 1;
}

const activeOf = ({ situation }: Turn): Present[] => situation.present.filter(({ state }) => state === 'active');

/** Writes down what present paths are worth: what they carry comes for free, with every sample. */
function note(turn: Turn): void {
  const { book, experience, situation, now } = turn;
  if (now < book.noteAt || book.idle) return;
  book.noteAt = now + NOTE_EVERY_MS;
  const active = activeOf(turn);
  for (const path of active) {
    const flow = book.observation.flows.get(path.detour);
    if (!flow) continue;
    remember(experience, situation.prefix, path.detour, { worth: worthOf(turn, path), rttMs: flow.rttMs }, now);
  }
  if (active.length === 0) rememberDirect(experience, situation.prefix, rateOf(turn, DIRECT));
}

function begin(
  turn: Turn,
  kind: Trial['kind'],
  detours: readonly string[],
  displaced: string | null = null,
  displacedWorth = 0,
): void {
  const { book, experience, situation, now } = turn;
  const { raw, smooth } = book.observation;
  book.trial = {
    kind,
    detours,
    displaced,
    displacedWorth,
    // After a fall the smooth rate is still what it was.
    before: raw < smooth * SHARING ? raw : smooth,
    ownBefore: detours.reduce((sum, detour) => sum + rateOf(turn, detour), 0),
    others:
      book.observation.readings < 2
        ? NONE
        : new Map(
            [...book.observation.flows.values()]
              .filter(({ path, backup }) => !backup && path !== displaced && !detours.includes(path))
              .map(({ path, smooth: rate }) => [path, rate]),
          ),
    reliable: !book.idle && situation.ageMs >= STEADY_MS && Math.abs(raw - smooth) < 0.3 * smooth,
    since: now,
    cuts: [],
  };
  if (kind === 'add' || kind === 'replace') {
    book.attempts -= detours.length;
    for (const detour of detours) rememberTrial(experience, situation.prefix, detour, now + 2 * PENDING_MS);
  }
}

function end(turn: Turn): void {
  const { book, experience, situation, now } = turn;
  for (const detour of book.trial?.detours ?? []) rememberTrial(experience, situation.prefix, detour, 0);
  book.trial = null;
  book.drawAt = Math.max(book.drawAt, now + DRAW_EVERY_MS);
}

/**
 * Lets go of paths that swallow what they are given. Destroyed, they can be made again as soon as their detour answers;
 * left alone, they would sit in their retransmission timeout for longer than the outage lasted.
 */
function bury(turn: Turn): boolean {
  const { book, experience, situation, now, out } = turn;
  for (const { detour, state } of situation.present) {
    const flow = book.observation.flows.get(detour);
    if (state === 'pending' || !flow || !blackHoled(flow, now)) continue;
    const why = `no answer for ${Math.round(now - (flow.silentSince ?? now))} ms`;
    book.why.set(detour, why);
    rememberFailure(experience, situation.prefix, detour, now);
    out.push({ act: 'retire', detour, why });
  }
  return out.length > 0;
}

/** Notes what was carried so far, anew whenever other paths are in use. */
function mark(turn: Turn): void {
  const { book, situation, now } = turn;
  const { bytes, stoodMs, flows } = book.observation;
  const inUse = activeOf(turn)
    .map(({ detour }) => detour)
    .join();
  // Without paths there is nothing to judge.
  if (inUse === '') {
    if (book.markedFor !== '') book.marks = [];
    book.markedFor = '';
    return;
  }
  const beginning: Mark = { at: now - situation.ageMs, bytes: 0, direct: 0, stoodMs: 0 };
  const fresh = book.markedFor === '' && situation.ageMs < HARM_MS;
  const last = book.marks.at(-1);
  if (fresh && book.observation.readings === 2) {
    book.marks = [beginning];
    book.markedFor = inUse;
    return;
  }
  if (last && book.markedFor === inUse && now - last.at < MARK_MS) return;
  const next: Mark = { at: now, bytes, direct: flows.get(DIRECT)?.bytes ?? 0, stoodMs };
  book.marks = last && book.markedFor === inUse ? [last, next] : [next];
  book.markedFor = inUse;
}

/**
 * Ends harm without waiting for a trial. A slow path holds up all others when what it was given fills the receiver's
 * window; then the direct path has nothing in flight for a part of the time, and what it carried in the rest tells what it
 * would carry alone. That needs no time without the path, so it also works when there was none.
 * The path is destroyed, because what it was given then goes to the others at once; as backup it would keep it.
 */
function relieve(turn: Turn): boolean {
  const { terms, book, situation, now } = turn;
  const direct = book.observation.flows.get(DIRECT);
  const [first] = book.marks;
  const active = activeOf(turn);
  if (terms.mode !== 'aggregate' || !situation.directAlive || !direct || !first || active.length === 0) return false;
  // Just parked, a path still drains.
  if (book.trial?.kind === 'park') return false;
  const ms = now - first.at;
  const worked = ms - (book.observation.stoodMs - first.stoodMs);
  const total = ((book.observation.bytes - first.bytes) * 1000) / ms;
  const rtt = direct.leastRttMs;
  const least = Math.max(WORKED_MS, 2 * rtt);
  // When it stood still all the time, what it carried before tells as much.
  const before = situation.ageMs - book.observation.stoodMs;
  const alone = worked >= least ? ((direct.bytes - first.direct) * 1000) / worked : (direct.bytes * 1000) / before;
  const told = ms >= Math.max(HARM_MS, HARM_ROUND_TRIPS * rtt) && Math.max(worked, before) >= least;
  if (told && total < alone * HELD_UP) {
    const delay = ({ detour }: Present): number => book.observation.flows.get(detour)?.rttMs ?? 0;
    const { detour } = active.reduce((a, b) => (delay(b) > delay(a) ? b : a));
    // The receiver's window grows with what is delivered: one that will carry much is given time for that.
    if (rateOf(turn, detour) > alone * PROMISING && ms < PATIENCE * HARM_MS) return false;
    const why = `it holds up the rest: ${mbps(total)} with it, and the direct path alone carries ${mbps(alone)}`;
    dismiss(turn, detour, why, total - alone);
    book.budget -= (1 - total / alone) * ms;
    return true;
  }
  const small = active.find(({ detour }) => isSmall(turn, detour, direct));
  if (!small) return false;
  dismiss(turn, small.detour, 'it carries next to nothing, and may hold up the rest', 0);
  return true;
}

/**
 * What a receiver has to go by: it cannot see what its peer would like to send. Among the first paths of a connection, with
 * nothing to compare with, one that at its best carries next to nothing beside the direct path at its best has little to give
 * and much to spoil. Of means nothing could be told: a path that holds up the rest makes them as small as its own.
 */
function isSmall({ book, now }: Turn, detour: string, direct: Flow): boolean {
  const { observation, trial } = book;
  const flow = observation.flows.get(detour);
  if (trial?.kind !== 'add' || trial.reliable || observation.tilt >= 0 || !flow) return false;
  const long = now - flow.since >= Math.max(SMALL_MS, CUT_ROUND_TRIPS * flow.leastRttMs);
  return long && flow.peak < direct.peak * SMALL;
}

/** Lets go of a path that does harm; it may come back in reserve, and others may try after a while. */
function dismiss(turn: Turn, detour: string, why: string, worth: number): void {
  const { book, situation, experience, now, out } = turn;
  if (book.trial) end(turn);
  const rttMs = book.observation.flows.get(detour)?.rttMs ?? 0;
  remember(experience, situation.prefix, detour, { worth, rttMs }, now);
  rememberAdditive(experience, situation.prefix, detour, -1);
  shelve(turn, detour, why, 0, 'harm');
  book.fillAt = now + book.fillPauseMs;
  book.fillPauseMs = Math.min(book.fillPauseMs * 2, PARK_FIRST_MS);
  book.level = 0;
  book.marks = [];
  out.push({ act: 'retire', detour, why });
}

/**
 * Whether the connection got slower for a reason of its own: a path that does harm holds up all others alike, because
 * they wait for it in the receive buffer, or one whose bottleneck it shares; but never by more than what it carries itself.
 */
function coincidence(turn: Turn, trial: Trial): boolean {
  if (trial.others.size < 2) return false;
  const own = trial.detours.reduce((sum, detour) => sum + (turn.book.observation.flows.get(detour)?.raw ?? 0), 0);
  let fallen = 0;
  let steady = false;
  for (const [path, before] of trial.others) {
    const rate = turn.book.observation.flows.get(path)?.raw ?? 0;
    if (rate < before * SHARING) fallen += before - rate;
    else steady ||= rate > before * 0.85;
  }
  return steady && fallen > 1.5 * own;
}

/** Follows a trial until two intervals in a row agree. */
function judge(turn: Turn, trial: Trial): void {
  const { book, situation, experience, now, out } = turn;
  const wanted = trial.kind === 'park' ? 'backup' : 'active';
  const states = trial.detours.map((detour) => situation.present.find((one) => one.detour === detour)?.state);
  if (trial.cuts.length === 0) {
    if (states.every((state) => state === wanted || state === undefined) && states.includes(wanted)) cut(turn, trial);
    else if (now - trial.since > PENDING_MS || states.every((state) => state === undefined)) {
      for (const [index, detour] of trial.detours.entries()) {
        if (states[index] !== wanted && now - trial.since > 0)
          rememberFailure(experience, situation.prefix, detour, now);
      }
      const back = situation.candidates.find(({ key }) => key === trial.displaced);
      end(turn);
      if (back && situation.present.length < situation.limit) {
        out.push({ act: 'add', detour: back.key, backup: false, why: 'its replacement did not come about' });
      }
    }
    return;
  }
  const left = trial.detours.filter((_, index) => states[index] === wanted);
  if (left.length < trial.detours.length) {
    for (const [index, detour] of trial.detours.entries()) {
      if (states[index] === undefined) rememberFailure(experience, situation.prefix, detour, now);
    }
    end(turn);
    return;
  }
  const first = trial.cuts[0];
  if (
    trial.kind !== 'park' &&
    first &&
    now - first.at >= BRAKE_MS &&
    book.observation.raw < (trial.before - trial.displacedWorth) * SHARING &&
    !coincidence(turn, trial)
  ) {
    brake(turn, trial);
    return;
  }
  const last = trial.cuts.at(-1);
  const rtt = Math.max(...trial.detours.map((detour) => book.observation.flows.get(detour)?.rttMs ?? 0));
  if (!last || now - last.at < Math.min(LONGEST_CUT_MS, Math.max(CUT_MS, CUT_ROUND_TRIPS * rtt))) return;
  cut(turn, trial);
  const [raw, mean, own] = measured(trial);
  if (book.idle && trial.kind !== 'park') {
    // Without something to carry, no path can show what it carries. Once there is, they are asked.
    end(turn);
    book.probeAt = Math.min(book.probeAt, now + STEADY_MS);
    return;
  }
  if (trial.kind === 'park' && raw.total < trial.before * SHARING) {
    verdictOfPark(turn, trial, raw.total);
    return;
  }
  // Far behind already: it cannot be worth more than it carries.
  const hopeless = trial.kind === 'replace' && own < trial.displacedWorth * HOPELESS;
  if (trial.cuts.length < 3 && !hopeless) return;
  const growing = raw.total > mean.total * (1 + (GROWTH - 1) / 2);
  if (growing && trial.cuts.length < MOST_CUTS) return;
  const total = Math.min(raw.total, mean.total);
  const best = Math.max(raw.total, mean.total);
  switch (trial.kind) {
    case 'park':
      verdictOfPark(turn, trial, best);
      break;
    case 'restore':
      verdictOfRestore(turn, trial, total, own);
      break;
    case 'add':
      verdictOfAdd(turn, trial, total, best, own);
      break;
    case 'replace':
      verdictOfReplace(turn, trial, total, best, own);
      break;
  }
}

/** The connection carries much less than before: undo first, find out why later. */
function brake(turn: Turn, trial: Trial): void {
  const { book, situation, now } = turn;
  const lost = trial.before - trial.displacedWorth - book.observation.raw;
  end(turn);
  const why = `slower by ${mbps(lost)} with it`;
  const back = situation.candidates.find(({ key }) => key === trial.displaced);
  const [candidate] = trial.detours;
  for (const detour of trial.detours) {
    learn(turn, detour, -lost / trial.detours.length, rateOf(turn, detour));
    rememberFailure(turn.experience, situation.prefix, detour, now, HARM);
    book.why.set(detour, why);
  }
  book.level = 0;
  // Whatever it cost is paid, if need be in debt.
  book.budget -= (lost / Math.max(1, trial.before)) * (now - (trial.cuts[0]?.at ?? now));
  if (trial.kind === 'replace' && back && candidate !== undefined) giveBack(turn, trial, back.key, candidate, why);
  else reserve(turn, trial.detours, why, book.observation.raw);
}

/** Makes paths backup for longer each time. */
function reserve(
  turn: Turn,
  detours: readonly string[],
  why: string,
  total: number,
  reason: Parked['reason'] = 'gain',
): void {
  for (const detour of detours) {
    shelve(turn, detour, why, total, reason);
    turn.out.push({ act: 'backup', detour, why });
  }
}

/** Notes that a path is to be left unused, for longer each time. */
function shelve(
  { book, now }: Turn,
  detour: string,
  why: string,
  total: number,
  reason: Parked['reason'] = 'gain',
): void {
  const everyMs = Math.min((book.parked.get(detour)?.everyMs ?? PARK_FIRST_MS / 2) * 2, PARK_LONGEST_MS);
  book.parked = withEntry(book.parked, detour, { total, againAt: now + everyMs, everyMs, reason });
  book.why.set(detour, why);
}

const carriedBy = ({ observation }: Book, detours: readonly string[]): number =>
  detours.reduce((sum, detour) => sum + (observation.flows.get(detour)?.bytes ?? 0), 0);

function cut({ book, now }: Turn, trial: Trial): void {
  trial.cuts.push({ at: now, bytes: book.observation.bytes, own: carriedBy(book, trial.detours) });
}

/** The last interval alone, the last two together, and the own rate of the paths on trial over both. */
function measured({ cuts }: Trial): [raw: { total: number }, mean: { total: number }, own: number] {
  const c = cuts.at(-1);
  const b = cuts.at(-2) ?? c;
  const a = cuts.at(-3) ?? b;
  const rate = (from: typeof a, key: 'bytes' | 'own'): number =>
    from && c && c.at > from.at ? ((c[key] - from[key]) * 1000) / (c.at - from.at) : 0;
  return [{ total: rate(b, 'bytes') }, { total: rate(a, 'bytes') }, rate(a, 'own')];
}

/**
 * Notes what one path turned out to add to the connection. Two witnesses are heard: `gain`, how much the total changed,
 * which noise in the total blurs, and `own`, what the path carried, which need not all be gain. The surer one counts
 * more; when they contradict each other by more than noise can explain, the total is right.
 */
function learn(turn: Turn, detour: string, gain: number, own: number): number {
  const { book, experience, situation, now } = turn;
  const blur = book.observation.smooth * BLUR;
  const expected = own * EXPECTED_SHARE;
  const doubt = own * SHARE_DEVIATION;
  const trust = blur + doubt > 0 ? doubt ** 2 / (blur ** 2 + doubt ** 2) : 1;
  const contradicts = Math.abs(gain - expected) > 3 * Math.hypot(blur, doubt);
  const worth = Math.min(own, contradicts ? gain : trust * gain + (1 - trust) * expected);
  const rttMs = book.observation.flows.get(detour)?.rttMs ?? 0;
  remember(experience, situation.prefix, detour, { worth, rttMs }, now);
  if (own <= 0) return worth;
  const additive = Math.max(-1, Math.min(1, worth / own));
  book.additive = withEntry(book.additive, detour, { share: additive, at: now });
  rememberAdditive(experience, situation.prefix, detour, additive);
  return worth;
}

function verdictOfAdd(turn: Turn, trial: Trial, total: number, best: number, own: number): void {
  const { book, now } = turn;
  end(turn);
  const gain = (total + best) / 2 - trial.before;
  const each = trial.detours.map((detour) => ({ detour, rate: Math.max(0, ownRate(turn, trial, detour)) }));
  if (!trial.reliable) {
    // Nothing to compare with: take the paths away for a moment, once there is something to see.
    book.probeAt = Math.min(book.probeAt, now + (isHurried(turn, trial.detours) ? STEADY_MS : UNHURRIED_MS));
    for (const { detour, rate } of each) {
      const worth = rate * additiveOf(turn, detour);
      const rttMs = book.observation.flows.get(detour)?.rttMs ?? 0;
      remember(turn.experience, turn.situation.prefix, detour, { worth, rttMs }, now);
    }
    return;
  }
  const share = own > 0 ? Math.max(-1, Math.min(1, gain / own)) : 0;
  for (const { detour, rate } of each) {
    const worth = learn(turn, detour, share * rate, rate);
    book.why.set(detour, `it adds ${mbps(worth)} of its ${mbps(rate)}`);
  }
  if (best < trial.before * (1 + MARGIN)) {
    // Slower than before, or no faster: without them, unless something else happened at the same time.
    park(turn, trial.detours, best < trial.before * (1 - MARGIN) ? 'slower with it' : 'no faster with it', best);
  } else if (share < SHARING) book.probeAt = Math.min(book.probeAt, now + STEADY_MS);
  else book.probeAt = Math.min(book.probeAt, now + book.probeEveryMs);
}

/**
 * Whether first paths should prove soon that they add something. A sender sees harm as it happens, and one that merely shares a bottleneck
 * costs it a few percent at most, while the question costs what a good one carries for a second or more: a tenth of a transfer of ten
 * seconds. To a receiver a path that is as wide as the direct one does no harm, nor does one that is about as long; a queue is not length.
 */
function isHurried({ book }: Turn, detours: readonly string[]): boolean {
  const { flows, tilt } = book.observation;
  if (tilt >= 0) return false;
  const all = [DIRECT, ...detours].map((path) => flows.get(path)).filter((flow) => flow !== undefined);
  const delays = all.map(({ leastRttMs }) => leastRttMs).filter((rtt) => rtt > 0);
  const [least, most] = [Math.min(...delays), Math.max(...delays)];
  const narrow = all.some(({ peak }) => peak < WIDE * (flows.get(DIRECT)?.peak ?? 0));
  return narrow || (most > EVEN * least && most - least > EVEN_MS);
}

/** One path's own rate over the last two intervals is not kept per path; the smoothed one shares it out. */
function ownRate(turn: Turn, trial: Trial, detour: string): number {
  const [, , own] = measured(trial);
  if (trial.detours.length === 1) return own;
  const sum = trial.detours.reduce((all, one) => all + (turn.book.observation.flows.get(one)?.raw ?? 0), 0);
  return sum > 0 ? (own * (turn.book.observation.flows.get(detour)?.raw ?? 0)) / sum : 0;
}

function park(
  turn: Turn,
  detours: readonly string[],
  why: string,
  total: number,
  reason: Parked['reason'] = 'gain',
): void {
  reserve(turn, detours, why, total, reason);
  if (reason === 'gain') begin(turn, 'park', detours);
}

function restore(turn: Turn, detours: readonly string[], why: string): void {
  for (const detour of detours) {
    turn.book.why.set(detour, why);
    turn.out.push({ act: 'restore', detour, why });
  }
}

/** `best` is what the connection carried without the paths. */
function verdictOfPark(turn: Turn, trial: Trial, best: number): void {
  const { book, now } = turn;
  end(turn);
  const missed = trial.before - best;
  const share = trial.ownBefore > 0 ? Math.min(1, missed / trial.ownBefore) : 0;
  for (const detour of trial.detours) {
    const own = (trial.ownBefore * Math.max(1, rateOf(turn, detour))) / sumOf(turn, trial.detours);
    learn(turn, detour, share * own, own);
  }
  if (missed <= trial.before * MARGIN) {
    for (const detour of trial.detours) {
      const parked = book.parked.get(detour);
      if (parked) parked.againAt = now + parked.everyMs;
      book.why.set(detour, `no slower without it (${mbps(best)} against ${mbps(trial.before)})`);
    }
    return;
  }
  for (const detour of trial.detours) book.parked = withoutEntry(book.parked, detour);
  if (trial.detours.length > 1 && share < SHARING) {
    // Some of them add less than they carry; which, only one at a time can tell.
    for (const detour of trial.detours) book.additive = withEntry(book.additive, detour, { share, at: AMBIGUOUS });
    book.probeAt = now + STEADY_MS;
  } else {
    book.probeEveryMs = Math.min(book.probeEveryMs * 2, PROBE_LONGEST_MS);
    book.probeAt = now + (unclear(turn) ? STEADY_MS : book.probeEveryMs);
  }
  restore(turn, trial.detours, `slower without it by ${mbps(missed)}`);
}

const unclear = ({ book, situation }: Turn): boolean =>
  situation.present.some(({ detour }) => book.additive.get(detour)?.at === AMBIGUOUS);

const sumOf = (turn: Turn, detours: readonly string[]): number =>
  detours.reduce((sum, detour) => sum + Math.max(1, rateOf(turn, detour)), 0);

function verdictOfRestore(turn: Turn, trial: Trial, total: number, own: number): void {
  const { book, now } = turn;
  end(turn);
  const gain = total - trial.before;
  if (trial.reliable && gain < trial.before * MARGIN) {
    for (const detour of trial.detours) learn(turn, detour, gain / trial.detours.length, own / trial.detours.length);
    reserve(turn, trial.detours, `still no faster with it (${mbps(total)} against ${mbps(trial.before)})`, total);
    return;
  }
  for (const detour of trial.detours) {
    if (trial.reliable) learn(turn, detour, Math.min(ownRate(turn, trial, detour), gain), ownRate(turn, trial, detour));
    book.parked = withoutEntry(book.parked, detour);
  }
  book.probeAt = Math.min(book.probeAt, now + (trial.reliable ? book.probeEveryMs : STEADY_MS));
}

function verdictOfReplace(turn: Turn, trial: Trial, total: number, best: number, own: number): void {
  const { book, situation, now } = turn;
  const [candidate = ''] = trial.detours;
  end(turn);
  const change = (total + best) / 2 - trial.before;
  const gain = coincidence(turn, trial) ? own - trial.displacedWorth : change;
  const worth = learn(turn, candidate, trial.displacedWorth + gain, own);
  const back = situation.candidates.find(({ key }) => key === trial.displaced);
  // It cannot be worth more than it carries: no noise in the total can hide a candidate that carries too little.
  const worse = own < trial.displacedWorth * 0.9 || (gain < 0 && best < trial.before && total < trial.before);
  if (!worse || !back) {
    book.why.set(candidate, `it adds ${mbps(worth)}, ${trial.displaced} added ${mbps(trial.displacedWorth)}`);
    book.probeAt = Math.min(book.probeAt, now + book.probeEveryMs);
    return;
  }
  giveBack(
    turn,
    trial,
    back.key,
    candidate,
    `${candidate} adds ${mbps(worth)}, ${back.key} added ${mbps(trial.displacedWorth)}`,
  );
  book.why.set(candidate, `it would add ${mbps(worth)}, less than what is used`);
}

/** Gives a place back to who had it; if that was not in use either, the candidate may as well stay there in reserve. */
function giveBack(turn: Turn, trial: Trial, back: string, candidate: string, why: string): void {
  const { book, now, out } = turn;
  if (trial.displacedWorth <= 0) {
    reserve(turn, [candidate], why, book.observation.smooth);
    return;
  }
  book.why.set(back, why);
  book.attempts--;
  book.drawAt = now + SETTLE_MS;
  out.push({ act: 'replace', detour: candidate, by: back, why });
}

/** Gives parked paths another chance: when the connection got slower than it was with them, or after a while. */
function unpark(turn: Turn): void {
  const { book, situation, now } = turn;
  const { raw, smooth } = book.observation;
  const due: string[] = [];
  for (const [detour, parked] of book.parked) {
    const path = situation.present.find((one) => one.detour === detour);
    if (path?.state !== 'backup') {
      // One that was destroyed is on its way back, or waits for a place.
      if (!path && (parked.reason !== 'harm' || now >= parked.againAt)) book.parked = withoutEntry(book.parked, detour);
      continue;
    }
    const slower = Math.max(raw, smooth) < parked.total * 0.8;
    const again = now >= parked.againAt && book.budget > 0;
    if (parked.reason === 'latency' || slower || again || !situation.directAlive) due.push(detour);
  }
  const [first] = due;
  if (first === undefined) return;
  restore(turn, [first], 'another chance');
  begin(turn, 'restore', [first]);
}

/**
 * Takes paths away for a moment, to see whether the connection misses them: now and then the one it knows least about,
 * and all of them when it carries much less than it used to, because then the direct path alone may be better.
 */
function probe(turn: Turn): void {
  const { book, situation, now } = turn;
  const { raw, smooth } = book.observation;
  if (!situation.directAlive) {
    // What it carries meanwhile is nothing to compare with what the direct path carries once it is back.
    book.level = smooth;
    book.probeAt = Math.max(book.probeAt, now + SETTLE_MS);
    return;
  }
  const fell = Math.max(raw, smooth) < book.level * FALL;
  book.level = Math.max(book.level * LEVEL_KEPT, smooth);
  const active = activeOf(turn);
  if (!fell && now < book.probeAt) return;
  if (active.length === 0) {
    book.probeAt = Number.POSITIVE_INFINITY;
    return;
  }
  const knownAt = ({ detour }: Present): number => book.additive.get(detour)?.at ?? 0;
  const all = fell || active.every((path) => knownAt(path) === 0);
  const asked = all ? active : [active.reduce((a, b) => (knownAt(b) < knownAt(a) ? b : a))];
  const stake = asked.reduce((sum, { detour }) => sum + rateOf(turn, detour), 0);
  const cost = smooth > 0 ? (stake / smooth) * 2 * CUT_MS : 0;
  if (cost > book.budget) return;
  book.budget -= cost;
  book.level = smooth;
  book.probeAt = now + book.probeEveryMs;
  park(
    turn,
    asked.map(({ detour }) => detour),
    fell ? 'a moment without it: the connection got slower' : 'a moment without it, to see what it adds',
    smooth,
  );
}

/** An application that sets the pace gains nothing from rates: slower paths only delay what they are given. */
function easeIdle(turn: Turn): void {
  const { book, now } = turn;
  const direct = book.observation.flows.get(DIRECT);
  if (!direct || direct.rttMs === 0 || now - book.idleSince < IDLE_MS) return;
  for (const { detour } of activeOf(turn)) {
    const flow = book.observation.flows.get(detour);
    if (!flow || flow.rttMs === 0 || flow.rttMs <= direct.rttMs * SLOWER + SLOWER_MS) continue;
    const why = `the application sets the pace, and this path is slower: ${flow.rttMs.toFixed(0)} ms against ${direct.rttMs.toFixed(0)} ms`;
    park(turn, [detour], why, 0, 'latency');
  }
}

type Ranked = { readonly candidate: Candidate; readonly belief: Belief; readonly score: number };

/** Candidates that may be tried now, the most promising first, each name once and none that is present. */
function ranked(turn: Turn, ordered = false): Ranked[] {
  const { terms, experience, book, situation, now, draw } = turn;
  const taken = new Set(situation.present.map(({ name }) => name));
  const open = situation.candidates.filter(({ name, rttMs }) => rttMs !== null && !taken.has(name));
  const known = beliefs(
    experience,
    situation.prefix,
    open.map(({ key }) => key),
    rateOf(turn, DIRECT),
    now,
  );
  const all: Ranked[] = [];
  for (const [index, candidate] of open.entries()) {
    const belief = known[index];
    if (!belief || belief.retryAt > now) continue;
    const latency = Math.max(belief.rttMs, candidate.rttMs ?? 0);
    const { smooth } = book.observation;
    const unmeasured = terms.mode !== 'aggregate' || book.idle || (smooth === 0 && belief.holds < 0.1);
    all.push({
      candidate,
      belief,
      score: unmeasured ? guess(terms, book, belief, latency) : terms.score(belief, draw),
    });
  }
  all.sort((a, b) => b.score - a.score || (a.candidate.key < b.candidate.key ? -1 : 1));
  if (ordered) all.sort((a, b) => (a.candidate.order ?? 0) - (b.candidate.order ?? 0));
  const names = new Set<string>();
  return all.filter(({ candidate: { name } }) => !names.has(name) && names.add(name));
}

/** Where rates say nothing, the quickest to answer comes first; among detours like any other too. */
function guess({ mode }: Terms, { idle }: Book, { usual }: Belief, latency: number): number {
  return mode !== 'aggregate' || idle || usual <= 0 ? -latency : usual * (1 - Math.min(latency, 5_000) / 10_000);
}

/** Uses free slots. */
function fill(turn: Turn): void {
  const { terms, book, situation, now, out } = turn;
  const slots = situation.limit - situation.present.length;
  if (slots <= 0 || situation.candidates.length === 0) return;
  const direct = book.observation.flows.get(DIRECT)?.rttMs ?? 0;
  const added: string[] = [];
  let reserved = 0;
  for (const { candidate, belief } of ranked(turn, true)) {
    if (added.length + reserved >= slots) break;
    if (book.attempts < 1 + added.length) {
      book.why.set(candidate.key, 'too many attempts in a short time');
      continue;
    }
    const slower = book.idle && direct > 0 && (candidate.rttMs ?? 0) > direct * SLOWER + SLOWER_MS;
    const shelved =
      book.parked.get(candidate.key)?.reason === 'harm' || (belief.measured < 0 && belief.holds > HARM_HOLDS);
    const backup = terms.mode === 'backup' || (terms.mode === 'aggregate' && (slower || shelved));
    if (!backup && now < book.fillAt) continue;
    const why = backup ? 'in reserve' : 'a free place, and the most promising';
    book.why.set(candidate.key, why);
    out.push({ act: 'add', detour: candidate.key, backup, why });
    if (backup) {
      reserved++;
      book.attempts--;
      if (shelved && !book.parked.has(candidate.key))
        shelve(turn, candidate.key, 'it held up other connections', 0, 'harm');
      else if (!shelved)
        book.parked = withEntry(book.parked, candidate.key, {
          total: 0,
          againAt: 0,
          everyMs: PARK_FIRST_MS,
          reason: 'latency',
        });
    } else added.push(candidate.key);
  }
  if (added.length > 0) begin(turn, 'add', added);
}

/** Tries a candidate in the place of the weakest path, when a draw promises more and the budget allows. */
function improve(turn: Turn): void {
  const { terms, experience, book, situation, now, out } = turn;
  if (now < book.drawAt || situation.candidates.length === 0 || situation.present.length < situation.limit) return;
  if (terms.mode !== 'aggregate' || book.idle || book.observation.smooth <= 0) return;
  book.drawAt = now + DRAW_EVERY_MS;
  // Before the work of ranking: with 10,000 connections this is where most of them end.
  if (book.attempts < 1 || !trialLeft(experience, now)) return;
  const settled = situation.present.filter(({ state }) => state !== 'pending');
  if (settled.length === 0 || settled.length < situation.present.length) return;
  const weakest = settled.reduce((a, b) => (worthOf(turn, b) < worthOf(turn, a) ? b : a));
  const worth = Math.max(0, worthOf(turn, weakest));
  const total = book.observation.smooth;
  const [best] = ranked(turn).filter(({ belief }) => belief.triedUntil <= now);
  if (!best) return;
  const least = Math.max(worth * PROMISE, worth + total * GAIN);
  if (best.score < least) return;
  // What is known to be better costs nothing; what might be is paid for.
  const { measured: known, holds } = best.belief;
  const cost = known > least && holds > 0.7 ? 0 : ((worth + Math.max(0, -known) * holds) / total) * TRIAL_MS;
  if (cost > book.budget) {
    book.why.set(best.candidate.key, 'worth a try, but the budget for experiments is used up');
    return;
  }
  takeTrial(experience, now);
  book.budget -= cost;
  const why = `${weakest.detour} adds ${mbps(worth)}; this might add ${mbps(best.score)}`;
  book.why.set(best.candidate.key, why);
  book.parked = withoutEntry(book.parked, weakest.detour);
  begin(turn, 'replace', [best.candidate.key], weakest.detour, worth);
  out.push({ act: 'replace', detour: weakest.detour, by: best.candidate.key, why });
}

/** A rate in bytes/s as people read it. */
export const mbps = (rate: number): string => `${((rate * 8) / 1e6).toFixed(1)} Mbit/s`;

export type Explanation = {
  /** `DIRECT` or the key of a detour. */
  readonly path: string;
  readonly state: Present['state'] | 'direct' | 'not used';
  /** What it carries, and what it adds as far as is known, bytes/s. */
  readonly rate: number;
  readonly adds: number | null;
  readonly why: string;
};

/** For people: every path this connection has or could have, and why it is used or not (`detour explain`). */
export function explain(
  terms: Terms,
  experience: Experience,
  book: Book,
  situation: Situation,
  now: number,
): Explanation[] {
  const turn: Turn = { terms, experience, book, situation, now, draw: () => 0.5, out: [] };
  const rows: Explanation[] = [
    {
      path: DIRECT,
      state: 'direct',
      rate: rateOf(turn, DIRECT),
      adds: null,
      why: book.idle ? 'the application sets the pace' : '',
    },
  ];
  for (const path of situation.present) {
    const why = book.why.get(path.detour) ?? '';
    rows.push({
      path: path.detour,
      state: path.state,
      rate: rateOf(turn, path.detour),
      adds: worthOf(turn, path),
      why: book.trial?.detours.includes(path.detour) ? `on trial: ${why}` : why,
    });
  }
  const keys = situation.candidates.map(({ key }) => key);
  for (const [index, belief] of beliefs(experience, situation.prefix, keys, 0, now).entries()) {
    const path = keys[index] ?? '';
    rows.push({
      path,
      state: 'not used',
      rate: 0,
      adds: belief.holds > 0 ? belief.measured : null,
      why: idleWhy(turn, path, belief),
    });
  }
  return rows;
}

function idleWhy(turn: Turn, path: string, belief: Belief): string {
  const { book, situation, now } = turn;
  if (tooYoung(turn)) return 'the connection is too young';
  if (belief.retryAt > now) return `it failed; again in ${Math.ceil((belief.retryAt - now) / 1000)} s`;
  const why = book.why.get(path);
  if (why !== undefined) return why;
  if (situation.limit <= situation.present.length) {
    return belief.holds > 0 ? `it added ${mbps(belief.measured)} when last tried; others add more` : 'not tried yet';
  }
  return 'its turn has not come';
}
