import { readFileSync } from 'node:fs';
import { expect, test } from 'vitest';
import {
  decodeAnswer,
  decodeRequest,
  deriveKeys,
  encodeRequest,
  encodeResponse,
  FLAG_ANNOUNCED,
  type Request,
  requestIsAuthentic,
  TYPE,
} from '../../../appliance/protocol/control.ts';

/** Made by tests/vectors/announce-v2.py, which shares nothing with this program. */
const vectors: Record<string, string> = JSON.parse(
  readFileSync(new URL('../../vectors/announce-v2.json', import.meta.url), 'utf8'),
);
const hex = (name: string): Uint8Array => new Uint8Array(Buffer.from(String(vectors[name]), 'hex'));
const keys = deriveKeys(Number(vectors.keyId), hex('psk'));
const text = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');
const request = (name: string): Request => {
  const decoded = decodeRequest(hex(name));
  if (typeof decoded === 'string') throw new Error(decoded);
  return decoded;
};
const NAMES = ['announce', 'foreign', 'announce6', 'withdraw', 'hello', 'ping'];

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
  const server = { address: { family: 4, value: 0xc6336407n }, port: 443 };
  expect(request('announce')).toMatchObject({ type: TYPE.ANNOUNCE, flags: 0, lifetime: 600, destination: server });
  expect(request('withdraw')).toMatchObject({ type: TYPE.RELEASE, flags: FLAG_ANNOUNCED, destination: server });
  expect(decodeAnswer(hex('announceR'), keys, hex('announce'))).toMatchObject({ result: 0, lifetime: 600, port: 443 });
  expect(decodeAnswer(hex('helloR'), keys, hex('hello'))).toMatchObject({ result: 0, capabilityPort: 23_456 });
});
