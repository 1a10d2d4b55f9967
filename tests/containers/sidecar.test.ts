import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { readManifests } from '../lab/manifests.ts';
import { requireRoot } from '../lab/netns.ts';
import { expectedSha256, startServer, type TransferResult } from '../lab/traffic.ts';
import { connectionIs, type Status, World } from '../netns/world.ts';
import { IMAGE, Machine } from './machines.ts';
import { Pod, type PodSpec } from './pod.ts';

/** k8s/overlays/sidecar-example on an engine, for the Kubernetes of tests/k8s is older than native sidecars. */

const BYTES = 10_000_000;
const LAB_IMAGE = 'detour-lab:dev';
const FILE = join(import.meta.dirname, '../../k8s/overlays/sidecar-example/deployment.yaml');

type Container = { name: string; image: string; command?: readonly string[] };

/** The pod of the example, with the images that there are here, and an application that waits for commands. */
function example(): PodSpec {
  const [deployment] = readManifests(readFileSync(FILE, 'utf8'));
  const { spec } = (deployment as unknown as { spec: { template: { spec: PodSpec } } }).spec.template;
  const images: Readonly<Record<string, string>> = { 'detour-client': IMAGE.client, app: LAB_IMAGE };
  const replaced = (containers: unknown): Container[] =>
    (containers as Container[]).map((one) => ({
      ...one,
      image: images[one.image] ?? one.image,
      ...(one.name === 'app' ? { command: ['sleep', 'infinity'] } : {}),
    }));
  return { ...spec, initContainers: replaced(spec['initContainers']), containers: replaced(spec['containers']) };
}

describe.runIf(requireRoot('tests of a pod on a Docker engine'))('an agent beside an application in its pod', () => {
  const scope = new AsyncDisposableStack();
  let world: World;
  let pod: Pod;
  let before: string;

  beforeAll(async () => {
    world = scope.use(await World.create('sidecar', { rateMbit: 20 }));
    await startServer(world.server);
    await world.startRouters();
    const machine = scope.use(await Machine.bring(world.client, [IMAGE.client, LAB_IMAGE]));
    before = await world.client.exec(['sysctl', '--all', '--pattern', '^net[.]mptcp']);
    const objects = {
      // One Secret and one ConfigMap of the same name: `detour invite --format kubernetes` has them like that.
      'detour-client': { key: `${world.key}\n`, DETOUR_DETOURS: `vps=${world.detours[0]?.v4}:45672` },
    };
    pod = scope.use(await Pod.start(machine, example(), objects, LAB_IMAGE));
  });
  afterAll(() => scope.disposeAsync());

  const status = async (): Promise<Status> =>
    JSON.parse((await pod.container('detour').exec('detour', 'status', '--json')).stdout);

  const pathManager = async (): Promise<string> =>
    (await pod.container('app').exec('cat', '/proc/sys/net/mptcp/path_manager')).stdout.trim();

  async function transfer(): Promise<TransferResult> {
    const words = ['transfer', '--to', `${world.serverV4}:5000`, '--direction', 'down', '--bytes', `${BYTES}`];
    const { stdout, stderr } = await pod.container('app').exec('mptcpize', 'run', 'node', '/lab/traffic.ts', ...words);
    expect(stderr).toBe('');
    return JSON.parse(stdout.trim().split('\n').at(-1) ?? '');
  }

  it('was there first, and had selected the path manager of the pod, and of the pod alone', async () => {
    const [agent, app] = await Promise.all(['detour', 'app'].map((name) => pod.container(name).docker.inspect()));
    expect(Date.parse(agent?.State.StartedAt ?? '')).toBeLessThan(Date.parse(app?.State.StartedAt ?? ''));
    expect(await pathManager()).toBe('userspace');
    expect(await world.client.exec(['sysctl', '--all', '--pattern', '^net[.]mptcp'])).toBe(before);
  });

  it('gives its transfers a path through the detour', async () => {
    const result = await transfer();
    expect(result).toMatchObject({ mptcp: true, sha256: expectedSha256('detour', BYTES) });
    expect(result.paths.find(({ remote }) => remote === world.detours[0]?.v4)?.bytes).toBeGreaterThan(BYTES / 10);
  });

  it('leaves the pod as it was when it ends, and a transfer alone', async () => {
    const running = transfer();
    await connectionIs(status, `${world.serverV4}:5000`, 'a path through the detour', ({ paths }) =>
      paths.some(({ kind, deliveredBytes }) => kind === 'nat' && deliveredBytes > 0),
    );
    expect((await pod.container('detour').stop(30)).code).toBe(0);
    expect(await pathManager()).toBe('kernel');
    expect(await running).toMatchObject({ sha256: expectedSha256('detour', BYTES) });
  });
});
