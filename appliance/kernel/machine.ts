import { execFile } from 'node:child_process';
import { access, constants, readdir, readFile } from 'node:fs/promises';

/** What a command said. */
export type Ran = { readonly code: number; readonly stdout: string; readonly stderr: string };

/** A look at this machine that changes nothing of it. */
export type Machine = {
  /** Null when there is no such file, or it may not be read. */
  read(path: string): Promise<string | null>;
  /** Whether opening it for writing would be allowed; nothing is opened. */
  writable(path: string): Promise<boolean>;
  /** Names in a folder; none when there is no such folder. */
  list(path: string): Promise<readonly string[]>;
  /** Runs a command that only reads. Null when it is not installed. */
  run(command: string, args: readonly string[]): Promise<Ran | null>;
};

const DEADLINE_MS = 5_000;
/** Rulesets of busy hosts come to a few megabytes. */
const LONGEST_OUTPUT_BYTES = 64 * 1024 * 1024;

/** The machine this process runs on. */
export const systemMachine: Machine = {
  read: (path) => readFile(path, 'utf8').catch(() => null),
  writable: (path) =>
    access(path, constants.W_OK).then(
      () => true,
      () => false,
    ),
  list: (path) => readdir(path).catch(() => []),
  run(command, args) {
    const { promise, resolve } = Promise.withResolvers<Ran | null>();
    const options = {
      timeout: DEADLINE_MS,
      maxBuffer: LONGEST_OUTPUT_BYTES,
      // nft and iptables live there, and a user's PATH often has no sbin.
      env: { PATH: '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin', LC_ALL: 'C' },
    };
    execFile(command, [...args], options, (error, stdout, stderr) => {
      if (error?.code === 'ENOENT') resolve(null);
      else resolve({ code: error ? (typeof error.code === 'number' ? error.code : 1) : 0, stdout, stderr });
    });
    return promise;
  },
};
