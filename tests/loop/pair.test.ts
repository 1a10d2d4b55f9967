import { afterEach, expect, test } from 'vitest';
import { type Daemon, startDaemon } from '../../appliance/client/daemon.ts';
import { systemFiles } from '../../appliance/kernel/files.ts';
import { systemLookup } from '../../appliance/kernel/lookup.ts';
import { systemSchedule } from '../../appliance/kernel/schedule.ts';
import { systemWeb } from '../../appliance/kernel/web.ts';
import type { Log } from '../../appliance/log.ts';
import {
  type Address,
  type Endpoint,
  formatAddress,
  formatEndpoint,
  parseAddress,
  parseEndpoint,
} from '../../appliance/protocol/address.ts';
import { Router } from '../../appliance/router/server.ts';
import type { ClientSettings, RouterSettings } from '../../appliance/settings.ts';
import { FakeClock, settle } from '../fakes/clock.ts';
import { FakeKernel, type Opening } from '../fakes/mptcp.ts';
import { FakeGroups, FakeSwitches } from '../fakes/mptcpify.ts';
import { FakeNetwork, type Fate } from '../fakes/network.ts';
import { FakeNft } from '../fakes/nft.ts';
import { FakeRouting } from '../fakes/routing.ts';
import type { Status } from '../netns/world.ts';

/** Router and agent in one process: their clock, wires and kernels are the test's, everything else is the real thing. */

function address(text: string): Address {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(`no address: ${text}`);
  return parsed;
}
function endpoint(text: string): Endpoint {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(`no endpoint: ${text}`);
  return parsed;
}

const KEY = { id: 1, secret: new Uint8Array(32).fill(1), label: null };
const CLIENT = { v4: address('81.0.0.1'), v6: address('2a00:81::1') };
const SERVER = endpoint('93.184.216.34:443');
const SERVER6 = endpoint('[2606:2800::1]:443');
const COMMON = {
  http: null,
  socket: '',
  fwmark: { mark: 0xd7000000, mask: 0xff000000 },
  logLevel: 'info',
  logFormat: 'json',
} as const;

const DELAY_MS = 10;

type Machine = {
  readonly name: string;
  readonly v4: Address;
  readonly v6: Address;
  readonly nft: FakeNft;
  router: Router | null;
};

class Pair {
  readonly clock = new FakeClock();
  /** The client's, now. */
  readonly addresses: Address[] = [CLIENT.v4, CLIENT.v6];
  readonly routing = new FakeRouting(this.addresses);
  readonly network = new FakeNetwork(this.clock);
  readonly kernel = new FakeKernel(this.clock);
  readonly machines: Machine[] = [];
  readonly lines: { level: string; event: string }[] = [];
  daemon: Daemon | null = null;
  /** Machines whose way is cut: neither datagrams nor SYNs get through. */
  readonly cut = new Set<string>();
  fate: Fate = () => [DELAY_MS];
  #port = 40_000;

  constructor() {
    this.network.fate = (from, to, bytes) => {
      const ends = [from, to].map((one) => formatAddress(one.address));
      return ends.some((end) => this.cut.has(end)) ? [] : this.fate(from, to, bytes);
    };
    this.kernel.way = (local, remote) => {
      const machine = this.machines.find(({ v4, v6 }) => [v4, v6].some((one) => one.value === remote.address.value));
      if (!machine) return remote;
      if (this.cut.has(formatAddress(remote.address))) return 'silence';
      const family = local.address.family;
      const to = machine.nft.elements(`leases${family}`).get(`${formatAddress(local.address)} . ${remote.port}`);
      // A SYN to a lease port without a lease is dropped in the raw hook.
      if (!to) return 'silence';
      const [host = '', port = ''] = to.split(' . ');
      return { address: address(host), port: Number(port) };
    };
  }

  readonly log: Log = {
    debug: () => undefined,
    info: (event) => this.lines.push({ level: 'info', event }),
    warn: (event) => this.lines.push({ level: 'warn', event }),
    error: (event) => this.lines.push({ level: 'error', event }),
  };

