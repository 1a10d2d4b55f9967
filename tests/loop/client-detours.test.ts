import { expect, test } from 'vitest';
import { createDetours, type DetourEvent, type Detours } from '../../appliance/client/detours.ts';
import { systemClock } from '../../appliance/kernel/clock.ts';
import { udpDatagrams } from '../../appliance/kernel/datagrams.ts';
import type { Log } from '../../appliance/log.ts';
import { type Endpoint, formatEndpoint, parseEndpoint } from '../../appliance/protocol/address.ts';
import { deriveKeys, MESSAGE_BYTES, RESULT, TYPE } from '../../appliance/protocol/control.ts';
import { FakeClock } from '../fakes/clock.ts';
import { FakeNetwork } from '../fakes/network.ts';
import { FakeRouter } from '../fakes/router.ts';

const end = (text: string): Endpoint => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const KEYS = deriveKeys(0x0a0b0c0d, new Uint8Array(32).fill(7));
const ROUTER = end('203.0.113.9:45672');
const CLIENT = end('192.0.2.1:1').address;
const SERVER = end('198.51.100.5:443');
const OTHER = end('198.51.100.6:443');
const quiet: Log = { debug() {}, info() {}, warn() {}, error() {} };

type World = {
  clock: FakeClock;
  network: FakeNetwork;
  router: FakeRouter;
  detours: Detours;
  events: DetourEvent[];
  exchanges: string[];
  kinds(): string[];
  last<K extends DetourEvent['kind']>(kind: K): Extract<DetourEvent, { kind: K }> | undefined;
};

async function world(before: (network: FakeNetwork, router: FakeRouter) => void = () => undefined): Promise<World> {
  const clock = new FakeClock();
  const network = new FakeNetwork(clock);
  network.fate = () => [5];
  const router = new FakeRouter(clock, KEYS);
  await router.listen(network.host([ROUTER.address]), ROUTER);
  before(network, router);
  const events: DetourEvent[] = [];
  const exchanges: string[] = [];
  const detours = createDetours({
    keys: KEYS,
    clock,
    datagrams: network.host([CLIENT]),
    log: quiet,
    onEvent: (event) => events.push(event),
    onExchange: (type, outcome) => exchanges.push(`${type} ${outcome}`),
  });
  detours.set([{ key: 'one', name: 'one', endpoint: ROUTER }]);
  await clock.advance(100);
  return {
    clock,
    network,
    router,
    detours,
    events,
    exchanges,
    kinds: () => events.map(({ kind }) => kind),
    last: (kind) => events.findLast((event): event is never => event.kind === kind),
  };
}

const types = (router: FakeRouter): number[] => router.requests.map(({ type }) => type);

test('says HELLO at the start and reports round trip, epoch and local address', async () => {
  const { events, router, detours } = await world();
  expect(types(router)).toEqual([TYPE.HELLO]);
  expect(events).toEqual([
    { kind: 'detour-added', detour: 'one', name: 'one', endpoint: ROUTER },
    { kind: 'detour-up', detour: 'one', rttMs: 10, epoch: router.epoch, local: CLIENT },
  ]);
  expect(detours.observed('one')).toEqual(CLIENT);
});

test('a lease is one round trip with the cookie of HELLO', async () => {
  const { router, detours, clock, last } = await world();
  detours.want('one', SERVER);
  await clock.advance(10);
  expect(types(router)).toEqual([TYPE.HELLO, TYPE.LEASE]);
  expect(last('lease-granted')).toMatchObject({ server: SERVER, port: 20_000, expiresAt: 100 + 600_000 });
});

test('pings every 25 s, roughly, which keeps the cookie fresh for leases much later', async () => {
  const { router, detours, clock, exchanges } = await world();
  await clock.advance(1_000_000);
  const pings = types(router).filter((type) => type === TYPE.PING).length;
  expect(pings).toBeGreaterThanOrEqual(36);
  expect(pings).toBeLessThanOrEqual(45);
  detours.want('one', SERVER);
  await clock.advance(10);
  expect(exchanges.at(-1)).toBe('lease ok');
  expect(router.requests.at(-1)?.type).toBe(TYPE.LEASE);
});

