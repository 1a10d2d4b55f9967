import { describe, expect, test } from 'vitest';
import {
  type Book,
  type Candidate,
  type Decision,
  decide,
  explain,
  type Mode,
  openBook,
  type Present,
  thompson,
} from '../../../appliance/client/paths.ts';
import {
  beliefs,
  blackHoled,
  DIRECT,
  type Experience,
  emptyExperience,
  fold,
  forgive,
  minimumAge,
  moments,
  type Observation,
  observe,
  prefixOf,
  type Reading,
  remember,
  rememberFailure,
  rememberLife,
  takeTrial,
  trialLeft,
} from '../../../appliance/client/worth.ts';
import { parseAddress } from '../../../appliance/protocol/address.ts';
import { dice } from '../../sim/network.ts';

const at = (text: string): NonNullable<ReturnType<typeof parseAddress>> => {
  const address = parseAddress(text);
  if (!address) throw new Error(text);
  return address;
};
const PREFIX = prefixOf(at('198.51.100.5'));
const MBIT = 1e6 / 8;

const candidate = (key: string, rttMs = 10, name = key): Candidate => ({
  key,
  name,
  address: at('203.0.113.1'),
  rttMs,
});

const reading = (path: string, rest: Partial<Reading> = {}): Reading => ({
  path,
  bytesAcked: 0,
  bytesReceived: 0,
  rttMs: 30,
  busyMs: 0,
  unacked: 0,
  backoff: 0,
  backup: false,
  ...rest,
});

/**
 * A connection whose paths carry what the test says, whatever the chooser does: `rates` gives bytes per second of each
 * path in use, from which counters and readings follow.
 */
class Story {
  readonly book: Book = openBook(0);
  readonly experience: Experience;
  readonly decisions: (Decision & { at: number })[] = [];
  readonly present = new Map<string, Present['state']>();
  readonly counters = new Map<string, { acked: number; busy: number }>();
  candidates: Candidate[];
  mode: Mode = 'aggregate';
  minAgeMs: number | null = 0;
  limit = 2;
  now = 0;
  directAlive = true;
  /** Below 1 the application pauses. */
  busy = 1;
  rtts: Record<string, number> = {};
  /** Of the time in which the application has something to send, for how much a path has it in flight; 1 unless said. */
  shares: Record<string, number> = {};
  rates: (inUse: readonly string[]) => Record<string, number>;
  readonly #draw = dice(7);

  constructor(
    candidates: readonly string[],
    rates: (inUse: readonly string[]) => Record<string, number>,
    experience = emptyExperience(),
  ) {
    this.candidates = candidates.map((key, index) => candidate(key, 10 + index));
    this.rates = rates;
    this.experience = experience;
  }

  get inUse(): string[] {
    return [...this.present].filter(([, state]) => state === 'active').map(([key]) => key);
  }

  run(ms: number): (Decision & { at: number })[] {
    const from = this.decisions.length;
    for (const until = this.now + ms; this.now < until; ) {
      this.now += 500;
      for (const [key, state] of this.present) if (state === 'pending') this.present.set(key, 'active');
      const carried = this.rates(this.inUse);
      const readings = [DIRECT, ...[...this.present].filter(([, s]) => s !== 'pending').map(([key]) => key)].map(
        (path) => {
          const counter = this.counters.get(path) ?? { acked: 0, busy: 0 };
          this.counters.set(path, counter);
          counter.acked += (carried[path] ?? 0) / 2;
          counter.busy += 500 * this.busy * (this.inUse.length > 0 ? (this.shares[path] ?? 1) : 1);
          return reading(path, {
            bytesAcked: counter.acked,
            busyMs: counter.busy,
            rttMs: this.rtts[path] ?? 30,
            backup: this.present.get(path) === 'backup',
          });
        },
      );
      fold(this.book.observation, readings, this.now);
      for (const decision of this.ask()) this.#carryOut(decision);
    }
    return this.decisions.slice(from);
  }

  /** Runs on until no trial is under way. */
  settle(): void {
    for (const until = this.now + 30_000; this.book.trial !== null && this.now < until; ) this.run(500);
    this.run(500);
  }

