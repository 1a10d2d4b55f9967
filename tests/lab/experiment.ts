/** Plays a scenario with real kernels and daemons, in network namespaces made for it. Needs root and dist/detour.js. */
import { cpus, loadavg, release } from 'node:os';
import { setTimeout as delay } from 'node:timers/promises';
import { parseEndpoint } from '../../appliance/protocol/address.ts';
import { Daemon, newKey } from './daemons.ts';
import { type Host, inVm, Lab, type Link, type Running, waitUntil } from './netns.ts';
import {
  type Agent,
  detoursOf,
  type Happening,
  needsWire,
  nodesOf,
  type Plan,
  planOf,
  type Scenario,
  type Way,
} from './topology.ts';
import {
  expectedSha256,
  type FlowsResult,
  type MessagesResult,
  type PathCount,
  startFlows,
  startMessages,
  startServer,
  startTransfer,
  type TransferResult,
} from './traffic.ts';

const PORT = 5000;
const CONTROL_PORT = 45_672;
/** A transfer that time ends has this many bytes at most: at 10 Gbit/s an hour's worth. */
const ENDLESS = 4.5e12;
/** No run may hold up the others for longer. */
const LONGEST_MS = 600_000;

/** What one scenario yielded. The same format wherever it ran. */
export type Result = {
  readonly scenario: Scenario;
  readonly machine: Machine;
  readonly runs: readonly Run[];
};

export type Machine = {
  readonly kernel: string;
  /** Whether the processor was emulated, as in the VM without KVM. */
  readonly emulated: boolean;
  readonly cpus: number;
  readonly model: string;
  /** Processes that wanted a processor when the scenario began: average of a minute, proc(5). */
  readonly load: number;
  readonly versions: Readonly<Record<string, string>>;
};

export type Run = {
  readonly way: string;
  /** From 1. */
  readonly trial: number;
  /** As many as the scenario has traffic, in that order. */
  readonly outcomes: readonly Outcome[];
  /** When events really happened, in seconds. */
  readonly events: readonly { readonly atS: number; readonly what: string }[];
};

export type Outcome = TransferOutcome | MessagesOutcome | FlowsOutcome;

/** All of it as the receiver saw it. */
export type TransferOutcome = {
  readonly kind: 'transfer';
  readonly bytes: number;
  readonly ms: number;
  /** From one second after the first byte to the end; of the whole when that is shorter than two seconds. */
  readonly mbps: number;
  readonly longestStallMs: number;
  readonly stallAtMs: number;
  readonly mptcp: boolean;
  /** Congestion control. */
  readonly congestion: string;
  /** `direct` or the detour's name. */
  readonly paths: readonly { readonly name: string; readonly bytes: number }[];
  /** Bytes that arrived in each 50 ms. */
  readonly slots: readonly number[];
  /** Milliseconds, then the bytes so far of each of `paths`. */
  readonly series: readonly (readonly number[])[];
};
export type MessagesOutcome = { readonly kind: 'messages'; readonly latencies: readonly number[] };
export type FlowsOutcome = { readonly kind: 'flows'; readonly bytes: number; readonly completions: readonly number[] };

type Started = { readonly program: Running; readonly result: Promise<Outcome> };

/** Plays scenarios. Keeps the network of one for the next when that differs in conditions alone, for building it is what takes long. */
export class Laboratory implements AsyncDisposable {
  #stage: Stage | null = null;

