/** How many sequences below the highest seen are still told apart (docs/protocol.md, Replay). */
export const WINDOW = 1024n;
/** Sessions remembered for one key; the least recently used one goes. */
export const SESSIONS_PER_KEY = 8;
/** Answers kept per session, so that a retransmission gets the same answer. */
export const ANSWERS_PER_SESSION = 64;

/** What a sequence number is: not seen before, seen, or too old to tell. */
export type Freshness = 'fresh' | 'repeated' | 'stale';

/** Sliding window over the sequences of one session, after RFC 4303 3.4.3. */
export class ReplayWindow {
  #highest = 0n;
  /** Bit n set: `#highest - n` was seen. */
  #seen = 0n;

  check(sequence: bigint): Freshness {
    if (sequence > this.#highest) return 'fresh';
    const behind = this.#highest - sequence;
    if (behind >= WINDOW || sequence === 0n) return 'stale';
    return (this.#seen >> behind) & 1n ? 'repeated' : 'fresh';
  }

  /** Marks a sequence as seen. Only for requests whose MAC and cookie were right. */
  advance(sequence: bigint): void {
    if (sequence > this.#highest) {
      const ahead = sequence - this.#highest;
      this.#seen = ahead >= WINDOW ? 1n : ((this.#seen << ahead) | 1n) & ((1n << WINDOW) - 1n);
      this.#highest = sequence;
    } else {
      this.#seen |= 1n << (this.#highest - sequence);
    }
  }
}

/** Where a message has its MAC, and how long it is (control.ts). */
const MAC_OFFSET = 80;
const MAC_BYTES = 16;
const ANSWER_BYTES = 96;
const SLOT_BYTES = MAC_BYTES + ANSWER_BYTES;

/**
 * What the router remembers of one session: the window, and the last answers by sequence with the request's MAC, so
 * that only the very same bytes get a stored answer. The answers lie in one piece of memory: as objects, those of 240
 * sessions would take 10 MB and not 2.
 */
export class Session {
  readonly window = new ReplayWindow();
  readonly #sequences: bigint[] = [];
  #slots = new Uint8Array(0);
  #next = 0;

  #slot(index: number): Uint8Array {
    return this.#slots.subarray(index * SLOT_BYTES, (index + 1) * SLOT_BYTES);
  }

  /** The stored answer to exactly these request bytes (whose MAC was right), or null. */
  answerTo(sequence: bigint, request: Uint8Array): Uint8Array | null {
    const index = this.#sequences.lastIndexOf(sequence);
    if (index < 0) return null;
    const slot = this.#slot(index);
    const same = slot.subarray(0, MAC_BYTES).every((byte, at) => byte === request[MAC_OFFSET + at]);
    return same ? slot.slice(MAC_BYTES) : null;
  }

  remember(sequence: bigint, request: Uint8Array, answer: Uint8Array): void {
    const index = this.#next;
    this.#next = (this.#next + 1) % ANSWERS_PER_SESSION;
    if ((index + 1) * SLOT_BYTES > this.#slots.length) {
      // Most sessions ask for a handful of things: room for 8 answers, then 16, 32, 64.
      const grown = new Uint8Array(Math.max(8 * SLOT_BYTES, this.#slots.length * 2));
      grown.set(this.#slots);
      this.#slots = grown;
    }
    this.#sequences[index] = sequence;
    const slot = this.#slot(index);
    slot.set(request.subarray(MAC_OFFSET, MAC_OFFSET + MAC_BYTES));
    slot.set(answer, MAC_BYTES);
  }
}

/** Sessions of all keys, bounded per key; the least recently used one of a key goes first. */
export class Sessions {
  readonly #byKey = new Map<number, Map<bigint, Session>>();

  /** The session, made if it is new. Only for requests whose MAC and cookie were right. */
  use(keyId: number, id: bigint): Session {
    const sessions = this.#byKey.get(keyId) ?? new Map<bigint, Session>();
    this.#byKey.set(keyId, sessions);
    const session = sessions.get(id) ?? new Session();
    // Insertion order is the order of use.
    sessions.delete(id);
    sessions.set(id, session);
    const oldest = sessions.keys().next();
    if (sessions.size > SESSIONS_PER_KEY && !oldest.done) sessions.delete(oldest.value);
    return session;
  }

  /** Forgets a key that was revoked. */
  forget(keyId: number): void {
    this.#byKey.delete(keyId);
  }
}