  ask(): Decision[] {
    const terms = { mode: this.mode, minAgeMs: this.minAgeMs, score: thompson };
    return decide(terms, this.experience, this.book, this.situation(), this.now, this.#draw);
  }

  situation(): Parameters<typeof decide>[3] {
    return {
      prefix: PREFIX,
      ageMs: this.now,
      limit: this.limit,
      directAlive: this.directAlive,
      present: [...this.present].map(([detour, state]) => ({ detour, name: detour, state })),
      candidates: this.candidates.filter(({ key }) => !this.present.has(key)),
    };
  }

  #carryOut(decision: Decision): void {
    this.decisions.push({ ...decision, at: this.now });
    const { detour } = decision;
    switch (decision.act) {
      case 'add':
        this.present.set(detour, decision.backup ? 'backup' : 'pending');
        break;
      case 'replace':
        this.present.delete(detour);
        this.counters.delete(detour);
        this.present.set(decision.by, 'pending');
        break;
      case 'retire':
        this.present.delete(detour);
        this.counters.delete(detour);
        break;
      case 'backup':
        this.present.set(detour, 'backup');
        break;
      case 'restore':
        this.present.set(detour, 'active');
        break;
    }
  }
}

/** Every path has its own bottleneck. */
const apart =
  (rates: Record<string, number>) =>
  (inUse: readonly string[]): Record<string, number> =>
    Object.fromEntries([DIRECT, ...inUse].map((path) => [path, (rates[path] ?? 0) * MBIT]));

/** All paths share one bottleneck. */
const together =
  (rate: number) =>
  (inUse: readonly string[]): Record<string, number> => {
    const paths = [DIRECT, ...inUse];
    return Object.fromEntries(paths.map((path) => [path, (rate * MBIT) / paths.length]));
  };

describe('what a connection shows', () => {
  test('rates follow the counters, for any interval', () => {
    for (const interval of [100, 500, 2_000]) {
      const observation = observe();
      for (let now = 0; now <= 20_000; now += interval) {
        fold(observation, [reading(DIRECT, { bytesAcked: now * 1_000, busyMs: now })], now);
      }
      expect(observation.smooth).toBeGreaterThan(0.99e6);
      expect(observation.smooth).toBeLessThan(1.01e6);
      expect(observation.busy).toBeGreaterThan(0.99);
    }
  });

  test('a connection that is old when we first see it has not just sent all that', () => {
    const observation = observe();
    fold(observation, [reading(DIRECT, { bytesAcked: 5e9 })], 1_000);
    fold(observation, [reading(DIRECT, { bytesAcked: 5e9 + 1_000 })], 2_000);
    expect(observation.bytes).toBe(1_000);
  });

  test('a subflow made again counts from zero and keeps what its predecessor carried', () => {
    const observation = observe();
    const both = (acked: number): Reading[] => [reading(DIRECT), reading('a:1', { bytesAcked: acked })];
    fold(observation, [reading(DIRECT)], 0);
    fold(observation, both(500), 500);
    fold(observation, both(900), 1_000);
    fold(observation, both(100), 1_500);
    expect(observation.flows.get('a:1')?.bytes).toBe(1_000);
    fold(observation, [reading(DIRECT)], 2_000);
    expect(observation.flows.has('a:1')).toBe(false);
    expect(observation.bytes).toBe(1_000);
  });

  test('a sender suspects a path that acknowledges nothing, once that is more than delay', () => {
    const observation = observe();
    fold(observation, [reading(DIRECT, { bytesAcked: 1e6 })], 0);
    fold(observation, [reading(DIRECT, { bytesAcked: 2e6, unacked: 20 })], 100);
    fold(observation, [reading(DIRECT, { bytesAcked: 2e6, unacked: 20 })], 200);
    const flow = observation.flows.get(DIRECT);
    expect(flow && blackHoled(flow, 450)).toBe(false);
    expect(flow && blackHoled(flow, 500)).toBe(true);
    fold(observation, [reading(DIRECT, { bytesAcked: 2.1e6, unacked: 20 })], 600);
    expect(flow && blackHoled(flow, 5_000)).toBe(false);
  });

  /** Two paths, of which the second stops at 5 s; `others` says what the first carries then, bytes per ms. */
  const receiver = (others: number): Observation => {
    const observation = observe();
    let [a, b] = [0, 0];
    for (let now = 0; now <= 6_500; now += 100) {
      a += now <= 5_000 ? 100_000 : others * 100;
      if (now <= 5_000) b += 100_000;
      fold(observation, [reading(DIRECT, { bytesReceived: a }), reading('a:1', { bytesReceived: b })], now);
    }
    return observation;
  };
  const suspected = (observation: Observation): string[] =>
    [...observation.flows.values()].filter((flow) => blackHoled(flow, observation.at)).map(({ path }) => path);

  test('a receiver suspects a path that falls silent when the connection gets slower by it', () => {
    expect(suspected(receiver(1_000))).toEqual(['a:1']);
  });

  test('a receiver suspects nothing when its peer moves over to the other path, or pauses', () => {
    expect(suspected(receiver(2_000))).toEqual([]);
    expect(suspected(receiver(0))).toEqual([]);
  });

  test('a sender that pauses has no black holes', () => {
    const observation = observe();
    for (let now = 0; now <= 9_000; now += 100) {
      const acked = Math.min(now, 5_000) * 1_000;
      fold(observation, [reading(DIRECT, { bytesAcked: acked }), reading('a:1', { bytesAcked: acked })], now);
    }
    expect(suspected(observation)).toEqual([]);
  });

  test('whatever the counters do, rates are finite and not negative', () => {
    const roll = dice(3);
    const wild = (): number => [0, 1, 2 ** 53, roll() * 1e12, -1][Math.floor(roll() * 5)] ?? 0;
    const observation = observe();
    for (let now = 0, round = 0; round < 2_000; round++) {
      now += [0, 1, 500, 100_000, -50][Math.floor(roll() * 5)] ?? 0;
      const paths = [DIRECT, 'a:1', 'b:1'].filter(() => roll() < 0.8);
      fold(
        observation,
        paths.map((path) =>
          reading(path, { bytesAcked: wild(), bytesReceived: wild(), busyMs: wild(), rttMs: roll() * 1e4 }),
        ),
        now,
      );
      for (const value of [observation.raw, observation.smooth, observation.busy, observation.bytes]) {
        expect(Number.isFinite(value) && value >= 0).toBe(true);
      }
    }
  });
});

