import Docker from 'dockerode';
import { linesOf } from './lines.ts';

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

export type Engine = {
  /** Ids of the running containers that have a label of that name. @throws Error */
  list(label: string): Promise<readonly string[]>;
  /** Null when it does not run (any more). @throws Error when the engine does not answer */
  inspect(id: string): Promise<EngineContainer | null>;
  /**
   * Hears the ids of containers with that label that started or ended, from when this resolves until `signal` or the engine ends
   * it; then `ended` resolves, saying why.
   * @throws Error
   */
  follow(label: string, each: (id: string) => void, signal: AbortSignal): Promise<{ readonly ended: Promise<string> }>;
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
      const listen = async (): Promise<string> => {
        try {
          for await (const line of linesOf(stream)) {
            const id = idIn(line);
            if (id !== null && !signal.aborted) each(id);
          }
          return 'the engine ended the conversation';
        } catch (error) {
          return reasonOf(error, socketPath);
        }
      };
      return { ended: listen() };
    },
  };
}

function readContainer(answer: Docker.ContainerInspectInfo): EngineContainer | null {
  const { Id, Name, State, Config, NetworkSettings, HostConfig } = answer;
  // While it waits to be started again, the engine says that it runs.
  if (!State.Running || State.Restarting) return null;
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

/** The container that a line of the engine's event stream is about; null for anything else. */
function idIn(line: string): string | null {
  try {
    const { Actor } = JSON.parse(line) as { Actor?: { ID?: unknown } };
    return typeof Actor?.ID === 'string' ? Actor.ID : null;
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
