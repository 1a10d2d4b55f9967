import { describe, expect, it } from 'vitest';
import { Laboratory, type Result, type TransferOutcome } from '../lab/experiment.ts';
import { requireRoot } from '../lab/netns.ts';
import { SCENARIOS } from '../lab/scenarios.ts';
import { readScenario, type Scenario } from '../lab/topology.ts';

const BYTES = 1_000_000;

/** Nothing but bytes decides when these end, so that they measure nothing and depend on no clock. */
function small(more: object): Scenario {
  return readScenario({ ...JSON.parse(JSON.stringify(SCENARIOS.get('small'))), events: [], ...more });
}

function transfer({ runs }: Result, index = 0): TransferOutcome {
  const outcome = runs[index]?.outcomes[0];
  if (outcome?.kind !== 'transfer') throw new Error('no transfer');
  return outcome;
}

describe.runIf(requireRoot('laboratories'))('a laboratory', () => {
  it('sends the same each way that is asked for, and tells which paths carried it', async () => {
    await using laboratory = new Laboratory();
    const result = await laboratory.play(
      small({
        congestion: 'reno',
        traffic: [
          { kind: 'transfer', bytes: BYTES },
          { kind: 'messages', count: 5, everyMs: 20 },
        ],
        ways: { tcp: { transport: 'tcp' }, nat: { agent: {} }, around: { transport: 'tcp', via: 'detour' } },
      }),
      { trials: 1 },
    );
    expect(result.runs.map(({ way }) => way)).toEqual(['tcp', 'nat', 'around']);
    const [tcp, nat, around] = [transfer(result), transfer(result, 1), transfer(result, 2)];
    for (const one of [tcp, nat, around]) {
      expect(one.bytes).toBe(BYTES);
      expect(one.slots.reduce((sum, slot) => sum + slot, 0)).toBe(BYTES);
      expect(one.congestion).toBe('reno');
    }
    expect(tcp.mptcp).toBe(false);
    expect(tcp.paths.map(({ name }) => name)).toEqual(['direct']);
    expect(nat.mptcp).toBe(true);
    expect(nat.paths.map(({ name }) => name).toSorted()).toEqual(['detour', 'direct']);
    expect(around.paths.map(({ name }) => name)).toEqual(['detour']);
    for (const { outcomes } of result.runs)
      expect(outcomes[1]?.kind === 'messages' && outcomes[1].latencies.length).toBe(5);
  });

  it('lets happen what is written, puts it back afterwards, and names paths at a client that receives', async () => {
    await using laboratory = new Laboratory();
    const scenario = small({
      traffic: [{ kind: 'transfer', direction: 'down', bytes: 2 * BYTES }],
      events: [
        { atS: 0.2, link: 'core', does: 'blackhole' },
        { atS: 0.2, link: 'out', does: 'shape', to: { rateMbit: 20, lossPercent: 0.1 } },
      ],
    });
    const result = await laboratory.play(scenario, { trials: 2 });
    expect(result.runs.map(({ trial }) => trial)).toEqual([1, 2]);
    for (const index of [0, 1]) {
      // Each began on the direct path, so the silence of the first had ended.
      const { bytes, paths } = transfer(result, index);
      expect(bytes).toBe(2 * BYTES);
      expect(paths[0]?.name).toBe('direct');
      expect(paths.find(({ name }) => name === 'detour')?.bytes).toBeGreaterThan(BYTES);
      expect(result.runs[index]?.events.map(({ what }) => what).toSorted()).toEqual(['core lost', 'out changed']);
    }
  });

  it('delays and loses on any kernel, and changes that between two scenarios on one network', async () => {
    await using laboratory = new Laboratory();
    const { access, out, back } = SCENARIOS.get('small')?.links ?? {};
    const played = async (core: object): Promise<number> => {
      const scenario = small({
        links: { access, core: { between: ['gateway', 'server'], lossPercent: 0.01, ...core }, out, back },
        traffic: [{ kind: 'messages', count: 5, everyMs: 20 }],
        ways: { tcp: { transport: 'tcp' } },
      });
      const [run] = (await laboratory.play(scenario, { trials: 1 })).runs;
      return run?.outcomes[0]?.kind === 'messages' ? Math.min(...run.outcomes[0].latencies) : Number.NaN;
    };
    expect(await played({ delayMs: 150 })).toBeGreaterThanOrEqual(300);
    expect(await played({ delayMs: 20 })).toBeLessThan(300);
    const around = small({
      links: { access, core: { between: ['gateway', 'server'], lossPercent: 100 }, out, back },
      traffic: [{ kind: 'flows', count: 3, bytes: 10_000 }],
      // Nothing arrives directly, so whatever arrives went around.
      ways: { around: { transport: 'tcp', via: 'detour' } },
    });
    const [run] = (await laboratory.play(around, { trials: 1 })).runs;
    expect(run?.outcomes[0]?.kind === 'flows' && run.outcomes[0].completions.length).toBe(3);
  });
});
