import type { Address, Endpoint, PortRange } from '../protocol/address.ts';

/**
 * Who has which port until when. A table that decides and remembers; it takes the time as an argument, and it changes
 * only when its owner says that the kernel has followed (`committed`). Times are monotonic milliseconds, lifetimes
 * seconds as on the wire.
 */

/** A key's id, or the unauthenticated clients of protocol version 1. */
export type Owner = number | 'v1';

/** The lease is (owner, client, destination); the protocol is always TCP. */
export type Subject = { readonly owner: Owner; readonly client: Address; readonly destination: Endpoint };

export type Ask = Subject & {
  /** A port the client would like; 0 for any. */
  readonly suggestedPort: number;
  /** Seconds wanted; 0 for the default. */
  readonly lifetime: number;
};

export type Lease = Subject & { readonly port: number; readonly expires: number };

/** What the kernel must do before the table may believe it. */
export type Write = {
  readonly kind: 'add' | 'renew' | 'remove';
  readonly lease: Lease;
  /** Seconds granted from the commit on; 0 for a removal. */
  readonly lifetime: number;
};

export type LeaseRefusal = 'NO_RESOURCES' | 'QUOTA' | 'RATE';

export type Plan =
  | { readonly kind: 'write'; readonly write: Write }
  /** Nothing to do in the kernel: what is there lasts long enough (or, for a release, is not there). */
  | { readonly kind: 'settled'; readonly lease: Lease | null }
  /** A transaction about this very lease is under way: ask again after it. */
  | { readonly kind: 'busy' }
  | { readonly kind: 'refused'; readonly result: LeaseRefusal; readonly retryAfter: number };

export type LeaseLimits = {
  readonly ports: PortRange;
  /** Longest lifetime granted, seconds. */
  readonly longest: number;
  /** Whether a client's port serves something else. */
  readonly isReserved?: (client: Address, port: number) => boolean;
};

export const SHORTEST_LIFETIME = 60;
const DEFAULT_LIFETIME = 600;
/** What the kernel keeps an element beyond the promise, seconds (docs/protocol.md, Lifetimes). */
export const GRACE = 5;
const QUARANTINE_MS = 120_000;
export const LEASES_PER_KEY = 256;
const NEW_PER_SECOND = 20;
const NEW_BURST = 64;
/** Elements of each of the kernel's two maps; a power of two. */
export const MAP_SIZE = 65_536;
/** Version 1 proves nothing about its sender, so together its clients get no more than this share of a map. */
const V1_LEASES = 8_192;
/** Freed ports remembered at once; beyond that the oldest are forgotten early. */
const QUARANTINES = 65_536;
const RETRY_PASSING = 30;

/** What is known of a row, as bits. */
const ROW = {
  USED: 1,
  /** The kernel has it. */
  LIVE: 2,
  /** A transaction about it is under way. */
  BUSY: 4,
  /** Its owner is `v1`, not a key. */
  V1: 8,
} as const;

/** Rows by a hash of theirs. A row counts from 1 here, so that fresh memory is empty. */
class Chains {
  readonly #heads = new Uint32Array(MAP_SIZE);
  readonly #next = new Uint32Array(MAP_SIZE);

