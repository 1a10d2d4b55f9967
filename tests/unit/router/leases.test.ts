import { describe, expect, it } from 'vitest';
import type { Endpoint } from '../../../appliance/protocol/address.ts';
import {
  type Ask,
  GRACE,
  LEASES_PER_KEY,
  type Lease,
  Leases,
  MAP_SIZE,
  type Plan,
  type Subject,
  type Write,
} from '../../../appliance/router/leases.ts';

const PORTS = { first: 20000, last: 20099 };
const client = (n: number) => ({ family: 4, value: BigInt(0x0a000000 + n) }) as const;
const server = (n: number, port = 443): Endpoint => ({ address: { family: 4, value: BigInt(0x01000000 + n) }, port });
/** Addresses that differ in their upper halves alone. */
const client6 = (n: number) => ({ family: 6, value: (0x20010db8n << 96n) + (BigInt(n) << 64n) + 1n }) as const;
const server6 = (n: number, port = 443): Endpoint => ({
  address: { family: 6, value: (0x2a00n << 112n) + (BigInt(n) << 96n) + 1n },
  port,
});
const ask = (over: Partial<Ask> = {}): Ask => ({
  owner: 1,
  client: client(1),
  destination: server(1),
  suggestedPort: 0,
  lifetime: 600,
  ...over,
});
const table = (longest = 3600): Leases => new Leases({ ports: PORTS, longest });

function write(plan: Plan): Write {
  if (plan.kind !== 'write')
    throw new Error(`expected a write, not ${JSON.stringify(plan, (_, v) => (typeof v === 'bigint' ? `${v}` : v))}`);
  return plan.write;
}

/** What the kernel holds for this subject. */
function held(leases: Leases, subject: Subject): Lease {
  const lease = leases.get(subject);
  if (!lease) throw new Error('there is no such lease');
  return lease;
}

/** Plans and commits at once. */
function grant(leases: Leases, request: Ask, now: number, draw = 0): Lease {
  leases.committed(write(leases.plan(request, now, draw)), now);
  return held(leases, request);
}

describe('a lease', () => {
  it('is the same one for the same question, with the longer lifetime', () => {
    const leases = table();
    const first = grant(leases, ask({ lifetime: 600 }), 0);
    expect(first.expires).toBe(600_000);
    const again = leases.plan(ask({ lifetime: 60 }), 1_000, 0.9);
    expect(again).toMatchObject({ kind: 'settled', lease: { port: first.port, expires: 600_000 } });
    const longer = write(leases.plan(ask({ lifetime: 600 }), 300_000, 0.9));
    expect(longer).toMatchObject({ kind: 'renew', lifetime: 600, lease: { port: first.port } });
    expect(held(leases, ask()).expires).toBe(600_000);
    leases.committed(longer, 300_500);
    expect(held(leases, ask()).expires).toBe(900_500);
    expect(leases.size).toBe(1);
  });

  it.each([
    [0, 600],
    [1, 60],
    [60, 60],
    [1000, 1000],
    [4_294_967_295, 3600],
  ])('asked for %i s lasts %i s', (wanted, granted) =>
    expect(write(table().plan(ask({ lifetime: wanted }), 0, 0)).lifetime).toBe(granted),
  );

  it('never lasts longer than the operator allows', () => {
    expect(write(table(120).plan(ask({ lifetime: 0 }), 0, 0)).lifetime).toBe(120);
  });

  it('differs by key, client, destination and port', () => {
    const leases = table();
    grant(leases, ask(), 0);
    for (const over of [
      { owner: 2 },
      { client: client(2) },
      { destination: server(2) },
      { destination: server(1, 80) },
    ]) {
      expect(write(leases.plan(ask(over), 0, 0)).kind).toBe('add');
    }
  });

  it('gets the port suggested where it is free, and another where it is not', () => {
    const leases = table();
    expect(grant(leases, ask({ suggestedPort: 20050 }), 0).port).toBe(20050);
    expect(grant(leases, ask({ suggestedPort: 20050, destination: server(2) }), 0, 0.3).port).toBe(20030);
    expect(grant(leases, ask({ suggestedPort: 20050, client: client(2) }), 0).port).toBe(20050);
    expect(grant(leases, ask({ suggestedPort: 80, destination: server(3) }), 0, 0.999).port).toBe(20099);
  });

  it('never shares a port of one client, not even among keys', () => {
    const leases = table();
    const ports = Array.from(
      { length: 100 },
      (_, n) => grant(leases, ask({ owner: n % 4, destination: server(n) }), n * 1000, 0.5).port,
    );
    expect(new Set(ports).size).toBe(100);
    expect(leases.plan(ask({ destination: server(200) }), 100_000, 0)).toMatchObject({ result: 'NO_RESOURCES' });
    expect(write(leases.plan(ask({ client: client(2), destination: server(200) }), 100_000, 0)).kind).toBe('add');
  });
});

