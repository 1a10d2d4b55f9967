import { readdirSync, readFileSync } from 'node:fs';
import { Daemon, newKey } from '../lab/daemons.ts';
import { type Host, Lab, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startFlows, startServer, startTransfer } from '../lab/traffic.ts';
import { type DetourWorld, detourWorld, waitForDetours } from '../lab/world.ts';
import { capturing, type JoinTimes, joinTimes } from './capture.ts';
import { type Figure, median, note, quantile } from './figures.ts';
import { elementsOf } from './joins.ts';

/** The server is 40 ms away, there and back, and the detour 80, so that a lease's round trip is not over before it is needed. */
const UPLINKS = { rateMbit: 20, queueMs: 100, delayMs: 20, wire: true };
const ASIDE = { ...UPLINKS, delayMs: 40 };
const PORT = 5_000;
/** Each is asked for once, so none has been seen before. */
const SERVERS = Array.from({ length: 45 }, (_, index) => `10.86.4.${index + 1}`);
/** Of them, before anything is counted: the router remembers a few things about a client, once. */
const FIRST = 5;
/** More than what a connection carries before its second path can be there. */
const FLOW_BYTES = 800_000;
const ROUNDS = 2;
const TRANSFER_BYTES = 12_500_000;

/** One of the ways to use a detour: what runs for it besides a router, and where. */
type Way = {
  readonly title: string;
  readonly router: Readonly<Record<string, string>>;
  readonly agent: { readonly on: 'client' | 'server'; readonly env: Readonly<Record<string, string>> };
};

const client = (strategy: string): Way['agent'] => ({
  on: 'client',
  env: { DETOUR_STRATEGY: strategy, DETOUR_MIN_AGE: '0ms' },
});

/**
 * The four ways to use a detour, side by side: how soon after connecting to a server never seen before the second path carries something, what the
 * router's kernel has to remember for it, what processors of ours work for it, and what a transfer gains.
 */
export async function measureWays(): Promise<Figure[]> {
  const ways: readonly Way[] = [
    { title: 'lease', router: {}, agent: client('nat') },
    { title: 'in-band', router: { DETOUR_INBAND: 'on' }, agent: client('inband') },
    { title: 'tunnel', router: { DETOUR_VPN: 'wireguard' }, agent: client('vpn') },
    {
      title: 'announced',
      router: { DETOUR_ANNOUNCE_PORTS: String(PORT) },
      agent: { on: 'server', env: { DETOUR_ROLE: 'server', DETOUR_ANNOUNCE: String(PORT) } },
    },
  ];
  const figures: Figure[] = [];
  for (const way of ways) figures.push(...(await measureWay(way)));
  return figures;
}

async function measureWay(way: Way): Promise<Figure[]> {
  await using lab = await Lab.create(`bench.ways.${way.title.replace('-', '')}`);
  const world = await detourWorld(lab, UPLINKS, ASIDE);
  for (const host of [world.client, world.server, world.gateway, world.detour])
    await host.configure({ 'net.ipv4.tcp_no_metrics_save': '1' });
  await manyServers(world);
  await startServer(world.server);
  // Routers call their interface alike, and wireguard-go has a socket of that name for the whole machine.
  if (way.router['DETOUR_VPN']) await world.detour.isolate('/run/wireguard');
  const keys = newKey();
  await using router = await Daemon.start(world.detour, 'router', {
    keys,
    env: { DETOUR_ALLOW: '10.86.1.2/32,10.86.4.0/24', ...way.router },
    ready: false,
  });
  await router.program.waitFor('"event":"started"', 20_000);
  const direct: number[] = [];
  for (let round = 0; round < ROUNDS; round += 1) direct.push(await transfer(world, TRANSFER_BYTES));
  if (way.agent.on === 'server')
    await world.client.exec(['ip', 'mptcp', 'limits', 'set', 'subflow', '2', 'add_addr_accepted', '2']);
  await using agent = await Daemon.start(world[way.agent.on], 'client', {
    keys,
    env: { ...world.clientEnv, ...way.agent.env },
    ready: false,
  });
  await agent.program.waitFor('"event":"started"', 20_000);
  if (way.agent.on === 'client') await waitForDetours(agent, 1);
  await inUse(world, agent, way);

  // A server that has detours announced is one server.
  const servers = way.agent.on === 'server' ? SERVERS.map(() => world.serverAddress) : SERVERS;
  const connect = async (some: readonly string[]): Promise<void> => {
    for (const server of some)
      await startFlows(world.client, { to: `${server}:${PORT}`, count: 1, bytes: FLOW_BYTES }).result;
  };
  await connect(servers.slice(0, FIRST));
  const before = await stateOf(world.detour);
  const [routerBefore, agentBefore] = [cpuMs(router), cpuMs(agent)];
  const segments = await capturing(world.client, () => connect(servers.slice(FIRST)));
  const [routerCost, agentCost] = [cpuMs(router) - routerBefore, cpuMs(agent) - agentBefore];
  const after = await stateOf(world.detour);
  const times = joinTimes(segments, new Set(servers.map((server) => `${server}:${PORT}`)));
  const both: number[] = [];
  for (let round = 0; round < ROUNDS; round += 1) both.push(await transfer(world, 2 * TRANSFER_BYTES));
  return figuresOf(way.title, times, {
    elements: after.elements - before.elements,
    flows: after.flows - before.flows,
    routerCost,
    agentCost,
    connections: servers.length - FIRST,
    gain: median(both) / median(direct),
    direct: median(direct),
  });
}

