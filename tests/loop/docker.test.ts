import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { watchDocker } from '../../appliance/client/docker.ts';
import type { Provider } from '../../appliance/client/provider.ts';
import type { Workload } from '../../appliance/client/workloads.ts';
import { dockerEngine } from '../../appliance/kernel/engine.ts';
import type { Log } from '../../appliance/log.ts';
import { flag, TABLE } from '../../appliance/variables.ts';
import { FakeClock } from '../fakes/clock.ts';
import { type FakeContainer, FakeDocker } from '../fakes/docker.ts';

/** The docker provider and its client of the API, over a real socket; the engine behind it and the clock are the test's. */

/** A question to the engine that is not answered is given up after this, where a test waits for that. */
const SHORT_MS = 300;
const DEADLINE_MS = 20_000;
const WAIT = { timeout: 20_000, interval: 5 };
const READERS = { targets: TABLE.targets.parse, strategy: TABLE.strategy.parse, mptcp: flag };

class World {
  readonly folder = mkdtempSync(join(tmpdir(), 'detour-docker-'));
  readonly clock = new FakeClock();
  readonly engine = new FakeDocker(join(this.folder, 'docker.sock'));
  readonly lines: { event: string; workload: unknown; text: unknown }[] = [];
  /** Pids that this process sees as the engine does, with the host's pid namespace. */
  readonly pids = new Map<number, string>();
  now: readonly Workload[] = [];
  #provider: Provider | null = null;

  start(deadlineMs = DEADLINE_MS): Provider {
    const note: Log['info'] = (event, { workload, complaint, reason }) =>
      this.lines.push({ event, workload, text: complaint ?? reason });
    this.#provider = watchDocker({
      engine: dockerEngine(this.engine.path, deadlineMs),
      processes: {
        find: async () => ({ processes: new Map(), refused: null }),
        holds: () => false,
        pathOf: async (pid, container) => (this.pids.get(pid) === container ? `/proc/${pid}/ns/net` : null),
      },
      clock: this.clock,
      log: { debug() {}, info: note, warn: note, error: note },
      readers: READERS,
      onChange: (workloads) => {
        this.now = workloads;
      },
    });
    return this.#provider;
  }

  get provider(): Provider {
    if (!this.#provider) throw new Error('not started');
    return this.#provider;
  }

  names(): string[] {
    return this.now.map(({ name }) => name).sort();
  }

  keys(): string[] {
    return this.now.map(({ key }) => key).sort();
  }

  pathsOf(name: string): readonly string[] | undefined {
    return this.now.find((one) => one.name === name)?.paths;
  }

  async stop(): Promise<void> {
    this.#provider?.stop();
    await this.engine[Symbol.asyncDispose]();
    rmSync(this.folder, { recursive: true, force: true });
  }
}

let world: World;
beforeEach(async () => {
  world = new World();
  await world.engine.open();
});
afterEach(() => world.stop());

const are = (...names: string[]) => expect.poll(() => world.names(), WAIT).toEqual(names);
const isState = (state: string) => expect.poll(() => world.provider.status().state, WAIT).toBe(state);
/** Starts watching, and waits until all that there is was told. */
const watching = async (deadlineMs?: number): Promise<void> => {
  world.start(deadlineMs);
  await isState('ok');
};
/** Lets the next try to reach the engine begin. */
const retry = () => world.clock.advance(40_000);
const keyOf = ({ id, startedAt }: FakeContainer): string => `${id} ${startedAt.getTime()}`;

test('containers with the label are told of, with the file of their namespace, and no others', async () => {
  const app = world.engine.run({ name: 'app', labels: { 'detour.enable': 'true', 'detour.strategy': 'nat' } });
  world.engine.run({ name: 'plain', labels: {} });
  world.engine.run({ name: 'off', labels: { 'detour.enable': 'false' } });
  await watching();
  expect(world.now).toEqual([
    {
      key: keyOf(app),
      name: 'app',
      paths: [app.sandbox],
      groups: [app.id],
      wishes: { targets: null, strategy: { kinds: ['nat'], ordered: true, fallback: false }, mptcp: null },
    },
  ]);
  expect(world.lines).toEqual([]);
  // Of others it does not even ask.
  expect(world.engine.asked.filter((path) => path.includes(app.id))).toHaveLength(1);
  expect(world.engine.asked).toHaveLength(4);
});

test('they come when they start and go when they end; a restart is another workload', async () => {
  await watching();
  const app = world.engine.run({ name: 'app' });
  await are('app');
  const [before] = world.keys();
  world.engine.end(app);
  await are();
  world.engine.start(app);
  await are('app');
  expect(world.keys()).toEqual([keyOf(app)]);
  expect(before).not.toBe(keyOf(app));
});

