import { execFile } from 'node:child_process';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Running, requireRoot } from '../lab/netns.ts';
import { expectedSha256, type TransferResult } from '../lab/traffic.ts';
import { ClusterWorld, DETOUR, ENABLED, isReady, NAMESPACE, podManifest } from './world.ts';

/** k8s/detour-client.yaml on two nodes, installed as docs/kubernetes.md says. */

const run = promisify(execFile);

const SOME = 10_000_000;
/** Minutes, while the ways are slow. */
const MUCH = 40_000_000;

/** How requests to the API end for the agent's service account, by their method and path. */
const ASK = `
  const { readFileSync } = require('node:fs');
  const token = readFileSync('/var/run/secrets/kubernetes.io/serviceaccount/token', 'utf8');
  const { KUBERNETES_SERVICE_HOST: host, KUBERNETES_SERVICE_PORT: port } = process.env;
  (async () => {
    const statuses = {};
    for (const request of JSON.parse(process.argv[1])) {
      const [method, path, body] = request.split(' ');
      const headers = { authorization: 'Bearer ' + token, 'content-type': 'application/json' };
      const answer = await fetch('https://' + host + ':' + port + path, { method, headers, body });
      statuses[request] = answer.status;
      await answer.body?.cancel();
    }
    console.log(JSON.stringify(statuses));
  })();
`;
const POD = `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"x"},"spec":{"containers":[{"name":"x","image":"x"}]}}`;

