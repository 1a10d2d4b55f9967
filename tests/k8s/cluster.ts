/**
 * Real Kubernetes clusters on hosts of a lab: a control plane and nodes, each with its own engine and kubelet. A node is joined to
 * the control plane, and through it to the other nodes; how it reaches the rest of the lab is up to the test.
 *
 *     await using lab = await Lab.create('name');
 *     await using cluster = await Cluster.create(lab, { nodes: 2 });
 *     for (const { host } of cluster.nodes) await lab.link(host, gateway, { v4: ... });
 *
 *     control 10.96.0.1 --- 10.97.1.2 node1 --- its pods, 10.98.1.0/24
 *                      \--- 10.97.2.2 node2 --- its pods, 10.98.2.0/24
 *
 * This is Kubernetes 1.20, as tests/lab/cluster.sh brings it. Pods leave the cluster with their node's address. There is no
 * kube-proxy: a Service's name leads to its pods (names.ts), its own address nowhere, except for that of the API.
 */
import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Engine, engine, type Output } from '../containers/engine.ts';
import { type Host, type Lab, LabError } from '../lab/netns.ts';
import { ControlPlane } from './control.ts';
import { Names } from './names.ts';
import { CLUSTER_NETWORK, ClusterNode } from './node.ts';
import { Programs } from './programs.ts';

const READY_DEADLINE_MS = 90_000;
const DEFAULT_DEADLINE_MS = 60_000;
/** What the API says of a pod whose service account the controllers have not got round to. */
const ACCOUNT_IS_NEW = /No API token found for service account|serviceaccount "\S+" not found/;
const EVENTS_IN_ERROR = 10;

/** What of the API's objects is looked at here. */
type List<T> = { readonly items: readonly T[] };
type Node = {
  readonly metadata: { readonly name: string };
  readonly status: { readonly conditions?: readonly { readonly type: string; readonly status: string }[] };
};
type Pod = {
  readonly metadata: { readonly namespace: string; readonly name: string };
  readonly spec: { readonly nodeName?: string };
  readonly status: { readonly phase: string };
};
type Event = {
  readonly involvedObject: { readonly kind: string; readonly namespace?: string; readonly name: string };
  readonly reason: string;
  readonly message: string;
  readonly lastTimestamp: string | null;
};

export class Cluster implements AsyncDisposable {
  readonly nodes: readonly ClusterNode[];
  readonly #plane: ControlPlane;
  readonly #programs: Programs;
  readonly #source: Engine;
  readonly #scope: AsyncDisposableStack;

  private constructor(
    nodes: readonly ClusterNode[],
    plane: ControlPlane,
    programs: Programs,
    source: Engine,
    scope: AsyncDisposableStack,
  ) {
    this.nodes = nodes;
    this.#plane = plane;
    this.#programs = programs;
    this.#source = source;
    this.#scope = scope;
  }

  /**
   * Makes a cluster whose nodes are ready, of the lab's hosts `control`, `node1`, `node2` and so on. Every engine has the image
   * `detour-lab:dev` (Debian, Node and /lab/traffic.ts), and `images`, as the engine of this test run has them. Dispose of it
   * before the lab. Needs root.
   */
  static async create(
    lab: Lab,
    options: { readonly nodes: number; readonly images?: readonly string[] },
  ): Promise<Cluster> {
    const scope = new AsyncDisposableStack();
    try {
      const source = await engine();
      const folder = mkdtempSync(join(tmpdir(), 'detour-cluster-'));
      scope.defer(() => rmSync(folder, { recursive: true }));
      const programs = scope.adopt(new Programs(), (all) => all.endAll());
      const control = await lab.host('control');
      await control.forward();
      const names = Array.from({ length: options.nodes }, (_, index) => `node${index + 1}`);
      const plane = new ControlPlane(control, folder, programs, names);
      const bring = async (name: string, index: number): Promise<ClusterNode> => {
        const host = await lab.host(name);
        const pods = `10.98.${index + 1}`;
        const { a, b } = await lab.link(control, host, { v4: `10.97.${index + 1}.0/30` });
        if (a.v4 === undefined || b.v4 === undefined) throw new Error('the link was given addresses');
        await host.route(`${CLUSTER_NETWORK} via ${a.v4}`);
        await control.route(`${pods}.0/24 via ${b.v4}`);
        const files = join(folder, name);
        mkdirSync(files);
        const kubeconfig = plane.kubeconfig(`system:node:${name}`);
        const plan = { name, host, address: b.v4, pods: `${pods}.1/24`, folder: files, kubeconfig };
        return scope.use(await ClusterNode.bring(plan, programs, source, options.images ?? []));
      };
      const [nodes] = await all([all(names.map(bring)), plane.start()]);
      scope.use(await Names.start(plane, programs, folder));
      await all(nodes.map((node) => node.join()));
      const cluster = new Cluster(nodes, plane, programs, source, scope);
      await cluster.#complete();
      return cluster;
    } catch (error) {
      await scope.disposeAsync();
      throw error;
    }
  }

  /** The host of the control plane. */
  get control(): Host {
    return this.#plane.host;
  }

  /** Runs kubectl as administrator, and returns what it printed. Throws a LabError when it fails or takes two minutes. */
  async kubectl(args: readonly string[], options: { readonly input?: string } = {}): Promise<string> {
    const result = await this.#plane.kubectl(args, options.input);
    if (result.code !== 0) throw new LabError('control', ['kubectl', ...args], result);
    return result.stdout;
  }

