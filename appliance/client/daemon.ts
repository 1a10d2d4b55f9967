import type { Clock } from '../kernel/clock.ts';
import type { InbandPorts } from '../kernel/inband.ts';
import type { Log } from '../log.ts';
import { formatEndpoint } from '../protocol/address.ts';
import type { Announcing, ClientSettings } from '../settings.ts';
import type { DaemonView, Json, Readiness } from '../status/daemon.ts';
import { type Agent, type AgentPorts, LIVELY_MS, startAgent } from './agent.ts';
import { type Announcer, type AnnouncerPorts, startAnnouncer } from './announcer.ts';
import type { DetourAddress } from './detours.ts';
import { createMetrics, type WorkloadState } from './metrics.ts';
import { type MptcpifyPorts, type ServedNet, startMptcpify } from './mptcpify.ts';
import type { OnWorkloads, Provider } from './provider.ts';
import type { JsonObject } from './report.ts';
import { type SourcePorts, type SourceStatus, type Sources, watchSources } from './sources.ts';
import { leaseKey } from './state.ts';
import { NO_WISHES, sameService, type Wishes, type Workload } from './workloads.ts';

/** All namespaces that are served: this one, those of containers and pods, each by an agent; and the detours they share. */

/** One network namespace, held open. */
export type Place = {
  /** The same for everybody in it. */
  readonly id: string;
  readonly ports: AgentPorts;
  readonly net: ServedNet;
  /** Makes the kernel ready for the sides that are served. Idempotent. @throws Fatal naming what is missing; nothing has changed then */
  load(): Promise<void>;
  /** Puts back what was there. @throws Fatal */
  unload(): Promise<void>;
  /** Lets go of it, after its agent stopped. */
  close(): void;
};

export type DaemonPorts = SourcePorts & {
  readonly log: Log;
  /** The namespace of this process. */
  readonly ownId: string;
  /**
   * Opens the namespace behind a file of that workload; null: this process's own.
   * @throws Error whose message says what is missing
   */
  readonly openPlace: (path: string | null, workload: string | null) => Promise<Place>;
  /** Each starts watching. */
  readonly providers: readonly ((onChange: OnWorkloads) => Provider)[];
  readonly mptcpify: Pick<MptcpifyPorts, 'groups' | 'openSwitches' | 'isPinned'>;
  readonly inband: {
    /** Whether `detour load` prepared the kernel. */
    readonly isLoaded: () => boolean;
    /** @throws Error whose message says what is missing */
    readonly open: () => InbandPorts;
  };
  /** Of this process's own namespace; asked for with `DETOUR_ANNOUNCE` alone. */
  readonly openAnnouncing: (announcing: Announcing) => Promise<AnnouncerPorts>;
  readonly version: string;
};

export type Daemon = {
  readonly view: DaemonView;
  /** Stops acting, and puts all path managers back. Subflows that exist go on. */
  stop(): Promise<void>;
};

/** Time-outs and retries are looked at this often; none of them is shorter than a second. */
const TICK_MS = 200;
/** The wall clock ran this far from the monotonic one: the machine slept. */
const SLEPT_MS = 5_000;
/** A namespace that could not be entered is tried again: first soon, for it may still be in the making. */
const RETRY_FIRST_MS = 200;
const RETRY_LONGEST_MS = 60_000;

/** A namespace with everybody in it who asked to be served. The first of them says how that is done. */
type Room = {
  readonly place: Place;
  readonly users: Set<Entry>;
  /** Its kernel was made ready by us, which has to be put back. */
  loaded: boolean;
  /** It is served. */
  up: boolean;
  /** Null until it is up, and without the client's side: then the kernel does it all. */
  agent: Agent | null;
  /** As which it is served. */
  wishes: Wishes;
  /** Settles when everything is done that was to be done here so far: one after the other, for it is one kernel object. */
  arranged: Promise<void>;
};

