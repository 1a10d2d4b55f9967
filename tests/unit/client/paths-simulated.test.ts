import { describe, expect, test } from 'vitest';
import { thompson } from '../../../appliance/client/paths.ts';
import { oracle, play, type Run } from '../../sim/play.ts';
import { alone, ours, type Policy } from '../../sim/policies.ts';
import { eight, flapping, harmful, hour, narrow, THESIS } from '../../sim/scenarios.ts';

/**
 * The policy over simulated networks. Tuning used seeds 1 to 10, 101 to 108 and 301 to 312 of `hour`, 1 to 10 of `eight`,
 * 1 to 6 and 51 to 54 of `harmful`; the seeds here it did not use. The thesis's scenarios and the flapping detour are one
 * network each, seen while tuning: there only the noise is new.
 */
const detour = ours('ours', { score: thompson });
const HELD_OUT = [201, 202, 203, 204, 205, 206, 207, 208, 209, 210];
const SECOND = 1_000;

const mean = (values: readonly number[]): number => values.reduce((sum, one) => sum + one, 0) / values.length;

/** Bytes per second between two moments, in seconds. */
const rate = ({ seconds }: Run, from: number, to: number): number =>
  ((seconds[to - 1] ?? 0) - (seconds[from - 1] ?? 0)) / (to - from);

describe('over simulated networks', () => {
  test('regret against an oracle that knows the network is at most 10 % over an hour of changes', {
    timeout: 90_000,
  }, () => {
    const regrets = HELD_OUT.map((seed) => {
      const plan = hour(seed);
      const { connection } = play(plan, detour, { seed, ms: 3_600 * SECOND });
      return 1 - connection.delivered / oracle(plan, 3_600 * SECOND);
    });
    expect(mean(regrets)).toBeLessThanOrEqual(0.1);
    expect(Math.max(...regrets)).toBeLessThanOrEqual(0.12);
  });

  test.each(HELD_OUT)(
    'eight detours, two good: they carry nine tenths of detour bytes after a minute (seed %i)',
    (seed) => {
      const { plan, good } = eight(seed);
      const before = new Map<string, number>();
      const { connection } = play(plan, detour, {
        seed,
        ms: 120 * SECOND,
        watch: ({ now, carried }) => {
          if (now === 60 * SECOND) for (const [name, bytes] of carried) before.set(name, bytes);
        },
      });
      let all = 0;
      let onGood = 0;
      for (const [name, bytes] of connection.carried) {
        const since = bytes - (before.get(name) ?? 0);
        all += since;
        if (good.includes(name)) onGood += since;
      }
      expect(onGood / all).toBeGreaterThanOrEqual(0.9);
    },
  );

  test.each(Object.entries(THESIS))("the thesis's %s: at least 0.97 of direct alone", (name, plan) => {
    for (const seed of [31, 32, 33]) {
      const direct = rate(play(plan, alone, { seed, ms: 60 * SECOND }), 1, 60);
      const mine = rate(play(plan, detour, { seed, ms: 60 * SECOND }), 1, 60);
      expect(mine / direct).toBeGreaterThanOrEqual(0.97);
      // Where there is something to win, it is won: the thesis measured 1.9 to 2.2 times, and 1.5 in sym_lossy.
      const wins = { easy: 1.7, lossy: 1.7, delayed: 1.6, sym_lossy: 1.4 }[name];
      if (wins !== undefined) expect(mine / direct).toBeGreaterThanOrEqual(wins);
    }
  });

  test('a detour that flaps at 1 Hz for five minutes costs few attempts, leaks no subflow and helps nobody but itself', () => {
    const plan = flapping(300 * SECOND);
    let most = 0;
    const watch = ({ subflows }: Run['connection']): void => {
      most = Math.max(most, subflows.size);
    };
    const run = play(plan, detour, { seed: 41, ms: 330 * SECOND, watch });
    const direct = play(plan, alone, { seed: 41, ms: 330 * SECOND });
    expect(run.connection.joins).toBeLessThanOrEqual(8 + 330 / 12);
    expect(most).toBeLessThanOrEqual(3);
    expect(rate(run, 15, 305)).toBeGreaterThan(rate(direct, 15, 305));
  });

  test('where every detour does harm, ten minutes cost at most a twentieth', { timeout: 30_000 }, () => {
    for (const seed of [61, 62, 63, 64]) {
      const plan = harmful(seed);
      const direct = play(plan, alone, { seed, ms: 600 * SECOND }).connection.delivered;
      const mine = play(plan, detour, { seed, ms: 600 * SECOND }).connection.delivered;
      expect(mine / direct).toBeGreaterThanOrEqual(0.95);
    }
  });

  test.each([false, true])(
    'a detour that holds up the rest costs 50 MB at most a twentieth (seen by a receiver: %s)',
    (download) => {
      const early = ours('ours, from the first moment', { score: thompson, minAgeMs: 0 });
      for (const seed of [71, 72, 73]) {
        const options = { seed, ms: 120 * SECOND, bytes: 50e6, sampleMs: 250, download };
        const direct = play(narrow(), alone, options).connection.now;
        const mine = play(narrow(), early, options).connection.now;
        expect(direct / mine).toBeGreaterThanOrEqual(0.95);
        // And one as wide as the direct path is not taken for one.
        const wide = play(narrow(20), early, options).connection.now;
        expect(direct / wide).toBeGreaterThanOrEqual(1.5);
      }
    },
  );

  test('the same seeds give the same hour', () => {
    const once = (): number => play(hour(201), detour, { seed: 1, ms: 120 * SECOND }).connection.delivered;
    expect(once()).toBe(once());
  });

  test('what a connection remembers is bounded by its detours', () => {
    const sizes: number[] = [];
    const watch = (_: Run['connection'], { book }: Policy): void => {
      if (book) sizes.push(book.why.size, book.additive.size, book.parked.size, book.observation.flows.size);
    };
    const plan = hour(211);
    play(plan, detour, { seed: 1, ms: 900 * SECOND, watch });
    expect(Math.max(...sizes)).toBeLessThanOrEqual(Object.keys(plan.routes).length);
  });
});
