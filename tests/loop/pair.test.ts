import { afterEach, describe, expect, test } from 'vitest';
import { type Daemon, startDaemon } from '../../appliance/client/daemon.ts';
import { createDetours } from '../../appliance/client/detours.ts';
import { REMOVE_GUARD } from '../../appliance/client/guard.ts';
import { createTunnels } from '../../appliance/client/tunnels.ts';
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
  parsePrefix,
} from '../../appliance/protocol/address.ts';
import { deriveKeys, TYPE } from '../../appliance/protocol/control.ts';
import { Router } from '../../appliance/router/server.ts';
import type { ClientSettings, RouterSettings } from '../../appliance/settings.ts';
import { FakeClock, settle } from '../fakes/clock.ts';
import { FakeKernel, type Opening } from '../fakes/mptcp.ts';
import { FakeGroups, FakeSwitches } from '../fakes/mptcpify.ts';
import { FakeNetwork, type Fate } from '../fakes/network.ts';
import { FakeNft } from '../fakes/nft.ts';
import { FakeRouting } from '../fakes/routing.ts';
import { FakeTunnels, FakeWire } from '../fakes/wireguard.ts';
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
  readonly addresses: Address[];
  readonly tunnels: FakeTunnels;
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
  readonly wire = new FakeWire();
  readonly tunnels = new FakeTunnels(this.addresses, 'client');
  /** What the client told nft about tunnels, in order. */
  readonly guard: string[] = [];
  readonly lines: { level: string; event: string }[] = [];
  /** Ports at which the client's kernel names servers; null while it cannot. */
  naming: Set<string> | null = null;
  /** What becomes of SYNs with the option on their way. */
  middlebox: 'passes' | 'drops' = 'passes';
  daemon: Daemon | null = null;
  /** Machines whose way is cut: neither datagrams nor SYNs get through. */
  readonly cut = new Set<string>();
  fate: Fate = () => [DELAY_MS];
  #port = 40_000;

  constructor() {
    this.wire.hosts.push(this.tunnels);
    this.network.reaches = (sender, from, receiver, to) =>
      !sender || !this.wire.isInside(from.address) || this.wire.carries(sender, from.address, receiver, to.address);
    this.network.fate = (from, to, bytes) => {
      const ends = [from, to].map((one) => formatAddress(one.address));
      return ends.some((end) => this.cut.has(end)) ? [] : this.fate(from, to, bytes);
    };
    this.kernel.way = (local, remote, server) => {
      if (this.wire.isInside(local.address)) return this.#throughTunnel(local, remote);
      const machine = this.machines.find(({ v4, v6 }) => [v4, v6].some((one) => one.value === remote.address.value));
      if (!machine) return remote;
      if (this.cut.has(formatAddress(remote.address))) return 'silence';
      const family = local.address.family;
      const slot = `${formatAddress(local.address)} . ${remote.port}`;
      if (this.naming?.has(formatEndpoint(remote)) && machine.nft.elements('auth4').has(slot))
        return this.middlebox === 'drops' ? 'silence' : server;
      const to = machine.nft.elements(`leases${family}`).get(slot);
      // A SYN to a lease port without a lease is dropped in the raw hook.
      if (!to) return 'silence';
      const [host = '', port = ''] = to.split(' . ');
      return { address: address(host), port: Number(port) };
    };
  }

  /** A SYN out of a tunnel: the router lets it through to the server, or drops it. */
  #throughTunnel(local: Endpoint, remote: Endpoint): Endpoint | 'silence' {
    const tunnels = this.wire.beyond(this.addresses, local.address);
    const machine = this.machines.find((one) => one.tunnels === tunnels);
    const gateway = tunnels?.devices
      .get('detour-vpn')
      ?.held.find(({ address }) => address.family === local.address.family);
    if (!machine || !gateway || this.cut.has(formatAddress(machine.v4))) return 'silence';
    if (!this.wire.carries(this.addresses, local.address, machine.addresses, gateway.address)) return 'silence';
    const granted = machine.nft.elements(`tunnels${local.address.family}`).has(formatAddress(local.address));
    return granted ? remote : 'silence';
  }

  readonly log: Log = {
    debug: () => undefined,
    info: (event) => this.lines.push({ level: 'info', event }),
    warn: (event) => this.lines.push({ level: 'warn', event }),
    error: (event) => this.lines.push({ level: 'error', event }),
  };

  async machine(n: number, settings: Partial<RouterSettings> = {}): Promise<Machine> {
    const [v4, v6] = [address(`80.0.0.${n}`), address(`2a00:80::${n}`)];
    const addresses = [v4, v6];
    const machine: Machine = {
      name: `d${n}`,
      v4,
      v6,
      addresses,
      nft: new FakeNft(this.clock),
      tunnels: new FakeTunnels(addresses, `d${n}`),
      router: null,
    };
    this.wire.hosts.push(machine.tunnels);
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
        inband: false,
        announce: [],
        onExit: 'keep',
        vpn: null,
        ...settings,
      },
      {
        clock: this.clock,
        log: this.log,
        nft: machine.nft,
        datagrams: this.network.host(machine.addresses),
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
        listeners: async () => [],
        upkeep: async () => ({ v4: null, v6: null }),
        openTunnels: () => machine.tunnels,
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
        announcing: null,
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
            openTunnels: () => ({
              ...this.tunnels,
              place: 'own',
              nft: {
                run: async (text) => {
                  this.guard.push(text);
                  return null;
                },
                list: async () => null,
                dump: async () => null,
                translateToOption: async () => null,
              },
            }),
            openPathManager: this.kernel.openPathManager,
          },
          load: async () => undefined,
          unload: async () => undefined,
          close: () => undefined,
        }),
        providers: [],
        inband: {
          isLoaded: () => this.naming !== null,
          open: () => {
            const { naming } = this;
            if (!naming) throw new Error('no BPF here');
            return {
              by: 'load',
              add: (at) => void naming.add(formatEndpoint(at)),
              remove: (at) => void naming.delete(formatEndpoint(at)),
              close: () => undefined,
            };
          },
        },
        openAnnouncing: () => {
          throw new Error('nothing is announced');
        },
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

