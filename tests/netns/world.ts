/**
 * A client host, a server, and detours beside the direct way, with the real router and the real agent on them:
 *
 *     client --- gateway --- server
 *                  |  |        | |
 *                  |  detour1 -+ |
 *                  +--- detour2 -+
 */
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { ask } from '../lab/daemons.ts';
import { type ExecResult, type Host, inVm, Lab, type Link, type Running, waitUntil } from '../lab/netns.ts';

/** In the VM the bundle, which an emulated processor starts in half the time. */
const CLI = fileURLToPath(new URL(inVm ? '../../dist/detour.js' : '../../appliance/cli.ts', import.meta.url));

/** As `/v1/status` of a client has it. */
export type StatusPath = {
  readonly kind: string;
  readonly detour: string | null;
  readonly local: string | null;
  readonly remote: string | null;
  readonly state: string;
  readonly backup: boolean;
  readonly rttMs: number | null;
  readonly deliveredBytes: number;
  readonly retransmits: number;
  readonly why: string | null;
  /** What the chooser thinks of it. */
  readonly verdict: string | null;
};
export type StatusConnection = {
  readonly token: string;
  readonly local: string;
  readonly remote: string;
  readonly why: string | null;
  readonly paths: readonly StatusPath[];
};
export type Status = {
  readonly ready: boolean;
  readonly mptcpify?: {
    readonly state: string;
    readonly by: string | null;
    readonly sockets: number | null;
    readonly why: string | null;
  };
  readonly detours: readonly {
    readonly name: string;
    readonly interface: string | null;
    readonly address: string;
    readonly state: string;
    readonly epoch: string | null;
    readonly observed: string | null;
  }[];
  readonly connections: readonly StatusConnection[];
  /** Of servers that have detours announced. */
  readonly announced?: readonly { readonly detour: string; readonly state: string; readonly why: string | null }[];
  /** Left out while there are none. */
  readonly tunnels?: readonly {
    readonly detour: string;
    readonly state: string;
    readonly interface: string | null;
    readonly carrier: string | null;
    readonly v4: string | null;
    readonly v6: string | null;
    readonly mtu: number | null;
    readonly why: string | null;
  }[];
};

export type Detour = {
  readonly name: string;
  readonly host: Host;
  readonly way: Link;
  readonly v4: string;
  readonly v6: string;
};

/** A key as `detour genkey` makes it. */
export const makeKey = (id: string): string => `${id}:${randomBytes(32).toString('base64url')}`;

export class World implements AsyncDisposable {
  readonly client: Host;
  readonly gateway: Host;
  readonly server: Host;
  /** The client's only one. */
  readonly access: Link;
  readonly direct: Link;
  readonly detours: readonly Detour[];
  readonly key = makeKey('0a0b0c0d');
  readonly serverV4 = '10.81.0.2';
  readonly serverV6 = 'fd81::2';
  readonly lab: Lab;
  readonly #isolated = new Set<Host>();
  readonly #folder = mkdtempSync(join(tmpdir(), 'detour-world-'));

  private constructor(
    lab: Lab,
    client: Host,
    gateway: Host,
    server: Host,
    access: Link,
    direct: Link,
    detours: readonly Detour[],
  ) {
    this.lab = lab;
    this.client = client;
    this.gateway = gateway;
    this.server = server;
    this.access = access;
    this.direct = direct;
    this.detours = detours;
  }

