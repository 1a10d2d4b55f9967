import { statfsSync } from 'node:fs';
import { readdir, stat } from 'node:fs/promises';
import { join } from 'node:path';

/** Control groups (version 2) of this host, by the names that container runtimes give their directories. Only reads. */
export type Groups = {
  /**
   * Ids of the directories that have one of `names` in theirs, by that name; the uppermost on each way down. Every runtime puts a container's
   * id there, with cgroupfs (`ID`) as with systemd (`docker-ID.scope`), and a kubelet a pod's uid (`podUID`). An id is
   * what the kernel calls one: the inode.
   * @throws Error with the remedy when there is no version 2 here
   */
  find(names: ReadonlySet<string>): Promise<ReadonlyMap<string, readonly bigint[]>>;
};

/** linux/magic.h */
const CGROUP2_MAGIC = 0x63677270;
/** Where systemd mounts it: alone, or beside version 1. */
const ROOTS = ['/sys/fs/cgroup', '/sys/fs/cgroup/unified'];
/** Directories read at a time: each is a short wait for a thread of libuv's pool. */
const AT_ONCE = 16;

/** @param roots where version 2 may be mounted, the first one that is counts */
export function systemGroups(roots: readonly string[] = ROOTS): Groups {
  return {
    async find(names) {
      const found = new Map<string, bigint[]>();
      if (names.size === 0) return found;
      const root = roots.find(isVersion2);
      if (root === undefined) {
        throw new Error(
          `no control groups of version 2 at ${roots.join(' or ')}: on the host, mount -t cgroup2 none /sys/fs/cgroup, or boot with systemd.unified_cgroup_hierarchy=1; ` +
            'docker: -v /sys/fs/cgroup:/sys/fs/cgroup:ro; kubernetes: a hostPath volume of it',
        );
      }
      const wanted = [...names];
      let level = [root];
      while (level.length > 0) {
        const next: string[] = [];
        const queue = level.values();
        const read = async (): Promise<void> => {
          for (const folder of queue) {
            for (const name of await foldersIn(folder)) {
              const path = join(folder, name);
              const matching = wanted.filter((one) => name.includes(one));
              if (matching.length === 0) next.push(path);
              // Gone meanwhile.
              const id = matching.length > 0 && (await stat(path, { bigint: true }).catch(() => null))?.ino;
              if (id) for (const one of matching) found.set(one, [...(found.get(one) ?? []), id]);
            }
          }
        };
        await Promise.all(Array.from({ length: AT_ONCE }, read));
        level = next;
      }
      return found;
    },
  };
}

function isVersion2(path: string): boolean {
  try {
    return statfsSync(path).type === CGROUP2_MAGIC;
  } catch {
    return false;
  }
}

async function foldersIn(folder: string): Promise<readonly string[]> {
  const all = await readdir(folder, { withFileTypes: true }).catch(() => []);
  return all.filter((one) => one.isDirectory()).map(({ name }) => name);
}
