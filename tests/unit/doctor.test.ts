import { randomBytes } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { type Check, examine, presentChecks, type Subject } from '../../appliance/doctor.ts';
import { loadClientHostSettings, loadRouterSettings } from '../../appliance/settings.ts';
import { FakeClock } from '../fakes/clock.ts';
import { fakeMachine, type MachineParts } from '../fakes/machine.ts';
import { FakeNetwork } from '../fakes/network.ts';

const sources = { env: { DETOUR_KEYS: `1a2b3c4d:${randomBytes(32).toString('base64url')}` }, file: () => null };
const router = loadRouterSettings(sources).settings;
const client = loadClientHostSettings({ ...sources, env: {} }).settings;

type Chain = { family: string; table: string; name: string; hook?: string; policy?: string };
const ruleset = (...chains: Chain[]): string =>
  JSON.stringify({ nftables: [{ metainfo: {} }, ...chains.map((chain) => ({ chain }))] });
const withVpn = loadRouterSettings({ ...sources, env: { ...sources.env, DETOUR_VPN: 'wireguard' } }).settings;
const withTunnels = loadClientHostSettings({ ...sources, env: { DETOUR_STRATEGY: 'vpn,nat' } }).settings;
const withRescue = loadClientHostSettings({ ...sources, env: { DETOUR_RESCUE: 'on' } }).settings;
const REDIRECTION =
  'nft --check add table inet detour_rescue; add chain inet detour_rescue output { type nat hook output priority -100; }';
const FORWARD = { family: 'ip', table: 'filter', name: 'FORWARD', hook: 'forward', policy: 'drop' };
const DOCKER_USER = { family: 'ip', table: 'filter', name: 'DOCKER-USER' };

/** A machine on which everything is well for both roles. */
const WELL = {
  files: {
    '/proc/sys/kernel/osrelease': '6.12.5-amd64\n',
    '/proc/self/status': 'Name:\tnode\nCapEff:\t0000000000001000\n',
    '/proc/sys/net/mptcp/enabled': '1\n',
    '/proc/sys/net/mptcp/pm_type': '0\n',
    '/proc/sys/net/ipv4/ip_forward': '1\n',
    '/proc/sys/net/ipv6/conf/all/forwarding': '1\n',
    '/proc/sys/net/ipv4/ip_local_port_range': '32768\t60999\n',
    '/proc/sys/net/netfilter/nf_conntrack_count': '100\n',
    '/proc/sys/net/netfilter/nf_conntrack_max': '262144\n',
    '/proc/net/tcp': '  sl  local_address rem_address   st\n   0: 00000000:0016 00000000:0000 0A 00000000:00000000\n',
    '/proc/net/udp': '  sl  local_address rem_address   st\n',
  },
  writable: ['/proc/sys/net/mptcp/pm_type'],
  commands: {
    'nft --version': 'nftables v1.0.6 (Lester Gooch #5)\n',
    'nft list tables': '',
    'nft -j list chains': ruleset(),
  },
} satisfies MachineParts;

async function diagnose(
  changes: MachineParts = {},
  subject: Partial<Subject> = {},
  kubernetes = false,
): Promise<readonly Check[]> {
  const clock = new FakeClock();
  const files = { ...WELL.files, ...changes.files };
  return examine(
    { router, client, detours: null, problems: [], running: { router: false, client: false }, ...subject },
    {
      machine: fakeMachine({
        files: Object.fromEntries(Object.entries(files).filter(([, text]) => text !== '')),
        writable: changes.writable ?? WELL.writable,
        commands: changes.commands ? { ...WELL.commands, ...changes.commands } : WELL.commands,
      }),
      clock: {
        now: () => clock.now(),
        wall: () => Date.UTC(2026, 0, 1),
        after: clock.after.bind(clock),
        random: clock.random.bind(clock),
      },
      datagrams: new FakeNetwork(clock).host([]),
      resolve: async () => [],
      kubernetes,
      engine: '/var/run/docker.sock',
    },
  );
}

const sick = (checks: readonly Check[]): readonly Check[] => checks.filter(({ state }) => state !== 'ok');

/** The one check that is not fine. */
async function only(changes: MachineParts, subject?: Partial<Subject>, kubernetes?: boolean): Promise<Check> {
  const found = sick(await diagnose(changes, subject, kubernetes));
  expect(found.map(({ name }) => name)).toHaveLength(1);
  const [check] = found;
  if (!check) throw new Error('nothing is wrong');
  return check;
}

it('finds nothing on a machine where everything is well', async () => {
  expect(sick(await diagnose())).toEqual([]);
});

