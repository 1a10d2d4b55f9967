import { expect, test } from 'vitest';
import { ReplayWindow, Session, Sessions, WINDOW } from '../../../appliance/protocol/window.ts';

test('agrees with a plain set of everything seen', () => {
  const window = new ReplayWindow();
  const seen = new Set<bigint>();
  let highest = 0n;
  let seed = 1n;
  for (let i = 0; i < 20_000; i++) {
    seed = (seed * 6364136223846793005n + 1442695040888963407n) & ((1n << 64n) - 1n);
    const jump = (seed >> 33n) % 1000n === 0n ? 5000n : (seed >> 33n) % 1400n;
    const sequence = highest + 40n - jump > 0n ? highest + 40n - jump : (seed >> 20n) % 50n;
    const expected =
      sequence > highest
        ? 'fresh'
        : sequence === 0n || highest - sequence >= WINDOW
          ? 'stale'
          : seen.has(sequence)
            ? 'repeated'
            : 'fresh';
    expect([i, sequence, window.check(sequence)]).toEqual([i, sequence, expected]);
    if (expected !== 'fresh') continue;
    window.advance(sequence);
    seen.add(sequence);
    if (sequence > highest) highest = sequence;
  }
});

test('sequence 0 is never fresh: sequences start at 1', () => {
  expect(new ReplayWindow().check(0n)).toBe('stale');
});

test('the same bytes get the same answer, other bytes none', () => {
  const session = new Session();
  // The last byte belongs to the MAC, which differs when anything does.
  const message = (last: number): Uint8Array => new Uint8Array(96).fill(7).with(95, last);
  const request = message(1);
  session.remember(1n, request, message(9));
  expect(session.answerTo(1n, message(1))).toEqual(message(9));
  expect(session.answerTo(1n, message(2))).toBeNull();
  for (let sequence = 2n; sequence <= 65n; sequence++) session.remember(sequence, request, message(Number(sequence)));
  expect(session.answerTo(1n, request)).toBeNull();
  for (let sequence = 2n; sequence <= 65n; sequence++) {
    expect(session.answerTo(sequence, request)).toEqual(message(Number(sequence)));
  }
});

test('a key has eight sessions, and the least recently used one goes', () => {
  const sessions = new Sessions();
  for (let id = 1n; id <= 8n; id++) sessions.use(1, id).window.advance(1n);
  sessions.use(1, 1n);
  sessions.use(1, 9n);
  expect(sessions.use(1, 1n).window.check(1n)).toBe('repeated');
  expect(sessions.use(1, 2n).window.check(1n)).toBe('fresh');
  // Another key has sessions of its own.
  expect(sessions.use(2, 1n).window.check(1n)).toBe('fresh');
});
