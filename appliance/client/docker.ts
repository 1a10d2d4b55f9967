import type { Cancel, Clock } from '../kernel/clock.ts';
import type { Engine, EngineContainer } from '../kernel/engine.ts';
import type { Log } from '../log.ts';
import type { Provider, ProviderStatus } from './daemon.ts';
import { readLabels, type WishReaders, type Workload } from './workloads.ts';

/** Containers of the Docker engine with `detour.enable=true`. */

export type DockerOptions = {
  readonly engine: Engine;
  readonly clock: Clock;
  readonly log: Log;
  readonly readers: WishReaders;
  readonly onChange: (workloads: readonly Workload[]) => void;
};

export const DOCKER_PREFIX = 'detour.';
const LABEL = `${DOCKER_PREFIX}enable`;
const RETRY_FIRST_MS = 1_000;
const RETRY_LONGEST_MS = 30_000;
/** Events may be lost in an engine that is busy: it is asked for all it has now and then. */
const RECONCILE_MS = 60_000;

/** Watches. While the engine is away, what it said last counts. */
export function watchDocker({ engine, clock, log, readers, onChange }: DockerOptions): Provider {
  /** By container id. */
  const known = new Map<string, Workload>();
  let state: ProviderStatus['state'] = 'starting';
  let why: string | null = null;
  let stopped = false;
  let failures = 0;
  let close: (() => void) | null = null;
  let timer: Cancel | null = null;
  /** Complaints are made once for each start of a container. */
  const complained = new Map<string, string>();
  /** Looks at a container in the order of what happened to it. */
  let turn: Promise<unknown> = Promise.resolve();

  const publish = (): void => {
    if (!stopped) onChange([...known.values()]);
  };

  async function look(id: string): Promise<void> {
    const container = await engine.inspect(id);
    const before = known.get(id);
    const now = container && (await workloadOf(container));
    if (now) known.set(id, now);
    else known.delete(id);
    if (before?.key !== now?.key) publish();
  }

  async function workloadOf(container: EngineContainer): Promise<Workload | null> {
    const { id, name, startedAt, labels } = container;
    const key = `${id} ${startedAt}`;
    const { enabled, wishes, complaints } = readLabels(labels, DOCKER_PREFIX, readers);
    if (complained.get(id) !== key) {
      for (const complaint of complaints)
        log.warn('workload-label', { workload: name, complaint }, 'A label of a container is not understood');
      if (complaints.length > 0) complained.set(id, key);
    }
    if (!enabled) return null;
    const paths = await pathsOf(container, new Set());
    return { key, name, paths, groups: [id], wishes };
  }

  /** Where its network is: its own, or that of the container which it joined. */
  async function pathsOf({ sandbox, pid, joined, id }: EngineContainer, seen: Set<string>): Promise<string[]> {
    const own = pid > 0 ? [`/proc/${pid}/ns/net`] : [];
    if (sandbox) return [sandbox, ...own];
    seen.add(id);
    const other = joined === null || seen.has(joined) ? null : await engine.inspect(joined);
    return other && !seen.has(other.id) ? [...(await pathsOf(other, seen)), ...own] : own;
  }

  const inTurn = (task: () => Promise<void>): Promise<void> => {
    const mine = turn.then(() => (stopped ? undefined : task()));
    turn = mine.catch(() => undefined);
    return mine;
  };

  /** Asks for everything, and forgets what is no longer there. */
  async function readAll(): Promise<void> {
    const ids = new Set(await engine.list(LABEL));
    let changed = false;
    for (const id of known.keys()) if (!ids.has(id)) changed = known.delete(id) || changed;
    if (changed) publish();
    for (const id of ids) await look(id);
  }

  async function connect(): Promise<void> {
    const { close: end } = await engine.follow(
      LABEL,
      ({ id, what }) => {
        if (what === 'started') inTurn(() => look(id)).catch(fail);
        else
          void inTurn(async () => {
            complained.delete(id);
            if (known.delete(id)) publish();
          });
      },
      (reason) => fail(new Error(reason)),
    );
    if (stopped) {
      end();
      return;
    }
    close = end;
    await inTurn(readAll);
    const recovered = state === 'failing';
    state = 'ok';
    why = null;
    failures = 0;
    // Also when there is nothing: whoever waits for the first answer has it.
    publish();
    if (recovered) log.info('provider-back', { provider: 'docker' }, 'The Docker engine answers again');
    again(RECONCILE_MS, reconcile);
  }

  function reconcile(): void {
    inTurn(readAll).then(() => again(RECONCILE_MS, reconcile), fail);
  }

  function again(ms: number, task: () => void): void {
    timer?.();
    timer = stopped ? null : clock.after(ms, task);
  }

  function fail(error: unknown): void {
    if (stopped) return;
    close?.();
    close = null;
    const reason = error instanceof Error ? error.message : String(error);
    if (state !== 'failing' || why !== reason)
      log.warn(
        'provider-failing',
        { provider: 'docker', reason, workloads: known.size },
        'The Docker engine does not answer; serving what is known',
      );
    state = 'failing';
    why = reason;
    const wait = Math.min(RETRY_FIRST_MS * 2 ** Math.min(failures, 10), RETRY_LONGEST_MS);
    failures++;
    again(wait, () => void connect().catch(fail));
  }

  void connect().catch(fail);

  return {
    status: () => ({ provider: 'docker', state, workloads: known.size, why }),
    stop() {
      stopped = true;
      timer?.();
      close?.();
    },
  };
}