describe('tunnels', () => {
  const prefix = (text: string) => {
    const parsed = parsePrefix(text);
    if (!parsed) throw new Error(text);
    return parsed;
  };
  const vpn = (v4 = '10.215.0.0/16', v6 = 'fd0d:e70::/48') => ({
    vpn: { port: 51820, v4: prefix(v4), v6: prefix(v6) },
  });
  const ONLY = { strategy: { kinds: ['vpn'], ordered: true } } as const;
  const AUTO = { strategy: { kinds: ['nat', 'vpn'], ordered: false, fallback: true } } as const;
  /** The client as the fake host of a kernel with both families. */
  const begin = (): void => {
    for (const own of [CLIENT.v4, CLIENT.v6])
      pair.tunnels.foreign.push({ to: { address: own, length: own.family === 4 ? 32 : 128 }, table: 255, index: 2 });
  };
  const devices = (): string[] => [...pair.tunnels.devices.keys()];
  const inside = (family: 4 | 6 = 4): string[] =>
    [...pair.tunnels.devices.values()].flatMap(({ held }) =>
      held.filter(({ address: one }) => one.family === family).map(({ address: one }) => formatAddress(one)),
    );
  const paths = async (token: number): Promise<string[]> => {
    const { connections } = await pair.status();
    const one = connections.find((connection) => Number.parseInt(connection.token, 16) === token);
    return (one?.paths ?? []).map(({ kind, detour, state }) => `${kind} ${detour} ${state}`).sort();
  };
  const peersOf = (machine: Machine): number => machine.tunnels.devices.get('detour-vpn')?.peers.size ?? 0;
  const events = (event: string): number => pair.lines.filter((line) => line.event === event).length;

  test.each([
    ['IPv4', SERVER, 4],
    ['IPv6', SERVER6, 6],
  ] as const)('a connection gains a path through one: %s', async (_, server, family) => {
    begin();
    const machine = await pair.machine(1, vpn());
    await pair.startAgent(ONLY);
    await pair.clock.advance(2_000);
    const token = await pair.connect(server);
    expect(pair.kernel.created).toMatchObject([{ remote: server, localId: 1 }]);
    expect(formatAddress(pair.kernel.created[0]?.local ?? CLIENT.v4)).toBe(inside(family)[0]);
    await pair.clock.advance(pair.kernel.rtt);
    expect(await paths(token)).toEqual(['direct null active', 'vpn d1 active']);
    expect(peersOf(machine)).toBe(1);
    // What leaves from there, and nothing else, leaves by the tunnel.
    expect(pair.tunnels.rules.map(({ from }) => formatAddress(from)).toSorted()).toEqual([...inside(4), ...inside(6)]);
    expect(pair.leases(machine, family)).toEqual([]);
  });

  test('is renewed for as long as the agent runs, and leaves nothing anywhere when that ends', async () => {
    begin();
    const machine = await pair.machine(1, vpn());
    await pair.startAgent(ONLY);
    await pair.clock.advance(3_600_000);
    expect(peersOf(machine)).toBe(1);
    expect(machine.nft.elements('tunnels4').size).toBe(1);
    const token = await pair.connect();
    await pair.clock.advance(1_000);
    const addresses = pair.addresses.length;
    const stopped = pair.daemon?.stop();
    await pair.clock.advance(1_000);
    await stopped;
    expect([devices(), pair.tunnels.rules]).toEqual([[], []]);
    expect(pair.guard.at(-1)).toBe(REMOVE_GUARD);
    expect(pair.addresses.length).toBe(addresses - 2);
    expect(peersOf(machine)).toBe(0);
    // The server heard of the end of what ran through it.
    expect(pair.kernel.flows(token)).toEqual([formatEndpoint(SERVER)]);
  });

  test('no router without them is ever asked', async () => {
    begin();
    await pair.machine(1);
    await pair.startAgent({ strategy: { kinds: ['nat', 'vpn'], ordered: false } });
    const token = await pair.connect();
    await pair.clock.advance(60_000);
    expect(await paths(token)).toEqual(['direct null active', 'nat d1 active']);
    expect(devices()).toEqual([]);
    expect(pair.network.sent.filter(({ bytes }) => bytes[2] === TYPE.TUNNEL)).toEqual([]);
  });

  test('of a detour that offers both, a connection uses one at a time', async () => {
    begin();
    await pair.machine(1, vpn());
    await pair.machine(2, vpn());
    await pair.startAgent({ strategy: { kinds: ['vpn', 'nat'], ordered: true } });
    await pair.clock.advance(2_000);
    const token = await pair.connect();
    await pair.clock.advance(1_000);
    expect(await paths(token)).toEqual(['direct null active', 'vpn d1 active', 'vpn d2 active']);
    expect(devices()).toHaveLength(2);
  });

  test('by default they wait until leases are of no use', async () => {
    begin();
    const machine = await pair.machine(1, vpn());
    await pair.startAgent(AUTO);
    const first = await pair.connect();
    await pair.clock.advance(20_000);
    expect(await paths(first)).toEqual(['direct null active', 'nat d1 active']);
    expect(devices()).toEqual([]);
    // Only UDP passes on this network.
    const way = pair.kernel.way;
    pair.kernel.way = (local, remote, server) =>
      machine.v4.value === remote.address.value ? 'silence' : way(local, remote, server);
    const second = await pair.connect(endpoint('93.184.216.35:443'));
    await pair.clock.advance(15_000);
    expect(await paths(second)).toContain('vpn d1 active');
    expect(await paths(first)).toContain('nat d1 active');
  });

  test('and go again on a network where leases may do', async () => {
    begin();
    const machine = await pair.machine(1, vpn());
    await pair.startAgent(AUTO);
    const way = pair.kernel.way;
    pair.kernel.way = (local, remote, server) =>
      machine.v4.value === remote.address.value ? 'silence' : way(local, remote, server);
    const token = await pair.connect();
    await pair.clock.advance(15_000);
    expect(devices()).toHaveLength(1);
    pair.kernel.close(token);
    pair.routing.change([{ address: CLIENT.v4, interface: 'eth0', index: 3, deprecated: false }]);
    await pair.clock.advance(5_000);
    expect(devices()).toEqual([]);
  });

  test('a router that was restarted with another key is enrolled with again, within a second of its first answer', async () => {
    begin();
    const machine = await pair.machine(1, vpn());
    await pair.startAgent(ONLY);
    await pair.clock.advance(2_000);
    const key = machine.tunnels.devices.get('detour-vpn')?.keys?.publicKey;
    const up = events('tunnel-up');
    await pair.stopRouter(machine);
    machine.tunnels.reboot();
    machine.nft.flushRuleset();
    await pair.startRouter(machine, vpn());
    expect(machine.tunnels.devices.get('detour-vpn')?.keys?.publicKey).not.toEqual(key);
    // The next PING is at most 27.5 s away; a connection that misses its path asks at once.
    await pair.clock.advance(28_500);
    expect(peersOf(machine)).toBe(1);
    const token = await pair.connect();
    await pair.clock.advance(100);
    expect(await paths(token)).toContain('vpn d1 active');
    expect(events('tunnel-up')).toBeGreaterThanOrEqual(up);
  });

  test('two detours with the same network give different addresses', async () => {
    begin();
    await pair.machine(1, vpn('10.215.0.0/30'));
    await pair.machine(2, vpn('10.215.0.0/30'));
    await pair.startAgent(ONLY);
    await pair.clock.advance(5_000);
    expect(inside(4).toSorted()[0]).toBe('10.215.0.2');
    expect(inside(4).toSorted()[1]).toMatch(/^198\.19\./);
    const token = await pair.connect();
    await pair.clock.advance(1_000);
    expect(await paths(token)).toEqual(['direct null active', 'vpn d1 active', 'vpn d2 active']);
  });

  test('a network of the client’s is kept clear of', async () => {
    begin();
    pair.tunnels.foreign.push({ to: prefix('10.0.0.0/8'), table: 254, index: 2 });
    await pair.machine(1, vpn());
    await pair.startAgent(ONLY);
    await pair.clock.advance(5_000);
    expect(inside(4)[0]).toMatch(/^198\.19\./);
    expect(events('tunnel-renumbered')).toBe(1);
    // A new network arrives that the tunnel is in the way of.
    pair.tunnels.foreign.push({ to: prefix('198.18.0.0/15'), table: 254, index: 2 });
    pair.tunnels.foreign.splice(2, 1);
    pair.routing.change([{ address: CLIENT.v4, interface: 'eth0', index: 3, deprecated: false }]);
    await pair.clock.advance(10_000);
    expect(inside(4)[0]).toMatch(/^10\.215\./);
    const token = await pair.connect();
    await pair.clock.advance(1_000);
    expect(await paths(token)).toContain('vpn d1 active');
  });

  test('where no address is free, it says so, and everything else goes on', async () => {
    begin();
    for (const network of ['10.0.0.0/8', '198.18.0.0/15'])
      pair.tunnels.foreign.push({ to: prefix(network), table: 254, index: 2 });
    await pair.machine(1, vpn());
    await pair.startAgent({ strategy: { kinds: ['nat', 'vpn'], ordered: false } });
    await pair.clock.advance(5_000);
    const token = await pair.connect();
    await pair.clock.advance(1_000);
    expect(await paths(token)).toEqual(['direct null active', 'nat d1 active']);
    expect(JSON.stringify((await pair.status()).tunnels)).toMatch(/no address inside it is free on this host/);
    expect(devices()).toEqual([]);
  });

  test('one that carries nothing is found, its path made elsewhere, and used again when it does', async () => {
    begin();
    await pair.machine(1, vpn());
    await pair.machine(2, vpn());
    await pair.startAgent({ ...ONLY, maxPaths: 1 });
    await pair.clock.advance(5_000);
    const token = await pair.connect();
    await pair.clock.advance(1_000);
    const [used = ''] = (await paths(token)).filter((path) => path.startsWith('vpn'));
    const name = used.split(' ')[1] ?? '';
    const machine = pair.machines.find((one) => one.name === name);
    const key = machine?.tunnels.devices.get('detour-vpn')?.keys?.publicKey ?? new Uint8Array(0);
    pair.wire.blocked.add(Buffer.from(key).toString('hex'));
    pair.kernel.stall(token, SERVER, 3, pair.kernel.created[0]?.local);
    await pair.clock.advance(15_000);
    const other = name === 'd1' ? 'd2' : 'd1';
    expect(await paths(token)).toContain(`vpn ${other} active`);
    const { tunnels = [] } = await pair.status();
    expect(tunnels.find(({ detour }) => detour === name)?.why).toMatch(
      /nothing comes back through it, although its detour answers/,
    );
    pair.wire.blocked.clear();
    await pair.clock.advance(60_000);
    expect((await pair.status()).tunnels?.map(({ state }) => state)).toEqual(['up', 'up']);
  });

  test('a client that can carry none says why, once, and the leases do', async () => {
    begin();
    pair.tunnels.missing = 'this kernel has no WireGuard. docker: --device /dev/net/tun';
    await pair.machine(1, vpn());
    await pair.startAgent({ strategy: { kinds: ['vpn', 'nat'], ordered: true } });
    await pair.clock.advance(120_000);
    const token = await pair.connect();
    await pair.clock.advance(1_000);
    expect(await paths(token)).toEqual(['direct null active', 'nat d1 active']);
    expect(events('tunnel-down')).toBe(1);
    expect((await pair.status()).tunnels?.[0]?.why).toContain('--device /dev/net/tun');
  });

  test('what a killed agent left is gone when the next one starts', async () => {
    begin();
    await pair.tunnels.wireguard.create('dtv-left123456');
    await pair.tunnels.links.addRule({ from: address('10.215.9.9'), table: 45_700, priority: 4_570 });
    await pair.tunnels.links.addRule({ from: address('10.215.9.9'), table: 45_700, priority: 100 });
    await pair.machine(1);
    await pair.startAgent();
    expect(devices()).toEqual([]);
    // A rule with other numbers is somebody else's, whatever it is about.
    expect(pair.tunnels.rules.map(({ priority }) => priority)).toEqual([100]);
    expect(pair.guard).toContain(REMOVE_GUARD);
  });

  test('a key that nothing depends on is replaced after twelve hours', async () => {
    begin();
    const machine = await pair.machine(1, vpn());
    // Without an agent's ticks: there are five of those a second.
    let used = true;
    let ups = 0;
    const common = { keys: deriveKeys(KEY.id, KEY.secret), clock: pair.clock, log: pair.log };
    const datagrams = pair.network.host(pair.addresses);
    const detours = createDetours({ ...common, datagrams, onEvent: () => undefined });
    const at = { address: machine.v4, port: 45672 };
    detours.set([{ key: 'd1', name: 'd1', endpoint: at }]);
    const tunnels = createTunnels({
      ...common,
      datagrams,
      ports: {
        ...pair.tunnels,
        place: 'own',
        nft: {
          run: async () => null,
          list: async () => null,
          dump: async () => null,
          translateToOption: async () => null,
        },
      },
      route: async () => null,
      entrance: () => ({ detour: 'd1', endpoint: at }),
      ask: detours.tunnel,
      inUse: () => used,
      onEvent: ({ kind }) => {
        if (kind === 'tunnel-up') ups++;
      },
    });
    await pair.clock.advance(100);
    tunnels.want('d1');
    await pair.clock.advance(13 * 3_600_000);
    const peers = () => [...(machine.tunnels.devices.get('detour-vpn')?.peers.keys() ?? [])];
    const [before, ...more] = peers();
    expect([before, more]).toEqual([expect.any(String), []]);
    expect(events('tunnel-rekeyed')).toBe(0);
    used = false;
    await pair.clock.advance(60_000);
    expect(peers()).toEqual([expect.not.stringMatching(before ?? '')]);
    // One check in 25 s, and never a moment in which it was down.
    expect(ups).toBeGreaterThan(1_700);
    expect(events('tunnel-down')).toBe(0);
    const stopped = tunnels.stop();
    await pair.clock.advance(1_000);
    await stopped;
    detours.stop();
  });
});