describe('what connections teach', () => {
  test('destinations of one /24 or /48 share what is known, others do not', () => {
    expect(prefixOf(at('198.51.100.5'))).toBe(prefixOf(at('198.51.100.250')));
    expect(prefixOf(at('198.51.100.5'))).not.toBe(prefixOf(at('198.51.101.5')));
    expect(prefixOf(at('2001:db8:1:2::1'))).toBe(prefixOf(at('2001:db8:1:ffff::1')));
    expect(prefixOf(at('2001:db8:1::1'))).not.toBe(prefixOf(at('2001:db8:2::1')));
  });

  test('a measurement holds for minutes, then the detour is believed to be like any other', () => {
    const experience = emptyExperience();
    remember(experience, PREFIX, 'bad:1', { worth: 0.1 * MBIT, rttMs: 40 }, 0);
    remember(experience, PREFIX, 'good:1', { worth: 20 * MBIT, rttMs: 40 }, 0);
    const [fresh] = beliefs(experience, PREFIX, ['bad:1'], 10 * MBIT, 1_000);
    const [old] = beliefs(experience, PREFIX, ['bad:1'], 10 * MBIT, 3_600_000);
    if (!fresh || !old) throw new Error('no belief');
    expect(moments(fresh).mean).toBeLessThan(0.5 * MBIT);
    expect(fresh.holds).toBeGreaterThan(0.9);
    expect(old.holds).toBeLessThan(0.01);
    expect(moments(old).mean).toBeGreaterThan(2 * MBIT);
    expect(moments(old).deviation).toBeGreaterThan(2 * moments(fresh).deviation);
  });

  test('failures back off further each time, an answer forgives the waiting but not the history', () => {
    const experience = emptyExperience();
    const waits: number[] = [];
    for (let round = 0; round < 10; round++) {
      rememberFailure(experience, PREFIX, 'a:1', 0);
      waits.push(beliefs(experience, PREFIX, ['a:1'], 0, 0)[0]?.retryAt ?? 0);
    }
    expect(waits.slice(0, 4)).toEqual([2_000, 4_000, 8_000, 16_000]);
    expect(waits.at(-1)).toBe(120_000);
    forgive(experience, 'a:1');
    expect(beliefs(experience, PREFIX, ['a:1'], 0, 0)[0]?.retryAt).toBe(0);
    rememberFailure(experience, PREFIX, 'a:1', 0);
    expect(beliefs(experience, PREFIX, ['a:1'], 0, 0)[0]?.retryAt).toBe(120_000);
  });

  test('it is bounded, and forgets what was not used for longest', () => {
    const experience = emptyExperience();
    for (let index = 0; index < 5_000; index++) {
      remember(experience, 'kept', 'a:1', { worth: 1, rttMs: 1 }, index);
      remember(experience, `p${index}`, 'a:1', { worth: 1, rttMs: 1 }, index);
    }
    expect(experience.prefixes.size).toBe(4_096);
    expect(experience.prefixes.has('kept')).toBe(true);
    expect(experience.prefixes.has('p0')).toBe(false);
    for (let index = 0; index < 200; index++) remember(experience, 'kept', `d${index}`, { worth: 1, rttMs: 1 }, 9_000);
    expect(experience.prefixes.get('kept')?.detours.size).toBe(64);
  });

  test('where connections are mostly over at once, the next ones wait; elsewhere nobody does', () => {
    const experience = emptyExperience();
    expect(minimumAge(experience, PREFIX)).toBe(0);
    for (let index = 0; index < 10; index++) rememberLife(experience, PREFIX, 40);
    expect(minimumAge(experience, PREFIX)).toBe(1_000);
    expect(minimumAge(experience, 'other')).toBe(0);
    for (let index = 0; index < 5; index++) rememberLife(experience, PREFIX, 60_000);
    expect(minimumAge(experience, PREFIX)).toBe(0);
  });

  test('all connections together try candidates at a bounded rate', () => {
    const experience = emptyExperience();
    let taken = 0;
    for (let now = 0; now < 60_000; now += 10) {
      if (!trialLeft(experience, now)) continue;
      takeTrial(experience, now);
      taken++;
    }
    expect(taken).toBeGreaterThan(60_000 / 200 - 1);
    expect(taken).toBeLessThanOrEqual(60_000 / 200 + 27);
  });
});

