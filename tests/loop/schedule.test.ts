import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest';
import { isCron, systemSchedule } from '../../appliance/kernel/schedule.ts';

const MINUTE = 60_000;

describe('times that a user chose', () => {
  beforeEach(() => {
    vi.useFakeTimers({ now: new Date(2026, 10, 23, 2, 58, 30) });
  });
  afterEach(() => {
    vi.useRealTimers();
  });

  test('come when they come, at most half a minute late, day after day, until cancelled', async () => {
    const times: Date[] = [];
    const cancel = systemSchedule('0 3 * * *', () => times.push(new Date()));
    await vi.advanceTimersByTimeAsync(MINUTE);
    expect(times).toHaveLength(0);
    await vi.advanceTimersByTimeAsync(MINUTE);
    expect(times).toHaveLength(1);
    const late = (times[0]?.getTime() ?? 0) - new Date(2026, 10, 23, 3, 0).getTime();
    expect(late).toBeGreaterThanOrEqual(0);
    expect(late).toBeLessThanOrEqual(31_000);
    await vi.advanceTimersByTimeAsync(24 * 60 * MINUTE);
    expect(times).toHaveLength(2);
    cancel();
    await vi.advanceTimersByTimeAsync(48 * 60 * MINUTE);
    expect(times).toHaveLength(2);
  });
});

test.each([
  ['0 3 * * *', true],
  ['*/5 0-6 * * mon', true],
  ['0,30 * 1 1 *', true],
  ['* * * * * *', false],
  ['60 * * * *', false],
  ['often', false],
  ['', false],
  [`${'*'.repeat(300)} * * * *`, false],
])('"%s" as five fields of cron: %s', (text, expected) => {
  expect(isCron(text)).toBe(expected);
});
