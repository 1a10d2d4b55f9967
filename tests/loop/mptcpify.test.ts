import { describe, expect, it } from 'vitest';
import { type Daemon, type Place, startDaemon } from '../../appliance/client/daemon.ts';
import { watchDocker } from '../../appliance/client/docker.ts';
import { watchKubernetes } from '../../appliance/client/kubernetes.ts';
import { fillByLoad } from '../../appliance/client/mptcpify.ts';
import type { Workload } from '../../appliance/client/workloads.ts';
import { BpfError } from '../../appliance/kernel/bpf.ts';
import { systemFiles } from '../../appliance/kernel/files.ts';
import { systemLookup } from '../../appliance/kernel/lookup.ts';
import type { Switches } from '../../appliance/kernel/mptcpify.ts';
import type { Pod, PodEvent } from '../../appliance/kernel/pods.ts';
import { systemSchedule } from '../../appliance/kernel/schedule.ts';
import { systemWeb } from '../../appliance/kernel/web.ts';
import type { Log } from '../../appliance/log.ts';
import type { ClientSettings } from '../../appliance/settings.ts';
import type { Json } from '../../appliance/status/daemon.ts';
import { FakeClock, settle } from '../fakes/clock.ts';
import { FakeGroups, FakeSwitches } from '../fakes/mptcpify.ts';
import { switchCases } from '../lab/switch-cases.ts';

/** The daemon with the server's side alone: no agents and no detours, so that only whose sockets are chosen is left. */

describe('the fake maps', () => {
  switchCases((task) => task(new FakeSwitches()));
});

const OWN_NET = 4026531840;
const ROOT = 1n;
const [YES, NO, BY_LOAD] = [1, 0, 3];

function workload(name: string, mptcp: boolean | null, groups: readonly string[] = [name]): Workload {
  return { key: name, name, paths: [`/run/${name}`], groups, wishes: { targets: null, strategy: null, mptcp } };
}

class World {
  readonly clock = new FakeClock();
  readonly groups = new FakeGroups();
  readonly lines: { level: string; event: string; fields: Record<string, unknown>; message: string }[] = [];
  /** Inode by the file that leads there; entering another one fails. */
  readonly nets = new Map([['own', OWN_NET]]);
  /** Namespaces with net.mptcp.enabled=0. */
  readonly off = new Set<number>();
  #daemon: Daemon | null = null;
  #announce: (workloads: readonly Workload[]) => void = () => undefined;

