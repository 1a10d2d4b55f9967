import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { render } from '../../k8s/render.ts';
import { readManifests } from '../lab/manifests.ts';
import { type Host, requireRoot } from '../lab/netns.ts';
import { expectedSha256 } from '../lab/traffic.ts';
import { hostState, makeKey } from '../netns/world.ts';
import { ClusterWorld, DETOUR, ENABLED, NAMESPACE, podManifest } from './world.ts';

/** The overlays `host` and `router`, installed as docs/kubernetes.md says. That of `pods` has daemonset.test.ts. */

const SOME = 10_000_000;
const ROUTERS = `detour-router.${NAMESPACE}.svc.cluster.local`;

const settings = (name: string, data: Readonly<Record<string, string>>): string =>
  JSON.stringify({ apiVersion: 'v1', kind: 'ConfigMap', metadata: { name, namespace: NAMESPACE }, data });

/** What we could change on a node, without what changes while pods come and go, and without counters. */
async function state(host: Host): Promise<Record<string, string>> {
  const { links: _, routes: __, ...rest } = await hostState(host);
  return { ...rest, ruleset: await host.exec(['nft', '--stateless', 'list', 'ruleset']) };
}

describe.runIf(requireRoot('tests in a Kubernetes cluster'))('in a cluster', () => {
  const scope = new AsyncDisposableStack();
  let world: ClusterWorld;

  beforeAll(async () => {
    world = scope.use(await ClusterWorld.create('modes'));
    const [one] = world.nodes;
    await world.startRouter();
    await world.cluster.apply(podManifest('on-node', one, {}, { hostNetwork: true }));
    await world.cluster.apply(podManifest('other', one, ENABLED));
    await world.cluster.kubectl(['wait', 'pod', '--all', '--for=condition=Ready', '--timeout=60s']);
    await world.cluster.apply(await world.invitation());
  });
  afterAll(() => scope.disposeAsync());

  /** Deletes the agents' DaemonSet and waits for its pods to end. */
  async function deleteAgents(): Promise<void> {
    await world.cluster.kubectl(['-n', NAMESPACE, 'delete', 'daemonset', 'detour-client']);
    await world.agentsAreGone();
  }

  describe('the agent of the overlay host', () => {
    let before: Record<string, string>[];
    beforeAll(async () => {
      const [one, two] = world.nodes;
      before = [await state(one.host), await state(two.host)];
      await world.apply('detour-client-host.yaml');
      await world.rolledOut();
    });

    it('serves what uses the network of its node, and no pod', async () => {
      const [one] = world.nodes;
      for (const { host } of world.nodes) expect(await host.sysctl('net.mptcp.path_manager')).toBe('userspace');
      const result = await world.transfer('on-node', SOME);
      expect(result).toMatchObject({ mptcp: true, sha256: expectedSha256('detour', SOME) });
      expect(result.paths.find(({ remote }) => remote === DETOUR)?.bytes).toBeGreaterThan(0);
      const other = await world.transfer('other', 1_000_000);
      expect(other.paths.map(({ remote }) => remote)).not.toContain(DETOUR);
      expect((await world.status(one)).workloads).toBeUndefined();
    });

    it('has one capability, no token for the API, and no view of other processes', async () => {
      const agent = await world.agentOf(world.nodes[0]);
      const look = async (...command: readonly string[]): Promise<string> => world.inside(agent, ...command);
      expect(await look('sh', '-c', 'grep -h ^CapEff /proc/1/status /proc/self/status')).toBe(
        'CapEff:\t0000000000001000\nCapEff:\t0000000000001000',
      );
      expect(await look('sh', '-c', 'ls /var/run/secrets 2>&1 || true')).toContain('No such file');
      expect(await look('sh', '-c', 'tr "\\0" " " </proc/1/cmdline')).toMatch(/detour.* client/);
    });

    it('is put right by its doctor', async () => {
      const doctor = await world.inside(await world.agentOf(world.nodes[0]), 'detour', 'doctor');
      expect(doctor).toContain(' 0 to look at, 0 failed');
    });

    it('leaves the nodes as it found them', async () => {
      await deleteAgents();
      const [one, two] = world.nodes;
      expect([await state(one.host), await state(two.host)]).toEqual(before);
    });
  });

  describe('settings that are wrong', () => {
    it('are named in the description of the pod, all at once', async () => {
      await world.cluster.apply(settings('detour-client', { DETOUR_DETOUR: 'vps=1.2.3.4', DETOUR_MODE: 'fast' }));
      await world.apply('detour-client-host.yaml');
      const message = await world.cluster.waitFor('the pod to end', async () => {
        const [pod] = Object.values(await world.pods('detour-client'));
        const { lastState, state } = pod?.status.containerStatuses?.[0] ?? {};
        return (state?.terminated ?? lastState?.terminated)?.message;
      });
      expect(message).toMatch(/DETOUR_DETOUR: is not known; did you mean DETOUR_DETOURS\?/);
      expect(message).toMatch(/DETOUR_MODE="fast": must be one of/);
      expect(message).toMatch(/DETOUR_DETOURS: is required/);
      await deleteAgents();
    });
  });

  describe('one agent for nodes and pods', () => {
    it('serves both at once', async () => {
      const [one] = world.nodes;
      await world.cluster.apply(await world.invitation());
      await world.apply('detour-client.yaml');
      await world.cluster.kubectl([
        '-n',
        NAMESPACE,
        'set',
        'env',
        'daemonset/detour-client',
        'DETOUR_PROVIDERS=host,kubernetes',
      ]);
      await world.rolledOut();
      await world.served(one, 'default/other');
      for (const pod of ['on-node', 'other']) {
        const { paths } = await world.transfer(pod, SOME);
        expect(paths.find(({ remote }) => remote === DETOUR)?.bytes).toBeGreaterThan(0);
      }
      await deleteAgents();
      for (const { host } of world.nodes) expect(await host.sysctl('net.mptcp.path_manager')).toBe('kernel');
    });
  });

  describe('the agent of the overlay server', () => {
    const limit = (): Promise<string> => world.inside('shop', 'ip', 'mptcp', 'limits');

    it('lets a pod accept more subflows, without key and settings, and puts the limit back', async () => {
      const [one] = world.nodes;
      await world.cluster.kubectl([
        '-n',
        NAMESPACE,
        'delete',
        '--ignore-not-found',
        'configmap/detour-client',
        'secret/detour-client',
      ]);
      await world.cluster.apply(podManifest('shop', one, ENABLED));
      await world.cluster.kubectl(['wait', 'pod', 'shop', '--for=condition=Ready', '--timeout=60s']);
      const before = await limit();
      await world.apply('detour-server.yaml');
      await world.rolledOut();
      await world.workload(one, 'default/shop', 'served', (workload) => workload?.state === 'served');
      expect(await limit()).toMatch(/subflows 8\b/);
      expect(await world.inside('shop', 'cat', '/proc/sys/net/mptcp/path_manager')).toBe('kernel');
      expect(await world.inside(await world.agentOf(one), 'detour', 'doctor')).toContain(' 0 to look at, 0 failed');
      await deleteAgents();
      expect(await limit()).toBe(before);
    });
  });

  describe('the overlay monitoring', () => {
    it('is read, and probed, at the addresses of the nodes', async () => {
      await world.cluster.apply(await world.invitation());
      // The objects of prometheus-operator are for clusters that have it.
      const items = readManifests(await render('monitoring')).filter(({ kind }) => !/^(Pod|Prometheus)/.test(kind));
      await world.cluster.apply(JSON.stringify({ apiVersion: 'v1', kind: 'List', items }));
      await world.rolledOut();
      for (const { name } of world.nodes) {
        const address = (await world.pods('detour-client'))[name]?.status.podIP;
        const ask = `fetch('http://${address}:9468/metrics').then((answer) => answer.text()).then(console.log)`;
        expect(await world.cluster.control.exec([process.execPath, '--eval', ask])).toContain(
          'detour_client_connections',
        );
      }
      await deleteAgents();
    });
  });

  describe('routers on labelled nodes', () => {
    const key = makeKey('0c0c0c0c');
    let before: Record<string, string>;

    beforeAll(async () => {
      const [, two] = world.nodes;
      before = await state(two.host);
      const secret = (name: string, stringData: object): string =>
        JSON.stringify({ apiVersion: 'v1', kind: 'Secret', metadata: { name, namespace: NAMESPACE }, stringData });
      await world.cluster.kubectl(['label', 'node', two.name, 'detour.dev/router=true']);
      await world.cluster.apply(secret('detour-router', { keys: `${key}:cluster` }));
      await world.cluster.apply(settings('detour-router', { DETOUR_ALLOW: '10.81.0.0/30' }));
      await world.apply('detour-router.yaml');
      await world.rolledOut('detour-router');
      await world.cluster.apply(secret('detour-client', { key }));
      const address = (await world.pods('detour-router'))[two.name]?.status.podIP;
      await world.cluster.apply(
        settings('detour-lists', { 'detours.yaml': `detours: [{name: listed, address: '${address}:45672'}]` }),
      );
      await world.cluster.apply(
        settings('detour-client', {
          DETOUR_DETOURS: `srv:_detour._udp.${ROUTERS},dns:${ROUTERS},file:/etc/detour/lists/detours.yaml`,
        }),
      );
      await world.cluster.apply(podManifest('guest', world.nodes[0], ENABLED));
      await world.apply('detour-client.yaml');
      await world.rolledOut();
    });

    it('run there and nowhere else, with one capability', async () => {
      const routers = await world.pods('detour-router');
      expect(Object.keys(routers)).toEqual(['node2']);
      const name = `${NAMESPACE}/${routers['node2']?.metadata.name}`;
      expect(await world.inside(name, 'grep', '^CapEff', '/proc/self/status')).toBe('CapEff:\t0000000000001000');
      expect((await world.cluster.exec(name, 'detour', 'status')).code).toBe(0);
    });

    it('are found by service records, by their name and by a list in a ConfigMap', async () => {
      const [one] = world.nodes;
      const { sources } = await world.served(one, 'default/guest');
      expect(sources.map(({ source, state, why }) => [source, state, why])).toEqual([
        [`srv:_detour._udp.${ROUTERS}`, 'ok', null],
        [`dns:${ROUTERS}:45672`, 'ok', null],
        ['file:/etc/detour/lists/detours.yaml', 'ok', null],
      ]);
    });

    it('relay for the pods of other nodes, also while one is replaced by a newer', async () => {
      const [, two] = world.nodes;
      const router = (await world.pods('detour-router'))[two.name];
      const transfer = world.transfer('guest', 4 * SOME);
      await using restored = new AsyncDisposableStack();
      restored.defer(() => world.direct.restore());
      await world.whileSlow(async () => {
        await world.cluster.waitFor('a path through it', async () => {
          const { connections } = await world.status(world.nodes[0]);
          return connections.some(({ paths }) =>
            paths.some(({ kind, deliveredBytes }) => kind === 'nat' && deliveredBytes > 0),
          );
        });
        // From here on all depends on the router, whatever its path was worth beside the direct one.
        await world.direct.blackhole();
        await world.cluster.kubectl(['-n', NAMESPACE, 'rollout', 'restart', 'daemonset/detour-router']);
        await world.rolledOut('detour-router');
        expect((await world.pods('detour-router'))[two.name]?.metadata.uid).not.toBe(router?.metadata.uid);
      });
      const result = await transfer;
      expect(result).toMatchObject({ mptcp: true, sha256: expectedSha256('detour', 4 * SOME) });
      const relayed = result.paths.filter(({ remote }) => remote === router?.status.podIP);
      expect(relayed.reduce((sum, { bytes }) => sum + bytes, 0)).toBeGreaterThan(2 * SOME);
    });

    it('serve a list that is changed without a restart of anything', async () => {
      const [one] = world.nodes;
      const agent = await world.agentOf(one);
      await world.cluster.apply(
        settings('detour-lists', { 'detours.yaml': `detours: [{name: moved, address: '${DETOUR}:45672'}]` }),
      );
      // The kubelet takes up to a minute and a half to write it.
      await world.cluster.waitFor(
        'the new list',
        async () => (await world.status(one)).detours.some(({ address }) => address === `${DETOUR}:45672`),
        150_000,
      );
      expect(await world.agentOf(one)).toBe(agent);
    });

    it('leave nothing on their nodes when they are told so and uninstalled', async () => {
      const [, two] = world.nodes;
      expect(await state(two.host)).not.toEqual(before);
      await world.cluster.apply(settings('detour-router', { DETOUR_ALLOW: '10.81.0.0/30', DETOUR_ON_EXIT: 'cleanup' }));
      await world.cluster.kubectl(['-n', NAMESPACE, 'rollout', 'restart', 'daemonset/detour-router']);
      await world.rolledOut('detour-router');
      await world.delete('detour-router.yaml');
      expect(await state(two.host)).toEqual(before);
    });
  });
});