describe('harm without a baseline', () => {
  /** A sender whose direct path carries `rate` while it works, and works for `share` of the time beside a slow path. */
  const held = (share: number, own = 1): Story => {
    const story = new Story(['a:1'], (inUse) =>
      inUse.length > 0 ? { direct: 20 * share * MBIT, 'a:1': own * MBIT } : { direct: 20 * MBIT },
    );
    story.limit = 1;
    story.shares = { direct: share };
    story.rtts = { 'a:1': 600 };
    return story;
  };

  test('a path that makes the direct one stand still is destroyed within a second and comes back in reserve', () => {
    const story = held(0.3);
    const decisions = story.run(3_000).map(({ act, detour, at: when }) => ({ act, detour, when }));
    expect(decisions.map(({ act }) => act)).toEqual(['add', 'retire', 'add']);
    expect(decisions[1]?.when).toBeLessThanOrEqual(1_500);
    expect(story.present.get('a:1')).toBe('backup');
    // Nothing is tried before a parked path's time has come, and then it is found out as soon.
    const later = story.run(60_000).map(({ act }) => act);
    expect(later.slice(0, 3)).toEqual(['restore', 'retire', 'add']);
    expect(story.present.get('a:1')).toBe('backup');
  });

  test('one beside which the direct path goes on working stays, however slow it is', () => {
    const story = held(1);
    expect(story.run(8_000).map(({ act }) => act)).toEqual(['add']);
  });

  test('one that carries more than the direct path loses stays', () => {
    const story = held(0.5, 15);
    expect(story.run(8_000).map(({ act }) => act)).not.toContain('retire');
  });

  test('other connections to the same place take it in reserve at once', () => {
    const story = held(0.3);
    story.run(3_000);
    const other = new Story(['a:1'], apart({ direct: 20, 'a:1': 1 }), story.experience);
    other.limit = 1;
    expect(other.run(500)).toMatchObject([{ act: 'add', detour: 'a:1', backup: true }]);
  });
});

