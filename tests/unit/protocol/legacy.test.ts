import { expect, test } from 'vitest';
import {
  decodeLegacyRequest,
  decodeLegacyResponse,
  encodeLegacyRequest,
  encodeLegacyResponse,
} from '../../../appliance/protocol/legacy.ts';

const destination = { address: { family: 4, value: 0x5db8d822n }, port: 443 } as const;

test('the bytes are the thesis’s: version, op, two reserved, server, server port, detour port', () => {
  expect(Buffer.from(encodeLegacyRequest({ destination, port: 0 })).toString('hex')).toBe('010000005db8d82201bb0000');
  expect(Buffer.from(encodeLegacyResponse({ destination, port: 20000 })).toString('hex')).toBe(
    '010100005db8d82201bb4e20',
  );
});

test('reads what it writes, and nothing else', () => {
  const request = encodeLegacyRequest({ destination, port: 23456 });
  expect(decodeLegacyRequest(request)).toEqual({ destination, port: 23456 });
  expect(decodeLegacyResponse(request)).toBeNull();
  expect(decodeLegacyRequest(encodeLegacyResponse({ destination, port: 1 }))).toBeNull();
  expect(decodeLegacyRequest(request.subarray(0, 11))).toBeNull();
  expect(decodeLegacyRequest(new Uint8Array(13))).toBeNull();
  expect(decodeLegacyRequest(new Uint8Array(12))).toBeNull();
  // Reserved bytes are ignored, as the thesis's daemon does.
  expect(decodeLegacyRequest(request.with(2, 0xff))).not.toBeNull();
});
