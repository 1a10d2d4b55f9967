/**
 * The experiments that `make lab` knows. The six of S. Brennan's thesis (Exploring Alternative Routes Using Multipath TCP, 2017) come
 * first, on its topology: client - r1 - r2 - server, and the detour behind r3, which both r1 and r2 have a link to.
 */
import { type Quality, readScenario, type Scenario } from './topology.ts';

/**
 * A thousand full packets, Mininet's default and so the thesis's. A queue shorter than a round trip would let a lone CUBIC flow fall
 * below the rate of the link, which would flatter whatever is compared with it.
 */
const QUEUE_BYTES = 1000 * 1514;

/** As the thesis has it: 10 s, of which tables leave out the first. */
const UPLOAD = { kind: 'transfer', direction: 'up', seconds: 10 };

/** The columns of the tables. */
const WAYS = {
  tcp: { transport: 'tcp' },
  mptcp: {},
  nat: { agent: { strategy: 'nat' } },
  vpn: { agent: { strategy: 'vpn' } },
  tcp_nat: { transport: 'tcp', via: 'detour' },
};
const PAIR = { tcp: WAYS.tcp, nat: WAYS.nat };

function wire(a: string, b: string, quality: Quality): object {
  const { rateMbit } = quality;
  const queue = rateMbit === undefined ? {} : { queueMs: Math.round(QUEUE_BYTES / 125 / rateMbit) };
  return { between: [a, b], ...queue, ...quality };
}

/**
 * `core` is what differs about the thesis's link 2, between r1 and r2. With a `modem` the client's link ends in a box of its own, and the
 * queue of the access is there and not in the client.
 */
function thesis(limited: 'core' | 'access', core: Quality = {}, modem = false): object {
  const [edge, middle] = [
    { rateMbit: limited === 'core' ? 20 : 10, delayMs: 5 },
    { rateMbit: 10, delayMs: 5 },
  ];
  return {
    client: 'client',
    server: 'server',
    nodes: { detour: { router: true } },
    links: {
      ...(modem ? { home: wire('client', 'modem', {}) } : {}),
      access: wire(modem ? 'modem' : 'client', 'r1', edge),
      core: wire('r1', 'r2', { ...middle, ...core }),
      server: wire('r2', 'server', edge),
      out: wire('r1', 'r3', middle),
      back: wire('r3', 'r2', middle),
      detour: wire('r3', 'detour', edge),
    },
    traffic: [UPLOAD],
    ways: WAYS,
  };
}

const CORES: Readonly<Record<string, readonly [string, Quality]>> = {
  '': ['every link is whole', {}],
  lossy: ['the direct path loses 1 % of its packets', { lossPercent: 1 }],
  delayed: ['the direct path has 100 ms more on one link, each way', { delayMs: 100 }],
  lossy05: ['the direct path loses 0.5 %', { lossPercent: 0.5 }],
  lossy2: ['the direct path loses 2 %', { lossPercent: 2 }],
  lossy5: ['the direct path loses 5 %', { lossPercent: 5 }],
  delayed20: ['the direct path has 20 ms on one link, each way', { delayMs: 20 }],
  delayed50: ['the direct path has 50 ms on one link, each way', { delayMs: 50 }],
};

const found: Scenario[] = [];
for (const limited of ['core', 'access'] as const)
  for (const [core, [about, quality]] of Object.entries(CORES)) {
    const name = limited === 'core' ? core || 'easy' : `sym${core && `_${core}`}`;
    const limits = limited === 'core' ? 'a detour can double the rate' : 'access limits both ways together';
    found.push(readScenario({ name, about: `${limits}; ${about}`, ...thesis(limited, quality) }));
  }

for (const core of ['', 'lossy']) {
  const [about, quality] = CORES[core] ?? ['', {}];
  found.push(
    readScenario({
      name: `sym${core && `_${core}`}_modem`,
      about: `access limits both ways together, and its queue is not in the client; ${about}`,
      ...thesis('access', quality, true),
      ways: { tcp: WAYS.tcp, nat: WAYS.nat, vpn: WAYS.vpn },
    }),
  );
}

