import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Engine, type Vps, vps } from '../containers/engine.ts';
import type { Host } from '../lab/netns.ts';
import { binary, type Programs } from './programs.ts';

/** Nodes, pods and services of a cluster have addresses of this network, and speak to each other untranslated. */
export const CLUSTER_NETWORK = '10.96.0.0/14';

export const CLUSTER_DOMAIN = 'cluster.local';
/** Of the range of Services. */
export const NAME_SERVERS = ['10.96.0.10', '10.96.0.11'] as const;

/** The image of the demo's hosts: Debian, Node and tests/lab/traffic.ts. */
const IMAGE = 'detour-lab:dev';
/** What holds a pod's namespaces. It has to end at SIGTERM, or every pod takes ten seconds more to end. */
const PAUSE = {
  repo: 'detour-pause',
  tag: 'dev',
  changes: `ENTRYPOINT ["sh", "-c", "trap exit TERM; while :; do sleep 3600 & wait; done"]`,
} as const;
const START_DEADLINE_MS = 60_000;

/**
 * Makes a node of the engine's namespaces, then becomes the kubelet. What is not the kubelet's alone must not reach this machine:
 * paths that it has no flags for, and settings of the kernel that it insists on (kernel/panic, which reboots), which it only
 * compares when they are as it wants them. Its mounts are shared, as on every node, for `mountPropagation`.
 */
const BECOME_KUBELET = `
  set -e
  folder=$1; shift
  for name in lib log; do
    mkdir -p "$folder/$name/upper" "$folder/$name/work"
    mount -t overlay -o "lowerdir=/var/$name,upperdir=$folder/$name/upper,workdir=$folder/$name/work" overlay "/var/$name"
  done
  while read -r key value; do
    mkdir -p "/run/kernel/$(dirname "$key")"
    echo "$value" >"/run/kernel/$key"
    mount --bind "/run/kernel/$key" "/proc/sys/$key"
  done <<'END'
vm/overcommit_memory 1
vm/panic_on_oom 0
kernel/panic 10
kernel/panic_on_oops 1
kernel/keys/root_maxkeys 1000000
kernel/keys/root_maxbytes 25000000
END
  mount --make-rshared /
  exec "$@"`;

const KUBELET = {
  kind: 'KubeletConfiguration',
  apiVersion: 'kubelet.config.k8s.io/v1beta1',
  // Its own port is open to the cluster, for `kubectl exec` and `logs`.
  authentication: { anonymous: { enabled: true }, webhook: { enabled: false } },
  authorization: { mode: 'AlwaysAllow' },
  clusterDomain: CLUSTER_DOMAIN,
  clusterDNS: NAME_SERVERS,
  nodeStatusUpdateFrequency: '2s',
  nodeLeaseDurationSeconds: 8,
  // Cgroups are those that the engine makes, below its own.
  cgroupDriver: 'cgroupfs',
  cgroupsPerQOS: false,
  enforceNodeAllocatable: [],
  oomScoreAdj: 0,
  failSwapOn: false,
  // A machine that is nearly full is no reason to drop images or pods: nothing would bring them back.
  imageGCHighThresholdPercent: 100,
  evictionHard: { 'memory.available': '1%', 'nodefs.available': '1%', 'imagefs.available': '1%' },
} as const;

/** Drops what the host sends and forwards. */
const SILENCE = `table inet lab_power_off {
  chain sent { type filter hook output priority -500; policy drop; }
  chain forwarded { type filter hook forward priority -500; policy drop; }
}`;

export type NodePlan = {
  readonly name: string;
  readonly host: Host;
  /** Where the control plane and other nodes reach it, IPv4. */
  readonly address: string;
  /** The first address of its pods' network with that network's length, such as `10.98.1.1/24`. */
  readonly pods: string;
  /** Where its kubelet keeps its files; it must exist. */
  readonly folder: string;
  /** The file with which its kubelet reaches the API. */
  readonly kubeconfig: string;
};

/** A node of a cluster: a host of a lab with an engine and a kubelet, which share a network, a mount and a pid namespace. */
export class ClusterNode implements AsyncDisposable {
  readonly name: string;
  readonly host: Host;
  readonly #plan: NodePlan;
  readonly #programs: Programs;
  /** net.mptcp as at the first start, as `sysctl --load` reads it. */
  readonly #atBoot: string;
  #engine: Vps;

