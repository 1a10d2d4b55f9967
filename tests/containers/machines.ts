/**
 * Hosts of a lab with a Docker engine on each, so that `--network host` there means that host, as on a VPS, and the
 * daemons in containers with the flags of the documentation.
 */
import type Docker from 'dockerode';
import { type Host, waitUntil } from '../lab/netns.ts';
import { type Container, type Engine, engine, LEAST_PRIVILEGE, type Output, vps } from './engine.ts';

export type Role = 'router' | 'client';

/** What the compose files and the Dockerfiles say about running each image on a host. */
export const DOCUMENTED: Readonly<Record<Role, Docker.HostConfig>> = {
  router: { ...LEAST_PRIVILEGE, NetworkMode: 'host' },
  client: {
    ...LEAST_PRIVILEGE,
    NetworkMode: 'host',
    Binds: ['/proc/sys/net/mptcp:/host/proc/sys/net/mptcp'],
  },
};
/** What docs/workloads.md says about serving the containers of a Docker host and the pods of a node, each mode with what it takes. */
const SERVES: Docker.HostConfig = { ...DOCUMENTED.client, CapAdd: ['NET_ADMIN', 'SYS_ADMIN'] };
/** All of net: a folder of it is that of one namespace (docs/kernel-notes.md). */
const PARAMETERS = '/proc/sys/net:/host/proc/sys/net';
const ENGINE = '/var/run/docker.sock:/var/run/docker.sock';
export const SERVING = {
  /** By the files that the engine keeps of its containers' namespaces. */
  sandboxes: { ...SERVES, Binds: [PARAMETERS, ENGINE, '/var/run/docker/netns:/var/run/docker/netns:ro,rslave'] },
  /** By the processes of the host. */
  processes: {
    ...SERVES,
    CapAdd: ['NET_ADMIN', 'SYS_ADMIN', 'SYS_PTRACE'],
    PidMode: 'host',
    Binds: [PARAMETERS, ENGINE],
  },
} as const satisfies Readonly<Record<string, Docker.HostConfig>>;
export const IMAGE: Readonly<Record<Role, string>> = { router: 'detour-router:dev', client: 'detour-client:dev' };

/** The default of DETOUR_HTTP. */
const HTTP_PORT: Readonly<Record<Role, number>> = { router: 9467, client: 9468 };
const READY_DEADLINE_MS = 30_000;
/** Docker's own default before it kills. */
const STOP_SECONDS = 10;

/** A host with an engine; the engine ends and its store goes with it. Dispose of it before the lab. */
export class Machine implements AsyncDisposable {
  readonly host: Host;
  readonly engine: Engine;
  readonly #stop: () => PromiseLike<void>;

  private constructor(host: Host, own: Engine & AsyncDisposable) {
    this.host = host;
    this.engine = own;
    this.#stop = () => own[Symbol.asyncDispose]();
  }

  /** Starts an engine on the host and copies images into it. */
  static async bring(host: Host, images: readonly string[], flavour: 'nft' | 'legacy' = 'nft'): Promise<Machine> {
    const own = await vps(host.namespace, flavour);
    try {
      const source = await engine();
      for (const image of images) await own.load(image, source);
    } catch (error) {
      await own[Symbol.asyncDispose]();
      throw error;
    }
    return new Machine(host, own);
  }

  /** Creates and starts a container with anything that Docker's API can say. */
  async launch(options: Docker.ContainerCreateOptions): Promise<Container> {
    const created = await this.engine.docker.createContainer(options);
    const container = this.engine.container(created);
    try {
      await created.start();
    } catch (error) {
      await container[Symbol.asyncDispose]();
      throw error;
    }
    return container;
  }

  /** Runs a command in a container on Docker's own bridge whose port 80 is published as `port` of the host. */
  publish(port: number, entrypoint: readonly string[]): Promise<Container> {
    return this.launch({
      Image: IMAGE.router,
      Entrypoint: [...entrypoint],
      Cmd: [],
      // PortBindings alone publish nothing.
      ExposedPorts: { '80/tcp': {} },
      HostConfig: { PortBindings: { '80/tcp': [{ HostPort: String(port) }] } },
    });
  }

  /** Gives Docker's bridge the addresses that it has from its first container on, so that a host can be compared with itself. */
  async bridged(): Promise<void> {
    await this.engine.run({ image: IMAGE.client, command: ['version'] });
    await waitUntil(
      async () => {
        const addresses = await this.host.exec(['ip', '-oneline', '-6', 'address', 'show', 'docker0']);
        return addresses.includes('inet6 fe80::') && !addresses.includes('tentative');
      },
      { deadlineMs: 10_000, what: "the bridge's own address" },
    );
  }

  [Symbol.asyncDispose](): PromiseLike<void> {
    return this.#stop();
  }
}

/** The program in a container of a machine's host network. */
export class ContainedDaemon implements AsyncDisposable {
  readonly machine: Machine;
  readonly role: Role;
  readonly container: Container;