  /**
   * Plays the ways one after the other, and that `trials` times, so that whatever else the machine does hits all of them.
   * Throws when this machine cannot do what the scenario asks for, or when data arrives changed.
   */
  async play(
    scenario: Scenario,
    options: {
      readonly trials: number;
      readonly ways?: readonly string[];
      readonly heard?: (run: Run) => void;
    },
  ): Promise<Result> {
    const chosen = Object.entries(scenario.ways).filter(([name]) => options.ways?.includes(name) ?? true);
    const load = loadavg()[0] ?? 0;
    const stage = await this.#stageFor(
      scenario,
      chosen.map(([, way]) => way),
    );
    const runs: Run[] = [];
    try {
      for (let trial = 1; trial <= options.trials; trial += 1)
        for (const [name, way] of chosen) {
          const run = { way: name, trial, ...(await stage.run(way)) };
          options.heard?.(run);
          runs.push(run);
        }
      return { scenario, machine: await stage.machine(load), runs };
    } catch (error) {
      await this[Symbol.asyncDispose]();
      throw error;
    }
  }

  async #stageFor(scenario: Scenario, ways: readonly Way[]): Promise<Stage> {
    if (this.#stage?.network === networkOf(scenario, ways)) {
      await this.#stage.become(scenario);
      return this.#stage;
    }
    await this[Symbol.asyncDispose]();
    this.#stage = await Stage.build(scenario, ways);
    return this.#stage;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const stage = this.#stage;
    this.#stage = null;
    await stage?.[Symbol.asyncDispose]();
  }
}

/** All that cannot be changed about a network once it has been built. */
function networkOf(scenario: Scenario, ways: readonly Way[]): string {
  const { client, server, nodes, links } = scenario;
  const shape = Object.entries(links).map(([name, { between }]) => [name, between, needsWire(scenario, name)]);
  return JSON.stringify([client, server, nodes, shape, serviceOf(ways)]);
}

/** What routers must offer for these ways. */
function serviceOf(ways: readonly Way[]): {
  readonly tunnels: boolean;
  readonly inband: boolean;
  readonly relays: readonly string[];
} {
  const isAsked = (kind: string): boolean => ways.some(({ agent }) => agent?.strategy.includes(kind));
  return {
    tunnels: isAsked('vpn'),
    inband: isAsked('inband'),
    relays: [...new Set(ways.flatMap(({ via }) => via ?? []))],
  };
}

/** The hosts and links of a scenario, with servers and routers running. */
class Stage implements AsyncDisposable {
  readonly network: string;
  #scenario: Scenario;
  readonly #plan: Plan;
  readonly #scope = new AsyncDisposableStack();
  readonly #hosts = new Map<string, Host>();
  readonly #links = new Map<string, Link>();
  readonly #routers = new Map<string, Daemon>();
  readonly #key = newKey();

  private constructor(scenario: Scenario, ways: readonly Way[]) {
    this.network = networkOf(scenario, ways);
    this.#scenario = scenario;
    this.#plan = planOf(scenario);
  }

  static async build(scenario: Scenario, ways: readonly Way[]): Promise<Stage> {
    const stage = new Stage(scenario, ways);
    try {
      await stage.#build(ways);
      return stage;
    } catch (error) {
      await stage.#scope.disposeAsync();
      throw error;
    }
  }

