import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { Clock } from '../kernel/clock.ts';
import type { Datagrams } from '../kernel/datagrams.ts';
import type { ConnectionSample, Diag, SubflowSample } from '../kernel/diag.ts';
import type { PathEvent, PathManager } from '../kernel/mptcp.ts';
import type { Network, NetworkNews } from '../kernel/network.ts';
import type { Log } from '../log.ts';
import { type Address, formatAddress, formatEndpoint, sameAddress } from '../protocol/address.ts';
import { deriveKeys } from '../protocol/control.ts';
import type { ClientSettings } from '../settings.ts';
import type { DaemonView, Json, Readiness } from '../status/daemon.ts';
import { createDetours } from './detours.ts';
import { explainConnection, explainDestination, type Row } from './explain.ts';
import { chooseLinks } from './interfaces.ts';
import { step } from './manager.ts';
import { needsRedirections } from './rescue.ts';
import { type RescuePorts, type Rescuer, startRescuer } from './rescuer.ts';
import { shortfall } from './slots.ts';
import { type SourcePorts, type Sources, watchSources } from './sources.ts';
import {
  type Command,
  type Connection,
  type Event,
  initial,
  type JoinOutcome,
  type Link,
  type Note,
  type Path,
  type Rescue,
  type ServerSource,
  type State,
} from './state.ts';
import { DIRECT } from './worth.ts';

export type DaemonPorts = SourcePorts & {
  readonly datagrams: Datagrams;
  readonly diag: Diag;
  readonly log: Log;
  /** Subscribes to the kernel's events. */
  readonly openNetwork: (onNews: (news: NetworkNews) => void) => Network;
  readonly openPathManager: (onEvent: (event: PathEvent) => void) => Promise<PathManager>;
  /** Opened with `rescue` alone. @throws NetlinkError */
  readonly openRescue: () => RescuePorts;
  readonly version: string;
};

export type Daemon = {
  readonly view: DaemonView;
  /** Stops acting. Subflows that exist go on. */
  stop(): Promise<void>;
};

/** Time-outs and retries are looked at this often; none of them is shorter than a second. */
const TICK_MS = 200;
/** The kernel is read again now and then even when there is nothing to do, */
const RECONCILE_MS = 60_000;
/** every second while connections might get or lose paths, and more often while they carry something. */
const WATCH_MS = 1_000;
const LIVELY_MS = 250;
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
/** The wall clock ran this far from the monotonic one: the machine slept. */
const SLEPT_MS = 5_000;
/** Status answers asked for within this time share one reading of the kernel. */
const SAMPLE_MS = 250;
/** Of the connections to one host, the latest so many are explained. */
const MOST_EXPLAINED = 100;

