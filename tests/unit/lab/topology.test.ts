import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { parse } from 'yaml';
import { SCENARIOS } from '../../lab/scenarios.ts';
import { needsWire, planOf, readScenario, type Scenario, ScenarioError } from '../../lab/topology.ts';

/** As a user would write it. */
const TEXT = `
name: mine
about: a detour round a lossy way
client: client
server: server
nodes:
  detour: { router: true }
  server: { subflows: 4, sysctls: { net.ipv4.tcp_sack: 0 } }
links:
  access: { between: [client, gateway], rateMbit: 20, queueMs: 40 }
  core: { between: [gateway, server], lossPercent: 2 }
  out: { between: [gateway, detour] }
  back: { between: [detour, server] }
traffic:
  - { kind: transfer, seconds: 10 }
  - { kind: messages, atS: 2, count: 20 }
events:
  - { atS: 5, link: core, does: blackhole }
  - { atS: 6, link: core, does: shape, to: { delayMs: 30 } }
  - { atS: 7, node: detour, does: kill }
ways:
  alone: { transport: tcp }
  ours: { agent: { strategy: 'nat,vpn' } }
  around: { transport: tcp, via: detour, family: 6 }
`;

function problemsOf(change: (scenario: Record<string, unknown>) => void): readonly string[] {
  const value: Record<string, unknown> = parse(TEXT);
  change(value);
  try {
    readScenario(value);
  } catch (error) {
    if (error instanceof ScenarioError) return error.problems;
    throw error;
  }
  return [];
}

