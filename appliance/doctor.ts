/**
 * `detour doctor`: everything a user can get wrong, looked at without changing anything. Every check is a value; one that
 * fails carries the line that mends it, in the words of the place it runs in (host, Docker, Kubernetes).
 */
import { missingOf } from './kernel/bpf.ts';
import type { Clock } from './kernel/clock.ts';
import type { Datagrams } from './kernel/datagrams.ts';
import type { Machine } from './kernel/machine.ts';
import {
  type Address,
  contains,
  type Endpoint,
  formatAddress,
  formatEndpoint,
  formatPrefix,
  type PortRange,
  parsePrefix,
} from './protocol/address.ts';
import {
  COOKIE_BYTES,
  decodeResponse,
  deriveKeys,
  encodeRequest,
  RESULT,
  type Response,
  resultName,
  TYPE,
  VERSION,
} from './protocol/control.ts';
import { matchesGlob } from './protocol/names.ts';
import type { ClientHostSettings, FixedSource, Key, Role, RouterSettings } from './settings.ts';

export type Check = {
  /** Stable, hyphenated; with the role in front where both have one. */
  readonly name: string;
  readonly state: 'ok' | 'warn' | 'fail';
  readonly detail: string;
  /** Lines to paste, or to do; none when nothing is wrong. */
  readonly fix: readonly string[];
};

/** What is to be checked. A role's settings are null when that role is none of this machine's business. */
export type Subject = {
  readonly router: RouterSettings | null;
  readonly client: ClientHostSettings | null;
  /** Present when the configuration names detours and a key. */
  readonly detours: {
    readonly key: Key;
    readonly detours: readonly FixedSource[];
    /** What lists gave, which are read already; their detours are among `detours`. */
    readonly lists: readonly {
      readonly source: string;
      readonly found: number;
      readonly complaints: readonly string[];
    }[];
  } | null;
  /** Lines of a configuration that is wrong. */
  readonly problems: readonly string[];
  /** Whether a daemon of that role answers at its socket. */
  readonly running: Readonly<Record<Role, boolean>>;
};

export type DoctorPorts = {
  readonly machine: Machine;
  readonly clock: Clock;
  readonly datagrams: Datagrams;
  readonly resolve: (host: string) => Promise<readonly Address[]>;
  /** Of the environment: only whether Kubernetes set it. */
  readonly kubernetes: boolean;
  /** Path of the Docker engine's socket. */
  readonly engine: string;
};

const ok = (name: string, detail: string): Check => ({ name, state: 'ok', detail, fix: [] });
const warn = (name: string, detail: string, ...fix: readonly string[]): Check => ({ name, state: 'warn', detail, fix });
const fail = (name: string, detail: string, ...fix: readonly string[]): Check => ({ name, state: 'fail', detail, fix });

/** The floor: the userspace path manager is older (5.19), but 6.6 is the oldest kernel with all that is relied on. */
const OLDEST_KERNEL = [6, 6] as const;
/** nft before 1.0 cannot match MPTCP subtypes. */
const OLDEST_NFT = [1, 0] as const;
/** linux/capability.h */
const CAP_NET_ADMIN = 12n;
const CAP_SYS_PTRACE = 19n;
const CAP_SYS_ADMIN = 21n;
/** Where Docker keeps the network namespaces of its containers. */
const SANDBOXES = '/var/run/docker/netns';
/** A router grants no new lease above this share of the connection table (docs/protocol.md). */
const CONNTRACK_FULL = 0.85;
const CONNTRACK_BUSY = 0.6;
/** Waits for an answer to each of the three HELLOs, ms: three losses in a row are an outage. */
const HELLO_WAITS_MS = [400, 800, 1600] as const;
/** Detours that are asked; a list may have more than anybody wants to wait for. */
const MOST_ASKED = 32;
const IN_USE = 7;
const LISTENING = '0A';

type Place = 'host' | 'docker' | 'kubernetes';

/** Runs every check that concerns `subject`; they are independent, so none waits for another. */
export async function examine(subject: Subject, ports: DoctorPorts): Promise<readonly Check[]> {
  const { machine } = ports;
  const place = await placeOf(ports);
  const { router, client, detours } = subject;
  const checks: Promise<readonly Check[]>[] = [
    configuration(subject),
    kernel(machine, client !== null),
    netAdmin(machine, place),
    nft(machine, place),
    clockCheck(ports.clock),
  ];
  if (client) checks.push(mptcp(machine, client, place), mptcpify(machine, client, place));
  if (client?.strategy.inband && client.sides.includes('client')) checks.push(inband(machine, place));
  if (client?.sides.includes('client')) checks.push(pathManager(machine, client, place, subject.running.client));
  else if (client) checks.push(accepting(machine, client));
  if (client) checks.push(workloads(client, place, ports));
  if (client?.rescue) checks.push(rescue(machine));
  if (client?.interfaces) checks.push(interfaces(machine, client.interfaces));
  // By default tunnels are a last resort, for which nobody should be made to prepare.
  if (client?.strategy.kinds.includes('vpn') && !client.strategy.fallback)
    checks.push(tunnels(machine, 'client-tunnels', place));
  if (router) {
    checks.push(
      forwarding(machine, place, subject.running.router),
      firewall(machine, router, subject.running.router),
      conntrack(machine),
      controlPort(machine, router, subject.running.router),
      leasePorts(machine, router),
    );
    if (router.vpn) {
      checks.push(
        tunnels(machine, 'tunnels', place),
        tunnelPort(machine, router.vpn.port, subject.running.router),
        tunnelNetworks(machine, router.vpn),
      );
    }
  }
  if (detours) {
    checks.push(listed(detours.lists));
    checks.push(...detours.detours.slice(0, MOST_ASKED).map((source) => reachability(source, detours.key, ports)));
  }
  return (await Promise.all(checks)).flat();
}

async function placeOf({ machine, kubernetes }: DoctorPorts): Promise<Place> {
  if (kubernetes) return 'kubernetes';
  const marks = await Promise.all(['/.dockerenv', '/run/.containerenv'].map((path) => machine.read(path)));
  return marks.some((mark) => mark !== null) ? 'docker' : 'host';
}

async function configuration({ problems, router, client }: Subject): Promise<readonly Check[]> {
  if (problems.length > 0) return problems.map((line) => fail('configuration', line, 'detour config check'));
  const roles = [router && 'router', client && 'client'].filter((role) => role !== null);
  return [ok('configuration', `nothing wrong; checking what a ${roles.join(' and a ')} needs`)];
}

function versionAtLeast(text: string, [major, minor]: readonly [number, number]): boolean | null {
  const match = /(\d+)\.(\d+)/.exec(text);
  if (!match) return null;
  const found = [Number(match[1]), Number(match[2])] as const;
  return found[0] > major || (found[0] === major && found[1] >= minor);
}