test('a challenge is answered with a new sequence and the new cookie', async () => {
  const { router, detours, clock, last } = await world();
  router.restart({ leasesSurvive: true });
  detours.want('one', SERVER);
  await clock.advance(20);
  expect(last('lease-granted')?.port).toBe(20_000);
  const [first, second] = router.requests.slice(-2);
  expect(second?.sequence).toBe((first?.sequence ?? 0n) + 1n);
  expect(Buffer.from(second?.cookie ?? []).equals(Buffer.from(first?.cookie ?? []))).toBe(false);
});

test('a detour that only ever challenges gets no third try and counts as refusing', async () => {
  const { router, detours, clock, last } = await world();
  router.requests.length = 0;
  detours.want('one', SERVER);
  // A fresh cookie key before every request makes every cookie wrong.
  router.answer = (bytes) => {
    router.restart({ leasesSurvive: true });
    return bytes;
  };
  router.restart({ leasesSurvive: true });
  await clock.advance(1_000);
  expect(router.requests.length).toBe(3);
  expect(last('lease-refused')).toMatchObject({ server: SERVER, why: 'CHALLENGE' });
});

test('retransmits the same bytes, doubling, five times; then the breaker opens and grows', async () => {
  const { network, router, clock, detours, last } = await world();
  router.dead = true;
  const from = network.sent.length;
  const startedAt = clock.now();
  const times: number[] = [];
  network.fate = () => {
    times.push(clock.now() - startedAt);
    return [5];
  };
  detours.want('one', SERVER);
  await clock.advance(8_500);
  const sent = network.sent.slice(from, from + 5);
  expect(new Set(sent.map(({ bytes }) => Buffer.from(bytes).toString('hex'))).size).toBe(1);
  const gaps = times.slice(1, 5).map((at, i) => at - (times[i] ?? 0));
  for (const [i, gap] of gaps.entries()) {
    expect(gap).toBeGreaterThanOrEqual(250 * 2 ** i * 0.9);
    expect(gap).toBeLessThanOrEqual(250 * 2 ** i * 1.1);
  }
  expect(last('detour-down')).toMatchObject({ detour: 'one' });
  const downAt = clock.now() - startedAt;
  times.length = 0;
  await clock.advance(3_600_000);
  // A lease is wanted: for a minute it is asked every 0.65 s, so that what waits for it need not wait long.
  const brisk = times.filter((at) => at < downAt + 60_000);
  expect(brisk.length).toBeGreaterThanOrEqual(80);
  expect(brisk.length).toBeLessThanOrEqual(105);
  // Each try of the breaker is five datagrams; 5, 10, 20 ... 600, 600 s apart: about a dozen in an hour.
  expect((times.length - brisk.length) / 5).toBeGreaterThanOrEqual(9);
  expect((times.length - brisk.length) / 5).toBeLessThanOrEqual(15);
});

test('when the detour comes back, what was wanted is asked for again', async () => {
  const { router, clock, detours, last, kinds } = await world();
  router.dead = true;
  detours.want('one', SERVER);
  await clock.advance(10_000);
  expect(kinds()).toContain('detour-down');
  router.dead = false;
  await clock.advance(30_000);
  expect(last('detour-up')).toBeDefined();
  expect(last('lease-granted')?.port).toBe(20_000);
  expect(kinds().lastIndexOf('lease-granted')).toBeGreaterThan(kinds().lastIndexOf('detour-down'));
});

test('renews between 1/2 and 5/8 of the lifetime, and a lost answer costs nothing', async () => {
  const { router, network, clock, detours, kinds } = await world();
  detours.want('one', SERVER);
  await clock.advance(100);
  const leases = (): number => types(router).filter((type) => type === TYPE.LEASE).length;
  await clock.advance(600_000 / 2 - 1_000);
  expect(leases()).toBe(1);
  let lost = 0;
  network.fate = (_, to) => (to.port === ROUTER.port && lost++ < 2 ? [] : [5]);
  await clock.advance(600_000 / 8 + 3_000);
  expect(leases()).toBe(2);
  await clock.advance(3_600_000);
  expect(kinds()).not.toContain('lease-lost');
  expect(router.leases.size).toBe(1);
});

test('a new epoch means asking for all leases again, with their old ports, within two seconds', async () => {
  const { router, clock, detours, events, last } = await world();
  detours.want('one', SERVER);
  detours.want('one', OTHER);
  await clock.advance(6_000);
  router.restart({ leasesSurvive: false });
  router.firstPort = 25_000;
  events.length = 0;
  await clock.advance(28_000 + 2_000);
  expect(events.filter(({ kind }) => kind === 'lease-lost').length).toBe(2);
  const granted = events.filter((event) => event.kind === 'lease-granted').map((event) => event.port);
  expect(granted.sort()).toEqual([20_000, 20_001]);
  expect(last('detour-up')?.epoch).toBe(router.epoch);
});