describe('a transaction under way', () => {
  it('keeps its port from others and its lease from a second transaction', () => {
    const leases = table();
    const first = write(leases.plan(ask(), 0, 0));
    expect(leases.plan(ask(), 0, 0).kind).toBe('busy');
    expect(leases.planRelease(ask(), 0).kind).toBe('busy');
    expect(write(leases.plan(ask({ destination: server(2) }), 0, 0)).lease.port).not.toBe(first.lease.port);
    expect(leases.get(ask())).toBeNull();
  });

  it('that fails leaves everything as it was', () => {
    const leases = table();
    const add = write(leases.plan(ask(), 0, 0));
    leases.failed(add);
    expect(leases.size).toBe(0);
    // Never in the kernel, so free at once, for another destination too.
    expect(grant(leases, ask({ destination: server(2) }), 0, 0).port).toBe(add.lease.port);
    const renewal = write(leases.plan(ask({ destination: server(2), lifetime: 900 }), 1_000, 0));
    leases.failed(renewal);
    expect(leases.get(ask({ destination: server(2) }))?.expires).toBe(600_000);
    const release = write(leases.planRelease(ask({ destination: server(2) }), 2_000));
    leases.failed(release);
    expect(leases.get(ask({ destination: server(2) }))?.expires).toBe(600_000);
  });
});

describe('a freed port', () => {
  it('goes back to the same destination at once, to another after 120 s', () => {
    const leases = table();
    const { port } = grant(leases, ask({ suggestedPort: 20007 }), 0);
    leases.committed(write(leases.planRelease(ask(), 1_000)), 1_000);
    expect(leases.size).toBe(0);
    const other = ask({ destination: server(2), suggestedPort: port });
    const back = write(leases.plan(ask({ suggestedPort: port }), 1_001, 0));
    expect(back.lease.port).toBe(port);
    leases.failed(back);
    const elsewhere = write(leases.plan(other, 120_999, 0));
    expect(elsewhere.lease.port).not.toBe(port);
    leases.failed(elsewhere);
    expect(write(leases.plan(other, 121_000, 0)).lease.port).toBe(port);
  });

  it('is not free before the kernel has dropped the element', () => {
    const leases = table();
    const { port } = grant(leases, ask({ suggestedPort: 20007, lifetime: 60 }), 0);
    expect(leases.sweep(64_999)).toEqual([]);
    expect(write(leases.plan(ask({ lifetime: 60 }), 64_000, 0.9))).toMatchObject({ kind: 'renew', lease: { port } });
    const late = table();
    grant(late, ask({ suggestedPort: 20007, lifetime: 60 }), 0);
    expect(late.sweep(60_000 + GRACE * 1000)).toMatchObject([{ port: 20007 }]);
    expect(late.size).toBe(0);
  });
});

describe('quotas', () => {
  it('stop a key at its number of leases and nobody else, renewals excepted', () => {
    const leases = new Leases({ ports: { first: 20000, last: 29999 }, longest: 3600 });
    for (let n = 0; n < LEASES_PER_KEY; n++) grant(leases, ask({ destination: server(n) }), n * 100);
    const now = LEASES_PER_KEY * 100;
    expect(leases.plan(ask({ destination: server(999) }), now, 0)).toMatchObject({ result: 'QUOTA' });
    expect(leases.plan(ask({ destination: server(999), client: client(9) }), now, 0)).toMatchObject({
      result: 'QUOTA',
    });
    expect(write(leases.plan(ask({ destination: server(3), lifetime: 900 }), now, 0)).kind).toBe('renew');
    expect(write(leases.plan(ask({ destination: server(999), owner: 2 }), now, 0)).kind).toBe('add');
    leases.committed(write(leases.planRelease(ask({ destination: server(7) }), now)), now);
    expect(write(leases.plan(ask({ destination: server(999) }), now, 0)).kind).toBe('add');
  });

  it('let a key begin 64 leases at once and 20 a second after that', () => {
    const leases = new Leases({ ports: { first: 20000, last: 29999 }, longest: 3600 });
    for (let n = 0; n < 64; n++) grant(leases, ask({ destination: server(n) }), 0);
    expect(leases.plan(ask({ destination: server(64) }), 0, 0)).toMatchObject({ result: 'RATE', retryAfter: 1 });
    expect(write(leases.plan(ask({ destination: server(1), lifetime: 900 }), 0, 0)).kind).toBe('renew');
    for (let n = 64; n < 84; n++) grant(leases, ask({ destination: server(n) }), 1_000);
    expect(leases.plan(ask({ destination: server(84) }), 1_000, 0)).toMatchObject({ result: 'RATE' });
  });

  it('count the clients of version 1 one by one', () => {
    const leases = new Leases({ ports: { first: 20000, last: 29999 }, longest: 3600 });
    for (let n = 0; n < 64; n++) grant(leases, ask({ owner: 'v1', destination: server(n) }), 0);
    expect(leases.plan(ask({ owner: 'v1', destination: server(64) }), 0, 0)).toMatchObject({ result: 'RATE' });
    expect(write(leases.plan(ask({ owner: 'v1', client: client(2), destination: server(64) }), 0, 0)).kind).toBe('add');
  });

  it('refuse what is new and renew what is held when told to', () => {
    const leases = table();
    grant(leases, ask(), 0);
    expect(leases.plan(ask({ destination: server(2) }), 0, 0, true)).toMatchObject({ result: 'NO_RESOURCES' });
    expect(write(leases.plan(ask({ lifetime: 900 }), 0, 0, true)).kind).toBe('renew');
  });
});

