import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { renameSync } from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';

/** A container as the engine tells of it. */
export type FakeContainer = {
  readonly id: string;
  readonly name: string;
  labels: Readonly<Record<string, string>>;
  /** HostConfig.NetworkMode: `bridge`, `host`, `none`, `container:ID`. */
  readonly mode: string;
  /** NetworkSettings.SandboxKey of one with a network of its own. */
  sandbox: string;
  pid: number;
  state: 'running' | 'paused' | 'restarting' | 'exited';
  startedAt: Date;
};

/** What becomes of a question: an answer, half an answer, a status, or nothing at all. */
export type Manners = 'answers' | 'breaks off' | 'is silent' | number;

type Filters = Readonly<Record<string, readonly string[] | undefined>>;

/**
 * As much of the Docker Engine API as the agent uses, on a unix socket: GET /containers/json, /containers/ID/json and /events. What it
 * says was recorded from engine 20.10 and cut to what somebody could look at.
 */
export class FakeDocker implements AsyncDisposable {
  readonly path: string;
  readonly containers = new Map<string, FakeContainer>();
  /** Paths of all questions so far. */
  readonly asked: string[] = [];
  manners: (path: string) => Manners = () => 'answers';
  #server: Server | null = null;
  readonly #followers = new Set<{ readonly response: ServerResponse; readonly filters: Filters }>();
  #clock = Date.parse('2026-01-01T00:00:00Z');

  constructor(path: string) {
    this.path = path;
  }

