import { expect, test } from 'vitest';
import { type Redirection, renderRedirections } from '../../../appliance/client/redirect.ts';
import { type Endpoint, parseEndpoint } from '../../../appliance/protocol/address.ts';

const end = (text: string): Endpoint => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const MARK = { mark: 0xd7000000, mask: 0xff000000 };
const redirection = (server: string, to: string): Redirection => ({ server: end(server), to: end(to) });

test('every server has an element that goes by itself, in the map of its family', () => {
  const text = renderRedirections(
    [redirection('198.51.100.5:443', '203.0.113.1:20001'), redirection('[2001:db8:5::5]:80', '[2001:db8:d::1]:20002')],
    MARK,
  );
  const elements = text.split('\n').filter((line) => line.startsWith('add element'));
  expect(elements).toEqual([
    'add element inet detour_rescue servers4 { 198.51.100.5 . 443 timeout 60s : 203.0.113.1 . 20001 }',
    'add element inet detour_rescue servers6 { 2001:db8:5::5 . 80 timeout 60s : 2001:db8:d::1 . 20002 }',
  ]);
  // What was there goes in the same transaction.
  for (const map of ['servers4', 'servers6']) expect(text).toContain(`flush map inet detour_rescue ${map}\n`);
});

test('the rules match new MPTCP connections alone, and nothing that carries our mark', () => {
  const rules = renderRedirections([], MARK)
    .split('\n')
    .filter((line) => line.startsWith('add rule inet detour_rescue output'));
  expect(rules.length).toBe(2);
  for (const rule of rules) {
    expect(rule).toContain('meta mark and 0xff000000 != 0xd7000000');
    expect(rule).toContain('tcp flags & (fin|syn|rst|ack) == syn tcp option mptcp subtype 0 ');
  }
});

test('a server and its way are of one family', () => {
  expect(() => renderRedirections([redirection('198.51.100.5:443', '[2001:db8:d::1]:20002')], MARK)).toThrow('family');
});