/** One host that is many servers, which the detour reaches by its own link. */
async function manyServers({ server, gateway, detour }: DetourWorld): Promise<void> {
  const lines = SERVERS.map((address) => `addr add ${address}/32 dev lo\n`);
  await server.exec(['ip', '-batch', '-'], { input: lines.join('') });
  await gateway.route('10.86.4.0/24 via 10.86.1.2');
  await detour.route('10.86.4.0/24 via 10.86.3.2');
}

/** Returns when the way can be used: its tunnel carries, the router has promised a port, or clients are told. */
async function inUse(world: DetourWorld, agent: Daemon, way: Way): Promise<void> {
  type Status = { tunnels?: { state: string }[]; inband?: { state: string; why?: string } };
  await waitUntil(
    async () => {
      const { tunnels = [], inband } = await agent.status<Status>();
      if (way.agent.on === 'server')
        return (await world.server.exec(['ip', 'mptcp', 'endpoint', 'show'])).includes(world.detourAddress);
      if (way.router['DETOUR_VPN']) return tunnels.length > 0 && tunnels.every(({ state }) => state === 'up');
      return !way.router['DETOUR_INBAND'] || inband?.state === 'on';
    },
    { deadlineMs: 30_000, what: `${way.title} to be usable` },
  );
}

/** What a router's kernel remembers: elements of the ruleset's sets and maps, and flows. */
async function stateOf(detour: Host): Promise<{ readonly elements: number; readonly flows: number }> {
  const flows = Number(await detour.sysctl('net.netfilter.nf_conntrack_count'));
  return { elements: await elementsOf(detour), flows };
}

/** Time that a program's threads have had a processor, ms: the first number of /proc/PID/task/TID/schedstat, which is in ns. */
function cpuMs({ program }: Daemon): number {
  const threads = `/proc/${program.pid}/task`;
  const each = readdirSync(threads).map((id) =>
    Number(readFileSync(`${threads}/${id}/schedstat`, 'utf8').split(' ')[0]),
  );
  return each.reduce((sum, ns) => sum + ns, 0) / 1e6;
}

async function transfer(world: DetourWorld, bytes: number): Promise<number> {
  const result = await startTransfer(world.client, { to: `${world.serverAddress}:${PORT}`, bytes }).result;
  if (!result.mptcp) throw new Error('the transfer was no Multipath TCP');
  if (result.sha256 !== expectedSha256('detour', bytes)) throw new Error('the data arrived changed');
  return result.mbps;
}

function figuresOf(
  title: string,
  times: readonly JoinTimes[],
  measured: {
    readonly elements: number;
    readonly flows: number;
    readonly routerCost: number;
    readonly agentCost: number;
    readonly connections: number;
    readonly gain: number;
    readonly direct: number;
  },
): Figure[] {
  const between = (from: keyof JoinTimes, to: keyof JoinTimes): number[] =>
    times.flatMap((one) => {
      const [begin, end] = [one[from], one[to]];
      return begin === null || end === null ? [] : [end - begin];
    });
  const [carried, joined] = [between('opened', 'carried'), between('established', 'joined')];
  const { connections, gain, direct } = measured;
  note(`ways: ${title}: ${joined.length} of ${connections} joined, ${carried.length} carried, gain ${gain.toFixed(2)}`);
  if (carried.length < connections * 0.95)
    throw new Error(`${title}: only ${carried.length} of ${connections} connections got a second path that carried`);
  const each = (total: number): number => total / connections;
  const goals: Readonly<Record<string, { join?: number; gain?: number; elements?: number }>> = {
    'in-band': { join: 2, elements: 0 },
    announced: { gain: 1.8 },
  };
  const goal = goals[title] ?? {};
  const spread = (values: readonly number[]): string =>
    `p10 ${quantile(values, 0.1).toFixed(1)}, p90 ${quantile(values, 0.9).toFixed(1)} ms; ${values.length} of ${connections} connections`;
  return [
    {
      name: `${title}: connecting to the first byte by the second path, p50`,
      value: median(carried),
      unit: 'ms',
      target: null,
      detail: spread(carried),
    },
    {
      name: `${title}: ESTABLISHED to the join's SYN, server never seen before, p50`,
      value: median(joined),
      unit: 'ms',
      target: goal.join === undefined ? null : { atMost: goal.join },
      detail: spread(joined),
    },
    {
      name: `${title}: elements of the router's sets per new server`,
      value: each(measured.elements),
      unit: '',
      target: goal.elements === undefined ? null : { atMost: goal.elements },
      detail: `besides flows that it tracks: ${each(measured.flows).toFixed(2)} per connection`,
    },
    {
      name: `${title}: processor time of the agent per connection`,
      value: each(measured.agentCost),
      unit: 'ms',
      target: null,
      detail: `the router's daemon: ${each(measured.routerCost).toFixed(2)} ms`,
    },
    {
      name: `${title}: direct and this way / direct alone`,
      value: gain,
      unit: '',
      target: goal.gain === undefined ? null : { atLeast: goal.gain },
      detail: `medians of ${ROUNDS}; direct alone ${direct.toFixed(1)} Mbit/s`,
    },
  ];
}
