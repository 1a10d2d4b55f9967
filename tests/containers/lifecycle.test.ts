import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Host, requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, type Progress, startServer, startTransfer, type Transfer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, makeKey, pathBy, type Status, World } from '../netns/world.ts';
import { asFound, ContainedDaemon, DOCUMENTED, IMAGE, Machine } from './machines.ts';

const SERVER = '10.81.0.2:5000';
const DETOUR = '10.82.1.2';
/** Slow enough that one transfer sees everything, made fast when it has. */
const SLOW_MBIT = 8;
const FAST_MBIT = 150;
const LONG_BYTES = 100_000_000;
const SHORT_BYTES = 4_000_000;
/**
 * Neither daemon is in the data path, so what is left is the kernel's own and this machine's: a path that really stopped
 * costs 1 s at least (kernel-facts, section 4: download, black-holed).
 */
const LONGEST_STALL_MS = 900;
const SPEAKER = fileURLToPath(new URL('../lab/speaker.ts', import.meta.url));

type RouterStatus = {
  readonly epoch: string;
  readonly leases: readonly {
    readonly key: string;
    readonly client: string;
    readonly port: number;
    readonly destination: string;
    readonly expiresInSeconds: number;
  }[];
};

/** Payload that came by the detour so far, as the receiving client counts it. */
function byDetour({ program }: Transfer): number {
  const line = program.lines.findLast((text) => text.includes('"event":"progress"'));
  if (line === undefined) return 0;
  const { paths }: Progress = JSON.parse(line);
  return paths.filter(({ remote }) => remote === DETOUR).reduce((sum, { bytes }) => sum + bytes, 0);
}

/** Waits until the detour has carried a good half second's worth more than now. */
async function carriesOn(transfer: Transfer, when: string): Promise<void> {
  const before = byDetour(transfer);
  await waitUntil(() => byDetour(transfer) > before + (SLOW_MBIT * 1e6) / 16, {
    deadlineMs: 10_000,
    what: `the detour's path to carry on ${when}`,
    everyMs: 50,
  });
}

