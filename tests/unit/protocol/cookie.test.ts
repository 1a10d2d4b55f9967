import { expect, test } from 'vitest';
import type { Address } from '../../../appliance/protocol/address.ts';
import { CookieJar } from '../../../appliance/protocol/cookie.ts';

const address: Address = { family: 4, value: 0xc6336407n };
const subject = { address, port: 40123, keyId: 0x1a2b3c4d, session: 7n };
const jar = (): CookieJar => {
  let draw = 0;
  return new CookieJar((bytes) => new Uint8Array(bytes).fill(++draw), 0);
};

test('a cookie is good for 120 s, across one change of key', () => {
  for (const issued of [0, 30_000, 119_000, 130_000, 500_500]) {
    const cookies = jar();
    const cookie = cookies.issue(subject, issued);
    expect(cookies.accepts(cookie, subject, issued)).toBe(true);
    expect(cookies.accepts(cookie, subject, issued + 119_000)).toBe(true);
    expect(cookies.accepts(cookie, subject, issued + 122_000)).toBe(false);
  }
});

test('a cookie is bound to address, port, key and session', () => {
  const cookies = jar();
  const cookie = cookies.issue(subject, 1000);
  for (const other of [
    { ...subject, address: { family: 4, value: 0xc6336408n } as const },
    { ...subject, port: 40124 },
    { ...subject, keyId: 1 },
    { ...subject, session: 8n },
  ])
    expect(cookies.accepts(cookie, other, 1000)).toBe(false);
});

test('a cookie of a router that restarted, or of nobody, is refused', () => {
  const before = jar().issue(subject, 0);
  const after = new CookieJar((bytes) => new Uint8Array(bytes).fill(99), 0);
  expect(after.accepts(before, subject, 0)).toBe(false);
  expect(after.accepts(new Uint8Array(16), subject, 0)).toBe(false);
});

test('a tick from the future is refused', () => {
  const cookies = jar();
  const cookie = cookies.issue(subject, 60_000);
  expect(cookies.accepts(cookie, subject, 10_000)).toBe(false);
});

test('after long idleness no old key is left to accept', () => {
  const cookies = jar();
  const cookie = cookies.issue(subject, 0);
  expect(cookies.accepts(cookie, subject, 10 * 120_000)).toBe(false);
});
