import type { Cancel, Clock } from '../kernel/clock.ts';
import type { Lookup } from '../kernel/lookup.ts';
import { type Address, formatAddress } from '../protocol/address.ts';

/** What is known of a name: its last good answer, and why the latest question failed, if it did. */
export type KnownName = { readonly addresses: readonly Address[]; readonly why: string | null };

/** Keeps names resolved, now and whenever their addresses change. */
export type Names = {
  /**
   * Replaces the list of names. True stands for one of the user's own: it goes before names out of somebody else's list
   * and is tried again sooner.
   */
  want(names: ReadonlyMap<string, boolean>): void;
  /** Null until the first answer, good or bad. */
  of(name: string): KnownName | null;
  /** Asks for all that failed at once: the network changed. */
  retry(): void;
  stop(): void;
};

export type NamesOptions = {
  readonly clock: Clock;
  readonly lookup: Lookup;
  /** Whenever `of` says something new. */
  readonly onChange: () => void;
};

/** The resolver's cache knows the record's lifetime and we do not; a moved detour is found within a minute. */
const AGAIN_MS = 60_000;
const RETRY_FIRST_MS = 5_000;
const RETRY_LONGEST_MS = { own: AGAIN_MS, listed: 600_000 } as const;
/** The C library's resolver holds a thread for seconds when nobody answers; Node lends it two (libuv, slow I/O). */
const AT_ONCE = 2;
/** Of those for listed names, so that a list of dead ones never keeps the user's own waiting. */
const LISTED_AT_ONCE = 1;
const MOST_ADDRESSES = 64;

type Entry = {
  readonly name: string;
  own: boolean;
  known: KnownName | null;
  /** Next wait after a failure. */
  retryMs: number;
  timer: Cancel | null;
};

/** Between `ms` less 10 % and `ms` plus 10 %, so that many hosts do not ask in step. */
export function roughly(ms: number, clock: Clock): number {
  const bytes = new Uint8Array(clock.random(4));
  return ms * (0.9 + 0.2 * (new DataView(bytes.buffer).getUint32(0) / 2 ** 32));
}

export function createNames({ clock, lookup, onChange }: NamesOptions): Names {
  const entries = new Map<string, Entry>();
  const waiting = new Set<Entry>();
  let running = 0;
  let runningListed = 0;

  function enqueue(entry: Entry): void {
    entry.timer?.();
    entry.timer = null;
    waiting.add(entry);
    pump();
  }

  function pump(): void {
    while (running < AT_ONCE && waiting.size > 0) {
      const all = [...waiting];
      const next = all.find(({ own }) => own) ?? (runningListed < LISTED_AT_ONCE ? all[0] : undefined);
      if (!next) return;
      waiting.delete(next);
      void ask(next);
    }
  }

  async function ask(entry: Entry): Promise<void> {
    const { own } = entry;
    running++;
    if (!own) runningListed++;
    let answer: KnownName;
    try {
      const found = await lookup.addresses(entry.name);
      answer =
        found.length > 0
          ? { addresses: inOrder(found), why: null }
          : { addresses: entry.known?.addresses ?? [], why: 'NO_ADDRESS' };
    } catch (error) {
      answer = { addresses: entry.known?.addresses ?? [], why: codeOf(error) };
    }
    running--;
    if (!own) runningListed--;
    if (entries.get(entry.name) === entry) take(entry, answer);
    pump();
  }

  function take(entry: Entry, answer: KnownName): void {
    const { own, known } = entry;
    entry.known = answer;
    const failed = answer.why !== null;
    const wait = failed ? entry.retryMs : AGAIN_MS;
    const longest = own ? RETRY_LONGEST_MS.own : RETRY_LONGEST_MS.listed;
    entry.retryMs = failed ? Math.min(entry.retryMs * 2, longest) : RETRY_FIRST_MS;
    entry.timer = clock.after(roughly(wait, clock), () => enqueue(entry));
    if (!known || known.why !== answer.why || !sameAddresses(known.addresses, answer.addresses)) onChange();
  }

  return {
    want(names) {
      for (const [name, entry] of entries) {
        if (names.has(name)) continue;
        entries.delete(name);
        waiting.delete(entry);
        entry.timer?.();
      }
      for (const [name, own] of names) {
        const entry = entries.get(name);
        if (entry) {
          entry.own = own;
          continue;
        }
        const fresh: Entry = { name, own, known: null, retryMs: RETRY_FIRST_MS, timer: null };
        entries.set(name, fresh);
        waiting.add(fresh);
      }
      pump();
    },
    of: (name) => entries.get(name)?.known ?? null,
    retry() {
      for (const entry of entries.values()) {
        if (!entry.known?.why || !entry.timer) continue;
        entry.retryMs = RETRY_FIRST_MS;
        enqueue(entry);
      }
    },
    stop() {
      for (const entry of entries.values()) entry.timer?.();
      entries.clear();
      waiting.clear();
    },
  };
}

/** Name servers rotate their answers; the same addresses are the same answer. */
function inOrder(addresses: readonly Address[]): readonly Address[] {
  const unique = new Map(addresses.map((address) => [formatAddress(address), address]));
  return [...unique.values()]
    .sort((a, b) => a.family - b.family || (a.value < b.value ? -1 : 1))
    .slice(0, MOST_ADDRESSES);
}

const sameAddresses = (a: readonly Address[], b: readonly Address[]): boolean =>
  a.map(formatAddress).join() === b.map(formatAddress).join();

/** An errno or a resolver's word for it. */
export const codeOf = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : 'UNKNOWN';
