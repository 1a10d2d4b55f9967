import { describe, expect, test } from 'vitest';
import type { Rules } from '../../../appliance/client/state.ts';
import { Agent, type Circumstances } from '../../sim/agent.ts';

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
const CALM: Circumstances = {
  seed: 1,
  detours: 4,
  arrivals: 2,
  lifeMs: 30_000,
  upMs: 1e12,
  downMs: 1,
  loss: 0,
  breakMs: 1e12,
};
const MINUTE = 60_000;

/** Everything healed, all that was under way over, and every back-off run out: what is left is what it stays like. */
function quiet(agent: Agent): void {
  agent.settle();
  agent.run(3 * MINUTE);
}

describe('the manager over simulated time', () => {
  test('an hour of connections that come and go leaves nothing behind', () => {
    const agent = new Agent(RULES, CALM);
    agent.run(60 * MINUTE);
    expect(agent.mistakes).toEqual([]);
    quiet(agent);
    agent.run(15 * MINUTE);
    expect(agent.kernel.size).toBe(0);
    expect(agent.state.connections.size).toBe(0);
    expect(agent.state.due.size).toBe(0);
    expect(agent.state.leases.size).toBe(0);
  });

  test.each([1, 2, 3, 4, 5, 6])(
    'whatever broke, vanished or got lost: once all is well, every connection has what it could have (seed %i)',
    (seed) => {
      const agent = new Agent(RULES, {
        ...CALM,
        seed,
        detours: 5,
        arrivals: 0.5,
        lifeMs: 20 * MINUTE,
        upMs: 2 * MINUTE,
        downMs: 20_000,
        loss: 0.02,
        breakMs: 5 * MINUTE,
      });
      agent.run(20 * MINUTE);
      expect(agent.mistakes).toEqual([]);
      expect(agent.kernel.size).toBeGreaterThan(50);
      for (const { subflows, accepts } of agent.kernel.values()) {
        expect(subflows.filter(({ established, detour }) => established && detour).length).toBeLessThanOrEqual(
          accepts + 1,
        );
      }
      quiet(agent);
      expect(agent.mistakes).toEqual([]);
      expect(agent.differences()).toEqual([]);
    },
  );

  test('detours that flap for five minutes get a bounded number of joins', () => {
    const agent = new Agent(RULES, { ...CALM, arrivals: 0, detours: 2, upMs: 500, downMs: 500 });
    const tokens = Array.from({ length: 10 }, () => agent.open(1e9));
    agent.run(5 * MINUTE);
    for (const token of tokens) {
      // Two paths; each backs off from 1 s to a minute, and begins anew only after half a minute that went well.
      expect(agent.joinsOf.get(token) ?? 0).toBeLessThanOrEqual(30);
    }
    quiet(agent);
    expect(agent.differences()).toEqual([]);
  });
});
