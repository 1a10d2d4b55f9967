import { closeSync, openSync, statSync } from 'node:fs';
import { stat } from 'node:fs/promises';
import koffi from 'koffi';

/**
 * Network namespaces (network_namespaces(7)). A socket stays in the namespace it was made in, a program in the one it was started
 * in; so one process serves many by stepping into each for as long as a system call takes.
 */
export type Namespace = {
  /** Device and inode of the namespace: the same text for everybody in it, for as long as anybody holds it open. */
  readonly id: string;
  /** Its inode alone: the number by which the kernel itself names it (`ns_common.inum`). */
  readonly inode: number;
  /**
   * Runs `task` with this thread in the namespace. It must be synchronous: what it awaits, and whatever runs on a thread of
   * libuv's pool (asynchronous file functions, name look-ups), is outside.
   * @throws NamespaceError when the process may not enter it any more
   */
  within<T>(task: () => T): T;
  /** Lets go of it: a namespace that is held open outlives its last process. */
  close(): void;
};

export class NamespaceError extends Error {
  override readonly name = 'NamespaceError';
  /** As the system calls name it: `ENOENT`, `EACCES`, `EPERM`. */
  readonly code: string;

  constructor(what: string, code: string) {
    super(`${what}: ${code}`);
    this.code = code;
  }
}

/** linux/sched.h */
const CLONE_NEWNET = 0x40000000;
/** Not /proc/self: that is the process's first thread, whoever asks. */
const OWN = '/proc/thread-self/ns/net';

const setns = koffi.load(null).func('int setns(int fd, int nstype)');

const codeOf = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : 'UNKNOWN';

const idOf = ({ dev, ino }: { dev: bigint; ino: bigint }): string => `${dev}:${ino}`;

/** The namespace that this process was started in. */
export const ownNamespace: Namespace = {
  get id() {
    return idOf(statSync('/proc/self/ns/net', { bigint: true }));
  },
  get inode() {
    return statSync('/proc/self/ns/net').ino;
  },
  within: (task) => task(),
  close: () => undefined,
};

/**
 * The namespace behind a file of /proc/PID/ns/net or a bind mount of one, held open until `close`. Entering it takes
 * CAP_SYS_ADMIN; opening the file of another container's process CAP_SYS_PTRACE besides.
 * @throws NamespaceError
 */
export async function openNamespace(path: string): Promise<Namespace> {
  // Threads inherit the namespace of whoever makes them, so libuv's pool has to exist before anybody steps elsewhere.
  await stat(OWN).catch(() => undefined);
  let there: number;
  try {
    there = openSync(path, 'r');
  } catch (error) {
    throw new NamespaceError(`opening ${path}`, codeOf(error));
  }
  const close = (): void => closeSync(there);
  try {
    const its = statSync(`/proc/self/fd/${there}`, { bigint: true });
    const namespace = {
      id: idOf(its),
      inode: Number(its.ino),
      within: <T>(task: () => T): T => inside(there, path, task),
      close,
    };
    // Whether it may be entered at all shows now, and not in the middle of something.
    namespace.within(() => undefined);
    return namespace;
  } catch (error) {
    close();
    throw error;
  }
}

function inside<T>(there: number, path: string, task: () => T): T {
  const home = openSync(OWN, 'r');
  try {
    if (setns(there, CLONE_NEWNET) !== 0)
      throw new NamespaceError(`entering ${path}`, koffi.errno() === koffi.os.errno.EPERM ? 'EPERM' : 'EINVAL');
    try {
      return task();
    } finally {
      // Whatever came next would be done to somebody else's network.
      if (setns(home, CLONE_NEWNET) !== 0) process.abort();
    }
  } finally {
    closeSync(home);
  }
}
