import { accessSync, constants, readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { type Namespace, ownNamespace } from './namespaces.ts';

/** Kernel parameters of one network namespace, by their dotted names (`net.ipv4.ip_forward`). */
export type Sysctl = {
  /** The value without its newline; null when this kernel has no such parameter. */
  read(name: string): Promise<string | null>;
  /** @throws SysctlError when the value cannot be written; nothing has changed then. */
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

/**
 * Parameters below `root`, `/proc/sys` or a bind mount of it. What is read and written belongs to the namespace of the
 * thread that does it, wherever the mount came from (docs/kernel-notes.md): hence no asynchronous functions.
 */
export function procSysctl(root: string, namespace: Namespace = ownNamespace): Sysctl {
  // Interface names may hold dots; `sysctl` writes those as slashes, and so do we.
  const path = (name: string): string => join(root, ...name.split('.').map((part) => part.replaceAll('/', '.')));
  return {
    async read(name) {
      try {
        return namespace.within(() => readFileSync(path(name), 'utf8')).trim();
      } catch (error) {
        if (codeOf(error) === 'ENOENT') return null;
        throw error;
      }
    },
    async write(name, value) {
      try {
        namespace.within(() => writeFileSync(path(name), `${value}\n`, { flag: 'r+' }));
      } catch (error) {
        throw new SysctlError(name, value, codeOf(error));
      }
    },
    async writable(name) {
      try {
        namespace.within(() => accessSync(path(name), constants.W_OK));
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