describe('the description of a laboratory', () => {
  it('is read from YAML, with what it leaves out', () => {
    const scenario = readScenario(parse(TEXT));
    expect(scenario.nodes).toEqual({
      detour: { router: true, sysctls: {} },
      server: { router: false, subflows: 4, sysctls: { 'net.ipv4.tcp_sack': '0' } },
    });
    expect(scenario.traffic).toEqual([
      { kind: 'transfer', atS: 0, direction: 'up', seconds: 10 },
      { kind: 'messages', atS: 2, count: 20, everyMs: 100 },
    ]);
    expect(scenario.ways).toEqual({
      alone: { transport: 'tcp', family: 4 },
      ours: { transport: 'mptcp', family: 4, agent: { strategy: 'nat,vpn', mode: 'aggregate', maxPaths: 2 } },
      around: { transport: 'tcp', family: 6, via: 'detour' },
    });
    expect(scenario.events).toHaveLength(3);
  });

  it('is the same again when it is read from what was read', () => {
    const scenario = readScenario(parse(TEXT));
    expect(readScenario(JSON.parse(JSON.stringify(scenario)))).toEqual(scenario);
    for (const known of SCENARIOS.values()) expect(readScenario(JSON.parse(JSON.stringify(known)))).toEqual(known);
  });

  it('is as docs/laboratory.md has it', () => {
    const page = readFileSync(join(import.meta.dirname, '../../../docs/laboratory.md'), 'utf8');
    const example = /```yaml\n([^`]*)```/.exec(page)?.[1] ?? '';
    const scenario = readScenario(parse(example));
    expect(Object.keys(scenario.ways)).toEqual(['tcp', 'mptcp', 'nat', 'tcp_nat', 'nat6']);
    expect(scenario.events).toHaveLength(2);
  });

  it('tells everything that is wrong at once', () => {
    expect(
      problemsOf((value) => {
        Object.assign(value, {
          name: 'My Scenario',
          colour: 'red',
          traffic: [{ kind: 'transfer' }, { kind: 'flood' }],
        });
        Object.assign(value, { ways: { fast: { transport: 'quic', agent: { maxPaths: 9 } } } });
      }),
    ).toEqual([
      'colour: is not known; there are name, about, client, server, congestion, nodes, links, traffic, events, ways',
      'name: must be 1 to 30 small letters, digits or _',
      'traffic[0]: needs either seconds or bytes',
      'traffic[1].kind: must be one of transfer, messages, flows',
      'traffic[1]: needs either seconds or bytes',
      'ways.fast.transport: must be one of mptcp, tcp',
      'ways.fast.agent.maxPaths: must be a number from 1 to 8',
    ]);
  });

  it.each<[string, unknown, string]>([
    ['links', [], 'links: must be a map'],
    ['links', { a: { between: ['client'] } }, 'links.a.between: must be two different nodes'],
    ['links', { a: { between: ['client', 'client'] } }, 'links.a.between: must be two different nodes'],
    [
      'links',
      { a: { between: ['client', 'Server'] } },
      'links.a.between[1]: must be the name of a node: a small letter, then up to 11 more or digits',
    ],
    [
      'links',
      { a: { between: ['client', 'server'], queueMs: 5 } },
      'links.a.queueMs: needs rateMbit: without a rate nothing waits',
    ],
    [
      'links',
      { a: { between: ['client', 'server'], lossPercent: 101 } },
      'links.a.lossPercent: must be a number from 0 to 100',
    ],
    ['client', 'nobody', "client: no link names 'nobody'; there are client, gateway, server, detour"],
    ['server', 'client', 'server: is the client itself'],
    [
      'server',
      undefined,
      'server: is missing; it must be the name of a node: a small letter, then up to 11 more or digits',
    ],
    ['ways', {}, 'ways: needs at least one'],
    ['ways', { a: { via: 'server' } }, "ways.a.via: 'server' runs no router; those that do: detour"],
    [
      'ways',
      { a: { transport: 'tcp', agent: {} } },
      'ways.a.agent: has nothing to do for plain TCP; let transport be mptcp',
    ],
    ['nodes', {}, 'ways.ours.agent: there is no detour; let a node be a router'],
    ['nodes', { detour: { router: 'yes' } }, 'nodes.detour.router: must be true or false'],
    ['traffic', [], 'traffic: needs at least one'],
    [
      'events',
      [{ atS: 1, link: 'moon', does: 'restore' }],
      "events[0].link: no 'moon'; there are access, core, out, back",
    ],
    ['events', [{ atS: 1, node: 'server', does: 'kill' }], "events[0].node: nothing of ours runs on 'server'"],
    ['events', [{ atS: -1, link: 'core', does: 'restore' }], 'events[0].atS: must be a number from 0 to 3600'],
  ])('says where it is wrong: %s', (key, wrong, complaint) => {
    expect(
      problemsOf((value) => {
        value[key] = wrong;
      }),
    ).toContain(complaint);
  });

  it('says that a part cannot be reached', () => {
    const problems = problemsOf((value) => {
      Object.assign(value['links'] as object, { island: { between: ['palm', 'beach'] } });
    });
    expect(problems).toEqual(['links: none leads from client to palm', 'links: none leads from client to beach']);
  });

  it('knows which links delay or lose, at once or by an event', () => {
    const wired = (scenario: Scenario): string[] =>
      Object.keys(scenario.links).filter((link) => needsWire(scenario, link));
    expect(wired(readScenario(parse(TEXT)))).toEqual(['core']);
    const { core: _, ...links } = parse(TEXT).links;
    const whole = { ...links, core: { between: ['gateway', 'server'] } };
    expect(wired(readScenario({ ...parse(TEXT), links: whole }))).toEqual(['core']);
    expect(wired(readScenario({ ...parse(TEXT), links: whole, events: [] }))).toEqual([]);
  });
});

describe('the plan', () => {
  const easy = SCENARIOS.get('easy');
  if (!easy) throw new Error('no easy');
  const { addresses, routes } = planOf(easy);
  const hop = (node: string, to: string): string | undefined =>
    routes.find((route) => route.node === node && route.to === to)?.via;

  it('numbers the links in their order', () => {
    expect(addresses['client']).toEqual([{ v4: '10.64.0.1', v6: 'fd64:0::1' }]);
    expect(addresses['r1']?.map(({ v4 }) => v4)).toEqual(['10.64.0.2', '10.64.1.1', '10.64.3.1']);
    expect(addresses['detour']).toEqual([{ v4: '10.64.5.2', v6: 'fd64:5::2' }]);
  });

  it('leads over the fewest links: the direct way by the core, the other by the detour', () => {
    expect(hop('client', 'default')).toBe('10.64.0.2');
    expect(hop('client', '::/0')).toBe('fd64:0::2');
    expect(hop('r1', '10.64.2.2/32')).toBe('10.64.1.2');
    expect(hop('r1', 'fd64:2::2/128')).toBe('fd64:1::2');
    expect(hop('r1', '10.64.5.2/32')).toBe('10.64.3.2');
    expect(hop('r3', '10.64.2.2/32')).toBe('10.64.4.2');
    expect(hop('r2', '10.64.0.1/32')).toBe('10.64.1.1');
    expect(hop('r3', '10.64.0.1/32')).toBe('10.64.3.1');
  });

  it('reaches a node by the nearest link, whichever of its addresses is meant', () => {
    const small = SCENARIOS.get('small');
    const found = small && planOf(small).routes.find(({ node, to }) => node === 'detour' && to === '10.64.1.2/32');
    expect(found?.via).toBe('10.64.3.2');
  });
});
