import { describe, expect, test } from 'vitest';
import { chooseLinks, type Held } from '../../../appliance/client/interfaces.ts';
import { step } from '../../../appliance/client/manager.ts';
import { type Command, type Event, initial, type Link } from '../../../appliance/client/state.ts';
import { type Address, formatAddress, parseAddress, parseEndpoint } from '../../../appliance/protocol/address.ts';
import { matchesGlob } from '../../../appliance/protocol/names.ts';

const at = (text: string): Address => {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const end = (text: string) => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const held = (name: string, index: number, text: string, deprecated = false): Held => ({
  interface: name,
  index,
  address: at(text),
  deprecated,
});
const HOST = [
  held('eth0', 2, '192.0.2.1'),
  held('eth0', 2, 'fd00::1'),
  held('eth0', 2, '2001:db8::1'),
  held('wlan0', 3, '198.51.100.1'),
  held('docker0', 4, '172.17.0.1'),
];
const DEFAULTS = [
  { family: 4, index: 3, metric: 600 },
  { family: 4, index: 2, metric: 100 },
  { family: 6, index: 2, metric: 1024 },
] as const;
const show = (links: readonly Link[]): string[] =>
  links.map(({ name, v4, v6 }) => `${name} ${v4 && formatAddress(v4)} ${v6 && formatAddress(v6)}`);
const choose = (include: readonly string[], exclude: readonly string[] = [], before: readonly Link[] = []) =>
  chooseLinks({ include, exclude }, HOST, DEFAULTS, before);

test.each([
  ['eth*', 'eth0', true],
  ['eth*', 'veth0', false],
  ['*', 'anything', true],
  ['wlan?', 'wlan0', true],
  ['wlan?', 'wlan', false],
  ['a.b', 'axb', false],
  ['to-*', 'to-second', true],
  ['*0', 'eth0.11', false],
])('%s means %s: %s', (glob, name, expected) => {
  expect(matchesGlob(glob, name)).toBe(expected);
});

describe('chosen are', () => {
  test('those that are named, less those that are excluded', () => {
    expect(show(choose(['eth*', 'w*']))).toEqual(['eth0 192.0.2.1 2001:db8::1', 'wlan0 198.51.100.1 null']);
    expect(show(choose(['*'], ['docker*', 'eth0']))).toEqual(['wlan0 198.51.100.1 null']);
  });

  test('the default routes’ interfaces when none is named', () => {
    expect(show(choose([], ['wlan0']))).toEqual(['eth0 192.0.2.1 2001:db8::1']);
  });

  test('each with the address it had, and still there when it lost it', () => {
    const before = choose(['wlan0']);
    const later = chooseLinks({ include: ['wlan0'], exclude: [] }, HOST.slice(0, 3), DEFAULTS, before);
    expect(show(later)).toEqual(['wlan0 198.51.100.1 null']);
    const two = [held('wlan0', 7, '198.51.100.2'), held('wlan0', 7, '198.51.100.1')];
    const [again] = chooseLinks({ include: ['wlan0'], exclude: [] }, two, DEFAULTS, later);
    expect(again).toMatchObject({ index: 7, v4: at('198.51.100.1') });
  });

  test('eight at most', () => {
    const many = Array.from({ length: 20 }, (_, i) => held(`eth${i}`, i + 1, `192.0.2.${i + 1}`));
    expect(chooseLinks({ include: ['*'], exclude: [] }, many, [], []).length).toBe(8);
  });

  test('known to be what routing takes anyway, by the lowest metric', () => {
    expect(choose(['*']).map(({ name, natural4, natural6 }) => [name, natural4, natural6])).toEqual([
      ['eth0', true, true],
      ['wlan0', false, false],
      ['docker0', false, false],
    ]);
  });
});

test('one set of candidates: the detour over both interfaces, and the direct path over the other one', () => {
  const rules = { maxPaths: 4, targets: [], exclude: [], mode: 'aggregate', minAgeMs: 0, rescue: false } as const;
  const state = initial({ ...rules, kinds: ['nat'], ordered: false }, 7);
  const tell = (...events: Event[]): Command[] => events.flatMap((event) => step(state, event, 1_000));
  const links = choose(['eth0', 'wlan0']);
  tell({ kind: 'network-changed', addresses: HOST.map(({ address }) => address), links });
  const [eth, wlan, server] = [at('192.0.2.1'), at('198.51.100.1'), end('93.184.216.34:443')];
  for (const [via, local] of [
    ['eth0', eth],
    ['wlan0', wlan],
  ] as const) {
    const detour = `a@${via}`;
    tell({ kind: 'detour-added', detour, name: 'a', endpoint: end('203.0.113.1:45672'), via });
    tell({ kind: 'detour-up', detour, rttMs: 10, epoch: 1n, local });
  }
  const local = { address: eth, port: 40_000 };
  const opening = { token: 1, local, remote: server, serverSide: false, denyJoinId0: false };
  tell({ kind: 'created', ...opening });
  for (const detour of ['a@eth0', 'a@wlan0'])
    tell({ kind: 'lease-granted', detour, server, port: 20_001, expiresAt: 600_000 });
  const made = tell({ kind: 'established', ...opening }).filter((one) => one.kind === 'create-subflow');
  expect(
    made.map((one) => [formatAddress(one.local), formatAddress(one.remote.address), one.localId, one.index]).sort(),
  ).toEqual([
    ['192.0.2.1', '203.0.113.1', 0, 2],
    ['198.51.100.1', '203.0.113.1', 1, 3],
    ['198.51.100.1', '93.184.216.34', 1, 3],
  ]);
  // The leases may have one port: a path is told by its local end, too.
  const joined = { token: 1, remote: end('203.0.113.1:20001'), backup: false, error: 0 };
  tell(
    { kind: 'subflow-established', ...joined, local: { address: wlan, port: 50_001 }, localId: 1 },
    { kind: 'subflow-established', ...joined, local: { address: eth, port: 50_002 }, localId: 0 },
  );
  const active = state.connections.get(1)?.paths.filter((path) => path.kind === 'nat' && path.state === 'active');
  expect(active?.map(({ detour, local: is }) => `${detour} ${is && formatAddress(is.address)}`).sort()).toEqual([
    'a@eth0 192.0.2.1',
    'a@wlan0 198.51.100.1',
  ]);
});
