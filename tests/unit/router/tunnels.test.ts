import { describe, expect, it } from 'vitest';
import {
  contains,
  formatAddress,
  type Prefix,
  parseAddress,
  parsePrefix,
} from '../../../appliance/protocol/address.ts';
import {
  gatewayOf,
  MOST_TUNNELS,
  type Networks,
  overlapping,
  TUNNELS_PER_KEY,
  type Tunnel,
  type TunnelPlan,
  Tunnels,
} from '../../../appliance/router/tunnels.ts';

const prefix = (text: string): Prefix => {
  const parsed = parsePrefix(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const NETWORKS: Networks = {
  v4: prefix('10.215.0.0/16'),
  v6: prefix('fd0d:e70::/48'),
  reserve: prefix('198.19.0.0/16'),
};
const key = (n: number): Uint8Array => new Uint8Array(32).map((_, at) => (at < 4 ? (n >> (8 * at)) & 255 : 7));
const tunnels = (networks: Partial<Networks> = {}): Tunnels => new Tunnels({ ...NETWORKS, ...networks }, 600);
const ask = (n: number, over: Partial<{ owner: number; choice: number; lifetime: number }> = {}) => ({
  owner: 1,
  publicKey: key(n),
  choice: 0,
  lifetime: 600,
  ...over,
});
const granted = (plan: TunnelPlan): TunnelPlan & { kind: 'grant' } => {
  if (plan.kind !== 'grant') throw new Error(JSON.stringify(plan));
  return plan;
};
const grant = (table: Tunnels, what: ReturnType<typeof ask>, now: number): Tunnel =>
  table.commit(granted(table.plan(what, now)), now);
const show = ({ v4, v6 }: Tunnel): string => [v4, v6].map((one) => (one ? formatAddress(one) : '-')).join(' ');

describe('addresses inside tunnels', () => {
  it('are of the networks, no end of them, and nobody else has them', () => {
    const table = tunnels({ v4: prefix('10.215.0.0/20') });
    const seen = new Set<string>();
    for (let n = 0; n < MOST_TUNNELS; n++) {
      const { v4, v6 } = grant(table, ask(n, { owner: n >> 3 }), 0);
      if (!v4 || !v6) throw new Error('an address is missing');
      expect(contains(prefix('10.215.0.0/20'), v4) && contains(prefix('fd0d:e70::/48'), v6)).toBe(true);
      for (const address of [v4, v6]) seen.add(formatAddress(address));
    }
    expect(seen.size).toBe(2 * MOST_TUNNELS);
    for (const taken of ['10.215.0.0', '10.215.0.1', '10.215.15.255', 'fd0d:e70::', 'fd0d:e70::1'])
      expect(seen).not.toContain(taken);
    expect(table.plan(ask(MOST_TUNNELS, { owner: 1_000 }), 0)).toMatchObject({ result: 'NO_RESOURCES' });
  });

  it('are the same for the same key, here and in a router that forgot', () => {
    const first = grant(tunnels(), ask(1), 0);
    expect(show(grant(tunnels(), ask(1), 0))).toBe(show(first));
    expect(show(grant(tunnels(), ask(2), 0))).not.toBe(show(first));
  });

  it('are others for every choice, every second of them out of the reserve', () => {
    const table = tunnels();
    const all = [0, 1, 2, 3].map((choice) => grant(table, ask(1, { choice }), 0));
    expect(new Set(all.map(show)).size).toBe(4);
    const reserved = all.map(({ v4 }) => v4 !== null && contains(prefix('198.19.0.0/16'), v4));
    expect(reserved).toEqual([false, true, false, true]);
    expect(table.size).toBe(1);
    const other = tunnels({ reserve: null });
    expect(grant(other, ask(1, { choice: 1 }), 0).v4).toSatisfy((v4: Tunnel['v4']) => v4?.value !== all[0]?.v4?.value);
  });

  it('fill the smallest network, and are kept from others for two minutes', () => {
    const table = tunnels({ v4: prefix('10.215.0.0/30'), v6: null, reserve: null });
    const only = grant(table, ask(1), 0);
    expect(show(only)).toBe('10.215.0.2 -');
    expect(table.plan(ask(2), 0)).toMatchObject({ result: 'NO_RESOURCES' });
    table.remove(only, 1_000);
    expect(show(granted(table.plan(ask(1), 2_000)).tunnel)).toBe('10.215.0.2 -');
    expect(table.plan(ask(2), 120_000)).toMatchObject({ result: 'NO_RESOURCES' });
    expect(show(grant(table, ask(2), 121_000))).toBe('10.215.0.2 -');
  });

  it('may be of one family', () => {
    expect(show(grant(tunnels({ v4: null, reserve: null }), ask(1), 0))).toMatch(/^- fd0d/);
    expect(show(grant(tunnels({ v6: null }), ask(1), 0))).toMatch(/^10\.215\.\S+ -$/);
  });
});

describe('a tunnel', () => {
  it('lasts as long as was granted, and is renewed when a tenth of that is over', () => {
    const table = tunnels();
    expect(granted(table.plan(ask(1, { lifetime: 86_400 }), 0)).lifetime).toBe(600);
    expect(granted(table.plan(ask(1, { lifetime: 1 }), 0)).lifetime).toBe(60);
    expect(grant(table, ask(1, { lifetime: 0 }), 0).expires).toBe(600_000);
    expect(table.plan(ask(1), 59_000)).toMatchObject({ kind: 'settled' });
    const renewal = granted(table.plan(ask(1), 61_000));
    expect(renewal).toMatchObject({ renewal: true, instead: null });
    expect(table.commit(renewal, 61_000).expires).toBe(661_000);
    expect(table.over(665_000)).toEqual([]);
    expect(table.over(666_000)).toHaveLength(1);
  });

  it('belongs to who has the key, not to who names it', () => {
    const table = tunnels();
    grant(table, ask(1), 0);
    expect(table.plan(ask(1, { owner: 2 }), 0)).toMatchObject({ kind: 'refused', result: 'NOT_AUTHORIZED' });
  });

  it('changes its addresses with the choice', () => {
    const table = tunnels();
    const before = grant(table, ask(1), 0);
    const plan = granted(table.plan(ask(1, { choice: 1 }), 1_000));
    expect(plan).toMatchObject({ renewal: false, instead: before });
    table.commit(plan, 1_000);
    expect(table.all().map(show)).toEqual([show(plan.tunnel)]);
  });

  it('is one of eight for a key, and one a second after sixteen', () => {
    const table = tunnels();
    for (let n = 0; n < TUNNELS_PER_KEY; n++) grant(table, ask(n), 0);
    expect(table.plan(ask(100), 0)).toMatchObject({ kind: 'refused', result: 'QUOTA' });
    expect(table.plan(ask(100, { owner: 2 }), 0).kind).toBe('grant');
    for (let n = 0; n < 8; n++) {
      table.remove(table.of(1)[0] as Tunnel, 0);
      grant(table, ask(200 + n), 0);
    }
    table.remove(table.of(1)[0] as Tunnel, 0);
    expect(table.plan(ask(300), 0)).toMatchObject({ kind: 'refused', result: 'RATE', retryAfter: 1 });
    expect(table.plan(ask(300), 1_000).kind).toBe('grant');
  });

  it('is adopted from what the kernel has, unless that cannot be', () => {
    const table = tunnels();
    const address = (text: string) => parseAddress(text);
    const found = { owner: 1, publicKey: key(1), v4: address('10.215.7.1'), v6: address('fd0d:e70::7'), choice: 2 };
    expect(table.adopt(found, 65, 0)).toBe(true);
    expect(table.get(key(1))).toMatchObject({ choice: 2, expires: 60_000 });
    expect(table.plan(ask(1, { choice: 2, lifetime: 60 }), 0)).toMatchObject({ kind: 'settled' });
    for (const bad of [
      { ...found },
      { ...found, publicKey: key(2) },
      { ...found, publicKey: key(3), v4: address('10.216.0.1'), v6: null },
      { ...found, publicKey: key(4), v4: null, v6: null },
    ])
      expect(table.adopt(bad, 60, 0)).toBe(false);
    expect(table.adopt({ ...found, publicKey: key(5), v4: address('198.19.0.7'), v6: null }, 60, 0)).toBe(true);
  });
});

it('the gateway is the first address', () => {
  expect([NETWORKS.v4, NETWORKS.v6].map((network) => formatAddress(gatewayOf(network as Prefix)))).toEqual([
    '10.215.0.1',
    'fd0d:e70::1',
  ]);
});

it.each([
  ['10.215.0.0/16', '10.215.3.0/24', true],
  ['10.215.0.0/16', '10.0.0.0/8', true],
  ['10.215.0.0/16', '10.215.0.0/16', true],
  ['10.215.0.0/16', '10.216.0.0/16', false],
  ['10.215.0.0/16', '0.0.0.0/0', false],
  ['10.215.0.0/16', '::/0', false],
  ['fd0d:e70::/48', 'fd0d:e70:0:1::/64', true],
])('%s and %s overlap: %s', (one, other, expected) => {
  expect(overlapping([prefix(one)], [prefix(other)]) !== null).toBe(expected);
});

it('no sequence of questions gives an address to two, or more to a key than it may have', () => {
  const table = tunnels({ v4: prefix('10.215.0.0/26'), v6: prefix('fd0d:e70::/122') });
  let state = 1;
  const draw = (below: number): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return Math.floor((state / 2 ** 32) * below);
  };
  let now = 0;
  for (let step = 0; step < 5_000; step++) {
    now += draw(5_000);
    const what = ask(draw(60), { owner: draw(4), choice: draw(4), lifetime: 60 + draw(600) });
    if (draw(5) === 0) {
      const held = table.get(what.publicKey);
      if (held) table.remove(held, now);
    } else {
      const plan = table.plan(what, now);
      if (plan.kind === 'grant' && draw(10) > 0) table.commit(plan, now);
    }
    for (const over of table.over(now)) table.remove(over, now);
    const all = table.all();
    const held = all.flatMap(({ v4, v6 }) => [v4, v6].flatMap((one) => (one ? [formatAddress(one)] : [])));
    expect(new Set(held).size).toBe(held.length);
    for (const owner of [0, 1, 2, 3]) expect(table.of(owner).length).toBeLessThanOrEqual(TUNNELS_PER_KEY);
  }
});
