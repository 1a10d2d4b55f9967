import type Docker from 'dockerode';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, isInUse, type Status, World } from '../netns/world.ts';
import { asFound, ContainedDaemon, DOCUMENTED, IMAGE, Machine, type Role } from './machines.ts';

const SERVER = '10.81.0.2:5000';
const BYTES = 40_000_000;
const TUN = { PathOnHost: '/dev/net/tun', PathInContainer: '/dev/net/tun', CgroupPermissions: 'rwm' };

/** The flags of the documentation, with the device that wireguard-go needs; a kernel with WireGuard ignores it. */
const withTun = (role: Role): Docker.HostConfig => ({ ...DOCUMENTED[role], Devices: [TUN] });

describe.runIf(requireRoot('tests of tunnels between containers'))('tunnels between containers', () => {
  const scope = new AsyncDisposableStack();
  let world: World;
  let vps: Machine;
  let laptop: Machine;
  let before: { vps: string; laptop: string };
  let router: ContainedDaemon;

  const environment = (strategy: string): Record<string, string> => ({
    DETOUR_KEY: world.key,
    DETOUR_DETOURS: 'vps=10.82.1.2:45672',
    DETOUR_SYSCTL_ROOT: '/host/proc/sys',
    DETOUR_STRATEGY: strategy,
  });
  const tunnel = async (agent: ContainedDaemon) => (await agent.status<Status>()).tunnels?.[0];
  const isUp = (agent: ContainedDaemon) =>
    waitUntil(async () => (await tunnel(agent))?.state === 'up', {
      deadlineMs: 60_000,
      what: 'the tunnel to be up',
      everyMs: 100,
    });

  beforeAll(async () => {
    world = scope.use(await World.create('tunnelled', { rateMbit: 10 }));
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    vps = scope.use(await Machine.bring(detour.host, [IMAGE.router]));
    laptop = scope.use(await Machine.bring(world.client, [IMAGE.client]));
    await vps.host.sysctl('net.ipv6.conf.all.forwarding', 1);
    before = { vps: await asFound(vps.host), laptop: await asFound(laptop.host) };
    router = scope.use(
      await ContainedDaemon.start(
        vps,
        'router',
        { DETOUR_KEYS: world.key, DETOUR_ALLOW: '10.81.0.0/30,fd81::/64', DETOUR_VPN: 'wireguard' },
        withTun('router'),
      ),
    );
  });
  afterAll(() => scope.disposeAsync());

  it('carry a path with NET_ADMIN and a TUN device alone, also past Docker’s FORWARD DROP, and after a restart', async () => {
    await using agent = await ContainedDaemon.start(laptop, 'client', environment('vpn'), withTun('client'));
    await isUp(agent);
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    const carries = (bytes: number) =>
      connectionIs(
        () => agent.status<Status>(),
        SERVER,
        'the tunnel to carry',
        (one) => one.paths.some((path) => path.kind === 'vpn' && isInUse(path) && path.deliveredBytes > bytes),
        60_000,
      );
    await carries(500_000);
    await router.kill();
    await router.restart();
    // Where wireguard-go was in the container, it went with it: there is another key by now.
    await isUp(agent);
    await carries(300_000);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
    expect(await agent.stop()).toBe(0);
    expect(await asFound(laptop.host)).toBe(before.laptop);
  });

  it('are not had without the device where the kernel has no WireGuard; the message has the flag, and leases do', async () => {
    await using agent = await ContainedDaemon.start(laptop, 'client', environment('vpn,nat'));
    await waitUntil(async () => ['up', 'down'].includes((await tunnel(agent))?.state ?? ''), {
      deadlineMs: 30_000,
      what: 'a verdict on the tunnel',
      everyMs: 100,
    });
    const found = await tunnel(agent);
    if (found?.carrier !== 'kernel') {
      expect(found?.why).toMatch(/wireguard-go cannot run: .*--device \/dev\/net\/tun/);
      const doctor = await agent.cli('doctor');
      expect(doctor.stdout).toContain('--device /dev/net/tun');
    }
    const result = await startTransfer(world.client, { to: SERVER, bytes: 8_000_000 }).result;
    expect(result.sha256).toBe(expectedSha256('detour', 8_000_000));
    expect(result.paths.length).toBe(2);
    expect(await agent.stop()).toBe(0);
  });

  it('leave nothing of themselves on the detour after `detour cleanup`', async () => {
    expect(await router.stop()).toBe(0);
    await router[Symbol.asyncDispose]();
    const cleaned = await vps.engine.run({
      image: IMAGE.router,
      command: ['cleanup', 'router'],
      host: DOCUMENTED.router,
    });
    expect(cleaned.code, cleaned.stderr).toBe(0);
    expect(await asFound(vps.host)).toBe(before.vps);
  });
});
