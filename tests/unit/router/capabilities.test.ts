import { describe, expect, it } from 'vitest';
import type { Address } from '../../../appliance/protocol/address.ts';
import {
  CAPABILITIES_PER_KEY,
  Capabilities,
  type CapabilityAsk,
  type CapabilityWrite,
} from '../../../appliance/router/capabilities.ts';

const GRACE = 5;
const host = (n: number): Address => ({ family: 4, value: 0x0a000000n + BigInt(n) });
const ask = (session: number, over: Partial<CapabilityAsk> = {}): CapabilityAsk => ({
  owner: 1,
  client: host(1),
  session: BigInt(session),
  proven: true,
  ...over,
});

/** Draws these numbers, over and over. */
function drawing(...numbers: number[]): () => number {
  let at = 0;
  return () => numbers[at++ % numbers.length] ?? 0;
}
const nothing = (): boolean => false;
let seed = 1;
/** Different each time, and the same in each run. */
const anything = (): number => {
  seed = (seed * 16807) % 2147483647;
  return seed / 2147483647;
};

function granted(table: Capabilities, request: CapabilityAsk, now = 0): CapabilityWrite {
  const write = table.plan(request, now, anything, nothing);
  if (!write) throw new Error('refused');
  table.committed(write);
  return write;
}

describe('capabilities', () => {
  it('have one port for each session and client address, and keep it while they are extended', () => {
    const table = new Capabilities({ first: 20000, last: 29999 }, GRACE);
    const first = granted(table, ask(1)).capability;
    expect(first.expires).toBe(120_000);
    expect(granted(table, ask(1), 100_000).capability).toMatchObject({ port: first.port, expires: 220_000 });
    expect(granted(table, ask(2)).capability.port).not.toBe(first.port);
    expect(granted(table, ask(1, { client: host(2) })).capability.client).toEqual(host(2));
    expect(table.size).toBe(3);
  });

  it('go when the kernel has dropped them, not before', () => {
    const table = new Capabilities({ first: 20000, last: 29999 }, GRACE);
    const { port } = granted(table, ask(1)).capability;
    table.sweep(124_999);
    expect(table.holds(host(1), port)).toBe(true);
    table.sweep(125_000);
    expect(table.holds(host(1), port)).toBe(false);
    expect(table.size).toBe(0);
  });

  it('take no port that is a lease of the same client, or another capability of it', () => {
    const table = new Capabilities({ first: 20000, last: 20003 }, GRACE);
    const lease = (port: number): boolean => port === 20000;
    const write = (session: number) => table.plan(ask(session), 0, drawing(0, 0.3, 0.6, 0.9), lease);
    for (const [session, port] of [
      [1, 20001],
      [2, 20002],
      [3, 20003],
    ] as const) {
      const planned = write(session);
      expect(planned?.capability.port).toBe(port);
      if (planned) table.committed(planned);
    }
    expect(write(4)).toBeNull();
    expect(table.plan(ask(4, { client: host(9) }), 0, drawing(0.3), nothing)?.capability.port).toBe(20001);
  });

  it('are bounded for each key: who only says hello takes nobody else’s place, and goes first', () => {
    const table = new Capabilities({ first: 20000, last: 29999 }, GRACE);
    for (let n = 1; n < CAPABILITIES_PER_KEY; n++) granted(table, ask(n), n);
    const recorded = granted(table, ask(99, { proven: false, client: host(66) })).capability;
    expect(table.plan(ask(100, { proven: false }), 100, anything, nothing)).toBeNull();
    const other = granted(table, ask(1, { owner: 2 }));
    expect(other.instead).toBeNull();
    const next = granted(table, ask(101), 100);
    expect(next.instead).toMatchObject({ port: recorded.port, client: host(66) });
    expect(table.holds(host(66), recorded.port)).toBe(false);
    // Then those that were used longest ago.
    expect(granted(table, ask(102), 100).instead).toMatchObject({ session: 1n });
    expect(table.all().filter(({ owner }) => owner === 1)).toHaveLength(CAPABILITIES_PER_KEY);
    expect(table.all().filter(({ owner }) => owner === 2)).toHaveLength(1);
  });

  it('are proven by the first request with a cookie, and stay so', () => {
    const table = new Capabilities({ first: 20000, last: 29999 }, GRACE);
    granted(table, ask(1, { proven: false }));
    granted(table, ask(1));
    granted(table, ask(1, { proven: false }), 50);
    for (let n = 2; n <= CAPABILITIES_PER_KEY; n++) granted(table, ask(n), 10);
    expect(granted(table, ask(50), 60).instead).toMatchObject({ session: 2n });
  });

  it('go with their key, and come back from the kernel unless they contradict', () => {
    const table = new Capabilities({ first: 20000, last: 29999 }, GRACE);
    const { capability } = granted(table, ask(1));
    granted(table, ask(1, { owner: 2 }));
    expect(table.revoke(1)).toMatchObject([{ owner: 1, port: capability.port }]);
    expect(table.size).toBe(1);
    expect(table.adopt(capability)).toBe(true);
    expect(table.adopt(capability)).toBe(false);
    expect(table.adopt({ ...capability, session: 7n })).toBe(false);
    expect(table.adopt({ ...capability, session: 7n, port: 19999 })).toBe(false);
  });
});
