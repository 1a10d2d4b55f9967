import type { Address } from '../protocol/address.ts';

/**
 * What paths are worth: readings of one connection folded into rates, and what the connections to one destination
 * prefix have taught about each detour. Pure; both structures are changed in place, because at 10,000 connections a
 * copy per reading would cost more than the arithmetic, and both have one owner.
 *
 * Rates are bytes per second of the whole connection's own counters, times the clock's monotonic ms.
 */

/** The connection's first subflow, among keys of detours. No detour has this key: theirs contain a port. */
export const DIRECT = 'direct';

/** One subflow at one instant (struct tcp_info, linux/tcp.h). */
export type Reading = {
  /** `DIRECT` or the key of the detour. */
  readonly path: string;
  /** Over the life of the subflow; a subflow made again starts at 0. */
  readonly bytesAcked: number;
  readonly bytesReceived: number;
  /** Smoothed round trip, ms; 0 before the first sample. */
  readonly rttMs: number;
  /** `tcpi_busy_time`, ms: for how long there has been something unacknowledged to send. */
  readonly busyMs: number;
  /** `tcpi_unacked`, segments in flight. */
  readonly unacked: number;
  /** `tcpi_backoff`: retransmission timeouts in a row. */
  readonly backoff: number;
  /** Either end asked to use it only when nothing else works. */
  readonly backup: boolean;
};

/** One path as its readings show it. */
export type Flow = {
  readonly path: string;
  /** All that it carried during this observation, in both directions, whatever subflow it was at the time. */
  bytes: number;
  /** Goodput over about the last second, and over the last few. */
  raw: number;
  smooth: number;
  /** The most that the present subflow carried over a span, which is `SPAN_MS` or some round trips; and the span now. */
  peak: number;
  span: { at: number; bytes: number };
  /** Smoothed over a few seconds on top of the kernel's own; 0 before the first sample. */
  rttMs: number;
  /** The least that the kernel's own average has been: the way itself, without its queue; 0 before the first sample. */
  leastRttMs: number;
  backup: boolean;
  /** It has carried something since its subflow was made, and since when there is that subflow. */
  used: boolean;
  since: number;
  /** Since when it has unacknowledged data and no acknowledgement, or was silent while it should not be; null when it is well. */
  silentSince: number | null;
  /** When it last began to carry nothing; null while it carries something. */
  quietAt: number | null;
  /** Counters at the last reading of the present subflow. */
  acked: number;
  received: number;
  busy: number;
  seenAt: number;
};

/** One connection as its readings show it. */
export type Observation = {
  readonly flows: Map<string, Flow>;
  /** When the last readings were taken; 0 before the first. */
  at: number;
  /** All that it carried during this observation. */
  bytes: number;
  raw: number;
  smooth: number;
  /** Positive: it sends more than it receives. Smoothed difference of the rates. */
  tilt: number;
  /**
   * Share of time in which the network, and not the application, kept it from going faster, 0 to 1. A sender sees it in
   * the kernel's busy time; a receiver only sees whether bytes come without pause.
   */
  busy: number;
  /**
   * For how long the direct path has had nothing in flight while another had, ms: there was something to send, and the
   * receiver's window was taken by what waits for the other path. Only a sender can tell; for a receiver it stays 0.
   */
  stoodMs: number;
  /** How many readings it rests on, up to 2^31. */
  readings: number;
};

/** Time constants of the two averages, ms. Raw covers some round trips, smooth some periods of CUBIC's sawtooth. */
const RAW_MS = 800;
const SMOOTH_MS = 4_000;
/** Readings further apart than this say nothing about the time between. */
const GAP_MS = 30_000;

/** Long enough that losses and bursts inside a round trip do not make a peak. */
const SPAN_MS = 200;
const SPAN_ROUND_TRIPS = 4;

export function observe(): Observation {
  return { flows: new Map(), at: 0, bytes: 0, raw: 0, smooth: 0, tilt: 0, busy: 0, stoodMs: 0, readings: 0 };
}

const approach = (from: number, to: number, ms: number, constant: number): number =>
  to + (from - to) * Math.exp(-ms / constant);

/**
 * Takes the readings of all live subflows at `now`. Any interval will do, and intervals may change; paths that are
 * missing are gone. Costs a few multiplications and one exponential per subflow.
 */
