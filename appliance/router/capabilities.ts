import type { Address, PortRange } from '../protocol/address.ts';

/**
 * Which port takes joins of which client that name their server themselves, until when. A table that decides and remembers; it takes
 * the time as an argument, and changes only when its owner says what the kernel did. Times are monotonic milliseconds, lifetimes seconds.
 * A capability is (key, client address, session).
 */

export type CapabilityAsk = {
  /** A key's id. */
  readonly owner: number;
  readonly client: Address;
  readonly session: bigint;
  /** Whether the client has shown that it receives what is sent to that address. */
  readonly proven: boolean;
};

export type Capability = Omit<CapabilityAsk, 'proven'> & {
  readonly port: number;
  readonly expires: number;
};

export type CapabilityWrite = {
  readonly capability: Capability;
  readonly proven: boolean;
  /** Whose place it takes; null where there is room. */
  readonly instead: Capability | null;
};

/** Seconds that a port is promised for with every answer to HELLO and PING (docs/protocol.md, Capability ports). */
export const CAPABILITY_LIFETIME = 120;
/** As many sessions as a key has, from two addresses each (a carrier's NAT). */
export const CAPABILITIES_PER_KEY = 16;
/** Of all keys together: elements of the kernel's set. */
export const MOST_CAPABILITIES = 4_096;
/** Free ports looked for before there is none. */
const TRIES = 64;

type Row = Capability & { readonly proven: boolean };

const subjectKey = ({ owner, client: { family, value }, session }: Omit<CapabilityAsk, 'proven'>): string =>
  `${owner}.${family}.${value}.${session}`;
const slotKey = ({ family, value }: Address, port: number): string => `${family}.${value}.${port}`;

export class Capabilities {
  readonly #ports: PortRange;
  /** Seconds that the kernel keeps an element beyond the promise. */
  readonly #graceMs: number;
  readonly #rows = new Map<string, Row>();
  readonly #slots = new Set<string>();

  constructor(ports: PortRange, grace: number) {
    this.#ports = ports;
    this.#graceMs = grace * 1_000;
  }

  get size(): number {
    return this.#rows.size;
  }

  all(): readonly Capability[] {
    return [...this.#rows.values()];
  }

  /** Whether a client's port is a capability's, so that no lease may have it. */
  holds(client: Address, port: number): boolean {
    return this.#slots.has(slotKey(client, port));
  }

  /**
   * Plans to create or extend a capability; null when there is no room. Whoever is not proven takes nobody's place: a request that
   * somebody recorded can be sent from any address. `draw`, from 0 to 1 (excluded), decides the port; `taken` says which are a lease's.
   */
  plan(ask: CapabilityAsk, now: number, draw: () => number, taken: (port: number) => boolean): CapabilityWrite | null {
    const { owner, client, session } = ask;
    const held = this.#rows.get(subjectKey(ask));
    const expires = now + CAPABILITY_LIFETIME * 1_000;
    if (held && !this.#isOver(held, now)) {
      return {
        capability: { owner, client, session, port: held.port, expires },
        proven: held.proven || ask.proven,
        instead: null,
      };
    }
    if (held) this.#drop(held);
    const instead = this.#room(ask);
    if (instead === 'none') return null;
    const { first, last } = this.#ports;
    for (let tries = 0; tries < TRIES; tries++) {
      const port = first + Math.floor(draw() * (last - first + 1));
      if (this.holds(client, port) || taken(port)) continue;
      return { capability: { owner, client, session, port, expires }, proven: ask.proven, instead };
    }
    return null;
  }

  /**
   * The kernel has done what was planned, or it is not known whether it has: then nobody is told the port, but nobody else gets it
   * before it is over in any case.
   */
  committed({ capability, proven, instead }: CapabilityWrite): void {
    for (const old of [this.#rows.get(subjectKey(capability)), instead]) if (old) this.#drop(old);
    this.#keep({ ...capability, proven });
  }

  /** Takes over what was found in the kernel. False when it contradicts what is known: it belongs to nobody. */
  adopt(capability: Capability): boolean {
    const { first, last } = this.#ports;
    const { port, client } = capability;
    if (port < first || port > last || this.holds(client, port) || this.#rows.has(subjectKey(capability))) return false;
    if (this.size >= MOST_CAPABILITIES) return false;
    this.#keep({ ...capability, proven: true });
    return true;
  }

  /** Forgets those of an owner, and returns them: they are still to be taken out of the kernel. */
  revoke(owner: number): readonly Capability[] {
    const gone = this.all().filter((row) => row.owner === owner);
    for (const row of gone) this.#drop(row);
    return gone;
  }

  /** Drops what the kernel has dropped by now. */
  sweep(now: number): void {
    for (const row of this.all()) if (this.#isOver(row, now)) this.#drop(row);
  }

  /** Whose place a new one takes: nobody's (null), another's of the same key, or `none`. */
  #room({ owner, proven }: CapabilityAsk): Capability | null | 'none' {
    const own = [...this.#rows.values()].filter((row) => row.owner === owner);
    if (own.length < CAPABILITIES_PER_KEY && this.size < MOST_CAPABILITIES) return null;
    if (!proven) return 'none';
    const [first] = own.toSorted((a, b) => Number(a.proven) - Number(b.proven) || a.expires - b.expires);
    return first ?? 'none';
  }

  #isOver(row: Capability, now: number): boolean {
    return row.expires + this.#graceMs <= now;
  }

  #keep(row: Row): void {
    this.#rows.set(subjectKey(row), row);
    this.#slots.add(slotKey(row.client, row.port));
  }

  #drop(row: Capability): void {
    this.#rows.delete(subjectKey(row));
    this.#slots.delete(slotKey(row.client, row.port));
  }
}