it('repeats what is wrong with the configuration', async () => {
  const check = await only({}, { problems: ['DETOUR_PORTS: x'] });
  expect(check).toMatchObject({ name: 'configuration', state: 'fail', detail: 'DETOUR_PORTS: x' });
});

describe('tunnels', () => {
  const module = { files: { '/sys/module/wireguard/version': '1.0.0\n' } };
  const routes = (...dsts: string[]) => ({
    'ip -j -4 route show table all': JSON.stringify(dsts.map((dst) => ({ dst, dev: 'eth0' }))),
  });

  it('are nobody’s business where nobody asks for them', async () => {
    expect((await diagnose()).filter(({ name }) => name.includes('tunnel'))).toEqual([]);
  });

  it('are carried by the kernel, loaded or not', async () => {
    expect(sick(await diagnose(module, { router: withVpn, client: withTunnels }))).toEqual([]);
    const loadable = { commands: { 'modprobe --dry-run wireguard': '' } };
    expect(sick(await diagnose(loadable, { router: withVpn, client: withTunnels }))).toEqual([]);
  });

  it('are carried by wireguard-go where the kernel cannot, at a price', async () => {
    const parts = { files: { '/dev/net/tun': ' ' }, commands: { 'wireguard-go --version': 'wireguard-go v0' } };
    const check = await only(parts, { client: withTunnels });
    expect(check).toMatchObject({ name: 'client-tunnels', state: 'warn' });
  });

  it.each([
    [{}, /wireguard-go and \/dev\/net\/tun/],
    [{ files: { '/dev/net/tun': ' ' } }, /wireguard-go is not here/],
    [{ commands: { 'wireguard-go --version': 'x' } }, /and \/dev\/net\/tun is not here/],
  ])('cannot be had: %j', async (parts, detail) => {
    const check = await only(parts, { router: withVpn });
    expect(check).toMatchObject({ name: 'tunnels', state: 'fail', detail: expect.stringMatching(detail) });
    expect(check.fix.join()).toContain('modprobe wireguard');
    const inside = { ...parts, files: { '/.dockerenv': ' ', ...('files' in parts ? parts.files : {}) } };
    const docker = await only(inside, { router: withVpn });
    expect(docker.fix.join()).toContain('--device /dev/net/tun');
  });

  it('have a network that is this host’s own', async () => {
    const check = await only({ ...module, commands: routes('default', '10.208.0.0/12') }, { router: withVpn });
    expect(check).toMatchObject({ name: 'tunnel-network', state: 'fail' });
    expect(check.detail).toContain('10.215.0.0/16 of DETOUR_VPN_NETWORK overlaps with 10.208.0.0/12');
  });

  it('have a port that something else uses, or that nothing does', async () => {
    // 51820 is 0xca6c.
    const udp = '  sl  local_address rem_address   st\n   0: 00000000:CA6C 00000000:0000 07 00000000:00000000\n';
    const taken = { files: { ...module.files, '/proc/net/udp': udp } };
    expect(await only(taken, { router: withVpn })).toMatchObject({ name: 'tunnel-port', state: 'fail' });
  });
});

describe('kernel and rights', () => {
  it.each([
    ['6.6.0', 'ok'],
    ['6.10-rc1', 'ok'],
    ['10.1.2', 'ok'],
    ['6.5.13', 'fail'],
    ['5.19.0', 'fail'],
  ])('Linux %s is %s for a client', async (release, state) => {
    const checks = await diagnose({ files: { '/proc/sys/kernel/osrelease': `${release}\n` } });
    expect(checks.find(({ name }) => name === 'kernel')?.state).toBe(state);
  });

  it('only warns a router of an old kernel', async () => {
    expect(await only({ files: { '/proc/sys/kernel/osrelease': '6.1.0\n' } }, { client: null })).toMatchObject({
      state: 'warn',
    });
  });

  it.each<[string, MachineParts, boolean, RegExp]>([
    ['a host', {}, false, /sudo/],
    ['Docker', { files: { '/.dockerenv': 'x' } }, false, /--cap-add NET_ADMIN/],
    ['Kubernetes', {}, true, /capabilities: \{drop: \[ALL\], add: \[NET_ADMIN\]\}/],
  ])('names the missing capability in the words of %s', async (_, changes, kubernetes, fix) => {
    const files = { ...changes.files, '/proc/self/status': 'CapEff:\t00000000a80425fb\n' };
    const check = await only({ files }, {}, kubernetes);
    expect(check).toMatchObject({ name: 'net-admin', state: 'fail' });
    expect(check.fix.join()).toMatch(fix);
  });

  it('wants nft, and a new one', async () => {
    const { 'nft --version': _, 'nft list tables': __, 'nft -j list chains': ___, ...none } = WELL.commands;
    const missing = sick(await examineWith(none));
    expect(missing.find(({ name }) => name === 'nft')).toMatchObject({
      state: 'fail',
      fix: ['apt-get install nftables'],
    });
    expect(await only({ commands: { 'nft --version': 'nftables v0.9.8 (E.D.S.)' } })).toMatchObject({
      name: 'nft',
      state: 'fail',
    });
  });
});

