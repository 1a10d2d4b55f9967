import { describe, expect, test } from 'vitest';
import { isEnabled, NO_WISHES, readLabels, sameWishes } from '../../../appliance/client/workloads.ts';
import { formatPrefix } from '../../../appliance/protocol/address.ts';
import { flag, TABLE } from '../../../appliance/variables.ts';

const READERS = { targets: TABLE.targets.parse, strategy: TABLE.strategy.parse, mptcp: flag };
const read = (labels: Record<string, string>, prefix = 'detour.') => readLabels(labels, prefix, READERS);

test('what a workload may say is read as the settings are', () => {
  const { enabled, wishes, complaints } = read({
    'detour.enable': 'true',
    'detour.targets': '10.0.0.0/8:443,[fd00::]/8',
    'detour.strategy': 'announced,nat',
    'detour.mptcp': 'off',
    'com.example.detour.enable': 'false',
    detour: 'is another word',
  });
  expect(enabled).toBe(true);
  expect(wishes.targets?.map(({ prefix, ports }) => [formatPrefix(prefix), ports])).toEqual([
    ['10.0.0.0/8', [{ first: 443, last: 443 }]],
    ['fd00::/8', []],
  ]);
  expect(wishes.strategy).toEqual({ kinds: ['announced', 'nat'], ordered: true, fallback: false });
  expect(wishes.mptcp).toBe(false);
  expect(complaints).toEqual([]);
});

test('annotations of Kubernetes have a prefix of their own', () => {
  const labels = { 'detour.dev/enable': 'true', 'detour.dev/strategy': 'nat', 'detour.enable': 'maybe' };
  const { enabled, wishes, complaints } = read(labels, 'detour.dev/');
  expect({ enabled, strategy: wishes.strategy, complaints }).toEqual({
    enabled: true,
    strategy: { kinds: ['nat'], ordered: true, fallback: false },
    complaints: [],
  });
});

test.each([
  ['true', true],
  ['True', true],
  [' on ', true],
  ['1', true],
  ['yes', true],
  ['false', false],
  ['off', false],
  ['0', false],
  ['', false],
  ['   ', false],
])('detour.enable=%j means %s, without a complaint', (text, expected) => {
  const labels = { 'detour.enable': text };
  expect(read(labels)).toMatchObject({ enabled: expected, complaints: [] });
  expect(isEnabled(labels, 'detour.')).toBe(expected);
});

test('who says nothing wishes for nothing', () => {
  expect(read({})).toEqual({ enabled: false, wishes: NO_WISHES, complaints: [] });
});

describe('nonsense is named, quoted in short, and counts as not said', () => {
  test.each([
    [{ 'detour.enable': 'please' }, 'detour.enable="please": must be "true" or "false"'],
    [{ 'detour.targets': 'example.org' }, 'detour.targets="example.org": has "example.org", which is no CIDR[:ports]'],
    [{ 'detour.strategy': 'teleport' }, 'detour.strategy="teleport": has a kind that is not known'],
    [{ 'detour.mptcp': 'perhaps' }, 'detour.mptcp="perhaps": must be on or off'],
    [
      { 'detour.target': '10.0.0.0/8' },
      '"detour.target": is not known; there are detour.enable, detour.targets, detour.strategy, detour.mptcp',
    ],
    [{ 'detour.enable': 'a"b\n\u001b[31m' }, 'detour.enable="a\\"b\\n\\u001b[31m": must be "true" or "false"'],
    [{ 'detour.strategy': 'x'.repeat(4096) }, `detour.strategy="${'x'.repeat(60)}...": has a kind that is not known`],
    [{ 'detour.targets': '1.1.1.1,'.repeat(600) }, 'is longer than 4096 characters'],
    [{ [`detour.${'y'.repeat(5000)}`]: '' }, `"detour.${'y'.repeat(53)}...": is not known`],
  ])('%o', (labels, complaint) => {
    const reading = read(labels);
    expect(reading.complaints).toEqual([expect.stringContaining(complaint)]);
    expect(reading.complaints[0]?.length).toBeLessThan(300);
    expect(reading).toMatchObject({ enabled: false, wishes: NO_WISHES });
  });

  test('what is right beside it counts', () => {
    const { enabled, wishes, complaints } = read({
      'detour.enable': 'true',
      'detour.targets': 'nowhere',
      'detour.strategy': 'nat',
    });
    expect({ enabled, wishes }).toEqual({
      enabled: true,
      wishes: { ...NO_WISHES, strategy: { kinds: ['nat'], ordered: true, fallback: false } },
    });
    expect(complaints).toHaveLength(1);
  });

  test('a thousand of them are six lines', () => {
    const labels = Object.fromEntries(Array.from({ length: 1000 }, (_, index) => [`detour.x${index}`, '']));
    const { complaints } = read(labels);
    expect(complaints).toHaveLength(6);
    expect(complaints.at(-1)).toBe('and 995 more');
  });
});

test('wishes are alike when they say the same, however that was written', () => {
  const wishes = (labels: Record<string, string>) => read(labels).wishes;
  expect(sameWishes(wishes({ 'detour.targets': '10.0.0.0/8' }), wishes({ 'detour.targets': ' 10.0.0.0/8 ' }))).toBe(
    true,
  );
  expect(sameWishes(wishes({ 'detour.targets': '10.0.0.0/8' }), wishes({ 'detour.targets': '10.0.0.0/9' }))).toBe(
    false,
  );
  expect(sameWishes(wishes({ 'detour.mptcp': 'on' }), NO_WISHES)).toBe(false);
  // All servers is a wish, too: the agent's own settings may name some.
  expect(sameWishes(wishes({ 'detour.targets': 'all' }), NO_WISHES)).toBe(false);
});