/** One workload, on its way in, served, or not. */
type Entry = {
  workload: Workload;
  readonly since: number;
  room: Room | null;
  /** It has no network of its own but the one that this process is in. */
  onHost: boolean;
  state: WorkloadState;
  /** Why it is not served, or not as it wishes; null when nothing is wrong. */
  why: string | null;
  /** What of that is in the log. */
  said: string | null;
  failures: number;
  /** It left meanwhile. */
  gone: boolean;
};

/** Serves what the settings name. @throws Fatal when this host's own namespace is one of them and cannot be served */
export async function startDaemon(settings: ClientSettings, ports: DaemonPorts): Promise<Daemon> {
  const { clock, log, openPlace, ownId } = ports;
  /** What adds a wall-clock time to a monotonic one. */
  const wallAt = (at: number): string => new Date(clock.wall() - (clock.now() - at)).toISOString();
  /** By the id of the namespace. */
  const rooms = new Map<string, Room>();
  /** By the key of the workload. */
  const entries = new Map<string, Entry>();
  const announced = new Map<number, readonly Workload[]>();
  let addresses: readonly DetourAddress[] = [];
  /** This process's own namespace, when it is served. */
  let home: Place | null = null;
  const mptcpify = startMptcpify(settings.mptcpify, { ...ports.mptcpify, clock, log });
  const naming = prepareNaming(settings, ports);
  let own: Agent | null = null;
  let sources: Sources | null = null;
  let announcer: Announcer | null = null;
  let stopped = false;
  /** Wall minus monotonic; grows when the machine sleeps. */
  let skew = clock.wall() - clock.now();

  function* agents(): Generator<Agent> {
    if (own) yield own;
    for (const { agent } of rooms.values()) if (agent) yield agent;
  }

  const sourceStatus = (): readonly SourceStatus[] => sources?.status() ?? [];
  const metrics = createMetrics({
    states: () => [...agents()].map(({ state }) => state),
    sources: sourceStatus,
    workloads: () => [...entries.values()].map(({ state }) => state),
    mptcpify: mptcpify.status,
    announced: () => announcer?.status() ?? [],
  });

  /** Tells whose sockets may become Multipath TCP now. */
  function choose(): void {
    const places = [home, ...[...rooms.values()].map(({ up, place }) => (up ? place : null))];
    mptcpify.update(
      places.flatMap((place) => place?.net ?? []),
      [...entries.values()].map(({ workload: { key, name, groups, wishes } }) => ({
        key,
        name,
        groups,
        mptcp: wishes.mptcp,
      })),
    );
  }

  const becomesMptcp = ({ room, onHost, workload }: Entry): boolean =>
    (onHost ? home !== null : room?.up === true) && mptcpify.includes(workload.key);

  /** Null without the client's side. */
  async function begin(place: Place, { targets, strategy }: Wishes): Promise<Agent | null> {
    const { key } = settings;
    if (key === null) return null;
    const agent = await startAgent({
      settings: { ...settings, ...(targets && { targets }), ...(strategy && { strategy }), key },
      ports: place.ports,
      metrics,
      onMoved: () => sources?.retry(),
      inband: naming.ports,
      // Whoever gives a lease back has forgotten it already.
      isShared: (detour, server) =>
        [...agents()].some(({ state }) => state.leases.has(leaseKey(detour, formatEndpoint(server)))),
    });
    // The list may have changed while it started.
    agent.set(addresses);
    return agent;
  }

  /** Takes a workload in. */
  async function enter(entry: Entry): Promise<void> {
    const { workload } = entry;
    let place: Place;
    try {
      place = await openFirst(workload);
    } catch (error) {
      refuse(entry, `its network namespace cannot be entered: ${messageOf(error)}`);
      return;
    }
    const known = rooms.get(place.id);
    const onHost = place.id === ownId;
    if (entry.gone || stopped || known || onHost) place.close();
    if (entry.gone || stopped) return;
    if (onHost) {
      entry.onHost = true;
      entry.state = home ? 'served' : 'failed';
      object(
        entry,
        home
          ? "it uses the agent's own network, which is served as such"
          : "it uses the agent's own network: add host to DETOUR_PROVIDERS to serve that",
      );
      return;
    }
    const room: Room = known ?? {
      place,
      users: new Set(),
      loaded: false,
      up: false,
      agent: null,
      wishes: NO_WISHES,
      arranged: Promise.resolve(),
    };
    rooms.set(place.id, room);
    entry.room = room;
    room.users.add(entry);
    arrange(room);
  }

  /** Lets a workload go; its namespace with the last one in it. */
  function leave(entry: Entry): void {
    const { room, workload } = entry;
    entry.gone = true;
    if (!room) return;
    room.users.delete(entry);
    if (entry.state === 'served') log.info('workload-left', { workload: workload.name }, 'Stopped serving a workload');
    arrange(room);
  }

  /** Has a namespace served as those in it want, or left as it was found, after all that was begun there before. */
  function arrange(room: Room): void {
    room.arranged = room.arranged.then(() => settle(room));
  }

  async function settle(room: Room): Promise<void> {
    const [first] = room.users;
    if (!first || stopped) {
      await vacate(room);
      return;
    }
    const { wishes } = first.workload;
    if (!room.up || !sameService(wishes, room.wishes)) {
      const before = room.agent;
      room.agent = null;
      room.wishes = wishes;
      await before?.stop(async () => undefined);
      try {
        if (!room.loaded) await room.place.load();
        room.loaded = true;
        room.agent = await begin(room.place, wishes);
        room.up = true;
        choose();
      } catch (error) {
        const users = [...room.users];
        room.users.clear();
        for (const user of users) {
          user.room = null;
          refuse(user, messageOf(error));
        }
        await vacate(room);
        return;
      }
    }
    for (const user of room.users) {
      if (user.state !== 'served')
        log.info('workload-served', { workload: user.workload.name }, 'Serving the connections of a workload');
      user.state = 'served';
      user.failures = 0;
      const alike = sameService(user.workload.wishes, wishes);
      object(user, alike ? null : `it shares its network with ${first.workload.name}, whose settings count`);
    }
  }

  /** Leaves a namespace as it was found. */
  async function vacate(room: Room): Promise<void> {
    if (rooms.get(room.place.id) !== room) return;
    const { agent, loaded } = room;
    room.agent = null;
    room.loaded = false;
    room.up = false;
    // First: what became Multipath TCP now would not get the path manager that it was meant for.
    choose();
    const restore = async (): Promise<void> => {
      if (!loaded) return;
      await room.place.unload().catch((error: unknown) => {
        log.warn('workload-not-restored', { reason: messageOf(error) }, 'A network namespace could not be put back');
      });
    };
    await (agent ? agent.stop(restore) : restore());
    // Somebody may have come in meanwhile: then this is not the end.
    if (room.users.size > 0 && !stopped) return;
    rooms.delete(room.place.id);
    room.place.close();
  }

  /** Notes what is wrong with a workload, and says so once. */
  function object(entry: Entry, why: string | null): void {
    entry.why = why;
    if (why === entry.said) return;
    entry.said = why;
    if (why === null) return;
    const fields = { workload: entry.workload.name, why };
    if (entry.state === 'failed') log.warn('workload-not-served', fields, 'A workload cannot be served');
    else log.warn('workload-not-as-asked', fields, 'A workload is served, but not as it asks');
  }

  /** Notes why a workload is not served, and tries again after a while: it may be in the making, or nearly gone. */
  function refuse(entry: Entry, why: string): void {
    if (entry.gone || stopped) return;
    entry.state = 'failed';
    entry.failures++;
    // The first time it may well be one or the other, and nothing that anybody could mend.
    if (entry.failures === 1) entry.why = why;
    else object(entry, why);
    const wait = Math.min(RETRY_FIRST_MS * 2 ** Math.min(entry.failures - 1, 10), RETRY_LONGEST_MS);
    clock.after(wait, () => {
      if (!entry.gone && !stopped) void enter(entry);
    });
  }

  async function openFirst({ name, paths }: Workload): Promise<Place> {
    let first: unknown = new Error('no file leads to it');
    for (const [index, path] of paths.entries()) {
      try {
        return await openPlace(path, name);
      } catch (error) {
        if (index === 0) first = error;
      }
    }
    throw first;
  }

  function onWorkloads(provider: number, workloads: readonly Workload[]): void {
    if (stopped) return;
    announced.set(provider, workloads);
    const wanted = new Map([...announced.values()].flat().map((workload) => [workload.key, workload]));
    for (const [key, entry] of entries) {
      const workload = wanted.get(key);
      if (!workload) {
        entries.delete(key);
        leave(entry);
        continue;
      }
      const changed = !sameService(workload.wishes, entry.workload.wishes);
      entry.workload = workload;
      if (changed && entry.room) arrange(entry.room);
    }
    for (const workload of wanted.values()) {
      if (entries.has(workload.key)) continue;
      const entry: Entry = {
        workload,
        since: clock.now(),
        room: null,
        onHost: false,
        state: 'starting',
        why: null,
        said: null,
        failures: 0,
        gone: false,
      };
      entries.set(workload.key, entry);
      void enter(entry);
    }
    choose();
  }

  if (settings.providers.includes('host')) {
    const place = await openPlace(null, null);
    await place.load();
    try {
      own = await begin(place, NO_WISHES);
    } catch (error) {
      // What went wrong first is what the user has to mend; a failure of this may well have the same cause.
      await place.unload().catch(() => undefined);
      throw error;
    }
    home = place;
    choose();
  }
  if (settings.announcing) {
    try {
      announcer = await startAnnouncer(settings.announcing, await ports.openAnnouncing(settings.announcing));
    } catch (error) {
      await home?.unload().catch(() => undefined);
      throw error;
    }
  }
  sources = watchSources({
    ...ports,
    sources: settings.announcing?.detours ?? settings.detours,
    onChange(now) {
      addresses = now;
      announcer?.set(now);
      for (const agent of agents()) agent.set(now);
    },
  });
  const providers = ports.providers.map((watch, index) => watch((workloads) => onWorkloads(index, workloads)));
  const alone = providers.length === 0;

  every(clock, TICK_MS, () => {
    if (stopped) return false;
    const ahead = clock.wall() - clock.now();
    const slept = Math.abs(ahead - skew) > SLEPT_MS;
    skew = ahead;
    for (const agent of agents()) {
      if (slept) agent.wake();
      agent.tick();
    }
    return true;
  });
  every(clock, LIVELY_MS, () => {
    if (stopped) return false;
    for (const agent of agents()) agent.watch();
    return true;
  });

  function readiness(): Readiness {
    if (stopped) return { ready: false, reasons: ['the agent is stopping'] };
    const failing = providers.flatMap((provider) => {
      const { provider: name, state, why } = provider.status();
      return state === 'ok' ? [] : [`${name}: ${why ?? 'not asked yet'}`];
    });
    if (settings.key === null) return { ready: failing.length === 0, reasons: failing };
    const all = [...agents()];
    const states = all.map((agent) => agent.readiness());
    if (states.some(({ ready }) => ready) || (all.length === 0 && !alone))
      return { ready: failing.length === 0, reasons: failing };
    const [first] = states;
    if (first && first.reasons.length > 0) return { ready: false, reasons: [...failing, ...first.reasons] };
    const silent = sourceStatus().flatMap(({ source, why }) => (why === null ? [] : [`${source}: ${why}`]));
    return { ready: false, reasons: [...failing, 'no detour has an address yet', ...silent] };
  }

  /** Every agent with the name of its workload, null for this host's own. */
  function* named(): Generator<readonly [Agent, string | null]> {
    if (own) yield [own, null];
    for (const { agent, users } of rooms.values()) {
      if (agent) yield [agent, [...users].map(({ workload }) => workload.name).join(', ')];
    }
  }

  const marked = (rows: readonly JsonObject[], workload: string | null): JsonObject[] =>
    alone ? [...rows] : rows.map((row) => ({ workload, ...row }));

  return {
    view: {
      readiness,
      metrics: metrics.registry,
      async status() {
        const reports = await Promise.all(
          [...named()].map(async ([agent, workload]) => ({ workload, ...(await agent.report()) })),
        );
        const all = (pick: (report: (typeof reports)[number]) => readonly JsonObject[]): JsonObject[] =>
          reports.flatMap((report) => marked(pick(report), report.workload));
        return {
          version: ports.version,
          ready: readiness().ready,
          ...(settings.sides.includes('server') ? { sides: settings.sides } : {}),
          ...(settings.mptcpify === 'off' ? {} : { mptcpify: { ...mptcpify.status() } }),
          ...(naming.status ? { inband: { ...naming.status } } : {}),
          detours: all(({ detours }) => detours),
          ...(announcer ? { announced: announcer.status().map((row) => ({ ...row })) } : {}),
          sources: sourceStatus().map(({ answeredAt, ...source }) => ({
            ...source,
            answered: answeredAt === null ? null : wallAt(answeredAt),
          })),
          ...(alone
            ? {}
            : {
                providers: providers.map((provider): Json => ({ ...provider.status() })),
                workloads: [...entries.values()].map((entry) => ({
                  name: entry.workload.name,
                  state: entry.state,
                  since: wallAt(entry.since),
                  ...(settings.mptcpify === 'off' ? {} : { mptcp: becomesMptcp(entry) }),
                  why: entry.why,
                })),
              }),
          ...(settings.rescue ? { rescues: all(({ rescues }) => rescues ?? []) } : {}),
          ...(reports.some(({ tunnels }) => tunnels.length > 0) ? { tunnels: all(({ tunnels }) => tunnels) } : {}),
          connections: all(({ connections }) => connections),
        };
      },
      async explain(address, port) {
        const all = [...named()].flatMap(([agent, workload]) => marked([agent.explain(address, port)], workload));
        // One answer for each namespace, where there may be several.
        return alone && all[0] ? all[0] : all;
      },
    },
    async stop() {
      stopped = true;
      mptcpify.stop();
      for (const provider of providers) provider.stop();
      sources?.stop();
      await announcer?.stop();
      // Every namespace is put back, whatever becomes of the others.
      const all = [...rooms.values()];
      for (const room of all) arrange(room);
      const ends = all.map(({ arranged }) => arranged);
      const { place, agent } = { place: home, agent: own };
      try {
        await (agent ? agent.stop(async () => place?.unload()) : place?.unload());
      } finally {
        place?.close();
        await Promise.all(ends);
        naming.ports?.close();
      }
    },
  };
}

/** Whether joins may name their servers, which is asked of the kernel once for all namespaces; `status` is null where nobody wants it. */
function prepareNaming(
  { strategy, sides }: ClientSettings,
  { inband, log }: DaemonPorts,
): {
  readonly ports: InbandPorts | null;
  readonly status: {
    readonly state: 'on' | 'unavailable';
    readonly by: string | null;
    readonly why: string | null;
  } | null;
} {
  const isWanted = sides.includes('client') && (strategy.inband === true || (!strategy.ordered && inband.isLoaded()));
  if (!isWanted) return { ports: null, status: null };
  try {
    const ports = inband.open();
    log.info('inband', { by: ports.by }, 'Joins may name their servers themselves where detours take that');
    return { ports, status: { state: 'on', by: ports.by, why: null } };
  } catch (error) {
    const why = messageOf(error);
    log.warn('inband-unavailable', { why }, 'Joins cannot name their servers themselves: leases are used everywhere');
    return { ports: null, status: { state: 'unavailable', by: null, why } };
  }
}

/** Repeats a task until it returns false. */
function every(clock: Clock, ms: number, task: () => boolean): void {
  clock.after(ms, () => {
    if (task()) every(clock, ms, task);
  });
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));