  /** The first row that may have this hash; -1 for none. */
  first(hash: number): number {
    return (this.#heads[hash % MAP_SIZE] ?? 0) - 1;
  }

  after(row: number): number {
    return (this.#next[row] ?? 0) - 1;
  }

  add(hash: number, row: number): void {
    this.#next[row] = this.first(hash) + 1;
    this.#heads[hash % MAP_SIZE] = row + 1;
  }

  remove(hash: number, row: number): void {
    const next = this.after(row) + 1;
    let before = this.first(hash);
    if (before === row) {
      this.#heads[hash % MAP_SIZE] = next;
      return;
    }
    while (before >= 0 && this.after(before) !== row) before = this.after(before);
    if (before >= 0) this.#next[before] = next;
  }
}

/** Stirs `value` into a hash of 32 bits (the finaliser of MurmurHash3). */
function stir(hash: number, value: number): number {
  let mixed = Math.imul(hash ^ value, 0x85ebca6b);
  mixed = Math.imul(mixed ^ (mixed >>> 13), 0xc2b2ae35);
  return (mixed ^ (mixed >>> 16)) >>> 0;
}

/**
 * The leases of one family's clients, as many as the kernel's map holds, in columns of numbers: 40 bytes a lease (IPv6: 64) and
 * no objects, where objects, strings and maps took 290. Memory that no lease has used yet is not even touched.
 */
class Rows {
  /** 32-bit words of an address. */
  readonly #words: 1 | 4;
  readonly #clients: Uint32Array;
  readonly #servers: Uint32Array;
  readonly #owners = new Uint32Array(MAP_SIZE);
  readonly #ports = new Uint16Array(MAP_SIZE);
  readonly #serverPorts = new Uint16Array(MAP_SIZE);
  readonly expires = new Float64Array(MAP_SIZE);
  readonly #bits = new Uint8Array(MAP_SIZE);
  /** By client and port: what the kernel's map is keyed by. */
  readonly #bySlot = new Chains();
  /** By owner, client and destination. */
  readonly #bySubject = new Chains();
  readonly #free: number[] = [];
  /** No row from here on was ever used. */
  #end = 0;
  /** The addresses that are being looked for. */
  readonly #client: Uint32Array;
  readonly #server: Uint32Array;

  constructor(family: 4 | 6) {
    this.#words = family === 4 ? 1 : 4;
    this.#clients = new Uint32Array(MAP_SIZE * this.#words);
    this.#servers = new Uint32Array(MAP_SIZE * this.#words);
    this.#client = new Uint32Array(this.#words);
    this.#server = new Uint32Array(this.#words);
  }

  get size(): number {
    return this.#end - this.#free.length;
  }

  /** The row of a subject; -1 for none. */
  find({ owner, client, destination }: Subject): number {
    if (destination.address.family !== client.family) return -1;
    this.#write(this.#client, 0, client);
    this.#write(this.#server, 0, destination.address);
    const [id, v1] = owner === 'v1' ? [0, ROW.V1] : [owner >>> 0, 0];
    const hash = this.#subjectHash(id, this.#client, this.#server, 0, destination.port);
    for (let row = this.#bySubject.first(hash); row >= 0; row = this.#bySubject.after(row)) {
      if (this.#owners[row] !== id || ((this.#bits[row] ?? 0) & ROW.V1) !== v1) continue;
      if (this.#serverPorts[row] !== destination.port) continue;
      if (this.#same(this.#clients, row, this.#client) && this.#same(this.#servers, row, this.#server)) return row;
    }
    return -1;
  }

  /** The row of whoever has a client's port; -1 for nobody. */
  holder(client: Address, port: number): number {
    this.#write(this.#client, 0, client);
    const hash = this.#slotHash(this.#client, 0, port);
    for (let row = this.#bySlot.first(hash); row >= 0; row = this.#bySlot.after(row)) {
      if (this.#ports[row] === port && this.#same(this.#clients, row, this.#client)) return row;
    }
    return -1;
  }

  /** Adds a row, neither live nor busy. Only where there is room, and of one family. */
  insert({ owner, client, destination }: Subject, port: number): number {
    const row = this.#free.pop() ?? this.#end++;
    const id = owner === 'v1' ? 0 : owner >>> 0;
    this.#write(this.#clients, row, client);
    this.#write(this.#servers, row, destination.address);
    this.#owners[row] = id;
    this.#ports[row] = port;
    this.#serverPorts[row] = destination.port;
    this.#bits[row] = ROW.USED | (owner === 'v1' ? ROW.V1 : 0);
    this.#bySlot.add(this.#slotHash(this.#clients, row, port), row);
    this.#bySubject.add(this.#subjectHash(id, this.#clients, this.#servers, row, destination.port), row);
    return row;
  }

  remove(row: number): void {
    const id = this.#owners[row] ?? 0;
    this.#bySlot.remove(this.#slotHash(this.#clients, row, this.#ports[row] ?? 0), row);
    const hash = this.#subjectHash(id, this.#clients, this.#servers, row, this.#serverPorts[row] ?? 0);
    this.#bySubject.remove(hash, row);
    this.#bits[row] = 0;
    this.#free.push(row);
  }

  has(row: number, bit: number): boolean {
    return ((this.#bits[row] ?? 0) & bit) !== 0;
  }

  set(row: number, bit: number): void {
    this.#bits[row] = (this.#bits[row] ?? 0) | bit;
  }

  clear(row: number, bit: number): void {
    this.#bits[row] = (this.#bits[row] ?? 0) & ~bit;
  }

  /** Every row that the kernel has; rows may be removed meanwhile. */
  *live(): Generator<number> {
    for (let row = 0; row < this.#end; row++) if (this.has(row, ROW.LIVE)) yield row;
  }

  owner(row: number): Owner {
    return this.has(row, ROW.V1) ? 'v1' : (this.#owners[row] ?? 0);
  }

  port(row: number): number {
    return this.#ports[row] ?? 0;
  }

  /** A row as others see it, as it is now. */
  lease(row: number): Lease {
    return {
      owner: this.owner(row),
      client: this.#read(this.#clients, row),
      destination: { address: this.#read(this.#servers, row), port: this.#serverPorts[row] ?? 0 },
      port: this.port(row),
      expires: this.expires[row] ?? 0,
    };
  }

  #write(column: Uint32Array, row: number, { value }: Address): void {
    if (this.#words === 1) {
      column[row] = Number(value);
      return;
    }
    for (let word = 0; word < 4; word++) column[row * 4 + word] = Number((value >> BigInt(32 * word)) & 0xffffffffn);
  }

  #read(column: Uint32Array, row: number): Address {
    if (this.#words === 1) return { family: 4, value: BigInt(column[row] ?? 0) };
    let value = 0n;
    for (let word = 3; word >= 0; word--) value = (value << 32n) | BigInt(column[row * 4 + word] ?? 0);
    return { family: 6, value };
  }

  #same(column: Uint32Array, row: number, wanted: Uint32Array): boolean {
    for (let word = 0; word < this.#words; word++) {
      if (column[row * this.#words + word] !== wanted[word]) return false;
    }
    return true;
  }

  #hash(seed: number, column: Uint32Array, row: number): number {
    let hash = seed;
    for (let word = 0; word < this.#words; word++) hash = stir(hash, column[row * this.#words + word] ?? 0);
    return hash;
  }

  #slotHash(clients: Uint32Array, row: number, port: number): number {
    return this.#hash(stir(0, port), clients, row);
  }

  #subjectHash(owner: number, clients: Uint32Array, servers: Uint32Array, row: number, port: number): number {
    return this.#hash(this.#hash(stir(stir(1, owner), port), clients, row), servers, row);
  }
}

type Account = { leases: number; tokens: number; refilled: number };

type Freed = { readonly until: number; readonly destination: string };

const textOf = ({ family, value }: Address): string => (family === 4 ? `${Number(value)}-` : value.toString(36));
const destinationKey = ({ address, port }: Endpoint): string => `${textOf(address)}.${port}`;
const slotKey = (client: Address, port: number): string => `${textOf(client)}.${port}`;
/** A key is one account; of version 1, every client. */
const accountKey = ({ owner, client }: Subject): string | number => (owner === 'v1' ? textOf(client) : owner);

/** What the kernel turns out to hold, against what is known. Nothing may be planned as long as it lasts. */
export type Comparison = {
  /** Tells of an element that the kernel holds, once or more often. False when it is nobody's lease. */
  found(subject: Subject, port: number): boolean;
  /** What puts the leases there that were not found, as they are at `now`. */
  missing(now: number): Write[];
};

export class Leases {
  readonly #limits: LeaseLimits;
  readonly #rows = { 4: new Rows(4), 6: new Rows(6) } as const;
  readonly #freed = new Map<string, Freed>();
  readonly #accounts = new Map<string | number, Account>();
  #v1 = 0;

  constructor(limits: LeaseLimits) {
    this.#limits = limits;
  }

  /** Leases the kernel holds or is about to hold. */
  get size(): number {
    return this.#rows[4].size + this.#rows[6].size;
  }

  /** Every lease that the kernel holds, as it is now. */
  *live(): Generator<Lease> {
    for (const rows of [this.#rows[4], this.#rows[6]]) for (const row of rows.live()) yield rows.lease(row);
  }

  get(subject: Subject): Lease | null {
    const rows = this.#rows[subject.client.family];
    const row = rows.find(subject);
    return row >= 0 && rows.has(row, ROW.LIVE) ? rows.lease(row) : null;
  }

  /** Whether a client's port is a lease's, or was until shortly. */
  isTaken(client: Address, port: number, now: number): boolean {
    const freed = this.#freed.get(slotKey(client, port));
    return this.#rows[client.family].holder(client, port) >= 0 || (freed !== undefined && freed.until > now);
  }

  /**
   * Plans to create or renew a lease. A planned write reserves its port until `committed` or `failed` is called for it.
   * `draw`, from 0 to 1 (excluded), decides where the search for a free port starts. With `refuseNew`, only what is
   * held already is renewed.
   */
  plan(ask: Ask, now: number, draw: number, refuseNew = false): Plan {
    const lifetime = Math.min(Math.max(ask.lifetime || DEFAULT_LIFETIME, SHORTEST_LIFETIME), this.#limits.longest);
    const rows = this.#rows[ask.client.family];
    // Policy has said no to this before; here it would become another place.
    if (ask.destination.address.family !== ask.client.family) {
      return { kind: 'refused', result: 'NO_RESOURCES', retryAfter: RETRY_PASSING };
    }
    const held = rows.find(ask);
    if (held >= 0) {
      if (rows.has(held, ROW.BUSY)) return { kind: 'busy' };
      if (this.#isOver(rows, held, now)) this.#drop(rows, held, now);
      else if ((rows.expires[held] ?? 0) - now >= lifetime * 1000) return { kind: 'settled', lease: rows.lease(held) };
      else return this.#write(rows, held, 'renew', lifetime);
    }
    if (refuseNew) return { kind: 'refused', result: 'NO_RESOURCES', retryAfter: RETRY_PASSING };
    const account = this.#account(ask, now);
    if (account.leases >= LEASES_PER_KEY) return { kind: 'refused', result: 'QUOTA', retryAfter: RETRY_PASSING };
    if (rows.size >= MAP_SIZE || (ask.owner === 'v1' && this.#v1 >= V1_LEASES)) {
      return { kind: 'refused', result: 'NO_RESOURCES', retryAfter: RETRY_PASSING };
    }
    if (account.tokens < 1) {
      const wait = Math.ceil((1 - account.tokens) / NEW_PER_SECOND);
      return { kind: 'refused', result: 'RATE', retryAfter: Math.max(1, wait) };
    }
    const port = this.#freePort(ask, now, draw);
    if (port === null) return { kind: 'refused', result: 'NO_RESOURCES', retryAfter: RETRY_PASSING };
    account.tokens -= 1;
    return this.#write(rows, this.#insert(ask, port, now, account), 'add', lifetime);
  }

  /** Plans to give a lease up. */
  planRelease(subject: Subject, now: number): Plan {
    const rows = this.#rows[subject.client.family];
    const held = rows.find(subject);
    if (held < 0) return { kind: 'settled', lease: null };
    if (rows.has(held, ROW.BUSY)) return { kind: 'busy' };
    if (this.#isOver(rows, held, now)) {
      this.#drop(rows, held, now);
      return { kind: 'settled', lease: null };
    }
    return this.#write(rows, held, 'remove', 0);
  }

  /** The kernel has done `write`, at the latest at `now`. */
  committed(write: Write, now: number): void {
    const rows = this.#rows[write.lease.client.family];
    const row = this.#planned(write);
    if (row < 0) return;
    rows.clear(row, ROW.BUSY);
    if (write.kind === 'remove') {
      this.#drop(rows, row, now);
      return;
    }
    rows.set(row, ROW.LIVE);
    rows.expires[row] = now + write.lifetime * 1000;
  }

  /** The kernel has not done `write`: everything is as before the plan. */
  failed(write: Write): void {
    const rows = this.#rows[write.lease.client.family];
    const row = this.#planned(write);
    if (row < 0) return;
    rows.clear(row, ROW.BUSY);
    // A port that was never in the kernel needs no quarantine.
    if (!rows.has(row, ROW.LIVE)) this.#remove(rows, row);
  }

  /**
   * Takes over what was found in the kernel, `remaining` seconds before it expires there; the same may be found again.
   * False when it contradicts what is known, or when the table has no room: such an element belongs to nobody and ought to
   * be removed.
   */
  adopt(subject: Subject, port: number, remaining: number, now: number): boolean {
    const rows = this.#rows[subject.client.family];
    const held = rows.find(subject);
    if (held >= 0) return rows.port(held) === port;
    if (subject.destination.address.family !== subject.client.family) return false;
    if (rows.holder(subject.client, port) >= 0 || rows.size >= MAP_SIZE) return false;
    const row = this.#insert(subject, port, now, this.#account(subject, now));
    rows.set(row, ROW.LIVE);
    rows.expires[row] = now + Math.max(0, remaining - GRACE) * 1000;
    return true;
  }

  /** Begins to compare with the kernel. */
  compare(): Comparison {
    const seen = { 4: new Uint8Array(MAP_SIZE), 6: new Uint8Array(MAP_SIZE) } as const;
    return {
      found: (subject, port) => {
        const { family } = subject.client;
        const rows = this.#rows[family];
        const row = rows.find(subject);
        if (row < 0 || !rows.has(row, ROW.LIVE) || rows.port(row) !== port) return false;
        seen[family][row] = 1;
        return true;
      },
      missing: (now) => {
        const writes: Write[] = [];
        for (const family of [4, 6] as const) {
          const rows = this.#rows[family];
          for (const row of rows.live()) {
            const lifetime = Math.floor(((rows.expires[row] ?? 0) - now) / 1000);
            if (seen[family][row] === 0 && lifetime > 0) writes.push({ kind: 'add', lease: rows.lease(row), lifetime });
          }
        }
        return writes;
      },
    };
  }

  /** Drops what the kernel has dropped by now, and returns it. Also forgets quarantines and idle accounts. */
  sweep(now: number): Lease[] {
    const over: Lease[] = [];
    for (const rows of [this.#rows[4], this.#rows[6]]) {
      for (const row of rows.live()) {
        if (rows.has(row, ROW.BUSY) || !this.#isOver(rows, row, now)) continue;
        over.push(rows.lease(row));
        this.#drop(rows, row, now);
      }
    }
    for (const [slot, freed] of this.#freed) if (freed.until <= now) this.#freed.delete(slot);
    for (const [key, account] of this.#accounts) {
      this.#refill(account, now);
      if (account.leases === 0 && account.tokens >= NEW_BURST) this.#accounts.delete(key);
    }
    return over;
  }

  /** Plans the removal of every lease of an owner who lost the right to them. */
  planRevocation(owner: Owner, now: number): Write[] {
    const writes: Write[] = [];
    for (const rows of [this.#rows[4], this.#rows[6]]) {
      for (const row of rows.live()) {
        if (rows.owner(row) !== owner || rows.has(row, ROW.BUSY)) continue;
        if (this.#isOver(rows, row, now)) this.#drop(rows, row, now);
        else writes.push(this.#write(rows, row, 'remove', 0).write);
      }
    }
    return writes;
  }

  #write(rows: Rows, row: number, kind: Write['kind'], lifetime: number): Plan & { readonly kind: 'write' } {
    rows.set(row, ROW.BUSY);
    return { kind: 'write', write: { kind, lease: rows.lease(row), lifetime } };
  }

  /** The kernel keeps an element a little longer than promised; until then it still takes a port. */
  #isOver(rows: Rows, row: number, now: number): boolean {
    return rows.has(row, ROW.LIVE) && (rows.expires[row] ?? 0) + GRACE * 1000 <= now;
  }

  /** The row that a write was planned for; -1 when there is none any more. */
  #planned({ lease }: Write): number {
    const rows = this.#rows[lease.client.family];
    const row = rows.find(lease);
    return row >= 0 && rows.has(row, ROW.BUSY) && rows.port(row) === lease.port ? row : -1;
  }

  #account(subject: Subject, now: number): Account {
    const key = accountKey(subject);
    const account = this.#accounts.get(key) ?? { leases: 0, tokens: NEW_BURST, refilled: now };
    this.#accounts.set(key, account);
    this.#refill(account, now);
    return account;
  }

  #refill(account: Account, now: number): void {
    account.tokens = Math.min(NEW_BURST, account.tokens + ((now - account.refilled) / 1000) * NEW_PER_SECOND);
    account.refilled = now;
  }

  #mayTake(ask: Subject, port: number, now: number): boolean {
    if (this.#limits.isReserved?.(ask.client, port)) return false;
    const rows = this.#rows[ask.client.family];
    const held = rows.holder(ask.client, port);
    if (held >= 0) {
      if (rows.has(held, ROW.BUSY) || !this.#isOver(rows, held, now)) return false;
      this.#drop(rows, held, now);
    }
    const freed = this.#freed.get(slotKey(ask.client, port));
    return !freed || freed.until <= now || freed.destination === destinationKey(ask.destination);
  }

  #freePort(ask: Ask, now: number, draw: number): number | null {
    const { first, last } = this.#limits.ports;
    const suggested = ask.suggestedPort;
    if (suggested >= first && suggested <= last && this.#mayTake(ask, suggested, now)) return suggested;
    const size = last - first + 1;
    const start = Math.floor(draw * size);
    for (let step = 0; step < size; step++) {
      const port = first + ((start + step) % size);
      if (this.#mayTake(ask, port, now)) return port;
    }
    return null;
  }

  #insert(subject: Subject, port: number, now: number, account: Account): number {
    const rows = this.#rows[subject.client.family];
    const row = rows.insert(subject, port);
    rows.expires[row] = now;
    account.leases += 1;
    if (subject.owner === 'v1') this.#v1 += 1;
    return row;
  }

  #remove(rows: Rows, row: number): void {
    const lease = rows.lease(row);
    rows.remove(row);
    if (lease.owner === 'v1') this.#v1 -= 1;
    const account = this.#accounts.get(accountKey(lease));
    if (account) account.leases -= 1;
  }

  /** Removes a row that was in the kernel, and keeps its port from other destinations for a while. */
  #drop(rows: Rows, row: number, now: number): void {
    const { client, port, destination } = rows.lease(row);
    this.#remove(rows, row);
    const slot = slotKey(client, port);
    this.#freed.delete(slot);
    this.#freed.set(slot, { until: now + QUARANTINE_MS, destination: destinationKey(destination) });
    const oldest = this.#freed.keys().next();
    if (this.#freed.size > QUARANTINES && !oldest.done) this.#freed.delete(oldest.value);
  }
}
