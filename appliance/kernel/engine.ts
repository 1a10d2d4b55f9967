import { createInterface } from 'node:readline';
import Docker from 'dockerode';

/** The Docker engine of this host, as far as it knows who runs in which network namespace. Only reads. */

/** A running container. */
export type EngineContainer = {
  readonly id: string;
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
  /** Of its first process, in the pid namespace of the engine. */
  readonly pid: number;
  /** Another one for each time that it is started; milliseconds since 1970. */
  readonly startedAt: number;
  readonly network: ContainerNetwork;
};

/** Whose network a container uses. */
export type ContainerNetwork =
  /** Its own, kept by this file. */
  | { readonly kind: 'own'; readonly sandbox: string }
  /** That of another container, by its id. */
  | { readonly kind: 'joined'; readonly container: string }
  | { readonly kind: 'host' };

export type EngineEvent = { readonly id: string; readonly what: 'started' | 'ended' };

export type Engine = {
  /** Ids of the running containers that have a label of that name. @throws Error */
  list(label: string): Promise<readonly string[]>;
  /** Null when it does not run (any more). @throws Error when the engine does not answer */
  inspect(id: string): Promise<EngineContainer | null>;
  /**
   * Hears of starts and ends of containers with that label, from when this resolves until `signal` or the engine ends it; then
   * `ended` resolves, saying why.
   * @throws Error
   */
  follow(
    label: string,
    each: (event: EngineEvent) => void,
    signal: AbortSignal,
  ): Promise<{ readonly ended: Promise<string> }>;
};

/** A socket that takes the question and says nothing, or breaks off in the middle of the answer: the library would wait for ever. */
const DEADLINE_MS = 10_000;
const NOT_FOUND = 404;

/** What failed requests carry: a status of the engine's, or a code of a system call. */
type Failure = { readonly statusCode?: number; readonly code?: string; readonly message?: string };

const isGone = (error: unknown): boolean => (error as Failure | null)?.statusCode === NOT_FOUND;

/** The engine at a unix socket. @param socketPath absolute */
export function dockerEngine(socketPath: string, deadlineMs = DEADLINE_MS): Engine {
  const docker = new Docker({ socketPath });

  /** Asks something that has to be answered soon. */
  async function ask<T>(question: () => Promise<T>): Promise<T> {
    const late = Promise.withResolvers<never>();
    const timer = setTimeout(() => late.reject(new Error('it does not answer in time')), deadlineMs).unref();
    try {
      return await Promise.race([question(), late.promise]);
    } catch (error) {
      throw new Error(reasonOf(error, socketPath), { cause: error });
    } finally {
      clearTimeout(timer);
    }
  }

  return {
    list: (label) =>
      ask(async () => {
        // A paused one still has its connections.
        const filters = { label: [label], status: ['running', 'paused'] };
        return (await docker.listContainers({ filters })).map(({ Id }) => Id);
      }),
    inspect: (id) =>
      ask(async () => {
        try {
          return readContainer(await docker.getContainer(id).inspect());
        } catch (error) {
          if (isGone(error)) return null;
          throw error;
        }
      }),
    async follow(label, each, signal) {
      const filters = { type: ['container' as const], label: [label], event: ['start', 'die'] };
      // The library knows `abortSignal` here, too; its types do not, hence a variable.
      const options = { filters, abortSignal: signal };
      const stream = await ask(() => docker.getEvents(options));
      const { promise: ended, resolve } = Promise.withResolvers<string>();
      stream.on('error', (error) => resolve(reasonOf(error, socketPath)));
      stream.on('close', () => resolve('the engine ended the conversation'));
      createInterface({ input: stream }).on('line', (line) => {
        const event = readEvent(line);
        if (event && !signal.aborted) each(event);
      });
      return { ended };
    },
  };
}

function readContainer(answer: Docker.ContainerInspectInfo): EngineContainer | null {
  const { Id, Name, State, Config, NetworkSettings, HostConfig } = answer;
  if (!State.Running) return null;
  const mode = HostConfig.NetworkMode ?? '';
  const joined = /^container:(.+)$/.exec(mode)?.[1];
  return {
    id: Id,
    name: Name.replace(/^\//, ''),
    labels: Config.Labels ?? {},
    pid: State.Pid,
    startedAt: Date.parse(State.StartedAt),
    network:
      joined !== undefined
        ? { kind: 'joined', container: joined }
        : mode === 'host'
          ? { kind: 'host' }
          : { kind: 'own', sandbox: NetworkSettings.SandboxKey },
  };
}

/** One line of the engine's event stream; null for anything else. */
function readEvent(line: string): EngineEvent | null {
  try {
    const { Action, Actor } = JSON.parse(line) as { Action?: unknown; Actor?: { ID?: unknown } };
    if (typeof Actor?.ID !== 'string') return null;
    if (Action === 'start') return { id: Actor.ID, what: 'started' };
    return Action === 'die' ? { id: Actor.ID, what: 'ended' } : null;
  } catch {
    return null;
  }
}

function reasonOf(error: unknown, socketPath: string): string {
  const { code, statusCode, message } = error as Failure;
  if (code === 'ENOENT')
    return `there is no ${socketPath}: mount it (docker: -v /var/run/docker.sock:/var/run/docker.sock), or name it in DOCKER_HOST`;
  if (code === 'EACCES' || code === 'EPERM') return `${socketPath} may not be opened: run as root, or as its group`;
  if (code === 'ECONNREFUSED') return `no engine listens at ${socketPath}`;
  if (statusCode !== undefined) return `the engine answers with status ${statusCode}`;
  return code ?? message ?? 'the engine does not answer';
}
