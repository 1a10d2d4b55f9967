import type { Clock } from '../kernel/clock.ts';
import type { Log } from '../log.ts';
import type { ClientSettings } from '../settings.ts';
import type { DaemonView, Json, Readiness } from '../status/daemon.ts';
import { type Agent, type AgentPorts, LIVELY_MS, startAgent } from './agent.ts';
import type { DetourAddress } from './detours.ts';
import { createMetrics, type WorkloadState } from './metrics.ts';
import { type MptcpifyPorts, type ServedNet, startMptcpify } from './mptcpify.ts';
import type { JsonObject } from './report.ts';
import { type SourcePorts, type SourceStatus, type Sources, watchSources } from './sources.ts';
import { sameService, sameWishes, type Workload } from './workloads.ts';

/** All namespaces that are served: this one, those of containers and pods, each by an agent; and the detours they share. */

/** One network namespace, held open. */
export type Place = {
  /** The same for everybody in it. */
  readonly id: string;
  readonly ports: AgentPorts;
  readonly net: ServedNet;
  /** Makes the kernel ready for the sides that are served. Idempotent. @throws Fatal naming what is missing */
  load(): Promise<void>;
  /** Puts back what was there. @throws Fatal */
  unload(): Promise<void>;
  /** Lets go of it, after its agent stopped. */
  close(): void;
};

/** Tells which workloads there are. */
export type Provider = {
  status(): ProviderStatus;
  stop(): void;
};