async function examineWith(commands: MachineParts['commands']): Promise<readonly Check[]> {
  const clock = new FakeClock();
  return examine(
    { router, client, detours: null, problems: [], running: { router: false, client: false } },
    {
      machine: fakeMachine({ ...WELL, commands: commands ?? {} }),
      clock,
      datagrams: new FakeNetwork(clock).host([]),
      resolve: async () => [],
      kubernetes: false,
      engine: '',
    },
  );
}

describe('lists of detours', () => {
  const lists = (found: number, ...complaints: string[]): Promise<Check | undefined> =>
    diagnose(
      {},
      {
        detours: {
          key: { id: 1, secret: new Uint8Array(32), label: null },
          detours: [],
          lists: [{ source: 'file:/l', found, complaints }],
        },
      },
    ).then((checks) => checks.find(({ name }) => name === 'source file:/l'));

  it('are fine, flawed or useless', async () => {
    expect(await lists(2)).toMatchObject({ state: 'ok', detail: '2 detours' });
    expect(await lists(1, 'line 2 is no name=host:port')).toMatchObject({
      state: 'warn',
      detail: '1 detour; line 2 is no name=host:port',
      fix: [expect.stringMatching(/DETOUR_DETOURS/)],
    });
    expect(await lists(0, 'there is no such file')).toMatchObject({ state: 'fail' });
  });
});

describe('client', () => {
  it('tells a kernel without MPTCP from a mount in the wrong place', async () => {
    expect(
      await only({ files: { '/proc/sys/net/mptcp/enabled': '', '/proc/sys/net/mptcp/pm_type': '' } }),
    ).toMatchObject({
      name: 'mptcp',
      detail: expect.stringContaining('no Multipath TCP'),
    });
    const elsewhere = { ...client, sysctlRoot: '/host/proc/sys' };
    expect(await only({}, { client: elsewhere })).toMatchObject({
      name: 'mptcp',
      detail: expect.stringContaining('nothing at /host/proc/sys'),
    });
  });

  it('says how to switch MPTCP on', async () => {
    expect(await only({ files: { '/proc/sys/net/mptcp/enabled': '0' } })).toMatchObject({
      fix: ['sysctl -w net.mptcp.enabled=1'],
    });
  });

  it('warns of a userspace path manager that nobody serves', async () => {
    expect(await only({ files: { '/proc/sys/net/mptcp/pm_type': '1' } })).toMatchObject({
      name: 'path-manager',
      state: 'warn',
    });
    expect(
      sick(
        await diagnose({ files: { '/proc/sys/net/mptcp/pm_type': '1' } }, { running: { router: false, client: true } }),
      ),
    ).toEqual([]);
  });

  it('notices that somebody took the path manager away from a running agent', async () => {
    expect(await only({}, { running: { router: false, client: true } })).toMatchObject({
      name: 'path-manager',
      state: 'fail',
      fix: ['sysctl -w net.mptcp.pm_type=1'],
    });
  });

  it('prefers the parameter of newer kernels', async () => {
    const files = { '/proc/sys/net/mptcp/path_manager': 'kernel' };
    expect(await only({ files })).toMatchObject({
      name: 'sysctl',
      detail: expect.stringContaining('net.mptcp.path_manager'),
    });
    expect(sick(await diagnose({ files, writable: ['/proc/sys/net/mptcp/path_manager'] }))).toEqual([]);
  });

  it('says how to make the sysctl writable in a container', async () => {
    const check = await only({ files: { '/.dockerenv': 'x' }, writable: [] });
    expect(check).toMatchObject({ name: 'sysctl', state: 'fail' });
    expect(check.fix[0]).toBe(
      'docker run: -v /proc/sys/net/mptcp:/host/proc/sys/net/mptcp -e DETOUR_SYSCTL_ROOT=/host/proc/sys',
    );
  });

  it('names mptcpd and endpoints that NetworkManager keeps', async () => {
    expect(await only({ files: { '/proc/77/comm': 'mptcpd\n' } })).toMatchObject({
      name: 'mptcpd',
      fix: ['systemctl disable --now mptcp'],
    });
    const commands = { 'ip mptcp endpoint show': '10.0.0.1 id 1 subflow dev eth0\n' };
    expect(await only({ files: { '/proc/78/comm': 'NetworkManager\n' }, commands })).toMatchObject({
      name: 'networkmanager',
      state: 'warn',
    });
    expect(sick(await diagnose({ commands }))).toEqual([]);
  });
});