  async #build(ways: readonly Way[]): Promise<void> {
    const lab = this.#scope.use(await Lab.create(`lab.${this.#scenario.name.replaceAll('_', '.')}`));
    for (const name of nodesOf(this.#scenario)) this.#hosts.set(name, await lab.host(name));
    await Promise.all([...this.#hosts].map(([name, host]) => this.#prepare(name, host)));
    for (const [name, { between, ...quality }] of Object.entries(this.#scenario.links)) {
      const ends = [this.#host(between[0]), this.#host(between[1])] as const;
      const wire = !inVm && needsWire(this.#scenario, name);
      // Without trains of segments, so that a loss is that of a packet, and a queue holds packets.
      const link = await lab.link(...ends, { ...this.#plan.networks[name], ...quality, wire, segments: 1 });
      this.#links.set(name, link);
    }
    for (const [name, host] of this.#hosts) {
      const routes = this.#plan.routes.filter(({ node }) => node === name);
      const lines = routes.map(({ to, via }) => `route replace ${to} via ${via}\n`);
      await host.exec(['ip', '-batch', '-'], { input: lines.join('') });
    }
    const { congestion } = this.#scenario;
    await startServer(this.#host(this.#scenario.server), { port: PORT, congestion });
    const { tunnels, inband, relays } = serviceOf(ways);
    for (const name of detoursOf(this.#scenario)) {
      const host = this.#host(name);
      // Routers call their interface alike, and wireguard-go has a socket of that name for the whole machine.
      if (tunnels) await host.isolate('/run/wireguard');
      const env = {
        DETOUR_ALLOW: this.#addresses(this.#scenario.server)
          .map(({ v4, v6 }) => `${v4}/32,${v6}/128`)
          .join(','),
        DETOUR_HTTP: 'off',
        ...(relays.includes(name) ? { DETOUR_RELAY: 'tcp' } : {}),
        ...(tunnels ? { DETOUR_VPN: 'wireguard' } : {}),
        ...(inband ? { DETOUR_INBAND: 'on' } : {}),
      };
      const router = this.#scope.use(await Daemon.start(host, 'router', { keys: this.#key, env, ready: false }));
      await router.program.waitFor('"event":"started"', 20_000);
      this.#routers.set(name, router);
    }
  }

  /** Another scenario on the same network. */
  async become(scenario: Scenario): Promise<void> {
    for (const [name, { between: _, ...quality }] of Object.entries(scenario.links)) {
      const { between: __, ...before } = this.#scenario.links[name] ?? {};
      if (JSON.stringify(before) !== JSON.stringify(quality)) await this.#links.get(name)?.shape(quality);
    }
    this.#scenario = scenario;
  }

  async #prepare(name: string, host: Host): Promise<void> {
    const { subflows, sysctls = {} } = this.#scenario.nodes[name] ?? {};
    await host.forward();
    const settings = {
      // Ways there and back may differ.
      'net.ipv4.conf.all.rp_filter': '0',
      'net.ipv4.conf.default.rp_filter': '0',
      // A trial must not know what the one before found out about the way.
      'net.ipv4.tcp_no_metrics_save': '1',
      ...sysctls,
    };
    await host.configure(settings);
    if (subflows !== undefined) await host.exec(['ip', 'mptcp', 'limits', 'set', 'subflow', String(subflows)]);
  }

  async run(way: Way): Promise<Omit<Run, 'way' | 'trial'>> {
    const client = this.#host(this.#scenario.client);
    await this.#settled();
    await using agent = way.agent ? await this.#startAgent(way, way.agent) : null;
    const to =
      way.via === undefined ? this.#endpoint(this.#scenario.server, way, PORT) : await this.#leased(way.via, way);
    const common = { to, transport: way.transport, congestion: this.#scenario.congestion };
    const tunnels = agent ? await tunnelsOf(agent) : new Map<string, string>();
    const begin = async (traffic: Scenario['traffic'][number]): Promise<Started> => {
      if (traffic.kind === 'messages') {
        const { program, result } = startMessages(client, { ...traffic, ...common });
        return {
          program,
          result: result.then(({ latencies }: MessagesResult) => ({
            kind: 'messages',
            latencies: latencies.map(rounded),
          })),
        };
      }
      if (traffic.kind === 'flows') {
        const { program, result } = startFlows(client, { ...traffic, ...common });
        return {
          program,
          result: result.then(({ bytes, completions }: FlowsResult) => ({
            kind: 'flows',
            bytes,
            completions: completions.map(rounded),
          })),
        };
      }
      const { kind: _, atS: __, bytes = ENDLESS, ...limits } = traffic;
      const { program, result } = startTransfer(client, { bytes, ...limits, ...common });
      return { program, result: result.then((done) => outcomeOf(done, (path) => this.#nameOf(path, tunnels))) };
    };
    const [first, ...others] = this.#scenario.traffic;
    if (!first) throw new Error('nothing to send');
    const main = await begin(first);
    await main.program.waitFor('"connected"', 60_000);
    const start = performance.now();
    const at = async <T>(seconds: number, act: () => Promise<T>): Promise<T> => {
      await delay(Math.max(0, start + seconds * 1000 - performance.now()));
      return act();
    };
    const events: { atS: number; what: string }[] = [];
    const happening = this.#scenario.events.map((event) =>
      at(event.atS, async () => {
        await this.#happen(event, agent);
        events.push({ atS: rounded((performance.now() - start) / 1000), what: describeEvent(event) });
      }),
    );
    const beside = others.map((traffic) => at(traffic.atS, async () => (await begin(traffic)).result));
    const expired = delay(LONGEST_MS, undefined, { ref: false }).then(() => {
      throw new Error(`what was sent had not arrived after ${LONGEST_MS / 60_000} minutes`);
    });
    const ended = Promise.all([Promise.all([main.result, ...beside]), Promise.all(happening)]);
    const [outcomes] = await Promise.race([ended, expired]);
    await this.#restore(agent);
    return { outcomes, events };
  }

  /** Waits until nothing of the run before is open or under way, which an agent would adopt and this run's packets queue behind. */
  async #settled(): Promise<void> {
    const connected = ['ss', '-tnH', 'state', 'connected', 'exclude', 'time-wait'];
    await waitUntil(
      async () => {
        for (const name of [this.#scenario.client, this.#scenario.server])
          if ((await this.#host(name).exec(connected)).trim() !== '') return false;
        for (const host of this.#hosts.values())
          if (/backlog [1-9]/.test(await host.exec(['tc', '-s', 'qdisc', 'show']))) return false;
        return true;
      },
      { deadlineMs: 60_000, what: 'the network to be quiet', everyMs: 100 },
    );
  }

  async machine(load: number): Promise<Machine> {
    const client = this.#host(this.#scenario.client);
    const version = async (...command: string[]): Promise<string> =>
      /\d+(\.\d+)+/.exec(await client.exec(command))?.[0] ?? 'unknown';
    return {
      kernel: release(),
      emulated: /QEMU TCG/.test(cpus()[0]?.model ?? ''),
      cpus: cpus().length,
      model: cpus()[0]?.model ?? 'unknown',
      load,
      versions: {
        node: process.versions.node,
        nft: await version('nft', '--version'),
        iproute2: await version('ip', '-V'),
      },
    };
  }

  #host(name: string): Host {
    const host = this.#hosts.get(name);
    if (!host) throw new Error(`no node ${name}`);
    return host;
  }

  #addresses(name: string): Plan['addresses'][string] {
    return this.#plan.addresses[name] ?? [];
  }

  #endpoint(name: string, way: Way, port: number): string {
    const [first] = this.#addresses(name);
    return way.family === 6 ? `[${first?.v6}]:${port}` : `${first?.v4}:${port}`;
  }

  async #startAgent(way: Way, { strategy, mode, maxPaths }: Agent): Promise<Daemon> {
    const detours = detoursOf(this.#scenario).map((name) => `${name}=${this.#endpoint(name, way, CONTROL_PORT)}`);
    const agent = await Daemon.start(this.#host(this.#scenario.client), 'client', {
      keys: this.#key,
      ready: false,
      env: {
        DETOUR_DETOURS: detours.join(','),
        DETOUR_STRATEGY: strategy,
        DETOUR_MODE: mode,
        DETOUR_MAX_PATHS: String(maxPaths),
        DETOUR_HTTP: 'off',
      },
    });
    await agent.program.waitFor('"event":"started"', 20_000);
    await waitUntil(
      async () => {
        const { detours: known, tunnels = [] } = await agent.status<Status>();
        const up = known.length === detours.length && known.every(({ state }) => state === 'up');
        return (
          up && (!strategy.includes('vpn') || (tunnels.length > 0 && tunnels.every(({ state }) => state === 'up')))
        );
      },
      { deadlineMs: 30_000, what: 'the agent to reach its detours' },
    );
    return agent;
  }

  /** Where a lease at that detour's router leads to the server. */
  async #leased(detour: string, way: Way): Promise<string> {
    const client = this.#host(this.#scenario.client);
    const speaker = new URL('speaker.ts', import.meta.url).pathname;
    const server = this.#endpoint(this.#scenario.server, way, PORT);
    const answers = await client.exec([
      ...[process.execPath, speaker, this.#endpoint(detour, way, CONTROL_PORT), this.#key],
      ...['hello', `lease=${server}`],
    ]);
    const granted: { result: string; port: number } | null = JSON.parse(answers.trim().split('\n').at(-1) ?? 'null');
    if (!granted || parseEndpoint(server) === null || granted.port === 0)
      throw new Error(`${detour} grants no lease: ${granted?.result ?? 'silence'}`);
    return this.#endpoint(detour, way, granted.port);
  }

  /** Which way a subflow went, by its addresses at the receiver. */
  #nameOf(path: PathCount, tunnels: ReadonlyMap<string, string>): string {
    const owner = (address: string): string | undefined =>
      Object.keys(this.#plan.addresses).find((name) =>
        this.#addresses(name).some(({ v4, v6 }) => v4 === address || v6 === address),
      );
    const [there, here] = [owner(path.remote), tunnels.get(path.local)];
    return here ?? (there !== undefined && this.#scenario.nodes[there]?.router ? there : 'direct');
  }

  async #happen(event: Happening, agent: Daemon | null): Promise<void> {
    if (event.does === 'kill') {
      const daemon = event.node === this.#scenario.client ? agent : this.#routers.get(event.node);
      await daemon?.stop('SIGKILL');
      return;
    }
    const link = this.#links.get(event.link);
    if (!link) throw new Error(`no link ${event.link}`);
    if (event.does === 'shape') await link.shape(event.to);
    else await (event.does === 'blackhole' ? link.blackhole() : link.restore());
  }

  /** As it was before the events. */
  async #restore(agent: Daemon | null): Promise<void> {
    for (const event of this.#scenario.events) {
      if (event.does === 'kill') {
        if (event.node === this.#scenario.client) await agent?.cli('cleanup', 'client');
        const router = this.#routers.get(event.node);
        if (!router || router.program.running) continue;
        router.restart();
        await router.program.waitFor('"event":"started"', 20_000);
        continue;
      }
      const { between: _, ...quality } = this.#scenario.links[event.link] ?? {};
      const link = this.#links.get(event.link);
      await link?.restore();
      if (event.does === 'shape') await link?.shape(quality);
    }
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#scope.disposeAsync();
  }
}

type Status = {
  readonly detours: readonly { readonly name: string; readonly state: string }[];
  readonly tunnels?: readonly {
    readonly detour: string;
    readonly state: string;
    readonly v4: string | null;
    readonly v6: string | null;
  }[];
};

/** The detours' names by the agent's addresses inside the tunnels to them. */
async function tunnelsOf(agent: Daemon): Promise<Map<string, string>> {
  const { tunnels = [] } = await agent.status<Status>();
  return new Map(
    tunnels.flatMap(({ detour, v4, v6 }) => [v4, v6].flatMap((inner) => (inner ? [[inner, detour] as const] : []))),
  );
}

function describeEvent(event: Happening): string {
  if (event.does === 'kill') return `${event.node} killed`;
  const words = { blackhole: 'lost', restore: 'whole again', shape: 'changed' };
  return `${event.link} ${words[event.does]}`;
}

const rounded = (value: number): number => Math.round(value * 10) / 10;

function outcomeOf(done: TransferResult, nameOf: (path: PathCount) => string): TransferOutcome {
  if (done.sha256 !== expectedSha256('detour', done.bytes)) throw new Error('the data arrived changed');
  const names = [...new Set(done.paths.map(nameOf))];
  const perPath = (paths: readonly PathCount[]): number[] =>
    names.map((name) => paths.reduce((sum, path) => sum + (nameOf(path) === name ? path.bytes : 0), 0));
  const counted = perPath(done.paths);
  return {
    kind: 'transfer',
    bytes: done.bytes,
    ms: rounded(done.ms),
    mbps: steadyMbps(done.slots, done.ms),
    longestStallMs: rounded(done.longestStallMs),
    stallAtMs: rounded(done.stallAtMs),
    mptcp: done.mptcp,
    congestion: done.congestion,
    paths: names.map((name, index) => ({ name, bytes: counted[index] ?? 0 })),
    slots: done.slots,
    series: done.series.map(({ ms, paths }) => [Math.round(ms), ...perPath(paths)]),
  };
}

const SLOTS_PER_SECOND = 20;

/** Mbit/s from the second second on; of the whole when that is all there is. */
function steadyMbps(slots: readonly number[], ms: number): number {
  const skipped = ms >= 2000 ? SLOTS_PER_SECOND : 0;
  const bytes = slots.slice(skipped).reduce((sum, slot) => sum + slot, 0);
  const seconds = ms / 1000 - skipped / SLOTS_PER_SECOND;
  return Math.round((bytes * 8) / seconds / 1e3) / 1e3;
}