describe('what is decided', () => {
  test('connections younger than the minimum age are left alone', () => {
    const story = new Story(['a:1', 'b:1'], apart({ direct: 10, 'a:1': 10, 'b:1': 10 }));
    story.minAgeMs = 5_000;
    expect(story.run(4_500)).toEqual([]);
    expect(story.run(1_000).map(({ act }) => act)).toEqual(['add', 'add']);
  });

  test('free places go to the detours that answer first, as long as nothing else is known', () => {
    const story = new Story(['slow:1', 'fast:1'], apart({ direct: 10 }));
    story.limit = 1;
    story.candidates = [candidate('slow:1', 80), candidate('fast:1', 8)];
    expect(story.ask()).toMatchObject([{ act: 'add', detour: 'fast:1', backup: false }]);
  });

  test('experience of other connections comes before answering first', () => {
    const experience = emptyExperience();
    remember(experience, PREFIX, 'fast:1', { worth: 0.2 * MBIT, rttMs: 20 }, 0);
    remember(experience, PREFIX, 'good:1', { worth: 30 * MBIT, rttMs: 60 }, 0);
    const story = new Story(['fast:1', 'good:1'], apart({ direct: 10, 'fast:1': 0.2, 'good:1': 30 }), experience);
    story.limit = 1;
    story.minAgeMs = 2_000;
    expect(story.run(2_500)).toMatchObject([{ act: 'add', detour: 'good:1' }]);
  });

  test('a detour known to be bad comes after those nobody knows', () => {
    const experience = emptyExperience();
    remember(experience, PREFIX, 'bad:1', { worth: 0.05 * MBIT, rttMs: 5 }, 0);
    remember(experience, PREFIX, 'gone:1', { worth: 20 * MBIT, rttMs: 5 }, 0);
    const story = new Story([], apart({ direct: 10 }), experience);
    story.limit = 1;
    story.candidates = [candidate('bad:1', 5), candidate('new:1', 50)];
    expect(story.ask()).toMatchObject([{ act: 'add', detour: 'new:1' }]);
  });

  test('by default only destinations with short connections have a minimum age', () => {
    const experience = emptyExperience();
    const story = new Story(['a:1'], apart({ direct: 10, 'a:1': 10 }), experience);
    story.minAgeMs = null;
    for (let index = 0; index < 10; index++) rememberLife(experience, PREFIX, 40);
    expect(story.run(500)).toEqual([]);
    expect(story.run(1_000)).toMatchObject([{ act: 'add', detour: 'a:1' }]);
    const other = new Story(['a:1'], apart({ direct: 10, 'a:1': 10 }));
    other.minAgeMs = null;
    expect(other.ask()).toMatchObject([{ act: 'add', detour: 'a:1' }]);
  });

  test('two addresses of one detour are one candidate', () => {
    const story = new Story([], apart({ direct: 10 }));
    story.candidates = [candidate('a:1', 10, 'a'), candidate('a:2', 11, 'a'), candidate('b:1', 12, 'b')];
    expect(story.ask().map(({ detour }) => detour)).toEqual(['a:1', 'b:1']);
  });

  test('a path that only moves bytes about is made backup, however much it carries itself', () => {
    const story = new Story(['a:1'], together(10));
    story.minAgeMs = 4_000;
    story.run(30_000);
    expect(story.present.get('a:1')).toBe('backup');
    expect(story.decisions.at(-1)).toMatchObject({ act: 'backup', detour: 'a:1' });
  });

  test('the same path is kept when the bottleneck is not shared', () => {
    const story = new Story(['a:1'], apart({ direct: 10, 'a:1': 5 }));
    story.minAgeMs = 4_000;
    story.run(30_000);
    expect(story.present.get('a:1')).toBe('active');
  });

  test('a path that makes the connection much slower is taken out at once', () => {
    const story = new Story(['a:1'], (inUse) =>
      inUse.length === 0 ? { direct: 60 * MBIT } : { direct: 15 * MBIT, 'a:1': MBIT },
    );
    story.minAgeMs = 4_000;
    story.run(8_000);
    expect(story.decisions.map(({ act }) => act)).toEqual(['add', 'backup']);
    const [added, removed] = story.decisions;
    expect((removed?.at ?? 0) - (added?.at ?? 0)).toBeLessThanOrEqual(2_500);
    const [belief] = beliefs(story.experience, PREFIX, ['a:1'], 0, story.now);
    expect((belief?.retryAt ?? 0) - (removed?.at ?? 0)).toBeGreaterThanOrEqual(60_000);
    // And it is not tried again and again.
    story.run(60_000);
    expect(story.decisions.filter(({ act }) => act === 'restore').length).toBeLessThanOrEqual(2);
  });

  test('a candidate that carries more takes the place of the weakest path, one that carries less gives it back', () => {
    const story = new Story(
      ['a:1', 'b:1', 'c:1', 'd:1'],
      apart({ direct: 10, 'a:1': 2, 'b:1': 12, 'c:1': 15, 'd:1': 1 }),
    );
    story.run(90_000);
    story.settle();
    expect(new Set(story.inUse)).toEqual(new Set(['b:1', 'c:1']));
    const tried = story.decisions.flatMap((one) => (one.act === 'replace' ? [one.by] : []));
    expect(tried).toContain('c:1');
    expect(tried).toContain('b:1');
  });

  test('the weakest path is the one that adds least, not the one that carries least', () => {
    // a:1 takes most of what it carries from the direct path.
    const story = new Story(['a:1', 'b:1', 'c:1'], (inUse) => ({
      ...apart({ direct: 12, 'a:1': 12, 'b:1': 8, 'c:1': 6 })(inUse),
      ...(inUse.includes('a:1') ? { direct: 2 * MBIT } : {}),
    }));
    story.run(120_000);
    story.settle();
    expect(new Set(story.inUse)).toEqual(new Set(['b:1', 'c:1']));
  });

  test('a candidate is not blamed for what happens to one other path at the same time', () => {
    const rates: Record<string, number> = { direct: 10, 'a:1': 3, 'b:1': 30, 'c:1': 8 };
    const story = new Story(['a:1', 'b:1', 'c:1'], (inUse) => apart(rates)(inUse));
    while (story.book.trial?.kind !== 'replace' && story.now < 60_000) story.run(500);
    expect(story.book.trial?.detours).toEqual(['c:1']);
    expect(story.book.trial?.displaced).toBe('a:1');
    story.run(500);
    rates['b:1'] = 2;
    story.run(25_000);
    expect(story.inUse).toContain('c:1');
    expect(beliefs(story.experience, PREFIX, ['c:1'], 0, story.now)[0]?.measured).toBeGreaterThan(5 * MBIT);
  });

  test('where nothing changes, looking for something better becomes rare', () => {
    const rates: Record<string, number> = { direct: 10, 'a:1': 20, 'b:1': 20 };
    const names = ['a:1', 'b:1', 'c:1', 'd:1', 'e:1', 'f:1', 'g:1', 'h:1'];
    for (const name of names.slice(2)) rates[name] = 0.5;
    const story = new Story(names, apart(rates));
    story.run(600_000);
    const late = story.run(600_000).filter(({ act }) => act === 'replace');
    // Each trial that fails is two of them. The budget alone would allow a hundred.
    expect(late.length).toBeLessThanOrEqual(60);
    story.settle();
    expect(new Set(story.inUse)).toEqual(new Set(['a:1', 'b:1']));
  });

  test('a parked path is given another chance when the connection becomes slower than it was with it', () => {
    let shared = true;
    const story = new Story(['a:1'], (inUse) => (shared ? together(10)(inUse) : apart({ direct: 4, 'a:1': 5 })(inUse)));
    story.minAgeMs = 4_000;
    story.run(20_000);
    expect(story.present.get('a:1')).toBe('backup');
    shared = false;
    story.run(15_000);
    expect(story.present.get('a:1')).toBe('active');
  });

  test('an application that sets the pace is not made to wait for slower paths, and gets faster ones', () => {
    const story = new Story(['slow:1', 'fast:1'], apart({ direct: 0.1, 'slow:1': 0.02, 'fast:1': 0.02 }));
    story.candidates = [candidate('slow:1', 20), candidate('fast:1', 5)];
    story.busy = 0.1;
    story.rtts = { direct: 50, 'slow:1': 120, 'fast:1': 20 };
    story.run(20_000);
    expect(story.present.get('slow:1')).toBe('backup');
    expect(story.present.get('fast:1')).toBe('active');
    // Once there is something to carry, both may help again.
    story.busy = 1;
    story.rates = apart({ direct: 10, 'slow:1': 10, 'fast:1': 10 });
    story.run(25_000);
    expect(story.present.get('slow:1')).toBe('active');
  });

  test('a path that swallows what it is given is let go, and its detour backs off', () => {
    const story = new Story(['a:1'], apart({ direct: 10, 'a:1': 10 }));
    story.run(10_000);
    fold(
      story.book.observation,
      [
        reading(DIRECT, { bytesAcked: 2e7, busyMs: 10_500 }),
        reading('a:1', { bytesAcked: story.counters.get('a:1')?.acked ?? 0, busyMs: 10_500, unacked: 30, backoff: 1 }),
      ],
      10_500,
    );
    story.now = 11_000;
    fold(
      story.book.observation,
      [
        reading(DIRECT, { bytesAcked: 3e7, busyMs: 11_000 }),
        reading('a:1', { bytesAcked: story.counters.get('a:1')?.acked ?? 0, busyMs: 11_000, unacked: 30, backoff: 2 }),
      ],
      11_000,
    );
    expect(story.ask()).toMatchObject([{ act: 'retire', detour: 'a:1' }]);
    expect(beliefs(story.experience, PREFIX, ['a:1'], 0, 11_000)[0]?.retryAt).toBeGreaterThan(11_000);
  });

  test('mode backup keeps detours in reserve and never experiments', () => {
    const story = new Story(['a:1', 'b:1', 'c:1'], apart({ direct: 10 }));
    story.mode = 'backup';
    story.run(120_000);
    expect(story.decisions).toMatchObject([
      { act: 'add', detour: 'a:1', backup: true },
      { act: 'add', detour: 'b:1', backup: true },
    ]);
  });

  test('mode failover joins only while the direct path is dead, and lets go once it works again', () => {
    const story = new Story(['a:1', 'b:1'], apart({ direct: 10, 'a:1': 5, 'b:1': 5 }));
    story.mode = 'failover';
    expect(story.run(20_000)).toEqual([]);
    story.directAlive = false;
    story.rates = apart({ 'a:1': 5, 'b:1': 5 });
    expect(story.run(500).map(({ act }) => act)).toEqual(['add', 'add']);
    story.run(20_000);
    expect(story.inUse.length).toBe(2);
    story.directAlive = true;
    story.run(12_000);
    expect(story.present.size).toBe(0);
  });

  test('a direct path that was dead carries again before anybody asks what the others add', () => {
    const story = new Story(['a:1'], apart({ direct: 10, 'a:1': 9 }));
    story.run(5_000);
    story.directAlive = false;
    story.rates = apart({ 'a:1': 9 });
    story.run(10_000);
    story.directAlive = true;
    const [back, from] = [story.now, story.decisions.length];
    // Slow start.
    story.rates = (inUse) => apart({ direct: Math.min(10, (story.now - back) / 200), 'a:1': 9 })(inUse);
    story.run(10_000);
    story.settle();
    const asked = story.decisions.slice(from).filter(({ act }) => act === 'backup');
    for (const { at } of asked) expect(at).toBeGreaterThanOrEqual(back + 5_000);
    expect(story.inUse).toEqual(['a:1']);
  });

  test('only one of many connections tries a candidate for a prefix at a time', () => {
    const experience = emptyExperience();
    const rates = apart({ direct: 10, 'a:1': 1, 'b:1': 1, 'c:1': 20 });
    const stories = Array.from({ length: 10 }, () => new Story(['a:1', 'b:1', 'c:1'], rates, experience));
    for (let round = 0; round < 60; round++) {
      for (const story of stories) story.run(500);
      const trying = stories.filter(({ book }) => book.trial?.kind === 'replace' && book.trial.detours[0] === 'c:1');
      expect(trying.length).toBeLessThanOrEqual(1);
    }
  });

  test('attempts are bounded, whatever becomes of them', () => {
    const story = new Story(['a:1', 'b:1', 'c:1', 'd:1'], apart({ direct: 10 }));
    let joins = 0;
    for (let second = 0; second < 300; second++) {
      for (const { act } of story.run(1_000)) if (act === 'add' || act === 'replace') joins++;
      // Every join vanishes within a second, and every detour answers again at once.
      story.present.clear();
      for (const { key } of story.candidates) forgive(story.experience, key);
    }
    expect(joins).toBeGreaterThan(4);
    expect(joins).toBeLessThanOrEqual(8 + 300 / 12);
  });

  test('the same history and the same draws give the same decisions', () => {
    const once = (): unknown => {
      const story = new Story(['a:1', 'b:1', 'c:1'], apart({ direct: 10, 'a:1': 2, 'b:1': 12, 'c:1': 15 }));
      story.run(120_000);
      return story.decisions;
    };
    expect(once()).toEqual(once());
  });

  test.each([1, 2, 3, 4])('whatever happens around it, only what is possible is decided (history %i)', (seed) => {
    const roll = dice(seed);
    const pick = <T>(all: readonly T[]): T | undefined => all[Math.floor(roll() * all.length)];
    const names = ['a:1', 'b:1', 'c:1', 'd:1', 'e:1'];
    const modes: readonly Mode[] = ['aggregate', 'aggregate', 'aggregate', 'backup', 'failover'];
    const book = openBook(0);
    const experience = emptyExperience();
    const present = new Map<string, Present['state']>();
    const counters = new Map<string, number>();
    let [now, limit, directAlive, mode] = [0, 2, true, pick(modes) ?? 'aggregate'];
    let usable = new Set(names);
    let decided = 0;
    for (let round = 0; round < 20_000; round++) {
      now += roll() < 0.9 ? 500 : Math.floor(roll() * 10_000);
      if (roll() < 0.02) present.delete(pick([...present.keys()]) ?? '');
      if (roll() < 0.02) usable = new Set(names.filter(() => roll() < 0.7));
      if (roll() < 0.005) limit = Math.floor(roll() * 4);
      if (roll() < 0.01) directAlive = roll() < 0.8;
      if (roll() < 0.002) mode = pick(modes) ?? mode;
      for (const [key, state] of present) if (state === 'pending' && roll() < 0.5) present.set(key, 'active');
      const readings = [DIRECT, ...present.keys()].map((path) => {
        const stuck = roll() < 0.03;
        counters.set(path, (counters.get(path) ?? 0) + (stuck ? 0 : roll() * 5e6));
        return reading(path, { bytesAcked: counters.get(path) ?? 0, busyMs: now * roll(), unacked: stuck ? 5 : 0 });
      });
      fold(book.observation, readings, now);
      const situation = {
        prefix: PREFIX,
        ageMs: now,
        limit,
        directAlive,
        present: [...present].map(([detour, state]) => ({ detour, name: detour, state })),
        candidates: names.filter((key) => usable.has(key) && !present.has(key)).map((key) => candidate(key)),
      };
      const decisions = decide({ mode, minAgeMs: 0, score: thompson }, experience, book, situation, now, roll);
      decided += decisions.length;
      const touched = decisions.flatMap((one) => (one.act === 'replace' ? [one.detour, one.by] : [one.detour]));
      expect(new Set(touched).size, JSON.stringify(decisions)).toBe(touched.length);
      for (const one of decisions) {
        expect(one.why).not.toBe('');
        if (one.act === 'add') {
          expect(situation.candidates.map(({ key }) => key)).toContain(one.detour);
          present.set(one.detour, one.backup ? 'backup' : 'pending');
        } else {
          expect(present.has(one.detour), JSON.stringify(decisions)).toBe(true);
          if (one.act === 'backup' || one.act === 'restore') {
            present.set(one.detour, one.act === 'backup' ? 'backup' : 'active');
          } else present.delete(one.detour);
          if (one.act === 'replace') {
            expect(situation.candidates.map(({ key }) => key)).toContain(one.by);
            present.set(one.by, 'pending');
          }
        }
      }
      if (decisions.some(({ act }) => act === 'add')) expect(present.size).toBeLessThanOrEqual(limit);
      expect(Number.isFinite(book.budget) && Number.isFinite(book.attempts)).toBe(true);
    }
    expect(decided).toBeGreaterThan(100);
  });

  test('every path, used or not, has an explanation', () => {
    const story = new Story(['a:1', 'b:1', 'c:1'], apart({ direct: 10, 'a:1': 2, 'b:1': 12, 'c:1': 15 }));
    story.run(30_000);
    const terms = { mode: 'aggregate', minAgeMs: 0, score: thompson } as const;
    const rows = explain(terms, story.experience, story.book, story.situation(), story.now);
    expect(rows.map(({ path }) => path).sort()).toEqual(['a:1', 'b:1', 'c:1', DIRECT]);
    for (const { path, why } of rows) if (path !== DIRECT) expect(why).not.toBe('');
  });
});
