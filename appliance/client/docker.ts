import type { Clock } from '../kernel/clock.ts';
import type { ContainerNetwork, Engine, EngineContainer } from '../kernel/engine.ts';
import type { Processes } from '../kernel/processes.ts';
import type { Log } from '../log.ts';
import { converse, type OnWorkloads, type Provider, type Talk } from './provider.ts';
import { readLabels, type WishReaders, type Workload } from './workloads.ts';

/** Containers of the Docker engine with `detour.enable=true`. */

export type DockerOptions = {
  readonly engine: Engine;
  readonly processes: Processes;
  readonly clock: Clock;
  readonly log: Log;
  readonly readers: WishReaders;
  readonly onChange: OnWorkloads;
};

export const DOCKER_PREFIX = 'detour.';
const LABEL = `${DOCKER_PREFIX}enable`;
/** A busy engine drops events silently: it is asked for all it has now and then, one question for each container. */
const RECONCILE_MS = 300_000;

/** Watches. While the engine is away, what it said last counts. */
export function watchDocker({ engine, processes, clock, log, readers, onChange }: DockerOptions): Provider {
  /** By container id. */
  const known = new Map<string, Workload>();
  /** Containers whose labels were complained of, with the start at which that was. */
  const complained = new Map<string, number>();
  /** Containers are looked at in the order of what happened to them. */
  let turn: Promise<unknown> = Promise.resolve();

  const publish = (): void => onChange([...known.values()]);

  function forget(id: string): void {
    complained.delete(id);
    if (known.delete(id)) publish();
  }

  /** Whatever was said of it: what it is now counts, for events may come late and out of order. */
  async function look(id: string): Promise<void> {
    const container = await engine.inspect(id);
    if (!container) {
      forget(id);
      return;
    }
    const before = known.get(id);
    const now = await workloadOf(container);
    if (now) known.set(id, now);
    else known.delete(id);
    if (before?.key !== now?.key) publish();
  }

  async function workloadOf(container: EngineContainer): Promise<Workload | null> {
    const { id, name, startedAt, labels } = container;
    const { enabled, wishes, complaints } = readLabels(labels, DOCKER_PREFIX, readers);
    const network = enabled ? await networkOf(container) : null;
    const all = [...complaints];
    if (network?.kind === 'host') all.push("it uses the host's network: DETOUR_PROVIDERS=host serves that");
    if (complained.get(id) !== startedAt) {
      for (const complaint of all)
        log.warn('workload-label', { workload: name, complaint }, 'A label of a container cannot be followed');
      complained.set(id, startedAt);
    }
    if (!enabled || network?.kind === 'host') return null;
    const own = await processes.pathOf(container.pid, id);
    const paths = [...(own === null ? [] : [own]), ...(network?.kind === 'own' ? [network.sandbox] : [])];
    return { key: `${id} ${startedAt}`, name, paths, groups: [id], wishes };
  }

  /** Its own network, or that of whom it joined; null when that one has ended, or began again with another. */
  async function networkOf(container: EngineContainer): Promise<Exclude<ContainerNetwork, { kind: 'joined' }> | null> {
    let { network, startedAt } = container;
    // Each joined one that was there before it, so this ends.
    while (network.kind === 'joined') {
      const other: EngineContainer | null = await engine.inspect(network.container);
      if (!other || other.startedAt > startedAt) return null;
      ({ network, startedAt } = other);
    }
    return network;
  }

  function inTurn(signal: AbortSignal, task: () => Promise<void>): Promise<void> {
    const mine = turn.then(() => (signal.aborted ? undefined : task()));
    turn = mine.catch(() => undefined);
    return mine;
  }

  /** Asks for everything, and forgets what is no longer there. */
  async function readAll(): Promise<void> {
    const ids = new Set(await engine.list(LABEL));
    for (const id of [...known.keys(), ...complained.keys()]) if (!ids.has(id)) forget(id);
    for (const id of ids) await look(id);
  }

  async function talk({ signal, answered, pause }: Talk): Promise<void> {
    // What is said in this conversation ends with it.
    const end = new AbortController();
    const broken = Promise.withResolvers<never>();
    // It may break while nobody waits for it.
    broken.promise.catch(() => undefined);
    const here = AbortSignal.any([signal, end.signal]);
    try {
      const { ended } = await engine.follow(
        LABEL,
        (id) => {
          inTurn(here, () => look(id)).catch(broken.reject);
        },
        here,
      );
      void ended.then((why) => broken.reject(new Error(why)));
      await inTurn(here, readAll);
      answered();
      while (!signal.aborted) {
        await Promise.race([pause(RECONCILE_MS), broken.promise]);
        await inTurn(here, readAll);
      }
    } finally {
      end.abort();
    }
  }

  return converse({ provider: 'docker', name: 'The Docker engine', clock, log, workloads: () => known.size, talk });
}
