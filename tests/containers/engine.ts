/**
 * Docker for tests: the engine that `tests/lab/engine.sh run` brought, and further ones that play a VPS each.
 *
 * Containers made through here are removed with `await using`, also when a test fails. Engines of our own have no network to
 * the outside, and their containers no way to the host's loopback: look into one from its namespaces (`Container.enter`).
 */
import { execFile } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { PassThrough } from 'node:stream';
import { promisify } from 'node:util';
import Docker from 'dockerode';
import { waitUntil } from '../lab/netns.ts';

const run = promisify(execFile);
const script = join(import.meta.dirname, '../lab/engine.sh');

/** The flags both images are made to run with (docs, "privileges"): root with one capability and nothing else. */
export const LEAST_PRIVILEGE: Docker.HostConfig = {
  CapDrop: ['ALL'],
  CapAdd: ['NET_ADMIN'],
  ReadonlyRootfs: true,
  SecurityOpt: ['no-new-privileges'],
  Tmpfs: { '/run': '' },
};

/** Marks what this test run made: the engine may be the user's own, with containers of theirs. */
const OURS = { name: 'detour.test', value: `${process.pid}` } as const;

export type ContainerSpec = {
  readonly image: string;
  readonly name?: string;
  readonly command?: readonly string[];
  readonly entrypoint?: readonly string[];
  readonly env?: Readonly<Record<string, string>>;
  readonly host?: Docker.HostConfig;
};

export type Output = { readonly code: number; readonly stdout: string; readonly stderr: string };

/** A container that is removed, running or not, when it leaves its scope. */
export class Container implements AsyncDisposable {
  readonly docker: Docker.Container;
  readonly #init: string;

  constructor(docker: Docker.Container, init: string) {
    this.docker = docker;
    this.#init = init;
  }

  /** Runs a command inside and waits for its end. It may fail; the caller looks at `code`. */
  async exec(...command: readonly string[]): Promise<Output> {
    const exec = await this.docker.exec({ Cmd: [...command], AttachStdout: true, AttachStderr: true });
    const output = await collect(await exec.start({ hijack: true, stdin: false }), this.docker);
    const { ExitCode } = await exec.inspect();
    return { ...output, code: ExitCode ?? -1 };
  }

  /** Runs a program of this machine inside the container's network namespace: the image has no tools of its own. */
  async enter(...command: readonly string[]): Promise<string> {
    const { stdout } = await run('nsenter', [`--net=${await this.networkNamespace()}`, '--', ...command]);
    return stdout;
  }

  /** Path of the network namespace, to be opened from this machine whatever pid namespace the engine lives in. */
  async networkNamespace(): Promise<string> {
    const { State } = await this.docker.inspect();
    if (!State.Running)
      throw new Error(`container ${this.docker.id.slice(0, 12)} is not running:\n${await this.logs()}`);
    return `/proc/${this.#init}/root/proc/${State.Pid}/ns/net`;
  }

  /** Everything it has printed so far, both streams; or since a time, seconds since 1970. */
  async logs(since = 0): Promise<string> {
    const raw = await this.docker.logs({ stdout: true, stderr: true, follow: false, since });
    return undo(raw);
  }

  /** SIGTERM, then SIGKILL after `seconds`. Its exit status and how long that took. */
  async stop(seconds: number): Promise<{ code: number; ms: number }> {
    const before = performance.now();
    await this.docker.stop({ t: seconds });
    const ms = performance.now() - before;
    const { State } = await this.docker.inspect();
    return { code: State.ExitCode, ms };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.docker.remove({ force: true, v: true }).catch((error: { statusCode?: number }) => {
      if (error.statusCode !== 404) throw error;
    });
  }
}

/** A Docker engine, ready to be asked. */
export class Engine {
  /** The whole API, for what has no shorter name here. */
  readonly docker: Docker;
  /** What DOCKER_HOST must be to reach it; undefined means the default socket. */
  readonly host: string | undefined;
  readonly #init: string;

