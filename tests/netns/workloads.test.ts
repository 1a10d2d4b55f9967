import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { type FakeContainer, FakeDocker } from '../fakes/docker.ts';
import { call } from '../lab/caller.ts';
import { type Host, requireRoot } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { bridged } from '../lab/world.ts';
import { connectionIs, hostState, pathBy, type Status, World } from './world.ts';

const SERVER = '10.81.0.2:5000';
const BYTES = 4_000_000;
const LONG_BYTES = 30_000_000;
const RATE_MBIT = 20;
const PUT_BACK = { timeout: 30_000 };

type WorkloadStatus = Status & {
  readonly workloads: readonly { readonly name: string; readonly state: string; readonly why: string | null }[];
};

/** Real namespaces and a real kernel; the engine that tells of them is a fake one. */
describe.runIf(requireRoot('tests of serving other namespaces'))('an agent with the namespaces of containers', () => {
  const scope = new AsyncDisposableStack();
  let world: World;
  let engine: FakeDocker;
  let hosts: Host[];
  let agent: Awaited<ReturnType<World['startAgent']>>;
  const status = () => agent.status() as Promise<WorkloadStatus>;
  const environment = () => ({ DETOUR_PROVIDERS: 'docker', DOCKER_HOST: `unix://${engine.path}` });
  const host = (index: number): Host => {
    const found = hosts[index];
    if (!found) throw new Error(`no container ${index}`);
    return found;
  };
  const run = (index: number, labels?: Record<string, string>): FakeContainer =>
    engine.run({ name: host(index).name, sandbox: host(index).path, ...(labels && { labels }) });
  const are = (...shown: string[]) =>
    expect
      .poll(async () => (await status()).workloads.map(({ name, state }) => `${name} ${state}`).sort(), {
        timeout: 30_000,
      })
      .toEqual(shown);
  /** A transfer, by how many subflows it was carried. */
  const transfer = async (from: Host): Promise<number> => {
    const { sha256, paths } = await startTransfer(from, { to: SERVER, bytes: BYTES }).result;
    expect(sha256).toBe(expectedSha256('detour', BYTES));
    return paths.length;
  };

  beforeAll(async () => {
    world = scope.use(await World.create('workloads', { rateMbit: RATE_MBIT }));
    const folder = mkdtempSync(join(tmpdir(), 'detour-workloads-'));
    scope.defer(() => rmSync(folder, { recursive: true, force: true }));
    engine = scope.use(new FakeDocker(join(folder, 'docker.sock')));
    await engine.open();
    hosts = await bridged(world.lab, world.client, 4);
    await world.gateway.route('10.90.0.0/16 via 10.80.0.1');
    await startServer(world.server);
    await world.startRouters();
    agent = await world.startAgent(environment());
  });
  // Also after one that failed.
  afterEach(() => {
    for (const container of engine.containers.values()) if (container.state === 'running') engine.end(container);
  });
  afterAll(() => scope.disposeAsync());

  it('serves those that ask, and touches nobody else: not its own, not the one beside', async () => {
    const [one, other] = [host(0), host(1)];
    const before = { one: await hostState(one), other: await hostState(other), own: await hostState(world.client) };
    const container = run(0);
    run(1, {});
    await are('c0 served');
    expect(await one.sysctl('net.mptcp.path_manager')).toBe('userspace');
    expect(await transfer(one)).toBe(2);
    expect(await transfer(other)).toBe(1);
    expect(await transfer(world.client)).toBe(1);
    expect(await hostState(other)).toEqual(before.other);
    expect(await hostState(world.client)).toEqual(before.own);
    engine.end(container);
    await are();
    // The workload is gone at once; its namespace is put back after that.
    await expect.poll(() => hostState(one), PUT_BACK).toEqual(before.one);
  });

  it('does not lose a transfer when it is killed, and adopts it when it is back', async () => {
    const container = run(0);
    await are('c0 served');
    const one = startTransfer(host(0), { to: SERVER, bytes: LONG_BYTES, direction: 'down' });
    await connectionIs(status, SERVER, 'the path by the detour', (known) => pathBy(known, 'detour1') !== undefined);
    await agent.program.stop('SIGKILL');
    expect(await host(0).sysctl('net.mptcp.path_manager')).toBe('userspace');
    agent = await world.startAgent(environment());
    await connectionIs(
      status,
      SERVER,
      'both paths to be adopted',
      (known) =>
        pathBy(known, 'detour1') !== undefined && pathBy(known, null) !== undefined && known.paths.length === 2,
    );
    const { sha256, paths } = await one.result;
    expect(sha256).toBe(expectedSha256('detour', LONG_BYTES));
    // The same two subflows from the beginning to the end.
    expect(paths).toHaveLength(2);
    engine.end(container);
    await are();
    // What a predecessor found there, before it was killed, is what is put back.
    await expect.poll(() => host(0).sysctl('net.mptcp.path_manager'), PUT_BACK).toBe('kernel');
    await expect.poll(() => host(0).exec(['nft', 'list', 'ruleset']), PUT_BACK).toBe('');
  });

  it('cannot give paths to what was opened before it came, unless the namespace was made for it', async () => {
    await host(2).sysctl('net.mptcp.pm_type', 1);
    const early = [await call(host(0), '10.81.0.2'), await call(host(2), '10.81.0.2')];
    for (const one of early) {
      await one.speak();
      expect(one.connected).toBe(true);
    }
    const containers = [run(0), run(2)];
    await are('c0 served', 'c2 served');
    await connectionIs(
      status,
      SERVER,
      'the connection of a namespace made for it to get a path',
      (one) => one.local.startsWith('10.90.1.3:') && pathBy(one, 'detour1') !== undefined,
    );
    await connectionIs(
      status,
      SERVER,
      'the other one to be explained',
      (one) => one.local.startsWith('10.90.1.1:') && /path manager/.test(one.why ?? ''),
    );
    for (const container of containers) engine.end(container);
    await are();
    // It found the path manager selected, so it leaves it so.
    expect(await host(2).sysctl('net.mptcp.pm_type')).toBe('1');
    for (const one of early) await one.program.stop();
  });

  it('keeps no namespace alive once it has left it', async () => {
    const container = run(3);
    await are('c3 served');
    const links = () => world.client.exec(['ip', '-brief', 'link']);
    await world.lab.drop(host(3));
    expect(await links()).toContain('v3@');
    engine.end(container);
    await are();
    // The kernel takes namespaces apart in the background.
    await expect.poll(links, { timeout: 30_000 }).not.toContain('v3@');
    const failed = agent.program.lines.filter((line) =>
      /"event":"(workload-not-|dump-failed|provider-failing)/.test(line),
    );
    expect(failed).toEqual([]);
  });

  it('puts all of them back when it stops', async () => {
    run(0);
    run(1);
    await are('c0 served', 'c1 served');
    expect((await agent.program.stop()).code).toBe(0);
    for (const index of [0, 1]) {
      expect(await host(index).sysctl('net.mptcp.path_manager')).toBe('kernel');
      expect(await host(index).exec(['nft', 'list', 'ruleset'])).toBe('');
    }
  });
});
