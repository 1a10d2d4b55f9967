import { createHash } from 'node:crypto';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  rmdirSync,
  rmSync,
  statSync,
  writeFileSync,
} from 'node:fs';
import { homedir, tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { type Mptcpify, startMptcpify } from '../../appliance/client/mptcpify.ts';
import { ROOT_GROUP } from '../../appliance/client/switches.ts';
import { systemGroups } from '../../appliance/kernel/cgroups.ts';
import { systemClock } from '../../appliance/kernel/clock.ts';
import { isPinned, openSwitches, type Switches } from '../../appliance/kernel/mptcpify.ts';
import { bpfObjects } from '../lab/bpf-objects.ts';
import { type ExecResult, type Host, Lab, requireVm, waitUntil } from '../lab/netns.ts';
import { switchCases } from '../lab/switch-cases.ts';
import { startServer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, hostState, isInUse, pathBy, World } from '../netns/world.ts';
import { loadModules } from './modules.ts';

/** Plain TCP sockets that become Multipath TCP: needs a kernel that takes tracing programs, and the object of `make build`. */

const MPTCP = 262;
const TCP = 6;
const CGROUPS = '/sys/fs/cgroup';
const PINS = '/sys/fs/bpf/detour';

const inodeOf = (path: string): number => statSync(path).ino;
const idOf = (path: string): bigint => statSync(path, { bigint: true }).ino;

/** The protocol of a socket that an unmodified Python makes with these arguments. */
async function protocolOf(host: Host, socket: string, group = CGROUPS): Promise<number> {
  const text = `from socket import *\nprint(socket(${socket}).getsockopt(SOL_SOCKET, SO_PROTOCOL))`;
  return Number(await host.exec(within(group, ['python3', '-c', text])));
}

/** A command in a control group. */
const within = (group: string, command: readonly string[]): string[] => [
  'sh',
  '-c',
  `echo $$ >'${group}/cgroup.procs' && exec "$@"`,
  '-',
  ...command,
];

/** How many connections this host asked for by Multipath TCP. */
async function mptcpSyns(host: Host): Promise<number> {
  const [names = '', values = ''] = (await host.exec(['grep', '^MPTcpExt:', '/proc/net/netstat'])).split('\n');
  const at = names.split(' ').indexOf('MPCapableSYNTX');
  return Number(values.split(' ')[at]);
}

/** Everything of ours in this kernel that is BPF. */
const bpfLeft = (): string[] => [
  ...bpfObjects().filter((name) => name.startsWith('mptcp')),
  ...(existsSync(PINS) ? readdirSync(PINS) : []),
];

/** The kernel frees a program some time after nobody holds it any more. */
const nothingIsLeft = (): Promise<unknown> =>
  waitUntil(() => bpfLeft().length === 0, { deadlineMs: 10_000, what: 'what is ours of BPF to be gone' });

describe.runIf(requireVm('tests of what becomes Multipath TCP'))('an unmodified program', () => {
  let lab: Lab;
  let host: Host;
  let switches: Switches;
  const folders: string[] = [];

  beforeAll(async () => {
    await loadModules();
    lab = await Lab.create('bpf');
    host = await lab.host('host');
    await nothingIsLeft();
    expect(await protocolOf(host, 'AF_INET, SOCK_STREAM')).toBe(TCP);
    // Once for all: an emulated processor takes its time to read the kernel's types.
    switches = openSwitches();
  });
  afterAll(async () => {
    switches?.close();
    await nothingIsLeft();
    expect(await protocolOf(host, 'AF_INET, SOCK_STREAM')).toBe(TCP);
    await lab[Symbol.asyncDispose]();
  });

  function group(path: string): string {
    const folder = join(CGROUPS, path);
    mkdirSync(folder);
    folders.push(folder);
    return folder;
  }

  /** Serves this host alone, for as long as the test takes. */
  function serve(): Switches {
    switches.nets.set(inodeOf(host.path), 1);
    return switches;
  }

  afterEach(() => {
    for (const net of switches.nets.entries().keys()) switches.nets.delete(net);
    for (const group of switches.groups.entries().keys()) switches.groups.delete(group);
    for (const folder of folders.splice(0).reverse()) rmdirSync(folder);
  });

  it.each([
    'AF_INET, SOCK_STREAM',
    'AF_INET6, SOCK_STREAM',
    'AF_INET, SOCK_STREAM, IPPROTO_TCP',
    'AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK',
  ])('gets Multipath TCP for %s, for as long as it is chosen', async (socket) => {
    expect(await protocolOf(host, socket)).toBe(TCP);
    const before = switches.made();
    serve().groups.set(ROOT_GROUP, 1);
    expect(await protocolOf(host, socket)).toBe(MPTCP);
    expect(switches.made()).toBe(before + 1);
    switches.groups.delete(ROOT_GROUP);
    expect(await protocolOf(host, socket)).toBe(TCP);
  });

  it.each([
    ['AF_INET, SOCK_DGRAM', 17],
    ['AF_INET6, SOCK_DGRAM', 17],
    ['AF_UNIX, SOCK_STREAM', 0],
    ['AF_INET, SOCK_RAW, IPPROTO_ICMP', 1],
    ['AF_INET, SOCK_STREAM, IPPROTO_SCTP', 132],
  ])('gets what it asked for by %s', async (socket, protocol) => {
    const before = switches.made();
    serve().groups.set(ROOT_GROUP, 1);
    expect(await protocolOf(host, socket)).toBe(protocol);
    expect(switches.made()).toBe(before);
  });

  it('is chosen by the nearest control group that says something', async () => {
    const outer = group('outer');
    const inner = group('outer/inner');
    const deepest = group('outer/inner/deepest');
    const { groups } = serve();
    const tcp = 'AF_INET, SOCK_STREAM';
    groups.set(idOf(outer), 1);
    expect(await protocolOf(host, tcp)).toBe(TCP);
    expect(await protocolOf(host, tcp, outer)).toBe(MPTCP);
    expect(await protocolOf(host, tcp, deepest)).toBe(MPTCP);
    groups.set(idOf(inner), 0);
    expect(await protocolOf(host, tcp, outer)).toBe(MPTCP);
    expect(await protocolOf(host, tcp, deepest)).toBe(TCP);
    groups.set(idOf(deepest), 1);
    expect(await protocolOf(host, tcp, deepest)).toBe(MPTCP);
  });

  it('is chosen in the network namespaces that are served alone', async () => {
    const other = await lab.host('other');
    serve().groups.set(ROOT_GROUP, 1);
    expect(await protocolOf(other, 'AF_INET, SOCK_STREAM')).toBe(TCP);
    switches.nets.set(inodeOf(other.path), 1);
    expect(await protocolOf(other, 'AF_INET, SOCK_STREAM')).toBe(MPTCP);
    switches.nets.delete(inodeOf(host.path));
    expect(await protocolOf(host, 'AF_INET, SOCK_STREAM')).toBe(TCP);
  });

  it('would have no socket where Multipath TCP is off, which is why namespaces count', async () => {
    serve().groups.set(ROOT_GROUP, 1);
    await host.sysctl('net.mptcp.enabled', 0);
    await expect(protocolOf(host, 'AF_INET, SOCK_STREAM')).rejects.toThrow('Protocol not available');
    switches.nets.delete(inodeOf(host.path));
    expect(await protocolOf(host, 'AF_INET, SOCK_STREAM')).toBe(TCP);
    await host.sysctl('net.mptcp.enabled', 1);
  });

  it('is left alone when its name is the agent’s, and only then', async () => {
    serve().groups.set(ROOT_GROUP, 1);
    const named = async (name: string): Promise<number> =>
      Number(
        await host.exec([
          'python3',
          '-c',
          `import ctypes\nfrom socket import *\nctypes.CDLL(None).prctl(15, b"${name}")\nprint(socket().getsockopt(SOL_SOCKET, SO_PROTOCOL))`,
        ]),
      );
    expect(await named('detour')).toBe(TCP);
    expect(await named('detours')).toBe(MPTCP);
    expect(await named('detou')).toBe(MPTCP);
  });

  it.each<[string, readonly string[]]>([
    ['curl', ['curl', '-s', '-m', '20', 'http://127.0.0.1:5000/']],
    [
      'Node',
      [
        process.execPath,
        '-e',
        "require('net').connect(5000,'127.0.0.1').on('error',()=>{}).on('connect',function(){this.destroy()})",
      ],
    ],
    ['Python', ['python3', '-c', "import socket; socket.create_connection(('127.0.0.1', 5000)).close()"]],
  ])('%s asks for Multipath TCP inside the control group and not outside', async (_, command) => {
    const server = await startServer(host);
    const chosen = group('chosen');
    serve().groups.set(idOf(chosen), 1);
    const before = await mptcpSyns(host);
    await host.try(within(CGROUPS, command));
    expect(await mptcpSyns(host)).toBe(before);
    await host.try(within(chosen, command));
    expect(await mptcpSyns(host)).toBe(before + 1);
    await server.stop();
  });

  it('listens by Multipath TCP and still takes who speaks TCP', async () => {
    const listen = within(CGROUPS, [
      'python3',
      '-u',
      '-c',
      'from socket import *\ns = create_server(("127.0.0.1", 5001))\nprint(s.getsockopt(SOL_SOCKET, SO_PROTOCOL))\nprint(s.accept()[0].recv(9))',
    ]);
    serve().groups.set(ROOT_GROUP, 1);
    const server = host.spawn(listen);
    await server.waitFor('262');
    switches.groups.delete(ROOT_GROUP);
    await host.exec(['python3', '-c', 'import socket\nsocket.create_connection(("127.0.0.1", 5001)).send(b"by TCP")']);
    await server.waitFor("b'by TCP'");
    expect((await server.exited).code).toBe(0);
  });

  describe('the maps of the kernel', () => {
    switchCases((task) => task(switches));
  });

  describe('in a container', () => {
    const ID = 'c0ffee'.padEnd(64, '0');
    const UID = '8f1f4a02-5c5e-4d57-a0a5-3e2ba3a8a6b1';
    let mptcpify: Mptcpify | null = null;
    const log = { debug: () => undefined, info: () => undefined, warn: () => undefined, error: () => undefined };

    afterEach(() => {
      mptcpify?.stop();
      mptcpify = null;
    });

    /** The container's own control group is the last one; each is made within the one before. */
    it.each<[string, readonly string[]]>([
      ['Docker, systemd', ['lab.slice', `docker-${ID}.scope`]],
      ['Docker, cgroupfs', ['docker', ID]],
      [
        'containerd, systemd',
        ['kubepods.slice', `kubepods-pod${UID.replaceAll('-', '_')}.slice`, `cri-containerd-${ID}.scope`],
      ],
      ['containerd, cgroupfs', ['kubepods', 'besteffort', `pod${UID}`, ID]],
      ['CRI-O, systemd, no group of the pod', ['machine.slice', `crio-${ID}.scope`, 'container']],
    ])('of %s is found by its name, while it is wanted', async (_, parts) => {
      mptcpify = startMptcpify('labelled', {
        clock: systemClock,
        log,
        groups: systemGroups(),
        openSwitches: () => ({ ...switches, close: () => undefined }),
        isPinned,
      });
      const net = { inode: inodeOf(host.path), mptcpEnabled: async () => true };
      const wish = { key: 'k', name: 'n', groups: [`pod${UID}`, `pod${UID.replaceAll('-', '_')}`, ID], mptcp: true };
      // It is in the making when it is heard of.
      mptcpify.update([net], [wish]);
      const own = parts.map((_, index) => group(parts.slice(0, index + 1).join('/'))).at(-1) ?? '';
      const it = mptcpify;
      await waitUntil(() => it.includes('k'), { deadlineMs: 60_000, what: 'the control group' });
      expect(await protocolOf(host, 'AF_INET, SOCK_STREAM', own)).toBe(MPTCP);
      expect(await protocolOf(host, 'AF_INET, SOCK_STREAM')).toBe(TCP);
      it.update([net], []);
      expect(await protocolOf(host, 'AF_INET, SOCK_STREAM', own)).toBe(TCP);
    });
  });
});

describe.runIf(requireVm('tests of detour load'))('`detour load`', () => {
  let world: World;
  let before: Record<string, string>;

  beforeAll(async () => {
    await loadModules();
    world = await World.create('bpfload', { detours: 0 });
    before = await hostState(world.client);
  });
  afterAll(() => world?.[Symbol.asyncDispose]());
  afterEach(async () => {
    if (existsSync(PINS)) await world.command(['unload'], { DETOUR_MPTCPIFY: 'all' });
    await nothingIsLeft();
    expect(await hostState(world.client)).toEqual(before);
  });

  const load = (capabilities: string, mode = 'all'): Promise<ExecResult> =>
    world.tryCommand(['load'], { DETOUR_MPTCPIFY: mode }, world.client, [
      'setpriv',
      `--bounding-set=-all,${capabilities}`,
    ]);
  const protocol = (): Promise<number> => protocolOf(world.client, 'AF_INET, SOCK_STREAM');

  it.each([
    ['+net_admin', 'CAP_BPF and CAP_PERFMON'],
    ['+net_admin,+bpf', 'CAP_PERFMON'],
    ['+net_admin,+perfmon', 'CAP_BPF'],
  ])('with %s alone is refused, and names %s', async (capabilities, missing) => {
    const { code, stderr } = await load(capabilities);
    expect(stderr).toContain(`it needs ${missing}. docker: `);
    expect(code).toBe(69);
    expect(await protocol()).toBe(TCP);
  });

  it('needs NET_ADMIN, BPF and PERFMON, and is done with them: what it attached stays', async () => {
    const { code, stdout, stderr } = await load('+net_admin,+bpf,+perfmon');
    expect(stderr).toBe('');
    expect(code).toBe(0);
    expect(stdout).toMatch(/plain TCP sockets of this network become Multipath TCP/);
    expect(await protocol()).toBe(MPTCP);
    expect(await protocolOf(world.server, 'AF_INET, SOCK_STREAM')).toBe(TCP);
    // As often as you like, and with other settings.
    expect((await load('+net_admin,+bpf,+perfmon', 'labelled')).code).toBe(0);
    expect(await protocol()).toBe(TCP);
    expect((await load('+net_admin', 'all')).code).toBe(0);
    expect(await protocol()).toBe(MPTCP);
  });

  it('is enough for an agent with NET_ADMIN alone that sees it mounted read-only', async () => {
    await load('+net_admin,+bpf,+perfmon', 'labelled');
    const agent = await world.startAgent({ DETOUR_MPTCPIFY: 'all', DETOUR_ROLE: 'server' }, world.client, [
      ...['unshare', '-m', 'sh', '-c', 'mount -o remount,bind,ro /sys/fs/bpf && exec "$@"', '-'],
      'setpriv',
      '--bounding-set=-all,+net_admin',
    ]);
    expect((await agent.status()).mptcpify).toMatchObject({ state: 'on', by: 'load', why: null });
    expect(await protocol()).toBe(MPTCP);
    expect((await agent.status()).mptcpify?.sockets).toBe(1);
    expect(await agent.metrics()).toMatch(/detour_client_mptcpify_on 1\n/);
    await agent.program.stop();
    expect(await protocol()).toBe(TCP);
    expect(bpfLeft()).not.toEqual([]);
  });

  it('outlives an agent that is killed, whose choices the next one forgets', async () => {
    await load('+net_admin,+bpf,+perfmon', 'labelled');
    const first = await world.startAgent({ DETOUR_MPTCPIFY: 'all', DETOUR_ROLE: 'server' });
    await first.program.stop('SIGKILL');
    expect(await protocol()).toBe(MPTCP);
    const second = await world.startAgent({ DETOUR_MPTCPIFY: 'labelled', DETOUR_ROLE: 'server' });
    expect(await protocol()).toBe(TCP);
    await second.program.stop();
  });

  it('is not needed by an agent that has the capabilities, which leaves nothing, even killed', async () => {
    const options = { DETOUR_MPTCPIFY: 'all', DETOUR_ROLE: 'server' };
    const agent = await world.startAgent(options, world.client, [
      'setpriv',
      '--bounding-set=-all,+net_admin,+bpf,+perfmon',
    ]);
    expect((await agent.status()).mptcpify).toMatchObject({ state: 'on', by: 'agent' });
    expect(await protocol()).toBe(MPTCP);
    await agent.program.stop('SIGKILL');
    await nothingIsLeft();
    expect(await protocol()).toBe(TCP);
    // But the limit that it raised.
    await world.command(['cleanup', 'client']);
  });

  it('keeps sockets from failing when somebody switches Multipath TCP off while the agent runs', async () => {
    const agent = await world.startAgent({ DETOUR_MPTCPIFY: 'all', DETOUR_ROLE: 'server' });
    await world.client.sysctl('net.mptcp.enabled', 0);
    await waitUntil(async () => (await protocol()) === TCP, {
      deadlineMs: 60_000,
      what: 'sockets that are made again',
    });
    await world.client.sysctl('net.mptcp.enabled', 1);
    await waitUntil(async () => (await protocol()) === MPTCP, {
      deadlineMs: 60_000,
      what: 'them to be Multipath TCP again',
    });
    await agent.program.stop();
  });

  it('goes with `detour cleanup`', async () => {
    await load('+net_admin,+bpf,+perfmon');
    await world.command(['cleanup', 'client'], { DETOUR_MPTCPIFY: 'all' });
    expect(await protocol()).toBe(TCP);
    await nothingIsLeft();
    expect(await hostState(world.client)).toEqual(before);
  });
});

/** Debian's, unpacked by `tests/lab/host.sh packages vm`: installed it would start on this machine. */
const NGINX = join(process.env.XDG_CACHE_HOME ?? join(homedir(), '.cache'), 'detour/nginx/usr/sbin/nginx');
const SIZE = 30_000_000;
const RATE_MBIT = 10;

describe.runIf(requireVm("tests of Debian's curl and nginx"))("Debian's curl and nginx, both as they are", () => {
  let world: World;
  let folder: string;
  let sha256: string;
  const SERVER = '10.81.0.2:8080';
  const serverSide = { DETOUR_ROLE: 'server', DETOUR_MPTCPIFY: 'all' };

  beforeAll(async () => {
    await loadModules();
    if (!existsSync(NGINX)) throw new Error(`${NGINX} is missing: tests/lab/host.sh packages vm`);
    world = await World.create('curl', { rateMbit: RATE_MBIT });
    folder = mkdtempSync(join(tmpdir(), 'detour-nginx-'));
    const content = Buffer.alloc(SIZE, 'what curl and nginx never knew\n');
    sha256 = createHash('sha256').update(content).digest('hex');
    mkdirSync(join(folder, 'www'));
    writeFileSync(join(folder, 'www/file'), content);
    writeFileSync(
      join(folder, 'nginx.conf'),
      `pid ${folder}/pid; error_log stderr; daemon off; master_process off; user root;
events {}
http {
  access_log off;
  ${['client_body', 'proxy', 'fastcgi', 'uwsgi', 'scgi'].map((name) => `${name}_temp_path ${folder}/${name};`).join(' ')}
  server { listen 10.81.0.2:8080; root ${folder}/www; }
}`,
    );
    await world.startRouters();
  });
  afterAll(async () => {
    await world?.[Symbol.asyncDispose]();
    rmSync(folder, { recursive: true, force: true });
  });

  async function startNginx(): Promise<() => Promise<unknown>> {
    const nginx = world.server.spawn([NGINX, '-c', join(folder, 'nginx.conf'), '-p', folder]);
    await waitUntil(async () => (await world.server.exec(['ss', '-Hltn'])).includes(SERVER), {
      deadlineMs: 60_000,
      what: 'nginx to listen',
    });
    return () => nginx.stop();
  }

  /** Fetches the file and returns its rate, bit/s. */
  async function fetch(): Promise<number> {
    const file = join(folder, 'got');
    const command = ['curl', '-sS', '-o', file, '-w', '%{speed_download}', `http://${SERVER}/file`];
    const speed = await world.client.exec(command, { timeoutMs: 60_000 });
    expect(createHash('sha256').update(readFileSync(file)).digest('hex')).toBe(sha256);
    return Number(speed) * 8;
  }

  it('gain a second path, and both carry', async () => {
    const serverAgent = await world.startAgent(serverSide, world.server);
    const stopNginx = await startNginx();
    const direct = await fetch();
    const agent = await world.startAgent({ DETOUR_MPTCPIFY: 'all' });
    await detoursAre(agent.status, 'up');
    const fetching = fetch();
    await connectionIs(agent.status, SERVER, 'both ways to carry', (one) => {
      const carried = (detour: string | null): number => pathBy(one, detour)?.deliveredBytes ?? 0;
      return one.paths.filter(isInUse).length === 2 && carried(null) > SIZE / 10 && carried('detour1') > SIZE / 10;
    });
    const both = await fetching;
    const mbit = (rate: number): string => (rate / 1e6).toFixed(1);
    console.log(
      `curl and nginx: ${mbit(direct)} Mbit/s direct, ${mbit(both)} with the detour: ${(both / direct).toFixed(2)} times`,
    );
    await agent.program.stop();
    await stopNginx();
    await serverAgent.program.stop();
  });

  it('still understand each other when nginx listens by TCP', async () => {
    const stopNginx = await startNginx();
    const agent = await world.startAgent({ DETOUR_MPTCPIFY: 'all' });
    const before = await mptcpSyns(world.client);
    await fetch();
    expect(await mptcpSyns(world.client)).toBe(before + 1);
    await agent.program.stop();
    await stopNginx();
    await nothingIsLeft();
  });
});
