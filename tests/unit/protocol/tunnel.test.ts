import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { parseAddress } from '../../../appliance/protocol/address.ts';
import {
  decodeAnswer,
  decodeRequest,
  decodeResponse,
  deriveKeys,
  encodeRequest,
  encodeResponse,
  type Request,
  requestIsAuthentic,
  type TunnelGrant,
  tunnelMark,
} from '../../../appliance/protocol/control.ts';

/** Made by tests/vectors/tunnel-v2.py, which shares nothing with this program. */
const vectors: Record<string, string | number> = JSON.parse(
  readFileSync(new URL('../../vectors/tunnel-v2.json', import.meta.url), 'utf8'),
);
const hex = (name: string): Uint8Array => new Uint8Array(Buffer.from(String(vectors[name]), 'hex'));
const keys = deriveKeys(Number(vectors.keyId), hex('psk'));
const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');
const address = (literal: string) => {
  const parsed = parseAddress(literal);
  if (!parsed) throw new Error(literal);
  return parsed;
};
const request = (name: string): Request => {
  const decoded = decodeRequest(hex(name));
  if (typeof decoded === 'string') throw new Error(decoded);
  return decoded;
};
const NAMES = ['router', 'refused', 'client', 'full', 'release', 'ping'];

test.each(NAMES)('%s decodes, is authentic, and encodes to the same bytes', (name) => {
  expect(requestIsAuthentic(hex(name), keys)).toBe(true);
  expect(text(encodeRequest(request(name), keys))).toBe(vectors[name]);
});

test.each(NAMES)('the answer to %s decodes and encodes to the same bytes', (name) => {
  const answer = decodeAnswer(hex(`${name}R`), keys, hex(name));
  if (!answer) throw new Error('refused');
  expect(text(encodeResponse(answer, keys, hex(name)))).toBe(vectors[`${name}R`]);
});

test('the vectors say what protocol.md says', () => {
  expect(request('router')).toMatchObject({ type: 5, flags: 0, destination: null });
  expect(request('router').peer).toBeUndefined();
  expect(request('client')).toMatchObject({ type: 5, flags: 1, lifetime: 600, destination: null, suggestedPort: 0 });
  expect(request('client').peer).toEqual({ publicKey: hex('clientKey'), choice: 3 });
  expect(request('release')).toMatchObject({ type: 3, flags: 1, destination: null });
  expect(request('release').peer).toEqual({ publicKey: hex('clientKey'), choice: 0 });
  expect(decodeAnswer(hex('routerR'), keys, hex('router'))).toMatchObject({
    result: 0,
    tunnel: { kind: 'router', publicKey: hex('routerKey'), port: 51820, control: 45672 },
  });
  expect(decodeAnswer(hex('clientR'), keys, hex('client'))).toMatchObject({
    lifetime: 600,
    tunnel: {
      kind: 'client',
      v6: { address: address('fd0d:e70::7:1'), length: 48 },
      v4: { address: address('10.215.7.1'), length: 16 },
      mtu: 1420,
    },
  });
  expect(decodeAnswer(hex('fullR'), keys, hex('full'))).toMatchObject({ result: 65, lifetime: 30 });
  expect(decodeAnswer(hex('pingR'), keys, hex('ping'))).toMatchObject({ flags: tunnelMark(hex('routerKey')) });
});

test('a mark is never that of a router without tunnels', () => {
  expect(tunnelMark(hex('routerKey'))).toBe(vectors.mark);
  expect(tunnelMark(new Uint8Array(32))).toBe(1);
});

test('an old client, which asks for no tunnels, takes a grant for nothing', () => {
  expect(decodeResponse(hex('clientR'), keys, hex('client'))).toBeNull();
  expect(decodeResponse(hex('refusedR'), keys, hex('refused'))).toMatchObject({ result: 35 });
});

test('no single flipped bit of a request or an answer passes', () => {
  for (const name of ['client', 'release']) {
    for (let bit = 0; bit < 96 * 8; bit++) {
      const bytes = hex(name);
      bytes[bit >> 3] = (bytes[bit >> 3] ?? 0) ^ (1 << (bit & 7));
      expect(typeof decodeRequest(bytes) === 'string' || !requestIsAuthentic(bytes, keys)).toBe(true);
      const answer = hex(`${name}R`);
      answer[bit >> 3] = (answer[bit >> 3] ?? 0) ^ (1 << (bit & 7));
      expect(decodeAnswer(answer, keys, hex(name))).toBeNull();
    }
  }
});

test('what must be zero without a key is refused, and a choice without one', () => {
  const change = (name: string, offset: number, value: number): Uint8Array => {
    const bytes = hex(name);
    bytes[offset] = value;
    return bytes;
  };
  expect(decodeRequest(change('router', 79, 1))).toBe('reserved');
  expect(decodeRequest(change('router', 47, 1))).toBe('reserved');
  expect(decodeRequest(change('release', 47, 1))).toBe('reserved');
  expect(decodeRequest(change('client', 3, 2))).toBe('reserved');
  expect(typeof decodeRequest(change('client', 79, 1))).toBe('object');
});

test('a grant of addresses that are none is no answer', () => {
  const bad: Partial<TunnelGrant & { kind: 'client' }>[] = [
    { v4: null, v6: null },
    { v4: { address: address('10.215.7.1'), length: 31 } },
    { v4: { address: address('10.215.7.1'), length: 0 } },
    { v6: { address: address('fd0d:e70::7:1'), length: 127 } },
    { v6: { address: address('::ffff:1.2.3.4'), length: 64 } },
  ];
  const whole = decodeAnswer(hex('clientR'), keys, hex('client'));
  if (!whole || !('tunnel' in whole) || whole.tunnel.kind !== 'client') throw new Error('no grant');
  for (const part of bad) {
    const bytes = encodeResponse({ ...whole, tunnel: { ...whole.tunnel, ...part } }, keys, hex('client'));
    expect(decodeAnswer(bytes, keys, hex('client'))).toBeNull();
  }
});