  async machine(n: number, settings: Partial<RouterSettings> = {}): Promise<Machine> {
    const machine: Machine = {
      name: `d${n}`,
      v4: address(`80.0.0.${n}`),
      v6: address(`2a00:80::${n}`),
      nft: new FakeNft(this.clock),
      router: null,
    };
    this.machines.push(machine);
    await this.startRouter(machine, settings);
    return machine;
  }

  async startRouter(machine: Machine, settings: Partial<RouterSettings> = {}): Promise<Router> {
    const router = new Router(
      {
        ...COMMON,
        keys: [KEY],
        listen: { address: address('::'), port: 45672 },
        ports: { first: 20_000, last: 29_999 },
        allow: [],
        deny: [],
        relay: 'join',
        leaseTime: 600_000,
        legacyV1: false,
        onExit: 'keep',
        ...settings,
      },
      {
        clock: this.clock,
        log: this.log,
        nft: machine.nft,
        datagrams: this.network.host([machine.v4, machine.v6]),
        addresses: {
          local: () => [
            { address: machine.v4, length: 24, interface: 'eth0' },
            { address: machine.v6, length: 64, interface: 'eth0' },
          ],
          gateways: async () => [],
        },
        conntrack: {
          usage: async () => ({ used: 0, max: 1_000 }),
          flows: async () => ({ count: 0, first: [] }),
          cut: async () => 0,
        },
        upkeep: async () => ({ v4: null, v6: null }),
      },
    );
    expect(await router.start()).toBeNull();
    machine.router = router;
    return router;
  }

  async stopRouter(machine: Machine): Promise<void> {
    const drained = machine.router?.drain();
    await this.clock.advance(5_000);
    await drained;
    machine.router = null;
  }

  async startAgent(settings: Partial<ClientSettings> = {}): Promise<void> {
    this.daemon = await startDaemon(
      {
        ...COMMON,
        key: KEY,
        detours: this.machines.map(({ name }) => ({ kind: 'static', name, host: `${name}.example`, port: 45672 })),
        targets: [],
        exclude: [],
        maxPaths: 2,
        interfaces: null,
        strategy: { kinds: ['nat'], ordered: false },
        mode: 'aggregate',
        minAgeMs: null,
        rescue: false,
        providers: ['host'],
        sides: ['client'],
        mptcpify: 'off',
        sysctlRoot: '/proc/sys',
        ...settings,
      },
      {
        clock: this.clock,
        log: this.log,
        lookup: {
          addresses: async (host) => {
            const machine = this.machines.find(({ name }) => `${name}.example` === host);
            if (!machine) throw new Error('ENOTFOUND');
            return [machine.v4, machine.v6];
          },
          services: systemLookup().services,
        },
        files: systemFiles(),
        web: systemWeb(),
        schedule: systemSchedule,
        ownId: 'own',
        openPlace: async () => ({
          id: 'own',
          net: { inode: 1, mptcpEnabled: async () => true },
          ports: {
            clock: this.clock,
            datagrams: this.network.host(this.addresses),
            openDiag: () => this.kernel.diag,
            log: this.log,
            openNetwork: this.routing.open,
            openRescue: () => {
              throw new Error('no rescue here');
            },
            openPathManager: this.kernel.openPathManager,
          },
          load: async () => undefined,
          unload: async () => undefined,
          close: () => undefined,
        }),
        providers: [],
        mptcpify: { groups: new FakeGroups(), openSwitches: () => new FakeSwitches(), isPinned: () => false },
        version: 'test',
      },
    );
    await this.clock.advance(100);
  }

  async status(): Promise<Status> {
    const text = JSON.stringify(await this.daemon?.view.status());
    return JSON.parse(text);
  }

  /** An application connects and sends something; returns the token. */
  async connect(to: Endpoint = SERVER, opening: Opening = {}): Promise<number> {
    const token = this.open(to, opening);
    await this.clock.advance(DELAY_MS * 2);
    this.kernel.establish(token);
    return token;
  }

