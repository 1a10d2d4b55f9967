import { accessSync, constants, readFileSync, statSync, writeFileSync } from 'node:fs';
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

const PROC_SYS = '/proc/sys';

/**
 * Parameters below `root`, `/proc/sys` or a bind mount of it. What is read and written belongs to the namespace of the
 * thread that does it (docs/kernel-notes.md): hence no asynchronous functions.
 */
export function procSysctl(root: string, namespace: Namespace = ownNamespace): Sysctl {
  // Interface names may hold dots; `sysctl` writes those as slashes, and so do we.
  const parts = (name: string): string[] => name.split('.').map((part) => part.replaceAll('/', '.'));
  const path = (name: string): string => join(root, ...parts(name));
  let followed = root === PROC_SYS || namespace === ownNamespace;

  /** @throws Error when `root` shows one namespace, whoever looks: we would change that one */
  function follow(name: string): void {
    if (followed) return;
    const folder = parts(name).slice(0, -1);
    const inode = (at: string): bigint => statSync(join(at, ...folder), { bigint: true }).ino;
    const isOne = (at: string): boolean => inode(at) === namespace.within(() => inode(at));
    // A folder that belongs to all of them, such as net/ipv4, is one in /proc/sys as well.
    if (isOne(root) && !isOne(PROC_SYS)) {
      throw new Error(
        `${join(root, ...folder)} is that of one network namespace, whoever looks: mount /proc/sys/net at ${root}/net, and not a folder of it`,
      );
    }
    followed = true;
  }

  return {
    async read(name) {
      try {
        follow(name);
        return namespace.within(() => readFileSync(path(name), 'utf8')).trim();
      } catch (error) {
        if (codeOf(error) === 'ENOENT') return null;
        throw error;
      }
    },
    async write(name, value) {
      follow(name);
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
