import { constants, type FSWatcher, statSync, watch } from 'node:fs';
import { open } from 'node:fs/promises';
import { basename, dirname } from 'node:path';
import type { Cancel } from './clock.ts';

/** Files that people edit while the program runs. */
export type Files = {
  /**
   * The file's text.
   * @throws Error with a `code`: ENOENT when it is not there, `not a file`, `too big` above `longest` bytes, or another errno
   */
  read(path: string, longest: number): Promise<string>;
  /** Calls back soon after the file may have changed, came or went, and now and then without cause. */
  watch(path: string, changed: () => void): Cancel;
};

/** inotify tells nothing over NFS, FUSE and some bind mounts, and a folder may be replaced under the watch. */
const POLL_MS = 15_000;
/** An editor writes in several steps; they are one change. */
const SETTLE_MS = 100;
const CHUNK = 16 * 1024;

const failure = (code: string): Error => Object.assign(new Error(code), { code });

function inodeOf(path: string): string | null {
  try {
    const { dev, ino } = statSync(path, { bigint: true });
    return `${dev}:${ino}`;
  } catch {
    return null;
  }
}

/** One inotify watch that is put on whatever stands at `path` now. */
class Watch {
  readonly #path: string;
  readonly #changed: (name: string | null) => void;
  #inode: string | null = null;
  #watcher: FSWatcher | null = null;

  constructor(path: string, changed: (name: string | null) => void) {
    this.#path = path;
    this.#changed = changed;
  }

  arm(): void {
    const inode = inodeOf(this.#path);
    if (inode === this.#inode) return;
    this.close();
    if (inode === null) return;
    try {
      const watcher = watch(this.#path, { persistent: false }, (_, name) => this.#changed(name));
      watcher.on('error', () => this.close());
      this.#watcher = watcher;
      this.#inode = inode;
    } catch {
      // Out of watches, or gone this moment: the poll does it.
    }
  }

  close(): void {
    this.#watcher?.close();
    this.#watcher = null;
    this.#inode = null;
  }
}

/** The machine's files. `pollMs` is how often they are looked at when no event comes. */
export function systemFiles(pollMs = POLL_MS): Files {
  return {
    async read(path, longest) {
      // Without O_NONBLOCK, opening a pipe would wait for its writer for ever.
      const file = await open(path, constants.O_RDONLY | constants.O_NONBLOCK);
      try {
        const { size } = await file
          .stat()
          .then((stat) => (stat.isFile() ? stat : Promise.reject(failure('not a file'))));
        if (size > longest) throw failure('too big');
        // It may grow between the two calls, and files of /proc say that they are empty.
        const parts: Buffer[] = [];
        for (let length = 0; length <= longest; ) {
          const part = Buffer.alloc(CHUNK);
          const { bytesRead } = await file.read(part, 0, part.length);
          if (bytesRead === 0) return Buffer.concat(parts).toString('utf8');
          parts.push(part.subarray(0, bytesRead));
          length += bytesRead;
        }
        throw failure('too big');
      } finally {
        await file.close();
      }
    },
    watch(path, changed) {
      let timer: NodeJS.Timeout | null = null;
      const event = (): void => {
        timer ??= setTimeout(() => {
          timer = null;
          arm();
          changed();
        }, SETTLE_MS).unref();
      };
      const name = basename(path);
      // The folder sees renames, which is how editors save and how a ConfigMap's `..data` link moves on; the file itself
      // is for one that is mounted alone, whose folder never hears of it.
      const watches = [
        new Watch(dirname(path), (changed) => {
          if (changed === null || changed === name || changed.startsWith('..')) event();
        }),
        new Watch(path, event),
      ];
      const arm = (): void => {
        for (const one of watches) one.arm();
      };
      arm();
      const poll = setInterval(event, pollMs).unref();
      return () => {
        clearInterval(poll);
        if (timer) clearTimeout(timer);
        for (const one of watches) one.close();
      };
    },
  };
}
