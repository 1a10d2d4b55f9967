import type { Cancel, Clock } from '../kernel/clock.ts';
import type { Pod, PodEvent, Pods } from '../kernel/pods.ts';
import type { ContainerProcess, Processes } from '../kernel/processes.ts';
import type { Log } from '../log.ts';
import { converse, type OnWorkloads, type Provider, type Talk } from './provider.ts';
import { isEnabled, readLabels, type WishReaders, type Workload } from './workloads.ts';

/** Pods of this node with the annotation `detour.dev/enable: "true"`. */

export type KubernetesOptions = {
  readonly pods: Pods;
  readonly processes: Processes;
  readonly clock: Clock;
  readonly log: Log;
  readonly readers: WishReaders;
  readonly onChange: OnWorkloads;
};

export const KUBERNETES_PREFIX = 'detour.dev/';
/** The API tells of a pod before the node has made its network: it is looked for soon, then ever less often, */
const SEARCH_FIRST_MS = 50;
const SEARCH_LONGEST_MS = 10_000;
/** by this share of the time since it was first looked for. */
const SEARCH_SHARE = 0.5;
/** The API says that a container runs, and there is no such process: by then it is no matter of time. */
const MISSED_MS = 30_000;
/** Namespaces are held open by us: whether their pods still live is looked at this often, also while the API is away. */
const CHECK_MS = 10_000;
/** Between two watches, so that a server that ends each at once is not asked all the time. */
const WATCH_GAP_MS = 1_000;

type Known = {
  pod: Pod;
  /** One of its processes; null while there is none. */
  process: ContainerProcess | null;
  /** It has to be looked for: there is none, or the pod's containers are others than they were. */
  sought: boolean;
  /** Since when. */
  since: number;
  /** That it cannot be found is in the log. */
  missed: boolean;
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
  /** What was complained of, by uid. */
  const complained = new Map<string, string>();
  /** Where to go on watching; null: the list has to be read. */
  let version: string | null = null;
  let listed = false;
  /** Why pods cannot be found on this node; null while they can. */
  let blind: string | null = null;
  let stopped = false;
  let searching = false;
  let cancel: Cancel | null = null;

  function publish(): void {
    if (stopped) return;
    onChange(
      [...known.values()].flatMap(({ pod, process }): Workload[] => {
        if (!process) return [];
        const { wishes } = readLabels(pod.annotations, KUBERNETES_PREFIX, readers);
        // A pod whose sandbox was made again has another namespace, and is another workload.
        const key = `${pod.uid} ${process.namespace}`;
        return [{ key, name: pod.name, paths: [process.path], groups: groupsOf(pod), wishes }];
      }),
    );
  }

  function take(pod: Pod): void {
    complain(pod);
    const { uid, annotations, hostNetwork, ended, containers } = pod;
    if (!isEnabled(annotations, KUBERNETES_PREFIX) || hostNetwork || ended) {
      drop(uid);
      return;
    }
    // Others' annotations may be long, and are none of our business.
    const mine = Object.entries(annotations).filter(([name]) => name.startsWith(KUBERNETES_PREFIX));
    const kept = { ...pod, annotations: Object.fromEntries(mine) };
    const before = known.get(uid);
    if (before && before.pod.containers.join() === containers.join()) {
      before.pod = kept;
      publish();
      return;
    }
    // With other containers its process may be gone, and with it, if the sandbox was replaced, the namespace.
    known.set(uid, { pod: kept, process: before?.process ?? null, sought: true, since: clock.now(), missed: false });
    searchIn(0);
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
      log.warn('workload-annotation', { workload: name, complaint }, 'An annotation of a pod cannot be followed');
  }

  function searchIn(ms: number): void {
    if (searching || stopped) return;
    cancel?.();
    cancel = clock.after(ms, () => {
      cancel = null;
      searching = true;
      void search().finally(() => {
        searching = false;
        planSearch();
      });
    });
  }

  /** Looks for those that have to be. */
  async function search(): Promise<void> {
    const sought = [...known.values()].filter((one) => one.sought);
    if (sought.length === 0) return;
    const words = new Set(sought.flatMap(({ pod }) => [pod.uid, ...pod.containers]));
    const { processes: found, refused } = await processes.find(words);
    if (refused !== null && refused !== blind)
      log.warn('pods-unseen', { reason: refused }, 'Pods that asked to be served cannot be reached');
    blind = refused;
    for (const one of sought) {
      // What carries the uid alone may be left of a sandbox that was replaced, but is there before any container.
      const name = [...one.pod.containers, one.pod.uid].find((word) => found.has(word));
      const process = name === undefined ? undefined : found.get(name);
      if (process) one.process = process;
      else if (one.process && !processes.holds(one.process)) one.process = null;
      one.sought = one.process === null;
      if (refused === null) miss(one);
    }
    publish();
  }

  function miss(one: Known): void {
    const { name, containers } = one.pod;
    if (!one.sought || one.missed || containers.length === 0 || clock.now() - one.since < MISSED_MS) return;
    one.missed = true;
    log.warn(
      'pod-not-found',
      { workload: name },
      "No process of a pod's containers is seen here: does the agent have the host's pid namespace (hostPID: true)?",
    );
  }

  function planSearch(): void {
    const ages = [...known.values()].flatMap(({ sought, since }) => (sought ? [clock.now() - since] : []));
    if (ages.length === 0) return;
    searchIn(Math.min(Math.max(SEARCH_FIRST_MS, Math.min(...ages) * SEARCH_SHARE), SEARCH_LONGEST_MS));
  }

  /** Looks whether those that were found are still there. */
  function check(): void {
    clock.after(CHECK_MS, () => {
      if (stopped) return;
      let lost = false;
      for (const one of known.values()) {
        if (one.sought || one.process === null || processes.holds(one.process)) continue;
        // Perhaps it was just one of several.
        one.sought = true;
        one.since = clock.now();
        lost = true;
      }
      if (lost) searchIn(0);
      check();
    });
  }

  /** `latest`: what the API server remembers may be older than what we know. */
  async function read(signal: AbortSignal, latest: boolean): Promise<string> {
    const seen = new Set<string>();
    const at = await pods.list(
      (pod) => {
        seen.add(pod.uid);
        take(pod);
      },
      signal,
      latest,
    );
    for (const uid of known.keys()) if (!seen.has(uid)) drop(uid);
    for (const uid of complained.keys()) if (!seen.has(uid)) complained.delete(uid);
    return at;
  }

  function hear(event: PodEvent): void {
    if (stopped) return;
    version = event.version;
    if (event.kind === 'changed') take(event.pod);
    if (event.kind !== 'deleted') return;
    complained.delete(event.uid);
    drop(event.uid);
  }

  async function talk({ signal, answered, pause }: Talk): Promise<void> {
    while (!signal.aborted) {
      const began = clock.now();
      if (version === null) {
        version = await read(signal, listed);
        listed = true;
      }
      const end = await pods.watch(version, { open: answered, each: hear }, signal);
      if (end.kind !== 'closed') version = null;
      if (end.kind === 'failed') throw new Error(end.why);
      await pause(WATCH_GAP_MS - (clock.now() - began));
    }
  }

  const conversation = converse({
    provider: 'kubernetes',
    name: 'The Kubernetes API',
    clock,
    log,
    workloads: () => known.size,
    talk,
  });
  check();

  return {
    status() {
      const status = conversation.status();
      return status.state === 'ok' && blind !== null ? { ...status, state: 'failing', why: blind } : status;
    },
    stop() {
      stopped = true;
      cancel?.();
      conversation.stop();
    },
  };
}
