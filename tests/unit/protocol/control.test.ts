import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import { parseAddress } from '../../../appliance/protocol/address.ts';
import {
  decodeRequest,
  decodeResponse,
  deriveKeys,
  encodeRequest,
  encodeResponse,
  type Request,
  requestIsAuthentic,
  resultName,
} from '../../../appliance/protocol/control.ts';
import { makeCookie } from '../../../appliance/protocol/cookie.ts';

const vectors: Record<string, string> = JSON.parse(
  readFileSync(new URL('../../vectors/control-v2.json', import.meta.url), 'utf8'),
);
const hex = (name: string): Uint8Array => {
  const text = vectors[name];
  if (!text) throw new Error(`no vector ${name}`);
  return new Uint8Array(Buffer.from(text, 'hex'));
};
const keys = deriveKeys(Number(vectors.keyId), hex('psk'));
const address = (text: string) => {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const request = (bytes: Uint8Array): Request => {
  const decoded = decodeRequest(bytes);
  if (typeof decoded === 'string') throw new Error(decoded);
  return decoded;
};

test('direction keys are the vectors', () => {
  expect(Buffer.from(keys.c2s)).toEqual(Buffer.from(hex('c2s')));
  expect(Buffer.from(keys.s2c)).toEqual(Buffer.from(hex('s2c')));
});

test('the cookie is the vector', () => {
  const subject = { address: address('198.51.100.7'), port: 40123, keyId: keys.id, session: 0x5e551d0000000001n };
  const response = decodeResponse(hex('helloR'), keys, hex('hello'));
  const observed = response?.observed ?? subject;
  const cookie = makeCookie(hex('cookieKey'), Number(vectors.tick), { ...subject, ...observed });
  expect(Buffer.from(cookie).toString('hex')).toBe(vectors.cookie);
});

test.each(['hello', 'lease', 'denied'])('%s decodes, is authentic, and encodes to the same bytes', (name) => {
  const bytes = hex(name);
  expect(requestIsAuthentic(bytes, keys)).toBe(true);
  expect(Buffer.from(encodeRequest(request(bytes), keys)).toString('hex')).toBe(vectors[name]);
});

test.each(['hello', 'lease', 'denied'])('the answer to %s decodes and encodes to the same bytes', (name) => {
  const response = decodeResponse(hex(`${name}R`), keys, hex(name));
  if (!response) throw new Error('refused');
  expect(Buffer.from(encodeResponse(response, keys, hex(name))).toString('hex')).toBe(vectors[`${name}R`]);
});

test('the lease vector says what protocol.md says', () => {
  expect(request(hex('lease'))).toMatchObject({
    type: 2,
    sequence: 2n,
    lifetime: 600,
    vmin: 2,
    vmax: 2,
    destination: { address: address('93.184.216.34'), port: 443 },
    protocol: 6,
  });
  expect(decodeResponse(hex('leaseR'), keys, hex('lease'))).toMatchObject({ result: 0, port: 23456, lifetime: 600 });
  expect(resultName(decodeResponse(hex('deniedR'), keys, hex('denied'))?.result ?? -1)).toBe('DENIED_DESTINATION');
});

test('no single flipped bit of a request passes', () => {
  for (const name of ['hello', 'lease', 'denied']) {
    for (let bit = 0; bit < 96 * 8; bit++) {
      const bytes = hex(name);
      bytes[bit >> 3] = (bytes[bit >> 3] ?? 0) ^ (1 << (bit & 7));
      expect(typeof decodeRequest(bytes) === 'string' || !requestIsAuthentic(bytes, keys)).toBe(true);
    }
  }
});

test('no single flipped bit of an answer passes, nor an answer to another question', () => {
  for (let bit = 0; bit < 96 * 8; bit++) {
    const bytes = hex('leaseR');
    bytes[bit >> 3] = (bytes[bit >> 3] ?? 0) ^ (1 << (bit & 7));
    expect(decodeResponse(bytes, keys, hex('lease'))).toBeNull();
  }
  expect(decodeResponse(hex('helloR'), keys, hex('lease'))).toBeNull();
  // Same header, other request: only the request's MAC inside the answer's MAC tells them apart.
  const other = encodeRequest({ ...request(hex('lease')), suggestedPort: 1 }, keys);
  expect(decodeResponse(hex('leaseR'), keys, other)).toBeNull();
});

test('garbage has a name and never throws', () => {
  expect(decodeRequest(new Uint8Array(0))).toBe('length');
  expect(decodeRequest(hex('hello').subarray(0, 95))).toBe('length');
  expect(decodeRequest(new Uint8Array(97))).toBe('length');
  expect(decodeRequest(new Uint8Array(96))).toBe('magic');
  const change = (offset: number, value: number): Uint8Array => {
    const bytes = hex('hello');
    bytes[offset] = value;
    return bytes;
  };
  expect(decodeRequest(change(1, 1))).toBe('version');
  expect(decodeRequest(change(46, 1))).toBe('reserved');
  expect(decodeRequest(change(69, 1))).toBe('reserved');
  expect(decodeRequest(change(79, 1))).toBe('reserved');
  for (const length of [0, 1, 95, 97, 1500])
    expect(decodeResponse(new Uint8Array(length), keys, hex('hello'))).toBeNull();
});

test('a short secret is refused', () => {
  expect(() => deriveKeys(1, new Uint8Array(31))).toThrow(/32 bytes/);
});