  constructor(host: string | undefined, init: string) {
    this.host = host;
    this.docker = host === undefined ? new Docker() : new Docker({ socketPath: socketOf(host) });
    this.#init = init;
  }

  /** Creates and starts a container. */
  async start(spec: ContainerSpec): Promise<Container> {
    const container = await this.docker.createContainer({
      Image: spec.image,
      ...(spec.name === undefined ? {} : { name: spec.name }),
      ...(spec.command === undefined ? {} : { Cmd: [...spec.command] }),
      ...(spec.entrypoint === undefined ? {} : { Entrypoint: [...spec.entrypoint] }),
      Env: Object.entries(spec.env ?? {}).map(([name, value]) => `${name}=${value}`),
      Labels: { [OURS.name]: OURS.value },
      HostConfig: spec.host ?? {},
    });
    const started = this.container(container);
    try {
      await container.start();
    } catch (error) {
      await started[Symbol.asyncDispose]();
      throw error;
    }
    return started;
  }

  /** A container that was made by other means. */
  container(docker: Docker.Container): Container {
    return new Container(docker, this.#init);
  }

  /** Runs a container to its end and gives what it printed. */
  async run(spec: ContainerSpec): Promise<Output> {
    await using container = await this.start(spec);
    const { StatusCode } = (await container.docker.wait()) as { StatusCode: number };
    const raw = await container.docker.logs({ stdout: true, stderr: true, follow: false });
    return { code: StatusCode, ...split(raw) };
  }

  /** Containers that run and carry all of these labels. */
  async labelled(labels: Readonly<Record<string, string>>): Promise<Container[]> {
    const label = Object.entries(labels).map(([name, value]) => `${name}=${value}`);
    const found = await this.docker.listContainers({ filters: { label } });
    return found.map(({ Id }) => this.container(this.docker.getContainer(Id)));
  }

  /** Names of containers that this test run made and has not removed. */
  async leftovers(): Promise<string[]> {
    const found = await this.docker.listContainers({
      all: true,
      filters: { label: [`${OURS.name}=${OURS.value}`] },
    });
    return found.flatMap(({ Names }) => Names);
  }

  /** Bytes that `docker save IMAGE` yields: to count them, compress them, or load them into another engine. */
  async save(image: string): Promise<NodeJS.ReadableStream> {
    return this.docker.getImage(image).get();
  }

  /** Copies an image of `source` into this engine. */
  async load(image: string, source: Engine): Promise<void> {
    const progress = await this.docker.loadImage(await source.save(image));
    await new Promise<void>((resolve, reject) => {
      this.docker.modem.followProgress(progress, (error) => (error === null ? resolve() : reject(error)));
    });
  }
}

/** The engine this test run was given: DOCKER_HOST, or the default socket. Fails with the remedy when none answers. */
export async function engine(): Promise<Engine> {
  const host = process.env['DOCKER_HOST'];
  const found = new Engine(host, process.env['LAB_ENGINE_INIT'] ?? '1');
  try {
    await found.docker.ping();
  } catch (error) {
    throw new Error('no Docker engine answers: run `make test-containers`, or tests/lab/engine.sh run -- COMMAND', {
      cause: error,
    });
  }
  return found;
}

/** A second engine, which plays that of another machine. See `vps`. */
export class Vps extends Engine implements AsyncDisposable {
  readonly #state: string;
  readonly #start: readonly string[];
  /** Pid 1 of the engine's pid namespace, as this machine counts. */
  readonly #first: number;
  #killed = false;

  private constructor(host: string, state: string, start: readonly string[]) {
    const init = readFileSync(join(state, 'init'), 'utf8').trim();
    super(host, init);
    this.#state = state;
    this.#start = start;
    this.#first = Number(init);
  }

  /** Starts `engine.sh start` with these arguments, on the store in `state`. */
  static async start(state: string, start: readonly string[]): Promise<Vps> {
    const { stdout } = await run(script, ['start', '--state', state, ...start]);
    return new Vps(stdout.trim(), state, start);
  }

