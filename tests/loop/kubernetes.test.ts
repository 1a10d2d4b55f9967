import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setFlagsFromString } from 'node:v8';
import { runInNewContext } from 'node:vm';
import { afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest';
import { watchKubernetes } from '../../appliance/client/kubernetes.ts';
import type { Provider } from '../../appliance/client/provider.ts';
import type { Workload } from '../../appliance/client/workloads.ts';
import { podsOf } from '../../appliance/kernel/pods.ts';
import type { ContainerProcess } from '../../appliance/kernel/processes.ts';
import type { Log } from '../../appliance/log.ts';
import { flag, TABLE } from '../../appliance/variables.ts';
import { FakeClock } from '../fakes/clock.ts';
import { type ApiPod, FakeKubernetes, statusOf } from '../fakes/kubernetes.ts';

/** The kubernetes provider and its client of the API, over real TLS; the cluster, the node's processes and the clock are the test's. */

const NODE = 'node-1';
/** A question that is not answered is given up after this, where a test waits for that. */
const SHORT_MS = 300;
const DEADLINE_MS = 20_000;
const WAIT = { timeout: 20_000, interval: 5 };
const READERS = { targets: TABLE.targets.parse, strategy: TABLE.strategy.parse, mptcp: flag };
const ENABLED = { 'detour.dev/enable': 'true' };

const uidOf = (name: string): string =>
  `00000000-0000-4000-8000-${Buffer.from(name).toString('hex').padStart(12, '0').slice(-12)}`;
const idOf = (name: string): string => Buffer.from(name).toString('hex').padStart(64, '0');

type PodSpec = {
  readonly annotations?: Readonly<Record<string, string>>;
  readonly node?: string;
  readonly hostNetwork?: boolean;
  readonly phase?: string;
  readonly containers?: readonly string[];
};

function pod(name: string, spec: PodSpec = {}): ApiPod {
  const { annotations = ENABLED, node = NODE, hostNetwork, phase = 'Running', containers = [name] } = spec;
  return {
    metadata: { uid: uidOf(name), name, namespace: 'shop', annotations },
    spec: { nodeName: node, ...(hostNetwork === undefined ? {} : { hostNetwork }) },
    status: {
      phase,
      containerStatuses: containers.map((container) => ({
        containerID: `containerd://${idOf(container)}`,
        state: { running: {} },
      })),
    },
  };
}

class World {
  readonly folder = mkdtempSync(join(tmpdir(), 'detour-kubernetes-'));
  readonly clock = new FakeClock();
  readonly lines: { event: string; workload: unknown; text: unknown }[] = [];
  /** What runs on the node: by the words in its control group. */
  readonly processes = new Map<string, ContainerProcess>();
  refused: string | null = null;
  searches = 0;
  now: readonly Workload[] = [];
  readonly api: FakeKubernetes;
  #provider: Provider | null = null;

  constructor(api: FakeKubernetes) {
    this.api = api;
    writeFileSync(join(this.folder, 'ca.crt'), api.certificate);
    this.giveToken(api.token);
  }

  giveToken(token: string): void {
    writeFileSync(join(this.folder, 'token'), `${token}\n`);
  }

  /** A pod's process appears on the node. */
  run(word: string, namespace: string): void {
    this.processes.set(word, { path: `/proc/${namespace}/ns/net`, namespace });
  }

  start(deadlineMs = DEADLINE_MS): Provider {
    const note: Log['info'] = (event, { workload, complaint, reason }) =>
      this.lines.push({ event, workload, text: complaint ?? reason });
    this.#provider = watchKubernetes({
      pods: podsOf(
        { url: this.api.url, tokenPath: join(this.folder, 'token'), caPath: join(this.folder, 'ca.crt'), node: NODE },
        deadlineMs,
      ),
      processes: {
        find: async (words) => {
          this.searches++;
          const found = [...this.processes].filter(([word]) => words.has(word));
          return { processes: new Map(this.refused === null ? found : []), refused: this.refused };
        },
        holds: (process) => [...this.processes.values()].includes(process),
        pathOf: async () => null,
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

  /** `name@namespace` of all that are told of. */
  shown(): string[] {
    return this.now.map(({ key, name }) => `${name.replace('shop/', '')}@${key.split(' ')[1]}`).sort();
  }

  async stop(): Promise<void> {
    this.#provider?.stop();
    await this.api.shut();
    rmSync(this.folder, { recursive: true, force: true });
  }
}

let world: World;
beforeEach(async () => {
  const api = await FakeKubernetes.make();
  await api.open();
  world = new World(api);
});
afterEach(() => world.stop());

/** Waits until these are told of; searches are soon after whatever leads to them. */
const are = async (...shown: string[]): Promise<void> => {
  await expect
    .poll(async () => {
      await world.clock.advance(1);
      return world.shown();
    }, WAIT)
    .toEqual(shown);
};
const isState = (state: string) => expect.poll(() => world.provider.status().state, WAIT).toBe(state);
const areWatches = (count: number) => expect.poll(() => world.api.watches, WAIT).toBe(count);
/** Starts, and waits until the list is read and the watch stands. */
const watching = async (): Promise<void> => {
  world.start();
  await isState('ok');
  await areWatches(1);
};
/** The pause between two watches, or before the next try. */
const pause = () => world.clock.advance(40_000);

test('annotated pods of this node are told of, where their processes are, and no others', async () => {
  const { api } = world;
  const options = { ...ENABLED, 'detour.dev/strategy': 'nat', 'example.org/big': 'x'.repeat(10_000) };
  api.set(pod('app', { annotations: options }));
  api.set(pod('plain', { annotations: {} }));
  api.set(pod('off', { annotations: { 'detour.dev/enable': 'false' } }));
  api.set(pod('elsewhere', { node: 'node-2' }));
  for (const name of ['app', 'plain', 'off', 'elsewhere']) world.run(idOf(name), `ns-${name}`);
  await watching();
  await are('app@ns-app');
  expect(world.now).toEqual([
    {
      key: `${uidOf('app')} ns-app`,
      name: 'shop/app',
      paths: ['/proc/ns-app/ns/net'],
      groups: [`pod${uidOf('app')}`, `pod${uidOf('app').replaceAll('-', '_')}`, idOf('app')],
      wishes: { targets: null, strategy: { kinds: ['nat'], ordered: true, fallback: false }, mptcp: null },
    },
  ]);
  expect(world.lines).toEqual([]);
  for (const { query, token } of api.asked) {
    expect(query.get('fieldSelector')).toBe(`spec.nodeName=${NODE}`);
    expect(token).toBe('first-token');
  }
  // The first list may come from the server's memory: a thousand nodes that start at once must not all ask the store.
  expect(api.lists.map((query) => query.get('resourceVersion'))).toEqual(['0']);
});

test('they come, change their annotations, and go', async () => {
  const { api } = world;
  await watching();
  world.run(idOf('app'), 'one');
  api.set(pod('app'));
  await are('app@one');
  api.set(pod('app', { annotations: { ...ENABLED, 'detour.dev/targets': '10.0.0.0/8' } }));
  await expect.poll(() => world.now[0]?.wishes.targets?.length, WAIT).toBe(1);
  api.set(pod('app', { annotations: {} }));
  await are();
  api.set(pod('app'));
  await are('app@one');
  api.delete(uidOf('app'));
  await are();
  expect(api.lists).toHaveLength(1);
});

test.each(['Succeeded', 'Failed'])('a pod that has run to its end (%s) goes', async (phase) => {
  world.run(idOf('job'), 'one');
  world.api.set(pod('job'));
  await watching();
  await are('job@one');
  world.api.set(pod('job', { phase }));
  await are();
});

describe('where a pod is', () => {
  test('is found by its uid before its first container runs, and sought ever more rarely until then', async () => {
    await watching();
    world.api.set(pod('app', { phase: 'Pending', containers: [] }));
    await expect.poll(() => world.provider.status().workloads, WAIT).toBe(1);
    await world.clock.advance(10_000);
    expect(world.searches).toBeGreaterThan(10);
    expect(world.searches).toBeLessThan(20);
    const before = world.searches;
    await world.clock.advance(100_000);
    expect(world.searches - before).toBeLessThan(14);
    world.run(uidOf('app'), 'sandbox');
    await world.clock.advance(10_000);
    expect(world.shown()).toEqual(['app@sandbox']);
  });

  test('a container’s id is believed before the uid, which may be left of an older sandbox', async () => {
    world.run(uidOf('app'), 'old');
    world.run(idOf('app'), 'new');
    world.api.set(pod('app'));
    await watching();
    await are('app@new');
  });

  test('its sandbox is made anew: it is another workload', async () => {
    world.run(idOf('app'), 'old');
    world.api.set(pod('app'));
    await watching();
    await are('app@old');
    world.processes.clear();
    world.run(idOf('again'), 'new');
    world.api.set(pod('app', { containers: ['again'] }));
    await are('app@new');
  });

  test('all its processes end without a word of the API: it goes, and comes back with them', async () => {
    world.run(idOf('app'), 'one');
    world.api.set(pod('app'));
    await watching();
    await are('app@one');
    await world.api.shut();
    world.processes.clear();
    await world.clock.advance(10_100);
    expect(world.shown()).toEqual([]);
    world.run(idOf('app'), 'two');
    await world.clock.advance(10_000);
    expect(world.shown()).toEqual(['app@two']);
  });

  test('one process of several ends: nothing happens', async () => {
    world.run(idOf('app'), 'one');
    world.api.set(pod('app'));
    await watching();
    await are('app@one');
    let changes = 0;
    const { now } = world;
    Object.defineProperty(world, 'now', {
      get: () => now,
      set: (next: readonly Workload[]) => {
        changes++;
        expect(next.map(({ key }) => key)).toEqual(now.map(({ key }) => key));
      },
    });
    world.run(idOf('app'), 'one');
    await world.clock.advance(10_100);
    expect(changes).toBe(1);
  });

  test('cannot be found although its containers run: it is named, once', async () => {
    world.api.set(pod('app'));
    world.api.set(pod('pending', { containers: [] }));
    await watching();
    await world.clock.advance(25_000);
    expect(world.lines).toEqual([]);
    await world.clock.advance(60_000);
    expect(world.lines).toEqual([{ event: 'pod-not-found', workload: 'shop/app', text: undefined }]);
  });

  test('may not be looked at: it says so, once, with the remedy', async () => {
    world.refused = 'needs CAP_SYS_PTRACE';
    world.api.set(pod('app'));
    world.run(idOf('app'), 'one');
    world.start();
    await areWatches(1);
    await world.clock.advance(60_000);
    expect(world.provider.status()).toEqual({
      provider: 'kubernetes',
      state: 'failing',
      workloads: 1,
      why: 'needs CAP_SYS_PTRACE',
    });
    expect(world.lines).toEqual([{ event: 'pods-unseen', workload: undefined, text: 'needs CAP_SYS_PTRACE' }]);
    world.refused = null;
    await world.clock.advance(10_000);
    expect(world.shown()).toEqual(['app@one']);
    expect(world.provider.status()).toMatchObject({ state: 'ok', why: null });
  });
});

test('annotations with nonsense are named once for each wording, and touch nobody else', async () => {
  const { api } = world;
  api.set(pod('odd', { annotations: { ...ENABLED, 'detour.dev/mptcp': 'perhaps' } }));
  api.set(pod('good'));
  for (const name of ['odd', 'good']) world.run(idOf(name), name);
  await watching();
  await are('good@good', 'odd@odd');
  const complaint = {
    event: 'workload-annotation',
    workload: 'shop/odd',
    text: 'detour.dev/mptcp="perhaps": must be on or off',
  };
  expect(world.lines).toEqual([complaint]);
  api.set(pod('odd', { annotations: { ...ENABLED, 'detour.dev/mptcp': 'perhaps' }, containers: ['odd', 'more'] }));
  api.set(pod('odd', { annotations: { ...ENABLED, 'detour.dev/mptcp': 'never' } }));
  await expect.poll(() => world.lines.length, WAIT).toBe(2);
  expect(world.lines[1]?.text).toBe('detour.dev/mptcp="never": must be on or off');
});

test('a pod on the host’s network is never served for its own sake', async () => {
  world.api.set(pod('hosted', { hostNetwork: true }));
  world.run(idOf('hosted'), 'host');
  await watching();
  await world.clock.advance(60_000);
  expect(world.shown()).toEqual([]);
  expect(world.lines).toEqual([
    {
      event: 'workload-annotation',
      workload: 'shop/hosted',
      text: "it uses the host's network: DETOUR_PROVIDERS=host serves that",
    },
  ]);
});

describe('watches', () => {
  test('end after their time, and go on from where they were', async () => {
    const { api } = world;
    world.run(idOf('app'), 'one');
    world.run(idOf('other'), 'two');
    api.set(pod('app'));
    await watching();
    await are('app@one');
    api.endWatches();
    await areWatches(0);
    api.delete(uidOf('app'));
    api.set(pod('other'));
    await pause();
    await are('other@two');
    expect(api.lists).toHaveLength(1);
    expect(world.lines).toEqual([]);
  });

  test('that are cut are no failure: the next one has what is missing', async () => {
    const { api } = world;
    world.run(idOf('app'), 'one');
    await watching();
    api.endWatches('cut');
    api.set(pod('app'));
    await pause();
    await are('app@one');
    expect(api.lists).toHaveLength(1);
    expect(world.lines).toEqual([]);
  });

  test('learn by bookmarks how far they have come, so that little has to be remembered for them', async () => {
    const { api } = world;
    await watching();
    for (let change = 0; change < 1_000; change++) api.passTime();
    api.bookmark();
    api.forget();
    api.endWatches();
    await areWatches(0);
    await pause();
    await areWatches(1);
    expect(api.asked.at(-1)?.query.get('resourceVersion')).toBe('1100');
    expect(api.lists).toHaveLength(1);
  });

  test('that end at once are not asked for all the time', async () => {
    const { api } = world;
    await watching();
    const before = api.asked.length;
    for (let tenth = 0; tenth < 200; tenth++) {
      api.endWatches();
      await world.clock.advance(100);
    }
    expect(api.asked.length - before).toBeGreaterThan(10);
    expect(api.asked.length - before).toBeLessThanOrEqual(20);
  });

  test.each([
    ['is answered with 410', (api: FakeKubernetes) => api.endWatches()],
    [
      'gets 410 as an event',
      (api: FakeKubernetes) =>
        api.say({ type: 'ERROR', object: statusOf(410, 'Expired', 'too old resource version: 101 (203)') }),
    ],
  ])('whose version is forgotten: it %s, and the list is read anew', async (_, end) => {
    const { api } = world;
    for (const name of ['stays', 'goes']) {
      world.run(idOf(name), name);
      api.set(pod(name));
    }
    await watching();
    await are('goes@goes', 'stays@stays');
    // What happens now reaches nobody, and will not be told again.
    await api.shut();
    await pause();
    await isState('failing');
    api.delete(uidOf('goes'));
    api.set(pod('comes'));
    world.run(idOf('comes'), 'comes');
    api.passTime();
    api.forget();
    await api.open();
    await pause();
    await are('comes@comes', 'stays@stays');
    const lists = api.lists.length;
    // What the server remembers may be older than what we know: this time it has to ask its store.
    expect(api.lists.at(-1)?.get('resourceVersion')).toBeNull();
    await areWatches(1);
    api.passTime();
    api.forget();
    end(api);
    await pause();
    await expect.poll(() => api.lists.length, WAIT).toBe(lists + 1);
    await areWatches(1);
    expect(world.provider.status().state).toBe('ok');
  });

  test.each([
    [
      'an error',
      { type: 'ERROR', object: statusOf(500, 'InternalError', 'etcdserver: request timed out') },
      /status 500/,
    ],
    ['what is no JSON', 'garbage', /no JSON/],
  ])('with %s: the list is read anew after a pause', async (_, line, why) => {
    const { api } = world;
    world.run(idOf('app'), 'one');
    api.set(pod('app'));
    await watching();
    await are('app@one');
    api.say(line);
    await isState('failing');
    expect(world.provider.status().why).toMatch(why);
    expect(world.shown()).toEqual(['app@one']);
    await pause();
    await isState('ok');
    expect(api.lists).toHaveLength(2);
  });
});

describe('lists', () => {
  const fill = (api: FakeKubernetes): void => {
    for (let index = 0; index < 250; index++)
      api.set(pod(`p${index}`, { annotations: index % 100 === 0 ? ENABLED : {} }));
    for (let index = 0; index < 250; index += 100) world.run(idOf(`p${index}`), `${index}`);
  };

  test('are read page by page', async () => {
    const { api } = world;
    fill(api);
    await watching();
    await are('p0@0', 'p100@100', 'p200@200');
    api.forget();
    api.passTime();
    api.forget();
    api.endWatches();
    await pause();
    await expect.poll(() => api.lists.length, WAIT).toBe(4);
    expect(api.lists.slice(1).map((query) => query.get('limit'))).toEqual(['100', '100', '100']);
    expect(api.lists.slice(1).map((query) => query.has('continue'))).toEqual([false, true, true]);
    await areWatches(1);
    expect(world.shown()).toEqual(['p0@0', 'p100@100', 'p200@200']);
  });

  test('that are forgotten between two pages begin again', async () => {
    const { api } = world;
    fill(api);
    await watching();
    api.passTime();
    api.forget({ lists: true });
    api.endWatches();
    await pause();
    await expect.poll(() => api.lists.length, WAIT).toBe(6);
    expect(api.lists.slice(1).map((query) => query.has('continue'))).toEqual([false, true, false, true, true]);
    await areWatches(1);
    expect(world.lines).toEqual([]);
    expect(world.shown()).toEqual(['p0@0', 'p100@100', 'p200@200']);
  });
});

describe('an API server that is away', () => {
  test('is tried with ever longer pauses and named in one line; what is known stays', async () => {
    const { api } = world;
    world.run(idOf('app'), 'one');
    api.set(pod('app'));
    await watching();
    await are('app@one');
    api.manners = () => ({ status: 503, reason: 'ServiceUnavailable', message: 'apiserver not ready' });
    api.endWatches('cut');
    const before = api.asked.length;
    // Time goes on only when an answer is there, as it would in a second of a real clock.
    for (let second = 0; second < 300; second++) {
      const asked = api.asked.length;
      await world.clock.advance(1_000);
      if (api.asked.length > asked) await isState('failing');
    }
    // 0.5, 1, 2, ... 30 s, each a fifth more or less.
    expect(api.asked.length - before).toBeGreaterThan(10);
    expect(api.asked.length - before).toBeLessThan(25);
    expect(world.provider.status()).toEqual({
      provider: 'kubernetes',
      state: 'failing',
      workloads: 1,
      why: 'the API server answers with status 503: apiserver not ready',
    });
    expect(world.shown()).toEqual(['app@one']);
    expect(world.lines.map(({ event }) => event)).toEqual(['provider-failing']);
    api.manners = () => 'answers';
    await pause();
    await isState('ok');
    expect(world.lines.map(({ event }) => event)).toEqual(['provider-failing', 'provider-back']);
    // The next time it begins with short pauses again.
    api.manners = () => ({ status: 503, reason: 'ServiceUnavailable', message: 'apiserver not ready' });
    const asked = api.asked.length;
    api.endWatches('cut');
    for (let tenth = 0; tenth < 30; tenth++) await world.clock.advance(100);
    await expect.poll(() => api.asked.length - asked, WAIT).toBeGreaterThanOrEqual(3);
  });

  test('for a while: it goes on from where it was, deletions included', async () => {
    const { api } = world;
    for (const name of ['stays', 'goes']) {
      world.run(idOf(name), name);
      api.set(pod(name));
    }
    await watching();
    await are('goes@goes', 'stays@stays');
    await api.shut();
    await pause();
    await isState('failing');
    expect(world.provider.status().why).toMatch(/^the API server does not answer: ECONNREFUSED/);
    api.delete(uidOf('goes'));
    await api.open();
    await pause();
    await are('stays@stays');
    expect(api.lists).toHaveLength(1);
  });

  test.each([
    ['is silent', /does not answer: no answer in time/],
    ['breaks off', /broke off in the middle of its answer/],
  ] as const)('in spirit: it %s', async (manners, why) => {
    world.api.manners = () => manners;
    world.start(SHORT_MS);
    await isState('failing');
    expect(world.provider.status().why).toMatch(why);
    world.api.manners = () => 'answers';
    await pause();
    await isState('ok');
  });

  test('or somebody else in its place: without the cluster’s certificate it is not told the token', async () => {
    const { api } = world;
    const impostor = await FakeKubernetes.make();
    writeFileSync(join(world.folder, 'ca.crt'), impostor.certificate);
    world.start();
    await isState('failing');
    expect(world.provider.status().why).toMatch(/^the API server does not answer: \w*CERT/);
    expect(api.asked).toEqual([]);
  });
});

describe('who may not ask', () => {
  test('hears that its token is not accepted', async () => {
    world.giveToken('nobody');
    world.start();
    await isState('failing');
    expect(world.provider.status().why).toBe('the API server does not accept the token of this service account');
  });

  test('hears which right is missing', async () => {
    const message =
      'pods is forbidden: User "system:serviceaccount:detour:detour" cannot list resource "pods" in API group "" at the cluster scope';
    world.api.manners = () => ({ status: 403, reason: 'Forbidden', message });
    world.start();
    await isState('failing');
    expect(world.provider.status().why).toBe(
      `the service account may not list and watch pods of node ${NODE} (apply k8s/overlays/pods/rbac.yaml): ${message}`,
    );
  });

  test('hears that no account is mounted', async () => {
    rmSync(join(world.folder, 'token'));
    world.start();
    await isState('failing');
    expect(world.provider.status().why).toBe(
      'no service account is mounted here (ENOENT): set automountServiceAccountToken: true in the pod',
    );
  });

  test('asks with the new token when its old one was replaced', async () => {
    const { api } = world;
    await watching();
    api.token = 'second-token';
    world.giveToken('second-token');
    api.endWatches();
    await pause();
    await areWatches(1);
    expect(api.asked.at(-1)?.token).toBe('second-token');
    expect(world.provider.status().state).toBe('ok');
    expect(world.lines).toEqual([]);
  });
});

describe('10,000 pods', () => {
  /** More than a node runs. */
  const ASKING = 500;
  beforeAll(() => setFlagsFromString('--expose-gc'));

  test('leave behind what is kept of those that asked', async () => {
    const { api } = world;
    const collect = runInNewContext('gc') as () => void;
    // 100 MB as text, of which the server itself keeps one copy for all.
    const annotations = { 'example.org/last-applied': 'x'.repeat(10_000) };
    for (let index = 0; index < 10_000; index++)
      api.set(pod(`p${index}`, { annotations: index < ASKING ? { ...annotations, ...ENABLED } : annotations }));
    for (let index = 0; index < ASKING; index++) world.run(idOf(`p${index}`), `${index}`);
    api.forget();
    collect();
    const before = process.memoryUsage().heapUsed;
    // Nobody has a version yet that it could remember, so the first list would come in one piece.
    api.paged = true;
    world.start();
    await expect.poll(() => world.provider.status().state, { timeout: 30_000 }).toBe('ok');
    await expect.poll(() => world.clock.advance(1).then(() => world.now.length), WAIT).toBe(ASKING);
    expect(api.lists).toHaveLength(100);
    api.asked.length = 0;
    collect();
    expect((process.memoryUsage().heapUsed - before) / 2 ** 20).toBeLessThan(2);
  });
});

test('who stops hears no more, and leaves no watch open', async () => {
  await watching();
  world.provider.stop();
  await areWatches(0);
  world.run(idOf('app'), 'one');
  world.api.set(pod('app'));
  await world.clock.advance(300_000);
  expect(world.shown()).toEqual([]);
});
