import { describe, expect, it } from 'vitest';
import { play, type TransferOutcome } from '../lab/experiment.ts';
import { requireRoot } from '../lab/netns.ts';
import { SCENARIOS } from '../lab/scenarios.ts';
import { readScenario, type Scenario } from '../lab/topology.ts';

/** Nothing but bytes decides when these end, so that they measure nothing and depend on no clock. */
function small(more: object): Scenario {
  return readScenario({ ...JSON.parse(JSON.stringify(SCENARIOS.get('small'))), events: [], ...more });
}

function transfer(result: Awaited<ReturnType<typeof play>>, index = 0): TransferOutcome {
  const outcome = result.runs[index]?.outcomes[0];
  if (outcome?.kind !== 'transfer') throw new Error('no transfer');
  return outcome;
}

const BYTES = 3_000_000;

describe.runIf(requireRoot('laboratories'))('a laboratory', () => {
  it('sends the same each way that is asked for, and tells which paths carried it', async () => {
    const scenario = small({
      traffic: [
        { kind: 'transfer', bytes: BYTES },
        { kind: 'messages', count: 5, everyMs: 20 },
      ],
      ways: { tcp: { transport: 'tcp' }, nat: { agent: {} }, around: { transport: 'tcp', via: 'detour' } },
    });
    const result = await play(scenario, { trials: 1 });
    expect(result.runs.map(({ way }) => way)).toEqual(['tcp', 'nat', 'around']);
    const [tcp, nat, around] = [transfer(result), transfer(result, 1), transfer(result, 2)];
    for (const one of [tcp, nat, around]) {
      expect(one.bytes).toBe(BYTES);
      expect(one.slots.reduce((sum, slot) => sum + slot, 0)).toBe(BYTES);
    }
    expect(tcp.mptcp).toBe(false);
    expect(tcp.paths.map(({ name }) => name)).toEqual(['direct']);
    expect(nat.mptcp).toBe(true);
    expect(nat.paths.map(({ name }) => name).toSorted()).toEqual(['detour', 'direct']);
    expect(around.paths.map(({ name }) => name)).toEqual(['detour']);
    expect(result.runs.map(({ outcomes }) => outcomes[1]?.kind === 'messages' && outcomes[1].latencies.length)).toEqual(
      [5, 5, 5],
    );
    expect(result.machine.congestionControl).toMatch(/^\w+$/);
  });

  it('lets happen what is written, puts it back afterwards, and names paths at a client that receives', async () => {
    const scenario = small({
      traffic: [{ kind: 'transfer', direction: 'down', bytes: 2 * BYTES }],
      events: [
        { atS: 0.2, link: 'core', does: 'blackhole' },
        { atS: 0.2, link: 'out', does: 'shape', to: { rateMbit: 20, lossPercent: 0.1 } },
      ],
    });
    const result = await play(scenario, { trials: 2 });
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

  it('loses packets by chance without netem', async () => {
    const scenario = small({
      links: {
        ...SCENARIOS.get('small')?.links,
        core: { between: ['gateway', 'server'], lossPercent: 100 },
      },
      traffic: [{ kind: 'flows', count: 3, bytes: 10_000 }],
      // Nothing arrives directly, so whatever arrives went around.
      ways: { around: { transport: 'tcp', via: 'detour' } },
    });
    const [run] = (await play(scenario, { trials: 1 })).runs;
    expect(run?.outcomes[0]?.kind === 'flows' && run.outcomes[0].completions.length).toBe(3);
  });

  it('says what it cannot do on this kernel', async () => {
    const scenario = SCENARIOS.get('delayed');
    if (!scenario) throw new Error('no scenario');
    await expect(play(scenario, { trials: 1 })).rejects.toThrow('links with delay');
  });
});
