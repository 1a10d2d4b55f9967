import { beforeAll, describe, expect, it } from 'vitest';
import { Laboratory } from '../lab/experiment.ts';
import { requireVm } from '../lab/netns.ts';
import { readScenario } from '../lab/topology.ts';
import { loadModules } from './modules.ts';

const SCENARIO = readScenario({
  name: 'vm',
  client: 'client',
  server: 'server',
  nodes: { detour: { router: true } },
  links: {
    access: { between: ['client', 'gateway'] },
    core: { between: ['gateway', 'server'], rateMbit: 4, delayMs: 10, lossPercent: 0.1 },
    out: { between: ['gateway', 'detour'], rateMbit: 4, delayMs: 30 },
    back: { between: ['detour', 'server'], delayMs: 5 },
  },
  traffic: [{ kind: 'transfer', bytes: 4_000_000 }],
  events: [
    { atS: 2, link: 'core', does: 'shape', to: { rateMbit: 4, delayMs: 10, lossPercent: 100 } },
    { atS: 3, link: 'out', does: 'shape', to: { rateMbit: 8, delayMs: 60 } },
  ],
  ways: { nat: { agent: { strategy: 'nat' } } },
});

describe.runIf(requireVm('laboratories with delay'))('a laboratory with delay', () => {
  beforeAll(loadModules);

  it('carries on by the detour once the direct path loses everything', async () => {
    await using laboratory = new Laboratory();
    const { runs } = await laboratory.play(SCENARIO, { trials: 1 });
    const outcome = runs[0]?.outcomes[0];
    if (outcome?.kind !== 'transfer') throw new Error('no transfer');
    expect(outcome.bytes).toBe(4_000_000);
    expect(outcome.paths.map(({ name }) => name).toSorted()).toEqual(['detour', 'direct']);
    expect(outcome.paths.find(({ name }) => name === 'detour')?.bytes).toBeGreaterThan(1_000_000);
    expect(runs[0]?.events.map(({ what }) => what)).toEqual(['core changed', 'out changed']);
    expect(outcome.congestion).toBe('cubic');
  });
});
