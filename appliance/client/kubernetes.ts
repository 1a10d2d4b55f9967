import type { Cancel, Clock } from '../kernel/clock.ts';
import type { Pod, Pods } from '../kernel/pods.ts';
import type { ContainerProcess, Processes } from '../kernel/processes.ts';
import type { Log } from '../log.ts';
import type { Provider, ProviderStatus } from './daemon.ts';
import { isEnabled, readLabels, type WishReaders, type Workload } from './workloads.ts';

/** Pods of this node with the annotation `detour.dev/enable: "true"`. */

export type KubernetesOptions = {
  readonly pods: Pods;
  readonly processes: Processes;
  readonly clock: Clock;
  readonly log: Log;
  readonly readers: WishReaders;
  readonly onChange: (workloads: readonly Workload[]) => void;
};

export const KUBERNETES_PREFIX = 'detour.dev/';
const RETRY_FIRST_MS = 500;
const RETRY_LONGEST_MS = 30_000;
/** A pod that has just been reported running has its processes by then, usually. */
const SEARCH_FIRST_MS = 50;
const SEARCH_LONGEST_MS = 10_000;
/** Namespaces are held open by us: whether their pods still live is looked at this often, also while the API is away. */
const CHECK_MS = 10_000;
/** Between two watches, so that a server that ends each at once is not asked all the time. */
const WATCH_GAP_MS = 1_000;

type Known = {
  pod: Pod;
  /** Where it was found; null while it is being looked for. */
  process: ContainerProcess | null;
  searches: number;
};

/** The whole pod's control group, as kubelets with cgroupfs and with systemd name it; where there is none, its containers'. */
const groupsOf = ({ uid, containers }: Pod): readonly string[] => [
  `pod${uid}`,
  `pod${uid.replaceAll('-', '_')}`,
  ...containers,
];

