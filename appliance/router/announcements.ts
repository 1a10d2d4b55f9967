import type { Address, Endpoint } from '../protocol/address.ts';
import { SHORTEST_LIFETIME } from './leases.ts';

/**
 * Which servers take joins of anybody through this host until when. A table that decides and remembers; it takes the time as an argument, and
 * changes only when its owner says that the kernel has followed. Times are monotonic milliseconds, lifetimes seconds. The port here
 * is the server's own: clients join the port that their connection uses.
 */

export type AnnouncementAsk = {
  /** A key's id. */
  readonly owner: number;
  readonly server: Endpoint;
  /** Seconds wanted; 0 for the default. */
  readonly lifetime: number;
};

export type Announcement = { readonly owner: number; readonly server: Endpoint; readonly expires: number };

export type AnnouncementPlan =
  | { readonly kind: 'write'; readonly announcement: Announcement; readonly lifetime: number; readonly isNew: boolean }
  | { readonly kind: 'refused'; readonly result: 'NO_RESOURCES' | 'QUOTA' };

export const ANNOUNCEMENTS_PER_KEY = 8;
/** Of each family; elements of the kernel's map. */
export const MOST_ANNOUNCEMENTS = 256;
const DEFAULT_LIFETIME = 600;

const slotKey = ({ address: { family }, port }: Endpoint): string => `${family}.${port}`;
const sameAddress = (a: Address, b: Address): boolean => a.family === b.family && a.value === b.value;

export class Announcements {
  /** Longest lifetime granted, seconds. */
  readonly #longest: number;
  readonly #graceMs: number;
  /** By family and port. */
  readonly #rows = new Map<string, Announcement>();

  /** `grace` is what the kernel keeps an element beyond the promise, seconds. */
  constructor(longest: number, grace: number) {
    this.#longest = longest;
    this.#graceMs = grace * 1_000;
  }

  get size(): number {
    return this.#rows.size;
  }

  all(): readonly Announcement[] {
    return [...this.#rows.values()];
  }

  /** Plans to announce, or to go on. `taken`: whether something on this host listens on a port. */
  plan({ owner, server, lifetime }: AnnouncementAsk, now: number, taken: (port: number) => boolean): AnnouncementPlan {
    const seconds = Math.min(Math.max(lifetime || DEFAULT_LIFETIME, SHORTEST_LIFETIME), this.#longest);
    const held = this.#rows.get(slotKey(server));
    const isOurs = held?.owner === owner && sameAddress(held.server.address, server.address);
    if (held && !isOurs && !this.#isOver(held, now)) return { kind: 'refused', result: 'NO_RESOURCES' };
    if (taken(server.port)) return { kind: 'refused', result: 'NO_RESOURCES' };
    const isNew = !isOurs;
    if (isNew) {
      const all = this.all();
      if (all.filter((row) => row.owner === owner).length >= ANNOUNCEMENTS_PER_KEY)
        return { kind: 'refused', result: 'QUOTA' };
      const family = all.filter((row) => row.server.address.family === server.address.family);
      if (family.length >= MOST_ANNOUNCEMENTS) return { kind: 'refused', result: 'NO_RESOURCES' };
    }
    const expires = Math.max(isOurs ? held.expires : 0, now + seconds * 1_000);
    return { kind: 'write', announcement: { owner, server, expires }, lifetime: seconds, isNew };
  }

  /** The kernel has done what was planned. */
  committed(announcement: Announcement): void {
    this.#rows.set(slotKey(announcement.server), announcement);
  }

  /** The announcement of that key and server; null when there is none. */
  get(owner: number, server: Endpoint): Announcement | null {
    const held = this.#rows.get(slotKey(server));
    return held?.owner === owner && sameAddress(held.server.address, server.address) ? held : null;
  }

  /** It is gone from the kernel. */
  remove({ server }: Announcement): void {
    this.#rows.delete(slotKey(server));
  }

  /** Takes over what was found in the kernel. False when it contradicts what is known: it belongs to nobody. */
  adopt(announcement: Announcement): boolean {
    if (this.#rows.has(slotKey(announcement.server))) return false;
    this.committed(announcement);
    return true;
  }

  /** Drops what the kernel has dropped by now, and returns it. */
  sweep(now: number): readonly Announcement[] {
    const over = this.all().filter((row) => this.#isOver(row, now));
    for (const row of over) this.remove(row);
    return over;
  }

  #isOver({ expires }: Announcement, now: number): boolean {
    return expires + this.#graceMs <= now;
  }
}