describe('containers and pods', () => {
  const serving = (providers: string) =>
    loadClientHostSettings({ ...sources, env: { DETOUR_PROVIDERS: providers, DETOUR_SYSCTL_ROOT: '/host/proc/sys' } })
      .settings;
  /** A container with the documented flags, by its capabilities. */
  const inside = (capabilities: string, changes: Readonly<Record<string, string>> = {}): MachineParts => ({
    files: {
      '/.dockerenv': 'x',
      '/proc/self/status': `Name:\tnode\nCapEff:\t${capabilities}\n`,
      '/host/proc/sys/net/mptcp/enabled': '1\n',
      '/host/proc/sys/net/mptcp/path_manager': 'kernel\n',
      '/host/proc/sys/net/ipv4/ip_forward': '1\n',
      '/var/run/docker/netns/1a2b3c': 'x',
      ...changes,
    },
    writable: ['/var/run/docker.sock', PATH_MANAGER],
  });
  const PATH_MANAGER = '/host/proc/sys/net/mptcp/path_manager';
  const ADMIN = '0000000000201000';
  const ADMIN_AND_PTRACE = '0000000000281000';
  const one = async (parts: MachineParts, providers: string, kubernetes = false) =>
    only(parts, { router: null, client: serving(providers) }, kubernetes);

  it('are fine with what the documentation says, whatever the agent’s own path manager is', async () => {
    const subject = { router: null, running: { router: false, client: true } };
    expect(sick(await diagnose(inside(ADMIN), { ...subject, client: serving('docker') }))).toEqual([]);
    const kubernetes = await diagnose(inside(ADMIN_AND_PTRACE), { ...subject, client: serving('kubernetes') }, true);
    expect(sick(kubernetes)).toEqual([]);
  });

  it('are not looked at for an agent of its own network', async () => {
    const names = (await diagnose(inside('0000000000001000'))).map(({ name }) => name);
    for (const name of ['enter', 'parameters', 'engine', 'sandboxes']) expect(names).not.toContain(name);
  });

  it('need capabilities, named for the place', async () => {
    expect(await one(inside('0000000000001000'), 'docker')).toMatchObject({
      name: 'enter',
      fix: ['docker run: --cap-add SYS_ADMIN', 'compose: cap_add: [NET_ADMIN, SYS_ADMIN]'],
    });
    expect(await one(inside(ADMIN), 'kubernetes', true)).toMatchObject({
      name: 'enter',
      detail: expect.stringContaining('no CAP_SYS_PTRACE'),
      fix: ['use the overlay k8s/overlays/pods, or its file k8s/detour-client.yaml'],
    });
  });

  it('need all of the parameters, the engine’s socket and its sandboxes', async () => {
    expect(await one(inside(ADMIN, { '/host/proc/sys/net/ipv4/ip_forward': '' }), 'docker')).toMatchObject({
      name: 'parameters',
      fix: [
        'docker run: -v /proc/sys/net:/host/proc/sys/net',
        'Kubernetes: a hostPath volume of /proc/sys/net, mounted at /host/proc/sys/net',
      ],
    });
    expect(await one({ ...inside(ADMIN), writable: [PATH_MANAGER] }, 'docker')).toMatchObject({
      name: 'engine',
      fix: [expect.stringContaining('-v /var/run/docker.sock:/var/run/docker.sock'), expect.any(String)],
    });
    const unseen = { '/var/run/docker/netns/1a2b3c': '' };
    expect(sick(await diagnose(inside(ADMIN_AND_PTRACE, unseen), { router: null, client: serving('docker') }))).toEqual(
      [],
    );
    expect(await one(inside(ADMIN, unseen), 'docker')).toMatchObject({
      name: 'sandboxes',
      state: 'warn',
      fix: [expect.stringContaining(':ro,rslave')],
    });
  });
});

