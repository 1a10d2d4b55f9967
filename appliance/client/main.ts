import { setFlagsFromString } from 'node:v8';
import { Fatal } from '../exit.ts';
import { returnFreedMemory } from '../kernel/allocator.ts';
import { BpfError } from '../kernel/bpf.ts';
import { systemGroups } from '../kernel/cgroups.ts';
import { systemClock } from '../kernel/clock.ts';
import { udpDatagrams } from '../kernel/datagrams.ts';
import { openDiag } from '../kernel/diag.ts';
import { systemFiles } from '../kernel/files.ts';
import { systemHandshake } from '../kernel/handshake.ts';
import { isInbandLoaded, openInband, prepareInband, removeInband } from '../kernel/inband.ts';
import { openLinks } from '../kernel/links.ts';
import { systemLookup } from '../kernel/lookup.ts';
import { nftMemory } from '../kernel/memory.ts';
import { openPathManager, signalEndpoints, subflowLimit } from '../kernel/mptcp.ts';
import { isPinned, openSwitches, prepareSwitches, removeSwitches } from '../kernel/mptcpify.ts';
import { type Namespace, NamespaceError, openNamespace, ownNamespace } from '../kernel/namespaces.ts';
import { openNetwork } from '../kernel/network.ts';
import { remedyOf, systemNft } from '../kernel/nft.ts';
import { type ApiServer, podsOf } from '../kernel/pods.ts';
import { systemProcesses } from '../kernel/processes.ts';
import { systemSchedule } from '../kernel/schedule.ts';
import { isOfOneNamespace, procSysctl } from '../kernel/sysctl.ts';
import { nameProcess } from '../kernel/title.ts';
import { openTranslations } from '../kernel/translations.ts';
import { systemWeb } from '../kernel/web.ts';
import { openWireguard } from '../kernel/wireguard.ts';
import { type Log, logWith } from '../log.ts';
import type { ClientHostSettings, ClientSettings, ProviderName } from '../settings.ts';
import type { DaemonView } from '../status/daemon.ts';
import { flag, TABLE } from '../variables.ts';
import { VERSION } from '../version.ts';
import { announceEach } from './announcements.ts';
import { type AnnouncerPorts, takeBack } from './announcer.ts';
import { type DaemonPorts, type Place, startDaemon } from './daemon.ts';
import { watchDocker } from './docker.ts';
import { watchKubernetes } from './kubernetes.ts';
import { ACCEPTED_SUBFLOWS, type LimitPorts, lower, raise } from './limits.ts';
import { type LoaderOwner, type LoaderPorts, requireMptcp, unload as restore, load as select } from './loader.ts';
import { fillByLoad, INSTEAD } from './mptcpify.ts';
import { REDIRECTIONS, REMOVE_REDIRECTIONS, RESCUE_TABLE } from './redirect.ts';
import { sweepTunnels, type TunnelPorts } from './tunnels.ts';

/** The nftables table in which the client remembers what it changed. It holds no chain and touches no packet. */
export const CLIENT_TABLE = 'detour_client';
/** The same for the server's side. */
export const SERVER_TABLE = 'detour_server';
/** The same for what is announced. */
export const ANNOUNCED_TABLE = 'detour_announced';
/** Sockets of a process of this name are left alone by bpf/mptcpify.bpf.c. */
const PROCESS_NAME = 'detour';

export type RunningClient = {
  readonly view: DaemonView;
  /** Puts the path manager back and ends. Paths that exist go on without the agent. */
  stop(): Promise<void>;
};

/** Where Docker keeps the network namespaces of its containers. */
const SANDBOXES = '/var/run/docker/netns';

/** A burst of connections leaves freed memory behind; as for the router. */
const TRIM_MS = 10_000;

/**
 * Runs the client agent of this network namespace, and of those of the workloads that `providers` name.
 * @throws Fatal (69) when the kernel or the container lacks something; nothing has changed then.
 */
export async function startClient(settings: ClientSettings, log: Log): Promise<RunningClient> {
  // Left to itself, V8 takes 35 MB for the passing garbage of a thousand connections.
  setFlagsFromString('--optimize-for-size');
  setFlagsFromString('--semi-space-growth-factor=1');
  nameProcess(PROCESS_NAME);
  const providers = await openProviders(settings, log);
  const daemon = await startDaemon(settings, {
    clock: systemClock,
    log,
    lookup: systemLookup(),
    files: systemFiles(),
    web: systemWeb(),
    schedule: systemSchedule,
    ownId: ownNamespace.id,
    openPlace: async (path, workload) =>
      placeOf(
        path === null ? ownNamespace : await enter(path),
        settings,
        workload === null ? log : logWith(log, { workload }),
      ),
    providers,
    mptcpify: { groups: systemGroups(), openSwitches, isPinned },
    inband: { isLoaded: isInbandLoaded, open: openInband },
    openAnnouncing: ({ ports }) => openAnnouncing(settings, log, ports),
    version: VERSION,
  });
  const trimming = setInterval(returnFreedMemory, TRIM_MS).unref();
  return {
    view: daemon.view,
    async stop() {
      clearInterval(trimming);
      await daemon.stop();
    },
  };
}