async function kernel(machine: Machine, needsMptcp: boolean): Promise<readonly Check[]> {
  const release = (await machine.read('/proc/sys/kernel/osrelease'))?.trim() ?? '';
  const fits = versionAtLeast(release, OLDEST_KERNEL);
  const wanted = `Linux ${OLDEST_KERNEL.join('.')} or newer`;
  if (fits === null) return [warn('kernel', `cannot tell the kernel's version; ${wanted} is needed`)];
  if (fits) return [ok('kernel', `Linux ${release}`)];
  const remedy =
    'install a newer kernel: Debian 13, Ubuntu 24.04, or on Debian 12: apt-get install -t bookworm-backports linux-image-amd64';
  return needsMptcp
    ? [fail('kernel', `Linux ${release}; a client needs ${wanted}`, remedy)]
    : [warn('kernel', `Linux ${release}; the router is tested with ${wanted}`, remedy)];
}

async function mayDo(machine: Machine, capability: bigint): Promise<boolean> {
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec((await machine.read('/proc/self/status')) ?? '')?.[1];
  return effective !== undefined && ((BigInt(`0x${effective}`) >> capability) & 1n) === 1n;
}

async function netAdmin(machine: Machine, place: Place): Promise<readonly Check[]> {
  if (await mayDo(machine, CAP_NET_ADMIN)) return [ok('net-admin', 'CAP_NET_ADMIN is there')];
  const fix = {
    host: ['run it as root: sudo detour ...'],
    docker: ['docker run: --cap-drop ALL --cap-add NET_ADMIN (and no --user)', 'compose: cap_add: [NET_ADMIN]'],
    kubernetes: ['securityContext: {runAsUser: 0, capabilities: {drop: [ALL], add: [NET_ADMIN]}}'],
  };
  return [
    fail(
      'net-admin',
      'the process has no CAP_NET_ADMIN, so it can neither use nft nor the path manager',
      ...fix[place],
    ),
  ];
}

async function nft(machine: Machine, place: Place): Promise<readonly Check[]> {
  const version = await machine.run('nft', ['--version']);
  const install = place === 'host' ? 'apt-get install nftables' : 'use an unmodified detour image, which has nft';
  if (!version) return [fail('nft', 'nft is not installed', install)];
  const number = /v?(\d+\.\d+(\.\d+)?)/.exec(version.stdout)?.[1] ?? '';
  if (versionAtLeast(number, OLDEST_NFT) === false)
    return [fail('nft', `nft ${number} is too old; 1.0 is needed`, install)];
  const listing = await machine.run('nft', ['list', 'tables']);
  if (listing?.code === 0) return [ok('nft', `nft ${number}`)];
  const denied = /not permitted|denied/i.test(listing?.stderr ?? '');
  return denied
    ? [
        fail(
          'nft',
          `nft ${number} may not read the rules: CAP_NET_ADMIN is missing (see net-admin)`,
          'sudo detour doctor',
        ),
      ]
    : [fail('nft', `nft ${number} fails: ${firstLine(listing?.stderr)}`, 'modprobe nf_tables')];
}

const firstLine = (text: string | undefined): string => (text ?? '').trim().split('\n')[0]?.slice(0, 200) ?? '';

async function clockCheck(clock: Clock): Promise<readonly Check[]> {
  // The protocol asks nothing of clocks; logs and everything around it do.
  const year = new Date(clock.wall()).getUTCFullYear();
  return year >= 2025
    ? [ok('clock', new Date(clock.wall()).toISOString())]
    : [warn('clock', `the clock says ${year}; times in the log will be wrong`, 'timedatectl set-ntp true')];
}

const under = (root: string, name: string): string => `${root}/${name.replaceAll('.', '/')}`;

async function mptcp(machine: Machine, client: ClientHostSettings, place: Place): Promise<readonly Check[]> {
  const enabled = (await machine.read(under(client.sysctlRoot, 'net.mptcp.enabled')))?.trim();
  if (enabled === undefined) {
    const elsewhere = client.sysctlRoot !== '/proc/sys' && (await machine.read('/proc/sys/net/mptcp/enabled')) !== null;
    return elsewhere
      ? [
          fail(
            'mptcp',
            `nothing at ${client.sysctlRoot}/net/mptcp, but this kernel has Multipath TCP`,
            `docker run: -v /proc/sys/net/mptcp:${client.sysctlRoot}/net/mptcp`,
          ),
        ]
      : [
          fail(
            'mptcp',
            'this kernel has no Multipath TCP',
            'boot a kernel with CONFIG_MPTCP=y: those of Debian 12, Ubuntu 22.04 and later have it',
          ),
        ];
  }
  if (enabled !== '0') return [ok('mptcp', 'Multipath TCP is on')];
  const fix = {
    host: ['sysctl -w net.mptcp.enabled=1'],
    docker: [
      'own network: docker run --sysctl net.mptcp.enabled=1',
      'host network: sysctl -w net.mptcp.enabled=1 on the host',
    ],
    kubernetes: ['sysctl -w net.mptcp.enabled=1 on the node'],
  };
  return [fail('mptcp', 'Multipath TCP is switched off', ...fix[place])];
}

