import { describe, expect, it } from 'vitest';
import {
  type Address,
  type DestinationRule,
  type Endpoint,
  parseAddress,
  parsePrefix,
} from '../../../appliance/protocol/address.ts';
import { judge, onLink, type Rules } from '../../../appliance/router/policy.ts';

function address(text: string): Address {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(`no address: ${text}`);
  return parsed;
}

function rule(text: string, ...ports: [number, number][]): DestinationRule {
  const prefix = parsePrefix(text);
  if (!prefix) throw new Error(`no prefix: ${text}`);
  return { prefix, ports: ports.map(([first, last]) => ({ first, last })) };
}

const to = (text: string, port = 443): Endpoint => ({ address: address(text), port });
const CLIENT4 = address('198.51.100.7');
const CLIENT6 = address('2a00:1450::7');
const clientFor = (text: string): Address => (address(text).family === 4 ? CLIENT4 : CLIENT6);

const NOTHING: Rules = { allow: [], deny: [], own: [] };
const EVERYTHING: Rules = { ...NOTHING, allow: [rule('0.0.0.0/0'), rule('::/0')] };
const verdict = (text: string, rules = NOTHING, port = 443) => judge(to(text, port), clientFor(text), rules);

describe('destinations of IPv4', () => {
  // First and last address of every prefix of docs/protocol.md, and the neighbours that are not in it.
  it.each([
    ['0.0.0.0', '0.255.255.255', null, '1.0.0.0'],
    ['10.0.0.0', '10.255.255.255', '9.255.255.255', '11.0.0.0'],
    ['100.64.0.0', '100.127.255.255', '100.63.255.255', '100.128.0.0'],
    ['127.0.0.0', '127.255.255.255', '126.255.255.255', '128.0.0.0'],
    ['169.254.0.0', '169.254.255.255', '169.253.255.255', '169.255.0.0'],
    ['172.16.0.0', '172.31.255.255', '172.15.255.255', '172.32.0.0'],
    ['192.0.0.0', '192.0.0.255', '191.255.255.255', '192.0.1.0'],
    ['192.0.2.0', '192.0.2.255', '192.0.1.255', '192.0.3.0'],
    ['192.31.196.0', '192.31.196.255', '192.31.195.255', '192.31.197.0'],
    ['192.52.193.0', '192.52.193.255', '192.52.192.255', '192.52.194.0'],
    ['192.88.99.0', '192.88.99.255', '192.88.98.255', '192.88.100.0'],
    ['192.168.0.0', '192.168.255.255', '192.167.255.255', '192.169.0.0'],
    ['192.175.48.0', '192.175.48.255', '192.175.47.255', '192.175.49.0'],
    ['198.18.0.0', '198.19.255.255', '198.17.255.255', '198.20.0.0'],
    ['198.51.100.0', '198.51.100.255', '198.51.99.255', '198.51.101.0'],
    ['203.0.113.0', '203.0.113.255', '203.0.112.255', '203.0.114.0'],
    ['224.0.0.0', '255.255.255.255', '223.255.255.255', null],
    ['168.63.129.16', '168.63.129.16', '168.63.129.15', '168.63.129.17'],
  ])('denies %s to %s and neither neighbour', (first, last, before, after) => {
    expect(verdict(first)).toBe('DENIED_DESTINATION');
    expect(verdict(last)).toBe('DENIED_DESTINATION');
    if (before) expect(verdict(before)).toBeNull();
    if (after) expect(verdict(after)).toBeNull();
  });

  it.each(['0.0.0.1', '127.0.0.1', '169.254.169.254', '224.0.0.1', '240.0.0.1', '255.255.255.255', '168.63.129.16'])(
    'never reaches %s, whatever is allowed',
    (text) => expect(verdict(text, EVERYTHING)).toBe('DENIED_DESTINATION'),
  );

  it('opens private ranges to the ports that the operator named, and no others', () => {
    const rules = { ...NOTHING, allow: [rule('10.1.0.0/16', [443, 443], [8000, 8999])] };
    expect(judge(to('10.1.2.3', 443), CLIENT4, rules)).toBeNull();
    expect(judge(to('10.1.2.3', 8500), CLIENT4, rules)).toBeNull();
    expect(judge(to('10.1.2.3', 444), CLIENT4, rules)).toBe('DENIED_DESTINATION');
    expect(judge(to('10.2.2.3', 443), CLIENT4, rules)).toBe('DENIED_DESTINATION');
  });
});

