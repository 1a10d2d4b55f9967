import { describe, expect, it } from 'vitest';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, hostState, makeKey, pathBy, type Status, World } from './world.ts';

const BYTES = 12_000_000;
const DIGEST = expectedSha256('detour', BYTES);

/** Waits until that many bytes of the transfer are acknowledged or received, as the agent counts them. */
async function moved(status: () => Promise<Status>, bytes: number): Promise<void> {
  await connectionIs(
    status,
    '10.81.0.2:5000',
    `${bytes} bytes to arrive`,
    (one) => one.paths.reduce((sum, { deliveredBytes }) => sum + deliveredBytes, 0) >= bytes,
  );
}

describe.runIf(requireRoot('tests of transfers through routers'))('a transfer through a router', () => {
  for (const [family, to] of [
    ['IPv4', '10.81.0.2:5000'],
    ['IPv6', '[fd81::2]:5000'],
  ] as const) {
    for (const direction of ['up', 'down'] as const) {
      it(`uses both ways and arrives whole: ${family}, ${direction}`, async () => {
        await using world = await World.create('transfer', { rateMbit: 20 });
        await startServer(world.server);
        await world.startRouters();
        const agent = await world.startAgent();
        await detoursAre(agent.status, 'up');
        const result = await startTransfer(world.client, { to, bytes: BYTES, direction }).result;
        expect(result.sha256).toBe(DIGEST);
        expect(result.mptcp).toBe(true);
        expect(result.paths.length).toBe(2);
        for (const path of result.paths) expect(path.bytes).toBeGreaterThan(BYTES / 4);
        // One way carries 20; what is above it came by the other.
        expect(result.mbps).toBeGreaterThan(22);
      });
    }
  }

  it('survives the loss of the direct way', async () => {
    await using world = await World.create('transfer', { rateMbit: 20 });
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: '10.81.0.2:5000', bytes: BYTES, direction: 'down' });
    await moved(agent.status, BYTES / 4);
    await world.direct.blackhole();
    const result = await transfer.result;
    expect(result.sha256).toBe(DIGEST);
    expect(result.longestStallMs).toBeLessThan(3_000);
  });

  it('survives the loss of the detour’s way', async () => {
    await using world = await World.create('transfer', { rateMbit: 20 });
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: '10.81.0.2:5000', bytes: BYTES });
    await moved(agent.status, BYTES / 4);
    await world.detours[0]?.way.blackhole();
    const result = await transfer.result;
    expect(result.sha256).toBe(DIGEST);
    expect(result.longestStallMs).toBeLessThan(3_000);
  });

  it('does not notice that the router is killed, and a new connection has its path again after the restart', async () => {
    await using world = await World.create('transfer', { rateMbit: 20 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    const router = await world.startRouter(detour);
    const agent = await world.startAgent();
    const { detours } = await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: '10.81.0.2:5000', bytes: BYTES });
    await moved(agent.status, BYTES / 4);
    await router.stop('SIGKILL');
    const result = await transfer.result;
    expect(result.sha256).toBe(DIGEST);
    expect(result.paths.length).toBe(2);
    expect(result.mbps).toBeGreaterThan(22);
    await world.startRouter(detour);
    const again = startTransfer(world.client, { to: '10.81.0.2:5000', bytes: BYTES });
    await connectionIs(agent.status, '10.81.0.2:5000', 'the path by the restarted router', (one) =>
      Boolean(pathBy(one, 'detour1')),
    );
    expect((await again.result).sha256).toBe(DIGEST);
    const after = await detoursAre(agent.status, 'up');
    // It adopted what it found in the kernel: nothing was lost, so nothing is announced as lost.
    expect(after.detours.map(({ epoch }) => epoch)).toEqual(detours.map(({ epoch }) => epoch));
  });

  it('does not notice an upgrade of the router', async () => {
    await using world = await World.create('transfer', { rateMbit: 20 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    const router = await world.startRouter(detour);
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: '10.81.0.2:5000', bytes: BYTES });
    await moved(agent.status, BYTES / 4);
    await router.stop('SIGTERM', 10_000);
    await world.startRouter(detour);
    const result = await transfer.result;
    expect(result.sha256).toBe(DIGEST);
    expect(result.paths.length).toBe(2);
    expect(result.mbps).toBeGreaterThan(22);
  });

  it('gets its path back when the detour’s machine was restarted and lost everything', async () => {
    await using world = await World.create('transfer', { rateMbit: 10 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    const router = await world.startRouter(detour);
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: '10.81.0.2:5000', bytes: 3 * BYTES });
    await moved(agent.status, BYTES / 2);
    await router.stop('SIGKILL');
    await detour.host.exec(['nft', 'flush', 'ruleset']);
    await detour.host.exec(['conntrack', '-F']);
    await world.startRouter(detour);
    const back = await connectionIs(
      agent.status,
      '10.81.0.2:5000',
      'the path to come back',
      (one) => pathBy(one, 'detour1') !== undefined && one.paths.some(({ why }) => why === null),
    );
    const before = pathBy(back, 'detour1')?.deliveredBytes ?? 0;
    await connectionIs(
      agent.status,
      '10.81.0.2:5000',
      'the path to carry bytes again',
      (one) => (pathBy(one, 'detour1')?.deliveredBytes ?? 0) > before + 500_000,
    );
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', 3 * BYTES));
  });

  it('uses a way again within seconds of its return from an outage', async () => {
    await using world = await World.create('transfer', { rateMbit: 10 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const bytes = 70_000_000;
    const transfer = startTransfer(world.client, { to: '10.81.0.2:5000', bytes });
    await moved(agent.status, BYTES / 4);
    await detour.way.blackhole();
    await waitUntil(
      async () => {
        const { detours } = await agent.status();
        return detours.some(({ name, state }) => name === 'detour1' && state === 'down');
      },
      { deadlineMs: 40_000, what: 'the agent to find the detour gone' },
    );
    const first = (await agent.status()).connections[0]?.paths.find((path) => path.detour === 'detour1');
    expect(first?.state).toBe('failed');
    await detour.way.restore();
    await waitUntil(
      async () => (await agent.status()).detours.some(({ name, state }) => name === 'detour1' && state === 'up'),
      {
        deadlineMs: 40_000,
        what: 'the agent to find the detour again',
      },
    );
    const up = performance.now();
    await connectionIs(agent.status, '10.81.0.2:5000', 'the path to carry bytes again', (one) => {
      return (pathBy(one, 'detour1')?.deliveredBytes ?? 0) > 300_000;
    });
    expect(performance.now() - up).toBeLessThan(5_000);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', bytes));
  });

  it('serves two clients behind one address, each with a lease of its own', async () => {
    await using world = await World.create('transfer', { rateMbit: 20 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    const home = await world.lab.host('home');
    await world.lab.link(home, world.gateway, { v4: '10.84.0.0/30' });
    await home.forward();
    await home.route('default via 10.84.0.2');
    const clients = [await world.lab.host('one'), await world.lab.host('two')];
    for (const [i, client] of clients.entries()) {
      await world.lab.link(client, home, { v4: `10.85.${i}.0/30` });
      await client.route(`default via 10.85.${i}.2`);
    }
    await home.nft(
      'table ip home { chain out { type nat hook postrouting priority 100; oifname "to-gateway" masquerade; }; }',
    );
    await startServer(world.server);
    const keys = [world.key, makeKey('0badcafe')] as const;
    await world.startRouter(detour, { DETOUR_KEYS: keys.join(',') });
    const environment = { DETOUR_DETOURS: `detour1=${detour.v4}:45672` };
    const agents = await Promise.all(
      clients.map((client, i) => world.startAgent({ ...environment, DETOUR_KEY: keys[i] ?? '' }, client)),
    );
    for (const agent of agents) {
      const { detours } = await detoursAre(agent.status, 'up');
      expect(detours.map(({ observed }) => observed)).toEqual(['10.84.0.1']);
    }
    const transfers = clients.map((host) => startTransfer(host, { to: '10.81.0.2:5000', bytes: BYTES }));
    for (const agent of agents) {
      await connectionIs(agent.status, '10.81.0.2:5000', 'a path', (one) => Boolean(pathBy(one, 'detour1')));
    }
    const map = await detour.host.exec(['nft', 'list', 'map', 'inet', 'detour', 'leases4']);
    expect([...map.matchAll(/10\.84\.0\.1 \. (\d+)/g)].map(([, port]) => port).length).toBe(2);
    for (const id of ['k0a0b0c0d', 'k0badcafe']) expect(map).toContain(id);
    // One of them leaves; the other one's path does not care.
    await agents[0]?.program.stop('SIGKILL');
    for (const transfer of transfers) {
      const result = await transfer.result;
      expect(result.sha256).toBe(DIGEST);
      expect(result.paths.length).toBe(2);
      for (const path of result.paths) expect(path.bytes).toBeGreaterThan(BYTES / 10);
    }
  });

  it('leaves both machines as they were', async () => {
    await using world = await World.create('transfer', { rateMbit: 20 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    const hosts = [world.client, detour.host];
    const before = await Promise.all(hosts.map(hostState));
    await startServer(world.server);
    const router = await world.startRouter(detour, { DETOUR_ON_EXIT: 'cleanup' });
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    for (const to of ['10.81.0.2:5000', '[fd81::2]:5000']) {
      const result = await startTransfer(world.client, { to, bytes: BYTES / 4 }).result;
      expect(result.paths.length).toBe(2);
    }
    expect((await agent.program.stop()).code).toBe(0);
    expect((await router.stop('SIGTERM', 10_000)).code).toBe(0);
    expect(await Promise.all(hosts.map(hostState))).toEqual(before);
  });
});