export function fold(observation: Observation, readings: readonly Reading[], now: number): void {
  const first = observation.readings === 0 || now - observation.at > GAP_MS;
  const ms = now - observation.at;
  if (!first && ms <= 0) return;
  let sent = 0;
  let received = 0;
  let busyMs = 0;
  let directBusyMs = ms;
  for (const reading of readings) {
    let flow = observation.flows.get(reading.path);
    if (!flow) {
      flow = {
        path: reading.path,
        bytes: 0,
        raw: 0,
        smooth: 0,
        peak: 0,
        span: { at: now, bytes: 0 },
        rttMs: reading.rttMs,
        leastRttMs: reading.rttMs,
        backup: reading.backup,
        used: false,
        since: now,
        silentSince: null,
        quietAt: null,
        // A subflow first seen while we watch was made since the last reading; at the very first, its past is not ours.
        acked: first ? reading.bytesAcked : 0,
        received: first ? reading.bytesReceived : 0,
        busy: first ? reading.busyMs : 0,
        seenAt: now,
      };
      observation.flows.set(reading.path, flow);
    } else if (reading.bytesAcked < flow.acked || reading.bytesReceived < flow.received) {
      flow.acked = 0;
      flow.received = 0;
      flow.busy = 0;
      flow.used = false;
      flow.since = now;
      flow.smooth = 0;
      flow.peak = 0;
      flow.span = { at: now, bytes: flow.bytes };
    }
    const up = Math.max(0, reading.bytesAcked - flow.acked);
    const down = Math.max(0, reading.bytesReceived - flow.received);
    if (!first) {
      sent += up;
      received += down;
      busyMs = Math.max(busyMs, reading.busyMs - flow.busy);
      if (reading.path === DIRECT && !reading.backup) directBusyMs = reading.busyMs - flow.busy;
      const rate = ((up + down) * 1000) / ms;
      flow.raw = approach(flow.raw, rate, ms, RAW_MS);
      flow.smooth = approach(flow.smooth, rate, ms, Math.min(SMOOTH_MS, Math.max(RAW_MS, now - flow.since)));
      flow.bytes += up + down;
      const span = now - flow.span.at;
      if (span >= Math.max(SPAN_MS, SPAN_ROUND_TRIPS * flow.leastRttMs)) {
        flow.peak = Math.max(flow.peak, ((flow.bytes - flow.span.bytes) * 1000) / span);
        flow.span = { at: now, bytes: flow.bytes };
      }
    }
    if (up > 0 || (reading.unacked === 0 && reading.backoff === 0 && down > 0)) flow.silentSince = null;
    else if (reading.unacked > 0 || reading.backoff > 0) flow.silentSince ??= now;
    // Nothing in flight and nothing to be told from: a sender that pauses, or the receiving end of a path that died.
    else if (!receiving(observation)) flow.silentSince = null;
    if (reading.rttMs > 0) {
      flow.rttMs = flow.rttMs > 0 ? approach(flow.rttMs, reading.rttMs, first ? 0 : ms, SMOOTH_MS) : reading.rttMs;
      flow.leastRttMs = flow.leastRttMs > 0 ? Math.min(flow.leastRttMs, reading.rttMs) : reading.rttMs;
    }
    if (up + down > 0) flow.quietAt = null;
    else flow.quietAt ??= now;
    flow.used ||= up + down > 0;
    flow.backup = reading.backup;
    flow.acked = reading.bytesAcked;
    flow.received = reading.bytesReceived;
    flow.busy = reading.busyMs;
    flow.seenAt = now;
  }
  for (const [path, flow] of observation.flows) if (flow.seenAt !== now) observation.flows.delete(path);
  if (!first) {
    const rate = ((sent + received) * 1000) / ms;
    observation.bytes += sent + received;
    // The first seconds would otherwise be an average with the time before the connection began.
    const known = observation.readings === 1 ? 1 : Math.min(SMOOTH_MS, Math.max(RAW_MS, observation.readings * ms));
    observation.raw = approach(observation.raw, rate, ms, Math.min(RAW_MS, known));
    observation.smooth = approach(observation.smooth, rate, ms, known);
    observation.tilt = approach(observation.tilt, ((sent - received) * 1000) / ms, ms, known);
    const limited = sent >= received ? Math.min(1, busyMs / ms) : received > 0 ? 1 : 0;
    observation.busy = approach(observation.busy, limited, ms, known);
    if (sent >= received) observation.stoodMs += Math.max(0, Math.min(ms, busyMs) - directBusyMs);
    if (receiving(observation) && received > 0) suspectSilence(observation, now);
  }
  observation.at = now;
  observation.readings = Math.min(observation.readings + 1, 0x7fffffff);
}

const receiving = ({ tilt }: Observation): boolean => tilt < 0;

