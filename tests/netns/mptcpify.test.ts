import { describe, expect, it } from 'vitest';
import { BpfError } from '../../appliance/kernel/bpf.ts';
import { openSwitches } from '../../appliance/kernel/mptcpify.ts';
import { type ExecResult, requireRoot } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, hostState, pathBy, World } from './world.ts';

/**
 * Where plain TCP sockets cannot be made Multipath TCP. That they can is tests/vm/mptcpify.test.ts; needs the object of `make build`.
 */

const SERVER = '10.81.0.2:5000';
const BYTES = 10_000_000;
/** `detour` with the capabilities of the README alone. */
const unprivileged = ['setpriv', '--bounding-set=-all,+net_admin'];

/** Why this kernel refuses, with all of root's capabilities; null when it does not. */
function refusal(): string | null {
  try {
    openSwitches().close();
    return null;
  } catch (error) {
    if (error instanceof BpfError && error.reason === 'refused') return error.message;
    throw error;
  }
}

describe.runIf(requireRoot('tests of what is not made Multipath TCP'))('without the capabilities for BPF', () => {
  it('the agent says which it lacks and what else there is, and serves', async () => {
    await using world = await World.create('mptcpify');
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent({ DETOUR_MPTCPIFY: 'all' }, world.client, unprivileged);
    await detoursAre(agent.status, 'up');
    const { mptcpify } = await agent.status();
    expect(mptcpify).toMatchObject({ mode: 'all', state: 'unavailable', by: null, sockets: null });
    expect(mptcpify?.why).toMatch(/needs CAP_BPF and CAP_PERFMON.*--cap-add BPF --cap-add PERFMON/);
    const said = agent.program.lines.filter((line) => line.includes('"event":"mptcpify-unavailable"'));
    expect(said).toEqual([expect.stringMatching(/mptcpize run.*GODEBUG=multipathtcp=1/)]);
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    await connectionIs(agent.status, SERVER, 'the path', (one) => pathBy(one, 'detour1') !== undefined);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
  });

  it('`detour load` changes nothing and names what to add', async () => {
    await using world = await World.create('mptcpify', { detours: 0 });
    const before = await hostState(world.client);
    const { code, stderr } = await load(world, unprivileged);
    expect(code).toBe(69);
    expect(stderr).toMatch(/DETOUR_MPTCPIFY: .*needs CAP_BPF and CAP_PERFMON.*capabilities\.add: \[BPF, PERFMON\]/);
    expect(await hostState(world.client)).toEqual(before);
  });

  it('`detour load` is as good as the kernel: it says what is refused, or where there is nowhere to stay', async () => {
    await using world = await World.create('mptcpify', { detours: 0 });
    const before = await hostState(world.client);
    const nowhere = await load(world, withoutPins);
    const somewhere = await load(world, withPins);
    if (refusal() === null) {
      expect(nowhere.code).toBe(69);
      expect(nowhere.stderr).toMatch(/no BPF file system at \/sys\/fs\/bpf.*mount -t bpf bpf \/sys\/fs\/bpf/);
      expect(somewhere.stdout).toMatch(/plain TCP sockets of this network become Multipath TCP/);
    } else {
      for (const { code, stdout, stderr } of [nowhere, somewhere]) {
        expect(stderr).toMatch(/mptcpize run.*GODEBUG.*this kernel, or the sandbox around it, refuses/);
        expect(stdout).toBe('the userspace path manager is selected\n');
        expect(code).toBe(0);
      }
    }
    await world.command(['unload']);
    expect(await hostState(world.client)).toEqual(before);
  });
});

/** In a BPF file system of its own, whether this machine has one or not. */
const withoutPins = ['unshare', '-m', 'sh', '-c', 'umount -l /sys/fs/bpf 2>/dev/null; exec "$@"', '-'];
const withPins = ['unshare', '-m', 'sh', '-c', 'mount -t bpf bpf /sys/fs/bpf && exec "$@"', '-'];

const load = (world: World, prefix: readonly string[]): Promise<ExecResult> =>
  world.tryCommand(['load'], { DETOUR_MPTCPIFY: 'all' }, world.client, prefix);