/** Everything that the agent of one namespace needs of the kernel. */
function placeOf(namespace: Namespace, settings: ClientSettings, log: Log): Place {
  const { sysctl } = loaderPorts(settings, log, namespace);
  return {
    id: namespace.id,
    net: {
      inode: namespace.inode,
      mptcpEnabled: async () => (await sysctl.read('net.mptcp.enabled')) !== '0',
    },
    ports: {
      clock: systemClock,
      datagrams: udpDatagrams(namespace),
      // Opened with the agent: a place that turns out to be served already costs no socket.
      openDiag: () => openDiag(namespace),
      log,
      openNetwork: (onNews) => openNetwork(namespace, onNews),
      openPathManager: (onEvent) => openPathManager(namespace, onEvent),
      openRescue: () => ({
        nft: systemNft({ namespace }),
        translations: openTranslations(namespace),
        handshake: systemHandshake(namespace, settings.fwmark.mark),
      }),
      openTunnels: () => openTunnels(namespace),
    },
    async load() {
      // With what a predecessor with DETOUR_RESCUE=on left when it was killed.
      const steps = [ready(settings, log, 'daemon', namespace), settings.rescue ? null : removeRedirections(namespace)];
      try {
        await Promise.all(steps);
      } catch (error) {
        // What went wrong first is what the user has to mend.
        await Promise.allSettled(steps);
        await putBack(settings, log, 'daemon', namespace).catch(() => undefined);
        throw error;
      }
    },
    unload: () => putBack(settings, log, 'daemon', namespace),
    close: () => namespace.close(),
  };
}

function openTunnels(namespace: Namespace): TunnelPorts {
  const links = openLinks(namespace);
  return { links, wireguard: openWireguard(links, namespace), nft: systemNft({ namespace }), place: namespace.id };
}

/** What watches for workloads. @throws Fatal naming what this process lacks to serve them */
async function openProviders(settings: ClientSettings, log: Log): Promise<DaemonPorts['providers']> {
  const { providers } = settings;
  if (providers.every((name) => name === 'host')) return [];
  mayWriteTheirs(settings);
  await mayServe(providers);
  const clock = systemClock;
  const processes = systemProcesses();
  const readers = { targets: TABLE.targets.parse, strategy: TABLE.strategy.parse, mptcp: flag };
  const watchers: DaemonPorts['providers'][number][] = [];
  if (providers.includes('docker')) {
    const socketPath = socketOf(process.env['DOCKER_HOST']);
    // Only when it is needed: the library takes 10 MB.
    const { dockerEngine } = await import('../kernel/engine.ts');
    const engine = dockerEngine(socketPath);
    watchers.push((onChange) => watchDocker({ engine, processes, clock, log, readers, onChange }));
  }
  if (providers.includes('kubernetes')) {
    const pods = podsOf(apiServer());
    watchers.push((onChange) => watchKubernetes({ pods, processes, clock, log, readers, onChange }));
  }
  return watchers;
}

/** Through the mount that is enough for a host, the host's own path manager would be selected for each workload. */
function mayWriteTheirs({ providers, sysctlRoot }: ClientSettings): void {
  if (!isOfOneNamespace(sysctlRoot)) return;
  throw new Fatal(
    78,
    `DETOUR_PROVIDERS=${providers.join(',')}: ${sysctlRoot}/net/mptcp is mounted by itself, which shows one namespace in all of them. ` +
      `docker: -v /proc/sys/net:${sysctlRoot}/net; Kubernetes: use the overlay k8s/overlays/pods`,
  );
}

/** What serving others takes, besides what each of their namespaces shows: better to hear of it at once. @throws Fatal (69) */
async function mayServe(providers: readonly ProviderName[]): Promise<void> {
  (await openPathManager(ownNamespace, () => undefined)).close();
  const setting = `DETOUR_PROVIDERS=${providers.join(',')}`;
  try {
    (await openNamespace('/proc/self/ns/net')).close();
  } catch (error) {
    if (!(error instanceof NamespaceError)) throw error;
    throw new Fatal(
      69,
      `${setting}: this process may not enter other network namespaces (${error.code}): it needs CAP_SYS_ADMIN. ` +
        `docker: --cap-add SYS_ADMIN -v ${SANDBOXES}:${SANDBOXES}:ro,rslave; ` +
        'Kubernetes: use the overlay k8s/overlays/pods, which also has hostPID and SYS_PTRACE',
    );
  }
  // The first process of a pid namespace sees none but those that it started.
  if (providers.includes('kubernetes') && process.pid === 1)
    throw new Fatal(
      69,
      `${setting}: this process sees none of the node's: in the pod: hostPID: true; docker: --pid host`,
    );
}

