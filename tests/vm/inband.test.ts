import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parseEndpoint } from '../../appliance/protocol/address.ts';
import { type Host, requireVm, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { World } from '../netns/world.ts';
import { loadModules } from './modules.ts';

/** In-band joins and announced detours with the kernel and the nft of Debian 13, which takes less as text than older ones (docs/kernel-notes.md). */

const BYTES = 4_000_000;
const ROOT = join(import.meta.dirname, '../..');
const SERVER = '10.81.0.2';

describe.runIf(requireVm('tests of joins that need no lease'))('joins that need no lease', () => {
  const scope = new AsyncDisposableStack();
  let world: World;
  const detour = () => {
    const [first] = world.detours;
    if (!first) throw new Error('no detour');
    return first;
  };
  const counter = async (host: Host, table: string, name: string): Promise<number> =>
    Number(/packets (\d+)/.exec(await host.exec(['nft', 'list', 'counter', 'inet', table, name]))?.[1]);

  beforeAll(async () => {
    await loadModules();
    world = scope.use(await World.create('vm.inband', { rateMbit: 5 }));
    await startServer(world.server);
    await world.startRouters({ DETOUR_INBAND: 'on', DETOUR_ANNOUNCE_PORTS: '5000' });
  });
  afterAll(() => scope.disposeAsync());

  it('reach the server that they name, without the option; a second option reaches nobody', async () => {
    const { host, v4 } = detour();
    const said = await world.client.exec([
      process.execPath,
      join(ROOT, 'tests/lab/speaker.ts'),
      `${v4}:45672`,
      world.key,
      'hello',
    ]);
    const { capabilityPort } = JSON.parse(said);
    expect(capabilityPort).toBeGreaterThanOrEqual(20_000);
    await world.server.nft(
      'add table inet count\nadd counter inet count joins\nadd counter inet count options\n' +
        'add chain inet count in { type filter hook prerouting priority -400; }\n' +
        'add rule inet count in ip saddr 10.83.1.1 tcp dport 5001 tcp option mptcp subtype 1 counter name joins\n' +
        'add rule inet count in tcp option @253,0,8 253 counter name options\n',
    );
    const { address } = parseEndpoint(`${SERVER}:5001`) ?? { address: { value: 0n } };
    const option = `fd08${address.value.toString(16).padStart(8, '0')}1389`;
    const send = (source: number, options: string): Promise<string> =>
      world.client.exec([
        'python3',
        join(ROOT, 'tests/lab/packets.py'),
        'tcp',
        '10.80.0.1',
        v4,
        String(source),
        String(capabilityPort),
        'S',
        options,
      ]);
    await send(41_000, `020405b4J${option}${option}`);
    await send(41_001, `020405b4J${option}`);
    await waitUntil(async () => (await counter(world.server, 'count', 'joins')) === 1, {
      deadlineMs: 60_000,
      what: 'the join to arrive',
    });
    expect(await counter(host, 'detour', 'inband_malformed')).toBe(1);
    expect(await counter(host, 'detour', 'inband_syn')).toBe(2);
    expect(await counter(world.server, 'count', 'options')).toBe(0);
  });

  it('carry a stock client’s transfer when the server announces the detour', async () => {
    await world.client.exec(['ip', 'mptcp', 'limits', 'set', 'subflow', '2', 'add_addr_accepted', '2']);
    await world.startAgent({ DETOUR_ROLE: 'server', DETOUR_ANNOUNCE: '5000' }, world.server);
    await waitUntil(
      async () => (await world.server.exec(['ip', 'mptcp', 'endpoint', 'show'])).includes(`${detour().v4} `),
      { deadlineMs: 120_000, what: 'the detour to be announced' },
    );
    const result = await startTransfer(world.client, { to: `${SERVER}:5000`, bytes: BYTES }).result;
    expect(result.sha256).toBe(expectedSha256('detour', BYTES));
    expect(result.paths.length).toBe(2);
    for (const path of result.paths) expect(path.bytes).toBeGreaterThan(BYTES / 20);
  });
});
