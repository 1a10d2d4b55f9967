import { expect, it } from 'vitest';
import {
  clashOf,
  FIRST_PRIORITY,
  FIRST_TABLE,
  freeSlot,
  isOurSlot,
  isTunnelName,
  MOST_TUNNELS,
  tunnelName,
} from '../../../appliance/client/numbering.ts';
import {
  type Address,
  formatPrefix,
  type Prefix,
  parseAddress,
  parsePrefix,
} from '../../../appliance/protocol/address.ts';

const address = (text: string): Address => {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const prefixes = (...texts: string[]): Prefix[] =>
  texts.map((text) => {
    const parsed = parsePrefix(text);
    if (!parsed) throw new Error(text);
    return parsed;
  });

it.each(['fra', 'a', 'Frankfurt.am-Main_2', '...', 'x'.repeat(63)])(
  'the interface for %s fits into IFNAMSIZ and is known by its name',
  (detour) => {
    const name = tunnelName(detour, '4:1');
    expect(name).toMatch(/^dtv-[a-z0-9]{6,11}$/);
    expect(isTunnelName(name)).toBe(true);
    expect(tunnelName(detour, '4:1')).toBe(name);
  },
);

it('neither two detours nor two namespaces share a name', () => {
  const names = new Set<string>();
  for (let detour = 0; detour < 300; detour++)
    for (let place = 0; place < 30; place++) names.add(tunnelName(`detour${detour}`, `4:${place}`));
  expect(names.size).toBe(9_000);
});

it('takes numbers that nobody has, by rule or by table', () => {
  expect(freeSlot([], new Set())).toEqual({ table: FIRST_TABLE, priority: FIRST_PRIORITY });
  const rules = [
    { priority: 0, table: 255 },
    { priority: FIRST_PRIORITY, table: 100 },
    { priority: 32_766, table: FIRST_TABLE + 1 },
  ];
  expect(freeSlot(rules, new Set([254, FIRST_TABLE + 2]))).toEqual({
    table: FIRST_TABLE + 3,
    priority: FIRST_PRIORITY + 3,
  });
  const all = Array.from({ length: MOST_TUNNELS }, (_, n) => FIRST_TABLE + n);
  expect(freeSlot([], new Set(all))).toBeNull();
});

it('tells its own numbers from others', () => {
  expect(isOurSlot({ table: FIRST_TABLE + 3, priority: FIRST_PRIORITY + 3 })).toBe(true);
  for (const slot of [
    { table: FIRST_TABLE + 3, priority: FIRST_PRIORITY + 4 },
    { table: FIRST_TABLE - 1, priority: FIRST_PRIORITY - 1 },
    { table: FIRST_TABLE + MOST_TUNNELS, priority: FIRST_PRIORITY + MOST_TUNNELS },
  ])
    expect(isOurSlot(slot)).toBe(false);
});

it.each([
  ['10.215.7.1', ['10.215.0.0/16'], '10.215.0.0/16'],
  ['10.215.7.1', ['10.0.0.0/8'], '10.0.0.0/8'],
  ['10.215.7.1', ['10.215.7.1/32'], '10.215.7.1/32'],
  ['10.215.7.1', ['10.215.8.0/24', '192.168.0.0/16'], null],
  // A default route, and the two halves that some VPNs have in its place.
  ['10.215.7.1', ['0.0.0.0/0', '0.0.0.0/1', '128.0.0.0/1'], null],
  ['fd0d:e70::7', ['fd0d:e70::/32'], 'fd0d:e70::/32'],
  ['fd0d:e70::7', ['::/0', '2000::/3', 'fc00::/7'], null],
])('%s among %j: %s', (text, networks, expected) => {
  const clash = clashOf(address(text), prefixes(...networks), []);
  expect(clash && formatPrefix(clash)).toBe(expected);
});

it('an address that another tunnel has is taken', () => {
  const clash = clashOf(address('10.215.0.2'), [], [address('10.215.0.2')]);
  expect(clash && formatPrefix(clash)).toBe('10.215.0.2/32');
  expect(clashOf(address('10.215.0.2'), [], [address('10.215.0.3'), address('::ffff:10.215.0.3')])).toBeNull();
});