/** @throws Fatal (78) for an engine that is not on this host: its namespaces could not be entered */
function socketOf(dockerHost: string | undefined): string {
  if (dockerHost === undefined || dockerHost === '') return '/var/run/docker.sock';
  const path = /^unix:\/\/(\/.+)$/.exec(dockerHost)?.[1];
  if (path !== undefined) return path;
  throw new Fatal(78, `DOCKER_HOST="${dockerHost}": must be unix:///PATH, the socket of an engine on this host`);
}

/** Where Kubernetes tells its pods to find the API. @throws Fatal (78) outside of a pod */
function apiServer(): ApiServer {
  const folder = '/var/run/secrets/kubernetes.io/serviceaccount';
  const { KUBERNETES_SERVICE_HOST: host, KUBERNETES_SERVICE_PORT: port = '443', NODE_NAME: node } = process.env;
  if (!host) throw new Fatal(78, 'DETOUR_PROVIDERS=kubernetes: KUBERNETES_SERVICE_HOST is not set: this is no pod');
  if (!node) {
    throw new Fatal(
      78,
      'DETOUR_PROVIDERS=kubernetes: NODE_NAME is not set; in the pod: env: [{name: NODE_NAME, valueFrom: {fieldRef: {fieldPath: spec.nodeName}}}]',
    );
  }
  return {
    url: `https://${host.includes(':') ? `[${host}]` : host}:${port}`,
    tokenPath: `${folder}/token`,
    caPath: `${folder}/ca.crt`,
    node,
  };
}

/** What to do when a workload's namespace cannot be entered. */
async function enter(path: string): Promise<Namespace> {
  try {
    return await openNamespace(path);
  } catch (error) {
    if (!(error instanceof NamespaceError)) throw error;
    throw new Error(`${error.message}${remedyFor(path, error.code)}`);
  }
}

function remedyFor(path: string, code: string): string {
  if (path.startsWith('/proc/')) {
    return code === 'EACCES' || code === 'EPERM'
      ? "; with the host's pid namespace it needs CAP_SYS_PTRACE besides CAP_SYS_ADMIN"
      : '';
  }
  const mount = `-v ${SANDBOXES}:${SANDBOXES}:ro,rslave`;
  if (code === 'ENOENT')
    return `; the agent has to see the engine's files: ${mount} (docker info says where, if its exec-root is another)`;
  // A file that nothing is mounted on is an ordinary one.
  if (code === 'EINVAL') return `; what the engine mounts must reach the agent after its start: ${mount}`;
  return '';
}

/**
 * `detour load`: readies the kernel until `detour unload`, with whatever takes more privileges than the agent. Returns what it did, for people.
 * @throws Fatal (69)
 */
export async function load(settings: ClientHostSettings, log: Log): Promise<readonly string[]> {
  const { sides, mptcpify, strategy } = settings;
  // Whatever can fail has been tried before anything is changed.
  const prepared = mptcpify === 'off' ? null : attempt(MPTCPIFY, log, prepareSwitches);
  const naming = sides.includes('client') && strategy.inband ? attempt(INBAND, log, prepareInband) : null;
  await ready(settings, log, 'load');
  const done: string[] = [];
  if (sides.includes('client')) done.push('the userspace path manager is selected');
  if (sides.includes('server')) done.push(`connections that are accepted may have ${ACCEPTED_SUBFLOWS} extra subflows`);
  const isKept =
    naming &&
    attempt(INBAND, log, () => {
      naming.keep();
      return true;
    });
  if (isKept) done.push('joins may name their servers themselves (in-band transit)');
  const switches = prepared && attempt(MPTCPIFY, log, prepared.keep);
  if (switches) {
    fillByLoad(switches, mptcpify, ownNamespace.inode);
    switches.close();
    done.push(
      mptcpify === 'all'
        ? 'plain TCP sockets of this network become Multipath TCP'
        : 'plain TCP sockets of workloads become Multipath TCP as the agent finds them labelled',
    );
  }
  return done;
}

/** What may turn out not to be had, and what is done then. */
type Attempt = { readonly setting: string; readonly event: string; readonly instead: string };
const MPTCPIFY: Attempt = {
  setting: 'DETOUR_MPTCPIFY',
  event: 'mptcpify-unavailable',
  instead: `Plain TCP sockets stay what they are. ${INSTEAD}`,
};
const INBAND: Attempt = {
  setting: 'DETOUR_STRATEGY=inband',
  event: 'inband-unavailable',
  instead: 'Joins cannot name their servers themselves: leases are used everywhere',
};