async function pathManager(
  machine: Machine,
  client: ClientHostSettings,
  place: Place,
  running: boolean,
): Promise<readonly Check[]> {
  const root = client.sysctlRoot;
  const named = (await machine.read(under(root, 'net.mptcp.path_manager')))?.trim();
  const numbered = (await machine.read(under(root, 'net.mptcp.pm_type')))?.trim();
  const parameter = named === undefined ? 'net.mptcp.pm_type' : 'net.mptcp.path_manager';
  const selected = named ?? (numbered === '1' ? 'userspace' : numbered === '0' ? 'kernel' : numbered);
  if (selected === undefined) {
    // Without any net.mptcp the check before this one has spoken already.
    if ((await machine.read(under(root, 'net.mptcp.enabled'))) === null) return [];
    return [
      fail(
        'path-manager',
        'this kernel has no userspace path manager (Linux 5.19 and later have one)',
        'boot Linux 6.6 or newer',
      ),
    ];
  }
  const checks: Check[] = [];
  if (!client.providers.includes('host')) {
    checks.push(ok('path-manager', `${selected} here, which is left alone: workloads are served in theirs`));
  } else if (running && selected !== 'userspace') {
    checks.push(
      fail(
        'path-manager',
        `the agent runs, but somebody selected "${selected}" behind its back: it can add no path`,
        `sysctl -w ${parameter}=${named === undefined ? 1 : 'userspace'}`,
      ),
    );
  } else if (selected === 'userspace' && !running) {
    checks.push(
      warn(
        'path-manager',
        'the userspace path manager is selected and no agent runs: this host refuses incoming joins',
        'detour unload   # or start `detour client`',
      ),
    );
  } else
    checks.push(
      ok(
        'path-manager',
        `${selected}${running ? ', and the agent runs' : '; the agent selects userspace while it runs'}`,
      ),
    );

  if (await machine.writable(under(root, parameter))) checks.push(ok('sysctl', `${parameter} can be written`));
  else {
    // Of other namespaces than this one, the folder above shows the right one.
    const folder = client.providers.some((name) => name !== 'host') ? 'net' : 'net/mptcp';
    const mount = `/proc/sys/${folder}:/host/proc/sys/${folder}`;
    const fix = {
      host: ['run it as root: sudo detour ...'],
      docker: [
        `docker run: -v ${mount} -e DETOUR_SYSCTL_ROOT=/host/proc/sys`,
        `compose: volumes: ["${mount}"], environment: {DETOUR_SYSCTL_ROOT: /host/proc/sys}`,
      ],
      kubernetes: [
        `a hostPath volume of /proc/sys/${folder}, mounted at /host/proc/sys/${folder}, and env DETOUR_SYSCTL_ROOT=/host/proc/sys`,
      ],
    };
    const harmless = selected === 'userspace';
    checks.push({
      ...(harmless ? warn : fail)(
        'sysctl',
        `${parameter} below ${root} cannot be written, so the path manager cannot be ${harmless ? 'put back' : 'selected'}`,
      ),
      fix: fix[place],
    });
  }
  checks.push(...(await rivals(machine)));
  return checks;
}

/** The server's side alone leaves the kernel in charge. */
async function accepting(machine: Machine, client: ClientHostSettings): Promise<readonly Check[]> {
  const read = async (name: string): Promise<string | undefined> =>
    (await machine.read(under(client.sysctlRoot, name)))?.trim();
  const named = await read('net.mptcp.path_manager');
  const userspace = named === undefined ? (await read('net.mptcp.pm_type')) === '1' : named === 'userspace';
  if (!userspace) return [ok('path-manager', 'the kernel accepts joins by itself')];
  const back = named === undefined ? 'net.mptcp.pm_type=0' : 'net.mptcp.path_manager=kernel';
  return [
    fail(
      'path-manager',
      'the userspace path manager is selected, which refuses joins unless somebody serves it',
      `sysctl -w ${back}   # or DETOUR_ROLE=client,server`,
    ),
  ];
}

const GROUPS_AT = ['/sys/fs/cgroup', '/sys/fs/cgroup/unified'];
const PINS = '/sys/fs/bpf/detour';
const WITHOUT =
  'without: start programs by `mptcpize run`, or GODEBUG=multipathtcp=1 for Go programs (docs/mptcpify.md)';

/** Whether plain TCP sockets can be made Multipath TCP here. That a sandbox refuses it shows only when it is tried. */
async function mptcpify(machine: Machine, client: ClientHostSettings, place: Place): Promise<readonly Check[]> {
  const pinned = (await machine.list(PINS)).includes('mptcpify');
  if (client.mptcpify === 'off') {
    if (!pinned) return [];
    const left = 'DETOUR_MPTCPIFY=off, but an earlier `detour load` goes on making sockets Multipath TCP';
    return [warn('mptcpify', left, 'detour unload')];
  }
  const checks: Check[] = [];
  const types = await machine.read('/sys/kernel/btf/vmlinux');
  if (types === null)
    checks.push(fail('mptcpify-kernel', 'this kernel does not describe its types (CONFIG_DEBUG_INFO_BTF)', WITHOUT));
  else if (!types.includes('update_socket_protocol'))
    checks.push(
      fail(
        'mptcpify-kernel',
        'this kernel does not ask anybody for the protocol of sockets',
        'boot Linux 6.6 or newer',
        WITHOUT,
      ),
    );
  else checks.push(ok('mptcpify-kernel', 'the kernel asks for the protocol of sockets'));

  const libraries = await machine.read('/etc/ld.so.cache');
  if (libraries !== null && !libraries.includes('libbpf.so.1'))
    checks.push(fail('libbpf', 'libbpf, which loads the program, is not installed', 'apt-get install libbpf1'));

  const mounts = mountsIn((await machine.read('/proc/self/mountinfo')) ?? '');
  const stays = mounts.some(({ type, at }) => type === 'bpf' && at === '/sys/fs/bpf');
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec((await machine.read('/proc/self/status')) ?? '')?.[1] ?? '0';
  const missing = missingOf(effective, ['BPF', 'PERFMON']);
  if (pinned) checks.push(ok('mptcpify', '`detour load` attached the program'));
  else if (missing.length === 0) checks.push(ok('mptcpify', 'the agent may attach the program itself'));
  else {
    const fix = {
      host: ['sudo detour load'],
      docker: [
        `docker run: ${missing.map((one) => `--cap-add ${one}`).join(' ')}`,
        'or before the agent: docker run --rm ... --cap-add BPF --cap-add PERFMON -v /sys/fs/bpf:/sys/fs/bpf ... load   # and -v /sys/fs/bpf:/sys/fs/bpf:ro for the agent',
      ],
      kubernetes: [
        `securityContext.capabilities.add: [${missing.join(', ')}]`,
        'or an init container that runs `load`, with BPF, PERFMON and a hostPath volume of /sys/fs/bpf',
      ],
    };
    const lacks = missing.map((one) => `CAP_${one}`).join(' and ');
    checks.push(
      fail(
        'mptcpify',
        `no \`detour load\` attached the program, and this process has no ${lacks} to do it`,
        ...fix[place],
      ),
    );
    if (!stays)
      checks.push(
        fail('bpffs', 'there is no BPF file system at /sys/fs/bpf for it to stay in', ...bpfFileSystem[place]),
      );
  }
  if (client.mptcpify === 'labelled') checks.push(await groups(machine, mounts, place));
  return checks;
}