const NOTES: Record<Note, { event: string; message: string }> = {
  unmanageable: {
    event: 'connection-unmanageable',
    message: "A connection belongs to the kernel's own path manager and gets no paths: it is older than the agent",
  },
  'server-limit': {
    event: 'server-limit',
    message: 'The server accepts no more subflows on a connection; on the server: ip mptcp limits set subflow 8',
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

/** Joins kernel, detours and decisions. @throws Fatal when the kernel cannot be listened to */
export async function startDaemon(settings: ClientSettings, ports: DaemonPorts): Promise<Daemon> {
  const { clock, diag, log } = ports;
  const { maxPaths, strategy, targets, exclude, mode, minAgeMs, rescue } = settings;
  const seed = new DataView(new Uint8Array(clock.random(4)).buffer).getUint32(0);
  const state = initial({ maxPaths, ...strategy, targets, exclude, mode, minAgeMs, rescue }, seed);
  const metrics = createMetrics(state);
  /** What adds a wall-clock time to a monotonic one. */
  const wallAt = (at: number): string => new Date(clock.wall() - (clock.now() - at)).toISOString();
  let pathManager: PathManager | null = null;
  let rescuer: Rescuer | null = null;
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
  /** Wall minus monotonic; grows when the machine sleeps. */
  let skew = clock.wall() - clock.now();

  const nameOf = (detour: string | null): string | null =>
    detour === null ? null : (state.detours.get(detour)?.name ?? detour);

  function handle(event: Event): void {
    if (stopped) return;
    const now = clock.now();
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
      const askedAt = clock.now();
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
    try {
      const addresses = await network.addresses();
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
      sources.retry();
    } catch (error) {
      if (!stopped) log.warn('network-unread', { code: codeOf(error) }, "Reading this host's addresses failed");
    }
  }

  async function findSources(servers: readonly Address[]): Promise<void> {
    const found: ServerSource[] = [];
    for (const server of servers) {
      const route = await network.route(server).catch(() => null);
      found.push({ server, local: route?.source ?? null });
    }
    handle({ kind: 'sources-found', sources: found });
  }

  const detours = createDetours({
    bound: settings.interfaces !== null,
    keys: deriveKeys(settings.key.id, settings.key.secret),
    clock,
    datagrams: ports.datagrams,
    log,
    onEvent: handle,
    onExchange: (type, result) => metrics.exchanges.inc({ type, result }),
  });
  pathManager = await ports.openPathManager(onKernelEvent);
  const network = ports.openNetwork(onNews);
  const sources = watchSources({
    ...ports,
    sources: settings.detours,
    onChange: (addresses) => detours.set(addresses),
  });
  addSourceMetrics(metrics.registry, sources);
  if (rescue) {
    const { fwmark } = settings;
    rescuer = await startRescuer({ clock, diag, log, ports: ports.openRescue(), fwmark, onEvent: handle, nameOf });
  }
  // What is adopted is told apart by the addresses of this host.
  void look(true).then(dump);

  const every = (ms: number, task: () => void): void => {
    clock.after(ms, () => {
      if (stopped) return;
      task();
      every(ms, task);
    });
  };
  every(TICK_MS, () => {
    const ahead = clock.wall() - clock.now();
    if (Math.abs(ahead - skew) > SLEPT_MS) onNews('way');
    skew = ahead;
    handle({ kind: 'tick' });
  });
  every(LIVELY_MS, () => {
    const now = clock.now();
    const idle = state.connections.size === 0;
    const period = idle ? RECONCILE_MS : now - state.livelyAt < LIVELY_FOR_MS ? LIVELY_MS : WATCH_MS;
    // Timers are a little late: without the margin every second one would miss its turn.
    if (!dumping && now - lastDump + LIVELY_MS / 10 >= Math.max(period, dumpTook * WATCH_SHARE)) read();
  });

  const samples = sampler(diag, clock);

  function readiness(): Readiness {
    const all = [...state.detours.values()];
    if (stopped) return { ready: false, reasons: ['the agent is stopping'] };
    if (all.some((detour) => detour.state === 'up')) return { ready: true, reasons: [] };
    if (all.length === 0) {
      const reasons = sources.status().flatMap(({ source, why }) => (why === null ? [] : [`${source}: ${why}`]));
      return { ready: false, reasons: ['no detour has an address yet', ...reasons] };
    }
    return { ready: false, reasons: all.map(({ name, why }) => `detour ${name}: ${why}`) };
  }

  return {
    view: {
      readiness,
      metrics: metrics.registry,
      async status() {
        const kernel = await samples();
        return {
          version: ports.version,
          ready: readiness().ready,
          detours: [...state.detours.values()].map((detour) => {
            const observed = detours.observed(detour.key);
            return {
              name: detour.name,
              interface: detour.via,
              local: detour.local && formatAddress(detour.local),
              address: formatEndpoint(detour.endpoint),
              state: detour.state,
              rttMs: detour.rttMs === null ? null : round(detour.rttMs),
              epoch: detour.epoch === null ? null : detour.epoch.toString(16).padStart(16, '0'),
              strategy: 'nat',
              why: detour.why || null,
              observed: observed && formatAddress(observed),
            };
          }),
          sources: sources.status().map(({ answeredAt, ...source }) => ({
            ...source,
            answered: answeredAt === null ? null : wallAt(answeredAt),
          })),
          ...(state.rescue ? { rescues: showRescues(state, state.rescue, wallAt) } : {}),
          connections: [...state.connections.values()].map((connection) =>
            showConnection(state, connection, kernel.get(connection.token), clock.now(), wallAt),
          ),
        };
      },
      async explain(address, port) {
        const now = clock.now();
        const connections = [...state.connections.values()].filter(
          ({ remote }) => sameAddress(remote.address, address) && (port === null || remote.port === port),
        );
        const { prefix, direct, detours: known } = explainDestination(state, address, now);
        return {
          address: formatAddress(address),
          port,
          prefix,
          directBytesPerSecond: whole(direct),
          connections: connections
            .slice(-MOST_EXPLAINED)
            .map((connection) => explainOne(state, connection, now, wallAt)),
          connectionsLeftOut: Math.max(0, connections.length - MOST_EXPLAINED),
          detours: known.map(({ detour, adds, why, ...rest }) => ({
            ...named(state, detour),
            ...rest,
            addsBytesPerSecond: whole(adds),
            why: why || null,
          })),
        };
      },
    },
    async stop() {
      stopped = true;
      sources.stop();
      detours.stop();
      network.close();
      pathManager?.close();
      await rescuer?.stop(needsRedirections(state));
      diag.close();
    },
  };
}

/** What `/v1/explain` says of one connection. */
function explainOne(state: State, connection: Connection, now: number, wallAt: (at: number) => string): Json {
  return {
    token: hex(connection.token),
    local: formatEndpoint(connection.local),
    remote: formatEndpoint(connection.remote),
    since: wallAt(connection.since),
    why: shortfall(state, connection),
    paths: explainConnection(state, connection, now).map(({ detour, rate, adds, why, ...rest }) => ({
      ...named(state, detour),
      ...rest,
      bytesPerSecond: whole(rate),
      addsBytesPerSecond: whole(adds),
      why: why || null,
    })),
  };
}

/** A detour by its name and control address; the direct path has none. */
function named(state: State, detour: string | null): { detour: string; address: string | null } {
  if (detour === null) return { detour: DIRECT, address: null };
  const known = state.detours.get(detour);
  return { detour: known?.name ?? detour, address: known ? formatEndpoint(known.endpoint) : null };
}

/** Servers that do not answer directly, or are being asked. */
function showRescues(state: State, { cases }: Rescue, wallAt: (at: number) => string): Json {
  return [...cases.values()].map(({ server, since, via, failures }) => ({
    server: formatEndpoint(server),
    state: via ? 'rescued' : failures > 0 ? 'unreachable' : 'asked',
    detour: via && named(state, via.detour).detour,
    since: wallAt(since),
  }));
}

function showConnection(
  state: State,
  connection: Connection,
  sample: ConnectionSample | undefined,
  now: number,
  wallAt: (at: number) => string,
): Json {
  const rows = explainConnection(state, connection, now);
  return {
    token: hex(connection.token),
    local: formatEndpoint(connection.local),
    remote: formatEndpoint(connection.remote),
    since: wallAt(connection.since),
    why: shortfall(state, connection),
    paths: connection.paths.map((path) =>
      showPath(
        state,
        path,
        sample?.subflows ?? [],
        rows.find(({ detour }) => detour === path.detour),
        wallAt,
      ),
    ),
    unused: rows
      .filter(({ state: at }) => at === 'not used')
      .map(({ detour, adds, why }) => ({ ...named(state, detour), addsBytesPerSecond: whole(adds), why: why || null })),
  };
}

function showPath(
  state: State,
  path: Path,
  subflows: readonly SubflowSample[],
  row: Row | undefined,
  wallAt: (at: number) => string,
): Json {
  const { local, remote } = path;
  const text = { local: local && formatEndpoint(local), remote: remote && formatEndpoint(remote) };
  const now = subflows.find(
    (one) => text.local === formatEndpoint(one.local) && text.remote === formatEndpoint(one.remote),
  );
  return {
    kind: path.kind === 'spare' ? 'direct' : path.kind,
    detour:
      path.detour === null || path.kind === 'spare' ? null : (state.detours.get(path.detour)?.name ?? path.detour),
    ...text,
    state: path.state,
    backup: now?.backup ?? path.state === 'backup',
    rttMs: now ? round(now.rttMs) : null,
    deliveredBytes: now ? now.bytesAcked + now.bytesReceived : 0,
    retransmits: now?.retransmits ?? 0,
    since: wallAt(path.since),
    bytesPerSecond: row ? whole(row.rate) : null,
    why: path.why || (path.state === 'active' ? null : row?.why) || null,
    verdict: row?.why || null,
    ...(path.led ? { rescued: true } : {}),
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

function createMetrics(state: State) {
  const registry = new Registry();
  const registers = [registry];
  const count = <T extends string>(values: Iterable<T>): Map<T, number> => {
    const counts = new Map<T, number>();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    return counts;
  };
  new Gauge({
    name: 'detour_client_connections',
    help: 'MPTCP connections this host opened, by whether they may get paths',
    labelNames: ['managed'],
    registers,
    collect() {
      const counts = count([...state.connections.values()].map((one) => (one.unmanaged === null ? 'yes' : 'no')));
      for (const managed of ['yes', 'no'] as const) this.set({ managed }, counts.get(managed) ?? 0);
    },
  });
  new Gauge({
    name: 'detour_client_paths',
    help: 'Paths of those connections',
    labelNames: ['kind', 'state'],
    registers,
    collect() {
      this.reset();
      const counts = count(
        [...state.connections.values()].flatMap(({ paths }) => paths.map(({ kind, state: at }) => `${kind} ${at}`)),
      );
      for (const [key, value] of counts) {
        const [kind = '', at = ''] = key.split(' ');
        this.set({ kind, state: at }, value);
      }
    },
  });
  new Gauge({
    name: 'detour_client_detours',
    help: 'Addresses of detours',
    labelNames: ['state'],
    registers,
    collect() {
      const counts = count([...state.detours.values()].map((one) => one.state));
      for (const at of ['starting', 'up', 'down', 'suspended'] as const) this.set({ state: at }, counts.get(at) ?? 0);
    },
  });
  new Gauge({
    name: 'detour_client_rescued_servers',
    help: 'Servers that new connections reach through a detour, because they do not answer directly',
    registers,
    collect() {
      this.set([...(state.rescue?.cases.values() ?? [])].filter(({ via }) => via !== null).length);
    },
  });
  new Gauge({
    name: 'detour_client_leases',
    help: 'Leases held or asked for; idle ones are kept for the next connection to the same server',
    labelNames: ['state'],
    registers,
    collect() {
      const counts = count([...state.leases.values()].map((one) => one.state));
      for (const at of ['asked', 'granted', 'refused'] as const) this.set({ state: at }, counts.get(at) ?? 0);
      this.set({ state: 'idle' }, state.idle.size);
    },
  });
  return {
    registry,
    joins: new Counter({
      name: 'detour_client_joins_total',
      help: 'Paths by what became of them; lost ones had been up',
      labelNames: ['outcome'],
      registers,
    }),
    exchanges: new Counter({
      name: 'detour_client_control_requests_total',
      help: 'Questions to detours by their result; timeout is five unanswered tries',
      labelNames: ['type', 'result'],
      registers,
    }),
    events: new Counter({
      name: 'detour_client_events_total',
      help: "The kernel's path manager events; events-lost counts gaps",
      labelNames: ['kind'],
      registers,
    }),
    decisions: new Counter({
      name: 'detour_client_decisions_total',
      help: "What was decided about connections' paths; repair is a path destroyed or tried anew because nothing got through",
      labelNames: ['act'],
      registers,
    }),
    networkChanges: new Counter({
      name: 'detour_client_network_changes_total',
      help: "Changes of this host's addresses or routes, and wake-ups, after which all detours were asked again",
      registers,
    }),
    rescues: new Counter({
      name: 'detour_client_rescues_total',
      help: 'Servers that did not answer directly, by what became of new connections to them',
      labelNames: ['what'],
      registers,
    }),
    joinDelay: new Histogram({
      name: 'detour_client_join_delay_seconds',
      help: 'From the ESTABLISHED event to the SYN of a first join whose lease was ready',
      buckets: [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1],
      registers,
    }),
  };
}

function addSourceMetrics(registry: Registry, sources: Sources): void {
  const registers = [registry];
  const labelNames = ['source'];
  new Gauge({
    name: 'detour_client_source_up',
    help: 'Whether a source of detours gave its latest answer; 0 while an older one still counts, or none came yet',
    labelNames,
    registers,
    collect() {
      for (const { source, state } of sources.status()) this.set({ source }, state === 'ok' ? 1 : 0);
    },
  });
  new Gauge({
    name: 'detour_client_source_detours',
    help: 'Addresses in use that a source gave',
    labelNames,
    registers,
    collect() {
      for (const { source, detours } of sources.status()) this.set({ source }, detours);
    },
  });
  new Gauge({
    name: 'detour_client_source_left_out',
    help: 'What a source gave beyond the bounds',
    labelNames,
    registers,
    collect() {
      for (const { source, leftOut } of sources.status()) this.set({ source }, leftOut);
    },
  });
  new Counter({
    name: 'detour_client_source_failures_total',
    help: 'Questions to a source, or readings of a file, that failed',
    labelNames,
    registers,
    collect() {
      this.reset();
      for (const { source, failures } of sources.status()) this.inc({ source }, failures);
    },
  });
}

const hex = (token: number): string => token.toString(16).padStart(8, '0');

const whole = (rate: number | null): number | null => (rate === null ? null : Math.round(rate));

const round = (ms: number): number => Math.round(ms * 1000) / 1000;

const codeOf = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : 'UNKNOWN';
