import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { type Daemon, startDaemon } from '../../appliance/client/daemon.ts';
import type { OnWorkloads, ProviderStatus } from '../../appliance/client/provider.ts';
import { NO_WISHES, type Wishes, type Workload } from '../../appliance/client/workloads.ts';
import { Fatal } from '../../appliance/exit.ts';
import { systemFiles } from '../../appliance/kernel/files.ts';
import { systemLookup } from '../../appliance/kernel/lookup.ts';
import { systemSchedule } from '../../appliance/kernel/schedule.ts';
import { systemWeb } from '../../appliance/kernel/web.ts';
import type { Log } from '../../appliance/log.ts';
import { type Address, type Endpoint, parseAddress, parseEndpoint } from '../../appliance/protocol/address.ts';
import { deriveKeys, TYPE } from '../../appliance/protocol/control.ts';
import type { ProviderName } from '../../appliance/settings.ts';
import { TABLE } from '../../appliance/variables.ts';
import { FakeClock, settle } from '../fakes/clock.ts';
import { FakeGroups } from '../fakes/mptcpify.ts';
import { FakeNetwork } from '../fakes/network.ts';
import { FakeNamespace } from '../fakes/places.ts';
import { FakeRouter } from '../fakes/router.ts';

/** One agent with many namespaces: their kernels, and who tells of them, are the test's; everything else is the real thing. */

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
const ROUTER = endpoint('80.0.0.1:45672');
const SERVER = endpoint('93.184.216.34:443');
const OTHER_SERVER = endpoint('93.184.216.35:443');

type Status = {
  readonly ready: boolean;
  readonly detours: readonly { readonly workload: string | null; readonly name: string; readonly state: string }[];
  readonly connections: readonly {
    readonly workload: string | null;
    readonly remote: string;
    readonly why: string | null;
  }[];
  readonly providers: readonly ProviderStatus[];
  readonly workloads: readonly { readonly name: string; readonly state: string; readonly why: string | null }[];
};

class Node {
  readonly clock = new FakeClock();
  readonly network = new FakeNetwork(this.clock);
  readonly router = new FakeRouter(this.clock, deriveKeys(KEY.id, KEY.secret));
  /** By the path that leads there. */
  readonly namespaces = new Map<string, FakeNamespace>();
  readonly home = this.namespace('home');
  readonly lines: { level: string; event: string; why: unknown; workload: unknown }[] = [];
  status: ProviderStatus = { provider: 'docker', state: 'ok', workloads: 0, why: null };
  #daemon: Daemon | null = null;
  #stopped: Promise<void> | null = null;
  #tell: OnWorkloads = () => undefined;
  #port = 40_000;

  readonly log: Log = {
    debug: () => undefined,
    info: this.#note('info'),
    warn: this.#note('warn'),
    error: this.#note('error'),
  };