  async open(): Promise<void> {
    this.#server = createServer((request, response) => this.#answer(request, response)).listen(this.path);
    await once(this.#server, 'listening');
  }

  /** As when the engine is stopped: conversations break. When it was killed it leaves the socket's file behind. */
  async shut(leaveFile = false): Promise<void> {
    const server = this.#server;
    if (!server) return;
    this.#server = null;
    this.#followers.clear();
    // Node removes the file by its name when it closes the socket.
    const aside = `${this.path}.aside`;
    if (leaveFile) renameSync(this.path, aside);
    server.closeAllConnections();
    await new Promise<void>((resolve) => server.close(() => resolve()));
    if (leaveFile) renameSync(aside, this.path);
  }

  /** How many listen to events. */
  get followers(): number {
    return this.#followers.size;
  }

  /** A container is created and started. */
  run(spec: Partial<Pick<FakeContainer, 'name' | 'labels' | 'mode' | 'sandbox' | 'pid'>> = {}): FakeContainer {
    const id = randomBytes(32).toString('hex');
    const container: FakeContainer = {
      id,
      name: `c${this.containers.size}`,
      labels: { 'detour.enable': 'true' },
      mode: 'bridge',
      sandbox: `/var/run/docker/netns/${id.slice(0, 12)}`,
      pid: 1000 + this.containers.size,
      ...spec,
      state: 'exited',
      startedAt: new Date(0),
    };
    this.containers.set(id, container);
    this.start(container);
    return container;
  }

  /** It is started, for the first time or again. `quietly`: nobody hears of it. */
  start(container: FakeContainer, quietly = false): void {
    this.#clock += 1_000;
    container.startedAt = new Date(this.#clock);
    container.state = 'running';
    if (!quietly) this.tell('start', container);
  }

  /** It ends. */
  end(container: FakeContainer, quietly = false): void {
    container.state = 'exited';
    if (!quietly) this.tell('die', container);
  }

  /** An event about a container, whatever its state. */
  tell(action: string, { id, name, labels }: FakeContainer): void {
    const event = {
      status: action,
      id,
      from: 'image',
      Type: 'container',
      Action: action,
      Actor: { ID: id, Attributes: { ...labels, image: 'image', name } },
      scope: 'local',
      time: Math.floor(this.#clock / 1000),
      timeNano: this.#clock * 1e6,
    };
    for (const { response, filters } of this.#followers) {
      const wanted = filters['event']?.includes(action) !== false && hasLabels(labels, filters);
      if (wanted) response.write(`${JSON.stringify(event)}\n`);
    }
  }

  /** A line in every event stream. */
  say(line: string): void {
    for (const { response } of this.#followers) response.write(`${line}\n`);
  }

  /** The event streams end, as in an engine that drops slow listeners; the engine lives. */
  dropFollowers(): void {
    for (const { response } of this.#followers) response.destroy();
    this.#followers.clear();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.shut();
  }

  #answer(request: IncomingMessage, response: ServerResponse): void {
    const url = new URL(request.url ?? '', 'http://engine');
    this.asked.push(url.pathname);
    const manners = this.manners(url.pathname);
    if (manners === 'is silent') return;
    if (typeof manners === 'number') {
      json(response, manners, { message: 'the engine has a problem' });
      return;
    }
    if (manners === 'breaks off') {
      response.writeHead(200, { 'content-type': 'application/json', 'content-length': '1000' });
      response.write('[{', () => response.destroy());
      return;
    }
    const filters: Filters = JSON.parse(url.searchParams.get('filters') ?? '{}');
    const [, id] = /^\/containers\/([^/]+)\/json$/.exec(url.pathname) ?? [];
    if (url.pathname === '/containers/json') json(response, 200, this.#list(filters));
    else if (url.pathname === '/events') this.#follow(response, filters);
    else if (id !== undefined) this.#inspect(response, decodeURIComponent(id));
    else json(response, 404, { message: 'page not found' });
  }

  #list(filters: Filters): object[] {
    return [...this.containers.values()]
      .filter(({ labels, state }) => filters['status']?.includes(state) !== false && hasLabels(labels, filters))
      .map(({ id, name, labels, mode, state }) => ({
        Id: id,
        Names: [`/${name}`],
        Image: 'image',
        Labels: labels,
        State: state,
        Status: 'Up 2 seconds',
        HostConfig: { NetworkMode: mode },
      }));
  }

  #inspect(response: ServerResponse, idOrName: string): void {
    const found = this.containers.get(idOrName) ?? [...this.containers.values()].find(({ name }) => name === idOrName);
    if (!found) {
      json(response, 404, { message: `No such container: ${idOrName}` });
      return;
    }
    const { id, name, labels, mode, sandbox, pid, state, startedAt } = found;
    const running = state !== 'exited';
    const own = mode !== 'host' && !mode.startsWith('container:');
    json(response, 200, {
      Id: id,
      Name: `/${name}`,
      State: {
        Status: state,
        Running: running,
        Paused: state === 'paused',
        Restarting: state === 'restarting',
        Pid: running && state !== 'restarting' ? pid : 0,
        ExitCode: 0,
        // Nanoseconds, of which the engine leaves out closing zeros.
        StartedAt: startedAt.toISOString().replace(/\.?0*Z$/, 'Z'),
      },
      Config: { Image: 'image', Labels: labels },
      HostConfig: { NetworkMode: mode },
      NetworkSettings: {
        SandboxKey: mode === 'host' ? '/var/run/docker/netns/default' : own && running ? sandbox : '',
      },
    });
  }

  #follow(response: ServerResponse, filters: Filters): void {
    response.writeHead(200, { 'content-type': 'application/json' });
    response.flushHeaders();
    const follower = { response, filters };
    this.#followers.add(follower);
    response.once('close', () => this.#followers.delete(follower));
  }
}

/** `label` filters name a label, or a label and its value. */
function hasLabels(labels: Readonly<Record<string, string>>, filters: Filters): boolean {
  return (filters['label'] ?? []).every((wanted) => {
    const [name = '', value] = wanted.split('=');
    return name in labels && (value === undefined || labels[name] === value);
  });
}

function json(response: ServerResponse, status: number, body: object): void {
  response.writeHead(status, { 'content-type': 'application/json' });
  response.end(`${JSON.stringify(body)}\n`);
}
