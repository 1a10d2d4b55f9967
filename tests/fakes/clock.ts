import { createHash } from 'node:crypto';
import type { Clock } from '../../appliance/kernel/clock.ts';

/** A clock that moves only when told, with repeatable randomness. Timers fire in order of their time. */
export class FakeClock implements Clock {
  #now = 0;
  #serial = 0;
  #draws = 0;
  readonly #timers = new Map<number, { at: number; task: () => void }>();

  now(): number {
    return this.#now;
  }

  wall(): number {
    return 1_700_000_000_000 + this.#now;
  }

  after(ms: number, task: () => void): () => void {
    const id = this.#serial++;
    this.#timers.set(id, { at: this.#now + Math.max(0, ms), task });
    return () => this.#timers.delete(id);
  }

  random(bytes: number): Uint8Array {
    const out = new Uint8Array(bytes);
    for (let offset = 0; offset < bytes; offset += 32) {
      const block = createHash('sha256')
        .update(`draw ${this.#draws++}`)
        .digest();
      out.set(block.subarray(0, Math.min(32, bytes - offset)), offset);
    }
    return out;
  }

  /**
   * Moves time forward by `ms`, firing what falls due. Between timers, pending promises get their turn, so that code
   * that awaits sees its timers in the order a real machine would show them.
   */
  async advance(ms: number): Promise<void> {
    const end = this.#now + ms;
    await settle();
    for (;;) {
      let next: { id: number; at: number; task: () => void } | null = null;
      for (const [id, { at, task }] of this.#timers) if (!next || at < next.at) next = { id, at, task };
      if (!next || next.at > end) break;
      this.#timers.delete(next.id);
      this.#now = Math.max(this.#now, next.at);
      next.task();
      await settle();
    }
    this.#now = end;
  }

  /** How many timers wait. */
  get pending(): number {
    return this.#timers.size;
  }
}

/** Lets every promise that can settle without time passing do so. */
export async function settle(): Promise<void> {
  for (let turn = 0; turn < 20; turn++) await new Promise((resolve) => setImmediate(resolve));
}