describe('adoption', () => {
  it('takes over port, owner and time, and refuses what contradicts it', () => {
    const leases = table();
    expect(leases.adopt(ask(), 20007, 305, 1_000)).toBe(true);
    expect(leases.get(ask())).toMatchObject({ port: 20007, expires: 301_000 });
    // An interrupted dump begins again.
    expect(leases.adopt(ask(), 20007, 305, 1_000)).toBe(true);
    expect(leases.adopt(ask(), 20008, 305, 1_000)).toBe(false);
    expect(leases.adopt(ask({ owner: 2, destination: server(2) }), 20007, 305, 1_000)).toBe(false);
    expect(leases.size).toBe(1);
  });
});

describe('a comparison with the kernel', () => {
  it('knows what is nobody’s, and what has to be put there again', () => {
    const leases = table();
    for (let n = 0; n < 4; n++) grant(leases, ask({ destination: server(n), lifetime: n === 3 ? 60 : 600 }), 0, n / 4);
    const ports = [0, 1, 2].map((n) => held(leases, ask({ destination: server(n) })).port);
    grant(leases, ask({ client: client6(1), destination: server6(1) }), 0);
    leases.plan(ask({ destination: server(9) }), 0, 0.9);
    const comparison = leases.compare();
    expect(comparison.found(ask({ destination: server(0) }), ports[0] ?? 0)).toBe(true);
    expect(comparison.found(ask({ destination: server(0) }), ports[0] ?? 0)).toBe(true);
    expect(comparison.found(ask({ destination: server(1) }), 20050)).toBe(false);
    expect(comparison.found(ask({ owner: 2, destination: server(2) }), ports[2] ?? 0)).toBe(false);
    // Planned is not promised yet, and the fourth has run out.
    expect(comparison.found(ask({ destination: server(9) }), 20090)).toBe(false);
    const missing = comparison.missing(60_500);
    expect(missing.map(({ kind, lifetime, lease }) => [kind, lifetime, lease.destination])).toEqual([
      ['add', 539, server(1)],
      ['add', 539, server(2)],
      ['add', 539, server6(1)],
    ]);
  });
});

describe('a table', () => {
  it.each([
    [4, client, server],
    [6, client6, server6],
  ] as const)('of IPv%i holds as many leases as the kernel’s map, and each is found', (_, from, to) => {
    const leases = new Leases({ ports: { first: 1024, last: 65_535 }, longest: 3600 });
    const subject = (n: number): Subject => ({ owner: n >> 8, client: from(n % 251), destination: to(n >> 4, n) });
    const port = (n: number): number => 1024 + Math.floor(n / 251);
    for (let n = 0; n < MAP_SIZE; n++) {
      if (!leases.adopt(subject(n), port(n), 305, 0)) throw new Error(`${n} has no room`);
    }
    expect(leases.size).toBe(MAP_SIZE);
    expect(leases.adopt(subject(MAP_SIZE), port(MAP_SIZE), 305, 0)).toBe(false);
    const full = leases.plan({ ...subject(MAP_SIZE), owner: 999, suggestedPort: 0, lifetime: 60 }, 0, 0);
    expect(full).toMatchObject({ kind: 'refused', result: 'NO_RESOURCES' });
    const wrong = Array.from({ length: MAP_SIZE }, (_unused, n) => n).filter(
      (n) => leases.get(subject(n))?.port !== port(n),
    );
    expect(wrong).toEqual([]);
    // In another order than they came, so that every place in a chain is left at some time.
    for (let n = 0; n < MAP_SIZE; n++) {
      const plan = write(leases.planRelease(subject((n * 40_503) % MAP_SIZE), 0));
      leases.committed(plan, 0);
    }
    expect(leases.size).toBe(0);
    expect([...leases.live()]).toEqual([]);
  });

  it('has no lease from one family to the other', () => {
    const leases = table();
    grant(leases, ask(), 0);
    const disguised = { address: { family: 6, value: server(1).address.value }, port: 443 } as const;
    expect(leases.plan(ask({ destination: disguised }), 0, 0)).toMatchObject({ kind: 'refused' });
    expect(leases.planRelease(ask({ destination: disguised }), 0)).toEqual({ kind: 'settled', lease: null });
    expect(leases.adopt(ask({ destination: disguised }), 20_050, 305, 0)).toBe(false);
    expect(leases.size).toBe(1);
  });
});