  /** For a container that was started by other means; `start` is the usual way. */
  constructor(machine: Machine, role: Role, container: Container) {
    this.machine = machine;
    this.role = role;
    this.container = container;
  }

  /** Starts it with the documented flags (or `host` instead) and returns when it says that it can do its work. */
  static async start(
    machine: Machine,
    role: Role,
    env: Readonly<Record<string, string>>,
    host: Docker.HostConfig = DOCUMENTED[role],
  ): Promise<ContainedDaemon> {
    const container = await machine.engine.start({ image: IMAGE[role], env, host });
    const daemon = new ContainedDaemon(machine, role, container);
    try {
      await daemon.ready();
    } catch (error) {
      await daemon[Symbol.asyncDispose]();
      throw error;
    }
    return daemon;
  }

  /** Waits for 200 from /readyz. */
  async ready(): Promise<void> {
    try {
      await waitUntil(
        async () => {
          // It will not come back by itself: these containers have no restart policy.
          if (!(await this.container.docker.inspect()).State.Running) return 'ended';
          return (await this.get('/readyz')).code === 200 && 'ready';
        },
        { deadlineMs: READY_DEADLINE_MS, what: `the ${this.role} to be ready`, everyMs: 100 },
      ).then((outcome) => {
        if (outcome === 'ended') throw new Error(`the ${this.role} ended`);
      });
    } catch (error) {
      throw new Error(`${error instanceof Error ? error.message : error}; its log:\n${await this.container.logs()}`);
    }
  }

  /** One page of its status server, from inside the machine's network. @throws when nothing listens */
  async get(path: string): Promise<{ readonly code: number; readonly body: string }> {
    const ask = `exec 3<>/dev/tcp/127.0.0.1/${HTTP_PORT[this.role]}
      printf 'GET %s HTTP/1.0\\r\\nHost: 127.0.0.1\\r\\n\\r\\n' "$0" >&3
      cat <&3`;
    const answer = await this.machine.host.exec(['bash', '-c', ask, path]);
    const end = answer.indexOf('\r\n\r\n');
    return { code: Number(answer.split(' ')[1]), body: answer.slice(end + 4) };
  }

  /** What `/v1/status` says; the caller knows which fields it wants. */
  async status<T>(): Promise<T> {
    return JSON.parse((await this.get('/v1/status')).body);
  }

  /** Runs a sub-command of the program in the container. */
  cli(...command: readonly string[]): Promise<Output> {
    return this.container.exec('detour', ...command);
  }

  /** `docker kill`: the program gets no chance to leave in order. */
  async kill(): Promise<void> {
    await this.container.docker.kill({ signal: 'SIGKILL' });
    await this.container.docker.wait();
  }

  /** `docker start` of the same container after its end; returns when it is ready again. */
  async restart(): Promise<void> {
    await this.container.docker.start();
    await this.ready();
  }

  /** `docker stop`; its exit status. */
  async stop(): Promise<number> {
    return (await this.container.stop(STOP_SECONDS)).code;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.container[Symbol.asyncDispose]();
  }
}

/** Values that change by themselves. */
const VOLATILE = /^net\.(netfilter\.nf_conntrack_count|.*\.stable_secret)\b/;

/**
 * All that we could have changed on a host, as text: two of these are equal when it is as it was found. Packet counters,
 * dates and remaining lifetimes are left out.
 */
export async function asFound(host: Host): Promise<string> {
  const commands = [
    ['nft', '--stateless', 'list', 'ruleset'],
    // Looking with the flavour that nobody uses here would load its tables: `-save` reads only what exists.
    ...['iptables', 'ip6tables'].flatMap((program) => [[`${program}-nft-save`], [`${program}-legacy-save`]]),
    ...['-4', '-6'].flatMap((family) => [
      ['ip', family, 'rule'],
      ['ip', family, 'route', 'show', 'table', 'all'],
    ]),
    ['ip', '-oneline', 'address'],
    ['sysctl', '--all', '--pattern', '^net[.](ipv4|ipv6|mptcp|netfilter)[.]'],
  ];
  const parts: string[] = [];
  for (const command of commands) {
    const { stdout, stderr, code } = await host.try(command);
    // sysctl complains about parameters that can only be written, and is not ashamed of them otherwise.
    if (code !== 0 && command[0] !== 'sysctl') throw new Error(`${command.join(' ')} ended with ${code}: ${stderr}`);
    const lines = stdout
      .split('\n')
      .filter((line) => !line.startsWith('#') && !VOLATILE.test(line))
      .map((line) => line.replaceAll(/\[\d+:\d+\]/g, '[]').replaceAll(/ (expires \d+sec|linkdown)/g, ''));
    parts.push(`$ ${command.join(' ')}\n${lines.join('\n')}`);
  }
  return parts.join('\n');
}

/** Rules with our comment in one family and flavour of iptables. */
export async function ourRules(host: Host, program: string): Promise<string[]> {
  const { stdout } = await host.try([`${program}-save`]);
  return stdout.split('\n').filter((line) => line.includes('--comment detour'));
}
