import { execFile } from 'node:child_process';
import { existsSync, readdirSync, readFileSync, readlinkSync, statSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { promisify } from 'node:util';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Host, Lab, requireRoot } from '../lab/netns.ts';
import { expectedSha256, startServer } from '../lab/traffic.ts';
import { Cluster } from './cluster.ts';
import type { ClusterNode } from './node.ts';

const run = promisify(execFile);

/** Where kubelets, controllers and engines keep things, unless they are told otherwise. */
const THEIR_PLACES = [
  '/etc/cni',
  '/opt/cni',
  '/run/docker.sock',
  '/run/dockershim.sock',
  '/usr/libexec/kubernetes',
  '/var/lib/docker',
  '/var/lib/dockershim',
  '/var/lib/kubelet',
  '/var/log/containers',
  '/var/log/pods',
];
/** What a kubelet sets for the whole machine, and an engine for its network. */
const THEIR_SETTINGS = ['kernel/panic', 'kernel/panic_on_oops', 'vm/overcommit_memory', 'net/ipv4/ip_forward'];

const BYTES = 2_000_000;
const IMAGE = 'detour-lab:dev';
const ACCOUNT = '/var/run/secrets/kubernetes.io/serviceaccount';
/** What the lab outside of the cluster is reached by, and what it sees of each node. */
const OUTSIDE = '10.87.1.2';
const SEEN = { node1: '10.87.1.1', node2: '10.87.2.1' } as const;

/** Tells whoever connects to port 7000 from which address. */
const WHO = `require('node:net').createServer((socket) => socket.end(socket.remoteAddress)).listen(7000, '0.0.0.0')`;

/** The status of a request to the API from inside a pod. */
const ASK = `
  const [method, path, token] = process.argv.slice(1);
  const { KUBERNETES_SERVICE_HOST: host, KUBERNETES_SERVICE_PORT: port } = process.env;
  const headers = { authorization: 'Bearer ' + (token ?? require('node:fs').readFileSync('${ACCOUNT}/token', 'utf8')) };
  fetch('https://' + host + ':' + port + path, { method, headers }).then(({ status }) => console.log(status));
`;

const pod = (number: number): string => `
apiVersion: v1
kind: Pod
metadata: { name: pod${number}, labels: { app: pod } }
spec:
  nodeName: node${number}
  serviceAccountName: reader
  terminationGracePeriodSeconds: 0
  containers:
    - name: main
      image: ${IMAGE}
      command: [node, --eval, "${WHO}"]
      env: [{ name: NODE_EXTRA_CA_CERTS, value: ${ACCOUNT}/ca.crt }]
`;

const MANIFEST = `
apiVersion: apps/v1
kind: DaemonSet
metadata: { name: everywhere }
spec:
  selector: { matchLabels: { app: everywhere } }
  template:
    metadata: { labels: { app: everywhere } }
    spec:
      hostNetwork: true
      terminationGracePeriodSeconds: 0
      containers: [{ name: main, image: '${IMAGE}', command: [sleep, infinity] }]
---
apiVersion: v1
kind: ServiceAccount
metadata: { name: reader }
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: { name: reader }
rules: [{ apiGroups: [''], resources: [pods], verbs: [list] }]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: { name: reader }
roleRef: { apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader }
subjects: [{ kind: ServiceAccount, name: reader, namespace: default }]
---
apiVersion: v1
kind: Service
metadata: { name: pods }
spec:
  clusterIP: None
  selector: { app: pod }
  ports: [{ name: who, port: 7000 }]
---
${pod(1)}
---
${pod(2)}
`;

/** Looks for a process of container $1, and tries to open its network namespace and to enter it. */
const INTRUDE = `
  # Two pipes would reach the log in any order.
  exec 2>&1
  for process in /proc/[0-9]*; do grep -q "/$1\\$" $process/cgroup 2>/dev/null && break; done
  echo "$(tr '\\0' ' ' <$process/cmdline | cut -c 1-11)"
  : <$process/ns/net && echo opened
  nsenter --net=$process/ns/net true && echo entered
  exit 0
`;

