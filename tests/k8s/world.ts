/**
 * A cluster of two nodes that reach a server directly, each on a way of its own, and beside it through a detour on a VPS:
 *
 *     control --+-- node1 --- gateway --- server
 *               |             |  |        |  |
 *               |             |  + detour +  |
 *               +-- node2 ----+              |
 *                     +----------------------+
 *
 * The files of k8s/ are applied as they are in the repository, with what `detour invite` prints.
 */
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Host, Lab, type Link, type Running } from '../lab/netns.ts';
import { startServer, type TransferResult } from '../lab/traffic.ts';
import { makeKey } from '../netns/world.ts';
import { Cluster } from './cluster.ts';
import type { ClusterNode } from './node.ts';

const root = join(import.meta.dirname, '../..');
const CLI = join(root, 'appliance/cli.ts');

export const IMAGES = ['detour-client:dev', 'detour-router:dev'] as const;
/** Debian, Node and /lab/traffic.ts; every node of a cluster has it. */
export const LAB_IMAGE = 'detour-lab:dev';
export const NAMESPACE = 'detour-system';
export const SERVER = '10.81.0.2';
export const DETOUR = '10.82.0.2';

/** Of each of the ways to the server, Mbit/s; */
const RATE_MBIT = 20;
/** and while something is to happen in the middle of a transfer, however long it takes. */
const SLOW_MBIT = 1;
/** Node by node; on a busy machine a kubelet has been seen to take a minute to bring a pod. */
const ROLLOUT_DEADLINE_MS = 200_000;

/** As much of the agent's status as is looked at here. */
export type AgentStatus = {
  readonly ready: boolean;
  readonly reasons: readonly string[];
  readonly detours: readonly {
    readonly workload: string | null;
    readonly name: string;
    readonly address: string;
    readonly state: string;
  }[];
  readonly sources: readonly { readonly source: string; readonly state: string; readonly why: string | null }[];
  readonly providers: readonly { readonly provider: string; readonly state: string; readonly why: string | null }[];
  readonly workloads: readonly {
    readonly name: string;
    readonly state: 'starting' | 'served' | 'failed';
    readonly why: string | null;
  }[];
  readonly connections: readonly {
    readonly workload: string | null;
    readonly remote: string;
    readonly since: string;
    readonly paths: readonly {
      readonly kind: string;
      readonly detour: string | null;
      readonly state: string;
      readonly deliveredBytes: number;
    }[];
  }[];
};

type ContainerState = { readonly terminated?: { readonly message?: string } };

/** As much of a pod as is looked at here. */
export type Pod = {
  readonly metadata: { readonly name: string; readonly uid: string; readonly deletionTimestamp?: string };
  readonly spec: { readonly nodeName?: string };
  readonly status: {
    readonly podIP?: string;
    readonly conditions?: readonly { readonly type: string; readonly status: string }[];
    readonly containerStatuses?: readonly {
      readonly restartCount: number;
      readonly state: ContainerState;
      readonly lastState: ContainerState;
    }[];
  };
};

type DaemonSet = {
  readonly metadata: { readonly generation: number };
  readonly status: {
    readonly observedGeneration: number;
    readonly desiredNumberScheduled: number;
    readonly updatedNumberScheduled?: number;
    readonly numberAvailable?: number;
  };
};

export const isReady = ({ status }: Pod): boolean =>
  status.conditions?.some((one) => one.type === 'Ready' && one.status === 'True') === true;

export class ClusterWorld implements AsyncDisposable {
  readonly cluster: Cluster;
  readonly server: Host;
  readonly detour: Host;
  readonly nodes: readonly [ClusterNode, ClusterNode];
  readonly key = makeKey('0a0b0c0d');
  /** All that lead to the server, on some part of them. */
  readonly #ways: readonly Link[];
  readonly #scope: AsyncDisposableStack;

  private constructor(
    cluster: Cluster,
    nodes: readonly [ClusterNode, ClusterNode],
    hosts: { readonly server: Host; readonly detour: Host },
    ways: readonly Link[],
    scope: AsyncDisposableStack,
  ) {
    this.cluster = cluster;
    this.nodes = nodes;
    this.server = hosts.server;
    this.detour = hosts.detour;
    this.#ways = ways;
    this.#scope = scope;
  }

