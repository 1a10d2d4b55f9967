import type { Clock } from '../kernel/clock.ts';
import type { Datagrams } from '../kernel/datagrams.ts';
import type { ConnectionSample, Diag } from '../kernel/diag.ts';
import type { InbandPorts } from '../kernel/inband.ts';
import type { PathEvent, PathManager } from '../kernel/mptcp.ts';
import type { Network, NetworkNews } from '../kernel/network.ts';
import type { Log } from '../log.ts';
import { type Address, type Endpoint, formatAddress } from '../protocol/address.ts';
import { deriveKeys } from '../protocol/control.ts';
import type { ClientSettings, Key } from '../settings.ts';
import type { Readiness } from '../status/daemon.ts';
import { createDetours, type DetourAddress, type DetourEvent } from './detours.ts';
import { chooseLinks } from './interfaces.ts';
import { step } from './manager.ts';
import type { ClientMetrics } from './metrics.ts';
import { isTunnelName } from './numbering.ts';
import {
  hex,
  type JsonObject,
  showConnections,
  showDetours,
  showExplanation,
  showRescues,
  showTunnels,
} from './report.ts';
import { needsRedirections } from './rescue.ts';
import { type RescuePorts, type Rescuer, startRescuer } from './rescuer.ts';
import {
  type Command,
  type Event,
  entranceOf,
  initial,
  inUse,
  type JoinOutcome,
  type Link,
  type Note,
  type ServerSource,
  type State,
} from './state.ts';
import { createTunnels, sweepTunnels, type TunnelPorts, type Tunnels } from './tunnels.ts';

/** Serves one network namespace: joins its kernel, the detours as they are reached from there, and the decisions. */
export type AgentPorts = {
  readonly clock: Clock;
  readonly datagrams: Datagrams;
  readonly openDiag: () => Diag;
  readonly log: Log;
  readonly openNetwork: (onNews: (news: NetworkNews) => void) => Network;
  /** Subscribes to the kernel's events. */
  readonly openPathManager: (onEvent: (event: PathEvent) => void) => Promise<PathManager>;
  /** Opened with `rescue` alone. @throws NetlinkError */
  readonly openRescue: () => RescuePorts;
  /** @throws NetlinkError */
  readonly openTunnels: () => TunnelPorts;
};

export type AgentSettings = Pick<
  ClientSettings,
  'maxPaths' | 'strategy' | 'targets' | 'exclude' | 'mode' | 'minAgeMs' | 'rescue' | 'interfaces' | 'fwmark'
> & { readonly key: Key };

export type AgentOptions = {
  readonly settings: AgentSettings;
  readonly ports: AgentPorts;
  readonly metrics: ClientMetrics;
  /** The namespace's addresses or routes changed: what failed from here may work now. */
  readonly onMoved: () => void;
  /** Null: joins need leases. */
  readonly inband: InbandPorts | null;
  /** As of `DetoursOptions`. */
  readonly isShared: (detour: string, server: Endpoint) => boolean;
};

export type Agent = {
  /** What it knows; to be read only. */
  readonly state: State;
  /** The detours there are, each time anew. */
  set(addresses: readonly DetourAddress[]): void;
  /** Time-outs and retries; to be called every 200 ms or so. */
  tick(): void;
  /** Reads the kernel when that is due; to be called every `LIVELY_MS`. */
  watch(): void;
  /** The machine slept. */
  wake(): void;
  readiness(): Readiness;
  report(): Promise<AgentReport>;
  explain(address: Address, port: number | null): JsonObject;
  /**
   * Stops acting; subflows that exist go on. The path manager is put back by `restore`, while events are still listened to: with the
   * userspace one selected and nobody listening, the kernel refuses incoming joins. @throws what `restore` throws
   */
  stop(restore: () => Promise<void>): Promise<void>;
};

export type AgentReport = {
  readonly detours: readonly JsonObject[];
  readonly connections: readonly JsonObject[];
  /** Null while rescue is off. */
  readonly rescues: readonly JsonObject[] | null;
  readonly tunnels: readonly JsonObject[];
};