test.each([
  ['DENIED_DESTINATION', RESULT.DENIED_DESTINATION, false, 1_800_000],
  ['QUOTA', RESULT.QUOTA, true, 30_000],
  ['NOT_AUTHORIZED', RESULT.NOT_AUTHORIZED, true, 1_800_000],
] as const)('%s is a refusal with its own reach and time', async (why, result, everywhere, after) => {
  const { router, clock, detours, last } = await world();
  router.refuse = () => ({ result });
  detours.want('one', SERVER);
  await clock.advance(10);
  expect(last('lease-refused')).toEqual({
    kind: 'lease-refused',
    detour: 'one',
    server: SERVER,
    why,
    retryAt: clock.now() + after,
    everywhere,
  });
});

test('a retry-after is honoured, but not a year of it', async () => {
  const { router, clock, detours, last } = await world();
  router.refuse = () => ({ result: RESULT.RATE, retryAfter: 7 });
  detours.want('one', SERVER);
  await clock.advance(10);
  expect(last('lease-refused')?.retryAt).toBe(clock.now() + 7_000);
  router.refuse = () => ({ result: RESULT.RATE, retryAfter: 0xffffffff });
  detours.want('one', SERVER);
  await clock.advance(10);
  expect(last('lease-refused')?.retryAt).toBe(clock.now() + 3_600_000);
});

test('releases what is no longer wanted, also when the answer is still on its way', async () => {
  const { router, clock, detours, kinds } = await world();
  detours.want('one', SERVER);
  await clock.advance(20);
  expect(router.leases.size).toBe(1);
  detours.release('one', SERVER);
  await clock.advance(20);
  expect(router.leases.size).toBe(0);
  detours.want('one', OTHER);
  detours.release('one', OTHER);
  await clock.advance(100);
  expect(router.leases.size).toBe(0);
  expect(kinds().filter((kind) => kind === 'lease-granted').length).toBe(1);
});

test('lies change nothing: wrong MAC, wrong sequence, another key, short, and a replay', async () => {
  const { router, clock, detours, network, events } = await world();
  detours.want('one', SERVER);
  await clock.advance(20);
  const before = events.length;
  const old = network.sent.findLast(({ from }) => from.port === ROUTER.port)?.bytes ?? new Uint8Array();
  const client = network.sent[0]?.from ?? ROUTER;
  router.dead = true;
  detours.want('one', OTHER);
  await clock.advance(10);
  const flipped = old.slice();
  flipped[59] = (flipped[59] ?? 0) ^ 1;
  for (const bytes of [old, flipped, old.slice(0, 95), new Uint8Array(MESSAGE_BYTES), new Uint8Array(0)]) {
    network.send(ROUTER, client, bytes);
  }
  await clock.advance(50);
  expect(events.length).toBe(before);
});

test('nonsense in an authentic grant is a refusal', async () => {
  const { router, clock, detours, last } = await world();
  router.lifetime = 0;
  detours.want('one', SERVER);
  await clock.advance(10);
  expect(last('lease-refused')).toMatchObject({ why: 'it granted nonsense' });
});

test('a different observed address means the leases are somebody else’s: asks for all of them again', async () => {
  const clock = new FakeClock();
  const network = new FakeNetwork(clock);
  const router = new FakeRouter(clock, KEYS);
  await router.listen(network.host([ROUTER.address]), ROUTER);
  const events: DetourEvent[] = [];
  let address = CLIENT;
  const datagrams = network.host([CLIENT]);
  const moving = network.host([end('192.0.2.77:1').address]);
  const detours = createDetours({
    keys: KEYS,
    clock,
    datagrams: {
      serve: datagrams.serve,
      connect: (peer, receive, unreachable) =>
        (address === CLIENT ? datagrams : moving).connect(peer, receive, unreachable),
    },
    log: quiet,
    onEvent: (event) => events.push(event),
  });
  detours.set([{ key: 'one', name: 'one', endpoint: ROUTER }]);
  await clock.advance(10);
  detours.want('one', SERVER);
  await clock.advance(10);
  address = end('192.0.2.77:1').address;
  events.length = 0;
  await clock.advance(30_000);
  expect(events.map(({ kind }) => kind)).toContain('lease-lost');
  expect(events.findLast(({ kind }) => kind === 'detour-up')).toMatchObject({ local: address });
  expect([...router.leases.values()].map(({ owner }) => owner)).toContain(`${KEYS.id}/192.0.2.77`);
});

