import type { Clock } from '../kernel/clock.ts';
import type { Log } from '../log.ts';
import type { Workload } from './workloads.ts';

/** What tells the agent of workloads: somebody who is asked once, and then says what changes for as long as we listen. */
export type Provider = {
  status(): ProviderStatus;
  stop(): void;
};

export type ProviderStatus = {
  readonly provider: string;
  readonly state: 'starting' | 'ok' | 'failing';
  /** How many workloads it sees that asked to be served. */
  readonly workloads: number;
  /** What is wrong; null when nothing is. While it fails, what it said last still counts. */
  readonly why: string | null;
};

/** Is told all workloads there are, whenever that changes, and once when the first answer is there. */
export type OnWorkloads = (workloads: readonly Workload[]) => void;

export type Talk = {
  /** Aborted when nobody listens any more. */
  readonly signal: AbortSignal;
  /** To be called when the other side has told all there is. */
  answered(): void;
  /** Waits, ms; less when nobody listens any more. */
  pause(ms: number): Promise<void>;
};

export type ConversationOptions = {
  /** As DETOUR_PROVIDERS has it. */
  readonly provider: string;
  /** For people: `The Docker engine`. */
  readonly name: string;
  readonly clock: Clock;
  readonly log: Log;
  readonly workloads: () => number;
  /** Asks, and listens until that ends. @throws Error saying why */
  readonly talk: (talk: Talk) => Promise<void>;
};

const RETRY_FIRST_MS = 500;
const RETRY_LONGEST_MS = 30_000;
/** Pauses differ by this share either way: an API server that comes back must not hear all of its nodes at once. */
const SPREAD = 0.2;

/** Talks, and begins anew after ever longer pauses when it breaks off. */
export function converse({ provider, name, clock, log, workloads, talk }: ConversationOptions): Provider {
  const listening = new AbortController();
  const { signal } = listening;
  let state: ProviderStatus['state'] = 'starting';
  let why: string | null = null;
  let failures = 0;

  function answered(): void {
    if (state === 'failing') log.info('provider-back', { provider }, `${name} answers again`);
    state = 'ok';
    why = null;
    failures = 0;
  }

  function failed(reason: string): void {
    if (state !== 'failing' || why !== reason)
      log.warn(
        'provider-failing',
        { provider, reason, workloads: workloads() },
        `${name} does not answer; serving what is known`,
      );
    state = 'failing';
    why = reason;
  }

  function pause(ms: number): Promise<void> {
    return new Promise((resolve) => {
      if (signal.aborted) return resolve();
      const done = (): void => {
        cancel();
        signal.removeEventListener('abort', done);
        resolve();
      };
      const cancel = clock.after(ms, done);
      signal.addEventListener('abort', done);
    });
  }

  function chance(): number {
    return new DataView(new Uint8Array(clock.random(4)).buffer).getUint32(0) / 2 ** 32;
  }

  async function run(): Promise<void> {
    while (!signal.aborted) {
      try {
        await talk({ signal, answered, pause });
      } catch (error) {
        if (signal.aborted) return;
        failed(error instanceof Error ? error.message : String(error));
      }
      const wait = Math.min(RETRY_FIRST_MS * 2 ** Math.min(failures++, 10), RETRY_LONGEST_MS);
      await pause(wait * (1 - SPREAD + 2 * SPREAD * chance()));
    }
  }

  void run();
  return {
    status: () => ({ provider, state, workloads: workloads(), why }),
    stop: () => listening.abort(),
  };
}