describe.runIf(requireRoot('tests of containers that come and go'))('containers that come and go', () => {
  const scope = new AsyncDisposableStack();
  const otherKey = makeKey('0b0b0b0b');
  let world: World;
  let other: Host;
  let vps: Machine;
  let laptop: Machine;
  let before: { vps: string; laptop: string };
  let router: ContainedDaemon;
  let agent: ContainedDaemon;
  const agentStatus = () => agent.status<Status>();

  const startRouter = async (): Promise<void> => {
    router = scope.use(
      await ContainedDaemon.start(vps, 'router', {
        DETOUR_KEYS: `${world.key},${otherKey}`,
        DETOUR_ALLOW: '10.81.0.0/30,fd81::/64',
        DETOUR_ON_EXIT: 'keep',
      }),
    );
  };

  beforeAll(async () => {
    world = scope.use(await World.create('lifecycle', { rateMbit: SLOW_MBIT }));
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    other = await world.lab.host('other');
    await world.lab.link(other, world.gateway, { v4: '10.84.0.0/30', v6: 'fd84::/64' });
    await other.route('default via 10.84.0.2');
    await startServer(world.server);
    vps = scope.use(await Machine.bring(detour.host, [IMAGE.router]));
    laptop = scope.use(await Machine.bring(world.client, [IMAGE.client]));
    await vps.host.sysctl('net.ipv6.conf.all.forwarding', 1);
    before = { vps: await asFound(vps.host), laptop: await asFound(laptop.host) };
    await startRouter();
    agent = scope.use(
      await ContainedDaemon.start(laptop, 'client', {
        DETOUR_KEY: world.key,
        DETOUR_DETOURS: `vps=${DETOUR}:45672`,
        DETOUR_SYSCTL_ROOT: '/host/proc/sys',
      }),
    );
    await detoursAre(agentStatus, 'up');
  });
  afterAll(() => scope.disposeAsync());

  it('leave a transfer alone: router killed, router replaced, agent killed', async () => {
    const transfer = startTransfer(world.client, { to: SERVER, bytes: LONG_BYTES, direction: 'down' });
    transfer.result.catch(() => undefined);
    await connectionIs(agentStatus, SERVER, 'the path by the detour', (one) => pathBy(one, 'vps') !== undefined);
    await carriesOn(transfer, 'at first');
    const { epoch, leases } = await router.status<RouterStatus>();
    expect(leases).toMatchObject([{ key: '0a0b0c0d', client: '10.80.0.1', destination: SERVER }]);

    await router.kill();
    await carriesOn(transfer, 'without a router');
    await router.restart();
    expect(await router.status()).toMatchObject({ epoch, leases: [{ port: leases[0]?.port }] });
    await carriesOn(transfer, 'with the router that was started again');

    const old = router;
    expect(await old.stop()).toBe(0);
    await old[Symbol.asyncDispose]();
    await startRouter();
    expect(router.container.docker.id).not.toBe(old.container.docker.id);
    expect(await router.status()).toMatchObject({ epoch, leases: [{ port: leases[0]?.port }] });
    await carriesOn(transfer, 'with the new router');

    await agent.kill();
    await carriesOn(transfer, 'without an agent');
    await agent.restart();
    await connectionIs(
      agentStatus,
      SERVER,
      'the agent to adopt both paths',
      (one) => pathBy(one, 'vps') !== undefined && pathBy(one, null) !== undefined && one.paths.length === 2,
    );
    await detoursAre(agentStatus, 'up');
    const fresh = await startTransfer(world.client, { to: SERVER, bytes: SHORT_BYTES, direction: 'down' }).result;
    expect(fresh.sha256).toBe(expectedSha256('detour', SHORT_BYTES));
    expect(fresh.paths.filter(({ remote }) => remote === DETOUR)).toHaveLength(1);

    expect(transfer.program.running).toBe(true);
    const fast = { rateMbit: FAST_MBIT };
    await Promise.all([world.direct.shape(fast), world.detours[0]?.way.shape(fast)]);
    const result = await transfer.result;
    expect(result.sha256).toBe(expectedSha256('detour', LONG_BYTES));
    expect(result.mptcp).toBe(true);
    // The same two subflows from the beginning to the end: none was lost and replaced.
    expect(result.paths).toHaveLength(2);
    console.log(`longest stall over three restarts: ${result.longestStallMs.toFixed(0)} ms`);
    expect(result.longestStallMs).toBeLessThan(LONGEST_STALL_MS);
  });

  it('keep two clients of one router apart', async () => {
    const theirs = await world.startAgent({ DETOUR_KEY: otherKey, DETOUR_DETOURS: `vps=${DETOUR}:45672` }, other);
    await detoursAre(theirs.status, 'up');
    for (const host of [world.client, other]) {
      const result = await startTransfer(host, { to: SERVER, bytes: SHORT_BYTES }).result;
      expect(result.sha256).toBe(expectedSha256('detour', SHORT_BYTES));
      expect(result.paths).toHaveLength(2);
    }
    await theirs.program.stop();
    const leases = async () => (await router.status<RouterStatus>()).leases;
    const ours = async () => {
      const [lease] = (await leases()).filter(({ key }) => key === '0a0b0c0d');
      return lease && { client: lease.client, port: lease.port, destination: lease.destination };
    };
    const mine = await ours();
    expect(mine).toMatchObject({ client: '10.80.0.1', destination: SERVER });
    expect(await leases()).toContainEqual(
      expect.objectContaining({ key: '0b0b0b0b', client: '10.84.0.1', destination: SERVER }),
    );

    const speak = async (host: Host, ...commands: string[]) => {
      const said = await host.exec([process.execPath, SPEAKER, `${DETOUR}:45672`, otherKey, 'hello', ...commands]);
      return said
        .trim()
        .split('\n')
        .map((line): { result: string; port: number } | null => JSON.parse(line));
    };
    // With the other key, from the other host: what it releases is its own.
    expect(await speak(other, `release=${SERVER}`)).toMatchObject([{ result: 'OK' }, { result: 'OK' }]);
    expect(await ours()).toEqual(mine);
    expect((await leases()).filter(({ key }) => key === '0b0b0b0b')).toEqual([]);
    // With the other key, from the same address, as behind one carrier's NAT: not even then, and no way to take the port over.
    const [, released, granted] = await speak(world.client, `release=${SERVER}`, `lease=${SERVER},${mine?.port}`);
    expect(released).toMatchObject({ result: 'OK' });
    expect(granted).toMatchObject({ result: 'OK' });
    expect(granted?.port).not.toBe(mine?.port);
    expect(await ours()).toEqual(mine);

    // In the kernel: the other client's SYN to that port finds no lease.
    const refused = async () => {
      const { body } = await router.get('/metrics');
      return Number(/^detour_router_kernel_packets_total\{cause="syn_without_lease"\} (\d+)$/m.exec(body)?.[1]);
    };
    const refusedBefore = await refused();
    const attempt = await other.try(['timeout', '1', 'bash', '-c', `exec 3<>/dev/tcp/${DETOUR}/${mine?.port}`]);
    expect(attempt.code).not.toBe(0);
    expect(await refused()).toBeGreaterThan(refusedBefore);
  });

  it('leave both hosts as found', async () => {
    expect(await agent.stop(), await agent.container.logs()).toBe(0);
    expect(await asFound(laptop.host)).toBe(before.laptop);

    expect(await router.stop(), await router.container.logs()).toBe(0);
    // It was told to keep what runs; the command takes that away too.
    expect(await asFound(vps.host)).toContain('table inet detour');
    const cleanup = await vps.engine.run({
      image: IMAGE.router,
      command: ['cleanup', 'router'],
      host: DOCUMENTED.router,
    });
    expect(cleanup, cleanup.stderr).toMatchObject({ code: 0 });
    expect(await asFound(vps.host)).toBe(before.vps);
  });
});