  static async create(name: string): Promise<ClusterWorld> {
    const scope = new AsyncDisposableStack();
    try {
      const lab = scope.use(await Lab.create(name));
      const cluster = scope.use(await Cluster.create(lab, { nodes: 2, images: IMAGES }));
      const [one, two] = cluster.nodes;
      if (one === undefined || two === undefined) throw new Error('two nodes were asked for');
      const [gateway, server, detour] = [await lab.host('gateway'), await lab.host('server'), await lab.host('detour')];
      await gateway.forward();
      for (const [index, { host }] of [one, two].entries()) {
        await lab.link(host, gateway, { v4: `10.80.${index + 1}.0/30` });
        await host.route(`default via 10.80.${index + 1}.2`);
      }
      const rate = { rateMbit: RATE_MBIT };
      const direct = await lab.link(gateway, server, { v4: '10.81.0.0/30', ...rate });
      await server.route('default via 10.81.0.1');
      const around = await lab.link(gateway, detour, { v4: '10.82.0.0/30', ...rate });
      await lab.link(detour, server, { v4: '10.83.0.0/30' });
      const second = await lab.link(two.host, server, { v4: '10.84.0.0/30', ...rate });
      await two.host.route('10.81.0.0/30 via 10.84.0.2');
      await detour.route('default via 10.82.0.1');
      await detour.route('10.81.0.0/30 via 10.83.0.2');
      await startServer(server);
      return new ClusterWorld(cluster, [one, two], { server, detour }, [direct, around, second], scope);
    } catch (error) {
      await scope.disposeAsync();
      throw error;
    }
  }