describe('events say when to look, not what there is', () => {
  test('the end of a container is told after its new start', async () => {
    await watching();
    const app = world.engine.run({ name: 'app' });
    await are('app');
    world.engine.end(app, true);
    world.engine.start(app, true);
    world.engine.tell('start', app);
    world.engine.tell('die', app);
    world.engine.run({ name: 'later' });
    await are('app', 'later');
    expect(world.keys()).toContain(keyOf(app));
  });

  test('a container has ended before anybody looked', async () => {
    await watching();
    for (let index = 0; index < 20; index++) world.engine.end(world.engine.run({ name: `short${index}` }));
    const gone = world.engine.run({ name: 'gone' });
    world.engine.containers.delete(gone.id);
    world.engine.run({ name: 'stays' });
    await are('stays');
    expect(world.provider.status()).toMatchObject({ state: 'ok', workloads: 1 });
  });

  test('one is being started again by its restart policy', async () => {
    await watching();
    const app = world.engine.run({ name: 'app' });
    await are('app');
    app.state = 'restarting';
    world.engine.tell('die', app);
    await are();
    world.engine.start(app);
    await are('app');
  });

  test('an event was lost: it is found out within minutes', async () => {
    await watching();
    const app = world.engine.run({ name: 'app' });
    await are('app');
    world.engine.end(app, true);
    const other = world.engine.run({ name: 'other', labels: {} });
    other.labels = { 'detour.enable': 'true' };
    await world.clock.advance(300_000);
    await are('other');
  });

  test('the stream holds what nobody can read', async () => {
    await watching();
    world.engine.say('no JSON');
    world.engine.say('{"Type":"container"}');
    world.engine.say('{"Actor":{"ID":7}}');
    world.engine.run({ name: 'app' });
    await are('app');
  });
});

test('a paused container keeps its connections, and is served on', async () => {
  const app = world.engine.run({ name: 'app' });
  await watching();
  app.state = 'paused';
  await world.clock.advance(300_000);
  world.engine.run({ name: 'later' });
  await are('app', 'later');
});

describe('labels with nonsense', () => {
  test('are named once for each start, and touch nobody else', async () => {
    const odd = world.engine.run({
      name: 'odd',
      labels: { 'detour.enable': 'true', 'detour.targets': 'nowhere', 'detour.target': 'x' },
    });
    world.engine.run({ name: 'maybe', labels: { 'detour.enable': 'maybe' } });
    world.engine.run({ name: 'good' });
    await watching();
    expect(world.names()).toEqual(['good', 'odd']);
    const complaints = [
      { event: 'workload-label', workload: 'odd', text: expect.stringMatching(/^detour\.targets="nowhere": /) },
      { event: 'workload-label', workload: 'odd', text: expect.stringMatching(/^"detour\.target": is not known/) },
      { event: 'workload-label', workload: 'maybe', text: 'detour.enable="maybe": must be "true" or "false"' },
    ];
    expect(world.lines).toEqual(complaints);
    await world.clock.advance(600_000);
    expect(world.lines).toEqual(complaints);
    world.engine.end(odd);
    world.engine.start(odd);
    await expect.poll(() => world.lines.length, WAIT).toBe(5);
    expect(world.lines.slice(3)).toEqual(complaints.slice(0, 2));
  });
});

describe('whose network it is', () => {
  test('that of another container, also over several', async () => {
    const pause = world.engine.run({ name: 'pause', labels: {} });
    const proxy = world.engine.run({ name: 'proxy', labels: {}, mode: `container:${pause.id}` });
    world.engine.run({ name: 'app', mode: `container:${proxy.id}` });
    await watching();
    expect(world.names()).toEqual(['app']);
    expect(world.pathsOf('app')).toEqual([pause.sandbox]);
  });

  test('that of a container that was started again meanwhile, or is gone: not the new one’s', async () => {
    const pause = world.engine.run({ name: 'pause', labels: {} });
    world.engine.run({ name: 'app', mode: `container:${pause.id}`, pid: 77 });
    world.engine.end(pause);
    world.engine.start(pause);
    const gone = world.engine.run({ name: 'gone', labels: {} });
    world.engine.run({ name: 'orphan', mode: `container:${gone.id}` });
    world.engine.containers.delete(gone.id);
    await watching();
    expect(world.pathsOf('app')).toEqual([]);
    expect(world.pathsOf('orphan')).toEqual([]);
  });

  test('the host’s: that is never served for one container’s sake', async () => {
    const host = world.engine.run({ name: 'hosted', mode: 'host' });
    world.engine.run({ name: 'beside', mode: `container:${host.id}` });
    await watching();
    expect(world.names()).toEqual([]);
    const text = "it uses the host's network: DETOUR_PROVIDERS=host serves that";
    expect(world.lines).toEqual([
      { event: 'workload-label', workload: 'hosted', text },
      { event: 'workload-label', workload: 'beside', text },
    ]);
  });

  test('with the host’s processes in sight, that of its own process, which is always right', async () => {
    const pause = world.engine.run({ name: 'pause', labels: {}, pid: 70 });
    const app = world.engine.run({ name: 'app', mode: `container:${pause.id}`, pid: 71 });
    const own = world.engine.run({ name: 'own', pid: 72 });
    const other = world.engine.run({ name: 'other', pid: 73 });
    world.pids.set(71, app.id).set(72, own.id).set(73, 'another process of this pid namespace');
    world.engine.end(pause);
    world.engine.start(pause);
    await watching();
    expect(world.pathsOf('app')).toEqual(['/proc/71/ns/net']);
    expect(world.pathsOf('own')).toEqual(['/proc/72/ns/net', own.sandbox]);
    expect(world.pathsOf('other')).toEqual([other.sandbox]);
  });
});