/** A detour beside the direct way, both behind an access that limits neither; for what the thesis never measured. */
function beside(detours: number, more: object): Scenario {
  const names = Array.from({ length: detours }, (_, index) => (detours === 1 ? 'detour' : `detour${index + 1}`));
  const links: Record<string, object> = {
    access: wire('client', 'gateway', { rateMbit: 100, delayMs: 2 }),
    core: wire('gateway', 'server', { rateMbit: 10, delayMs: 10, queueMs: 100 }),
  };
  for (const name of names) {
    links[`to_${name}`] = wire('gateway', name, { rateMbit: 10, delayMs: 10, queueMs: 100 });
    links[`from_${name}`] = wire(name, 'server', { rateMbit: 100, delayMs: 2 });
  }
  return readScenario({
    client: 'client',
    server: 'server',
    nodes: { ...Object.fromEntries(names.map((name) => [name, { router: true }])), server: { subflows: 8 } },
    links,
    traffic: [UPLOAD],
    ways: PAIR,
    ...more,
  });
}

const BLACKHOLE = [
  { atS: 5, link: 'core', does: 'blackhole' },
  { atS: 15, link: 'core', does: 'restore' },
];

found.push(
  beside(1, {
    name: 'failover',
    about: 'the direct path swallows everything from 5 s to 15 s',
    traffic: [{ ...UPLOAD, seconds: 25 }],
    events: BLACKHOLE,
    ways: { mptcp: WAYS.mptcp, nat: WAYS.nat, vpn: WAYS.vpn },
  }),
  beside(1, {
    name: 'failover_down',
    about: 'the same for a download',
    traffic: [{ ...UPLOAD, direction: 'down', seconds: 25 }],
    events: BLACKHOLE,
    ways: { mptcp: WAYS.mptcp, nat: WAYS.nat, vpn: WAYS.vpn },
  }),
  beside(1, {
    name: 'download',
    about: 'a download, whose sender is the server that knows nothing of us',
    traffic: [{ ...UPLOAD, direction: 'down' }],
    ways: { ...PAIR, vpn: WAYS.vpn },
  }),
  beside(2, {
    name: 'two_detours',
    about: 'three ways of the same kind',
    ways: { ...PAIR, vpn: WAYS.vpn },
  }),
  beside(3, {
    name: 'three_detours',
    about: 'four ways, which takes a server that accepts more than two further subflows',
    ways: { tcp: WAYS.tcp, nat: { agent: { strategy: 'nat', maxPaths: 3 } } },
  }),
  beside(1, {
    name: 'ipv6',
    about: 'the same over IPv6',
    ways: Object.fromEntries(
      Object.entries({ ...PAIR, vpn: WAYS.vpn }).map(([name, way]) => [name, { ...way, family: 6 }]),
    ),
  }),
  beside(1, {
    name: 'latency',
    about: 'ten short messages a second on a connection of their own beside a transfer',
    traffic: [
      { ...UPLOAD, seconds: 15 },
      { kind: 'messages', count: 80, everyMs: 100, atS: 1 },
    ],
    ways: { tcp: WAYS.tcp, mptcp: WAYS.mptcp, nat: WAYS.nat, vpn: WAYS.vpn },
  }),
  ...[1, 10, 100, 1000].map((kilobytes) =>
    beside(1, {
      name: `short_${kilobytes}kb`,
      about: `downloads of ${kilobytes} kB, one connection after the other`,
      traffic: [{ kind: 'flows', count: kilobytes >= 1000 ? 5 : 15, bytes: kilobytes * 1000 }],
      ways: { tcp: WAYS.tcp, mptcp: WAYS.mptcp, nat: WAYS.nat },
    }),
  ),
  readScenario({
    name: 'small',
    about: 'two ways of 5 Mbit/s without delay, one of which is lost in the middle: runs on any kernel',
    client: 'client',
    server: 'server',
    nodes: { detour: { router: true } },
    links: {
      access: { between: ['client', 'gateway'] },
      core: { between: ['gateway', 'server'], rateMbit: 5, queueMs: 30 },
      out: { between: ['gateway', 'detour'], rateMbit: 5, queueMs: 30 },
      back: { between: ['detour', 'server'] },
    },
    traffic: [{ ...UPLOAD, seconds: 8 }],
    events: [{ atS: 4, link: 'core', does: 'blackhole' }],
    ways: { nat: WAYS.nat },
  }),
);

/** By name, in the order in which they are listed. */
export const SCENARIOS: ReadonlyMap<string, Scenario> = new Map(found.map((scenario) => [scenario.name, scenario]));

/** The rows of the thesis's main table. */
export const MAIN: readonly string[] = ['easy', 'lossy', 'delayed', 'sym', 'sym_lossy', 'sym_delayed'];
