import { accessSync, constants, readFileSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { Fatal } from '../exit.ts';
import { type Namespace, ownNamespace } from './namespaces.ts';

/** Kernel parameters of one network namespace, by their dotted names (`net.ipv4.ip_forward`). */
export type Sysctl = {
  /** The value without its newline; null when this kernel has no such parameter. @throws Fatal (69) when it is not the one that is meant */
  read(name: string): Promise<string | null>;
  /** @throws SysctlError when the value cannot be written, Fatal (69) when it is not the one that is meant; nothing has changed then. */
  write(name: string, value: string): Promise<void>;
  /** Whether `write` would get as far as the kernel (containers mount /proc/sys read-only). */
  writable(name: string): Promise<boolean>;
};

export class SysctlError extends Error {
  override readonly name = 'SysctlError';
  /** As the system calls name it: `EROFS`, `EACCES`, `EINVAL`, `ENOENT`. */
  readonly code: string;

  constructor(parameter: string, value: string, code: string) {
    super(`cannot set ${parameter}=${value}: ${code}`);
    this.code = code;
  }
}

const codeOf = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : 'UNKNOWN';

const PROC_SYS = '/proc/sys';

/**
 * Parameters below `root`, `/proc/sys` or a bind mount of it. What is read and written belongs to the namespace of the
 * thread that does it (docs/kernel-notes.md): hence no asynchronous functions.
 */
export function procSysctl(root: string, namespace: Namespace = ownNamespace): Sysctl {
  const at = (root: string, name: string): string =>
    // Interface names may hold dots; `sysctl` writes those as slashes, and so do we.
    join(root, ...name.split('.').map((part) => part.replaceAll('/', '.')));
  const readAt = (root: string, name: string): string | null => {
    try {
      return namespace.within(() => readFileSync(at(root, name), 'utf8')).trim();
    } catch (error) {
      if (codeOf(error) === 'ENOENT') return null;
      throw error;
    }
  };
  const writeAt = (root: string, name: string, value: string): void => {
    try {
      namespace.within(() => writeFileSync(at(root, name), `${value}\n`, { flag: 'r+' }));
    } catch (error) {
      throw new SysctlError(name, value, codeOf(error));
    }
  };
  /** Folders in which each namespace has files of its own (net/mptcp) are that of whoever mounted them, for everybody. */
  const wrong = (name: string): Fatal =>
    new Fatal(
      69,
      `${dirname(at(root, name))} shows another network namespace than the one that is meant: mount /proc/sys/net at ${root}/net, and not a folder of it`,
    );
  /** What containers can read, but not write. */
  const truth = (name: string): string | null => readAt(PROC_SYS, name);

  return {
    async read(name) {
      const value = readAt(root, name);
      if (root === PROC_SYS) return value;
      const meant = truth(name);
      if (value === null && meant !== null)
        throw new Fatal(
          69,
          `there is no ${at(root, name)}, but this kernel has it: mount /proc/sys/net at ${root}/net`,
        );
      if (value !== (meant ?? value)) throw wrong(name);
      return value;
    },
    async write(name, value) {
      const before = readAt(root, name);
      writeAt(root, name, value);
      if (root === PROC_SYS || before === null || (truth(name) ?? value) === value) return;
      writeAt(root, name, before);
      throw wrong(name);
    },
    async writable(name) {
      try {
        namespace.within(() => accessSync(at(root, name), constants.W_OK));
        return true;
      } catch {
        return false;
      }
    },
  };
}

/**
 * Whether `net/mptcp` below `root` is mounted by itself: it is then that of the namespace in which that was done, whoever looks, and
 * not of the one that is looked from, as it is below a mount of `net` (docs/kernel-notes.md).
 */
export function isOfOneNamespace(root: string): boolean {
  const folder = join(root, 'net/mptcp');
  return readFileSync('/proc/self/mountinfo', 'utf8')
    .split('\n')
    .some((line) => line.split(' ')[4] === folder);
}