/** Whether joins can name their servers. Where they cannot, leases are used: nothing of it is a failure. */
async function inband(machine: Machine, place: Place): Promise<readonly Check[]> {
  if ((await machine.list(PINS)).includes('inband')) return [ok('inband', '`detour load` prepared the kernel')];
  const lacking: Check[] = [];
  const libraries = await machine.read('/etc/ld.so.cache');
  if (libraries !== null && !libraries.includes('libbpf.so.1'))
    lacking.push(warn('inband', 'libbpf is not installed, so joins wait for leases', 'apt-get install libbpf1'));
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec((await machine.read('/proc/self/status')) ?? '')?.[1] ?? '0';
  const missing = missingOf(effective, ['BPF', 'PERFMON', 'NET_ADMIN']);
  if (missing.length > 0) {
    const fix = {
      host: 'sudo detour load',
      docker: `docker run: ${missing.map((one) => `--cap-add ${one}`).join(' ')}`,
      kubernetes: `securityContext.capabilities.add: [${missing.join(', ')}]`,
    };
    const lacks = missing.map((one) => `CAP_${one}`).join(' and ');
    lacking.push(warn('inband', `this process has no ${lacks}, so joins wait for leases`, fix[place]));
  }
  const mounts = mountsIn((await machine.read('/proc/self/mountinfo')) ?? '');
  const tree = await groups(machine, mounts, place);
  if (tree.state !== 'ok') lacking.push(warn('inband', `${tree.detail}, so joins wait for leases`, ...tree.fix));
  return lacking.length > 0 ? lacking : [ok('inband', 'the agent may prepare the kernel itself')];
}

const bpfFileSystem: Readonly<Record<Place, readonly string[]>> = {
  host: ['mount -t bpf bpf /sys/fs/bpf'],
  docker: ['docker run: -v /sys/fs/bpf:/sys/fs/bpf'],
  kubernetes: ['a hostPath volume of /sys/fs/bpf at /sys/fs/bpf'],
};

/** Workloads are told apart by their control groups, which have to be in sight. */
async function groups(machine: Machine, mounts: readonly Mount[], place: Place): Promise<Check> {
  const mount = mounts.find(({ type, at }) => type === 'cgroup2' && GROUPS_AT.includes(at));
  if (!mount) {
    return fail(
      'cgroups',
      'no control groups of version 2 are mounted',
      'mount -t cgroup2 none /sys/fs/cgroup   # or boot with systemd.unified_cgroup_hierarchy=1',
    );
  }
  // In a control group namespace of its own, the whole tree shows as what is above its root.
  const own = /^0::\/$/m.test((await machine.read('/proc/self/cgroup')) ?? '');
  if (place === 'host' || !own || mount.root !== '/') return ok('cgroups', `control groups are at ${mount.at}`);
  const fix = {
    docker: ['docker run: -v /sys/fs/cgroup:/sys/fs/cgroup:ro'],
    kubernetes: ['a hostPath volume of /sys/fs/cgroup at /sys/fs/cgroup, readOnly'],
  };
  return fail('cgroups', "only this container's own control groups are in sight", ...fix[place]);
}

type Mount = { readonly root: string; readonly at: string; readonly type: string };

/** proc_pid_mountinfo(5): root and mount point are the fourth and fifth field, the type follows the dash. */
const mountsIn = (text: string): readonly Mount[] =>
  text.split('\n').flatMap((line) => {
    const [, , , root, at] = line.split(' ');
    const type = / - (\S+) /.exec(line)?.[1];
    return root !== undefined && at !== undefined && type !== undefined ? [{ root, at, type }] : [];
  });

/** What serving containers and pods takes besides (docs/workloads.md). */
async function workloads(client: ClientHostSettings, place: Place, ports: DoctorPorts): Promise<readonly Check[]> {
  const { machine, engine } = ports;
  const { providers, sysctlRoot } = client;
  const docker = providers.includes('docker');
  const kubernetes = providers.includes('kubernetes');
  if (!docker && !kubernetes) return [];
  const checks: Check[] = [];
  const lacking: string[] = [];
  if (!(await mayDo(machine, CAP_SYS_ADMIN))) lacking.push('SYS_ADMIN');
  if (kubernetes && !(await mayDo(machine, CAP_SYS_PTRACE))) lacking.push('SYS_PTRACE');
  if (lacking.length === 0) checks.push(ok('enter', 'the networks of others may be entered'));
  else {
    const fix = {
      host: ['run it as root: sudo detour ...'],
      docker: [
        `docker run: ${lacking.map((one) => `--cap-add ${one}`).join(' ')}`,
        `compose: cap_add: [NET_ADMIN, ${lacking.join(', ')}]`,
      ],
      kubernetes: ['use the overlay k8s/overlays/pods, or its file k8s/detour-client.yaml'],
    };
    checks.push(
      fail(
        'enter',
        `the process has no ${lacking.map((one) => `CAP_${one}`).join(' and no ')}: it may not enter the networks of others`,
        ...fix[place],
      ),
    );
  }
  // With a folder of it the parameters would be those of one network, whoever looks.
  if (sysctlRoot !== '/proc/sys' && (await machine.read(under(sysctlRoot, 'net.ipv4.ip_forward'))) === null) {
    checks.push(
      fail(
        'parameters',
        `${sysctlRoot}/net is not all of /proc/sys/net: the path managers of other networks cannot be reached by it`,
        `docker run: -v /proc/sys/net:${sysctlRoot}/net`,
        `Kubernetes: a hostPath volume of /proc/sys/net, mounted at ${sysctlRoot}/net`,
      ),
    );
  }
  if (!docker) return checks;
  if (await machine.writable(engine)) checks.push(ok('engine', `${engine} can be opened`));
  else
    checks.push(
      fail(
        'engine',
        `${engine} is not there, or may not be opened`,
        `docker run: -v ${engine}:${engine}`,
        'or name it: DOCKER_HOST=unix:///PATH',
      ),
    );
  // Who may look at the processes of others has the other way in.
  const byProcesses = await mayDo(machine, CAP_SYS_PTRACE);
  if (place === 'docker' && !byProcesses && (await machine.list(SANDBOXES)).length === 0) {
    checks.push(
      warn(
        'sandboxes',
        `there is nothing in ${SANDBOXES}: no container runs, or the agent does not see their networks`,
        `docker run: -v ${SANDBOXES}:${SANDBOXES}:ro,rslave   # or --pid host --cap-add SYS_PTRACE`,
      ),
    );
  }
  return checks;
}

/** As `redirect.ts` of the client will say; with --check the kernel says what it would do, and does nothing. */
const REDIRECTION =
  'add table inet detour_rescue; add chain inet detour_rescue output { type nat hook output priority -100; }';

async function rescue(machine: Machine): Promise<readonly Check[]> {
  const trial = await machine.run('nft', ['--check', REDIRECTION]);
  // Without nft, or without permission, the check named nft has spoken already.
  if (!trial || /not permitted|denied/i.test(trial.stderr)) return [];
  if (trial.code === 0)
    return [ok('rescue', 'nft can lead connections of this host through a detour; it has to have DETOUR_RELAY=mptcp')];
  return [
    fail(
      'rescue',
      `DETOUR_RESCUE=on, and nft cannot translate connections of this host: ${firstLine(trial.stderr)}`,
      'modprobe -a nft_chain_nat nf_conntrack_netlink   # on the host',
    ),
  ];
}

