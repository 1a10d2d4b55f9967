import { schedule as cron, validate } from 'node-cron';
import type { Cancel } from './clock.ts';

/**
 * Runs `task` whenever the local time (`TZ` counts) matches the five fields of cron, up to half a minute later, so that
 * many hosts with one setting do not ask one server in the same second.
 */
export type Schedule = (expression: string, task: () => void) => Cancel;

const SPREAD_MS = 30_000;

/** Whether the text is five fields of cron: minute, hour, day of the month, month, weekday. */
export function isCron(expression: string): boolean {
  return expression.length <= 256 && expression.trim().split(/\s+/).length === 5 && validate(expression);
}

export const systemSchedule: Schedule = (expression, task) => {
  // A machine that slept through its time is not worth a line; the next one comes.
  const job = cron(expression, task, { maxRandomDelay: SPREAD_MS, suppressMissedWarning: true, unref: true });
  return () => void job.destroy();
};
