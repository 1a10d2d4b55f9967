/** The real daemons, from the real bundle, on hosts of a lab. Needs `make build`. */
import { randomBytes } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdtemp, rm, writeFile } from 'node:fs/promises';
import { request } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { type Exit, type Host, type Running, waitUntil } from './netns.ts';

const BUNDLE = join(import.meta.dirname, '../../dist/detour.js');
const READY_DEADLINE_MS = 15_000;

/** A fresh `keyid:secret`. */
export function newKey(): string {
  return `${randomBytes(4).toString('hex')}:${randomBytes(32).toString('base64url')}`;
}

/** A running daemon. Its folder (socket, key file) goes when it is disposed of. */
export class Daemon implements AsyncDisposable {
  readonly host: Host;
  readonly role: 'router' | 'client';
  readonly env: Readonly<Record<string, string>>;
  readonly #folder: string;
  #program: Running;

  private constructor(host: Host, role: 'router' | 'client', env: Record<string, string>, folder: string) {
    this.host = host;
    this.role = role;
    this.env = env;
    this.#folder = folder;
    this.#program = this.#spawn();
  }

  /**
   * Starts a daemon with these variables and returns when it says that it is ready (unless `ready` is false). Keys are
   * handed over in a file, as users should.
   */
  static async start(
    host: Host,
    role: 'router' | 'client',
    options: { readonly keys: string; readonly env?: Readonly<Record<string, string>>; readonly ready?: boolean },
  ): Promise<Daemon> {
    if (!existsSync(BUNDLE)) throw new Error('dist/detour.js is missing: run make build');
    const folder = await mkdtemp(join(tmpdir(), 'detour-lab-'));
    const keyFile = join(folder, 'keys');
    await writeFile(keyFile, `${options.keys}\n`, { mode: 0o600 });
    const env = {
      [role === 'router' ? 'DETOUR_KEYS_FILE' : 'DETOUR_KEY_FILE']: keyFile,
      DETOUR_SOCKET: join(folder, `${role}.sock`),
      ...options.env,
    };
    const daemon = new Daemon(host, role, env, folder);
    try {
      if (options.ready !== false) await daemon.ready();
    } catch (error) {
      await daemon[Symbol.asyncDispose]();
      throw error;
    }
    return daemon;
  }

  get program(): Running {
    return this.#program;
  }

  /** Runs a sub-command of the program beside the daemon, with the daemon's variables. */
  cli(...command: string[]): Promise<string> {
    return this.host.exec([process.execPath, BUNDLE, ...command], { env: this.env });
  }

  /** What `detour status --json` says; the caller knows which fields it wants. */
  async status<T>(): Promise<T> {
    return JSON.parse(await ask(this.env['DETOUR_SOCKET'] ?? '', '/v1/status'));
  }

  /** Waits until the daemon says that it can do its work. */
  async ready(deadlineMs = READY_DEADLINE_MS): Promise<void> {
    try {
      await waitUntil(
        async () => {
          if (!this.#program.running) return true;
          await this.cli('healthcheck', '--ready');
          return true;
        },
        { deadlineMs, what: `the ${this.role} on ${this.host.name} to be ready`, everyMs: 50 },
      );
      if (!this.#program.running) throw new Error(`the ${this.role} on ${this.host.name} ended`);
    } catch (error) {
      const said = [...this.#program.lines.slice(-15), ...this.#program.errors.slice(-15)].join('\n');
      throw new Error(`${error instanceof Error ? error.message : error}; its log:\n${said}`);
    }
  }

  /** Starts it again with the same settings, after stop(). Does not wait for readiness. */
  restart(): void {
    if (this.#program.running) throw new Error(`the ${this.role} on ${this.host.name} still runs`);
    this.#program = this.#spawn();
  }

  /** Ends it (default SIGTERM) and waits until it has ended. */
  stop(signal: NodeJS.Signals = 'SIGTERM'): Promise<Exit> {
    return this.#program.stop(signal, 15_000);
  }

  /** Resident memory, bytes (VmRSS of proc(5)). */
  async residentBytes(): Promise<number> {
    const text = await this.host.exec(['cat', `/proc/${this.#program.pid}/status`]);
    return Number(/^VmRSS:\s+(\d+) kB/m.exec(text)?.[1]) * 1024;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#program.running) await this.stop();
    await rm(this.#folder, { recursive: true, force: true });
  }

  #spawn(): Running {
    return this.host.spawn([process.execPath, BUNDLE, this.role], { env: this.env });
  }
}

/** GET over a unix socket, which is in no network namespace. */
export function ask(socketPath: string, path: string): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  const query = request({ socketPath, path, timeout: 5_000 }, (response) => {
    let text = '';
    response.setEncoding('utf8');
    response.on('data', (chunk: string) => {
      text += chunk;
    });
    response.on('end', () => resolve(text));
  });
  query.on('error', reject);
  query.on('timeout', () => query.destroy(new Error('no answer in 5 s')));
  query.end();
  return promise;
}