/** Where the routes are asked for; nothing is sent there. */
const ANYWHERE = { inet: '1.1.1.1', inet6: '2606:4700:4700::1111' } as const;
/** Tables of our proposals: this, plus the interface's number. */
const FIRST_TABLE = 45_600;

/** Every chosen interface needs that what leaves from its address also leaves by it. */
async function interfaces(
  machine: Machine,
  { include, exclude }: NonNullable<ClientHostSettings['interfaces']>,
): Promise<readonly Check[]> {
  const ask = async (...args: readonly string[]): Promise<readonly Row[]> =>
    rowsOf((await machine.run('ip', ['-j', ...args]))?.stdout);
  const [links, ...defaults] = await Promise.all([
    ask('addr', 'show', 'up'),
    ask('-4', 'route', 'show', 'default'),
    ask('-6', 'route', 'show', 'default'),
  ]);
  const ways = defaults.flat();
  const chosen = links.filter(({ ifname }) => {
    const name = String(ifname);
    const wanted =
      include.length === 0 ? ways.some(({ dev }) => dev === name) : include.some((glob) => matchesGlob(glob, name));
    return wanted && name !== 'lo' && !exclude.some((glob) => matchesGlob(glob, name));
  });
  const checks: Check[] = [];
  for (const { ifname, ifindex, addr_info: held } of chosen) {
    for (const family of ['inet', 'inet6'] as const) {
      const own = rowsIn(held).find((one) => one.family === family && one.scope === 'global' && !one.deprecated);
      if (!own) continue;
      const [name, address] = [String(ifname), String(own.local)];
      const version = family === 'inet' ? '-4' : '-6';
      const [route] = await ask(version, 'route', 'get', ANYWHERE[family], 'from', address);
      if (route?.dev === name) {
        checks.push(ok('interfaces', `what leaves from ${address} leaves by ${name}`));
        continue;
      }
      const gateway = ways.find(
        ({ dev, gateway: hop }) => dev === name && String(hop).includes(':') === (version === '-6'),
      );
      const table = FIRST_TABLE + Number(ifindex);
      checks.push(
        fail(
          'interfaces',
          `what leaves from ${address} would ${route ? `leave by ${String(route.dev)}` : 'find no route'}, not by ${name}`,
          `ip ${version} route add default via ${String(gateway?.gateway ?? 'GATEWAY')} dev ${name} table ${table}${
            gateway ? '' : `   # GATEWAY: the router on ${name}`
          }`,
          `ip ${version} rule add from ${address} lookup ${table}`,
        ),
      );
    }
  }
  if (checks.length > 0) return checks;
  return [
    fail(
      'interfaces',
      'DETOUR_INTERFACES and DETOUR_INTERFACES_EXCLUDE choose no interface with an address',
      'ip -br addr',
    ),
  ];
}

/** Whether this machine can carry tunnels, and by what. */
async function tunnels(machine: Machine, name: string, place: Place): Promise<readonly Check[]> {
  const loaded = (await machine.list('/sys/module/wireguard')).length > 0;
  const loadable = loaded || (await machine.run('modprobe', ['--dry-run', 'wireguard']))?.code === 0;
  if (loadable) return [ok(name, `the kernel has WireGuard${loaded ? '' : ', and loads it when it is needed'}`)];
  const program = await machine.run('wireguard-go', ['--version']);
  const device = (await machine.list('/dev/net')).includes('tun');
  if (program && device)
    return [
      warn(
        name,
        'this kernel has no WireGuard: wireguard-go carries tunnels, which takes far more CPU',
        'modprobe wireguard   # on the host',
      ),
    ];
  const missing = [program ? '' : 'wireguard-go', device ? '' : '/dev/net/tun']
    .filter((what) => what !== '')
    .join(' and ');
  const fix = {
    host: ['modprobe wireguard', 'apt-get install wireguard-go && modprobe tun'],
    docker: [
      'modprobe wireguard   # on the host',
      'docker run: --device /dev/net/tun; compose: devices: [/dev/net/tun]',
    ],
    kubernetes: [
      'modprobe wireguard   # on the node',
      'a hostPath volume of /dev/net/tun (type CharDevice), mounted there',
    ],
  };
  return [
    fail(name, `no tunnel can be made: this kernel has no WireGuard, and ${missing} is not here either`, ...fix[place]),
  ];
}

async function tunnelPort(machine: Machine, port: number, running: boolean): Promise<readonly Check[]> {
  const bound = (await boundPorts(machine, 'udp', `0${IN_USE}`)).includes(port);
  if (bound === running) return [ok('tunnel-port', running ? `tunnels arrive at UDP ${port}` : `UDP ${port} is free`)];
  return bound
    ? [
        fail(
          'tunnel-port',
          `something uses UDP ${port} already`,
          `ss -ulpn 'sport = :${port}'   # shows which; or set DETOUR_VPN_PORT to another port`,
        ),
      ]
    : [
        fail(
          'tunnel-port',
          `the router runs, but no tunnel can arrive at UDP ${port}`,
          'detour status router   # says what is wrong with its tunnels',
        ),
      ];
}

/** As `TUNNEL_INTERFACE` of the router. */
const TUNNELS = 'detour-vpn';

/** Whether the networks of the tunnels are this host's own. */
async function tunnelNetworks(
  machine: Machine,
  { v4, v6 }: NonNullable<RouterSettings['vpn']>,
): Promise<readonly Check[]> {
  const checks: Check[] = [];
  for (const network of [v4, v6]) {
    if (!network) continue;
    const version = network.address.family === 4 ? '-4' : '-6';
    const listing = await machine.run('ip', ['-j', version, 'route', 'show', 'table', 'all']);
    const clash = rowsOf(listing?.stdout)
      .filter(({ dev }) => dev !== TUNNELS)
      .map(({ dst }) => parsePrefix(String(dst)))
      .find((one) => one && one.length > 0 && (contains(one, network.address) || contains(network, one.address)));
    if (clash) {
      checks.push(
        fail(
          'tunnel-network',
          `${formatPrefix(network)} of DETOUR_VPN_NETWORK overlaps with ${formatPrefix(clash)}, to which this host has a route`,
          `DETOUR_VPN_NETWORK=${network.address.family === 4 ? '10.216.0.0/16' : 'fd0d:e71::/48'},...   # any private network that is free here`,
        ),
      );
    } else checks.push(ok('tunnel-network', `${formatPrefix(network)} is nobody else's here`));
  }
  return checks;
}

type Row = Readonly<Record<string, unknown>>;

const rowsIn = (value: unknown): readonly Row[] =>
  Array.isArray(value) ? value.filter((one): one is Row => typeof one === 'object' && one !== null) : [];

/** What `ip -j` prints; nothing when it failed. */
function rowsOf(text: string | undefined): readonly Row[] {
  try {
    return rowsIn(JSON.parse(text ?? ''));
  } catch {
    return [];
  }
}

/** Others who want to manage paths. Processes of the host are only seen from the host's own PID namespace. */
async function rivals(machine: Machine): Promise<readonly Check[]> {
  const pids = (await machine.list('/proc')).filter((name) => /^\d+$/.test(name));
  const names = new Set(await Promise.all(pids.map(async (pid) => (await machine.read(`/proc/${pid}/comm`))?.trim())));
  const checks: Check[] = [];
  if (names.has('mptcpd')) {
    checks.push(fail('mptcpd', 'mptcpd runs and manages the same connections', 'systemctl disable --now mptcp'));
  }
  const endpoints = await machine.run('ip', ['mptcp', 'endpoint', 'show']);
  const count = endpoints?.code === 0 ? endpoints.stdout.split('\n').filter((line) => line.trim() !== '').length : 0;
  if (count > 0 && names.has('NetworkManager')) {
    checks.push(
      warn(
        'networkmanager',
        `NetworkManager keeps ${count} endpoint(s) for the kernel's path manager; they do nothing while the agent runs`,
        'nmcli connection modify NAME connection.mptcp-flags disabled',
      ),
    );
  }
  return checks;
}

async function forwarding(machine: Machine, place: Place, running: boolean): Promise<readonly Check[]> {
  const families = [
    { name: 'ip-forward-v4', parameter: 'net.ipv4.ip_forward', needed: true },
    { name: 'ip-forward-v6', parameter: 'net.ipv6.conf.all.forwarding', needed: await hasGlobalV6(machine) },
  ];
  return Promise.all(
    families.map(async ({ name, parameter, needed }): Promise<Check> => {
      const path = under('/proc/sys', parameter);
      const value = (await machine.read(path))?.trim();
      if (value === undefined) return ok(name, 'this kernel does not have the family');
      if (value !== '0') return ok(name, `${parameter}=${value}`);
      if (!running && (await machine.writable(path)))
        return ok(name, `${parameter}=0; the router switches it on when it starts`);
      if (!needed) return ok(name, `${parameter}=0; this machine has no IPv6 address of its own to relay from`);
      const fix = {
        host: [`sysctl -w ${parameter}=1`],
        docker: [
          `own network: docker run --sysctl ${parameter}=1`,
          `host network: sysctl -w ${parameter}=1 on the host`,
        ],
        kubernetes: [`sysctl -w ${parameter}=1 on the node`],
      };
      const v6 = name.endsWith('v6');
      return {
        ...(v6 ? warn : fail)(name, `${parameter}=0: ${v6 ? 'IPv6 joins are' : 'nothing is'} relayed`),
        fix: fix[place],
      };
    }),
  );
}

async function hasGlobalV6(machine: Machine): Promise<boolean> {
  // Fourth column: the scope, 00 for global (include/net/ipv6.h).
  return ((await machine.read('/proc/net/if_inet6')) ?? '').split('\n').some((line) => line.split(/\s+/)[3] === '00');
}

type Chain = {
  readonly family: string;
  readonly table: string;
  readonly name: string;
  readonly hook?: string;
  readonly policy?: string;
};

/** Chains out of `nft -j list chains`; null when it cannot be read. */
async function chains(machine: Machine): Promise<readonly Chain[] | null> {
  const listing = await machine.run('nft', ['-j', 'list', 'chains']);
  if (listing?.code !== 0) return null;
  try {
    const parsed: { nftables?: { chain?: Chain }[] } = JSON.parse(listing.stdout);
    return (parsed.nftables ?? []).flatMap(({ chain }) => (chain ? [chain] : []));
  } catch {
    return null;
  }
}

/** Whether packets that the kernel forwards get past the firewalls that stand here beside us. */
async function firewall(machine: Machine, router: RouterSettings, running: boolean): Promise<readonly Check[]> {
  const all = await chains(machine);
  if (!all) return [warn('firewall', 'the rules cannot be read (see nft)', 'sudo detour doctor')];
  const checks: Check[] = [];
  const has = (family: string, table: string, name: RegExp): boolean =>
    all.some((chain) => chain.family === family && chain.table === table && name.test(chain.name));
  const { mark, mask } = router.fwmark;
  const match = `-m connmark --mark 0x${mark.toString(16)}/0x${mask.toString(16)} -m comment --comment detour -j ACCEPT`;

  for (const { family, command, legacyNames } of [
    { family: 'ip', command: 'iptables', legacyNames: '/proc/net/ip_tables_names' },
    { family: 'ip6', command: 'ip6tables', legacyNames: '/proc/net/ip6_tables_names' },
  ]) {
    const name = `forward-${family === 'ip' ? 'v4' : 'v6'}`;
    const hasLegacy = /^filter$/m.test((await machine.read(legacyNames)) ?? '');
    const legacyRules = hasLegacy ? await machine.run(`${command}-legacy`, ['-S']) : null;
    const legacy = legacyRules?.stdout ?? '';
    if (hasLegacy && legacyRules?.code !== 0) {
      checks.push(
        warn(
          name,
          `${command}-legacy has a filter table here, which cannot be read and may drop what is relayed (it needs a raw socket)`,
          'docker run: --cap-add NET_RAW; compose: cap_add: [NET_ADMIN, NET_RAW]',
          `on the host instead: ${command}-legacy -I FORWARD ${match}`,
        ),
      );
      continue;
    }
    const nftDrops = all.some(
      (chain) =>
        chain.family === family && chain.table === 'filter' && chain.hook === 'forward' && chain.policy === 'drop',
    );
    const flavours = [
      { tool: `${command}-nft`, drops: nftDrops, docker: has(family, 'filter', /^DOCKER-USER$/) },
      { tool: `${command}-legacy`, drops: /^-P FORWARD DROP$/m.test(legacy), docker: /^-N DOCKER-USER$/m.test(legacy) },
    ];
    const dropping = flavours.filter(({ drops }) => drops);
    if (dropping.length === 0) {
      checks.push(ok(name, 'no iptables policy stands in the way'));
      continue;
    }
    for (const { tool, docker } of dropping) {
      const line = `${tool} -I ${docker ? 'DOCKER-USER' : 'FORWARD'} ${match}`;
      const rules = tool.endsWith('legacy') ? legacy : ((await machine.run(tool, ['-S']))?.stdout ?? null);
      const mentioned =
        rules?.split('\n').some((rule) => rule.includes('--comment') && /detour/.test(rule) && /ACCEPT/.test(rule)) ??
        false;
      const who = docker ? 'Docker sets' : 'somebody set';
      if (mentioned) checks.push(ok(name, `${who} FORWARD to DROP; our rule lets our flows pass`));
      else if (!running && rules !== null)
        checks.push(ok(name, `${who} FORWARD to DROP; the router adds one rule for its own flows when it starts`));
      else if (rules === null)
        checks.push(
          fail(
            name,
            `${who} FORWARD to DROP, and ${tool} is not installed to let our flows pass`,
            'apt-get install iptables',
            line,
          ),
        );
      else checks.push(fail(name, `${who} FORWARD to DROP, and our rule is not there`, line));
    }
  }

  const port = router.listen.port;
  const ufw = has('ip', 'filter', /^ufw-/);
  if (ufw) {
    const userRules = await machine.run('iptables', ['-S', 'ufw-user-input']);
    const open = new RegExp(`-p udp .*--dport ${port} .*ACCEPT`).test(`${userRules?.stdout} `.replaceAll('\n', ' \n'));
    checks.push(
      open
        ? ok('ufw', `lets UDP ${port} in`)
        : warn(
            'ufw',
            `ufw is active; with the host's network it must let the control port in`,
            `ufw allow ${port}/udp`,
          ),
    );
    if (router.vpn) {
      const { port: tunnelled } = router.vpn;
      const lets = new RegExp(`-p udp .*--dport ${tunnelled} .*ACCEPT`).test(
        `${userRules?.stdout} `.replaceAll('\n', ' \n'),
      );
      checks.push(
        lets
          ? ok('ufw', `lets UDP ${tunnelled} in`)
          : warn('ufw', 'ufw is active; it must let tunnels in', `ufw allow ${tunnelled}/udp`),
      );
    }
  }
  if (has('inet', 'firewalld', /./)) {
    checks.push(
      warn(
        'firewalld',
        "firewalld is active; with the host's network it must let the control port in",
        `firewall-cmd --permanent --add-port=${port}/udp && firewall-cmd --reload`,
      ),
    );
    const forward = await machine.run('nft', ['list', 'chain', 'inet', 'firewalld', 'filter_FORWARD']);
    if (forward?.code === 0 && !/ct status dnat accept/.test(forward.stdout)) {
      checks.push(
        fail(
          'firewalld-forward',
          'firewalld drops translated flows, and no rule of ours can override that',
          'firewall-cmd --permanent --zone=public --add-forward && firewall-cmd --reload',
        ),
      );
    }
  }
  const known = new Set(['filter', 'firewalld', 'detour']);
  for (const chain of all.filter(
    (chain) => chain.hook === 'forward' && chain.policy === 'drop' && !known.has(chain.table),
  )) {
    checks.push(
      warn(
        'forward-nft',
        `chain ${chain.family} ${chain.table} ${chain.name} drops what it does not know, and an accept of ours cannot override that`,
        `nft insert rule ${chain.family} ${chain.table} ${chain.name} ct mark and 0x${mask.toString(16)} == 0x${mark.toString(16)} accept   # and keep it in that firewall's own file`,
      ),
    );
  }
  return checks;
}

async function conntrack(machine: Machine): Promise<readonly Check[]> {
  const number = async (name: string): Promise<number> =>
    Number((await machine.read(`/proc/sys/net/netfilter/${name}`)) ?? Number.NaN);
  const [count, max] = await Promise.all([number('nf_conntrack_count'), number('nf_conntrack_max')]);
  if (Number.isNaN(count) || Number.isNaN(max) || max === 0) return [ok('conntrack', 'not in use yet')];
  const share = count / max;
  const detail = `${count} of ${max} connections tracked`;
  const fix = `sysctl -w net.netfilter.nf_conntrack_max=${max * 2}   # on the host: it holds for all namespaces`;
  if (share >= CONNTRACK_FULL)
    return [fail('conntrack', `${detail}: no new lease is granted above ${CONNTRACK_FULL * 100} %`, fix)];
  return [share >= CONNTRACK_BUSY ? warn('conntrack', detail, fix) : ok('conntrack', detail)];
}

/** Local ports out of /proc/net/{tcp,udp}{,6} in one state. */
async function boundPorts(machine: Machine, protocol: 'tcp' | 'udp', wanted: string): Promise<readonly number[]> {
  const tables = await Promise.all([protocol, `${protocol}6`].map((name) => machine.read(`/proc/net/${name}`)));
  return tables.flatMap((table) =>
    (table ?? '')
      .split('\n')
      .slice(1)
      .flatMap((line) => {
        const [, local = '', , state = ''] = line.trim().split(/\s+/);
        return state === wanted ? [Number.parseInt(local.slice(local.lastIndexOf(':') + 1), 16)] : [];
      }),
  );
}

async function controlPort(machine: Machine, router: RouterSettings, running: boolean): Promise<readonly Check[]> {
  const { port } = router.listen;
  const bound = (await boundPorts(machine, 'udp', `0${IN_USE}`)).includes(port);
  const shown = formatEndpoint(router.listen);
  if (running) {
    return bound
      ? [ok('control-port', `the router listens at ${shown}/udp`)]
      : [
          fail(
            'control-port',
            `the router runs, but nothing listens at UDP ${port}`,
            'docker restart detour-router   # and report what its log says',
          ),
        ];
  }
  return bound
    ? [
        fail(
          'control-port',
          `another program uses UDP ${port}`,
          `ss -ulpn 'sport = :${port}'   # shows which; or set DETOUR_LISTEN to another port`,
        ),
      ]
    : [ok('control-port', `UDP ${port} is free`)];
}

const overlap = (a: PortRange, b: PortRange): boolean => a.first <= b.last && b.first <= a.last;

/** A range of the same size elsewhere that meets none of `taken`. */
function freeRange(size: number, taken: readonly PortRange[]): PortRange | null {
  for (let first = 10_000; first + size - 1 <= 65_535; first += 1000) {
    const candidate = { first, last: first + size - 1 };
    if (!taken.some((range) => overlap(range, candidate))) return candidate;
  }
  return null;
}

async function leasePorts(machine: Machine, router: RouterSettings): Promise<readonly Check[]> {
  const { ports } = router;
  const shown = `${ports.first}-${ports.last}`;
  const listening = await boundPorts(machine, 'tcp', LISTENING);
  const inside = [...new Set(listening)]
    .filter((port) => ports.first <= port && port <= ports.last)
    .sort((a, b) => a - b);
  const [first = 0, last = 0] = ((await machine.read('/proc/sys/net/ipv4/ip_local_port_range')) ?? '')
    .trim()
    .split(/\s+/)
    .map(Number);
  const ephemeral = { first, last };
  const problems: string[] = [];
  if (inside.length > 0)
    problems.push(`a local program listens at TCP ${inside.slice(0, 5).join(', ')}${inside.length > 5 ? ', ...' : ''}`);
  if (last > 0 && overlap(ports, ephemeral))
    problems.push(`it meets ${first}-${last}, from which this machine opens its own connections`);
  if (problems.length === 0) return [ok('lease-ports', `TCP ${shown} is free`)];
  const taken = [ephemeral, router.listen.port, router.http?.port ?? 0, ...listening].map((item) =>
    typeof item === 'number' ? { first: item, last: item } : item,
  );
  const free = freeRange(ports.last - ports.first + 1, taken) ?? freeRange(1000, taken);
  return [
    fail(
      'lease-ports',
      `DETOUR_PORTS=${shown}: ${problems.join('; ')}`,
      free ? `DETOUR_PORTS=${free.first}-${free.last}` : `sysctl -w net.ipv4.ip_local_port_range="32768 60999"`,
    ),
  ];
}

type Hello =
  | { readonly outcome: 'answered'; readonly response: Response; readonly rttMs: number }
  | { readonly outcome: 'refused' | 'silence' | 'no-route' };

/** One HELLO round trip with the real key, three tries. */
async function hello(peer: Endpoint, key: Key, { datagrams, clock }: DoctorPorts): Promise<Hello> {
  const keys = deriveKeys(key.id, key.secret);
  const session = Buffer.from(clock.random(8)).readBigUInt64BE();
  const sent: { readonly bytes: Uint8Array; readonly at: number }[] = [];
  const { promise, resolve } = Promise.withResolvers<Hello>();
  let refused = false;
  const receive = (bytes: Uint8Array): void => {
    for (const { bytes: request, at } of sent) {
      const response = decodeResponse(bytes, keys, request);
      if (response) resolve({ outcome: 'answered', response, rttMs: clock.now() - at });
    }
  };
  const socket = await datagrams
    .connect(peer, receive, () => {
      refused = true;
    })
    .catch(() => null);
  if (!socket) return { outcome: 'no-route' };
  try {
    for (const [i, wait] of HELLO_WAITS_MS.entries()) {
      const request = {
        type: TYPE.HELLO,
        flags: 0,
        keyId: key.id,
        session,
        sequence: BigInt(i + 1),
        cookie: new Uint8Array(COOKIE_BYTES),
        lifetime: 0,
        vmin: VERSION,
        vmax: VERSION,
        destination: null,
        suggestedPort: 0,
        protocol: 0,
      };
      const bytes = encodeRequest(request, keys);
      sent.push({ bytes, at: clock.now() });
      socket.send(bytes);
      const { promise: waited, resolve: wake } = Promise.withResolvers<null>();
      clock.after(wait, () => wake(null));
      const answer = await Promise.race([promise, waited]);
      if (answer) return answer;
    }
    return { outcome: refused ? 'refused' : 'silence' };
  } finally {
    socket.close();
  }
}

async function listed(lists: NonNullable<Subject['detours']>['lists']): Promise<readonly Check[]> {
  return lists.map(({ source, found, complaints }) => {
    const name = `source ${source}`;
    const entries = `${found} ${found === 1 ? 'detour' : 'detours'}`;
    if (complaints.length === 0) return ok(name, entries);
    const detail = `${entries}; ${complaints.join('; ')}`;
    const fix = 'correct the list, or DETOUR_DETOURS; `detour status` shows what a running agent makes of it';
    return found === 0 ? fail(name, detail, fix) : warn(name, detail, fix);
  });
}

async function reachability(source: FixedSource, key: Key, ports: DoctorPorts): Promise<readonly Check[]> {
  const name = `detour ${source.kind === 'static' ? source.name : source.host}`;
  let addresses: readonly Address[];
  try {
    addresses = await ports.resolve(source.host);
  } catch (error) {
    const reason = error instanceof Error && 'code' in error ? String(error.code) : 'unknown error';
    return [
      fail(
        name,
        `the name ${source.host} does not resolve (${reason})`,
        `getent ahosts ${source.host}   # and correct DETOUR_DETOURS or the resolver`,
      ),
    ];
  }
  if (addresses.length === 0)
    return [fail(name, `the name ${source.host} has no address`, `getent ahosts ${source.host}`)];
  const id = key.id.toString(16).padStart(8, '0');
  const checks = await Promise.all(
    addresses.map(async (address): Promise<Check> => {
      const peer = { address, port: source.port };
      const shown = formatEndpoint(peer);
      const result = await hello(peer, key, ports);
      switch (result.outcome) {
        case 'answered': {
          const { response, rttMs } = result;
          const seen = `answers in ${rttMs.toFixed(1)} ms and sees this client as ${formatAddress(response.observed.address)}`;
          if (response.result === RESULT.OK || response.result === RESULT.CHALLENGE)
            return ok(name, `${shown} ${seen}`);
          return warn(
            name,
            `${shown} ${seen}, but says ${resultName(response.result)}`,
            'look into the log of that router',
          );
        }
        case 'refused':
          return fail(
            name,
            `${shown} refuses: the machine is there, but nothing listens at UDP ${source.port}`,
            'start the router there, or correct the port in DETOUR_DETOURS',
          );
        case 'no-route':
          return fail(name, `${shown}: this machine has no route to it`, `ip route get ${formatAddress(address)}`);
        case 'silence':
          return fail(
            name,
            `${shown} is silent: a firewall drops UDP ${source.port}, or the router does not know key ${id} (it never answers strangers)`,
            `on the detour: ufw allow ${source.port}/udp   # and in the provider's security group`,
            `on the detour: detour config print router   # DETOUR_KEYS must show ${id}`,
          );
      }
    }),
  );
  // A name with addresses of both families is fine when one family works: many clients have only IPv4.
  const works = checks.some(({ state }) => state === 'ok');
  return checks.map((check) => (works && check.state === 'fail' ? { ...check, state: 'warn' } : check));
}

/** Text for a terminal. */
export function presentChecks(checks: readonly Check[]): string {
  const width = Math.max(...checks.map(({ name }) => name.length));
  const label = { ok: 'ok  ', warn: 'WARN', fail: 'FAIL' };
  const lines = checks.flatMap(({ name, state, detail, fix }) => [
    `${label[state]}  ${name.padEnd(width)}  ${detail}`,
    ...fix.map((line) => `      ${' '.repeat(width)}  fix: ${line}`),
  ]);
  const count = (state: Check['state']): number => checks.filter((check) => check.state === state).length;
  lines.push('', `${count('ok')} fine, ${count('warn')} to look at, ${count('fail')} failed`);
  return lines.join('\n');
}
