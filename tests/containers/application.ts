/** Applications in containers: unmodified Node programs, over Multipath TCP by the library of mptcpize. */
import { existsSync, readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import type Docker from 'dockerode';
import { waitUntil } from '../lab/netns.ts';
import { expectedSha256, type TransferResult } from '../lab/traffic.ts';
import type { Container } from './engine.ts';
import { IMAGE, type Machine } from './machines.ts';

const TRAFFIC = fileURLToPath(new URL('../lab/traffic.ts', import.meta.url));
const SEED = 'detour';

/** Where Debian's package mptcpize has its library, for this machine's architecture. */
function library(): string {
  const found = readdirSync('/usr/lib')
    .map((folder) => `/usr/lib/${folder}/mptcpize/libmptcpwrap.so.0`)
    .find((path) => existsSync(path));
  if (found === undefined) throw new Error('mptcpize is not installed: run tests/lab/host.sh packages lab');
  return found;
}

/** How a container of the client's image sends bytes to a server, at once or when /run/go appears. */
export function sending(to: string, bytes: number, atOnce = false) {
  const program = ['node', '/traffic.ts', 'transfer', '--to', to, '--bytes', `${bytes}`, '--seed', SEED];
  const wait = atOnce ? '' : 'until [ -e /run/go ]; do sleep 0.02; done; ';
  return {
    entrypoint: ['sh', '-c', `${wait}LD_PRELOAD=/wrap.so exec "$@"`, 'application'],
    command: program,
    mounts: [`${TRAFFIC}:/traffic.ts:ro`, `${library()}:/wrap.so:ro`],
  };
}

/** What the server counted, from what such a container printed. @throws when other bytes arrived than were sent, or not all */
export function resultOf(said: string, bytes: number): TransferResult {
  // Compose puts codes for a terminal before each line.
  const line = /\{"event":"done".*/.exec(said)?.[0];
  if (line === undefined) throw new Error(`the application did not get to its end: ${said}`);
  const result: TransferResult = JSON.parse(line);
  if (result.sha256 !== expectedSha256(SEED, bytes)) throw new Error('other bytes arrived than were sent');
  return result;
}

export type ApplicationSpec = {
  readonly name: string;
  /** `10.0.0.2:5000` */
  readonly to: string;
  readonly bytes: number;
  readonly labels?: Readonly<Record<string, string>>;
  readonly host?: Docker.HostConfig;
  /** Connects at once, and not when it is told to. */
  readonly atOnce?: boolean;
};

/** A container that sends some bytes to a server, each time that it is started. */
export class Application implements AsyncDisposable {
  readonly container: Container;
  readonly #bytes: number;

  private constructor(container: Container, bytes: number) {
    this.container = container;
    this.#bytes = bytes;
  }

  static async start(machine: Machine, spec: ApplicationSpec): Promise<Application> {
    const { name, to, bytes, labels = {}, host = {}, atOnce } = spec;
    const { entrypoint, command, mounts } = sending(to, bytes, atOnce);
    const container = await machine.launch({
      name,
      Image: IMAGE.client,
      Labels: { ...labels },
      Entrypoint: entrypoint,
      Cmd: command,
      HostConfig: { Binds: mounts, Tmpfs: { '/run': '' }, Init: true, ...host },
    });
    return new Application(container, bytes);
  }

  /** Lets it connect. */
  async go(): Promise<void> {
    const { code, stderr } = await this.container.exec('touch', '/run/go');
    if (code !== 0) throw new Error(`the application cannot be told to go: ${stderr}`);
  }

  /** Waits until it has connected since its latest start. */
  async connected(): Promise<void> {
    await waitUntil(async () => (await this.#said()).includes('"connected"'), {
      deadlineMs: 20_000,
      what: 'the application to connect',
      everyMs: 50,
    });
  }

  /** What the server counted, once everything has arrived as it was sent. */
  async result(): Promise<TransferResult> {
    await this.container.docker.wait();
    return resultOf(await this.#said(), this.#bytes);
  }

  /** Since its latest start. */
  async #said(): Promise<string> {
    const { StartedAt } = (await this.container.docker.inspect()).State;
    return this.container.logs(Date.parse(StartedAt) / 1000);
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.container[Symbol.asyncDispose]();
  }
}
