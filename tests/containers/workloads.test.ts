import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { startServer } from '../lab/traffic.ts';
import { connectionIs, isInUse, pathBy, type Status, World } from '../netns/world.ts';
import { Application, type ApplicationSpec } from './application.ts';
import type { Container } from './engine.ts';
import { asFound, ContainedDaemon, IMAGE, Machine, SERVING } from './machines.ts';

const SERVER = '10.81.0.2:5000';
const RATE_MBIT = 20;
const SHORT = 4_000_000;
const LONG = 40_000_000;
const LABELLED = { 'detour.enable': 'true' };

type WorkloadStatus = Status & {
  readonly workloads: readonly { readonly name: string; readonly state: string; readonly why: string | null }[];
  readonly connections: readonly (Status['connections'][number] & { readonly workload: string | null })[];
};

describe.runIf(requireRoot('tests of serving containers'))('an agent that serves containers', () => {
  const scope = new AsyncDisposableStack();
  let world: World;
  let laptop: Machine;
  let agent: ContainedDaemon;
  let before: string;
  /** Of the test that runs. */
  let running = new AsyncDisposableStack();

  const status = () => agent.status<WorkloadStatus>();
  const environment = () => ({
    DETOUR_KEY: world.key,
    DETOUR_DETOURS: 'vps=10.82.1.2:45672',
    DETOUR_SYSCTL_ROOT: '/host/proc/sys',
    DETOUR_PROVIDERS: 'docker',
  });
  const startAgent = async (): Promise<void> => {
    agent = scope.use(await ContainedDaemon.start(laptop, 'client', environment(), SERVING.sandboxes));
  };
  const start = async (spec: Pick<ApplicationSpec, 'name'> & Partial<ApplicationSpec>): Promise<Application> =>
    running.use(await Application.start(laptop, { to: SERVER, bytes: SHORT, ...spec }));
  const isServed = (name: string) =>
    waitUntil(async () => (await status()).workloads.some((one) => one.name === name && one.state === 'served'), {
      deadlineMs: 20_000,
      what: `${name} to be served`,
    });
  const isGone = (name: string) =>
    waitUntil(async () => (await status()).workloads.every((one) => one.name !== name), {
      deadlineMs: 20_000,
      what: `${name} to be let go`,
    });
  const hasDetour = (name: string) =>
    connectionIs(
      status,
      SERVER,
      `${name} to have a path by the detour`,
      // The helper knows connections of one namespace alone.
      (one) => (one as WorkloadStatus['connections'][number]).workload === name && pathBy(one, 'vps') !== undefined,
    );
  /** What we could have changed in a container's namespace. */
  const namespaceOf = async (container: Container): Promise<string> =>
    (await container.enter('sysctl', 'net.mptcp')) + (await container.enter('nft', 'list', 'ruleset'));

  beforeAll(async () => {
    world = scope.use(await World.create('serving', { rateMbit: RATE_MBIT }));
    await startServer(world.server);
    await world.startRouters();
    laptop = scope.use(await Machine.bring(world.client, [IMAGE.client]));
    await laptop.bridged();
    before = await asFound(laptop.host);
    await startAgent();
  });
  afterEach(async () => {
    await running.disposeAsync();
    running = new AsyncDisposableStack();
  });
  afterAll(async () => {
    await running.disposeAsync();
    await scope.disposeAsync();
  });

  it('gives a labelled container paths, and does not touch the one beside it', async () => {
    const labelled = await start({ name: 'labelled', labels: LABELLED });
    const plain = await start({ name: 'plain' });
    const untouched = await namespaceOf(plain.container);
    await isServed('labelled');
    expect(await labelled.container.enter('sysctl', '-n', 'net.mptcp.path_manager')).toBe('userspace\n');
    await Promise.all([labelled.go(), plain.go()]);
    await hasDetour('labelled');
    expect(await namespaceOf(plain.container)).toBe(untouched);
    expect((await labelled.result()).paths.map(({ remote }) => remote).sort()).toHaveLength(2);
    const alone = await plain.result();
    expect(alone.mptcp).toBe(true);
    expect(alone.paths).toHaveLength(1);
    // Nothing of it on the host's own network either.
    expect(await laptop.host.sysctl('net.mptcp.path_manager')).toBe('kernel');
    await isGone('labelled');
  });

  it('gives the first connection of a container paths that was made for it', async () => {
    const app = await start({
      name: 'early',
      labels: LABELLED,
      atOnce: true,
      bytes: LONG,
      host: { Sysctls: { 'net.mptcp.pm_type': '1' } },
    });
    await app.connected();
    await hasDetour('early');
    expect((await app.result()).paths).toHaveLength(2);
  });

  it('follows a container that is stopped, killed and started again in the middle of a transfer', async () => {
    const app = await start({ name: 'restless', labels: LABELLED, bytes: LONG });
    for (const end of ['stop', 'kill'] as const) {
      await isServed('restless');
      await app.go();
      await hasDetour('restless');
      if (end === 'stop') await app.container.docker.stop({ t: 0 });
      else await app.container.docker.kill();
      await isGone('restless');
      await app.container.docker.start();
    }
    await isServed('restless');
    await app.go();
    await hasDetour('restless');
    // `docker restart` is an end and a start in one.
    await app.container.docker.restart({ t: 0 });
    await waitUntil(async () => (await status()).connections.length === 0, {
      deadlineMs: 20_000,
      what: 'the old connection to be forgotten',
    });
    await isServed('restless');
    await app.go();
    expect((await app.result()).paths.length).toBe(2);
  });

  it('loses no transfer when it is killed, and adopts it when it is back', async () => {
    const app = await start({ name: 'steady', labels: LABELLED, bytes: LONG });
    await isServed('steady');
    await app.go();
    await hasDetour('steady');
    await agent.kill();
    await agent.restart();
    await connectionIs(status, SERVER, 'both paths to be adopted', ({ paths }) => paths.filter(isInUse).length === 2);
    // The same two subflows from the beginning to the end.
    expect((await app.result()).paths).toHaveLength(2);
  });

  it('leaves every namespace as it was when it is stopped', async () => {
    const apps = [await start({ name: 'one', labels: LABELLED }), await start({ name: 'two', labels: LABELLED })];
    await agent.stop();
    const found = [];
    for (const { container } of apps) found.push(await namespaceOf(container));
    await agent.restart();
    for (const name of ['one', 'two']) await isServed(name);
    expect(await agent.stop(), await agent.container.logs()).toBe(0);
    for (const [index, { container }] of apps.entries()) expect(await namespaceOf(container)).toBe(found[index]);
    expect(found[0]).toContain('net.mptcp.path_manager = kernel');
    await agent.restart();
  });

  it('serves containers that share a network once, as the first of them wishes', async () => {
    const first = await start({ name: 'first', labels: { ...LABELLED, 'detour.targets': '203.0.113.0/24' } });
    await isServed('first');
    const second = await start({ name: 'second', labels: LABELLED, host: { NetworkMode: 'container:first' } });
    await isServed('second');
    expect((await status()).workloads.find(({ name }) => name === 'second')?.why).toBe(
      'it shares its network with first, whose settings count',
    );
    // In the network of a labelled one everybody is served: it is one network.
    const third = await start({ name: 'third', host: { NetworkMode: 'container:first' } });
    await third.go();
    expect((await third.result()).paths).toHaveLength(1);
    await first.container.docker.kill();
    await isGone('first');
    // The engine takes the network's card away with the first one; the namespace is there for as long as somebody is in it.
    expect((await status()).workloads).toMatchObject([{ name: 'second', state: 'served', why: null }]);
    await second.container.docker.kill();
    await isGone('second');
  });

  it('is not troubled by containers that live 50 ms', async () => {
    const said = async () =>
      (await agent.container.logs()).split('\n').filter((line) => /"level":"(warn|error)"/.test(line));
    const known = (await said()).length;
    for (let round = 0; round < 10; round++) {
      await using _short = await laptop.launch({
        Image: IMAGE.client,
        Labels: LABELLED,
        Entrypoint: ['sleep', '0.05'],
        Cmd: [],
      });
    }
    const app = await start({ name: 'after', labels: LABELLED });
    await isServed('after');
    await waitUntil(async () => (await status()).workloads.length === 1, {
      deadlineMs: 20_000,
      what: 'the short ones to be gone',
    });
    await app.go();
    await app.result();
    expect((await said()).slice(known).filter((line) => !/"detour-down"/.test(line))).toEqual([]);
    expect((await agent.get('/readyz')).code).toBe(200);
  });

  it('names labels with nonsense, and serves what is right of them', async () => {
    await start({ name: 'odd', labels: { ...LABELLED, 'detour.strategy': 'teleport', 'detour.colour': 'red' } });
    await start({ name: 'maybe', labels: { 'detour.enable': 'perhaps' } });
    await isServed('odd');
    await waitUntil(async () => (await agent.container.logs()).includes('"workload":"maybe"'), {
      deadlineMs: 10_000,
      what: 'the complaint',
    });
    const complaints = (await agent.container.logs()).split('\n').filter((line) => line.includes('"workload-label"'));
    expect(complaints.map((line) => JSON.parse(line).complaint)).toEqual([
      expect.stringMatching(/^detour\.strategy="teleport": has a kind that is not known/),
      expect.stringMatching(/^"detour\.colour": is not known; there are detour\.enable, /),
      'detour.enable="perhaps": must be "true" or "false"',
    ]);
    expect((await status()).workloads.map(({ name }) => name)).toEqual(['odd']);
  });

  it('serves no host for one container’s sake', async () => {
    await start({ name: 'hosted', labels: LABELLED, host: { NetworkMode: 'host' } });
    await waitUntil(async () => (await agent.container.logs()).includes("it uses the host's network"), {
      deadlineMs: 10_000,
      what: 'the complaint',
    });
    expect((await status()).workloads).toEqual([]);
    expect(await laptop.host.sysctl('net.mptcp.path_manager')).toBe('kernel');
  });

  it('leaves the host as it was found', async () => {
    expect(await agent.stop(), await agent.container.logs()).toBe(0);
    await agent[Symbol.asyncDispose]();
    expect(await asFound(laptop.host)).toBe(before);
  });
});
