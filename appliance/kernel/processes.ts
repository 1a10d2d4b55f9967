import { readdir, readFile, stat } from 'node:fs/promises';

/** Processes of this pid namespace (with the host's, all of them), by the containers that they run in. */
export type Processes = {
  /**
   * One process of each container, with its network namespace. Containers are found by their ids in the paths of control
   * groups, where every runtime puts them; those without a process here are left out.
   * @throws Error when a namespace may not be looked at, with the remedy
   */
  find(containers: ReadonlySet<string>): Promise<ReadonlyMap<string, ContainerProcess>>;
};

export type ContainerProcess = {
  readonly pid: number;
  /** The file through which its network namespace can be entered. */
  readonly path: string;
  /** As of namespaces.ts. */
  readonly namespace: string;
};

/** Files read at a time: each is a short wait for a thread of libuv's pool. */
const AT_ONCE = 32;
/** As runtimes name control groups: the bare id, or with a prefix and `.scope`. */
const ID = /[0-9a-f]{64}|[0-9a-f]{12,63}/g;

const codeOf = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : 'UNKNOWN';

/** @param root `/proc` */
export function systemProcesses(root = '/proc'): Processes {
  return {
    async find(containers) {
      const found = new Map<string, ContainerProcess>();
      if (containers.size === 0) return found;
      const pids = (await readdir(root)).filter((name) => /^\d+$/.test(name)).map(Number);
      const next = pids.values();
      let refused: string | null = null;
      const search = async (): Promise<void> => {
        for (const pid of next) {
          if (found.size === containers.size) return;
          // Gone meanwhile, or a thread of the kernel.
          const text = await readFile(`${root}/${pid}/cgroup`, 'latin1').catch(() => '');
          const id = (text.match(ID) ?? []).find((one) => containers.has(one) && !found.has(one));
          if (id === undefined) continue;
          const path = `${root}/${pid}/ns/net`;
          try {
            const { dev, ino } = await stat(path, { bigint: true });
            found.set(id, { pid, path, namespace: `${dev}:${ino}` });
          } catch (error) {
            if (codeOf(error) === 'EACCES' || codeOf(error) === 'EPERM') refused = codeOf(error);
          }
        }
      };
      await Promise.all(Array.from({ length: AT_ONCE }, search));
      if (refused !== null && found.size === 0) {
        throw new Error(
          `the namespaces of other containers' processes may not be looked at (${refused}): give the agent CAP_SYS_PTRACE and CAP_SYS_ADMIN (docs/kubernetes.md)`,
        );
      }
      return found;
    },
  };
}