const intruder = (name: string, capabilities: readonly string[], container: string): string => `
apiVersion: v1
kind: Pod
metadata: { name: intruder-${name} }
spec:
  nodeName: node1
  hostPID: true
  restartPolicy: Never
  securityContext: { seccompProfile: { type: RuntimeDefault } }
  containers:
    - name: main
      image: ${IMAGE}
      command: [bash, -c, ${JSON.stringify(INTRUDE)}, intruder, ${container}]
      securityContext:
        allowPrivilegeEscalation: false
        capabilities: { drop: [ALL], add: [${capabilities.join(', ')}] }
`;

describe.runIf(requireRoot('tests in a Kubernetes cluster'))('a cluster of two nodes', () => {
  const scope = new AsyncDisposableStack();
  let before: string;
  let cluster: Cluster;
  let outside: Host;
  let two: ClusterNode;

  beforeAll(async () => {
    before = await traces();
    const lab = scope.use(await Lab.create('cluster'));
    cluster = scope.use(await Cluster.create(lab, { nodes: 2 }));
    const [one, second] = cluster.nodes;
    if (one === undefined || second === undefined) throw new Error('two nodes were asked for');
    two = second;
    outside = await lab.host('outside');
    await lab.link(one.host, outside, { v4: '10.87.1.0/30' });
    await lab.link(two.host, outside, { v4: '10.87.2.0/30' });
    await two.host.route('10.87.1.0/30 via 10.87.2.2');
    await startServer(outside);
    outside.spawn(['node', '--eval', WHO]);
    await cluster.apply(MANIFEST);
    await cluster.kubectl(['wait', 'pod', '--for=condition=Ready', '--selector=app=pod', '--timeout=60s']);
  });
  afterAll(() => scope.disposeAsync());

  const address = async (name: string): Promise<string> => {
    const { status } = await cluster.get<{ status: { podIP: string } }>(`/api/v1/namespaces/default/pods/${name}`);
    return status.podIP;
  };

  /** What a command in a pod prints. */
  const inside = async (name: string, ...command: readonly string[]): Promise<string> => {
    const { code, stdout, stderr } = await cluster.exec(name, ...command);
    if (code !== 0) throw new Error(`${command[0]} in ${name} ended with ${code}: ${stderr}`);
    return stdout.trim();
  };

  /** As which address a pod is seen at port 7000 of another machine. */
  const seen = (from: string, by: string): Promise<string> => inside(from, 'bash', '-c', `cat </dev/tcp/${by}/7000`);

  /** Pods of the DaemonSet that run, by their node. */
  const everywhere = async (): Promise<Record<string, { name: string; restarts: number }>> => {
    const { items } = await cluster.get<{
      items: {
        metadata: { name: string };
        spec: { nodeName: string };
        status: { containerStatuses?: { ready: boolean; restartCount: number }[] };
      }[];
    }>('/api/v1/namespaces/default/pods?labelSelector=app=everywhere');
    return Object.fromEntries(
      items.flatMap(({ metadata: { name }, spec: { nodeName }, status: { containerStatuses: [main] = [] } }) => {
        return main?.ready === true ? [[nodeName, { name, restarts: main.restartCount }]] : [];
      }),
    );
  };

  it('runs a DaemonSet in the network of each', async () => {
    await cluster.kubectl(['rollout', 'status', 'daemonset', 'everywhere', '--timeout=60s']);
    const pods = await everywhere();
    for (const { name, host } of cluster.nodes) {
      const namespace = await cluster.podNetns(`default/${pods[name]?.name}`);
      expect(statSync(namespace).ino).toBe(statSync(host.path).ino);
    }
  });

  it('lets pods meet under their own addresses, and what is outside under that of their node', async () => {
    const [first, second] = [await address('pod1'), await address('pod2')];
    expect([first, second]).toEqual([expect.stringMatching(/^10\.98\.1\./), expect.stringMatching(/^10\.98\.2\./)]);
    expect(await seen('pod1', second)).toBe(first);
    expect(await seen('pod2', first)).toBe(second);
    expect(await seen('pod1', OUTSIDE)).toBe(SEEN.node1);
    expect(await seen('pod2', OUTSIDE)).toBe(SEEN.node2);
  });

  it('carries Multipath TCP of a pod to a server outside', async () => {
    const program = ['mptcpize', 'run', 'node', '/lab/traffic.ts', 'transfer', '--direction', 'down'];
    const printed = await inside('pod1', ...program, '--to', `${OUTSIDE}:5000`, '--bytes', String(BYTES));
    const result = JSON.parse(printed.split('\n').at(-1) ?? '');
    expect(result).toMatchObject({ mptcp: true, sha256: expectedSha256('detour', BYTES) });
  });

  it('resolves a Service to its pods, and to service records', async () => {
    const [first, second] = [await address('pod1'), await address('pod2')];
    const looks = (kind: string, name: string): Promise<string> => {
      return inside(
        'pod1',
        'node',
        '--eval',
        `require('node:dns').promises.resolve${kind}('${name}').then((found) => console.log(JSON.stringify(found)))`,
      );
    };
    await cluster.waitFor('both pods in the name service', async () => {
      const found: string[] = JSON.parse(await looks('4', 'pods.default.svc.cluster.local'));
      return found.length === 2 && found.includes(first) && found.includes(second);
    });
    const records = JSON.parse(await looks('Srv', '_who._tcp.pods.default.svc.cluster.local'));
    expect(records).toHaveLength(2);
    for (const { name, port } of records) {
      expect(port).toBe(7000);
      expect([first, second]).toContain(JSON.parse(await looks('4', name))[0]);
    }
    // By the search list of its resolv.conf.
    expect([first, second]).toContain((await inside('pod2', 'getent', 'hosts', 'pods')).split(' ')[0]);
    await expect(looks('4', 'nothing.default.svc.cluster.local')).rejects.toThrow('ENOTFOUND');
  });

  it('gives a service account what its role allows, and refuses the rest', async () => {
    const status = (...question: readonly string[]): Promise<string> =>
      inside('pod1', 'node', '--eval', ASK, ...question);
    expect(await status('GET', '/api/v1/namespaces/default/pods')).toBe('200');
    expect(await status('GET', '/api/v1/namespaces/default/secrets')).toBe('403');
    expect(await status('GET', '/api/v1/namespaces/kube-system/pods')).toBe('403');
    expect(await status('GET', '/api/v1/nodes')).toBe('403');
    expect(await status('DELETE', '/api/v1/namespaces/default/pods/pod2')).toBe('403');
    expect(await status('GET', '/api/v1/namespaces/default/pods', 'forged')).toBe('401');
  });

  it('lets a pod with hostPID find another by its container, open its network with SYS_PTRACE, and enter it with SYS_ADMIN', async () => {
    const { status } = await cluster.get<{ status: { containerStatuses: { containerID: string }[] } }>(
      '/api/v1/namespaces/default/pods/pod1',
    );
    const container = status.containerStatuses[0]?.containerID.replace('docker://', '') ?? '';
    const findings = new Map<string, string[]>();
    for (const capabilities of [[], ['SYS_ADMIN'], ['SYS_PTRACE'], ['SYS_PTRACE', 'SYS_ADMIN']]) {
      const name = `${findings.size}`;
      await cluster.apply(intruder(name, capabilities, container));
      await cluster.waitFor('the intruder to end', async () => {
        const pod = await cluster.get<{ status: { phase: string } }>(
          `/api/v1/namespaces/default/pods/intruder-${name}`,
        );
        return pod.status.phase === 'Succeeded' || pod.status.phase === 'Failed';
      });
      const log = (await cluster.logs(`intruder-${name}`)).trim().split('\n');
      findings.set(capabilities.join(), log);
    }
    const found = 'node --eval';
    expect([...findings]).toEqual([
      ['', [found, expect.stringMatching('Permission denied'), expect.stringMatching('Permission denied')]],
      ['SYS_ADMIN', [found, expect.stringMatching('Permission denied'), expect.stringMatching('Permission denied')]],
      ['SYS_PTRACE', [found, 'opened', expect.stringMatching('Operation not permitted')]],
      ['SYS_PTRACE,SYS_ADMIN', [found, 'opened', 'entered']],
    ]);
  });

  it('loses a node without a word when its power fails, and has it back', async () => {
    const hold = `tail -f /dev/null | node /lab/traffic.ts hold --count 1 --to ${OUTSIDE}:5000 >/tmp/held &`;
    await inside('pod2', 'sh', '-c', hold);
    await cluster.waitFor('a connection of pod2', async () =>
      (await inside('pod2', 'cat', '/tmp/held')).includes('held'),
    );
    const connections = async (): Promise<string> => {
      const found = await outside.exec(['ss', '-Htn', 'state', 'established', 'dst', SEEN.node2]);
      return found.trim().replaceAll(/\s+/g, ' ');
    };
    const open = await connections();
    expect(open).toContain(':5000');

    const [restarts = 0] = [(await everywhere())['node2']?.restarts];
    await two.powerOff();
    await cluster.nodeIs(two, 'lost');
    expect(await connections()).toBe(open);
    expect(await two.host.exec(['nft', 'list', 'ruleset'])).not.toContain('DOCKER');

    await two.powerOn();
    await cluster.nodeIs(two, 'ready');
    await cluster.waitFor('the DaemonSet', async () => ((await everywhere())['node2']?.restarts ?? 0) > restarts);
    await cluster.kubectl(['wait', 'pod', 'pod2', '--for=condition=Ready', '--timeout=60s']);
    expect(await seen('pod2', OUTSIDE)).toBe(SEEN.node2);
    expect(await seen('pod1', await address('pod2'))).toBe(await address('pod1'));
  });

  it('leaves nothing on this machine', async () => {
    const states = cluster.nodes.map(({ engine }) => dirname(engine.host?.replace('unix://', '') ?? ''));
    const hosts = [cluster.control, outside, ...cluster.nodes.map(({ host }) => host)];
    const namespaces = [
      ...(await Promise.all(hosts.map((host) => host.exec(['readlink', '/proc/self/ns/net'])))),
      ...(await Promise.all(
        cluster.nodes.map(({ host, engine }) => host.exec(engine.beside('readlink', '/proc/self/ns/pid'))),
      )),
    ].map((link) => link.trim());
    const cgroups = states.flatMap((state) => cgroupsOf(basename(state)));
    expect(states.filter((path) => existsSync(path))).toEqual(states);
    expect(cgroups.length).toBeGreaterThan(states.length);
    for (const namespace of namespaces) expect(processesIn(namespace).length).toBeGreaterThan(0);

    await scope.disposeAsync();
    expect([...states, ...hosts.map(({ path }) => path)].filter((path) => existsSync(path))).toEqual([]);
    expect(states.flatMap((state) => cgroupsOf(basename(state)))).toEqual([]);
    expect(namespaces.flatMap(processesIn)).toEqual([]);
    const mounts = readFileSync('/proc/self/mountinfo', 'utf8');
    expect(states.filter((state) => mounts.includes(state))).toEqual([]);
    expect(await traces()).toBe(before);
  });
});

