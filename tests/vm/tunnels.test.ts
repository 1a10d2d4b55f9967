import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openLinks } from '../../appliance/kernel/links.ts';
import { type Namespace, openNamespace } from '../../appliance/kernel/namespaces.ts';
import { openWireguard } from '../../appliance/kernel/wireguard.ts';
import { Lab, requireVm, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { tunnelCases } from '../lab/tunnel-cases.ts';
import { connectionIs, isInUse, type Status, World } from '../netns/world.ts';
import { loadModules } from './modules.ts';

const BYTES = 4_000_000;
const DIGEST = expectedSha256('detour', BYTES);
const VPN = { DETOUR_VPN: 'wireguard' } as const;

describe.runIf(requireVm('tests of the kernel’s own WireGuard'))('tunnels by the kernel’s own WireGuard', () => {
  describe('the port', () => {
    let lab: Lab;
    let namespace: Namespace;
    beforeAll(async () => {
      await loadModules();
      lab = await Lab.create('tunnel.module');
      namespace = await openNamespace((await lab.host('one')).path);
    });
    afterAll(async () => {
      namespace.close();
      await lab[Symbol.asyncDispose]();
    });
    const open = async () => {
      const links = openLinks(namespace);
      return { links, wireguard: openWireguard(links, namespace) };
    };

    it('prefers the kernel to a process', async () => {
      const { links, wireguard } = await open();
      expect(await wireguard.create('dtv-module')).toBe('kernel');
      await wireguard.remove('dtv-module');
      wireguard.close();
      links.close();
    });

    tunnelCases('dtv-case', open);
  });

  describe('a transfer', () => {
    const scope = new AsyncDisposableStack();
    let world: World;
    let status: () => Promise<Status>;

    beforeAll(async () => {
      await loadModules();
      world = scope.use(await World.create('vm.tunnels', { rateMbit: 5 }));
      // The detour is the longer way, and not a perfect one.
      await world.detours[0]?.way.shape({ rateMbit: 5, delayMs: 20, lossPercent: 0.1 });
      await startServer(world.server);
      await world.startRouters(VPN);
      const detours = world.detours.map(({ name, v4 }) => `${name}=${v4}:45672`).join(',');
      status = (await world.startAgent({ DETOUR_STRATEGY: 'vpn', DETOUR_DETOURS: detours })).status;
      await tunnelIs('up');
    });
    afterAll(() => scope.disposeAsync());

    async function tunnelIs(state: string): Promise<NonNullable<Status['tunnels']>[number]> {
      return waitUntil(async () => (await status()).tunnels?.find((one) => one.state === state), {
        deadlineMs: 30_000,
        what: `the tunnel to be ${state}`,
      });
    }

    it('has a tunnel that no process carries, at either end', async () => {
      const { carrier, interface: name, mtu } = await tunnelIs('up');
      expect({ carrier, mtu }).toEqual({ carrier: 'kernel', mtu: 1420 });
      for (const [host, dev] of [
        [world.client, name ?? ''],
        [world.detours[0]?.host, 'detour-vpn'],
      ] as const)
        expect(await host?.exec(['ip', '-details', 'link', 'show', dev])).toContain('wireguard');
    });

    it.each([
      ['IPv4', '10.81.0.2:5000', 'up'],
      ['IPv4', '10.81.0.2:5000', 'down'],
      ['IPv6', '[fd81::2]:5000', 'up'],
      ['IPv6', '[fd81::2]:5000', 'down'],
    ] as const)('uses both ways and arrives whole: %s, %s, %s', async (_, to, direction) => {
      const result = await startTransfer(world.client, { to, bytes: BYTES, direction }).result;
      expect(result.sha256).toBe(DIGEST);
      expect(result.mptcp).toBe(true);
      expect(result.paths.length).toBe(2);
      for (const path of result.paths) expect(path.bytes).toBeGreaterThan(BYTES / 5);
    });

    it('goes on when the tunnel’s way loses everything', async () => {
      const way = world.detours[0]?.way;
      const to = '10.81.0.2:5000';
      const transfer = startTransfer(world.client, { to, bytes: 2 * BYTES });
      await connectionIs(status, to, 'the tunnel to carry', ({ paths }) =>
        paths.some((path) => path.kind === 'vpn' && isInUse(path) && path.deliveredBytes > 200_000),
      );
      await way?.shape({ rateMbit: 5, delayMs: 20, lossPercent: 100 });
      expect((await transfer.result).sha256).toBe(expectedSha256('detour', 2 * BYTES));
      await way?.shape({ rateMbit: 5, delayMs: 20 });
    });
  });
});