/** The kernel is read again now and then even when there is nothing to do, */
const RECONCILE_MS = 60_000;
/** every second while connections might get or lose paths, and more often while they carry something. */
const WATCH_MS = 1_000;
export const LIVELY_MS = 250;
/** For so long after they last did. */
const LIVELY_FOR_MS = 3_000;
/** Reading and deciding may take this part of the time at most. */
const WATCH_SHARE = 25;
/** So many connections of a reading are dealt with at a time: about ten milliseconds. */
const PART = 500;
/** Reads after lost events are at least this far apart: each may be what makes the next events get lost. */
const DUMP_GAP_MS = 1_000;
/** Changes of the network come in bursts: the first is looked at after this, and the next ones this far apart. */
const CHANGE_MS = 100;
const CHANGE_GAP_MS = 1_000;
/** Status answers asked for within this time share one reading of the kernel. */
const SAMPLE_MS = 250;

const NOTES: Record<Note, { event: string; message: string }> = {
  unmanageable: {
    event: 'connection-unmanageable',
    message: "A connection belongs to the kernel's own path manager and gets no paths: it is older than the agent",
  },
  'server-limit': {
    event: 'server-limit',
    message: 'The server accepts no more subflows on a connection; on the server: ip mptcp limits set subflow 8',
  },
  'inband-fails': {
    event: 'inband-fails',
    message: 'Joins that name their server get no answer through a detour on this network: using leases there',
  },
  'direct-lost': { event: 'direct-lost', message: 'A connection lost its direct path; making it again' },
};

const OUTCOMES: Record<JoinOutcome, { level: 'info' | 'warn'; message: string }> = {
  established: { level: 'info', message: 'A path is up' },
  refused: { level: 'warn', message: 'A path was refused' },
  timeout: { level: 'warn', message: 'A path got no answer' },
  failed: { level: 'warn', message: 'A path could not be made' },
  limit: { level: 'info', message: 'A path was closed by the server at once' },
  lost: { level: 'warn', message: 'A path was lost' },
};

