import { isIP, SocketAddress } from 'node:net';
import { expect, test } from 'vitest';
import {
  type Address,
  contains,
  embedsIPv4,
  formatAddress,
  formatEndpoint,
  parseAddress,
  parseEndpoint,
  parsePrefix,
  readAddress,
  writeAddress,
} from '../../../appliance/protocol/address.ts';

const parse = (text: string): Address => {
  const address = parseAddress(text);
  if (!address) throw new Error(`refused ${text}`);
  return address;
};

test('agrees with Node on what is an address', () => {
  const texts =
    '1.2.3.4 0.0.0.0 255.255.255.255 256.1.1.1 1.2.3 01.2.3.4 1.2.3.4.5 :: ::1 1:: 1::8 1:2:3:4:5:6:7:8 1:2:3:4:5:6:7 ' +
    '1::2::3 ::1.2.3.4 ::ffff:1.2.3.4 1:2:3:4:5:6:1.2.3.4 1:2:3:4:5:6:7:1.2.3.4 12345:: g:: : ::: 1:2:3:4:5:6:7:: ::2:3:4:5:6:7:8 ' +
    '1:2:3:4::5:6:7:8 2001:DB8::A x 1.2.3.4:: ::1.2.3.400';
  for (const text of texts.split(' ')) expect([text, parseAddress(text) !== null]).toEqual([text, isIP(text) !== 0]);
});

test('formats as Node does (RFC 5952), and round-trips through the wire', () => {
  let seed = 1n;
  for (let i = 0; i < 2000; i++) {
    seed = (seed * 6364136223846793005n + 1442695040888963407n) & ((1n << 64n) - 1n);
    // Half the groups zero, so that runs of zeros of every length and place occur.
    let value = 0n;
    for (let group = 0n; group < 8n; group++) {
      value = (value << 16n) | ((seed >> (group + 40n)) & 1n ? (seed >> (group * 7n)) & 0xffffn : 0n);
    }
    if (value >> 32n === 0xffffn || value >> 32n === 0n) continue;
    const address: Address = { family: 6, value };
    const text = formatAddress(address);
    expect(text).toBe(new SocketAddress({ address: text, family: 'ipv6' }).address);
    expect(parse(text)).toEqual(address);
    const bytes = new Uint8Array(16);
    writeAddress(address, bytes);
    expect(readAddress(bytes)).toEqual(address);
  }
});

test('IPv4-mapped becomes IPv4 however it is written', () => {
  for (const text of ['::ffff:10.0.0.1', '::ffff:a00:1', '0:0:0:0:0:ffff:0a00:0001', '10.0.0.1']) {
    expect(parse(text)).toEqual({ family: 4, value: 0x0a000001n });
  }
});

test('every other IPv4-in-IPv6 form is recognised', () => {
  for (const text of [
    '::10.0.0.1',
    '::ffff:0:10.0.0.1',
    '64:ff9b::10.0.0.1',
    '64:ff9b:1::10.0.0.1',
    '2002:a00:1::1',
    '2001:0:1:2:3:4:5:6',
    '2607:f8b0::5efe:10.0.0.1',
    '2607:f8b0::200:5efe:10.0.0.1',
  ])
    expect([text, embedsIPv4(parse(text))]).toEqual([text, true]);
  for (const text of ['::', '::1', '2607:f8b0::1', '2001:4860::8888', '1.2.3.4', 'fe80::1'])
    expect([text, embedsIPv4(parse(text))]).toEqual([text, false]);
});

test('prefixes and endpoints', () => {
  expect(parsePrefix('10.0.0.1/8')).toBeNull();
  expect(parsePrefix('10.0.0.0/33')).toBeNull();
  expect(parsePrefix('10.0.0.0/')).toBeNull();
  expect(parsePrefix('::ffff:10.0.0.0/104')).toEqual(parsePrefix('10.0.0.0/8'));
  const ten = parsePrefix('10.0.0.0/8');
  expect(ten && contains(ten, parse('10.255.255.255'))).toBe(true);
  expect(ten && contains(ten, parse('11.0.0.0'))).toBe(false);
  expect(ten && contains(ten, parse('::a00:1'))).toBe(false);
  for (const text of ['1.2.3.4:443', '[2001:db8::1]:443']) {
    const endpoint = parseEndpoint(text);
    expect(endpoint && formatEndpoint(endpoint)).toBe(text);
  }
  for (const text of ['1.2.3.4', '1.2.3.4:0', '1.2.3.4:65536', '2001:db8::1:443', '[1.2.3.4]:1', 'host:1'])
    expect([text, parseEndpoint(text)]).toEqual([text, null]);
});
