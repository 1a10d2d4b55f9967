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
  /** Another one for each time that it is started. */
  readonly startedAt: string;
  /** The file that keeps its network namespace; null when that is not its own. */
  readonly sandbox: string | null;
  /** The id or name of the container whose network it joined; null when none. */
  readonly joined: string | null;
};

export type EngineEvent = { readonly id: string; readonly what: 'started' | 'ended' };

export type Engine = {
  /** Ids of the running containers that have a label of that name. @throws Error */
  list(label: string): Promise<readonly string[]>;
  /** Null when it does not run (any more). @throws Error when the engine does not answer */
  inspect(id: string): Promise<EngineContainer | null>;
  /**
   * Hears of starts and ends of containers with that label, from when this resolves. `ended` is told, once, when the engine
   * says no more; `close` ends it without telling.
   * @throws Error
   */
  follow(
    label: string,
    each: (event: EngineEvent) => void,
    ended: (why: string) => void,
  ): Promise<{ readonly close: () => void }>;
};

/** A socket that takes the question and says nothing. */
const DEADLINE_MS = 10_000;
const NOT_FOUND = 404;

type Failure = { readonly statusCode?: number; readonly code?: string; readonly message?: string };

const isGone = (error: unknown): boolean => (error as Failure | null)?.statusCode === NOT_FOUND;

/** The engine at a unix socket. @param socketPath absolute */
export function dockerEngine(socketPath: string): Engine {
  const docker = new Docker({ socketPath, timeout: DEADLINE_MS });
  // Of its own, without a deadline: events may be rare.
  const patient = new Docker({ socketPath });
  const explained = async <T>(task: () => Promise<T>): Promise<T> => {
    try {
      return await task();
    } catch (error) {
      throw new Error(reasonOf(error, socketPath), { cause: error });
    }
  };
  return {
    list: (label) =>
      explained(async () => {
        const found = await docker.listContainers({ filters: { label: [label], status: ['running'] } });
        return found.map(({ Id }) => Id);
      }),
    inspect: (id) =>
      explained(async () => {
        try {
          const { Id, Name, State, Config, NetworkSettings, HostConfig } = await docker.getContainer(id).inspect();
          if (!State.Running) return null;
          const mode = HostConfig.NetworkMode ?? '';
          return {
            id: Id,
            name: Name.replace(/^\//, ''),
            labels: Config.Labels ?? {},
            pid: State.Pid,
            startedAt: State.StartedAt,
            sandbox: NetworkSettings.SandboxKey || null,
            joined: /^container:(.+)$/.exec(mode)?.[1] ?? null,
          };
        } catch (error) {
          if (isGone(error)) return null;
          throw error;
        }
      }),
    follow: (label, each, ended) =>
      explained(async () => {
        const stream = await patient.getEvents({
          filters: { type: ['container'], label: [label], event: ['start', 'die'] },
        });
        let open = true;
        const finish = (why: string): void => {
          if (open) ended(why);
          open = false;
        };
        stream.on('error', (error) => finish(reasonOf(error, socketPath)));
        stream.on('close', () => finish('the engine ended the conversation'));
        createInterface({ input: stream }).on('line', (line) => {
          const event = readEvent(line);
          if (event && open) each(event);
        });
        return {
          close() {
            open = false;
            // The type promises less than what comes: an http.IncomingMessage.
            if ('destroy' in stream && typeof stream.destroy === 'function') stream.destroy();
          },
        };
      }),
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