  /** Runs the router on the VPS, and returns when it answers. */
  async startRouter(): Promise<Running> {
    const router = this.detour.spawn([process.execPath, CLI, 'router'], {
      env: { ...this.#routerEnvironment, DETOUR_HTTP: 'off', DETOUR_SOCKET: `/run/${this.detour.namespace}.sock` },
    });
    await router.waitFor('"event":"started"', 20_000);
    return router;
  }

  /** What `detour invite` prints on the VPS for a cluster. */
  invitation(): Promise<string> {
    const words = ['invite', '--host', DETOUR, '--name', 'vps', '--format', 'kubernetes'];
    return this.detour.exec([process.execPath, CLI, ...words], { env: this.#routerEnvironment });
  }

  /** Applies a file of k8s/. */
  apply(file: string): Promise<void> {
    return this.cluster.apply(readFileSync(join(root, 'k8s', file), 'utf8'));
  }

  /** Deletes what a file of k8s/ names, its namespace with all that is in it among that, and waits until it is gone. */
  async delete(file: string): Promise<void> {
    await this.cluster.kubectl(['delete', '--filename', join(root, 'k8s', file)]);
  }

  /** The pods of one of our DaemonSets, by their nodes; only those that are there to stay. */
  async pods(name: 'detour-client' | 'detour-router'): Promise<Readonly<Record<string, Pod>>> {
    const path = `/api/v1/namespaces/${NAMESPACE}/pods?labelSelector=app.kubernetes.io/name=${name}`;
    const { items } = await this.cluster.get<{ items: readonly Pod[] }>(path);
    return Object.fromEntries(
      items.flatMap((pod) =>
        pod.spec.nodeName === undefined || pod.metadata.deletionTimestamp !== undefined
          ? []
          : [[pod.spec.nodeName, pod]],
      ),
    );
  }

  /** Waits until no agent is left, not even one that is on its way out. */
  async agentsAreGone(): Promise<void> {
    await this.cluster.waitFor('the agents to be gone', async () => {
      const selector = '--selector=app.kubernetes.io/name=detour-client';
      return (await this.cluster.kubectl(['-n', NAMESPACE, 'get', 'pods', selector, '-o', 'name'])) === '';
    });
  }

  /** The name of a node's agent, `NAMESPACE/NAME`. */
  async agentOf(node: ClusterNode): Promise<string> {
    const pod = (await this.pods('detour-client'))[node.name];
    if (pod === undefined) throw new Error(`there is no agent on ${node.name}`);
    return `${NAMESPACE}/${pod.metadata.name}`;
  }

  /** What `detour status` says on a node. */
  async status(node: ClusterNode): Promise<AgentStatus> {
    return JSON.parse(await this.inside(await this.agentOf(node), 'detour', 'status', '--json'));
  }

  /** What a command in a pod prints. Throws when it fails. */
  async inside(pod: string, ...command: readonly string[]): Promise<string> {
    const { code, stdout, stderr } = await this.cluster.exec(pod, ...command);
    if (code !== 0) throw new Error(`${command.join(' ')} in ${pod} ended with ${code}: ${stderr}`);
    return stdout.trim();
  }

  /** A transfer from the server to the main container of a pod, by Multipath TCP. Through the engine: kubectl has a deadline. */
  transfer(pod: string, bytes: number): Promise<TransferResult> {
    const words = ['transfer', '--to', `${SERVER}:5000`, '--direction', 'down', '--bytes', `${bytes}`];
    const done = (async (): Promise<TransferResult> => {
      const { spec } = await this.cluster.get<Pod>(`/api/v1/namespaces/default/pods/${pod}`);
      const node = this.nodes.find(({ name }) => name === spec.nodeName);
      const [container] =
        (await node?.engine.labelled({
          'io.kubernetes.pod.namespace': 'default',
          'io.kubernetes.pod.name': pod,
          'io.kubernetes.container.name': 'main',
        })) ?? [];
      if (container === undefined) throw new Error(`pod ${pod} does not run`);
      const { code, stdout, stderr } = await container.exec('mptcpize', 'run', 'node', '/lab/traffic.ts', ...words);
      if (code !== 0) throw new Error(`a transfer in ${pod} ended with ${code}: ${stderr}`);
      return JSON.parse(stdout.trim().split('\n').at(-1) ?? '');
    })();
    // A test that fails meanwhile does not wait for it.
    done.catch(() => undefined);
    return done;
  }

  /** Does something while all ways to the server are slow: a transfer that is under way does not end before it is done. */
  async whileSlow(task: () => Promise<void>): Promise<void> {
    await Promise.all(this.#ways.map((way) => way.rate(SLOW_MBIT)));
    try {
      await task();
    } finally {
      await Promise.all(this.#ways.map((way) => way.rate(RATE_MBIT)));
    }
  }

  /** Waits until every pod of a DaemonSet is the newest one, and ready. */
  async rolledOut(name = 'detour-client'): Promise<void> {
    const path = `/apis/apps/v1/namespaces/${NAMESPACE}/daemonsets/${name}`;
    await this.cluster.waitFor(
      `${name} to be rolled out`,
      async () => {
        const { metadata, status } = await this.cluster.get<DaemonSet>(path);
        const { desiredNumberScheduled: desired, updatedNumberScheduled: updated, numberAvailable: available } = status;
        return (
          status.observedGeneration === metadata.generation &&
          desired > 0 &&
          updated === desired &&
          available === desired
        );
      },
      ROLLOUT_DEADLINE_MS,
    );
  }

  /** Waits until the agent of a node says of a pod what `holds` asks. */
  async workload(
    node: ClusterNode,
    name: string,
    what: string,
    holds: (workload: AgentStatus['workloads'][number] | undefined, status: AgentStatus) => boolean,
  ): Promise<AgentStatus> {
    return this.cluster.waitFor(`${name} to be ${what}`, async () => {
      const status = await this.status(node);
      return (
        holds(
          status.workloads.find((one) => one.name === name),
          status,
        ) && status
      );
    });
  }

  served(node: ClusterNode, name: string): Promise<AgentStatus> {
    return this.workload(
      node,
      name,
      'served, with its detour up',
      (one, { detours }) =>
        one?.state === 'served' && detours.some(({ workload, state }) => workload === name && state === 'up'),
    );
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#scope.disposeAsync();
  }

  get #routerEnvironment(): Readonly<Record<string, string>> {
    return { DETOUR_KEYS: `${this.key}:cluster`, DETOUR_ALLOW: '10.81.0.0/30' };
  }
}

/** A pod of the lab's image that waits for commands, on that node. */
export function podManifest(
  name: string,
  node: ClusterNode,
  annotations: Readonly<Record<string, string>> = {},
  spec: Readonly<Record<string, unknown>> = {},
): string {
  return JSON.stringify({
    apiVersion: 'v1',
    kind: 'Pod',
    metadata: { name, annotations },
    spec: {
      nodeName: node.name,
      terminationGracePeriodSeconds: 0,
      containers: [{ name: 'main', image: LAB_IMAGE, command: ['sleep', 'infinity'] }],
      ...spec,
    },
  });
}

export const ENABLED = { 'detour.dev/enable': 'true' } as const;