describe('rescue', () => {
  it('is not looked at unless it is on', async () => {
    expect((await diagnose()).some(({ name }) => name === 'rescue')).toBe(false);
  });

  it('asks the kernel whether it would translate this host’s own connections', async () => {
    const found = await diagnose({ commands: { [REDIRECTION]: '' } }, { client: withRescue });
    expect(found.find(({ name }) => name === 'rescue')).toMatchObject({ state: 'ok' });
    const stderr = 'Error: Could not process rule: No such file or directory\nadd chain inet ...';
    const check = await only({ commands: { [REDIRECTION]: { code: 1, stderr } } }, { client: withRescue });
    expect(check).toMatchObject({
      name: 'rescue',
      state: 'fail',
      fix: [expect.stringContaining('modprobe -a nft_chain_nat')],
    });
    expect(check.detail).toContain('No such file or directory');
  });
});

describe('interfaces', () => {
  const env = { DETOUR_INTERFACES: 'eth*', DETOUR_INTERFACES_EXCLUDE: 'eth9' };
  const client = loadClientHostSettings({ ...sources, env }).settings;
  const link = (ifname: string, ifindex: number, family: string, local: string) => ({
    ifname,
    ifindex,
    addr_info: [
      { family, local: 'fe80::1', scope: 'link' },
      { family, local, scope: 'global' },
    ],
  });
  const LINKS = [
    link('lo', 1, 'inet', '127.0.0.1'),
    link('eth0', 2, 'inet', '192.0.2.1'),
    link('eth1', 3, 'inet', '198.51.100.1'),
    link('eth9', 4, 'inet', '203.0.113.9'),
    link('eth2', 5, 'inet6', '2001:db8::1'),
  ];
  const answers = (byEth1: string): Record<string, string> => ({
    'ip -j addr show up': JSON.stringify(LINKS),
    'ip -j -4 route show default': JSON.stringify([
      { dev: 'eth0', gateway: '192.0.2.254' },
      { dev: 'eth1', gateway: '198.51.100.254', metric: 200 },
    ]),
    'ip -j -4 route get 1.1.1.1 from 192.0.2.1': JSON.stringify([{ dev: 'eth0' }]),
    'ip -j -4 route get 1.1.1.1 from 198.51.100.1': JSON.stringify([{ dev: byEth1 }]),
  });

  it('are not looked at unless they are chosen', async () => {
    expect((await diagnose()).some(({ name }) => name === 'interfaces')).toBe(false);
  });

  it('need a route from each address, and the lines that make one are printed', async () => {
    const found = (await diagnose({ commands: answers('eth0') }, { client })).filter(
      ({ name }) => name === 'interfaces',
    );
    expect(found).toMatchObject([
      { state: 'ok', detail: expect.stringContaining('192.0.2.1') },
      {
        state: 'fail',
        detail: expect.stringMatching(/198\.51\.100\.1 would leave by eth0, not by eth1/),
        fix: [
          'ip -4 route add default via 198.51.100.254 dev eth1 table 45603',
          'ip -4 rule add from 198.51.100.1 lookup 45603',
        ],
      },
      {
        state: 'fail',
        detail: expect.stringContaining('find no route'),
        fix: [
          'ip -6 route add default via GATEWAY dev eth2 table 45605   # GATEWAY: the router on eth2',
          'ip -6 rule add from 2001:db8::1 lookup 45605',
        ],
      },
    ]);
    const well = (await diagnose({ commands: answers('eth1') }, { client })).filter(
      ({ name }) => name === 'interfaces',
    );
    expect(well.map(({ state }) => state)).toEqual(['ok', 'ok', 'fail']);
  });

  it('have to be there', async () => {
    const none = { 'ip -j addr show up': JSON.stringify(LINKS.slice(0, 1)) };
    const [check] = (await diagnose({ commands: none }, { client })).filter(({ name }) => name === 'interfaces');
    expect(check).toMatchObject({ state: 'fail', fix: ['ip -br addr'] });
  });
});