describe.runIf(requireRoot('tests in a Kubernetes cluster'))('the agent of every node', () => {
  const scope = new AsyncDisposableStack();
  let world: ClusterWorld;
  let router: Running;
  /** What the agent could change, as it was before there was one. */
  let before: Record<string, string>;

  beforeAll(async () => {
    world = scope.use(await ClusterWorld.create('daemonset'));
    router = await world.startRouter();
    const [one, two] = world.nodes;
    for (const manifest of [
      podManifest('served1', one, ENABLED),
      podManifest('served2', two, ENABLED),
      podManifest('plain1', one),
    ])
      await world.cluster.apply(manifest);
    await world.cluster.kubectl(['wait', 'pod', '--all', '--for=condition=Ready', '--timeout=60s']);
    before = await state();
    await world.cluster.apply(await world.invitation());
    await world.apply('detour-client.yaml');
    await world.rolledOut();
  });
  afterAll(() => scope.disposeAsync());

  /** Runs a program of this machine in the network of a pod. */
  async function within(pod: string, ...command: readonly string[]): Promise<string> {
    const { stdout } = await run('nsenter', [`--net=${await world.cluster.podNetns(pod)}`, ...command]);
    return stdout.trim();
  }

  const pathManagerOf = (pod: string): Promise<string> => within(pod, 'cat', '/proc/sys/net/mptcp/path_manager');

  /** What the agent could change in a network namespace. */
  async function state(): Promise<Record<string, string>> {
    const look = [
      'sh',
      '-c',
      'sysctl --all --pattern "^net[.]mptcp" | sort; ip mptcp limits; nft --stateless list ruleset',
    ];
    return {
      served1: await within('served1', ...look),
      plain1: await within('plain1', ...look),
      node1: await world.nodes[0].host.exec(look),
      node2: await world.nodes[1].host.exec(look),
    };
  }

  /** Bytes of a transfer by the way they came. */
  function shares({ paths }: TransferResult): { direct: number; detour: number } {
    const of = (wanted: boolean): number =>
      paths.reduce((sum, { remote, bytes }) => ((remote === DETOUR) === wanted ? sum + bytes : sum), 0);
    return { direct: of(false), detour: of(true) };
  }

  function isWhole(result: TransferResult, bytes: number): void {
    expect(result).toMatchObject({ mptcp: true, sha256: expectedSha256('detour', bytes) });
  }

  /** Waits until a pod has a connection with a path through the detour that carries something. */
  const carries = (pod: string, node = world.nodes[0]): Promise<unknown> =>
    world.cluster.waitFor(`a path of ${pod} through the detour`, async () => {
      const { connections } = await world.status(node);
      return connections.some(
        ({ workload, paths }) =>
          workload === `default/${pod}` &&
          paths.some(({ kind, state, deliveredBytes }) => kind === 'nat' && state === 'active' && deliveredBytes > 0),
      );
    });

  /** What an agent has logged about pods: the event, and of which pod. */
  async function logged(event: string, node = world.nodes[0]): Promise<{ workload: string; complaint?: string }[]> {
    const text = await world.cluster.logs(await world.agentOf(node));
    // Kubelets and engines put words of their own between the lines now and then.
    const lines = text.split('\n').filter((line) => line.startsWith('{'));
    return lines.map((line) => JSON.parse(line)).filter((entry) => entry.event === event);
  }

  it('rolls out on both, and serves the pods there that ask for it', async () => {
    const [one, two] = world.nodes;
    expect(Object.keys(await world.pods('detour-client')).sort()).toEqual(['node1', 'node2']);
    const served = await world.served(one, 'default/served1');
    expect(served.workloads.map(({ name }) => name)).toEqual(['default/served1']);
    expect((await world.served(two, 'default/served2')).workloads).toHaveLength(1);
    expect(await pathManagerOf('served1')).toBe('userspace');
  });

  it('gives a transfer of theirs a path through the detour', async () => {
    const result = await world.transfer('served2', SOME);
    isWhole(result, SOME);
    expect(shares(result).detour).toBeGreaterThan(SOME / 10);
  });

  it('leaves other pods, and the nodes, as they were', async () => {
    const result = await world.transfer('plain1', 1_000_000);
    isWhole(result, 1_000_000);
    expect(shares(result).detour).toBe(0);
    const { served1, ...others } = await state();
    const { served1: _, ...were } = before;
    expect(others).toEqual(were);
    expect(served1).not.toBe(before['served1']);
  });

  it('answers `kubectl exec`: status and doctor', async () => {
    const agent = await world.agentOf(world.nodes[0]);
    const status = await world.inside(agent, 'detour', 'status');
    expect(status).toMatch(/default\/served1 +served/);
    const doctor = await world.inside(agent, 'detour', 'doctor');
    expect(doctor).toMatch(/ok +enter/);
    expect(doctor).toContain(' 0 to look at, 0 failed');
  });

  it('serves a pod while it has the annotation', async () => {
    const [one] = world.nodes;
    await world.cluster.kubectl(['annotate', 'pod', 'plain1', 'detour.dev/enable=true']);
    await world.served(one, 'default/plain1');
    expect(await pathManagerOf('plain1')).toBe('userspace');
    expect(shares(await world.transfer('plain1', SOME)).detour).toBeGreaterThan(0);
    await world.cluster.kubectl(['annotate', 'pod', 'plain1', 'detour.dev/enable-']);
    await world.workload(one, 'default/plain1', 'left alone', (workload) => workload === undefined);
    await world.cluster.waitFor('its path manager', async () => (await pathManagerOf('plain1')) === 'kernel');
    expect((await state())['plain1']).toBe(before['plain1']);
  });

  it('names annotations that mean nothing, at their pod and at no other', async () => {
    const [one] = world.nodes;
    await world.cluster.apply(podManifest('odd1', one, { 'detour.dev/enable': 'perhaps' }));
    await world.cluster.apply(
      podManifest('odd2', one, { ...ENABLED, 'detour.dev/targets': 'the moon', 'detour.dev/colour': 'blue' }),
    );
    // What is not understood counts as not said.
    await world.served(one, 'default/odd2');
    const complaints = await world.cluster.waitFor('three warnings', async () => {
      const found = await logged('workload-annotation');
      return found.length >= 3 && found;
    });
    const named = ({ workload, complaint = '' }: (typeof complaints)[number]): string =>
      `${workload} ${/detour\.dev\/\w+/.exec(complaint)?.[0]}`;
    expect(complaints.map(named).sort()).toEqual([
      'default/odd1 detour.dev/enable',
      'default/odd2 detour.dev/colour',
      'default/odd2 detour.dev/targets',
    ]);
    const { workloads } = await world.status(one);
    expect(workloads.map(({ name, state }) => `${name} ${state}`).sort()).toEqual([
      'default/odd2 served',
      'default/served1 served',
    ]);
    await world.cluster.kubectl(['delete', 'pod', 'odd1', 'odd2']);
    await world.workload(one, 'default/odd2', 'gone', (workload) => workload === undefined);
  });

  it('lets go of a pod that is killed, and serves it in its next network', async () => {
    const [one] = world.nodes;
    await world.cluster.apply(podManifest('brief', one, ENABLED));
    await world.served(one, 'default/brief');
    const network = await world.cluster.podNetns('brief');
    await world.cluster.kubectl(['delete', 'pod', 'brief', '--grace-period=0', '--force']);
    await world.cluster.apply(podManifest('brief', one, ENABLED));
    await world.cluster.kubectl(['wait', 'pod', 'brief', '--for=condition=Ready', '--timeout=60s']);
    // Both pods have one name: the status may tell of the first yet, and its sandbox may be there yet.
    await world.cluster.waitFor(
      'its next network to be served',
      async () => (await world.cluster.podNetns('brief')) !== network && (await pathManagerOf('brief')) === 'userspace',
    );
    await world.served(one, 'default/brief');
    await world.cluster.kubectl(['delete', 'pod', 'brief']);
  });

  it('may ask the API for pods, and for nothing else', async () => {
    const agent = await world.agentOf(world.nodes[0]);
    const allowed = ['GET /api/v1/pods?limit=1', 'GET /api/v1/pods?watch=true&timeoutSeconds=1'];
    const refused = [
      'GET /api/v1/secrets',
      `GET /api/v1/namespaces/${NAMESPACE}/secrets/detour-client`,
      `GET /api/v1/namespaces/${NAMESPACE}/configmaps/detour-client`,
      'GET /api/v1/nodes',
      'GET /api/v1/nodes/node1/proxy/pods',
      'GET /api/v1/services',
      // One pod by its name is another verb.
      'GET /api/v1/namespaces/default/pods/served1',
      'GET /api/v1/namespaces/default/pods/served1/log',
      `POST /api/v1/namespaces/${NAMESPACE}/pods ${POD}`,
      'POST /api/v1/namespaces/default/pods/served1/exec?command=id',
      'DELETE /api/v1/namespaces/default/pods/served1',
      'PUT /api/v1/namespaces/default/pods/served1/status {}',
      'GET /apis/apps/v1/daemonsets',
      'GET /apis/rbac.authorization.k8s.io/v1/clusterroles',
    ];
    const ca = '/var/run/secrets/kubernetes.io/serviceaccount/ca.crt';
    const script = ['env', `NODE_EXTRA_CA_CERTS=${ca}`, 'node', '--eval', ASK];
    const statuses = JSON.parse(await world.inside(agent, ...script, JSON.stringify([...allowed, ...refused])));
    expect(statuses).toEqual({
      ...Object.fromEntries(allowed.map((request) => [request, 200])),
      ...Object.fromEntries(refused.map((request) => [request, 403])),
    });
  });

  it('has its key as a file that root alone reads, and shows it nowhere', async () => {
    const [one] = world.nodes;
    const agent = await world.agentOf(one);
    expect(await world.inside(agent, 'stat', '--dereference', '--format=%a %u', '/etc/detour/secret/key')).toBe(
      '400 0',
    );
    const [id = '', secret = ''] = world.key.split(':');
    const shown = [
      await world.inside(agent, 'detour', 'config', 'print', 'client'),
      await world.inside(agent, 'sh', '-c', 'cat /proc/*/environ | tr "\\0" "\\n"'),
      await world.cluster.logs(agent),
      await world.cluster.kubectl(['-n', NAMESPACE, 'get', 'pods,daemonsets,configmaps', '-o', 'yaml']),
    ].join('\n');
    expect(shown).toContain(`${id}:***`);
    expect(shown).not.toContain(secret);
  });

  it('is updated in the middle of a transfer, which arrives whole and is adopted', async () => {
    const [one] = world.nodes;
    const agent = await world.agentOf(one);
    const transfer = world.transfer('served1', MUCH);
    await world.whileSlow(async () => {
      await carries('served1');
      await world.cluster.kubectl(['-n', NAMESPACE, 'rollout', 'restart', 'daemonset/detour-client']);
      await world.rolledOut();
      expect(await world.agentOf(one)).not.toBe(agent);
      await carries('served1');
    });
    const result = await transfer;
    isWhole(result, MUCH);
    // The path that was there before is the one that is there now: none was made twice.
    expect(result.paths.filter(({ remote }) => remote === DETOUR)).toHaveLength(1);
    expect(shares(result).detour).toBeGreaterThan(0);
  });

  it('is not ready while no detour answers, and is not restarted for it', async () => {
    const [one] = world.nodes;
    const uid = (await world.pods('detour-client'))['node1']?.metadata.uid;
    const agent = async (): Promise<{ ready: boolean; restarts: number }> => {
      const pod = (await world.pods('detour-client'))['node1'];
      expect(pod?.metadata.uid).toBe(uid);
      return {
        ready: pod !== undefined && isReady(pod),
        restarts: pod?.status.containerStatuses?.[0]?.restartCount ?? -1,
      };
    };
    expect(await agent()).toEqual({ ready: true, restarts: 0 });
    await router.stop('SIGKILL');
    await world.cluster.waitFor('the agent to be unready', async () => !(await agent()).ready, 120_000);
    const name = await world.agentOf(one);
    expect((await world.cluster.exec(name, 'detour', 'healthcheck')).code).toBe(0);
    expect((await world.cluster.exec(name, 'detour', 'healthcheck', '--ready')).code).toBe(1);
    expect((await world.status(one)).reasons.join()).toContain('vps');
    router = await world.startRouter();
    await world.cluster.waitFor('the agent to be ready', async () => (await agent()).ready, 120_000);
    expect((await agent()).restarts).toBe(0);
  });

  it('says what it lacks when the API refuses it, and goes on when it does no more', async () => {
    const [one] = world.nodes;
    await world.cluster.kubectl(['delete', 'clusterrolebinding', 'detour-client']);
    await world.cluster.kubectl(['-n', NAMESPACE, 'delete', 'pod', (await world.agentOf(one)).split('/')[1] ?? '']);
    const refused = await world.cluster.waitFor('the refusal', async () => {
      const status = await world.status(one);
      return status.providers[0]?.state === 'failing' && status;
    });
    expect(refused).toMatchObject({ ready: false, workloads: [] });
    expect(refused.providers[0]?.why).toContain('k8s/overlays/pods/rbac.yaml');
    await world.apply('detour-client.yaml');
    await world.served(one, 'default/served1');
    await world.rolledOut();
  });

  it('does not notice the loss of another node, whose pods are served again when it is back', async () => {
    const [one, two] = world.nodes;
    const agent = await world.agentOf(one);
    const transfer = world.transfer('served1', MUCH);
    await world.whileSlow(async () => {
      await carries('served1');
      await two.powerOff();
      await world.cluster.nodeIs(two, 'lost');
      await carries('served1');
    });
    const result = await transfer;
    isWhole(result, MUCH);
    expect(shares(result).detour).toBeGreaterThan(0);
    expect(await world.agentOf(one)).toBe(agent);

    await two.powerOn();
    await world.cluster.nodeIs(two, 'ready');
    await world.cluster.kubectl(['wait', 'pod', 'served2', '--for=condition=Ready', '--timeout=100s']);
    await world.served(two, 'default/served2');
    const after = await world.transfer('served2', SOME);
    isWhole(after, SOME);
    expect(shares(after).detour).toBeGreaterThan(0);
  });

  it('stays on a node that is drained, and lets go of the pods that leave', async () => {
    const [, two] = world.nodes;
    const agent = await world.agentOf(two);
    await world.cluster.kubectl([
      'drain',
      'node2',
      '--ignore-daemonsets',
      '--delete-emptydir-data',
      '--force',
      '--timeout=60s',
    ]);
    await world.workload(two, 'default/served2', 'gone', (workload) => workload === undefined);
    expect(await world.agentOf(two)).toBe(agent);
    await world.cluster.kubectl(['uncordon', 'node2']);
    expect(await logged('crashed', two)).toEqual([]);
  });

  it('leaves every namespace as it found it when it is uninstalled, and a transfer alone', async () => {
    const transfer = world.transfer('served1', MUCH);
    await world.whileSlow(async () => {
      await carries('served1');
      await world.delete('detour-client.yaml');
      expect(await state()).toEqual(before);
    });
    isWhole(await transfer, MUCH);
  });
});