/** Starts serving a namespace. @throws Fatal when the kernel cannot be listened to */
export async function startAgent({
  settings,
  ports,
  metrics,
  onMoved,
  inband,
  isShared,
}: AgentOptions): Promise<Agent> {
  const { clock, log } = ports;
  const { maxPaths, strategy, targets, exclude, mode, minAgeMs, rescue } = settings;
  const seed = new DataView(new Uint8Array(clock.random(4)).buffer).getUint32(0);
  // With `auto` it is used where `detour load` prepared the kernel for it.
  const mayName = inband !== null && (strategy.inband === true || !strategy.ordered);
  const state = initial({ maxPaths, ...strategy, inband: mayName, targets, exclude, mode, minAgeMs, rescue }, seed);
  /** Whole ms: the thousands of times that are kept would take 16 bytes more each with a fraction. */
  const time = (): number => Math.floor(clock.now());
  /** What adds a wall-clock time to a monotonic one. */
  const wallAt = (at: number): string => new Date(clock.wall() - (clock.now() - at)).toISOString();
  const diag = ports.openDiag();
  let network: Network | null = null;
  let pathManager: PathManager | null = null;
  let rescuer: Rescuer | null = null;
  let tunnels: Tunnels | null = null;
  let stopped = false;
  let dumping = false;
  let dumpWanted = false;
  let lastDump = Number.NEGATIVE_INFINITY;
  /** What the last reading took, with what was made of it, ms. */
  let dumpTook = 0;
  /** Connections that ended since the reading was asked for: it must not bring them back. */
  const closedSince = new Set<number>();
  let changing = false;
  /** Since the last look, routes changed or the machine slept. */
  let moved = false;
  let lastChange = Number.NEGATIVE_INFINITY;
  let addressText: string | null = null;
  /** The chosen interfaces; null while routing decides. */
  let links: readonly Link[] | null = null;

  const nameOf = (detour: string | null): string | null =>
    detour === null ? null : (state.detours.get(detour)?.name ?? detour);

  function handle(event: Event): void {
    if (stopped) return;
    const now = time();
    for (const command of step(state, event, now)) execute(command, now);
  }

  function execute(command: Command, now: number): void {
    switch (command.kind) {
      case 'create-subflow':
        // The SYN has left when this returns: the kernel acts inside the send.
        pathManager?.subflowCreate(command).catch((error: unknown) => {
          handle({
            kind: 'create-failed',
            token: command.token,
            local: command.local,
            remote: command.remote,
            code: codeOf(error),
          });
        });
        if (command.establishedAt !== null) metrics.joinDelay.observe((clock.now() - now) / 1000);
        break;
      case 'destroy-subflow':
        // A subflow that is gone already is what was wanted.
        pathManager?.subflowDestroy(command.token, command).catch(() => undefined);
        break;
      case 'abort-subflow':
        // One that has ended by itself needs no telling, and where the kernel cannot, the server hears of it later.
        diag.abort(command).catch(() => undefined);
        break;
      case 'set-backup':
        // One that is gone needs no change, and whatever else happens shows in the next sample.
        pathManager?.setBackup(command.token, command, command.backup).catch(() => undefined);
        break;
      case 'decided': {
        const { act, why } = command;
        metrics.decisions.inc({ act });
        log.debug('decided', { token: hex(command.token), act, detour: nameOf(command.detour), why }, why);
        break;
      }
      case 'want-lease':
        detours.want(command.detour, command.server);
        break;
      case 'doubt-lease':
        detours.doubt(command.detour, command.server);
        break;
      case 'release-lease':
        detours.release(command.detour, command.server);
        break;
      case 'want-tunnel':
        tunnels?.want(command.site);
        break;
      case 'doubt-tunnel':
        tunnels?.doubt(command.site);
        break;
      case 'release-tunnel':
        tunnels?.release(command.site);
        break;
      case 'dump':
        dump();
        break;
      case 'find-sources':
        void findSources(command.servers);
        break;
      case 'joined': {
        const detour = nameOf(command.detour);
        metrics.joins.inc({ outcome: command.outcome });
        const { level, message } = OUTCOMES[command.outcome];
        const why = command.why ? { why: command.why } : {};
        log[level](`path-${command.outcome}`, { token: hex(command.token), detour, ...why }, message);
        break;
      }
      case 'try-direct':
      case 'try-relay':
      case 'redirect':
      case 'ask-translation':
      case 'rescue':
        if (command.kind === 'rescue') metrics.rescues.inc({ what: command.what });
        rescuer?.execute(command);
        break;
      case 'note': {
        const { event, message } = NOTES[command.what];
        log[command.level](event, { token: hex(command.token) }, message);
        break;
      }
    }
  }

  /** Reads what must have been missed; one reading at a time, and not too often. */
  function dump(): void {
    read(Math.max(0, lastDump + DUMP_GAP_MS - clock.now()));
  }

  /** Reads the kernel's connections and hands them to the manager. */
  function read(waitMs = 0): void {
    if (dumping || stopped) {
      dumpWanted = true;
      return;
    }
    dumping = true;
    dumpWanted = false;
    clock.after(waitMs, () => {
      const askedAt = time();
      lastDump = askedAt;
      closedSince.clear();
      diag.connections().then(
        (connections) => {
          dumpTook = clock.now() - askedAt;
          takeIn(connections, askedAt);
        },
        (error: unknown) => {
          if (!stopped)
            log.warn(
              'dump-failed',
              { code: codeOf(error) },
              'Reading connections from the kernel failed; trying again',
            );
          dumpWanted = true;
          dumped();
        },
      );
    });
  }

  /** Hands a reading over in parts, so that ten thousand connections do not hold up everything else. */
  function takeIn(connections: readonly ConnectionSample[], askedAt: number): void {
    let present: ReadonlySet<number> | null = new Set(connections.map(({ token }) => token));
    const next = (at: number): void => {
      const began = clock.now();
      const part = connections.slice(at, at + PART).filter(({ token }) => !closedSince.has(token));
      handle({ kind: 'dump', askedAt, connections: part, present });
      present = null;
      dumpTook += clock.now() - began;
      if (stopped || at + PART >= connections.length) dumped();
      else clock.after(0, () => next(at + PART));
    };
    next(0);
  }

  function dumped(): void {
    dumping = false;
    if (dumpWanted) dump();
  }

  function onKernelEvent(event: PathEvent): void {
    metrics.events.inc({ kind: event.kind });
    if (event.kind === 'closed' && dumping) closedSince.add(event.token);
    if (event.kind === 'events-lost')
      log.warn('events-lost', {}, 'The kernel had to drop events; reading its state again');
    handle(event);
  }

  /** Something of this host's own network changed. */
  function onNews(news: NetworkNews): void {
    moved ||= news === 'way';
    if (changing || stopped) return;
    changing = true;
    clock.after(Math.max(CHANGE_MS, lastChange + CHANGE_GAP_MS - clock.now()), () => {
      changing = false;
      lastChange = clock.now();
      const anyway = moved;
      moved = false;
      void look(anyway);
    });
  }

  /** Looks at the host's addresses; unless `anyway`, nothing follows when they are what they were. */
  async function look(anyway: boolean): Promise<void> {
    if (!network) return;
    try {
      // What is inside our own tunnels is no way out of this host.
      const addresses = (await network.addresses()).filter(({ interface: name }) => !isTunnelName(name));
      const chosen = settings.interfaces && (await network.defaults());
      if (settings.interfaces && chosen) links = chooseLinks(settings.interfaces, addresses, chosen, links ?? []);
      const text = addresses.map(({ address, index }) => `${formatAddress(address)}%${index}`).join(' ');
      if (stopped || (!anyway && text === addressText)) return;
      if (addressText !== null)
        log.info('network-changed', {}, "This host's network changed: asking all detours again");
      const first = addressText === null;
      addressText = text;
      handle({ kind: 'network-changed', addresses: addresses.map(({ address }) => address), links });
      if (links) detours.use(links);
      if (first && links?.length === 0)
        log.warn(
          'no-interface',
          {},
          'No interface is chosen by DETOUR_INTERFACES and DETOUR_INTERFACES_EXCLUDE; `ip -br addr` lists them',
        );
      if (first) return;
      metrics.networkChanges.inc();
      detours.retry();
      onMoved();
    } catch (error) {
      if (!stopped) log.warn('network-unread', { code: codeOf(error) }, "Reading this host's addresses failed");
    }
  }

  async function findSources(servers: readonly Address[]): Promise<void> {
    const found: ServerSource[] = [];
    for (const server of servers) {
      const route = await network?.route(server).catch(() => null);
      found.push({ server, local: route?.source ?? null });
    }
    handle({ kind: 'sources-found', sources: found });
  }

  /** Takes away what a predecessor left of its tunnels, and readies ours, if there are to be any. */
  async function startTunnels(route: Network['route']): Promise<Tunnels | null> {
    const opened = ports.openTunnels();
    try {
      handle({ kind: 'addresses-gone', addresses: await sweepTunnels(opened) });
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      log.warn(
        'tunnels-left',
        { reason },
        'Tunnels of an earlier agent could not be taken away; `detour cleanup client` tries again',
      );
    }
    if (!strategy.kinds.includes('vpn')) {
      opened.wireguard.close();
      opened.links.close();
      return null;
    }
    return createTunnels({
      keys,
      clock,
      datagrams: ports.datagrams,
      log,
      ports: opened,
      route,
      entrance(site) {
        const detour = entranceOf(state, site);
        return detour ? { detour: detour.key, endpoint: detour.endpoint } : null;
      },
      ask: (detour, question, quick) => detours.tunnel(detour, question, quick),
      inUse: (site) =>
        [...state.connections.values()].some(({ paths }) =>
          paths.some((path) => path.kind === 'vpn' && state.tunnels.get(path.detour ?? '')?.site === site),
        ),
      onEvent: handle,
    });
  }

  /** What runs through tunnels ends before they do, as long as servers can be told. */
  async function endTunnelled(): Promise<void> {
    const endings: Promise<unknown>[] = [];
    for (const { token, paths } of state.connections.values()) {
      for (const path of paths) {
        const { kind, local, remote } = path;
        if (kind !== 'vpn' || !inUse(path) || !local || !remote) continue;
        endings.push(pathManager?.subflowDestroy(token, { local, remote }) ?? Promise.resolve());
        endings.push(diag.abort({ local, remote }));
      }
    }
    await Promise.allSettled(endings);
  }

  /** Ports at which the kernel names servers, by the keys of their detours. */
  const naming = new Map<string, Endpoint>();

  /** Keeps the kernel's map of those ports what the detours say. */
  function follow(event: DetourEvent): void {
    if (!mayName || stopped || (event.kind !== 'detour-up' && event.kind !== 'detour-removed')) return;
    const before = naming.get(event.detour) ?? null;
    const address = state.detours.get(event.detour)?.address;
    const port = event.kind === 'detour-up' && address?.family === 4 ? (event.capability?.port ?? null) : null;
    const now = port === null || !address ? null : { address, port };
    if (before?.port === now?.port) return;
    try {
      if (now) inband?.add(now);
      if (before) inband?.remove(before);
    } catch (error) {
      log.warn('inband-failing', { code: String(error) }, 'The kernel cannot be told of a port for in-band transit');
    }
    if (now) naming.set(event.detour, now);
    else naming.delete(event.detour);
  }

  function forgetPorts(): void {
    for (const port of naming.values()) inband?.remove(port);
    naming.clear();
  }

  const keys = deriveKeys(settings.key.id, settings.key.secret);
  const detours = createDetours({
    bound: settings.interfaces !== null,
    isShared,
    keys,
    clock,
    datagrams: ports.datagrams,
    log,
    onEvent(event) {
      follow(event);
      handle(event);
    },
    onExchange: (type, result) => metrics.exchanges.inc({ type, result }),
  });
  /** Its sockets would otherwise keep the namespace, after everybody has left it. */
  async function stop(restore: () => Promise<void>): Promise<void> {
    stopped = true;
    try {
      await endTunnelled();
      await tunnels?.stop();
      detours.stop();
      forgetPorts();
      await restore();
    } finally {
      network?.close();
      pathManager?.close();
      await rescuer?.stop(needsRedirections(state));
      diag.close();
    }
  }

  try {
    pathManager = await ports.openPathManager(onKernelEvent);
    network = ports.openNetwork(onNews);
    if (rescue) {
      const { fwmark } = settings;
      rescuer = await startRescuer({ clock, diag, log, ports: ports.openRescue(), fwmark, onEvent: handle, nameOf });
    }
    tunnels = await startTunnels(network.route);
  } catch (error) {
    await stop(async () => undefined);
    throw error;
  }
  // What is adopted is told apart by the addresses of this host.
  void look(true).then(dump);
  const samples = sampler(diag, clock);

  return {
    state,
    set: (addresses) => detours.set(addresses),
    tick: () => handle({ kind: 'tick' }),
    watch() {
      const now = clock.now();
      const idle = state.connections.size === 0;
      const period = idle ? RECONCILE_MS : now - state.livelyAt < LIVELY_FOR_MS ? LIVELY_MS : WATCH_MS;
      // Timers are a little late: without the margin every second one would miss its turn.
      if (!dumping && now - lastDump + LIVELY_MS / 10 >= Math.max(period, dumpTook * WATCH_SHARE)) read();
    },
    wake: () => onNews('way'),
    readiness() {
      const all = [...state.detours.values()];
      if (stopped) return { ready: false, reasons: ['the agent is stopping'] };
      if (all.some((detour) => detour.state === 'up')) return { ready: true, reasons: [] };
      return { ready: false, reasons: all.map(({ name, why }) => `detour ${name}: ${why}`) };
    },
    async report() {
      const kernel = await samples();
      return {
        detours: showDetours(state, (detour) => detours.observed(detour)),
        connections: showConnections(state, kernel, time(), wallAt),
        rescues: state.rescue && showRescues(state, state.rescue, wallAt),
        tunnels: showTunnels(state, (site) => tunnels?.show(site) ?? null),
      };
    },
    explain: (address, port) => showExplanation(state, address, port, time(), wallAt),
    stop,
  };
}

/** One reading of the kernel for all who ask at about the same time. */
function sampler(diag: Diag, clock: Clock): () => Promise<ReadonlyMap<number, ConnectionSample>> {
  let at = Number.NEGATIVE_INFINITY;
  let reading: Promise<ReadonlyMap<number, ConnectionSample>> = Promise.resolve(new Map());
  return () => {
    if (clock.now() - at >= SAMPLE_MS) {
      at = clock.now();
      reading = diag.connections().then(
        (all) => new Map(all.map((one) => [one.token, one])),
        () => new Map(),
      );
    }
    return reading;
  };
}

const codeOf = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : 'UNKNOWN';
