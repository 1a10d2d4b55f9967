import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type Docker from 'dockerode';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { openNamespace } from '../../appliance/kernel/namespaces.ts';
import { FakeKubernetes } from '../fakes/kubernetes.ts';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { World } from '../netns/world.ts';
import { type Container, LEAST_PRIVILEGE } from './engine.ts';
import { asFound, ContainedDaemon, DOCUMENTED, IMAGE, Machine, SERVING } from './machines.ts';

/** The table of docs/workloads.md: what each way to run the agent takes is enough, and with any of it missing it says so. */

const NODE = 'node-1';
const ACCOUNT = '/var/run/secrets/kubernetes.io/serviceaccount';

type Status = {
  readonly providers?: readonly { readonly state: string; readonly why: string | null }[];
  readonly workloads?: readonly { readonly name: string; readonly state: string; readonly why: string | null }[];
};

/** How a mode is run. */
type Mode = { readonly host: Docker.HostConfig; readonly env: Readonly<Record<string, string>> };
/** A mode with something taken away, and where it says so: at its end with an exit code, or in its status. */
type Less = readonly [
  what: string,
  change: (mode: Mode) => Mode,
  where: 69 | 78 | 'workload' | 'provider',
  says: RegExp,
];

const without =
  (capability: string) =>
  ({ host, env }: Mode): Mode => ({
    host: { ...host, CapAdd: ((host.CapAdd as string[] | undefined) ?? []).filter((one) => one !== capability) },
    env,
  });
/** Takes a mount away, or puts another in its place. */
const mounting =
  (start: string, instead?: string) =>
  ({ host, env }: Mode): Mode => ({
    host: {
      ...host,
      Binds: (host.Binds ?? []).flatMap((one) => (one.startsWith(start) ? (instead ? [instead] : []) : [one])),
    },
    env,
  });
const unset =
  (name: string) =>
  ({ host, env }: Mode): Mode => ({
    host,
    env: Object.fromEntries(Object.entries(env).filter(([key]) => key !== name)),
  });
const ownPids = ({ host: { PidMode: _, ...host }, env }: Mode): Mode => ({ host, env });