describe('router', () => {
  it('asks for forwarding only where it cannot switch it on itself', async () => {
    const files = { '/proc/sys/net/ipv4/ip_forward': '0' };
    expect(await only({ files })).toMatchObject({
      name: 'ip-forward-v4',
      state: 'fail',
      fix: ['sysctl -w net.ipv4.ip_forward=1'],
    });
    expect(sick(await diagnose({ files, writable: [...WELL.writable, '/proc/sys/net/ipv4/ip_forward'] }))).toEqual([]);
  });

  it('does not ask for IPv6 forwarding where there is no IPv6', async () => {
    const files = { '/proc/sys/net/ipv6/conf/all/forwarding': '0' };
    expect(sick(await diagnose({ files }))).toEqual([]);
    const global = '20010db8000000000000000000000001 02 40 00 80 eth0\n';
    const local = 'fe800000000000000000000000000001 02 40 20 80 eth0\n';
    expect(sick(await diagnose({ files: { ...files, '/proc/net/if_inet6': local } }))).toEqual([]);
    expect(await only({ files: { ...files, '/proc/net/if_inet6': global } })).toMatchObject({
      name: 'ip-forward-v6',
      state: 'warn',
    });
  });

  it('names a program that listens among the lease ports, and a range that is free', async () => {
    const tcp = `${WELL.files['/proc/net/tcp']}   1: 00000000:4E84 00000000:0000 0A\n   2: 0100007F:4E85 0100007F:1234 01\n`;
    expect(await only({ files: { '/proc/net/tcp': tcp } })).toMatchObject({
      name: 'lease-ports',
      state: 'fail',
      detail: 'DETOUR_PORTS=20000-29999: a local program listens at TCP 20100',
      fix: ['DETOUR_PORTS=10000-19999'],
    });
  });

  it("names the overlap with the machine's own connections", async () => {
    expect(await only({ files: { '/proc/sys/net/ipv4/ip_local_port_range': '15000 25000' } })).toMatchObject({
      name: 'lease-ports',
      detail: expect.stringContaining('15000-25000'),
      fix: ['DETOUR_PORTS=26000-35999'],
    });
  });

  it('tells whose the control port is', async () => {
    const files = { '/proc/net/udp6': `header\n   0: 00000000000000000000000000000000:B268 0:0 07 x\n` };
    expect(await only({ files })).toMatchObject({
      name: 'control-port',
      state: 'fail',
      detail: 'another program uses UDP 45672',
    });
    expect(sick(await diagnose({ files }, { running: { router: true, client: false } }))).toEqual([]);
    expect(await only({}, { running: { router: true, client: false } })).toMatchObject({ name: 'control-port' });
  });

  it.each([
    ['100', []],
    ['160000', [{ state: 'warn' }]],
    ['225000', [{ state: 'fail', fix: [expect.stringContaining('nf_conntrack_max=524288')] }]],
  ])('%s of 262144 connections tracked', async (count, expected) => {
    expect(sick(await diagnose({ files: { '/proc/sys/net/netfilter/nf_conntrack_count': count } }))).toMatchObject(
      expected,
    );
  });
});