  static async create(
    name: string,
    options: { readonly detours?: number; readonly rateMbit?: number } = {},
  ): Promise<World> {
    const lab = await Lab.create(name);
    try {
      const [client, gateway, server] = [await lab.host('client'), await lab.host('gateway'), await lab.host('server')];
      const rate = options.rateMbit === undefined ? {} : { rateMbit: options.rateMbit };
      const access = await lab.link(client, gateway, { v4: '10.80.0.0/30', v6: 'fd80::/64' });
      const direct = await lab.link(gateway, server, { v4: '10.81.0.0/30', v6: 'fd81::/64', ...rate });
      await gateway.forward();
      await client.route('default via 10.80.0.2');
      await client.route('default via fd80::2');
      await server.route('default via 10.81.0.1');
      await server.route('default via fd81::1');
      const detours: Detour[] = [];
      for (let i = 1; i <= (options.detours ?? 1); i++) {
        const host = await lab.host(`detour${i}`);
        const way = await lab.link(gateway, host, { v4: `10.82.${i}.0/30`, v6: `fd82:${i}::/64`, ...rate });
        await lab.link(host, server, { v4: `10.83.${i}.0/30`, v6: `fd83:${i}::/64` });
        await host.route(`default via 10.82.${i}.1`);
        await host.route(`default via fd82:${i}::1`);
        await host.route(`10.81.0.0/30 via 10.83.${i}.2`);
        await host.route(`fd81::/64 via fd83:${i}::2`);
        detours.push({ name: `detour${i}`, host, way, v4: `10.82.${i}.2`, v6: `fd82:${i}::2` });
      }
      return new World(lab, client, gateway, server, access, direct, detours);
    } catch (error) {
      await lab[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** Runs a router on a detour and returns when it answers. */
  async startRouter(detour: Detour, environment: Readonly<Record<string, string>> = {}): Promise<Running> {
    if (environment.DETOUR_VPN && !this.#isolated.has(detour.host)) {
      // All routers call their interface alike, and wireguard-go has a socket of that name for the whole host.
      await detour.host.isolate('/run/wireguard');
      this.#isolated.add(detour.host);
    }
    const router = detour.host.spawn([process.execPath, CLI, 'router'], {
      env: {
        DETOUR_KEYS: this.key,
        DETOUR_ALLOW: '10.81.0.0/30,fd81::/64',
        DETOUR_HTTP: 'off',
        DETOUR_SOCKET: join(this.#folder, `${detour.name}.sock`),
        ...environment,
      },
    });
    await router.waitFor('"event":"started"', 20_000);
    return router;
  }

  async startRouters(environment: Readonly<Record<string, string>> = {}): Promise<Running[]> {
    return Promise.all(this.detours.map((detour) => this.startRouter(detour, environment)));
  }

  /** Runs an agent on a host, by default the client, behind a `prefix` such as setpriv, and returns when it has subscribed to the kernel. */
  async startAgent(
    environment: Readonly<Record<string, string>> = {},
    host: Host = this.client,
    prefix: readonly string[] = [],
  ): Promise<{ program: Running; status: () => Promise<Status>; metrics: () => Promise<string> }> {
    const socket = this.agentSocket(host);
    const program = host.spawn([...prefix, process.execPath, CLI, 'client'], {
      env: this.agentEnvironment(host, environment),
    });
    await program.waitFor('"event":"started"', 20_000);
    return {
      program,
      status: async () => JSON.parse(await ask(socket, '/v1/status')),
      metrics: () => ask(socket, '/metrics'),
    };
  }

  agentSocket(host: Host): string {
    return join(this.#folder, `agent-${host.name}.sock`);
  }

  agentEnvironment(host: Host, environment: Readonly<Record<string, string>> = {}): Record<string, string> {
    return {
      DETOUR_KEY: this.key,
      DETOUR_DETOURS: this.detours
        .flatMap(({ name, v4, v6 }) => [`${name}=${v4}:45672`, `${name}-6=[${v6}]:45672`])
        .join(','),
      DETOUR_HTTP: 'off',
      DETOUR_SOCKET: this.agentSocket(host),
      ...environment,
    };
  }

  /** Runs another sub-command of the client to its end, by default on the client, and returns what it printed. */
  async command(
    words: readonly string[],
    environment: Readonly<Record<string, string>> = {},
    host: Host = this.client,
  ): Promise<string> {
    return host.exec([process.execPath, CLI, ...words], { env: this.agentEnvironment(host, environment) });
  }

  /** The same, whatever comes of it, behind a `prefix` such as setpriv. */
  tryCommand(
    words: readonly string[],
    environment: Readonly<Record<string, string>>,
    host: Host,
    prefix: readonly string[],
  ): Promise<ExecResult> {
    return host.try([...prefix, process.execPath, CLI, ...words], { env: this.agentEnvironment(host, environment) });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    try {
      await this.lab[Symbol.asyncDispose]();
    } finally {
      rmSync(this.#folder, { recursive: true, force: true });
    }
  }
}

/** Waits until every detour of the agent's status is in that state. */
export async function detoursAre(status: () => Promise<Status>, state: string): Promise<Status> {
  return waitUntil(
    async () => {
      const now = await status();
      return now.detours.length > 0 && now.detours.every((detour) => detour.state === state) && now;
    },
    { deadlineMs: 30_000, what: `all detours to be ${state}` },
  );
}

/** Waits until the connection to `remote` is as the test wants it. */
export async function connectionIs(
  status: () => Promise<Status>,
  remote: string,
  what: string,
  holds: (connection: StatusConnection) => boolean,
  deadlineMs = 20_000,
): Promise<StatusConnection> {
  let last: unknown = null;
  try {
    return await waitUntil(
      async () => {
        const now = await status();
        last = now;
        return now.connections.find((one) => one.remote === remote && holds(one));
      },
      { deadlineMs, what },
    );
  } catch (error) {
    throw new Error(`${error instanceof Error ? error.message : error}; status: ${JSON.stringify(last)}`);
  }
}

export const isInUse = ({ state }: StatusPath): boolean => state === 'active' || state === 'backup';

/** The path by this detour that is in use. That it is in reserve may be the verdict on a connection that carries little. */
export const pathBy = (connection: StatusConnection, detour: string | null): StatusPath | undefined =>
  connection.paths.find((path) => path.detour === detour && isInUse(path));

/** Everything on a host that this program could have changed. */
export async function hostState(host: Host): Promise<Record<string, string>> {
  const read = (...command: string[]): Promise<string> => host.exec(command);
  const sysctls = await host.try(['sysctl', '-a', '--pattern', '^net\\.(mptcp|ipv4|ipv6|netfilter|core)']);
  return {
    ruleset: await read('nft', 'list', 'ruleset'),
    filter: (await read('iptables-nft', '-S')) + (await read('ip6tables-nft', '-S')),
    rules: (await read('ip', 'rule')) + (await read('ip', '-6', 'rule')),
    routes:
      (await read('ip', 'route', 'show', 'table', 'all')) + (await read('ip', '-6', 'route', 'show', 'table', 'all')),
    links: await read('ip', '-brief', 'link'),
    // Counters that move by themselves.
    sysctls: sysctls.stdout.replaceAll(/^net\.netfilter\.nf_conntrack_count.*$/gm, ''),
  };
}