  open(to: Endpoint = SERVER, opening: Opening = {}): number {
    const local = { address: to.address.family === 4 ? CLIENT.v4 : CLIENT.v6, port: this.#port++ };
    return this.kernel.open(local, to, opening);
  }

  leases(machine: Machine, family: 4 | 6 = 4): string[] {
    return [...machine.nft.elements(`leases${family}`).values()];
  }

  async stop(): Promise<void> {
    this.daemon?.stop();
    for (const machine of this.machines) if (machine.router) await this.stopRouter(machine);
    expect(this.lines.filter(({ level }) => level === 'error')).toEqual([]);
  }
}

let pair = new Pair();
afterEach(async () => {
  await pair.stop();
  pair = new Pair();
});

test.each([
  ['IPv4', SERVER, 4],
  ['IPv6', SERVER6, 6],
] as const)('a connection gains a path by each of two detours: %s', async (_, server, family) => {
  const [one, two] = [await pair.machine(1), await pair.machine(2)];
  await pair.startAgent();
  const token = pair.open(server);
  // One round trip, and one transaction of the router.
  await pair.clock.advance(2 * DELAY_MS + 5);
  const destination = formatEndpoint(server)
    .replace('[', '')
    .replace(']:', ':')
    .replace(/:(\d+)$/, ' . $1');
  for (const machine of [one, two]) expect(pair.leases(machine, family)).toEqual([destination]);
  pair.kernel.establish(token);
  // No time passes between ESTABLISHED and the SYNs.
  expect(pair.kernel.created.length).toBe(2);
  await pair.clock.advance(pair.kernel.rtt);
  expect(pair.kernel.flows(token).length).toBe(3);
  const [connection] = (await pair.status()).connections;
  expect(connection?.paths.map(({ kind, detour, state }) => `${kind} ${detour} ${state}`).sort()).toEqual([
    'direct null active',
    'nat d1 active',
    'nat d2 active',
  ]);
});

test('a second connection to the same server waits for nobody', async () => {
  await pair.machine(1);
  await pair.startAgent();
  const first = await pair.connect();
  await pair.clock.advance(100);
  pair.kernel.close(first);
  await pair.clock.advance(60_000);
  const sent = pair.network.sent.length;
  const second = pair.open();
  pair.kernel.establish(second);
  expect(pair.kernel.created.length).toBe(2);
  expect(pair.network.sent.length).toBe(sent);
  await pair.clock.advance(50);
  expect(pair.kernel.flows(second).length).toBe(2);
});

test('leases live as long as they are used, and are given back ten minutes after', async () => {
  const machine = await pair.machine(1);
  await pair.startAgent();
  const token = await pair.connect();
  await pair.clock.advance(3_600_000);
  expect(pair.leases(machine).length).toBe(1);
  pair.kernel.close(token);
  await pair.clock.advance(590_000);
  expect(pair.leases(machine).length).toBe(1);
  await pair.clock.advance(15_000);
  expect(pair.leases(machine).length).toBe(0);
});

test('a router that was killed and started again is not noticed by anything that runs', async () => {
  const machine = await pair.machine(1);
  await pair.startAgent();
  const token = await pair.connect();
  await pair.clock.advance(1_000);
  const flows = pair.kernel.flows(token);
  await pair.stopRouter(machine);
  await pair.startRouter(machine);
  await pair.clock.advance(120_000);
  expect(pair.kernel.flows(token)).toEqual(flows);
  const other = await pair.connect(endpoint('93.184.216.35:443'));
  await pair.clock.advance(1_000);
  expect(pair.kernel.flows(other).length).toBe(2);
});

test('a machine that lost everything gets its leases again, by its new epoch, and its path is made again', async () => {
  const machine = await pair.machine(1);
  await pair.startAgent();
  const token = await pair.connect();
  await pair.clock.advance(10_000);
  const [, remote = ''] = pair.kernel.flows(token);
  await pair.stopRouter(machine);
  machine.nft.flushRuleset();
  await pair.startRouter(machine);
  pair.kernel.breakFlow(token, endpoint(remote), 104);
  await pair.clock.advance(5_000);
  // The old port, because the agent suggested it.
  expect(pair.kernel.flows(token)).toEqual([formatEndpoint(SERVER), remote]);
});

test('while a detour is away its connections use another one; when it is back, they use it again', async () => {
  const [one] = [await pair.machine(1), await pair.machine(2)];
  await pair.startAgent({ maxPaths: 1 });
  const token = await pair.connect();
  await pair.clock.advance(1_000);
  const [, first = ''] = pair.kernel.flows(token);
  expect(first).toContain('80.0.0.1');
  pair.cut.add(formatAddress(one.v4));
  pair.kernel.breakFlow(token, endpoint(first), 110);
  await pair.clock.advance(15_000);
  expect(pair.kernel.flows(token)[1]).toContain('80.0.0.2');
  pair.cut.clear();
  await pair.clock.advance(60_000);
  const later = await pair.connect();
  await pair.clock.advance(1_000);
  expect(pair.kernel.flows(later).length).toBe(2);
  expect((await pair.status()).detours.every(({ state }) => state === 'up')).toBe(true);
});

test('a stalled path is made again soon after its way is back', async () => {
  const machine = await pair.machine(1);
  await pair.startAgent();
  const token = await pair.connect();
  await pair.clock.advance(1_000);
  const [, remote = ''] = pair.kernel.flows(token);
  pair.cut.add(formatAddress(machine.v4));
  pair.kernel.stall(token, endpoint(remote), 6);
  await pair.clock.advance(20_000);
  expect(pair.kernel.created.length).toBe(1);
  pair.cut.clear();
  await pair.clock.advance(15_000);
  expect(pair.kernel.created.length).toBe(2);
  expect(pair.kernel.flows(token).length).toBe(2);
});

test('what a router refuses is not asked again before its time, and the application never notices', async () => {
  await pair.machine(1, { deny: [{ prefix: { address: SERVER.address, length: 32 }, ports: [] }] });
  await pair.startAgent();
  const token = await pair.connect();
  await pair.clock.advance(600_000);
  expect(pair.kernel.created).toEqual([]);
  expect(pair.kernel.flows(token)).toEqual([formatEndpoint(SERVER)]);
  const [connection] = (await pair.status()).connections;
  expect(connection?.paths.find(({ kind }) => kind === 'nat')?.why).toBe('no lease: DENIED_DESTINATION');
});

test('a router without nftables grants nothing, and the agent joins nothing', async () => {
  const machine = await pair.machine(1);
  machine.nft.fault = (commands) => (commands.includes('add element') ? { kind: 'denied' } : null);
  await pair.startAgent();
  await pair.connect();
  await pair.clock.advance(20_000);
  expect(pair.kernel.created).toEqual([]);
  machine.nft.fault = () => null;
  await pair.clock.advance(120_000);
  expect(pair.kernel.created.length).toBe(1);
});

test('a wire that loses, doubles and reorders a third of everything still gives every connection its paths', async () => {
  const [one, two] = [await pair.machine(1), await pair.machine(2)];
  let seed = 99;
  const draw = (): number => {
    seed = (Math.imul(seed, 1103515245) + 12345) & 0x7fffffff;
    return seed / 0x7fffffff;
  };
  pair.fate = () => {
    const luck = draw();
    if (luck < 0.2) return [];
    return luck < 0.35 ? [DELAY_MS, DELAY_MS + 60 * draw()] : [DELAY_MS + 60 * draw()];
  };
  await pair.startAgent();
  await pair.clock.advance(60_000);
  const tokens: number[] = [];
  for (let i = 1; i <= 20; i++) tokens.push(await pair.connect(endpoint(`93.184.216.${i}:443`)));
  await pair.clock.advance(60_000);
  for (const token of tokens) expect(pair.kernel.flows(token).length).toBe(3);
  for (const machine of [one, two]) expect(new Set(pair.leases(machine)).size).toBe(20);
});

test('lost events: everything that happened meanwhile is found out', async () => {
  await pair.machine(1);
  await pair.startAgent();
  const gone = await pair.connect();
  await pair.clock.advance(1_000);
  pair.kernel.deafen();
  pair.kernel.close(gone);
  const unseen = await pair.connect();
  expect(pair.kernel.flows(unseen).length).toBe(1);
  pair.kernel.hearAgain();
  await pair.clock.advance(2_000);
  expect(pair.kernel.flows(unseen).length).toBe(2);
  expect((await pair.status()).connections.length).toBe(1);
});

test('an agent that starts late adopts what is there, and its successor what it made', async () => {
  await pair.machine(1);
  const early = pair.open();
  pair.kernel.establish(early);
  const kernels = pair.open(SERVER, { kernelManaged: true });
  pair.kernel.establish(kernels);
  await pair.startAgent();
  await pair.clock.advance(2_000);
  expect(pair.kernel.flows(early).length).toBe(2);
  expect(pair.kernel.flows(kernels).length).toBe(1);
  const reasons = (await pair.status()).connections.map(({ why }) => why);
  expect(reasons.filter((why) => why?.includes("kernel's own path manager")).length).toBe(1);
  pair.daemon?.stop();
  const created = pair.kernel.created.length;
  await pair.startAgent({ maxPaths: 1 });
  await pair.clock.advance(2_000);
  const mine = (await pair.status()).connections.find(({ paths }) => paths.length > 1);
  expect(mine?.paths.map(({ kind, detour, state }) => `${kind} ${detour} ${state}`)).toContain('nat d1 active');
  // The other one is tried once more by the successor, who cannot know; nothing else is.
  expect(pair.kernel.created.slice(created).every(({ token }) => token === kernels)).toBe(true);
});

test('the server’s limit is found once, and respected', async () => {
  pair.kernel.limit = 1;
  await pair.machine(1);
  await pair.machine(2);
  await pair.startAgent();
  const token = await pair.connect();
  await pair.clock.advance(120_000);
  expect(pair.kernel.flows(token).length).toBe(2);
  expect(pair.kernel.created.length).toBe(2);
  const [connection] = (await pair.status()).connections;
  expect(connection?.why).toBe('the server accepts no more subflows');
});

test.each([
  ['opened by others', { serverSide: true }],
  ['with flag C', { denyJoinId0: true }],
] as const)('connections %s are left alone', async (_, opening) => {
  const machine = await pair.machine(1);
  await pair.startAgent();
  const token = await pair.connect(SERVER, opening);
  await pair.clock.advance(60_000);
  expect(pair.kernel.flows(token).length).toBe(1);
  expect(pair.kernel.created).toEqual([]);
  expect(pair.leases(machine)).toEqual([]);
});

test('an agent that was told to stop stops', async () => {
  await pair.machine(1);
  await pair.startAgent();
  await pair.connect();
  await pair.clock.advance(1_000);
  pair.daemon?.stop();
  await settle();
  const sent = pair.network.sent.filter(({ from }) => from.address.value === CLIENT.v4.value).length;
  await pair.clock.advance(120_000);
  expect(pair.network.sent.filter(({ from }) => from.address.value === CLIENT.v4.value).length).toBe(sent);
});

test('a host that moves to another address: paths from the old one end, and are made again from the new one', async () => {
  const machine = await pair.machine(1);
  await pair.startAgent();
  const token = await pair.connect();
  await pair.clock.advance(1_000);
  const moved = address('81.0.0.99');
  pair.addresses.splice(0, 1, moved);
  pair.routing.change(
    [moved, CLIENT.v6].map((one) => ({ address: one, interface: 'eth0', index: 2, deprecated: false })),
  );
  await pair.clock.advance(1_000);
  const sample = (await pair.kernel.diag.connections()).find((one) => one.token === token);
  expect(sample?.subflows.map(({ local }) => formatAddress(local.address))).toEqual(['81.0.0.99', '81.0.0.99']);
  expect(pair.leases(machine).length).toBe(2);
  expect([...machine.nft.elements('leases4').keys()].some((key) => key.startsWith('81.0.0.99 '))).toBe(true);
  const [connection] = (await pair.status()).connections;
  expect(connection?.paths.map(({ kind, state }) => `${kind} ${state}`).sort()).toEqual([
    'direct active',
    'nat active',
  ]);
  expect(pair.lines.filter(({ event }) => event === 'network-changed').length).toBe(1);
});

test('of changes of links that leave the addresses as they were, a host of containers has many: nobody is asked', async () => {
  await pair.machine(1);
  await pair.startAgent();
  const token = await pair.connect();
  await pair.clock.advance(1_000);
  const [sent, flows] = [pair.network.sent.length, pair.kernel.flows(token)];
  for (let i = 0; i < 20; i++) {
    pair.routing.change([...pair.routing.held]);
    await pair.clock.advance(100);
  }
  expect(pair.network.sent.length).toBe(sent);
  expect(pair.kernel.flows(token)).toEqual(flows);
});

test('with interfaces chosen a detour grants leases to each of their addresses, and one that goes takes only its own paths', async () => {
  const machine = await pair.machine(1);
  const second = address('82.0.0.1');
  pair.addresses.push(second);
  const [eth, wlan] = [
    { address: CLIENT.v4, interface: 'eth0', index: 2, deprecated: false },
    { address: second, interface: 'wlan0', index: 3, deprecated: false },
  ];
  pair.routing.change([eth, wlan]);
  pair.kernel.limit = 8;
  await pair.startAgent({ interfaces: { include: ['*'], exclude: [] }, maxPaths: 4 });
  const token = await pair.connect();
  await pair.clock.advance(1_000);
  const owners = (): string[] =>
    [...machine.nft.elements('leases4').keys()].map((key) => key.split(' ')[0] ?? '').sort();
  expect(owners()).toEqual(['81.0.0.1', '82.0.0.1']);
  const locals = async (): Promise<string[]> => {
    const sample = (await pair.kernel.diag.connections()).find((one) => one.token === token);
    return (sample?.subflows ?? []).map(({ local }) => formatAddress(local.address)).sort();
  };
  expect(await locals()).toEqual(['81.0.0.1', '81.0.0.1', '82.0.0.1', '82.0.0.1']);
  pair.addresses.pop();
  pair.routing.change([eth]);
  await pair.clock.advance(2_000);
  expect(await locals()).toEqual(['81.0.0.1', '81.0.0.1']);
  pair.addresses.push(second);
  pair.routing.change([eth, wlan]);
  await pair.clock.advance(30_000);
  expect(await locals()).toEqual(['81.0.0.1', '81.0.0.1', '82.0.0.1', '82.0.0.1']);
  expect((await pair.status()).detours.map((detour) => `${detour.name} ${detour.interface} ${detour.state}`)).toEqual([
    'd1 eth0 up',
    'd1 wlan0 up',
  ]);
});

test('the next agent tells what its predecessor made over another interface from the direct path', async () => {
  await pair.machine(1);
  const second = address('82.0.0.1');
  pair.addresses.push(second);
  pair.routing.change([
    { address: CLIENT.v4, interface: 'eth0', index: 2, deprecated: false },
    { address: second, interface: 'wlan0', index: 3, deprecated: false },
  ]);
  pair.kernel.limit = 8;
  const settings = { interfaces: { include: ['*'], exclude: [] }, maxPaths: 4 };
  await pair.startAgent(settings);
  const token = await pair.connect();
  await pair.clock.advance(1_000);
  const flows = pair.kernel.flows(token);
  pair.daemon?.stop();
  await pair.startAgent(settings);
  await pair.clock.advance(5_000);
  expect(pair.kernel.flows(token)).toEqual(flows);
  const [connection] = (await pair.status()).connections;
  expect(connection?.paths.map(({ kind, state }) => `${kind} ${state}`).sort()).toEqual([
    'direct active',
    'direct active',
    'nat active',
    'nat active',
  ]);
});