describe('revocation', () => {
  it('plans the end of all leases of one owner', () => {
    const leases = table();
    for (let n = 0; n < 3; n++) grant(leases, ask({ destination: server(n) }), 0);
    grant(leases, ask({ owner: 2 }), 0);
    const writes = leases.planRevocation(1, 0);
    expect(writes.map(({ kind }) => kind)).toEqual(['remove', 'remove', 'remove']);
    for (const one of writes) leases.committed(one, 0);
    expect([...leases.live()].map(({ owner }) => owner)).toEqual([2]);
  });
});

/** A small generator with a seed, so that a failure can be had again (mulberry32). */
function seeded(seed: number): () => number {
  let state = seed;
  return () => {
    state = (state + 0x6d2b79f5) | 0;
    let t = Math.imul(state ^ (state >>> 15), 1 | state);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 2 ** 32;
  };
}

describe.each([1, 2, 3, 4, 5])('a random walk (seed %i)', (seed) => {
  it('keeps every invariant against a model of the kernel', () => {
    const random = seeded(seed);
    const pick = (n: number): number => Math.floor(random() * n);
    const leases = new Leases({ ports: { first: 20000, last: 20019 }, longest: 600 });
    /** What the kernel holds: slot to destination, owner and end. */
    const kernel = new Map<string, { destination: string; owner: unknown; until: number }>();
    const freed = new Map<string, { destination: string; at: number }>();
    const text = ({ address, port }: Endpoint): string => `${address.value}:${port}`;
    const slot = (lease: Lease): string => `${lease.client.value}/${lease.port}`;
    const pending: Write[] = [];
    let now = 0;
    const finish = (one: Write): void => {
      const key = slot(one.lease);
      const destination = text(one.lease.destination);
      if (random() < 0.2) {
        leases.failed(one);
        return;
      }
      if (one.kind === 'remove') {
        if (kernel.delete(key)) freed.set(key, { destination, at: now });
      } else {
        const held = kernel.get(key);
        expect(held === undefined || (held.destination === destination && held.owner === one.lease.owner)).toBe(true);
        const before = freed.get(key);
        if (one.kind === 'add' && before && before.destination !== destination) {
          expect(now - before.at).toBeGreaterThanOrEqual(120_000);
        }
        kernel.set(key, { destination, owner: one.lease.owner, until: now + (one.lifetime + GRACE) * 1000 });
      }
      leases.committed(one, now);
    };
    for (let step = 0; step < 4_000; step++) {
      now += pick(1_500);
      for (const [key, { until, destination }] of kernel) {
        if (until > now) continue;
        kernel.delete(key);
        freed.set(key, { destination, at: until });
      }
      const six = random() < 0.5;
      const subject = ask({
        owner: ([0, 0xffffffff, 'v1'] as const)[pick(3)] ?? 0,
        client: six ? client6(pick(2)) : client(pick(2)),
        destination: six ? server6(pick(12)) : server(pick(12)),
        suggestedPort: random() < 0.5 ? 20000 + pick(20) : 0,
        lifetime: 60 + pick(540),
      });
      const what = pick(10);
      if (what < 6) {
        const plan = leases.plan(subject, now, random());
        if (plan.kind === 'write') pending.push(plan.write);
        if (plan.kind === 'settled' && plan.lease) expect(kernel.get(slot(plan.lease))?.owner).toBe(subject.owner);
      } else if (what < 7) {
        const plan = leases.planRelease(subject, now);
        if (plan.kind === 'write') pending.push(plan.write);
      } else if (what < 8) leases.sweep(now);
      // Transactions finish in order, as nft runs are serialised.
      while (pending.length > 0 && random() < 0.7) finish(pending.shift() as Write);
      const live = [...leases.live()];
      expect(new Set(live.map(slot)).size).toBe(live.length);
      for (const lease of live) {
        const held = kernel.get(slot(lease));
        // What is promised is in the kernel, for the same owner and destination, and outlasts the promise.
        if (lease.expires > now) {
          const promised = { owner: lease.owner, destination: text(lease.destination) };
          if (
            held?.owner !== promised.owner ||
            held.destination !== promised.destination ||
            held.until < lease.expires
          ) {
            expect(held).toEqual({ ...promised, until: lease.expires });
          }
        }
      }
    }
  });
});