/** What the programs of a cluster would leave on a machine of their own. */
async function traces(): Promise<string> {
  const rules = await run('nft', ['--stateless', 'list', 'ruleset']);
  const places = THEIR_PLACES.map((path) => `${path} ${existsSync(path)}`);
  const settings = THEIR_SETTINGS.map((name) => `${name} ${readFileSync(`/proc/sys/${name}`, 'utf8').trim()}`);
  const links = readdirSync('/sys/class/net');
  return [rules.stdout, ...places, ...settings, ...links].join('\n');
}

/** Process ids in a namespace, as `readlink /proc/PID/ns/*` names it. */
function processesIn(namespace: string): string[] {
  const kind = namespace.split(':')[0];
  return readdirSync('/proc').filter((entry) => {
    try {
      return /^\d+$/.test(entry) && readlinkSync(`/proc/${entry}/ns/${kind}`) === namespace;
    } catch {
      // It ended while we looked.
      return false;
    }
  });
}

/** Cgroups of the engine whose state folder has that name, in every hierarchy. */
function cgroupsOf(state: string): string[] {
  const root = '/sys/fs/cgroup';
  return [root, ...readdirSync(root).map((name) => `${root}/${name}`)].flatMap((hierarchy) => {
    const groups = statSync(hierarchy).isDirectory() ? readdirSync(hierarchy) : [];
    return groups.filter((name) => name.startsWith(`detour-engine-${state}-`)).map((name) => `${hierarchy}/${name}`);
  });
}
