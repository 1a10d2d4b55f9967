/**
 * What the maps of bpf/mptcpify.bpf.c should hold, so that the plain TCP sockets of those become Multipath TCP that are meant. Pure.
 */

/** What is said of network namespaces (by inode) and of control groups (by id): whether. */
export type Choice = {
  readonly nets: ReadonlyMap<number, boolean>;
  readonly groups: ReadonlyMap<bigint, boolean>;
};

/** A workload that said yes or no, and where its processes are. */
export type Asking = { readonly mptcp: boolean; readonly groups: readonly bigint[] };

export type Change<K> = { readonly key: K; readonly value: number | null };

/** The root of all control groups: every process is below it, also where version 2 is not in use (cgroup_setup_root() in kernel/cgroup/cgroup.c). */
export const ROOT_GROUP = 1n;

/** Bits of a value: the program looks at the first; the second marks what `detour load` put there, which outlives agents. */
const ON = 1;
const LOADED = 2;

/** What an agent wants, that serves these namespaces. The nearest group decides, so a workload may say no where all say yes. */
export function choiceOf(all: boolean, nets: Iterable<number>, asking: Iterable<Asking>): Choice {
  const groups = new Map<bigint, boolean>(all ? [[ROOT_GROUP, true]] : []);
  for (const { mptcp, groups: ids } of asking) for (const id of ids) groups.set(id, mptcp);
  return { nets: new Map([...nets].map((net) => [net, true])), groups };
}

/** What `detour load` leaves behind in namespace `net`: enough for an agent that may not change the maps. */
export const choiceOfLoad = (all: boolean, net: number): Choice =>
  all ? choiceOf(true, [net], []) : choiceOf(false, [], []);

/**
 * How to get from what is there to what is wanted. What an agent that was killed left goes; what `detour load` put there is only its
 * own business (`loading`). Value null: take it out.
 */
export function changes<K>(
  present: ReadonlyMap<K, number>,
  wanted: ReadonlyMap<K, boolean>,
  loading = false,
): readonly Change<K>[] {
  const result: Change<K>[] = [];
  const ours = (value: number): boolean => ((value & LOADED) !== 0) === loading;
  for (const [key, value] of present) if (ours(value) && !wanted.has(key)) result.push({ key, value: null });
  for (const [key, on] of wanted) {
    const value = (on ? ON : 0) | (loading ? LOADED : 0);
    const before = present.get(key);
    if (before !== value && (loading || before === undefined || ours(before))) result.push({ key, value });
  }
  return result;
}