describe('an engine that is away', () => {
  test('is waited for with ever longer pauses, and named in one line', async () => {
    await world.engine.shut();
    world.start();
    await isState('failing');
    expect(world.provider.status()).toEqual({
      provider: 'docker',
      state: 'failing',
      workloads: 0,
      why: `there is no ${world.engine.path}: mount it (docker: -v /var/run/docker.sock:/var/run/docker.sock), or name it in DOCKER_HOST`,
    });
    const began = world.clock.now();
    for (let tries = 0; tries < 12; tries++) {
      const pending = world.clock.pending;
      await world.clock.advance(36_000);
      await expect.poll(() => world.clock.pending, WAIT).toBe(pending);
    }
    expect(world.lines).toHaveLength(1);
    expect(world.clock.now() - began).toBeGreaterThan(400_000);
    await world.engine.open();
    world.engine.run({ name: 'app' });
    await retry();
    await isState('ok');
    await are('app');
    expect(world.lines.map(({ event }) => event)).toEqual(['provider-failing', 'provider-back']);
  });

  test('in the middle: what is known stays, and what happened meanwhile is found afterwards', async () => {
    const [stays, restarts, ends] = ['stays', 'restarts', 'ends'].map((name) => world.engine.run({ name })) as [
      FakeContainer,
      FakeContainer,
      FakeContainer,
    ];
    await watching();
    await world.engine.shut();
    await isState('failing');
    expect(world.names()).toEqual(['ends', 'restarts', 'stays']);
    expect(world.lines).toMatchObject([{ event: 'provider-failing', text: expect.stringMatching(/ended|ECONN/) }]);
    world.engine.end(restarts, true);
    world.engine.start(restarts, true);
    world.engine.end(ends, true);
    const fresh = world.engine.run({ name: 'fresh' });
    await world.engine.open();
    await retry();
    await are('fresh', 'restarts', 'stays');
    expect(world.keys()).toEqual([stays, restarts, fresh].map(keyOf).sort());
    world.engine.end(fresh);
    await are('restarts', 'stays');
  });

  test('with its socket left behind', async () => {
    await watching();
    await world.engine.shut(true);
    await isState('failing');
    await retry();
    await expect.poll(() => world.provider.status().why, WAIT).toBe(`no engine listens at ${world.engine.path}`);
  });

  test('for whoever listens to its events: they are followed again', async () => {
    await watching();
    world.engine.dropFollowers();
    await isState('failing');
    await retry();
    await isState('ok');
    expect(world.engine.followers).toBe(1);
    world.engine.run({ name: 'app' });
    await are('app');
  });

  test('for whoever listens, while the list is being read', async () => {
    world.engine.run({ name: 'app' });
    world.engine.manners = (path) => {
      if (path.startsWith('/containers')) world.engine.dropFollowers();
      return 'answers';
    };
    world.start();
    await isState('failing');
    world.engine.manners = () => 'answers';
    await retry();
    await isState('ok');
    expect(world.engine.followers).toBe(1);
    await are('app');
  });

  test.each([
    ['is silent', /it does not answer in time/],
    ['breaks off', /it does not answer in time/],
    [500, /the engine answers with status 500/],
  ] as const)('in spirit: it %s', async (manners, why) => {
    world.engine.run({ name: 'app' });
    await watching(SHORT_MS);
    world.engine.manners = (path) => (path === '/events' ? 'answers' : manners);
    world.engine.run({ name: 'later' });
    await isState('failing');
    expect(world.provider.status().why).toMatch(why);
    expect(world.names()).toEqual(['app']);
    world.engine.manners = () => 'answers';
    await retry();
    await are('app', 'later');
    await isState('ok');
    // The old conversation ended with what went wrong in it.
    expect(world.engine.followers).toBe(1);
  });
});

test('who stops hears no more, and leaves no conversation open', async () => {
  await watching();
  expect(world.engine.followers).toBe(1);
  world.provider.stop();
  await expect.poll(() => world.engine.followers, WAIT).toBe(0);
  world.engine.run({ name: 'app' });
  await world.clock.advance(300_000);
  expect(world.names()).toEqual([]);
  expect(world.provider.status().state).toBe('ok');
});