/** What a path must have carried for its silence to mean something: 10 segments a second. */
const AUDIBLE = 10 * 1448;

/**
 * A black hole raises no event. A sender knows one by data in flight that nobody acknowledges. A receiver sees no more than a
 * path that carried much and now carries nothing, which may as well be its peer's choice: so only while others go on and the
 * connection as a whole got slower, because had the peer just moved over, it would not have.
 */
function suspectSilence(observation: Observation, now: number): void {
  if (observation.raw > observation.smooth * 0.9) return;
  for (const flow of observation.flows.values()) {
    if (flow.used && !flow.backup && flow.seenAt === now && flow.raw < flow.smooth * 0.6 && flow.smooth > AUDIBLE) {
      if (flow.quietAt !== null) flow.silentSince ??= flow.quietAt;
    }
  }
}

/** Of an upload, an acknowledgement is overdue after this many round trips; of a download, data. */
const SILENT_ROUND_TRIPS = 4;
/** Nothing is suspected sooner: delayed acknowledgements (up to 200 ms in Linux, TCP_DELACK_MAX) look the same. */
const SILENT_LEAST_MS = 300;

/** Whether a path is taken for a black hole at `now`. */
export function blackHoled(flow: Flow, now: number): boolean {
  if (flow.silentSince === null) return false;
  return now - flow.silentSince >= Math.max(SILENT_LEAST_MS, SILENT_ROUND_TRIPS * flow.rttMs);
}

/** Below this share the application sets the pace; above the second, the network does. In between it is as it was. */
const IDLE_BELOW = 0.6;
const BUSY_ABOVE = 0.8;

/** Whether the application, and not the network, sets the pace; `before` is the last answer. */
export function applicationLimited(observation: Observation, before: boolean): boolean {
  return before ? observation.busy < BUSY_ABOVE : observation.busy < IDLE_BELOW;
}

/** What is known of one detour towards one destination prefix. */
type Memory = {
  /** Marginal goodput when it was last measured, bytes/s. */
  worth: number;
  /** When that was; null when never. */
  measuredAt: number | null;
  /** What it was worth over the last half hour or so, and for how much of that time this is known, ms. */
  habit: number;
  knownMs: number;
  /** How much of its own rate was gain, -1 to 1; null when never measured. */
  additive: number | null;
  /** Round trip to servers of the prefix through it, ms; 0 when never measured. */
  rttMs: number;
  /** Attempts that came to nothing since the last that worked. */
  failures: number;
  retryAt: number;
  /** A connection is trying it; the others wait for what comes out of it. */
  triedUntil: number;
};

type Prefixed = {
  readonly detours: Map<string, Memory>;
  /** Goodput of direct paths to the prefix, bytes/s; 0 when never measured. */
  direct: number;
  /** Share of recent connections that were over before a detour could have helped them. */
  short: number;
};

/** What all connections taught, by destination prefix. Bounded: the longest unused prefix is forgotten first. */
export type Experience = {
  readonly prefixes: Map<string, Prefixed>;
  /** When the trials of all connections together are paid up to (GCRA, theoretical arrival time). */
  trialsUntil: number;
};

/**
 * What is believed of a detour now. Networks do not drift so much as jump: congestion comes and goes. So either what was
 * measured still holds, which is the less likely the longer ago it was, or it says nothing and the detour is one like any other.
 */
export type Belief = {
  /** Marginal goodput when measured, bytes/s, and its standard deviation. */
  readonly measured: number;
  readonly noise: number;
  /** Probability that the measurement still holds; 0 when there is none. */
  readonly holds: number;
  /** What it is worth otherwise: rates differ by factors, so the spread is that of the logarithm. */
  readonly usual: number;
  readonly spread: number;
  /** Null when never measured. */
  readonly additive: number | null;
  readonly rttMs: number;
  readonly retryAt: number;
  readonly triedUntil: number;
};

/** A prefix costs about 200 bytes and each detour of it about 120: 40 MB would be 4,096 full ones, a few are. */
const MOST_PREFIXES = 4_096;
const MOST_DETOURS = 64;
/** How long a measurement holds on average. Congestion lasts minutes; what overlays gain, hours (docs/path-selection.md). */
const HOLDS_MS = 350_000;
/** Over what time habits are formed; what a first measurement stands for; and what it takes to trust in them by half. */
const HABIT_MS = 1_800_000;
const FIRST_MS = 60_000;
const HABITUAL_MS = 300_000;
/** What a measurement is off by, as a share of its value. */
const NOISE = 0.15;
/** A detour that is not as it was measured is so many times better or worse, as the deviation of a logarithm: a factor of 2.7. */
const SPREAD = 1;
/** How much a new measurement counts against one that still held. */
const NEWER = 0.7;
const RETRY_FIRST_MS = 2_000;
const RETRY_LONGEST_MS = 120_000;