describe('in-band transit', () => {
  const nat = async () => {
    const [connection] = (await pair.status()).connections.slice(-1);
    return connection?.paths.filter(({ detour }) => detour === 'd1').map(({ kind, state }) => `${kind} ${state}`);
  };

  test('needs no lease once it worked, and its port is taken back at the end', async () => {
    pair.naming = new Set();
    const machine = await pair.machine(1, { inband: true });
    await pair.startAgent();
    await pair.connect();
    await pair.clock.advance(1_000);
    expect(await nat()).toEqual(['inband active']);
    const before = pair.leases(machine).length;
    const token = await pair.connect(endpoint('93.184.216.40:443'));
    await pair.clock.advance(1_000);
    expect(pair.kernel.flows(token).length).toBe(2);
    expect(await nat()).toEqual(['inband active']);
    expect(pair.leases(machine).length).toBe(before);
    // Its port is extended for as long as the agent runs.
    await pair.clock.advance(3_600_000);
    expect(pair.naming.size).toBe(1);
    expect(machine.nft.elements('auth4').size).toBe(1);
    const stopped = pair.daemon?.stop();
    await pair.clock.advance(1_000);
    await stopped;
    expect(pair.naming.size).toBe(0);
  });

  test('gives way to leases where the network drops its SYNs, in the same connection', async () => {
    pair.naming = new Set();
    pair.middlebox = 'drops';
    await pair.machine(1, { inband: true });
    await pair.startAgent({ strategy: { kinds: ['nat'], ordered: true, inband: true } });
    const token = await pair.connect();
    await pair.clock.advance(3_000);
    expect(pair.kernel.flows(token).length).toBe(2);
    expect(await nat()).toEqual(['nat active']);
    expect(pair.lines.map(({ event }) => event)).toContain('inband-fails');
    await pair.connect(endpoint('93.184.216.40:443'));
    await pair.clock.advance(500);
    expect(await nat()).toEqual(['nat active']);
  });

  test.each([
    ['the kernel is not prepared', false, true],
    ['the router takes none', true, false],
  ])('is not tried where %s', async (_, prepared, inband) => {
    if (prepared) pair.naming = new Set();
    await pair.machine(1, { inband });
    await pair.startAgent({ strategy: { kinds: ['nat'], ordered: true, inband: true } });
    await pair.connect();
    await pair.clock.advance(500);
    expect(await nat()).toEqual(['nat active']);
    expect(pair.lines.filter(({ event }) => event === 'inband-unavailable').length).toBe(prepared ? 0 : 1);
  });

  test('goes on with a router that restarts, and ends with one that takes it no more', async () => {
    pair.naming = new Set();
    const machine = await pair.machine(1, { inband: true });
    await pair.startAgent();
    await pair.connect();
    await pair.clock.advance(1_000);
    await pair.stopRouter(machine);
    await pair.startRouter(machine, { inband: true });
    await pair.connect(endpoint('93.184.216.40:443'));
    await pair.clock.advance(1_000);
    expect(await nat()).toEqual(['inband active']);
    await pair.stopRouter(machine);
    await pair.startRouter(machine, { inband: false });
    await pair.clock.advance(60_000);
    expect(pair.naming.size).toBe(0);
    await pair.connect(endpoint('93.184.216.41:443'));
    await pair.clock.advance(1_000);
    expect(await nat()).toEqual(['nat active']);
  });
});