describe('firewalls', () => {
  const RULE = '-m connmark --mark 0xd7000000/0xff000000 -m comment --comment detour -j ACCEPT';
  const docker = { 'nft -j list chains': ruleset(FORWARD, DOCKER_USER) };

  it("leaves Docker's DROP to a router that has yet to start", async () => {
    expect(sick(await diagnose({ commands: { ...docker, 'iptables-nft -S': '-P FORWARD DROP\n' } }))).toEqual([]);
  });

  it('prints the line that a running router lacks, for DOCKER-USER or FORWARD', async () => {
    const running = { running: { router: true, client: false }, client: null } as const;
    const files = { '/proc/net/udp': 'header\n 0: 00000000:B268 0:0 07 x\n' };
    expect(
      await only({ files, commands: { ...docker, 'iptables-nft -S': '-P FORWARD DROP\n' } }, running),
    ).toMatchObject({
      name: 'forward-v4',
      state: 'fail',
      fix: [`iptables-nft -I DOCKER-USER ${RULE}`],
    });
    const plain = { 'nft -j list chains': ruleset(FORWARD), 'iptables-nft -S': '-P FORWARD DROP\n' };
    expect((await only({ files, commands: plain }, running)).fix).toEqual([`iptables-nft -I FORWARD ${RULE}`]);
    const there = { ...docker, 'iptables-nft -S': `-P FORWARD DROP\n-A DOCKER-USER ${RULE}\n` };
    expect(sick(await diagnose({ files, commands: there }, running))).toEqual([]);
  });

  it('sees legacy tables, which nft does not show', async () => {
    const legacy = '-P FORWARD DROP\n-N DOCKER-USER\n';
    const files = {
      '/proc/net/ip_tables_names': 'nat\nfilter\n',
      '/proc/net/udp': 'header\n 0: 00000000:B268 0:0 07 x\n',
    };
    const check = await only(
      { files, commands: { 'iptables-legacy -S': legacy } },
      { running: { router: true, client: false }, client: null },
    );
    expect(check.fix).toEqual([`iptables-legacy -I DOCKER-USER ${RULE}`]);
  });

  it('says that it cannot see legacy tables without NET_RAW', async () => {
    const check = await only(
      {
        files: { '/proc/net/ip_tables_names': 'filter\n' },
        commands: { 'iptables-legacy -S': { code: 3, stdout: '', stderr: 'Permission denied (you must be root)' } },
      },
      { client: null },
    );
    expect(check).toMatchObject({ name: 'forward-v4', state: 'warn' });
    expect(check.fix.join('\n')).toContain('--cap-add NET_RAW');
    expect(check.fix.join('\n')).toContain(`iptables-legacy -I FORWARD ${RULE}`);
  });

  it('asks for iptables where its rule cannot be set without', async () => {
    const check = await only({ commands: docker });
    expect(check).toMatchObject({ name: 'forward-v4', state: 'fail' });
    expect(check.fix[0]).toBe('apt-get install iptables');
  });

  it('has a line for ufw, firewalld and other tables', async () => {
    const commands = {
      'nft -j list chains': ruleset(
        { family: 'ip', table: 'filter', name: 'ufw-user-input' },
        { family: 'inet', table: 'firewalld', name: 'filter_FORWARD', hook: 'forward', policy: 'accept' },
        { family: 'inet', table: 'mine', name: 'fwd', hook: 'forward', policy: 'drop' },
        { family: 'inet', table: 'detour', name: 'forward', hook: 'forward', policy: 'drop' },
      ),
      'nft list chain inet firewalld filter_FORWARD': 'chain filter_FORWARD { ct status dnat accept }',
    };
    const found = sick(await diagnose({ commands }));
    expect(found.map(({ name, fix }) => [name, fix[0]])).toEqual([
      ['ufw', 'ufw allow 45672/udp'],
      ['firewalld', 'firewall-cmd --permanent --add-port=45672/udp && firewall-cmd --reload'],
      [
        'forward-nft',
        expect.stringMatching(/^nft insert rule inet mine fwd ct mark and 0xff000000 == 0xd7000000 accept/),
      ],
    ]);
    const open = {
      ...commands,
      'iptables -S ufw-user-input': '-A ufw-user-input -p udp -m udp --dport 45672 -j ACCEPT\n',
    };
    expect(sick(await diagnose({ commands: open })).map(({ name }) => name)).toEqual(['firewalld', 'forward-nft']);
  });
});

it('prints every failure with its remedy', () => {
  const text = presentChecks([
    { name: 'a', state: 'ok', detail: 'fine', fix: [] },
    { name: 'bcd', state: 'fail', detail: 'broken', fix: ['mend it', 'or this'] },
  ]);
  expect(text).toBe(
    'ok    a    fine\nFAIL  bcd  broken\n           fix: mend it\n           fix: or this\n\n1 fine, 0 to look at, 1 failed',
  );
});