describe.runIf(requireRoot('tests of what the agent may do'))('privileges', () => {
  const scope = new AsyncDisposableStack();
  let world: World;
  let machine: Machine;
  let before: string;
  let account: string;
  let api: FakeKubernetes;
  let running = new AsyncDisposableStack();

  const common = () => ({ DETOUR_KEY: world.key, DETOUR_DETOURS: 'vps=10.82.1.2:45672' });
  const serving = (provider: string) => ({
    ...common(),
    DETOUR_SYSCTL_ROOT: '/host/proc/sys',
    DETOUR_PROVIDERS: provider,
  });
  const MODES = {
    'docker, by the files of sandboxes': (): Mode => ({ host: SERVING.sandboxes, env: serving('docker') }),
    'docker, by the processes of the host': (): Mode => ({ host: SERVING.processes, env: serving('docker') }),
    kubernetes: (): Mode => ({
      host: { ...SERVING.processes, Binds: [SERVING.processes.Binds[0] ?? '', `${account}:${ACCOUNT}:ro`] },
      env: {
        ...serving('kubernetes'),
        NODE_NAME: NODE,
        KUBERNETES_SERVICE_HOST: '127.0.0.1',
        KUBERNETES_SERVICE_PORT: new URL(api.url).port,
      },
    }),
  } as const;

  /** Two applications that ask to be served: one with what Docker gives everybody, one that is not root. */
  async function applications(): Promise<Container[]> {
    const made: Container[] = [];
    for (const [name, user] of [
      ['app', '0'],
      ['user', '1000'],
    ] as const) {
      const container = running.use(
        await machine.launch({
          name,
          Image: IMAGE.client,
          User: user,
          Labels: { 'detour.enable': 'true' },
          Entrypoint: ['sleep', 'infinity'],
          Cmd: [],
        }),
      );
      made.push(container);
      api.set({
        metadata: {
          uid: container.docker.id.slice(0, 36),
          name,
          namespace: 'shop',
          annotations: { 'detour.dev/enable': 'true' },
        },
        spec: { nodeName: NODE },
        status: {
          phase: 'Running',
          containerStatuses: [{ containerID: `docker://${container.docker.id}`, state: { running: {} } }],
        },
      });
    }
    return made;
  }

  const pathManagers = (all: readonly Container[]) =>
    Promise.all(all.map((one) => one.enter('sysctl', '-n', 'net.mptcp.path_manager')));

  /** Runs the agent until it says what it has to say: at its end, or in its status. */
  async function say({ host, env }: Mode, where: Less[2]): Promise<string> {
    if (typeof where === 'number') {
      const { code, stdout, stderr } = await machine.engine.run({ image: IMAGE.client, env, host });
      expect(code, stdout + stderr).toBe(where);
      return stdout + stderr;
    }
    const container = running.use(await machine.engine.start({ image: IMAGE.client, env, host }));
    const agent = new ContainedDaemon(machine, 'client', container);
    // Started after it, which is when it matters how mounts reach it.
    if (where === 'workload') await waitUntil(() => agent.status(), { deadlineMs: 20_000, what: 'the agent' });
    await applications();
    return waitUntil(
      async () => {
        const { providers = [], workloads = [] } = await agent.status<Status>();
        if (where === 'provider') return providers.find(({ state }) => state === 'failing')?.why;
        expect(workloads.filter(({ state }) => state === 'served')).toEqual([]);
        return workloads.find(({ state }) => state === 'failed')?.why;
      },
      { deadlineMs: 20_000, what: `the agent to say what is wrong`, everyMs: 100 },
    ).catch(async (error: unknown) => {
      throw new Error(`${error}\n${await container.logs()}`);
    });
  }

  beforeAll(async () => {
    world = scope.use(await World.create('privileges'));
    await world.startRouters();
    machine = scope.use(await Machine.bring(world.client, [IMAGE.client]));
    api = scope.use(await FakeKubernetes.make());
    const there = await openNamespace(world.client.path);
    await api.open(there);
    there.close();
    account = mkdtempSync(join(tmpdir(), 'detour-account-'));
    scope.defer(() => rmSync(account, { recursive: true, force: true }));
    writeFileSync(join(account, 'token'), api.token);
    writeFileSync(join(account, 'ca.crt'), api.certificate);
    await machine.bridged();
    before = await asFound(machine.host);
  });
  afterEach(async () => {
    await running.disposeAsync();
    running = new AsyncDisposableStack();
    for (const uid of api.pods.keys()) api.delete(uid);
    // Whatever was missing, nothing happened to the host.
    expect(await asFound(machine.host)).toBe(before);
  });
  afterAll(async () => {
    await running.disposeAsync();
    await scope.disposeAsync();
  });

  describe.each(Object.entries(MODES))('%s', (_, mode) => {
    it('what it takes is enough', async () => {
      const apps = await applications();
      const { env, host } = mode();
      const agent = running.use(await ContainedDaemon.start(machine, 'client', env, host));
      await waitUntil(
        async () => {
          const { workloads = [] } = await agent.status<Status>();
          return workloads.length === 2 && workloads.every(({ state, why }) => state === 'served' && why === null);
        },
        { deadlineMs: 20_000, what: 'both to be served' },
      );
      expect(await pathManagers(apps)).toEqual(['userspace\n', 'userspace\n']);
      const { checks } = JSON.parse((await agent.cli('doctor', 'client', '--json')).stdout);
      expect(checks.filter(({ state }: { state: string }) => state !== 'ok')).toEqual([]);
      expect(await agent.stop(), await agent.container.logs()).toBe(0);
      expect(await pathManagers(apps)).toEqual(['kernel\n', 'kernel\n']);
    });
  });

  const LOST =
    /there is no \/host\/proc\/sys\/net\/mptcp\/enabled, but this kernel has it: mount \/proc\/sys\/net at \/host\/proc\/sys\/net/;
  const MOUNT = /-v \/proc\/sys\/net:\/host\/proc\/sys\/net -e DETOUR_SYSCTL_ROOT=\/host\/proc\/sys/;
  const SANDBOXES = /-v \/var\/run\/docker\/netns:\/var\/run\/docker\/netns:ro,rslave/;
  const LESS: Readonly<Record<keyof typeof MODES, readonly Less[]>> = {
    'docker, by the files of sandboxes': [
      ['NET_ADMIN', without('NET_ADMIN'), 69, /docker( run)?: --cap-add NET_ADMIN/],
      ['SYS_ADMIN', without('SYS_ADMIN'), 69, /it needs CAP_SYS_ADMIN. docker: --cap-add SYS_ADMIN/],
      ['the mount of parameters', mounting('/proc/sys/net'), 'workload', LOST],
      [
        'the mount of parameters, and without naming it',
        (mode) => unset('DETOUR_SYSCTL_ROOT')(mounting('/proc/sys/net')(mode)),
        'workload',
        MOUNT,
      ],
      [
        'more than a folder of them',
        mounting('/proc/sys/net', '/proc/sys/net/mptcp:/host/proc/sys/net/mptcp'),
        78,
        /mptcp is mounted by itself, which shows one namespace in all of them. docker: -v \/proc\/sys\/net:\/host\/proc\/sys\/net;/,
      ],
      ['the socket of the engine', mounting('/var/run/docker.sock'), 'provider', /-v \/var\/run\/docker\.sock:/],
      ['the files of sandboxes', mounting('/var/run/docker/netns'), 'workload', SANDBOXES],
      [
        'rslave',
        mounting('/var/run/docker/netns', '/var/run/docker/netns:/var/run/docker/netns:ro'),
        'workload',
        SANDBOXES,
      ],
    ],
    'docker, by the processes of the host': [
      ['NET_ADMIN', without('NET_ADMIN'), 69, /docker( run)?: --cap-add NET_ADMIN/],
      ['SYS_ADMIN', without('SYS_ADMIN'), 69, /it needs CAP_SYS_ADMIN/],
      ['SYS_PTRACE', without('SYS_PTRACE'), 'workload', /it needs CAP_SYS_PTRACE besides CAP_SYS_ADMIN/],
      ['the host’s pid namespace', ownPids, 'workload', SANDBOXES],
      ['the mount of parameters', mounting('/proc/sys/net'), 'workload', LOST],
      ['the socket of the engine', mounting('/var/run/docker.sock'), 'provider', /-v \/var\/run\/docker\.sock:/],
    ],
    kubernetes: [
      ['NET_ADMIN', without('NET_ADMIN'), 69, /kubernetes: securityContext.capabilities.add: \["NET_ADMIN"\]/],
      ['SYS_ADMIN', without('SYS_ADMIN'), 69, /Kubernetes: use the overlay k8s\/overlays\/pods/],
      ['SYS_PTRACE', without('SYS_PTRACE'), 'provider', /the agent needs CAP_SYS_PTRACE besides CAP_SYS_ADMIN/],
      ['the host’s pid namespace', ownPids, 69, /in the pod: hostPID: true/],
      ['the mount of parameters', mounting('/proc/sys/net'), 'workload', LOST],
      [
        'the mount of parameters, and without naming it',
        (mode) => unset('DETOUR_SYSCTL_ROOT')(mounting('/proc/sys/net')(mode)),
        'workload',
        /a hostPath volume of \/proc\/sys\/net/,
      ],
      ['the service account', (mode) => mounting(account)(mode), 'provider', /automountServiceAccountToken: true/],
      ['the name of its node', unset('NODE_NAME'), 78, /fieldRef: \{fieldPath: spec\.nodeName\}/],
      ['a cluster', unset('KUBERNETES_SERVICE_HOST'), 78, /this is no pod/],
    ],
  };
  for (const [name, cases] of Object.entries(LESS)) {
    describe(`${name}, without`, () => {
      it.each(cases)('%s', async (_what, change, where, says) => {
        expect(await say(change(MODES[name as keyof typeof MODES]()), where)).toMatch(says);
      });
    });
  }

  /** The network of one application, which the agent shares. */
  const beside = (name: string): Docker.HostConfig => ({
    ...LEAST_PRIVILEGE,
    NetworkMode: `container:${name}`,
    Binds: [SERVING.sandboxes.Binds[0]],
  });
  const alone = () => ({ ...common(), DETOUR_SYSCTL_ROOT: '/host/proc/sys' });

  describe('a sidecar', () => {
    it('has enough with NET_ADMIN and the mount of parameters', async () => {
      const [app, other] = await applications();
      if (!app || !other) throw new Error('no applications');
      const agent = running.use(await machine.engine.start({ image: IMAGE.client, env: alone(), host: beside('app') }));
      await waitUntil(async () => (await agent.exec('detour', 'healthcheck', '--ready')).code === 0, {
        deadlineMs: 20_000,
        what: 'the sidecar to be ready',
        everyMs: 200,
      });
      expect(await pathManagers([app, other])).toEqual(['userspace\n', 'kernel\n']);
      expect((await agent.stop(10)).code).toBe(0);
      expect(await pathManagers([app, other])).toEqual(['kernel\n', 'kernel\n']);
    });

    it.each<Less>([
      ['NET_ADMIN', without('NET_ADMIN'), 69, /docker( run)?: --cap-add NET_ADMIN/],
      ['the mount of parameters', mounting('/proc/sys/net'), 69, LOST],
      [
        'the mount of parameters, and without naming it',
        (mode) => unset('DETOUR_SYSCTL_ROOT')(mounting('/proc/sys/net')(mode)),
        69,
        MOUNT,
      ],
    ])('says that it lacks %s', async (_what, change, where, says) => {
      await applications();
      expect(await say(change({ host: beside('app'), env: alone() }), where)).toMatch(says);
    });
  });

  describe('the loader as a step of its own', () => {
    /** The agent, which may write no parameter. */
    const readOnly = (network: string): Docker.HostConfig => ({ ...LEAST_PRIVILEGE, NetworkMode: network });

    it.each([
      ['host', DOCUMENTED.client, (machine: Machine) => machine.host.sysctl('net.mptcp.path_manager')],
      ['container:app', beside('app'), null],
    ] as const)('leaves nothing to write to the agent of network %s', async (network, step, read) => {
      const [app] = await applications();
      if (!app) throw new Error('no application');
      const selected = async () => (read ? await read(machine) : (await pathManagers([app])).join('').trim());
      const run = (command: string) =>
        machine.engine.run({
          image: IMAGE.client,
          command: [command],
          host: step,
          env: { DETOUR_SYSCTL_ROOT: '/host/proc/sys' },
        });
      expect(await selected()).toBe('kernel');
      const refused = await machine.engine.run({ image: IMAGE.client, env: common(), host: readOnly(network) });
      expect(refused.code).toBe(69);
      expect(refused.stdout + refused.stderr).toMatch(
        /cannot set net\.mptcp\.path_manager=userspace: EROFS\. .* run `load` before, once/,
      );
      expect(await selected()).toBe('kernel');

      expect(await run('load')).toMatchObject({ code: 0 });
      expect(await selected()).toBe('userspace');
      const agent = running.use(
        await machine.engine.start({ image: IMAGE.client, env: common(), host: readOnly(network) }),
      );
      await waitUntil(async () => (await agent.exec('detour', 'healthcheck', '--ready')).code === 0, {
        deadlineMs: 20_000,
        what: 'the agent to be ready',
        everyMs: 200,
      });
      expect((await agent.stop(10)).code, await agent.logs()).toBe(0);
      // Who selected it puts it back.
      expect(await selected()).toBe('userspace');
      expect(await run('unload')).toMatchObject({ code: 0 });
      expect(await selected()).toBe('kernel');
    });
  });
});