/** Watches. While the API server is away, what it said last counts. */
export function watchKubernetes(options: KubernetesOptions): Provider {
  const { pods, processes, clock, log, readers, onChange } = options;
  /** Pods that asked to be served, by uid. */
  const known = new Map<string, Known>();
  const complained = new Map<string, string>();
  let state: ProviderStatus['state'] = 'starting';
  let why: string | null = null;
  /** Why pods cannot be found on this node; null while they can. */
  let blind: string | null = null;
  let stopped = false;
  let failures = 0;
  let close: (() => void) | null = null;
  let timer: Cancel | null = null;
  let searchTimer: Cancel | null = null;
  let searching = false;
  let published = '';

  /** Tells what there is; without `anyway` only when it changed. */
  function publish(anyway = false): void {
    const workloads = [...known.values()].flatMap(({ pod, process }): Workload[] => {
      if (!process) return [];
      const { wishes } = readLabels(pod.annotations, KUBERNETES_PREFIX, readers);
      // A pod whose sandbox was made again has another namespace, and is another workload.
      const groups = groupsOf(pod);
      return [{ key: `${pod.uid} ${process.namespace}`, name: pod.name, paths: [process.path], groups, wishes }];
    });
    const text = workloads
      .map(({ key, groups }) => `${key} ${groups} ${annotationsOf(known.get(key.split(' ')[0] ?? ''))}`)
      .join('\n');
    if (stopped || (text === published && !anyway)) return;
    published = text;
    onChange(workloads);
  }

  const annotationsOf = (one: Known | undefined): string =>
    JSON.stringify(Object.entries(one?.pod.annotations ?? {}).filter(([name]) => name.startsWith(KUBERNETES_PREFIX)));

  function take(pod: Pod): void {
    const { uid, name, annotations, hostNetwork, containers } = pod;
    complain(pod);
    if (!isEnabled(annotations, KUBERNETES_PREFIX) || hostNetwork || containers.length === 0) {
      drop(uid);
      return;
    }
    const before = known.get(uid);
    if (before) {
      const same = before.pod.containers.join() === containers.join();
      before.pod = pod;
      // The containers are others, so the process may be gone, and with it, if the sandbox was replaced, the namespace.
      if (!same) before.searches = 0;
      if (!same) search(0);
      else publish();
      return;
    }
    log.debug('pod-found', { workload: name }, 'A pod asks to be served');
    known.set(uid, { pod, process: null, searches: 0 });
    search(0);
  }

  function drop(uid: string): void {
    if (known.delete(uid)) publish();
  }

  /** Once for each wording: annotations can change while a pod runs. */
  function complain({ uid, name, annotations, hostNetwork }: Pod): void {
    const { enabled, complaints } = readLabels(annotations, KUBERNETES_PREFIX, readers);
    const all = [...complaints];
    if (enabled && hostNetwork) all.push("it uses the host's network: DETOUR_PROVIDERS=host serves that");
    const text = all.join('\n');
    if ((complained.get(uid) ?? '') === text) return;
    if (text === '') complained.delete(uid);
    else complained.set(uid, text);
    for (const complaint of all)
      log.warn('workload-annotation', { workload: name, complaint }, 'An annotation of a pod is not understood');
  }

  /** Looks for the processes of all pods that have none yet, or whose containers changed. */
  function search(ms: number): void {
    if (searching || stopped) return;
    searchTimer?.();
    searchTimer = clock.after(ms, () => {
      searchTimer = null;
      void find();
    });
  }

  async function find(check = false): Promise<void> {
    searching = true;
    const sought = [...known.values()].filter(({ process, searches }) => check || process === null || searches === 0);
    const ids = new Set(sought.flatMap(({ pod }) => pod.containers));
    try {
      const found = await processes.find(ids);
      blind = null;
      for (const one of sought) {
        one.searches++;
        const id = one.pod.containers.find((container) => found.has(container));
        const process = (id !== undefined && found.get(id)) || null;
        if (process || one.searches > 1 || check) one.process = process;
      }
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      if (reason !== blind) log.warn('pods-unseen', { reason }, 'The processes of pods cannot be found');
      blind = reason;
      for (const one of sought) one.searches++;
    }
    searching = false;
    publish();
    const missing = [...known.values()].filter(({ process, searches }) => process === null || searches === 0);
    if (missing.length === 0) return;
    const tries = Math.min(...missing.map(({ searches }) => searches));
    search(Math.min(SEARCH_FIRST_MS * 2 ** Math.min(tries, 10), SEARCH_LONGEST_MS));
  }

  async function read(): Promise<string> {
    const seen = new Set<string>();
    const version = await pods.list((pod) => {
      seen.add(pod.uid);
      take(pod);
    });
    for (const uid of known.keys()) if (!seen.has(uid)) drop(uid);
    for (const uid of complained.keys()) if (!seen.has(uid)) complained.delete(uid);
    return version;
  }

  async function run(): Promise<void> {
    let version = await read();
    const recovered = state === 'failing';
    state = 'ok';
    why = null;
    failures = 0;
    // Also when there is nothing: whoever waits for the first answer has it.
    publish(true);
    if (recovered) log.info('provider-back', { provider: 'kubernetes' }, 'The Kubernetes API answers again');
    while (!stopped) {
      const began = clock.now();
      const watch = pods.watch(
        version,
        (event) => {
          if (stopped) return;
          if (event.kind === 'changed') take(event.pod);
          else {
            complained.delete(event.uid);
            drop(event.uid);
          }
        },
        (at) => {
          version = at;
        },
      );
      close = watch.close;
      const end = await watch.ended;
      close = null;
      if (stopped) return;
      if (end.kind === 'failed') throw new Error(end.why);
      await pause(WATCH_GAP_MS - (clock.now() - began));
      if (end.kind === 'outdated') version = await read();
    }
  }

  const pause = (ms: number): Promise<void> =>
    ms <= 0 ? Promise.resolve() : new Promise((resolve) => clock.after(ms, resolve));

  function start(): void {
    run().catch((error: unknown) => {
      if (stopped) return;
      const reason = error instanceof Error ? error.message : String(error);
      if (state !== 'failing' || why !== reason)
        log.warn(
          'provider-failing',
          { provider: 'kubernetes', reason, workloads: known.size },
          'The Kubernetes API does not answer; serving what is known',
        );
      state = 'failing';
      why = reason;
      const wait = Math.min(RETRY_FIRST_MS * 2 ** Math.min(failures, 10), RETRY_LONGEST_MS);
      failures++;
      timer = clock.after(wait, start);
    });
  }

  function check(): void {
    clock.after(CHECK_MS, () => {
      if (stopped) return;
      if (!searching && known.size > 0) void find(true);
      check();
    });
  }

  start();
  check();

  return {
    status: () => ({
      provider: 'kubernetes',
      state: state === 'ok' && blind !== null ? 'failing' : state,
      workloads: known.size,
      why: why ?? blind,
    }),
    stop() {
      stopped = true;
      timer?.();
      searchTimer?.();
      close?.();
    },
  };
}