test('a network that loses, doubles and reorders a third of everything gets its leases all the same', async () => {
  const { network, clock, detours, events, router } = await world();
  let seed = 12345;
  const draw = (): number => {
    seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff;
    return seed / 0x7fffffff;
  };
  network.fate = () => {
    const luck = draw();
    if (luck < 0.2) return [];
    if (luck < 0.35) return [5 + draw() * 40, 5 + draw() * 40];
    return [5 + draw() * 40];
  };
  const servers = Array.from({ length: 60 }, (_, i) => end(`198.51.100.${i + 1}:443`));
  for (const server of servers) detours.want('one', server);
  await clock.advance(120_000);
  const granted = new Set(
    events.filter((event) => event.kind === 'lease-granted').map(({ server }) => formatEndpoint(server)),
  );
  expect(granted.size).toBe(60);
  expect(router.leases.size).toBe(60);
});

test('stops cleanly: no timers, no datagrams', async () => {
  const { clock, detours, network } = await world();
  detours.want('one', SERVER);
  await clock.advance(20);
  detours.stop();
  const sent = network.sent.length;
  await clock.advance(3_600_000);
  expect(network.sent.length).toBe(sent);
});

test('the same over real UDP on the loopback', async () => {
  const router = new FakeRouter(systemClock, KEYS);
  const [at] = await router.listen(udpDatagrams(), end('127.0.0.1:45699'));
  if (!at) throw new Error('not listening');
  const granted = Promise.withResolvers<DetourEvent>();
  const detours = createDetours({
    keys: KEYS,
    clock: systemClock,
    datagrams: udpDatagrams(),
    log: quiet,
    onEvent(event) {
      if (event.kind === 'detour-up') detours.want('one', SERVER);
      if (event.kind === 'lease-granted') granted.resolve(event);
    },
  });
  try {
    detours.set([{ key: 'one', name: 'one', endpoint: at }]);
    expect(await granted.promise).toMatchObject({ server: SERVER, port: 20_000 });
  } finally {
    detours.stop();
    await router.close();
  }
});

test('a new name or rank is passed on without a new conversation', async () => {
  const { detours, router, events, clock } = await world();
  const rank = { source: 'srv:x', preference: 1, order: 0 };
  detours.set([{ key: 'one', name: 'uno', endpoint: ROUTER, rank }]);
  detours.set([{ key: 'one', name: 'uno', endpoint: ROUTER, rank: { ...rank } }]);
  await clock.advance(100);
  expect(events.slice(2)).toEqual([{ kind: 'detour-added', detour: 'one', name: 'uno', endpoint: ROUTER, rank }]);
  expect(types(router)).toEqual([TYPE.HELLO]);
});

test('asks about a doubted lease at a steady pace, because a path waits for the answer, and about one at a time', async () => {
  const { network, router, clock, detours, events } = await world();
  const servers = Array.from({ length: 10 }, (_, i) => ({ ...SERVER, port: 1_000 + i }));
  for (const server of servers) detours.want('one', server);
  await clock.advance(1_000);
  router.dead = true;
  const times: number[] = [];
  network.fate = () => {
    times.push(clock.now());
    return [5];
  };
  const from = clock.now();
  for (const server of servers) detours.doubt('one', server);
  await clock.advance(7_000);
  const gaps = times.slice(1).map((at, i) => at - (times[i] ?? 0));
  expect(Math.max(...gaps)).toBeLessThan(500);
  // One is asked 2.5 times a second, the others five times in all, ever more slowly.
  expect(times.length).toBeLessThanOrEqual(18 + 5 * (servers.length - 1) + 1);
  expect(clock.now() - from).toBe(7_000);
  // What was asked in vain meanwhile is asked again as soon as there is an answer.
  events.length = 0;
  times.length = 0;
  router.dead = false;
  await clock.advance(600);
  expect(events.filter(({ kind }) => kind === 'lease-granted').length).toBe(servers.length);
  expect(times.length).toBeLessThanOrEqual(4 * servers.length);
});