export function emptyExperience(): Experience {
  return { prefixes: new Map(), trialsUntil: 0 };
}

/** Destinations within a prefix of this length are taken for one: IPv4 /24 and IPv6 /48, what is routed as one at most. */
export const PREFIX_LENGTH = { 4: 24, 6: 48 } as const;
const HOST_BITS = { 4: BigInt(32 - PREFIX_LENGTH[4]), 6: BigInt(128 - PREFIX_LENGTH[6]) } as const;

/** The prefix of a destination, as a key. */
export function prefixOf({ family, value }: Address): string {
  return `${family}/${(value >> HOST_BITS[family]).toString(16)}`;
}

function prefixed(experience: Experience, prefix: string): Prefixed {
  let found = experience.prefixes.get(prefix);
  if (found) experience.prefixes.delete(prefix);
  else {
    found = { detours: new Map(), direct: 0, short: 0 };
    if (experience.prefixes.size >= MOST_PREFIXES) {
      const oldest = experience.prefixes.keys().next();
      if (!oldest.done) experience.prefixes.delete(oldest.value);
    }
  }
  // Moved to the end, so that the first one is the longest unused.
  experience.prefixes.set(prefix, found);
  return found;
}

function memoryOf(experience: Experience, prefix: string, detour: string): Memory {
  const { detours } = prefixed(experience, prefix);
  let memory = detours.get(detour);
  if (!memory) {
    if (detours.size >= MOST_DETOURS) {
      const oldest = detours.keys().next();
      if (!oldest.done) detours.delete(oldest.value);
    }
    memory = {
      worth: 0,
      measuredAt: null,
      habit: 0,
      knownMs: 0,
      additive: null,
      rttMs: 0,
      failures: 0,
      retryAt: 0,
      triedUntil: 0,
    };
    detours.set(detour, memory);
  }
  return memory;
}

const holds = ({ measuredAt }: Memory, now: number): number =>
  measuredAt === null ? 0 : Math.exp((measuredAt - now) / HOLDS_MS);

/** Notes that a detour was worth `worth` bytes/s more to a connection than going without it. */
export function remember(
  experience: Experience,
  prefix: string,
  detour: string,
  measured: { readonly worth: number; readonly rttMs: number },
  now: number,
): void {
  const memory = memoryOf(experience, prefix, detour);
  const { worth, rttMs } = measured;
  const older = holds(memory, now) * (1 - NEWER);
  memory.worth = older * memory.worth + (1 - older) * worth;
  const ms = memory.measuredAt === null ? FIRST_MS : Math.min(now - memory.measuredAt, HOLDS_MS);
  memory.knownMs = Math.min(memory.knownMs + ms, HABIT_MS);
  if (memory.knownMs > 0) memory.habit += (worth - memory.habit) * (ms / memory.knownMs);
  memory.measuredAt = now;
  if (rttMs > 0) memory.rttMs = memory.rttMs > 0 ? memory.rttMs + (rttMs - memory.rttMs) * 0.3 : rttMs;
  if (worth > 0) memory.failures = 0;
}

/** Notes how much of a detour's own rate was gain: 1 shares no bottleneck, 0 only moves bytes about, below 0 does harm. */
export function rememberAdditive(experience: Experience, prefix: string, detour: string, additive: number): void {
  const memory = memoryOf(experience, prefix, detour);
  memory.additive = memory.additive === null ? additive : memory.additive + (additive - memory.additive) * NEWER;
}

/** Notes that a connection tries it until `until`. */
export function rememberTrial(experience: Experience, prefix: string, detour: string, until: number): void {
  memoryOf(experience, prefix, detour).triedUntil = until;
}

/**
 * Notes that an attempt came to nothing: no join, or it broke before it could be measured. Backs off exponentially;
 * `times` failures at once where one attempt cost as much as several.
 */
export function rememberFailure(experience: Experience, prefix: string, detour: string, now: number, times = 1): void {
  const memory = memoryOf(experience, prefix, detour);
  memory.failures += times;
  memory.triedUntil = 0;
  memory.retryAt = now + Math.min(RETRY_FIRST_MS * 2 ** Math.min(memory.failures - 1, 10), RETRY_LONGEST_MS);
}