  async start(
    settings: Partial<Pick<ClientSettings, 'mptcpify' | 'providers'>>,
    openSwitches: () => Switches,
    isPinned = false,
  ): Promise<void> {
    const write =
      (level: string): Log['info'] =>
      (event, fields, message) =>
        void this.lines.push({ level, event, fields, message });
    const log = { debug: write('debug'), info: write('info'), warn: write('warn'), error: write('error') };
    this.#daemon = await startDaemon(
      {
        http: null,
        socket: '',
        fwmark: { mark: 0xd7000000, mask: 0xff000000 },
        logLevel: 'info',
        logFormat: 'json',
        sides: ['server'],
        key: null,
        detours: [],
        targets: [],
        exclude: [],
        maxPaths: 2,
        strategy: { kinds: ['nat'], ordered: false },
        interfaces: null,
        mode: 'aggregate',
        minAgeMs: null,
        rescue: false,
        providers: ['host', 'docker'],
        mptcpify: 'labelled',
        announcing: null,
        sysctlRoot: '/proc/sys',
        ...settings,
      },
      {
        clock: this.clock,
        log,
        lookup: systemLookup(),
        files: systemFiles(),
        web: systemWeb(),
        schedule: systemSchedule,
        ownId: 'own',
        openPlace: async (path) => this.#place(path?.replace('/run/', '') ?? 'own'),
        providers: [
          (onChange) => {
            this.#announce = onChange;
            return {
              status: () => ({ provider: 'docker', state: 'ok', workloads: 0, why: null }),
              stop: () => undefined,
            };
          },
        ],
        inband: {
          isLoaded: () => false,
          open: () => {
            throw new Error('no BPF here');
          },
        },
        openAnnouncing: () => {
          throw new Error('nothing is announced');
        },
        mptcpify: { groups: this.groups, openSwitches, isPinned: () => isPinned },
        version: 'test',
      },
    );
  }

  #place(name: string): Place {
    const inode = this.nets.get(name);
    if (inode === undefined) throw new Error(`no namespace ${name}`);
    return {
      id: name,
      net: { inode, mptcpEnabled: async () => !this.off.has(inode) },
      get ports(): never {
        throw new Error("the server's side has no agent");
      },
      load: async () => undefined,
      unload: async () => undefined,
      close: () => undefined,
    };
  }

  /** A container runs, with a network of its own and its control group where Docker puts it. */
  container(name: string, net: number, group: bigint): void {
    this.nets.set(name, net);
    this.groups.paths.set(`system.slice/docker-${name}.scope`, group);
  }

  async workloads(...all: readonly Workload[]): Promise<void> {
    this.#announce(all);
    await this.clock.advance(1_000);
  }

  /** Of one kind of event: what was logged about it. */
  logged(event: string): string[] {
    return this.lines.filter((line) => line.event === event).map(({ level }) => level);
  }

  async status(): Promise<{ [key: string]: Json }> {
    return JSON.parse(JSON.stringify(await this.#daemon?.view.status()));
  }

  get ready(): boolean | undefined {
    return this.#daemon?.view.readiness().ready;
  }

  async metric(name: string): Promise<number | undefined> {
    const metric = await this.#daemon?.view.metrics.getSingleMetric(name)?.get();
    return metric?.values[0]?.value;
  }

  async stop(): Promise<void> {
    await this.#daemon?.stop();
    await settle();
  }
}

describe('DETOUR_MPTCPIFY=labelled', () => {
  it('chooses the containers that ask for it, for as long as they run', async () => {
    const world = new World();
    const switches = new FakeSwitches();
    world.container('aa', 11, 101n);
    world.container('bb', 12, 102n);
    await world.start({ mptcpify: 'labelled' }, () => switches);
    await world.workloads(workload('aa', true), workload('bb', null));
    expect(switches.groups.values).toEqual(new Map([[101n, YES]]));
    expect([...switches.nets.values.keys()].sort()).toEqual([11, 12, OWN_NET]);
    switches.sockets = 5;
    const { mptcpify, workloads } = await world.status();
    expect(mptcpify).toEqual({ mode: 'labelled', state: 'on', by: 'agent', sockets: 5, why: null });
    expect(workloads).toMatchObject([
      { name: 'aa', state: 'served', mptcp: true },
      { name: 'bb', state: 'served', mptcp: false },
    ]);
    expect(await world.metric('detour_client_mptcpify_on')).toBe(1);
    expect(await world.metric('detour_client_mptcpified_sockets_total')).toBe(5);

    await world.workloads(workload('bb', null));
    expect(switches.groups.values).toEqual(new Map());
    expect([...switches.nets.values.keys()].sort()).toEqual([12, OWN_NET]);
    await world.stop();
    expect(switches.nets.values).toEqual(new Map());
    expect(switches.closed).toBe(true);
  });

  it('chooses each container by itself where two share a network', async () => {
    const world = new World();
    const switches = new FakeSwitches();
    world.container('aa', 11, 101n);
    world.groups.paths.set('docker/bb', 102n);
    await world.start({ mptcpify: 'labelled' }, () => switches);
    await world.workloads(workload('aa', true), { ...workload('bb', false), paths: ['/run/aa'] });
    expect(switches.groups.values).toEqual(new Map([[101n, YES]]));
    expect(world.logged('workload-not-as-asked')).toEqual([]);
    // Who stays when the first one goes keeps its own way.
    await world.workloads({ ...workload('bb', true), paths: ['/run/aa'] });
    expect(switches.groups.values).toEqual(new Map([[102n, YES]]));
    expect(switches.nets.values.has(11)).toBe(true);
    await world.stop();
  });

  it('waits for the control group of a container that is in the making, and says when there is none', async () => {
    const world = new World();
    const switches = new FakeSwitches();
    world.nets.set('aa', 11);
    await world.start({ mptcpify: 'labelled' }, () => switches);
    await world.workloads(workload('aa', true));
    expect(world.logged('workload-not-found')).toEqual([]);
    await world.clock.advance(5_000);
    expect(world.logged('workload-not-found')).toEqual(['warn']);
    world.container('aa', 11, 101n);
    await world.clock.advance(10_000);
    expect(switches.groups.values).toEqual(new Map([[101n, YES]]));
    expect(world.logged('workload-not-found')).toEqual(['warn']);
    await world.stop();
  });

  it('says what keeps it from looking', async () => {
    const world = new World();
    world.nets.set('aa', 11);
    world.groups.broken = 'no control groups of version 2';
    await world.start({ mptcpify: 'labelled' }, () => new FakeSwitches());
    await world.workloads(workload('aa', true));
    await world.clock.advance(5_000);
    const [line] = world.lines.filter(({ event }) => event === 'workload-not-found');
    expect(line?.fields).toEqual({ workload: 'aa', reason: 'no control groups of version 2' });
    await world.stop();
  });

  it('goes on with a pod whose containers are replaced', async () => {
    const world = new World();
    const switches = new FakeSwitches();
    world.nets.set('pod', 11);
    world.groups.paths.set('kubepods/c1', 101n);
    await world.start({ mptcpify: 'labelled' }, () => switches);
    await world.workloads(workload('pod', true, ['pod-uid', 'c1']));
    expect(switches.groups.values).toEqual(new Map([[101n, YES]]));
    world.groups.paths.clear();
    await world.workloads(workload('pod', true, ['pod-uid', 'c2']));
    expect(switches.groups.values).toEqual(new Map([[101n, YES]]));
    world.groups.paths.set('kubepods/c2', 102n);
    await world.clock.advance(10_000);
    expect(switches.groups.values).toEqual(new Map([[102n, YES]]));
    await world.stop();
  });

  it('takes the whole pod where it has a control group of its own', async () => {
    const world = new World();
    const switches = new FakeSwitches();
    world.nets.set('pod', 11);
    world.groups.paths.set('kubepods.slice/kubepods-pod12_34.slice', 100n);
    world.groups.paths.set('kubepods.slice/kubepods-pod12_34.slice/cri-containerd-c1.scope', 101n);
    await world.start({ mptcpify: 'labelled' }, () => switches);
    await world.workloads(workload('pod', true, ['pod12-34', 'pod12_34', 'c1']));
    expect(switches.groups.values).toEqual(new Map([[100n, YES]]));
    await world.stop();
  });
});

describe('DETOUR_MPTCPIFY=all', () => {
  it('chooses everybody in the namespaces that are served, but who says no', async () => {
    const world = new World();
    const switches = new FakeSwitches();
    world.container('aa', 11, 101n);
    world.container('bb', 12, 102n);
    await world.start({ mptcpify: 'all' }, () => switches);
    expect(switches.groups.values).toEqual(new Map([[ROOT, YES]]));
    expect(switches.nets.values).toEqual(new Map([[OWN_NET, YES]]));
    await world.workloads(workload('aa', false), workload('bb', null));
    expect(switches.groups.values).toEqual(
      new Map([
        [ROOT, YES],
        [101n, NO],
      ]),
    );
    expect((await world.status())['workloads']).toMatchObject([{ mptcp: false }, { mptcp: true }]);
    // One that says what is so anyway is not even looked for; one on the host's network is, too.
    world.nets.delete('bb');
    await world.workloads(workload('cc', true, ['nowhere']), { ...workload('dd', null), paths: ['/run/own'] });
    await world.clock.advance(20_000);
    expect(world.logged('workload-not-found')).toEqual([]);
    expect((await world.status())['workloads']).toMatchObject([
      { name: 'cc', state: 'failed', mptcp: false },
      { name: 'dd', mptcp: true },
    ]);
    await world.stop();
  });

  it('leaves a namespace alone while Multipath TCP is off there, because its sockets would fail', async () => {
    const world = new World();
    const switches = new FakeSwitches();
    world.container('aa', 11, 101n);
    await world.start({ mptcpify: 'all' }, () => switches);
    await world.workloads(workload('aa', null));
    world.off.add(11);
    await world.clock.advance(5_000);
    expect([...switches.nets.values.keys()]).toEqual([OWN_NET]);
    await world.clock.advance(20_000);
    expect(world.logged('mptcp-off')).toEqual(['warn']);
    world.off.clear();
    await world.clock.advance(5_000);
    expect([...switches.nets.values.keys()].sort()).toEqual([11, OWN_NET]);
    await world.stop();
  });
});

describe('what `detour load` attached', () => {
  it('is used, stays, and is rid of what an agent that was killed left', async () => {
    const world = new World();
    const switches = new FakeSwitches('load');
    fillByLoad(switches, 'all', OWN_NET);
    switches.groups.set(99n, YES);
    switches.nets.set(98, YES);
    world.container('aa', 11, 101n);
    await world.start({ mptcpify: 'all' }, () => switches);
    await world.workloads(workload('aa', false));
    expect(switches.groups.values).toEqual(
      new Map([
        [ROOT, BY_LOAD],
        [101n, NO],
      ]),
    );
    expect(switches.nets.values).toEqual(
      new Map([
        [OWN_NET, BY_LOAD],
        [11, YES],
      ]),
    );
    await world.stop();
    expect(switches.groups.values).toEqual(new Map([[ROOT, BY_LOAD]]));
    expect(switches.nets.values).toEqual(new Map([[OWN_NET, BY_LOAD]]));
  });

  it('is replaced by the next `detour load`, which an agent asks for that would choose fewer', async () => {
    const world = new World();
    const switches = new FakeSwitches('load');
    fillByLoad(switches, 'all', OWN_NET);
    await world.start({ mptcpify: 'labelled' }, () => switches);
    expect(world.logged('mptcpify-loaded-all')).toEqual(['warn']);
    await world.stop();
    fillByLoad(switches, 'labelled', OWN_NET);
    expect([...switches.groups.values, ...switches.nets.values]).toEqual([]);
  });

  it('is enough for `all` where a container may not look into it', async () => {
    const world = new World();
    const refuse = () => {
      throw new BpfError('refused', '/sys/fs/bpf/detour/mptcp_nets may not be opened (EPERM)');
    };
    await world.start({ mptcpify: 'all' }, refuse, true);
    expect((await world.status())['mptcpify']).toMatchObject({ state: 'on', by: 'load', sockets: null });
    expect(world.logged('mptcpify-unavailable')).toEqual([]);
    await world.stop();
  });
});

describe('where it cannot be had', () => {
  it('is said once, with what can be done instead, and everything else goes on', async () => {
    const world = new World();
    world.container('aa', 11, 101n);
    await world.start({ mptcpify: 'labelled' }, () => {
      throw new BpfError('refused', 'this kernel refuses it');
    });
    await world.workloads(workload('aa', true));
    await world.clock.advance(60_000);
    const said = world.lines.filter(({ event }) => event === 'mptcpify-unavailable');
    expect(said).toEqual([
      {
        level: 'warn',
        event: 'mptcpify-unavailable',
        fields: { mode: 'labelled', why: 'this kernel refuses it' },
        message: expect.stringMatching(/`mptcpize run`.*GODEBUG=multipathtcp=1/),
      },
    ]);
    const { mptcpify, workloads } = await world.status();
    expect(mptcpify).toMatchObject({ state: 'unavailable', by: null, why: 'this kernel refuses it' });
    expect(workloads).toMatchObject([{ state: 'served', mptcp: false }]);
    expect(world.ready).toBe(true);
    expect(await world.metric('detour_client_mptcpify_on')).toBe(0);
    await world.stop();
  });

  it('is no reason to go on without telling when the maps take no more', async () => {
    const world = new World();
    const switches = new FakeSwitches();
    switches.groups.room = 1;
    world.container('aa', 11, 101n);
    await world.start({ mptcpify: 'all' }, () => switches);
    await world.workloads(workload('aa', false));
    expect(world.logged('mptcpify-failing')).toEqual(['warn']);
    expect((await world.status())['mptcpify']).toMatchObject({ state: 'on', why: 'writing: E2BIG' });
    switches.groups.room = 2;
    await world.workloads(workload('aa', false), workload('gone', null));
    expect((await world.status())['mptcpify']).toMatchObject({ why: null });
    await world.stop();
  });
});

describe('DETOUR_MPTCPIFY=off', () => {
  it('opens nothing, and tells a workload that asks for it, once', async () => {
    const world = new World();
    world.container('aa', 11, 101n);
    await world.start({ mptcpify: 'off' }, () => {
      throw new Error('opened');
    });
    await world.workloads(workload('aa', true));
    await world.workloads(workload('aa', true), workload('bb', null));
    const said = world.lines.filter(({ event }) => event === 'workload-mptcp-off');
    expect(said.map(({ fields }) => fields)).toEqual([{ workload: 'aa' }]);
    const status = await world.status();
    expect(status['mptcpify']).toBeUndefined();
    await world.stop();
  });
});

describe('what providers say of control groups', () => {
  const readers = {
    targets: () => [],
    strategy: () => ({ kinds: [], ordered: false }),
    mptcp: (text: string) => text === 'true',
  };
  const log = { debug: () => undefined, info: () => undefined, warn: () => undefined, error: () => undefined };

  it('is the id of a container', async () => {
    const clock = new FakeClock();
    const seen: Workload[] = [];
    const provider = watchDocker({
      engine: {
        list: async () => ['c0ffee'],
        inspect: async (id) => ({
          id,
          name: 'web',
          labels: { 'detour.enable': 'true', 'detour.mptcp': 'true' },
          pid: 7,
          startedAt: 1,
          network: { kind: 'own', sandbox: '/run/web' },
        }),
        follow: async () => ({ ended: new Promise(() => undefined) }),
      },
      processes: {
        find: async () => ({ processes: new Map(), refused: null }),
        holds: () => true,
        pathOf: async () => null,
      },
      clock,
      log,
      readers,
      onChange: (workloads) => seen.push(...workloads),
    });
    await settle();
    provider.stop();
    expect(seen.at(-1)).toMatchObject({ name: 'web', groups: ['c0ffee'], wishes: { mptcp: true } });
  });

  it('is the uid of a pod in both spellings, and the ids of its containers whenever they change', async () => {
    const clock = new FakeClock();
    let seen: readonly Workload[] = [];
    let change: (event: PodEvent) => void = () => undefined;
    const pod = (...containers: readonly string[]): Pod => ({
      uid: 'ab-cd',
      name: 'shop/web',
      annotations: { 'detour.dev/enable': 'true', 'detour.dev/mptcp': 'true' },
      hostNetwork: false,
      ended: false,
      containers,
    });
    const provider = watchKubernetes({
      pods: {
        list: async (each) => {
          each(pod('c1'));
          return '1';
        },
        watch: (_, watching) => {
          change = watching.each;
          return new Promise(() => undefined);
        },
      },
      processes: {
        find: async (words) => ({
          processes: new Map([...words].map((word) => [word, { path: '/proc/7/ns/net', namespace: '4:5' }])),
          refused: null,
        }),
        holds: () => true,
        pathOf: async () => null,
      },
      clock,
      log,
      readers,
      onChange: (workloads) => {
        seen = workloads;
      },
    });
    await clock.advance(1_000);
    expect(seen).toMatchObject([{ groups: ['podab-cd', 'podab_cd', 'c1'], wishes: { mptcp: true } }]);
    change({ kind: 'changed', version: '2', pod: pod('c2') });
    await clock.advance(1_000);
    expect(seen).toMatchObject([{ groups: ['podab-cd', 'podab_cd', 'c2'] }]);
    provider.stop();
  });
});
