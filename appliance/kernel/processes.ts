import { readdirSync, readFileSync, statSync } from 'node:fs';
import { setImmediate } from 'node:timers/promises';

/** Processes of this pid namespace (with the host's, all of them), by the containers that they run in. */
export type Processes = {
  /**
   * One process for each of these words that stands in the path of a control group, where every runtime puts the ids of
   * containers, and the kubelet the uids of pods. Words without a process here are left out.
   */
  find(words: ReadonlySet<string>): Promise<Found>;
  /** Whether it still is in the namespace that it was found in. */
  holds(process: ContainerProcess): boolean;
  /** The file of a process's network namespace, if in this pid namespace that process is one of that container; otherwise null. */
  pathOf(pid: number, container: string): Promise<string | null>;
};

export type Found = {
  /** By word. */
  readonly processes: ReadonlyMap<string, ContainerProcess>;
  /** There are such processes whose namespaces may not be looked at: why, with the remedy. */
  readonly refused: string | null;
};

export type ContainerProcess = {
  /** The file through which its network namespace can be entered. */
  readonly path: string;
  /** As of namespaces.ts. */
  readonly namespace: string;
};

/**
 * So many files are read before others get their turn: some 2 ms. Asynchronously, each would cost the event loop four trips to
 * a thread and back, 10 times what the kernel takes to answer.
 */
const AT_ONCE = 64;
/** Pods' uids, with hyphens or (systemd) underscores, and containers' ids: bare, or with a prefix and `.scope`. */
const WORDS = /[0-9a-f]{8}(?:[-_][0-9a-f]{4}){3}[-_][0-9a-f]{12}|[0-9a-f]{12,64}/g;

const codeOf = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : 'UNKNOWN';

/** @param root `/proc` */
export function systemProcesses(root = '/proc'): Processes {
  const pathTo = (pid: number | string): string => `${root}/${pid}/ns/net`;

  function namespaceOf(path: string): string {
    const { dev, ino } = statSync(path, { bigint: true });
    return `${dev}:${ino}`;
  }

  /** What names the control groups of a process; nothing for one that is gone. */
  function wordsOf(pid: number | string): readonly string[] {
    try {
      return (readFileSync(`${root}/${pid}/cgroup`, 'latin1').match(WORDS) ?? []).map((word) =>
        word.replaceAll('_', '-'),
      );
    } catch {
      return [];
    }
  }

  return {
    async find(words) {
      const found = new Map<string, ContainerProcess>();
      const pids = readdirSync(root).filter((name) => /^\d+$/.test(name));
      let refused: string | null = null;
      for (const [index, pid] of pids.entries()) {
        if (index % AT_ONCE === AT_ONCE - 1) await setImmediate();
        const fresh = wordsOf(pid).filter((word) => words.has(word) && !found.has(word));
        if (fresh.length === 0) continue;
        const path = pathTo(pid);
        try {
          const process = { path, namespace: namespaceOf(path) };
          for (const word of fresh) found.set(word, process);
        } catch (error) {
          // Otherwise it ended meanwhile.
          if (codeOf(error) === 'EACCES' || codeOf(error) === 'EPERM') refused = codeOf(error);
        }
      }
      return {
        processes: found,
        refused:
          refused &&
          `the network namespaces of other containers' processes may not be looked at (${refused}): the agent needs CAP_SYS_PTRACE besides CAP_SYS_ADMIN (docs/workloads.md)`,
      };
    },
    holds({ path, namespace }) {
      try {
        return namespaceOf(path) === namespace;
      } catch {
        return false;
      }
    },
    pathOf: async (pid, container) => (pid > 0 && wordsOf(pid).includes(container) ? pathTo(pid) : null),
  };
}
