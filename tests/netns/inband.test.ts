import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Host, requireRoot } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, type Status, type StatusPath, World } from './world.ts';

/** In-band transit with both kernels: ours writes the option, the detour's reads it. */

const LAB = join(import.meta.dirname, '../lab');
const SERVER = '10.81.0.2:5000';
const BYTES = 10_000_000;
const INBAND = { DETOUR_STRATEGY: 'inband' };
const PORTS = 25;
const ADDRESSES = ['10.84.0.1', '10.84.0.2', '10.84.0.3', '10.84.0.4'];
/** The router lets 50 SYNs a second through, and a client have 1,024 flows: these take some twenty seconds. */
const CONNECTIONS = 1_000;

describe.runIf(requireRoot('tests of in-band transit'))('joins that name their server', () => {
  let world: World;
  const detour = () => {
    const [first] = world.detours;
    if (!first) throw new Error('no detour');
    return first;
  };
  const detours = (): string => `detour1=${detour().v4}:45672`;
  const leases = async (): Promise<string> => detour().host.exec(['nft', 'list', 'map', 'inet', 'detour', 'leases4']);
  const counter = async (host: Host, table: string, name: string): Promise<number> =>
    Number(/packets (\d+)/.exec(await host.exec(['nft', 'list', 'counter', 'inet', table, name]))?.[1]);

  beforeAll(async () => {
    world = await World.create('inband', { rateMbit: 20 });
    // Where `detour load` leaves the program: the host's own is nobody's business here.
    await world.client.isolate('/sys/fs/bpf', 'bpf');
    await startServer(world.server);
    await world.server.nft(
      'add table inet count\nadd counter inet count options\n' +
        'add chain inet count in { type filter hook prerouting priority -400; }\n' +
        'add rule inet count in tcp option @253,0,8 253 counter name options\n',
    );
    await world.startRouter(detour(), { DETOUR_INBAND: 'on', DETOUR_ALLOW: '10.81.0.0/30,10.84.0.0/24' });
  });
  afterAll(() => world?.[Symbol.asyncDispose]());

  /** A transfer during which the path by the detour is of that kind. */
  async function transferBy(kind: string, agent: { status: () => Promise<Status> }): Promise<StatusPath> {
    await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    const connection = await connectionIs(agent.status, SERVER, `a path by ${kind}`, ({ paths }) =>
      paths.some((path) => path.detour === 'detour1' && path.kind === kind && path.deliveredBytes > 100_000),
    );
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
    const [path] = connection.paths.filter((one) => one.detour === 'detour1');
    if (!path) throw new Error('no path');
    return path;
  }

  it('carry a part of a connection, and the option stays on this side of the detour', async () => {
    const agent = await world.startAgent({ ...INBAND, DETOUR_DETOURS: detours() });
    const before = await counter(detour().host, 'detour', 'inband_syn');
    await transferBy('inband', agent);
    expect(await counter(detour().host, 'detour', 'inband_syn')).toBeGreaterThan(before);
    expect(await counter(world.server, 'count', 'options')).toBe(0);
    expect(await agent.status()).toMatchObject({
      inband: { state: 'on', by: 'agent' },
      detours: [{ strategy: 'inband,nat' }],
    });
    expect(await agent.program.stop()).toEqual({ code: 0, signal: null });
  });

  it.each([
    ['drops SYNs with the option', 'drop'],
    ['takes the option out', 'reset tcp option 253'],
  ])('give way to leases, in the same connection, where a middlebox %s', async (_, verdict) => {
    const agent = await world.startAgent({ ...INBAND, DETOUR_DETOURS: detours() });
    await world.gateway.nft(
      'add table inet middlebox\nadd chain inet middlebox in { type filter hook forward priority 0; }\n' +
        `add rule inet middlebox in tcp option @253,8,8 8 ${verdict}\n`,
    );
    try {
      await transferBy('nat', agent);
      expect(await agent.status()).toMatchObject({ detours: [{ strategy: 'nat' }] });
    } finally {
      await world.gateway.nft('delete table inet middlebox\n');
      await agent.program.stop();
    }
  });

  it('give way to leases where the kernel may not be prepared, which is said', async () => {
    const prefix = ['setpriv', '--bounding-set=-bpf,-perfmon,-sys_admin'];
    const agent = await world.startAgent({ ...INBAND, DETOUR_DETOURS: detours() }, world.client, prefix);
    await transferBy('nat', agent);
    expect(await agent.status()).toMatchObject({
      inband: { state: 'unavailable', why: expect.stringMatching(/needs CAP_BPF and CAP_PERFMON.*--cap-add BPF/) },
    });
    await agent.program.stop();
  });

  it('need no capability when `detour load` prepared the kernel, with `auto`, too', async () => {
    expect(await world.command(['load'], { ...INBAND })).toMatch(/joins may name their servers/);
    try {
      const prefix = ['setpriv', '--bounding-set=-bpf,-perfmon,-sys_admin'];
      const agent = await world.startAgent({ DETOUR_DETOURS: detours() }, world.client, prefix);
      await transferBy('inband', agent);
      expect(await agent.status()).toMatchObject({ inband: { state: 'on', by: 'load' } });
      await agent.program.stop();
    } finally {
      await world.command(['unload']);
    }
    expect(await world.client.exec(['sh', '-c', 'ls /sys/fs/bpf/detour 2>/dev/null || echo gone'])).toBe('gone\n');
  });

  it('lead a thousand connections to a hundred servers, each to its own, and leave no state behind for any', async () => {
    for (const address of ADDRESSES)
      await world.server.exec(['ip', 'address', 'replace', `${address}/32`, 'dev', 'lo']);
    await world.gateway.route('10.84.0.0/24 via 10.81.0.2');
    await detour().host.route('10.84.0.0/24 via 10.83.1.2');
    const places = ADDRESSES.flatMap((address) =>
      Array.from({ length: PORTS }, (_, index) => `${address}:${7_000 + index}`),
    );
    await world.client.exec(['sysctl', '-qw', 'net.mptcp.pm_type=1']);
    const server = world.server.spawn(['python3', join(LAB, 'crowd.py'), 'serve', ...places]);
    await server.waitFor('listening', 20_000);
    const joiner = world.client.spawn([
      process.execPath,
      join(LAB, 'inband-joiner.ts'),
      `${detour().v4}:45672`,
      world.key,
    ]);
    await joiner.waitFor('ready', 20_000);
    const crowd = world.client.spawn([
      'python3',
      join(LAB, 'crowd.py'),
      'connect',
      String(CONNECTIONS),
      '8192',
      ...places,
    ]);
    await crowd.waitFor('connected', 60_000);
    await joiner.waitFor(new RegExp(`joined ${CONNECTIONS} refused 0`), 90_000);
    const joins = await world.server.exec(['ss', '-tnH', 'state', 'established', 'dst', '10.83.1.1']);
    expect(joins.trim().split('\n')).toHaveLength(CONNECTIONS);
    crowd.write('\n');
    await crowd.waitFor(`good ${CONNECTIONS}`, 60_000);
    for (const address of ADDRESSES) expect(await leases()).not.toContain(address);
    expect(await counter(world.server, 'count', 'options')).toBe(0);
    await joiner.stop('SIGKILL');
    await server.stop('SIGKILL');
  }, 200_000);
});
