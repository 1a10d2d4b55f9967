import { randomBytes } from 'node:crypto';

/** Cancels a timer; harmless when it already fired. */
export type Cancel = () => void;

/** Time and chance, the two things a decision must be handed rather than take. */
export type Clock = {
  /** Monotonic milliseconds with a fraction; the origin means nothing. Stops while the machine sleeps. */
  now(): number;
  /** Milliseconds since 1970 UTC; may jump. */
  wall(): number;
  /** Runs `task` once, `ms` from now (0 or more). An open timer keeps no process alive. */
  after(ms: number, task: () => void): Cancel;
  /** Cryptographically strong random bytes. */
  random(bytes: number): Uint8Array;
};

/** The machine's own. */
export const systemClock: Clock = {
  now: () => performance.now(),
  wall: () => Date.now(),
  after(ms, task) {
    const timer = setTimeout(task, ms);
    timer.unref();
    return () => clearTimeout(timer);
  },
  random: (bytes) => randomBytes(bytes),
};