describe('DETOUR_MPTCPIFY', () => {
  const BPF = 'CapEff:\t000000c000001000\n';
  const MOUNTS = [
    '30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw',
    '31 23 0:27 / /sys/fs/bpf rw - bpf bpf rw,mode=700',
  ].join('\n');
  const FILES = {
    '/proc/self/status': BPF,
    '/proc/self/mountinfo': MOUNTS,
    '/proc/self/cgroup': '0::/\n',
    '/sys/kernel/btf/vmlinux': '\0socket\0update_socket_protocol\0',
    '/etc/ld.so.cache': 'glibc-ld.so.cache1.1 libbpf.so.1 /usr/lib/libbpf.so.1',
  };
  const settings = (mode: string, role = 'client') =>
    loadClientHostSettings({ ...sources, env: { DETOUR_MPTCPIFY: mode, DETOUR_ROLE: role } }).settings;
  const look = (files: Record<string, string> = {}, mode = 'labelled', kubernetes = false) =>
    diagnose({ files: { ...FILES, ...files } }, { client: settings(mode) }, kubernetes);

  it.each(['all', 'labelled'])('%s is fine where everything is there', async (mode) => {
    expect(sick(await look({}, mode))).toEqual([]);
  });

  it.each<[string, Record<string, string>, string, RegExp]>([
    ['a kernel without BTF', { '/sys/kernel/btf/vmlinux': '' }, 'mptcpify-kernel', /mptcpize run.*GODEBUG/],
    ['a kernel without the hook', { '/sys/kernel/btf/vmlinux': '\0socket\0' }, 'mptcpify-kernel', /Linux 6\.6/],
    ['no libbpf', { '/etc/ld.so.cache': 'libc.so.6' }, 'libbpf', /apt-get install libbpf1/],
    [
      'no control groups',
      { '/proc/self/mountinfo': '31 23 0:27 / /sys/fs/bpf rw - bpf bpf rw' },
      'cgroups',
      /mount -t cgroup2/,
    ],
    [
      'a container that sees its own only',
      { '/.dockerenv': 'x' },
      'cgroups',
      /-v \/sys\/fs\/cgroup:\/sys\/fs\/cgroup:ro/,
    ],
    ['no capabilities', { '/proc/self/status': 'CapEff:\t0000000000001000\n' }, 'mptcpify', /sudo detour load/],
  ])('says of %s what helps', async (_, files, name, fix) => {
    const found = sick(await look(files));
    expect(found.map((check) => [check.name, check.state])).toEqual([[name, 'fail']]);
    expect(found[0]?.fix.join()).toMatch(fix);
  });

  it('sees the whole tree through a mount of the host’s', async () => {
    const mounts = MOUNTS.replace('0:26 / /sys', '0:26 /../.. /sys');
    expect(sick(await look({ '/.dockerenv': 'x', '/proc/self/mountinfo': mounts }))).toEqual([]);
  });

  it('is content with what `detour load` attached', async () => {
    const files = { '/proc/self/status': 'CapEff:\t0000000000001000\n', '/sys/fs/bpf/detour/mptcpify': 'pin' };
    expect(sick(await look(files))).toEqual([]);
  });

  it('wants a place for what `detour load` attaches', async () => {
    const files = { '/proc/self/status': 'CapEff:\t0000000000001000\n', '/proc/self/mountinfo': '' };
    const found = sick(await look(files, 'all', true));
    expect(found.map(({ name }) => name)).toEqual(['mptcpify', 'bpffs']);
    expect(found[0]?.fix.join()).toMatch(/capabilities\.add: \[BPF, PERFMON\]/);
  });

  it('names what is left attached although it is off', async () => {
    const check = await only({ files: { '/sys/fs/bpf/detour/mptcpify': 'pin' } });
    expect(check).toMatchObject({ name: 'mptcpify', state: 'warn', fix: ['detour unload'] });
  });
});

describe('in-band transit', () => {
  const FILES = {
    '/proc/self/status': 'CapEff:\t000000c000001000\n',
    '/proc/self/mountinfo': '30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw',
    '/proc/self/cgroup': '0::/\n',
    '/etc/ld.so.cache': 'libbpf.so.1',
  };
  const client = loadClientHostSettings({ ...sources, env: { DETOUR_STRATEGY: 'inband' } }).settings;
  const look = (files: Record<string, string> = {}) => diagnose({ files: { ...FILES, ...files } }, { client });

  it('is fine where everything is there, or was prepared', async () => {
    expect(sick(await look())).toEqual([]);
    const bare = { '/proc/self/status': 'CapEff:\t0000000000001000\n', '/proc/self/mountinfo': '' };
    expect(sick(await look({ ...bare, '/sys/fs/bpf/detour/inband': 'pin' }))).toEqual([]);
  });

  it.each<[string, Record<string, string>, RegExp]>([
    ['no capabilities', { '/proc/self/status': 'CapEff:\t0000000000001000\n' }, /sudo detour load/],
    ['no libbpf', { '/etc/ld.so.cache': 'libc.so.6' }, /apt-get install libbpf1/],
    ['no control groups', { '/proc/self/mountinfo': '' }, /mount -t cgroup2/],
    ['a container that sees its own only', { '/.dockerenv': 'x' }, /-v \/sys\/fs\/cgroup/],
  ])('warns of %s, and says what helps', async (_, files, fix) => {
    const found = sick(await look(files));
    expect(found.map(({ name, state }) => [name, state])).toEqual([['inband', 'warn']]);
    expect(found[0]?.fix.join()).toMatch(fix);
  });
});

describe("the server's side alone", () => {
  const server = loadClientHostSettings({ ...sources, env: { DETOUR_ROLE: 'server' } }).settings;

  it('leaves the path manager to the kernel', async () => {
    expect(sick(await diagnose({ writable: [] }, { client: server }))).toEqual([]);
  });

  it.each([
    ['pm_type', '1', /net\.mptcp\.pm_type=0/],
    ['path_manager', 'userspace', /net\.mptcp\.path_manager=kernel/],
  ])('says that joins are refused with %s=%s', async (name, value, fix) => {
    const check = await only({ files: { [`/proc/sys/net/mptcp/${name}`]: value } }, { client: server });
    expect(check).toMatchObject({ name: 'path-manager', state: 'fail' });
    expect(check.fix.join()).toMatch(fix);
  });
});
