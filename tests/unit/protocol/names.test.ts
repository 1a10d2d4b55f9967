import { describe, expect, it } from 'vitest';
import { isServiceName, parseHostPort, parseNamedDetour } from '../../../appliance/protocol/names.ts';

describe('host:port', () => {
  it.each([
    ['fra.example.org:45672', { host: 'fra.example.org', port: 45672 }],
    ['192.0.2.1:1', { host: '192.0.2.1', port: 1 }],
    ['[2001:db8::1]:65535', { host: '2001:db8::1', port: 65535 }],
    ['a:1', { host: 'a', port: 1 }],
  ])('reads %s', (text, expected) => {
    expect(parseHostPort(text)).toEqual(expected);
  });

  it.each([
    '',
    ':1',
    'a',
    'a:',
    'a:0',
    'a:65536',
    'a:01',
    'a:1 ',
    'a b:1',
    '2001:db8::1:5',
    '[192.0.2.1]:5',
    '[a]:5',
    '192.0.2:5',
  ])('refuses "%s"', (text) => {
    expect(parseHostPort(text)).toBeNull();
  });
});

describe('name=host:port', () => {
  it('reads both parts', () => {
    expect(parseNamedDetour('fra-1=[2001:db8::1]:5')).toEqual({ name: 'fra-1', host: '2001:db8::1', port: 5 });
  });

  it.each(['=a:1', '-a=a:1', 'a', 'a=', 'a=b', `${'x'.repeat(64)}=a:1`, 'a b=c:1', 'a=b=c:1'])(
    'refuses "%s"',
    (text) => {
      expect(parseNamedDetour(text)).toBeNull();
    },
  );
});

it.each([
  ['_detour._udp.example.org', true],
  ['example.org', true],
  ['example', false],
  ['', false],
  ['192.0.2.1', false],
  ['a..b', false],
  ['__a.b', false],
  [`${'a.'.repeat(127)}b`, false],
])('"%s" as the name of a service: %s', (text, expected) => {
  expect(isServiceName(text)).toBe(expected);
});