  /** The command line that runs a program beside the engine: in its mount and pid namespaces, and in the caller's network. */
  beside(...command: readonly string[]): string[] {
    return ['nsenter', `--target=${this.#first}`, '--mount', '--pid', '--wd=/', '--', ...command];
  }

  /** As when its machine loses power: on return no process of it, its containers or what ran beside it is left; the store is. */
  async kill(): Promise<void> {
    // The second time, its pid may be another's.
    if (this.#killed) return;
    this.#killed = true;
    if (existsSync(`/proc/${this.#first}`)) process.kill(this.#first, 'SIGKILL');
    // The kernel lets the first process of a pid namespace go when all the others are gone.
    await waitUntil(() => !existsSync(`/proc/${this.#first}`), { deadlineMs: 30_000, what: 'the engine to be gone' });
  }

  /** The engine anew, on the store of the one that was killed. */
  restart(): Promise<Vps> {
    return Vps.start(this.#state, this.#start);
  }

  /** Stops it, and deletes its store. */
  async [Symbol.asyncDispose](): Promise<void> {
    await run(script, ['stop', '--state', this.#state, '--purge']);
    if (existsSync(this.#state)) throw new Error(`the engine in ${this.#state} left its store behind`);
  }
}

/**
 * A second engine inside network namespace `netns`: a VPS whose host network is that namespace. ip_forward is off before it
 * starts, so Docker switches it on and sets FORWARD to DROP, by the flavour of iptables asked for. Whatever it put into the
 * namespace's rules stays there until the namespace goes. `flags` are further ones for dockerd. Needs root.
 */
export async function vps(
  netns: string,
  flavour: 'nft' | 'legacy' = 'nft',
  flags: readonly string[] = [],
): Promise<Vps> {
  const state = mkdtempSync(join(tmpdir(), 'detour-vps-'));
  try {
    return await Vps.start(state, ['--netns', netns, '--iptables', flavour, '--', ...flags]);
  } catch (error) {
    rmSync(state, { recursive: true, force: true });
    throw error;
  }
}

function socketOf(host: string): string {
  if (!host.startsWith('unix://')) throw new Error(`tests talk to an engine of this machine, not to ${host}`);
  return host.slice('unix://'.length);
}

/** Docker frames both streams of a container into one: 1 byte stream, 3 zero, 4 length (Engine API, "attach"). */
function split(raw: Buffer): { stdout: string; stderr: string } {
  const streams: { 1: Buffer[]; 2: Buffer[] } = { 1: [], 2: [] };
  for (let at = 0; at + 8 <= raw.length; ) {
    const length = raw.readUInt32BE(at + 4);
    streams[raw[at] === 2 ? 2 : 1].push(raw.subarray(at + 8, at + 8 + length));
    at += 8 + length;
  }
  return { stdout: Buffer.concat(streams[1]).toString(), stderr: Buffer.concat(streams[2]).toString() };
}

function undo(raw: Buffer): string {
  const { stdout, stderr } = split(raw);
  return stdout + stderr;
}

async function collect(
  stream: NodeJS.ReadWriteStream,
  container: Docker.Container,
): Promise<{ stdout: string; stderr: string }> {
  const texts = [new PassThrough(), new PassThrough()].map((sink) => {
    const chunks: Buffer[] = [];
    sink.on('data', (chunk: Buffer) => chunks.push(chunk));
    return { sink, text: () => Buffer.concat(chunks).toString() };
  });
  const [stdout, stderr] = texts;
  if (stdout === undefined || stderr === undefined) throw new Error('two sinks were made above');
  container.modem.demuxStream(stream, stdout.sink, stderr.sink);
  await new Promise<void>((resolve, reject) => {
    stream.on('end', resolve);
    stream.on('error', reject);
  });
  return { stdout: stdout.text(), stderr: stderr.text() };
}