  /** `kubectl apply` of one or more objects, as YAML or JSON. */
  async apply(manifest: string): Promise<void> {
    const outcome = await this.waitFor('the service accounts of the new pods', async () => {
      const result = await this.#plane.kubectl(['apply', '--filename', '-'], manifest);
      if (result.code === 0) return 'applied';
      return ACCOUNT_IS_NEW.test(result.stderr) ? false : new LabError('control', ['kubectl', 'apply'], result);
    });
    if (outcome instanceof LabError) throw outcome;
  }

  /** What the API answers the administrator to a GET, such as `/api/v1/nodes`. Throws when that is not 200. */
  get<T>(path: string): Promise<T> {
    return this.#plane.get(path);
  }

  /**
   * Calls `probe` until it returns something other than false, null or undefined, and returns that. Fails when the time is over, and
   * at once when a program of the cluster has ended: with the last lines of the logs, and what became of pods.
   */
  async waitFor<T>(
    what: string,
    probe: () => T | Promise<T>,
    deadlineMs = DEFAULT_DEADLINE_MS,
  ): Promise<Exclude<T, false | null | undefined>> {
    try {
      return await this.#programs.waitFor(what, probe, deadlineMs);
    } catch (error) {
      throw new Error(`${error instanceof Error ? error.message : error}\n${await this.#situation()}`);
    }
  }

  /** Waits until the API takes that node for ready, or for lost. */
  async nodeIs({ name }: ClusterNode, state: 'ready' | 'lost'): Promise<void> {
    await this.waitFor(`${name} to be ${state}`, async () => {
      return isReady(await this.get<Node>(`/api/v1/nodes/${name}`)) === (state === 'ready');
    });
  }

  /** Copies an image of this test run's engine into those of all nodes. */
  async load(image: string): Promise<void> {
    for (const node of this.nodes) await node.engine.load(image, this.#source);
  }

  /** Runs a command in the first container of a pod, `NAME` or `NAMESPACE/NAME`. It may fail; the caller looks at `code`. */
  exec(pod: string, ...command: readonly string[]): Promise<Output> {
    const { namespace, name } = reference(pod);
    return this.#plane.kubectl(['exec', `--namespace=${namespace}`, name, '--', ...command]);
  }

  /** What the containers of a pod have printed. */
  logs(pod: string): Promise<string> {
    const { namespace, name } = reference(pod);
    return this.kubectl(['logs', `--namespace=${namespace}`, name, '--all-containers']);
  }

  /** Path of a running pod's network namespace, for `nsenter --net=` on this machine. */
  async podNetns(pod: string): Promise<string> {
    const { namespace, name } = reference(pod);
    const { spec } = await this.get<Pod>(`/api/v1/namespaces/${namespace}/pods/${name}`);
    const node = this.nodes.find((one) => one.name === spec.nodeName);
    const sandboxes = await node?.engine.labelled({
      'io.kubernetes.docker.type': 'podsandbox',
      'io.kubernetes.pod.namespace': namespace,
      'io.kubernetes.pod.name': name,
    });
    const [sandbox] = sandboxes ?? [];
    if (sandbox === undefined) throw new Error(`pod ${pod} does not run: ${await this.#situation()}`);
    return sandbox.networkNamespace();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#scope.disposeAsync();
  }

  /** Waits until the cluster is fit for pods. */
  async #complete(): Promise<void> {
    await this.waitFor(
      'the nodes to be ready, and the default service account',
      async () => {
        const { items } = await this.get<List<Node>>('/api/v1/nodes');
        if (items.filter(isReady).length < this.nodes.length) return false;
        const account = '/api/v1/namespaces/default/serviceaccounts/default';
        return (await this.get<{ secrets?: unknown }>(account)).secrets !== undefined;
      },
      READY_DEADLINE_MS,
    );
  }

  /** For errors: pods that are not running, and what the cluster last had to say. */
  async #situation(): Promise<string> {
    try {
      const pods = (await this.get<List<Pod>>('/api/v1/pods')).items
        .filter(({ status }) => status.phase !== 'Running' && status.phase !== 'Succeeded')
        .map(({ metadata, status }) => `pod ${metadata.namespace}/${metadata.name} is ${status.phase}`);
      const events = (await this.get<List<Event>>('/api/v1/events')).items
        .toSorted((one, other) => (one.lastTimestamp ?? '').localeCompare(other.lastTimestamp ?? ''))
        .slice(-EVENTS_IN_ERROR)
        .map(({ involvedObject: { kind, name }, reason, message }) => `${kind} ${name}: ${reason}: ${message}`);
      return ['--- the cluster:', ...pods, ...events].join('\n');
    } catch (error) {
      return `--- the cluster cannot be asked: ${error instanceof Error ? error.message : error}`;
    }
  }
}

function isReady({ status }: Node): boolean {
  return status.conditions?.some(({ type, status: value }) => type === 'Ready' && value === 'True') === true;
}

function reference(pod: string): { namespace: string; name: string } {
  const [first = '', second] = pod.split('/');
  return second === undefined ? { namespace: 'default', name: first } : { namespace: first, name: second };
}

/** Like Promise.all, but lets all of them come to their end before it fails, so that what they made can be disposed of. */
async function all<T extends readonly unknown[]>(tasks: readonly [...{ [I in keyof T]: Promise<T[I]> }]): Promise<T>;
async function all<T>(tasks: readonly Promise<T>[]): Promise<T[]> {
  await Promise.allSettled(tasks);
  return Promise.all(tasks);
}
