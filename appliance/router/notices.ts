import type { Clock } from '../kernel/clock.ts';
import type { Log, LogFields } from '../log.ts';

const WARN_EVERY_MS = 60_000;

/** What befell the router: a counter for each cause, and warnings that hostile input cannot make many of. */
export class Notices {
  /** By cause; names are stable, the metrics are made of them. */
  readonly counters = new Map<string, number>();
  readonly #clock: Clock;
  readonly #log: Log;
  readonly #warned = new Map<string, { at: number; count: number }>();

  constructor(clock: Clock, log: Log) {
    this.#clock = clock;
    this.#log = log;
  }

  count(cause: string): void {
    this.counters.set(cause, (this.counters.get(cause) ?? 0) + 1);
  }

  /** At once the first time, then at most once a minute with the number of times. */
  warn(cause: string, fields: LogFields, message: string): void {
    const now = this.#clock.now();
    const last = this.#warned.get(cause);
    if (last && now - last.at < WARN_EVERY_MS) {
      last.count += 1;
      return;
    }
    this.#warned.set(cause, { at: now, count: 0 });
    this.#log.warn(cause, { ...fields, ...(last?.count ? { suppressed: last.count } : {}) }, message);
  }

  /** Says what was held back; to be called now and then. */
  flush(): void {
    const now = this.#clock.now();
    for (const [cause, { at, count }] of this.#warned) {
      if (now - at < WARN_EVERY_MS) continue;
      this.#warned.delete(cause);
      if (count > 0) this.#log.warn(cause, { suppressed: count }, 'the same again, as often as it says');
    }
  }
}