  #note(level: string): Log['info'] {
    return (event, { why, reason, workload }) => this.lines.push({ level, event, why: why ?? reason, workload });
  }

  /** Makes a namespace, behind the path of its name; `own` is its address as detours see it. */
  namespace(
    name: string,
    own = address(`10.90.${this.namespaces.size >> 8}.${this.namespaces.size & 255}`),
  ): FakeNamespace {
    const made = new FakeNamespace(name, [own], this.clock, this.network);
    made.kernel.way = () => SERVER;
    this.namespaces.set(name, made);
    return made;
  }

  async start(providers: readonly ProviderName[] = ['host', 'docker']): Promise<void> {
    await this.router.listen(this.network.host([ROUTER.address]), ROUTER);
    this.#daemon = await startDaemon(
      {
        http: null,
        socket: '',
        fwmark: { mark: 0xd7000000, mask: 0xff000000 },
        logLevel: 'info',
        logFormat: 'json',
        sides: ['client'],
        key: KEY,
        detours: [{ kind: 'static', name: 'one', host: '80.0.0.1', port: ROUTER.port }],
        targets: [],
        exclude: [],
        maxPaths: 2,
        interfaces: null,
        strategy: { kinds: ['nat'], ordered: false },
        mode: 'aggregate',
        minAgeMs: null,
        rescue: false,
        providers,
        mptcpify: 'off',
        announcing: null,
        sysctlRoot: '/proc/sys',
      },
      {
        clock: this.clock,
        log: this.log,
        lookup: systemLookup(),
        files: systemFiles(),
        web: systemWeb(),
        schedule: systemSchedule,
        ownId: 'home',
        openPlace: async (path) => {
          const found = this.namespaces.get(path ?? 'home');
          if (!found) throw new Error(`opening ${path}: ENOENT`);
          return found.enter(this.log);
        },
        providers: [
          (onChange) => {
            this.#tell = onChange;
            return { status: () => this.status, stop: () => undefined };
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
        mptcpify: {
          groups: new FakeGroups(),
          openSwitches: () => {
            throw new Error('opened, although it is off');
          },
          isPinned: () => false,
        },
        version: 'test',
      },
    );
    await this.clock.advance(100);
  }

  get daemon(): Daemon {
    if (!this.#daemon) throw new Error('not started');
    return this.#daemon;
  }

  /** What the provider says now; time enough to act on it. */
  async tell(...workloads: readonly Workload[]): Promise<void> {
    this.#tell(workloads);
    await this.clock.advance(100);
  }

  /** What the provider says, and nothing done yet. */
  say(...workloads: readonly Workload[]): void {
    this.#tell(workloads);
  }

  async report(): Promise<Status> {
    return JSON.parse(JSON.stringify(await this.daemon.view.status()));
  }

  /** Workloads as the status has them: name, state, why. */
  async shown(): Promise<string[]> {
    return (await this.report()).workloads.map(({ name, state, why }) => `${name} ${state}${why ? `: ${why}` : ''}`);
  }

  /** An application in a namespace connects, and its data is acknowledged; how many joins that gave. */
  async connect(namespace: FakeNamespace, to: Endpoint = SERVER): Promise<number> {
    const before = namespace.kernel.created.length;
    const token = namespace.kernel.open({ address: address('10.90.9.9'), port: this.#port++ }, to);
    await this.clock.advance(50);
    namespace.kernel.establish(token);
    await this.clock.advance(50);
    return namespace.kernel.created.length - before;
  }

  events(level: string): string[] {
    return this.lines.filter((line) => line.level === level).map(({ event }) => event);
  }

  async metric(line: string): Promise<string> {
    const text = await this.daemon.view.metrics.metrics();
    return text.split('\n').find((one) => one.startsWith(`${line} `)) ?? 'absent';
  }

  /** Once: also after each test. */
  stop(): Promise<void> {
    this.#stopped ??= this.daemon.stop();
    return this.#stopped;
  }
}

const wishing = (wishes: Partial<Wishes>): Wishes => ({ ...NO_WISHES, ...wishes });
const workload = (name: string, path = name, wishes: Partial<Wishes> = {}): Workload => ({
  key: name,
  name,
  paths: [path],
  groups: [name],
  wishes: wishing(wishes),
});

let node: Node;
beforeEach(() => {
  node = new Node();
});
afterEach(async () => {
  await node.stop();
  // Whatever happened in a test, nothing of it is left anywhere.
  for (const one of node.namespaces.values()) expect(one, one.done.join(' ')).toMatchObject({ untouched: true });
  expect(node.events('error')).toEqual([]);
});

test('a workload is served from when it is told of until it is gone, and its namespace is put back', async () => {
  const one = node.namespace('one');
  await node.start();
  expect(await node.connect(one)).toBe(0);
  await node.tell(workload('one'));
  expect(one.pathManager).toBe('userspace');
  expect(await node.shown()).toEqual(['one served']);
  expect(await node.connect(one)).toBe(1);
  expect((await node.report()).connections).toMatchObject([
    { workload: 'one', remote: '93.184.216.34:443' },
    { workload: 'one', remote: '93.184.216.34:443' },
  ]);
  await node.tell();
  expect(one.untouched).toBe(true);
  expect(await node.connect(one)).toBe(0);
  expect(await node.shown()).toEqual([]);
  expect(node.events('info').filter((event) => event.startsWith('workload'))).toEqual([
    'workload-served',
    'workload-left',
  ]);
});

test('the path manager is put back before the agent stops listening', async () => {
  const one = node.namespace('one');
  await node.start();
  await node.tell(workload('one'));
  one.before = (step) => {
    if (step === 'unload') expect(one.sockets).toBeGreaterThan(0);
  };
  await node.tell();
  expect(one.done.slice(-2)).toEqual(['unload', 'close']);
});

test('a namespace that nobody asked for is never entered', async () => {
  const [asked, other] = [node.namespace('asked'), node.namespace('other')];
  await node.start();
  await node.tell(workload('asked'));
  await node.clock.advance(120_000);
  expect(asked.done).not.toEqual([]);
  expect(other.done).toEqual([]);
});

test('each workload is served by its own wishes, and by the settings where it has none', async () => {
  const [some, none, plain] = [node.namespace('some'), node.namespace('none'), node.namespace('plain')];
  await node.start();
  await node.tell(
    workload('some', 'some', { targets: TABLE.targets.parse('93.184.216.34') }),
    workload('none', 'none', { strategy: TABLE.strategy.parse('announced') }),
    workload('plain'),
  );
  expect(await node.connect(some, SERVER)).toBe(1);
  expect(await node.connect(some, OTHER_SERVER)).toBe(0);
  expect(await node.connect(none)).toBe(0);
  expect(await node.connect(plain, SERVER)).toBe(1);
  expect((await node.report()).connections.find(({ remote }) => remote.startsWith('93.184.216.35'))?.why).toContain(
    'DETOUR_TARGETS',
  );
});

test('a lease that two namespaces behind one address share is given back when neither uses it', async () => {
  const translated = address('10.90.9.1');
  const [brief, lasting] = [node.namespace('brief', translated), node.namespace('lasting', translated)];
  await node.start(['docker']);
  await node.tell(workload('brief'), workload('lasting'));
  const open = (namespace: FakeNamespace, port: number): number =>
    namespace.kernel.open({ address: translated, port }, SERVER);
  const released = () => node.router.requests.filter(({ type }) => type === TYPE.RELEASE);
  const tokens = [open(brief, 50_000), open(lasting, 50_001)] as const;
  await node.clock.advance(50);
  brief.kernel.establish(tokens[0]);
  lasting.kernel.establish(tokens[1]);
  await node.clock.advance(50);
  expect(node.router.leases.size).toBe(1);
  brief.kernel.close(tokens[0]);
  // Longer than an idle lease is kept.
  await node.clock.advance(700_000);
  expect(released()).toEqual([]);
  lasting.kernel.close(tokens[1]);
  await node.clock.advance(700_000);
  expect(released()).toHaveLength(1);
  expect(node.router.leases.size).toBe(0);
});

describe('two workloads in one namespace', () => {
  test('that are alike are served together, until both are gone', async () => {
    const one = node.namespace('one');
    await node.start();
    await node.tell(workload('a', 'one'), workload('b', 'one'));
    expect(await node.shown()).toEqual(['a served', 'b served']);
    expect(one.done.filter((what) => what === 'load')).toHaveLength(1);
    expect(await node.metric('detour_client_namespaces')).toBe('detour_client_namespaces 2');
    expect((await node.report()).detours).toMatchObject([{ workload: null }, { workload: 'a, b' }]);
    await node.tell(workload('b', 'one'));
    expect(await node.connect(one)).toBe(1);
    expect(one.done).not.toContain('unload');
    await node.tell();
    expect(one.untouched).toBe(true);
    expect(node.events('warn')).toEqual([]);
  });

  test('that contradict each other: the first one’s wishes count, the other hears why, and follows when it leaves', async () => {
    const one = node.namespace('one');
    const first = workload('first', 'one', { targets: TABLE.targets.parse('93.184.216.35') });
    const second = workload('second', 'one');
    await node.start();
    await node.tell(first);
    await node.tell(first, second);
    const why = 'it shares its network with first, whose settings count';
    expect(await node.shown()).toEqual(['first served', `second served: ${why}`]);
    expect(await node.connect(one, SERVER)).toBe(0);
    expect(node.lines.filter(({ level }) => level === 'warn')).toEqual([
      { level: 'warn', event: 'workload-not-as-asked', workload: 'second', why },
    ]);
    await node.tell(second);
    expect(await node.shown()).toEqual(['second served']);
    expect(await node.connect(one, SERVER)).toBe(1);
    // It was never left in between.
    expect(one.done).not.toContain('unload');
  });

  test('of which one came while the other’s namespace was being left', async () => {
    const one = node.namespace('one');
    await node.start();
    await node.tell(workload('a', 'one'));
    const leaving = Promise.withResolvers<void>();
    one.before = (step) => (step === 'unload' ? leaving.promise : undefined);
    await node.tell();
    await node.tell(workload('b', 'one'));
    leaving.resolve();
    await node.clock.advance(100);
    expect(await node.shown()).toEqual(['b served']);
    expect(one.pathManager).toBe('userspace');
    expect(await node.connect(one)).toBe(1);
  });
});

describe('a workload on the agent’s own network', () => {
  test('is served with it', async () => {
    await node.start();
    await node.tell(workload('near', 'home'));
    expect(await node.shown()).toEqual(["near served: it uses the agent's own network, which is served as such"]);
    expect(node.home.open).toBe(1);
    await node.tell();
    expect(node.home.pathManager).toBe('userspace');
  });

  test('is not served when that was not asked for', async () => {
    await node.start(['docker']);
    await node.tell(workload('near', 'home'));
    expect(await node.shown()).toEqual([
      "near failed: it uses the agent's own network: add host to DETOUR_PROVIDERS to serve that",
    ]);
    expect(node.home.untouched).toBe(true);
  });
});

describe('a namespace that cannot be served', () => {
  test('because it cannot be entered yet: it is tried again, and said only when that does not help at once', async () => {
    await node.start();
    await node.tell(workload('late'));
    expect(await node.shown()).toEqual(['late failed: its network namespace cannot be entered: opening late: ENOENT']);
    expect(node.events('warn')).toEqual([]);
    node.namespace('late');
    await node.clock.advance(150);
    expect(await node.shown()).toEqual(['late served']);
    expect(node.events('warn')).toEqual([]);
  });

  test('and never can: one line, ever rarer tries, and the others are served', async () => {
    const one = node.namespace('one');
    let tries = 0;
    const bad = node.namespace('bad');
    bad.before = () => {
      tries++;
      throw new Error('entering bad: EPERM');
    };
    await node.start();
    await node.tell(workload('bad'), workload('one'));
    await node.clock.advance(600_000);
    expect(tries).toBeGreaterThan(10);
    expect(tries).toBeLessThan(25);
    expect(node.lines.filter(({ level }) => level === 'warn')).toEqual([
      {
        level: 'warn',
        event: 'workload-not-served',
        workload: 'bad',
        why: 'its network namespace cannot be entered: entering bad: EPERM',
      },
    ]);
    expect(await node.connect(one)).toBe(1);
    expect(await node.metric('detour_client_workloads{state="failed"}')).toContain(' 1');
    await node.tell(workload('one'));
    const before = tries;
    await node.clock.advance(600_000);
    expect(tries).toBe(before);
  });

  test('by the first path is entered by the next; when none leads there, the first says why', async () => {
    node.namespace('second');
    await node.start();
    await node.tell(
      { ...workload('two'), paths: ['first', 'second'] },
      { ...workload('lost'), paths: ['nowhere', 'nowhere-else'] },
      { ...workload('no-path'), paths: [] },
    );
    expect(await node.shown()).toEqual([
      'two served',
      'lost failed: its network namespace cannot be entered: opening nowhere: ENOENT',
      'no-path failed: its network namespace cannot be entered: no file leads to it',
    ]);
    await node.tell();
  });

  test.each(['load', 'subscribe'] as const)(
    'because a step fails (%s): it is left as it was, and served once that works',
    async (step) => {
      const one = node.namespace('one');
      one.before = (now) => {
        if (now === step) throw new Fatal(69, 'the kernel says no');
      };
      await node.start();
      await node.tell(workload('one'), workload('other', 'one'));
      expect(await node.shown()).toEqual(['one failed: the kernel says no', 'other failed: the kernel says no']);
      expect(one.untouched).toBe(true);
      one.before = () => undefined;
      await node.clock.advance(2_000);
      expect(await node.shown()).toEqual(['one served', 'other served']);
      expect(await node.connect(one)).toBe(1);
    },
  );

  test.each(['open', 'load', 'subscribe'] as const)(
    'any more, because the workload left meanwhile (%s)',
    async (step) => {
      const one = node.namespace('one');
      const going = Promise.withResolvers<void>();
      one.before = (now) => (now === step ? going.promise : undefined);
      await node.start();
      await node.tell(workload('one'));
      await node.tell();
      going.resolve();
      await node.clock.advance(100);
      expect(one.untouched).toBe(true);
      expect(node.events('warn')).toEqual([]);
    },
  );

  test('to its end: what cannot be put back is said, and nothing of ours stays there', async () => {
    const one = node.namespace('one');
    await node.start();
    await node.tell(workload('one'));
    one.before = (step) => {
      if (step === 'unload') throw new Fatal(69, 'cannot set net.mptcp.path_manager=kernel: EPERM');
    };
    await node.tell();
    expect(one).toMatchObject({ open: 0, sockets: 0 });
    expect(node.lines.filter(({ level }) => level === 'warn')).toMatchObject([
      { event: 'workload-not-restored', why: 'cannot set net.mptcp.path_manager=kernel: EPERM' },
    ]);
    // For the check after each test: as the next agent does it.
    one.before = () => undefined;
    const place = await one.enter(node.log);
    await place.unload();
    place.close();
  });
});

test('changed wishes count at once, and what is open goes on', async () => {
  const one = node.namespace('one');
  await node.start();
  await node.tell(workload('one', 'one', { targets: TABLE.targets.parse('93.184.216.35') }));
  expect(await node.connect(one, SERVER)).toBe(0);
  await node.tell(workload('one'));
  // The connection was found again, and gets its path.
  await node.clock.advance(2_000);
  expect(one.kernel.created).toHaveLength(1);
  expect(await node.connect(one, SERVER)).toBe(1);
  expect(one.done.filter((what) => what !== 'socket')).toEqual(['load']);
});

test('a wish for or against Multipath TCP alone leaves its agent as it is, and contradicts nobody', async () => {
  const one = node.namespace('one');
  await node.start();
  await node.tell(workload('a', 'one'), workload('b', 'one', { mptcp: false }));
  const before = [...one.done];
  await node.tell(workload('a', 'one', { mptcp: false }), workload('b', 'one'));
  expect(one.done).toEqual(before);
  expect(await node.shown()).toEqual(['a served', 'b served']);
  expect(await node.connect(one)).toBe(1);
});

test('a container that was started again in a new namespace is another workload', async () => {
  const [old, fresh] = [node.namespace('old'), node.namespace('fresh')];
  await node.start();
  await node.tell({ ...workload('app', 'old'), key: 'id 1' });
  await node.tell({ ...workload('app', 'fresh'), key: 'id 2' });
  expect(old.untouched).toBe(true);
  expect(await node.connect(fresh)).toBe(1);
});

test('wishes that change while a namespace is being entered are those that count', async () => {
  const one = node.namespace('one');
  const going = Promise.withResolvers<void>();
  one.before = (step) => (step === 'load' ? going.promise : undefined);
  await node.start();
  await node.tell(workload('one', 'one', { targets: TABLE.targets.parse('93.184.216.35') }));
  node.say(workload('one'));
  going.resolve();
  await node.clock.advance(100);
  expect(await node.connect(one, SERVER)).toBe(1);
});

describe('stopping', () => {
  test('puts every namespace back, even when one cannot be', async () => {
    const names = ['a', 'b', 'c'];
    const all = names.map((name) => node.namespace(name));
    await node.start();
    await node.tell(...names.map((name) => workload(name)));
    const [, bad] = all;
    if (bad)
      bad.before = (step) => {
        if (step === 'unload') throw new Fatal(69, 'no');
      };
    await node.stop();
    expect(all.map(({ untouched }) => untouched)).toEqual([true, false, true]);
    expect(bad).toMatchObject({ open: 0, sockets: 0 });
    expect(node.home.untouched).toBe(true);
    if (bad) {
      bad.before = () => undefined;
      const place = await bad.enter(node.log);
      await place.unload();
      place.close();
    }
  });

  test('waits for what is being entered and left just now', async () => {
    const [coming, going] = [node.namespace('coming'), node.namespace('going')];
    await node.start();
    await node.tell(workload('going'));
    const [entered, left] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
    coming.before = (step) => (step === 'subscribe' ? entered.promise : undefined);
    going.before = (step) => (step === 'unload' ? left.promise : undefined);
    await node.tell(workload('coming'));
    let stopped = false;
    const stopping = node.stop().then(() => {
      stopped = true;
    });
    await settle();
    left.resolve();
    await settle();
    expect(stopped).toBe(false);
    entered.resolve();
    await stopping;
    expect([coming.untouched, going.untouched]).toEqual([true, true]);
  });

  test('hears no more of providers', async () => {
    const one = node.namespace('one');
    await node.start();
    await node.stop();
    await node.tell(workload('one'));
    expect(one.done).toEqual([]);
  });
});

test('200 namespaces come, are served and go', async () => {
  const names = Array.from({ length: 200 }, (_, index) => `n${index}`);
  const all = names.map((name) => node.namespace(name));
  await node.start(['docker']);
  await node.tell(...names.map((name) => workload(name)));
  expect(await node.metric('detour_client_workloads{state="served"}')).toContain(' 200');
  expect(await node.metric('detour_client_namespaces')).toBe('detour_client_namespaces 200');
  const joins: number[] = [];
  for (const one of all.slice(0, 5)) joins.push(await node.connect(one));
  expect(joins).toEqual([1, 1, 1, 1, 1]);
  await node.tell(...names.slice(100).map((name) => workload(name)));
  expect(all.filter(({ untouched }) => untouched)).toHaveLength(100);
});

test('the machine slept: every namespace asks its detours again', async () => {
  node.namespace('one');
  await node.start();
  await node.tell(workload('one'));
  await node.clock.advance(5_000);
  const before = node.router.requests.length;
  const wall = node.clock.wall.bind(node.clock);
  node.clock.wall = () => wall() + 3_600_000;
  await node.clock.advance(1_500);
  expect(node.router.requests.length).toBe(before + 2);
});

describe('readiness and status', () => {
  test('without a workload it is ready once its provider has answered', async () => {
    node.status = { provider: 'docker', state: 'starting', workloads: 0, why: null };
    await node.start(['docker']);
    expect(node.daemon.view.readiness()).toEqual({ ready: false, reasons: ['docker: not asked yet'] });
    node.status = { provider: 'docker', state: 'ok', workloads: 0, why: null };
    expect(node.daemon.view.readiness()).toEqual({ ready: true, reasons: [] });
  });

  test('it is not while a provider fails, and says why; what is known is served', async () => {
    const one = node.namespace('one');
    await node.start();
    await node.tell(workload('one'));
    node.status = { provider: 'docker', state: 'failing', workloads: 1, why: 'no engine listens' };
    expect(node.daemon.view.readiness()).toEqual({ ready: false, reasons: ['docker: no engine listens'] });
    expect(await node.report()).toMatchObject({
      ready: false,
      providers: [{ provider: 'docker', state: 'failing', workloads: 1, why: 'no engine listens' }],
    });
    expect(await node.connect(one)).toBe(1);
  });

  test('it is when one namespace reaches a detour, and not when none does', async () => {
    const one = node.namespace('one');
    node.router.dead = true;
    await node.start(['docker']);
    await node.tell(workload('one'));
    await node.clock.advance(20_000);
    expect(node.daemon.view.readiness()).toEqual({
      ready: false,
      reasons: [expect.stringMatching(/^detour one: .*no answer/)],
    });
    node.router.dead = false;
    await node.clock.advance(30_000);
    expect(node.daemon.view.readiness()).toEqual({ ready: true, reasons: [] });
    expect(await node.connect(one)).toBe(1);
  });

  test('explains a server in every namespace', async () => {
    node.namespace('one');
    await node.start();
    await node.tell(workload('one'));
    expect(await node.daemon.view.explain?.(SERVER.address, null)).toMatchObject([
      { workload: null, address: '93.184.216.34' },
      { workload: 'one', address: '93.184.216.34' },
    ]);
  });

  test('an agent of its own network alone shows no workloads, and needs no capability for them', async () => {
    await node.start(['host']);
    await node.tell();
    expect(await node.metric('detour_client_namespaces')).toBe('detour_client_namespaces 1');
  });
});
