import { execFileSync } from 'node:child_process';
import { existsSync } from 'node:fs';
import { join } from 'node:path';
import { type Running, waitUntil } from '../lab/netns.ts';

const script = join(import.meta.dirname, '../lab/cluster.sh');
const POLL_MS = 100;
/** Enough of a log to see what was the matter, and little enough to be read. */
const TAIL_LINES = 15;

/** Path of a program that `cluster.sh build` brings. Throws, with the remedy, when it is missing. */
export function binary(name: string): string {
  const path = join(execFileSync(script, ['folder'], { encoding: 'utf8' }).trim(), name);
  if (!existsSync(path)) throw new Error(`${name} is missing: run \`make test-k8s\`, or tests/lab/cluster.sh build`);
  return path;
}

/** The programs that a cluster consists of. None of them ends by itself. */
export class Programs {
  readonly #running = new Map<string, Running>();

  add(name: string, program: Running): void {
    this.#running.set(name, program);
  }

  /** Kills it and what it started, and waits for its end. */
  async end(name: string): Promise<void> {
    const program = this.#running.get(name);
    this.#running.delete(name);
    program?.killGroup();
    await program?.exited;
  }

  async endAll(): Promise<void> {
    await Promise.all([...this.#running.keys()].map((name) => this.end(name)));
  }

  /**
   * Like `waitUntil`, but fails at once when one of the programs has ended. The error has the last lines of that one's log,
   * or of all when the time ran out.
   */
  async waitFor<T>(
    what: string,
    probe: () => T | Promise<T>,
    deadlineMs: number,
  ): Promise<Exclude<T, false | null | undefined>> {
    let dead: string | undefined;
    const outcome = await waitUntil(
      async () => {
        dead = [...this.#running].find(([, program]) => !program.running)?.[0];
        return dead === undefined ? probe() : 'dead';
      },
      { deadlineMs, what, everyMs: POLL_MS },
    ).catch((error: unknown) => {
      const said = [...this.#running.keys()].map((name) => this.#tail(name));
      throw new Error(`${error instanceof Error ? error.message : error}\n${said.join('\n')}`);
    });
    if (dead !== undefined) throw new Error(`${dead} ended while waiting for ${what}:\n${this.#tail(dead)}`);
    // Only a dead program makes it that word, and there was none.
    return outcome as Exclude<T, false | null | undefined>;
  }

  #tail(name: string): string {
    const program = this.#running.get(name);
    const said = program === undefined ? [] : [...program.lines, ...program.errors].slice(-TAIL_LINES);
    return [`--- ${name}:`, ...(said.length > 0 ? said : ['(it said nothing)'])].join('\n');
  }
}