/**
 * What cannot be had on this kernel is said, and everything else goes on without. @throws Fatal (69) for what can be mended: an init
 * container that succeeds would hide it.
 */
function attempt<T>({ setting, event, instead }: Attempt, log: Log, task: () => T): T | null {
  try {
    return task();
  } catch (error) {
    if (!(error instanceof BpfError)) throw error;
    if (error.mendable) throw new Fatal(69, `${setting}: ${error.message}`);
    log.warn(event, { why: error.message }, instead);
    return null;
  }
}

/** `detour unload`: puts back what was there, whoever changed it. @throws Fatal (69) */
export async function unload(settings: ClientHostSettings, log: Log): Promise<void> {
  // First: what is made Multipath TCP now would not get the path manager that it was meant for.
  try {
    removeSwitches();
    removeInband();
  } catch (error) {
    throw error instanceof BpfError ? new Fatal(69, error.message) : error;
  }
  await putBack(settings, log, null);
}

/** Removes everything of the client from this network namespace. Works without a running agent. @throws Fatal (69) */
export async function cleanupClient(settings: ClientHostSettings, log: Log): Promise<void> {
  await unload(settings, log);
  await removeRedirections();
  await removeTunnels();
}

/** @throws Fatal (69) */
async function removeTunnels(): Promise<void> {
  const opened = openTunnels(ownNamespace);
  try {
    await sweepTunnels(opened);
  } catch (error) {
    throw new Fatal(69, `cannot remove tunnels: ${error instanceof Error ? error.message : String(error)}`);
  } finally {
    opened.wireguard.close();
    opened.links.close();
  }
}

/** Readies a namespace for the sides that are served. @throws Fatal (69) */
async function ready(
  settings: ClientHostSettings,
  log: Log,
  owner: LoaderOwner,
  namespace: Namespace = ownNamespace,
): Promise<void> {
  const { sides } = settings;
  const loader = loaderPorts(settings, log, namespace);
  if (sides.includes('client')) await select(loader, owner);
  else await requireMptcp(loader.sysctl);
  if (sides.includes('server')) await raise(limitPorts(log, namespace), owner);
}

/** Puts back what was there on either side: the settings may have been others. @throws Fatal (69) */
async function putBack(
  settings: ClientHostSettings,
  log: Log,
  owner: LoaderOwner | null,
  namespace: Namespace = ownNamespace,
): Promise<void> {
  await Promise.all([
    restore(loaderPorts(settings, log, namespace), owner),
    lower(limitPorts(log, namespace), owner),
    takeBack(announcing(log, namespace)),
  ]);
}

/** @throws Fatal (69) */
async function removeRedirections(namespace: Namespace = ownNamespace): Promise<void> {
  const nft = systemNft({ namespace });
  // Usually there are none, which is seen in a tenth of the time that removing them takes.
  const absent = await nft.dump(...REDIRECTIONS, () => undefined);
  const failure = absent?.kind === 'absent' ? null : await nft.run(REMOVE_REDIRECTIONS);
  if (failure) throw new Fatal(69, `cannot remove table ${RESCUE_TABLE}: ${remedyOf(failure)}`);
}

function loaderPorts(settings: ClientHostSettings, log: Log, namespace: Namespace = ownNamespace): LoaderPorts {
  return {
    sysctl: procSysctl(settings.sysctlRoot, namespace),
    memory: nftMemory(systemNft({ namespace }), CLIENT_TABLE),
    log,
  };
}

function announcing(log: Log, namespace: Namespace): AnnouncerPorts {
  const memory = nftMemory(systemNft({ namespace }), ANNOUNCED_TABLE);
  return { clock: systemClock, datagrams: udpDatagrams(namespace), log, endpoints: signalEndpoints(namespace), memory };
}

/** With the userspace path manager, which the client's side needs, the kernel announces nothing by itself. @throws Fatal (69) */
async function openAnnouncing(settings: ClientSettings, log: Log, ports: readonly number[]): Promise<AnnouncerPorts> {
  const byKernel = announcing(log, ownNamespace);
  if (!settings.sides.includes('client')) return byKernel;
  // What a predecessor without that side left when it was killed.
  await takeBack(byKernel);
  const endpoints = await announceEach(ports, {
    openPathManager: (onEvent) => openPathManager(ownNamespace, onEvent),
    openDiag: () => openDiag(ownNamespace),
    log,
  });
  return { ...byKernel, endpoints };
}

function limitPorts(log: Log, namespace: Namespace): LimitPorts {
  return { limit: subflowLimit(namespace), memory: nftMemory(systemNft({ namespace }), SERVER_TABLE), log };
}
