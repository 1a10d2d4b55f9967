import { describe, expect, it } from 'vitest';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, hostState, isInUse, type Status, type StatusConnection, World } from './world.ts';

const FAMILIES = [
  ['IPv4', '10.81.0.2:5000'],
  ['IPv6', '[fd81::2]:5000'],
] as const;
const [[, SERVER]] = FAMILIES;
const VPN = { DETOUR_VPN: 'wireguard' } as const;
const ONLY = { DETOUR_STRATEGY: 'vpn' } as const;
const BYTES = 12_000_000;

/** Each detour once, by one name for all its addresses: a tunnel carries both families. */
const named = (world: World): { DETOUR_DETOURS: string } => ({
  DETOUR_DETOURS: world.detours.map(({ name, v4 }) => `${name}=${v4}:45672`).join(','),
});

async function tunnelsAre(status: () => Promise<Status>, state: string, count = 1): Promise<Status> {
  return waitUntil(
    async () => {
      const now = await status();
      const { tunnels = [] } = now;
      return tunnels.length === count && tunnels.every((one) => one.state === state) && now;
    },
    { deadlineMs: 30_000, what: `${count} tunnels to be ${state}` },
  );
}

const through = (connection: StatusConnection, detour = 'detour1') =>
  connection.paths.find((path) => path.kind === 'vpn' && path.detour === detour && isInUse(path));

const delivered = ({ paths }: StatusConnection): number =>
  paths.reduce((sum, { deliveredBytes }) => sum + deliveredBytes, 0);

async function moved(status: () => Promise<Status>, bytes: number): Promise<StatusConnection> {
  return connectionIs(status, SERVER, `${bytes} bytes to arrive`, (one) => delivered(one) >= bytes);
}