export type ProviderStatus = {
  readonly provider: string;
  readonly state: 'starting' | 'ok' | 'failing';
  /** How many workloads it sees that asked to be served. */
  readonly workloads: number;
  /** What is wrong; null when nothing is. While it fails, what it said last still counts. */
  readonly why: string | null;
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
  /** Starts watching; `onChange` is told all workloads there are, whenever that changes. */
  readonly providers: readonly ((onChange: (workloads: readonly Workload[]) => void) => Provider)[];
  readonly mptcpify: Pick<MptcpifyPorts, 'groups' | 'openSwitches' | 'isPinned'>;
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

/** A namespace with its agent, and who is in it. The first of them says how it is served. */
type Served = {
  readonly place: Place;
  readonly users: Set<Entry>;
  up: boolean;
  /** Null until it is up, and without the client's side: then the kernel does it all. */
  agent: Agent | null;
  /** Settles when it is served, or failed to be. */
  ready: Promise<void>;
};

/** One workload, on its way in, served, or not. */
type Entry = {
  workload: Workload;
  readonly since: number;
  served: Served | null;
  /** Why it is not served, or not as it wishes; null when nothing is wrong. */
  why: string | null;
  failures: number;
  /** It left meanwhile. */
  gone: boolean;
};

/** Serves what the settings name. @throws Fatal when this host's own namespace is one of them and cannot be served */
export async function startDaemon(settings: ClientSettings, ports: DaemonPorts): Promise<Daemon> {
  const { clock, log, openPlace, ownId } = ports;
  /** What adds a wall-clock time to a monotonic one. */
  const wallAt = (at: number): string => new Date(clock.wall() - (clock.now() - at)).toISOString();
  const served = new Map<string, Served>();
  const entries = new Map<string, Entry>();
  const announced = new Map<number, readonly Workload[]>();
  let addresses: readonly DetourAddress[] = [];
  let home: Place | null = null;
  const mptcpify = startMptcpify(settings.mptcpify, { ...ports.mptcpify, clock, log });
  let own: Agent | null = null;
  let sources: Sources | null = null;
  let stopped = false;
  /** Wall minus monotonic; grows when the machine sleeps. */
  let skew = clock.wall() - clock.now();

  function* agents(): Generator<Agent> {
    if (own) yield own;
    for (const { agent } of served.values()) if (agent) yield agent;
  }

  const sourceStatus = (): readonly SourceStatus[] => sources?.status() ?? [];
  const metrics = createMetrics({
    states: () => [...agents()].map(({ state }) => state),
    sources: sourceStatus,
    workloads: () => [...entries.values()].map(stateOf),
    mptcpify: mptcpify.status,
  });

  /** Tells whose sockets may become Multipath TCP now. */
  function choose(): void {
    const places = [home, ...[...served.values()].map(({ up, place }) => (up ? place : null))];
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

  async function begin(place: Place, wishes: Partial<ClientSettings>): Promise<Agent | null> {
    const { key } = settings;
    try {
      await place.load();
      if (key === null) return null;
      const agent = await startAgent({
        settings: { ...settings, ...wishes, key },
        ports: place.ports,
        metrics,
        onMoved: () => sources?.retry(),
      });
      agent.set(addresses);
      return agent;
    } catch (error) {
      // What went wrong first is what the user has to mend; a failure of this may well have the same cause.
      await place.unload().catch(() => undefined);
      throw error;
    }
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
    if (entry.gone || stopped) {
      place.close();
      return;
    }
    const present = served.get(place.id);
    if (present || place.id === ownId) {
      place.close();
      if (!present) {
        entry.why = home
          ? "it uses this host's network, which is served as such"
          : "it uses this host's network: add host to DETOUR_PROVIDERS to serve that";
        log.warn('workload-on-host', { workload: workload.name }, `A workload is not served by itself: ${entry.why}`);
        return;
      }
      entry.served = present;
      present.users.add(entry);
      const [first] = present.users;
      if (first && !sameService(first.workload.wishes, workload.wishes)) {
        entry.why = `it shares its network with ${first.workload.name}, whose settings count`;
        log.warn(
          'workload-shares',
          { workload: workload.name },
          `Two workloads ask for different things: ${entry.why}`,
        );
      }
      return;
    }
    const one: Served = { place, users: new Set([entry]), up: false, agent: null, ready: Promise.resolve() };
    served.set(place.id, one);
    entry.served = one;
    const { targets, strategy } = workload.wishes;
    one.ready = begin(place, { ...(targets && { targets }), ...(strategy && { strategy }) }).then(
      (agent) => {
        one.up = true;
        one.agent = agent;
        // The list may have changed while it started.
        agent?.set(addresses);
        choose();
        log.info('workload-served', { workload: workload.name }, 'Serving the connections of a workload');
      },
      (error: unknown) => {
        if (served.get(place.id) === one) served.delete(place.id);
        place.close();
        for (const user of one.users) {
          user.served = null;
          refuse(user, messageOf(error));
        }
      },
    );
    await one.ready;
  }

  /** Notes why a workload is not served, and tries again after a while: it may be in the making, or nearly gone. */
  function refuse(entry: Entry, why: string): void {
    if (entry.gone || stopped) return;
    const known = entry.why === why;
    entry.why = why;
    entry.failures++;
    if (!known && entry.failures > 1)
      log.warn('workload-not-served', { workload: entry.workload.name, why }, 'A workload cannot be served');
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

  /** Lets a workload go; its namespace with the last one in it. */
  async function leave(entry: Entry): Promise<void> {
    const { served: one, workload } = entry;
    entry.gone = true;
    if (!one) return;
    const [first] = one.users;
    one.users.delete(entry);
    const [next] = one.users;
    if (next && (first !== entry || sameService(next.workload.wishes, workload.wishes))) return;
    served.delete(one.place.id);
    choose();
    await end(one);
    log.info('workload-left', { workload: workload.name }, 'Stopped serving a workload');
    // Those who stay are served as they wish from now on.
    for (const user of one.users) {
      user.served = null;
      user.why = null;
      await enter(user);
    }
  }

  async function end(one: Served): Promise<void> {
    await one.ready;
    // The path manager first: with the userspace one selected and nobody listening, incoming joins are refused there.
    await one.place.unload().catch((error: unknown) => {
      log.debug('workload-not-restored', { reason: messageOf(error) }, 'A namespace that is left cannot be restored');
    });
    await one.agent?.stop();
    one.place.close();
  }

  function onWorkloads(provider: number, workloads: readonly Workload[]): void {
    if (stopped) return;
    announced.set(provider, workloads);
    const wanted = new Map([...announced.values()].flat().map((workload) => [workload.key, workload]));
    const leaving: Promise<void>[] = [];
    for (const [key, entry] of entries) {
      const workload = wanted.get(key);
      if (workload && sameWishes(workload.wishes, entry.workload.wishes)) {
        // A pod may have other containers now.
        entry.workload = workload;
        wanted.delete(key);
        continue;
      }
      entries.delete(key);
      leaving.push(leave(entry));
    }
    for (const workload of wanted.values()) {
      const entry: Entry = { workload, since: clock.now(), served: null, why: null, failures: 0, gone: false };
      entries.set(workload.key, entry);
      // One that changed its wishes is let go of first.
      void Promise.all(leaving).then(() => (entry.gone ? undefined : enter(entry)));
    }
    choose();
  }

  if (settings.providers.includes('host')) {
    const place = await openPlace(null, null);
    own = await begin(place, {});
    home = place;
    choose();
  }
  sources = watchSources({
    ...ports,
    sources: settings.detours,
    onChange(now) {
      addresses = now;
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
    for (const { agent, users } of served.values()) {
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
          detours: all(({ detours }) => detours),
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
                  state: stateOf(entry),
                  since: wallAt(entry.since),
                  ...(settings.mptcpify === 'off' ? {} : { mptcp: mptcpify.includes(entry.workload.key) }),
                  why: entry.why,
                })),
              }),
          ...(settings.rescue ? { rescues: all(({ rescues }) => rescues ?? []) } : {}),
          connections: all(({ connections }) => connections),
        };
      },
      async explain(address, port) {
        const all = [...named()].flatMap(([agent, workload]) => marked([agent.explain(address, port)], workload));
        return all.length === 1 && all[0] ? all[0] : all;
      },
    },
    async stop() {
      stopped = true;
      mptcpify.stop();
      for (const provider of providers) provider.stop();
      sources?.stop();
      // Every namespace is put back, whatever becomes of the others.
      const ends = [...served.values()].map(end);
      try {
        // The path manager first: with the userspace one selected and nobody listening, this host refuses joins.
        await home?.unload();
      } finally {
        await own?.stop();
        home?.close();
        await Promise.all(ends);
      }
    },
  };
}

const stateOf = ({ served, why }: Entry): WorkloadState =>
  served?.up ? 'served' : why === null || served ? 'starting' : 'failed';

/** Repeats a task until it returns false. */
function every(clock: Clock, ms: number, task: () => boolean): void {
  clock.after(ms, () => {
    if (task()) every(clock, ms, task);
  });
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));