/** All connections together try a candidate this often, after a burst; joins that fill a free place do not count. */
const TRIAL_EVERY_MS = 200;
const TRIAL_BURST_MS = 5_000;

/** Whether one of the trials that all connections share is left at `now`. */
export function trialLeft(experience: Experience, now: number): boolean {
  return experience.trialsUntil - now <= TRIAL_BURST_MS;
}

/** Takes one of the trials that all connections share. */
export function takeTrial(experience: Experience, now: number): void {
  experience.trialsUntil = Math.max(experience.trialsUntil, now) + TRIAL_EVERY_MS;
}

/** Notes that a detour answers again, so that what failed while it did not says little. Its next failure backs off further. */
export function forgive(experience: Experience, detour: string): void {
  for (const { detours } of experience.prefixes.values()) {
    const memory = detours.get(detour);
    if (memory) memory.retryAt = 0;
  }
}

/** Notes what the direct path carries alone, bytes/s: what detours never tried are first compared with. */
export function rememberDirect(experience: Experience, prefix: string, rate: number): void {
  const found = prefixed(experience, prefix);
  found.direct = found.direct > 0 ? found.direct + (rate - found.direct) * 0.3 : rate;
}

/** A connection that ended sooner gained nothing from detours (docs/path-selection.md, minimum age). */
const SHORT_MS = 1_000;
/** How much one connection counts among the recent ones to its prefix, and which share of short ones makes it a habit. */
const ONE_LIFE = 0.2;
const MOSTLY = 0.5;

/** Notes that a connection to the prefix ended `ageMs` after ESTABLISHED. */
export function rememberLife(experience: Experience, prefix: string, ageMs: number): void {
  const found = prefixed(experience, prefix);
  found.short += ((ageMs < SHORT_MS ? 1 : 0) - found.short) * ONE_LIFE;
}

/**
 * How old a connection to the prefix should be before it gets detours, ms: nothing, unless connections to it are mostly
 * over at once. So the first detour is never late where it helps, and a storm of short connections is left alone.
 */
export function minimumAge(experience: Experience, prefix: string): number {
  return (experience.prefixes.get(prefix)?.short ?? 0) > MOSTLY ? SHORT_MS : 0;
}

/** Forgets a detour that is no longer configured. */
export function forgetDetour(experience: Experience, detour: string): void {
  for (const { detours } of experience.prefixes.values()) detours.delete(detour);
}

/**
 * What is believed of each detour towards a prefix. One that was never tried is like any other: like those that were, as far
 * as what they showed still holds, and like the direct path. `fallback` stands for that while it was never measured.
 */
export function beliefs(
  experience: Experience,
  prefix: string,
  detours: readonly string[],
  fallback: number,
  now: number,
): Belief[] {
  const found = experience.prefixes.get(prefix);
  const direct = found && found.direct > 0 ? found.direct : fallback;
  let known = 1;
  let sum = direct;
  for (const memory of found?.detours.values() ?? []) {
    const weight = memory.measuredAt === null ? 0 : 0.5 + 0.5 * holds(memory, now);
    known += weight;
    // A detour that does harm is no measure of what others could add.
    sum += weight * Math.max(0, memory.worth);
  }
  const usual = sum / known;
  return detours.map((detour) => {
    const memory = found?.detours.get(detour);
    const worth = memory?.worth ?? 0;
    const familiar = memory ? memory.knownMs / (memory.knownMs + HABITUAL_MS) : 0;
    const habit = familiar * Math.max(0, memory?.habit ?? 0) + (1 - familiar) * usual;
    return {
      measured: worth,
      noise: NOISE * Math.abs(worth),
      holds: memory ? holds(memory, now) : 0,
      usual: habit,
      spread: SPREAD,
      additive: memory?.additive ?? null,
      rttMs: memory?.rttMs ?? 0,
      retryAt: memory?.retryAt ?? 0,
      triedUntil: memory?.triedUntil ?? 0,
    };
  });
}

/** Mean and standard deviation of a belief. */
export function moments({ measured, noise, holds: held, usual, spread }: Belief): { mean: number; deviation: number } {
  // Of a lognormal whose median is the usual worth.
  const usualMean = usual * Math.exp(spread ** 2 / 2);
  const usualSquare = usual ** 2 * Math.exp(2 * spread ** 2);
  const mean = held * measured + (1 - held) * usualMean;
  const square = held * (noise ** 2 + measured ** 2) + (1 - held) * usualSquare;
  return { mean, deviation: Math.sqrt(Math.max(0, square - mean * mean)) };
}