describe.runIf(requireRoot('tests of tunnels'))('a transfer through a tunnel', () => {
  for (const [family, to] of FAMILIES) {
    for (const direction of ['up', 'down'] as const) {
      it(`uses both ways and arrives whole: ${family}, ${direction}`, async () => {
        await using world = await World.create('tunnels', { rateMbit: 20 });
        await startServer(world.server);
        await world.startRouters(VPN);
        const agent = await world.startAgent({ ...ONLY, ...named(world) });
        const { tunnels } = await tunnelsAre(agent.status, 'up');
        expect(tunnels?.[0]?.mtu).toBe(1420);
        const result = await startTransfer(world.client, { to, bytes: BYTES, direction }).result;
        expect(result.sha256).toBe(expectedSha256('detour', BYTES));
        expect(result.mptcp).toBe(true);
        expect(result.paths.length).toBe(2);
        for (const path of result.paths) expect(path.bytes).toBeGreaterThan(BYTES / 5);
        // One way carries 20; what is above it came by the other.
        expect(result.mbps).toBeGreaterThan(22);
      });
    }
  }

  it('carries IPv4 inside IPv6', async () => {
    await using world = await World.create('tunnels', { rateMbit: 20 });
    await startServer(world.server);
    await world.startRouters(VPN);
    const outer = world.detours.map(({ name, v6 }) => `${name}=[${v6}]:45672`).join(',');
    const agent = await world.startAgent({ ...ONLY, DETOUR_DETOURS: outer });
    const { tunnels } = await tunnelsAre(agent.status, 'up');
    expect(tunnels?.[0]?.mtu).toBe(1420);
    const result = await startTransfer(world.client, { to: SERVER, bytes: BYTES }).result;
    expect(result.sha256).toBe(expectedSha256('detour', BYTES));
    for (const path of result.paths) expect(path.bytes).toBeGreaterThan(BYTES / 5);
    expect(result.paths.length).toBe(2);
  });

  it.each(['direct', 'way'] as const)('survives the loss of one of its ways: %s', async (lost) => {
    await using world = await World.create('tunnels', { rateMbit: 20 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    await world.startRouters(VPN);
    const agent = await world.startAgent({ ...ONLY, ...named(world) });
    await tunnelsAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    await connectionIs(
      agent.status,
      SERVER,
      'both ways to carry',
      (one) => (through(one)?.deliveredBytes ?? 0) > 1_000_000,
    );
    await (lost === 'direct' ? world.direct : detour.way).blackhole();
    const result = await transfer.result;
    expect(result.sha256).toBe(expectedSha256('detour', BYTES));
    expect(result.longestStallMs).toBeLessThan(3_000);
  });

  it('does not notice that the router is killed, and the next one takes its tunnels over', async () => {
    await using world = await World.create('tunnels', { rateMbit: 20 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    const router = await world.startRouter(detour, VPN);
    const agent = await world.startAgent({ ...ONLY, ...named(world) });
    const before = await tunnelsAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: SERVER, bytes: 3 * BYTES });
    await connectionIs(
      agent.status,
      SERVER,
      'the tunnel to carry',
      (one) => (through(one)?.deliveredBytes ?? 0) > 500_000,
    );
    await router.stop('SIGKILL');
    await world.startRouter(detour, VPN);
    const result = await transfer.result;
    expect(result.sha256).toBe(expectedSha256('detour', 3 * BYTES));
    expect(result.paths.length).toBe(2);
    expect(result.mbps).toBeGreaterThan(22);
    expect((await agent.status()).tunnels?.[0]?.v4).toBe(before.tunnels?.[0]?.v4);
  });

  it('gets its path back when the detour’s machine lost everything and has another key', async () => {
    await using world = await World.create('tunnels', { rateMbit: 10 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    const router = await world.startRouter(detour, VPN);
    const agent = await world.startAgent({ ...ONLY, ...named(world) });
    await tunnelsAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: SERVER, bytes: 4 * BYTES });
    await connectionIs(
      agent.status,
      SERVER,
      'the tunnel to carry',
      (one) => (through(one)?.deliveredBytes ?? 0) > 500_000,
    );
    await router.stop('SIGKILL');
    await detour.host.exec(['ip', 'link', 'del', 'detour-vpn']);
    await detour.host.exec(['nft', 'flush', 'ruleset']);
    await detour.host.exec(['conntrack', '-F']);
    await world.startRouter(detour, VPN);
    const began = performance.now();
    const back = await connectionIs(agent.status, SERVER, 'the path to be there', (one) => through(one) !== undefined);
    const bytes = through(back)?.deliveredBytes ?? 0;
    await connectionIs(
      agent.status,
      SERVER,
      'the path to carry again',
      (one) => (through(one)?.deliveredBytes ?? 0) > bytes + 300_000,
    );
    console.info(`carried again ${((performance.now() - began) / 1000).toFixed(1)} s after the router’s start`);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', 4 * BYTES));
  });

  it('one that carries nothing any more is found; the connection goes on, and uses it again afterwards', async () => {
    await using world = await World.create('tunnels', { rateMbit: 10 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    await world.startRouters(VPN);
    const agent = await world.startAgent({ ...ONLY, ...named(world) });
    await tunnelsAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: SERVER, bytes: 5 * BYTES });
    await connectionIs(
      agent.status,
      SERVER,
      'the tunnel to carry',
      (one) => (through(one)?.deliveredBytes ?? 0) > 500_000,
    );
    // The control port still answers.
    await detour.host.nft(
      'table inet firewall { chain in { type filter hook input priority -10; udp dport 51820 drop; }; }',
    );
    const down = await tunnelsAre(agent.status, 'down');
    expect(down.tunnels?.[0]?.why).toMatch(
      /nothing comes back through it, although its detour answers: is UDP port 51820/,
    );
    const at = delivered(await moved(agent.status, 0));
    await moved(agent.status, at + 1_000_000);
    await detour.host.nft('delete table inet firewall');
    await tunnelsAre(agent.status, 'up');
    await connectionIs(
      agent.status,
      SERVER,
      'the tunnel to carry again',
      (one) => (through(one)?.deliveredBytes ?? 0) > 300_000,
    );
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', 5 * BYTES));
  });
});

describe.runIf(requireRoot('tests of tunnels on a host'))('an agent with tunnels', () => {
  it('leaves a host as it was: after its end, after `cleanup`, and after it was killed', async () => {
    await using world = await World.create('tunnels');
    await startServer(world.server);
    await world.startRouters(VPN);
    const untouched = await hostState(world.client);
    const first = await world.startAgent({ ...ONLY, ...named(world), DETOUR_LOG_LEVEL: 'trace' });
    await tunnelsAre(first.status, 'up');
    const during = await hostState(world.client);
    expect(during.links).toContain('dtv-detou');
    expect(during.rules).toMatch(/^4570:\tfrom 10\.215\.\d+\.\d+ lookup 45700 proto 215/m);
    // The routes of everything else are what they were.
    const main = await world.client.exec(['ip', 'route', 'show', 'table', 'main']);
    expect(main).not.toContain('dtv');
    const [name = ''] = (await world.client.exec(['wg', 'show', 'interfaces'])).trim().split(/\s+/);
    const key = Buffer.from((await world.client.exec(['wg', 'show', name, 'private-key'])).trim(), 'base64');
    expect(key).toHaveLength(32);
    await first.program.stop();
    const said = [...first.program.lines, ...first.program.errors].join('\n');
    expect(said).toContain('"event":"tunnel-up"');
    for (const spelling of ['hex', 'base64', 'base64url'] as const) expect(said).not.toContain(key.toString(spelling));
    expect(await hostState(world.client)).toEqual(untouched);

    const second = await world.startAgent({ ...ONLY, ...named(world) });
    const { tunnels } = await tunnelsAre(second.status, 'up');
    await second.program.stop('SIGKILL');
    expect((await hostState(world.client)).links).toContain('dtv-detou');
    const third = await world.startAgent({ ...ONLY, ...named(world) });
    const after = await tunnelsAre(third.status, 'up');
    // A new key has new addresses.
    expect(after.tunnels?.[0]?.v4).not.toBe(tunnels?.[0]?.v4);
    expect((await world.client.exec(['ip', 'rule'])).match(/proto 215/g)).toHaveLength(1);
    await third.program.stop('SIGKILL');
    await world.command(['cleanup', 'client']);
    expect(await hostState(world.client)).toEqual(untouched);
  });

  it('keeps out of the way of networks of this host, and of another detour’s with the same addresses', async () => {
    await using world = await World.create('tunnels', { detours: 2 });
    await startServer(world.server);
    // Room for one client: both routers have the same address to give.
    await world.startRouters({ ...VPN, DETOUR_VPN_NETWORK: '10.215.0.0/30' });
    const agent = await world.startAgent({ ...ONLY, ...named(world) });
    const { tunnels = [] } = await tunnelsAre(agent.status, 'up', 2);
    const held = tunnels.map(({ v4 }) => v4 ?? '').toSorted();
    expect(held[0]).toBe('10.215.0.2');
    expect(held[1]).toMatch(/^198\.19\./);
    // A company's network comes along, which covers one of them.
    const lan = await world.lab.host('lan');
    await world.lab.link(world.client, lan, { v4: '10.200.0.0/30' });
    await world.client.route('10.208.0.0/12 via 10.200.0.2');
    await waitUntil(
      async () => (await agent.status()).tunnels?.every(({ v4, state }) => state === 'up' && v4?.startsWith('198.19.')),
      { deadlineMs: 20_000, what: 'both to be renumbered' },
    );
    expect(await world.client.exec(['ip', 'route', 'get', '10.215.0.2'])).toContain('via 10.200.0.2');
    const result = await startTransfer(world.client, { to: SERVER, bytes: 2_000_000 }).result;
    expect(result.sha256).toBe(expectedSha256('detour', 2_000_000));
  });

  it('uses smaller packets where the way drops larger ones without a word', async () => {
    await using world = await World.create('tunnels', { rateMbit: 20 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    const { way } = detour;
    await world.gateway.exec(['ip', 'link', 'set', way.at(world.gateway).dev, 'mtu', '1400']);
    for (const [host, family] of [
      [world.gateway, 'icmp type destination-unreachable'],
      [world.gateway, 'icmpv6 type packet-too-big'],
    ] as const) {
      await host.nft(
        `add table inet silent\nadd chain inet silent out { type filter hook output priority 0; }\nadd rule inet silent out ${family} drop\n`,
      );
    }
    await startServer(world.server);
    await world.startRouters(VPN);
    const agent = await world.startAgent({ ...ONLY, ...named(world) });
    const { tunnels } = await tunnelsAre(agent.status, 'up');
    expect(tunnels?.[0]?.mtu).toBe(1280);
    for (const direction of ['up', 'down'] as const) {
      const result = await startTransfer(world.client, { to: SERVER, bytes: BYTES, direction }).result;
      expect(result.sha256).toBe(expectedSha256('detour', BYTES));
      for (const path of result.paths) expect(path.bytes).toBeGreaterThan(BYTES / 5);
    }
  });

  it('falls back to tunnels by itself where lease ports are blocked', async () => {
    await using world = await World.create('tunnels', { rateMbit: 10 });
    await world.gateway.nft(
      'table inet office { chain fw { type filter hook forward priority 0; oifname "to-detour1" meta l4proto tcp drop; }; }',
    );
    await startServer(world.server);
    await world.startRouters(VPN);
    const agent = await world.startAgent(named(world));
    await waitUntil(async () => (await agent.status()).detours.every(({ state }) => state === 'up'), {
      deadlineMs: 20_000,
      what: 'the detour to answer',
    });
    expect((await agent.status()).tunnels).toBeUndefined();
    const transfer = startTransfer(world.client, { to: SERVER, bytes: 3 * BYTES });
    await connectionIs(
      agent.status,
      SERVER,
      'the tunnel to carry',
      (one) => (through(one)?.deliveredBytes ?? 0) > 1_000_000,
    );
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', 3 * BYTES));
  });

  it('lets nothing out of a tunnel but answers, whoever runs the detour', async () => {
    await using world = await World.create('tunnels');
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    const [router] = await world.startRouters(VPN);
    // A host that forwards, as every host with Docker does.
    const container = await world.lab.host('container');
    await world.lab.link(world.client, container, { v4: '172.30.0.0/30' });
    await container.route('default via 172.30.0.1');
    await world.client.forward();
    const listen = (host: typeof container) =>
      host.spawn([
        'python3',
        '-c',
        'import socket\ns=socket.create_server(("", 8080))\nprint("up", flush=True)\nwhile True: s.accept()[0].close()',
      ]);
    for (const host of [world.client, container]) await listen(host).waitFor('up');
    const agent = await world.startAgent({ ...ONLY, ...named(world) });
    const { tunnels } = await tunnelsAre(agent.status, 'up');
    const inside = tunnels?.[0]?.v4 ?? '';
    // The router and its rules are gone; whoever has that host does what he likes.
    await router?.stop('SIGKILL');
    await detour.host.exec(['nft', 'flush', 'ruleset']);
    await detour.host.exec(['ip', 'route', 'add', '172.30.0.0/30', 'dev', 'detour-vpn']);
    await detour.host.exec(['ip', 'route', 'add', '10.80.0.1/32', 'dev', 'detour-vpn']);
    // Its WireGuard has to be told that these are behind the client.
    const [peer = ''] = (await detour.host.exec(['wg', 'show', 'detour-vpn', 'peers'])).split('\n');
    await detour.host.exec([
      'wg',
      'set',
      'detour-vpn',
      'peer',
      peer,
      'allowed-ips',
      `${inside}/32,172.30.0.0/30,10.80.0.1/32`,
    ]);
    const tried = async (address: string): Promise<string> => {
      const script = `import socket\ns=socket.socket(); s.settimeout(1.5)\ntry:\n s.connect(("${address}", 8080)); print("connected")\nexcept OSError as e: print(type(e).__name__)`;
      return (await detour.host.exec(['python3', '-c', script])).trim();
    };
    await container.nft(
      'table inet watch { chain in { type filter hook prerouting priority -400; tcp dport 8080 counter; }; }',
    );
    const arrived = async (): Promise<number> =>
      Number(/counter packets (\d+)/.exec(await container.exec(['nft', 'list', 'chain', 'inet', 'watch', 'in']))?.[1]);
    for (const address of [inside, '172.30.0.2', '10.80.0.1']) expect(await tried(address)).toBe('TimeoutError');
    expect(await arrived()).toBe(0);
    // The proof that the test would see it: without the guard it gets in.
    await world.client.exec(['nft', 'delete', 'table', 'inet', 'detour_tunnels']);
    expect(await tried(inside)).toBe('connected');
    await tried('172.30.0.2');
    expect(await arrived()).toBeGreaterThan(0);
  });

  it('goes on without tunnels where this host can carry none, and says what is missing', async () => {
    await using world = await World.create('tunnels', { rateMbit: 20 });
    await startServer(world.server);
    await world.startRouters(VPN);
    await world.client.isolate('/dev/net');
    const agent = await world.startAgent({ DETOUR_STRATEGY: 'vpn,nat', ...named(world) });
    const status = await waitUntil(
      async () => {
        const now = await agent.status();
        return now.tunnels?.[0] !== undefined && now.tunnels[0].state !== 'asked' && now;
      },
      { deadlineMs: 20_000, what: 'a verdict' },
    );
    if (status.tunnels?.[0]?.carrier !== 'kernel')
      expect(status.tunnels?.[0]?.why).toMatch(
        /this kernel has no WireGuard, and wireguard-go cannot run: .*--device \/dev\/net\/tun/,
      );
    const result = await startTransfer(world.client, { to: SERVER, bytes: BYTES }).result;
    expect(result.sha256).toBe(expectedSha256('detour', BYTES));
    expect(result.mbps).toBeGreaterThan(22);
  });
});