describe('destinations of IPv6', () => {
  it.each(['2a00::1', '2606:4700::1111', '2001:200::1', '3ffe::1', '2400::'])('allows %s', (text) =>
    expect(verdict(text)).toBeNull(),
  );
  it.each([
    '::',
    '::1',
    '1::1',
    '100::1',
    '1fff:ffff::1',
    '4000::1',
    '2001:1::1',
    '2001:20::1',
    '2001:1ff:ffff::1',
    '2001:db8::1',
    '3fff::1',
    '3fff:fff::1',
    'fc00::1',
    'fd00:ec2::254',
    'fe80::1',
    'fec0::1',
    'ff02::1',
  ])('denies %s', (text) => expect(verdict(text)).toBe('DENIED_DESTINATION'));

  it.each([
    ['IPv4-compatible', '::10.0.0.1'],
    ['IPv4-translated', '::ffff:0:10.0.0.1'],
    ['NAT64', '64:ff9b::10.0.0.1'],
    ['local NAT64', '64:ff9b:1::10.0.0.1'],
    ['Teredo', '2001:0:4136:e378:8000:63bf:3fff:fdd2'],
    ['6to4', '2002:a00:1::1'],
    ['ISATAP', '2a00::5efe:a00:1'],
    ['ISATAP of a global address', '2a00::200:5efe:808:808'],
    ['6to4 of a public address', '2002:808:808::1'],
  ])('calls %s (%s) a bad address, whatever is allowed', (_name, text) => {
    expect(verdict(text)).toBe('BAD_ADDRESS');
    expect(verdict(text, EVERYTHING)).toBe('BAD_ADDRESS');
    // The form comes first, also where the place would be denied as well.
    expect(verdict(text, { ...NOTHING, deny: [rule('::/0')] })).toBe('BAD_ADDRESS');
  });

  it('reads an IPv4-mapped address as the IPv4 address it is', () => {
    expect(judge(to('::ffff:10.0.0.1'), CLIENT4, NOTHING)).toBe('DENIED_DESTINATION');
    expect(judge(to('::ffff:1.1.1.1'), CLIENT4, NOTHING)).toBeNull();
  });

  it.each(['::', '::1', 'fe80::1', 'ff02::1'])('never reaches %s, whatever is allowed', (text) =>
    expect(verdict(text, EVERYTHING)).toBe('DENIED_DESTINATION'),
  );
});

describe('the detour itself', () => {
  const rules: Rules = {
    ...NOTHING,
    own: [
      { address: address('80.1.2.3'), length: 24 },
      { address: address('172.17.0.1'), length: 16 },
      { address: address('2a00:5::3'), length: 64 },
    ],
  };
  it('is never a destination, and neither are its neighbours', () => {
    for (const text of ['80.1.2.3', '80.1.2.200', '172.17.0.1', '172.17.0.9', '2a00:5::3', '2a00:5::ffff']) {
      expect(verdict(text, rules), text).toBe('DENIED_DESTINATION');
    }
    for (const text of ['80.1.3.1', '2a00:6::1']) expect(verdict(text, rules), text).toBeNull();
  });
  it('lets the operator open a link, but not its own addresses on it', () => {
    const opened = { ...rules, allow: [rule('80.1.2.0/24'), rule('2a00:5::/64')] };
    expect(verdict('80.1.2.200', opened)).toBeNull();
    expect(verdict('2a00:5::ffff', opened)).toBeNull();
    expect(verdict('80.1.2.3', opened)).toBe('DENIED_DESTINATION');
    expect(verdict('2a00:5::3', opened)).toBe('DENIED_DESTINATION');
  });
  it('lists each of its links once', () => {
    const links = onLink([...rules.own, { address: address('80.1.2.4'), length: 32 }, ...rules.own.slice(0, 1)]);
    expect(links.map(({ length }) => length)).toEqual([24, 16, 64]);
  });
});

describe('what the operator said', () => {
  it('denies what is denied even where it is allowed as well', () => {
    const rules = {
      ...NOTHING,
      allow: [rule('10.0.0.0/8')],
      deny: [rule('10.1.0.0/16'), rule('1.1.1.0/24', [80, 80])],
    };
    expect(verdict('10.1.0.1', rules)).toBe('DENIED_DESTINATION');
    expect(verdict('10.2.0.1', rules)).toBeNull();
    expect(verdict('1.1.1.1', rules, 80)).toBe('DENIED_DESTINATION');
    expect(verdict('1.1.1.1', rules, 443)).toBeNull();
  });
  it('never opens port 25', () => {
    expect(verdict('1.1.1.1', EVERYTHING, 25)).toBe('DENIED_DESTINATION');
    expect(verdict('1.1.1.1', EVERYTHING, 26)).toBeNull();
  });
});

it('refuses a destination of the other family, which no join could reach', () => {
  expect(judge(to('1.1.1.1'), CLIENT6, NOTHING)).toBe('BAD_ADDRESS');
  expect(judge(to('2a00::1'), CLIENT4, NOTHING)).toBe('BAD_ADDRESS');
});