  private constructor(plan: NodePlan, programs: Programs, engine: Vps, atBoot: string) {
    this.name = plan.name;
    this.host = plan.host;
    this.#plan = plan;
    this.#programs = programs;
    this.#engine = engine;
    this.#atBoot = atBoot;
  }

  /** Starts the engine of a node, and copies images of `source` into it. */
  static async bring(
    plan: NodePlan,
    programs: Programs,
    source: Engine,
    images: readonly string[],
  ): Promise<ClusterNode> {
    const { host } = plan;
    const settings = await host.exec(['sysctl', '--all', '--pattern', '^net[.]mptcp[.](?!available)']);
    const engine = await vps(host.namespace, 'nft', ['--bip', plan.pods, '--ip-masq=false']);
    const node = new ClusterNode(plan, programs, engine, settings);
    try {
      await node.#route();
      for (const image of [IMAGE, ...images]) await engine.load(image, source);
      const pause = await engine.docker.createContainer({ Image: IMAGE });
      await pause.commit(PAUSE);
      await pause.remove();
    } catch (error) {
      await node[Symbol.asyncDispose]();
      throw error;
    }
    return node;
  }

  /** The engine that runs now: another one after `powerOn`. */
  get engine(): Vps {
    return this.#engine;
  }

  /** Starts the kubelet. The node is known to the API on return, but maybe not ready. */
  async join(): Promise<void> {
    const { address, folder, kubeconfig } = this.#plan;
    const configuration = join(folder, 'kubelet.json');
    writeFileSync(configuration, JSON.stringify(KUBELET));
    const kubelet = this.host.spawn(
      this.#engine
        .beside('bash', '-c', BECOME_KUBELET, 'kubelet', folder, binary('kubelet'))
        .concat(
          `--config=${configuration}`,
          `--kubeconfig=${kubeconfig}`,
          `--hostname-override=${this.name}`,
          `--node-ip=${address}`,
          '--container-runtime=docker',
          `--volume-plugin-dir=${join(folder, 'volume-plugins')}`,
          `--pod-infra-container-image=${PAUSE.repo}:${PAUSE.tag}`,
        ),
    );
    this.#programs.add(this.#kubelet, kubelet);
    await kubelet.waitFor(/Successfully registered node|was previously registered/, START_DEADLINE_MS);
  }

  /**
   * Takes its power away: engine, kubelet and every pod end at once, and nobody who was connected to them hears of it. On return
   * the host is as after a boot: no rules, no connections, no docker0, Multipath TCP as at first. Addresses and routes are kept.
   */
  async powerOff(): Promise<void> {
    await this.host.nft(SILENCE);
    await this.#programs.end(this.#kubelet);
    await this.#engine.kill();
    // What is left of connections would still send from here when the power is back.
    await this.host.exec(['ss', '--kill', '--tcp', 'state', 'connected']);
    await this.host.exec(['conntrack', '--flush']);
    await this.host.exec(['ip', 'link', 'delete', 'docker0']);
    await this.host.exec(['ip', 'mptcp', 'endpoint', 'flush']);
    // The kernel's own limits (net/mptcp/pm_kernel.c, since Linux 5.16).
    await this.host.exec(['ip', 'mptcp', 'limits', 'set', 'subflows', '2', 'add_addr_accepted', '0']);
    await this.host.exec(['sysctl', '--quiet', '--load=-'], { input: this.#atBoot });
    await this.host.nft(`flush ruleset\n${SILENCE}`);
  }

  /** Gives it power again after `powerOff`: its engine has the images and the ended containers it had, and its kubelet is back. */
  async powerOn(): Promise<void> {
    await this.host.nft('flush ruleset');
    this.#engine = await this.#engine.restart();
    await this.#route();
    await this.join();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#programs.end(this.#kubelet);
    // Its pods need not end in order, which would take as long as the slowest of them.
    await this.#engine.kill();
    await this.#engine[Symbol.asyncDispose]();
  }

  get #kubelet(): string {
    return `kubelet of ${this.name}`;
  }

  /** What a network plugin does: pods are reached from other nodes, and leave the cluster with the node's address. */
  async #route(): Promise<void> {
    await this.host.exec(['iptables-nft', '-P', 'FORWARD', 'ACCEPT']);
    const outwards = ['-s', this.#plan.pods, '!', '-d', CLUSTER_NETWORK, '-j', 'MASQUERADE'];
    await this.host.exec(['iptables-nft', '-t', 'nat', '-A', 'POSTROUTING', ...outwards]);
  }
}
