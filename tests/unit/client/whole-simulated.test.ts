import { describe, expect, test } from 'vitest';
import type { Rules } from '../../../appliance/client/state.ts';
import { oracle, play } from '../../sim/play.ts';
import { alone } from '../../sim/policies.ts';
import { flapping, hour, THESIS } from '../../sim/scenarios.ts';
import { Whole } from '../../sim/whole.ts';

/** The manager and the chooser together; none of these seeds was used for tuning. */
const RULES: Rules = {
  maxPaths: 2,
  targets: [],
  exclude: [],
  rescue: false,
  mode: 'aggregate',
  minAgeMs: 0,
  kinds: ['nat'],
  ordered: false,
};
const SECOND = 1_000;

describe('manager and chooser over simulated networks', () => {
  test('regret over an hour of changes and outages is at most 10 %, and what is believed is what is there', {
    timeout: 120_000,
  }, () => {
    const regrets = [201, 202, 203].map((seed) => {
      const plan = hour(seed);
      const whole = new Whole(plan, RULES, seed);
      whole.run(3_600 * SECOND);
      expect(whole.mistakes).toEqual([]);
      expect(whole.most).toBeLessThanOrEqual(1 + RULES.maxPaths);
      // The budget: eight joins, and one more every twelve seconds.
      expect(whole.joins).toBeLessThanOrEqual(8 + 3_600 / 12);
      const { believed, real } = whole.paths();
      expect(believed).toEqual(real);
      return 1 - whole.network.delivered / oracle(plan, 3_600 * SECOND);
    });
    expect(regrets.reduce((sum, one) => sum + one, 0) / regrets.length).toBeLessThanOrEqual(0.1);
  });

  test('a detour that flaps at 1 Hz for five minutes: attempts within the budget, no subflow leaked, and still a gain', {
    timeout: 60_000,
  }, () => {
    const plan = flapping(300 * SECOND);
    const whole = new Whole(plan, RULES, 41);
    whole.run(330 * SECOND);
    const direct = play(plan, alone, { seed: 41, ms: 330 * SECOND });
    const between = (seconds: readonly number[]): number => (seconds[304] ?? 0) - (seconds[14] ?? 0);
    expect(whole.mistakes).toEqual([]);
    expect(whole.most).toBeLessThanOrEqual(1 + RULES.maxPaths);
    expect(whole.joins).toBeLessThanOrEqual(8 + 330 / 12);
    expect(whole.paths().believed).toEqual(whole.paths().real);
    expect(between(whole.seconds)).toBeGreaterThan(between(direct.seconds));
  });

  test.each(Object.entries(THESIS))(
    'a sender of ten seconds goes on steadily, without being asked what its detour adds: %s',
    (_, plan) => {
      const whole = new Whole(plan, RULES, 7);
      whole.run(10 * SECOND);
      const rates = whole.seconds.map((bytes, index) => bytes - (whole.seconds[index - 1] ?? 0)).slice(3);
      expect(Math.min(...rates)).toBeGreaterThan(0.8 * Math.max(...rates));
    },
  );
});
