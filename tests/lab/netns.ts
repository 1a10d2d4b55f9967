/**
 * Networks made of Linux network namespaces, for tests that need a real kernel on both ends.
 *
 * A lab is a set of hosts (one namespace each) and links (veth pairs). Every namespace name carries the lab's name and
 * the identity of the process that made it, so parallel runs do not meet, and the next run of the same lab can tell
 * the remains of a killed process from a lab that is alive.
 */
import { type ChildProcess, execFile, execFileSync, spawn } from 'node:child_process';
import { readdirSync, readFileSync } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';

const NAMESPACE_FOLDER = '/run/netns';
const PREFIX = 'dtlab';
/** The kernel's IFNAMSIZ without the closing zero. */
const LONGEST_INTERFACE_NAME = 15;
const DEFAULT_EXEC_DEADLINE_MS = 30_000;
/** Enough for a full-size segment train, so that GSO packets are not split needlessly; 32 kB at 20 Mbit/s is 13 ms. */
const SHAPER_BURST = '32kb';
const DEFAULT_QUEUE_MS = 50;
/** Packets under way on a link with a delay: more than any test sends, for what is dropped is for the queue and the loss to say. */
const IN_FLIGHT_LIMIT = 100_000;
const WIRE = fileURLToPath(new URL('wire.py', import.meta.url));
const OUTPUT_LIMIT_BYTES = 256 * 1024 * 1024;
export type ExecOptions = {
  readonly env?: Readonly<Record<string, string>>;
  readonly input?: string;
  readonly cwd?: string;
  readonly timeoutMs?: number;
};

export type ExecResult = { readonly code: number; readonly stdout: string; readonly stderr: string };

export type Exit = { readonly code: number | null; readonly signal: NodeJS.Signals | null };

/** What one direction of a link is like. What is absent is as good as this machine allows. */
export type Conditions = {
  /** Mbit/s. */
  readonly rateMbit?: number;
  /** Longest time a packet waits in the queue of the rate limit, in ms (default 50). What would wait longer is dropped. */
  readonly queueMs?: number;
  /** How long a packet is under way, besides its time in the queue, in ms. Needs netem, or a wire. */
  readonly delayMs?: number;
  /** Packets lost by chance, 0 to 100 percent. Needs netem, or a wire. */
  readonly lossPercent?: number;
};

/** The conditions hold for each direction; `Link.shape` changes them. */
export type LinkOptions = Conditions & {
  /** An IPv4 network such as `10.1.0.0/30`: the first host takes its first address, the second host its second. */
  readonly v4?: string;
  /** An IPv6 network such as `fd00:1::/64`, used likewise. */
  readonly v6?: string;
  readonly mtu?: number;
  /** Segments of TCP that may travel as one packet; 1 has losses hit, and queues hold, what a real link would carry. */
  readonly segments?: number;
  /**
   * A program carries what the link carries (wire.py), because the kernel may have no netem. It knows IP alone, is good for some hundred
   * Mbit/s, and takes 10 to 20 µs of a processor for each packet.
   */
  readonly wire?: boolean;
  /** Interface names; by default `to-` and the other host's name. */
  readonly devA?: string;
  readonly devB?: string;
};

/** One end of a link. Addresses carry no prefix length and are absent when the link has no such family. */
export type LinkEnd = { readonly host: Host; readonly dev: string; readonly v4?: string; readonly v6?: string };

/** A command that failed inside a lab: carries the command line, what it printed to stderr, and its exit code. */
export class LabError extends Error {
  readonly code: number;
  readonly stderr: string;

  constructor(where: string, command: readonly string[], result: ExecResult) {
    const said = (result.stderr.trim() || result.stdout.trim() || '(no output)').slice(0, 4000);
    super(`${where}: \`${command.join(' ')}\` ended with ${result.code}: ${said}`);
    this.name = 'LabError';
    this.code = result.code;
    this.stderr = result.stderr;
  }
}

/**
 * Whether this process may build labs. Without root: an error when CI=true (a machine that promises to run
 * everything), otherwise false and one line saying what is skipped. Use as `describe.runIf(requireRoot('...'))`.
 */
export function requireRoot(what = 'network namespace tests'): boolean {
  if (process.geteuid?.() === 0) return true;
  const remedy = `${what} need root: run them with sudo, or in a container with --privileged`;
  if (process.env.CI === 'true') throw new Error(remedy);
  console.warn(`skipped: ${remedy}`);
  return false;
}

/** Whether this process runs in the VM of tests/lab/vm.sh. */
export const inVm = process.env['LAB_VM'] === '1';

/** How much longer than elsewhere everything here may take: the VM's processor is emulated, and some ten to twenty times slower. */
const PATIENCE = inVm ? 10 : 1;

/** Like requireRoot, for tests that need the VM's kernel. */
export function requireVm(what: string): boolean {
  if (inVm) return true;
  const remedy = `${what} need the VM: make test-vm, or tests/lab/vm.sh run -- npx vitest run --project vm`;
  if (process.env['CI'] === 'true') throw new Error(remedy);
  console.warn(`skipped: ${remedy}`);
  return false;
}

/**
 * Calls `probe` until it returns something other than false, null or undefined, and returns that. A probe that throws counts as
 * "not yet"; its last error is part of the message when the deadline passes.
 */
export async function waitUntil<T>(
  probe: () => T | Promise<T>,
  options: { readonly deadlineMs: number; readonly what: string; readonly everyMs?: number },
): Promise<Exclude<T, false | null | undefined>> {
  const deadlineMs = options.deadlineMs * PATIENCE;
  const deadline = performance.now() + deadlineMs;
  let last = 'the condition was not met';
  for (;;) {
    try {
      const seen = await probe();
      if (seen !== false && seen !== null && seen !== undefined) return seen as Exclude<T, false | null | undefined>;
      last = 'the condition was not met';
    } catch (error) {
      last = error instanceof Error ? error.message : String(error);
    }
    if (performance.now() >= deadline) {
      throw new Error(`waited ${deadlineMs} ms in vain for ${options.what}: ${last}`);
    }
    await delay(options.everyMs ?? 20);
  }
}

/** A program running on a host. Its standard output and error are kept as lines. */
export class Running {
  readonly pid: number;
  /** Lines of standard output so far. */
  readonly lines: string[] = [];
  /** Lines of standard error so far. */
  readonly errors: string[] = [];
  /** Settles when the program has ended and its output is complete. */
  readonly exited: Promise<Exit>;
  readonly command: readonly string[];
  #child: ChildProcess;
  #ended = false;
  #watchers = new Set<() => void>();

  constructor(child: ChildProcess, command: readonly string[]) {
    if (child.pid === undefined) throw new Error(`could not start \`${command.join(' ')}\``);
    this.pid = child.pid;
    this.command = command;
    this.#child = child;
    this.#collect(child.stdout, this.lines);
    this.#collect(child.stderr, this.errors);
    // A program that stopped reading is not an error of the test that still writes to it.
    child.stdin?.on('error', () => undefined);
    this.exited = new Promise((resolve) => {
      child.once('close', (code, signal) => {
        this.#ended = true;
        this.#notify();
        resolve({ code, signal });
      });
    });
  }

  get running(): boolean {
    return !this.#ended;
  }

  /**
   * The first line, already printed or still to come, that contains the text or matches the expression. Standard
   * output is searched before standard error. Rejects when the program ends first or the deadline (ms) passes.
   */
  async waitFor(pattern: string | RegExp, deadlineMs = 10_000): Promise<string> {
    const matches = (line: string): boolean =>
      typeof pattern === 'string' ? line.includes(pattern) : line.search(pattern) >= 0;
    const find = (): string | undefined => this.lines.find(matches) ?? this.errors.find(matches);
    const timer = new AbortController();
    const patienceMs = deadlineMs * PATIENCE;
    const expired = delay(patienceMs, 'expired' as const, { signal: timer.signal }).catch(() => 'expired' as const);
    try {
      for (;;) {
        const found = find();
        if (found !== undefined) return found;
        if (this.#ended) throw new Error(this.#complaint(`ended before it printed ${pattern}`));
        const change = Promise.withResolvers<'change'>();
        const wake = (): void => change.resolve('change');
        this.#watchers.add(wake);
        const outcome = await Promise.race([change.promise, expired]);
        this.#watchers.delete(wake);
        if (outcome === 'expired' && find() === undefined) {
          throw new Error(this.#complaint(`did not print ${pattern} within ${patienceMs} ms`));
        }
      }
    } finally {
      timer.abort();
    }
  }

  /** Writes to the program's standard input. */
  write(text: string): void {
    this.#child.stdin?.write(text);
  }

  /** Signals the program alone (default SIGTERM) and waits for its end; SIGKILL after `graceMs`. */
  async stop(signal: NodeJS.Signals = 'SIGTERM', graceMs = 5_000): Promise<Exit> {
    this.kill(signal);
    const timer = setTimeout(() => this.killGroup(), graceMs * PATIENCE);
    try {
      return await this.exited;
    } finally {
      clearTimeout(timer);
    }
  }

  /** Signals the program alone and does not wait. */
  kill(signal: NodeJS.Signals = 'SIGTERM'): void {
    if (!this.#ended) this.#child.kill(signal);
  }

  /** Kills the program and what it started; never throws. */
  killGroup(): void {
    try {
      process.kill(-this.pid, 'SIGKILL');
    } catch {
      // Already gone.
    }
  }

  #collect(stream: NodeJS.ReadableStream | null, into: string[]): void {
    let rest = '';
    stream?.setEncoding('utf8');
    stream?.on('data', (chunk: string) => {
      const parts = (rest + chunk).split('\n');
      rest = parts.pop() ?? '';
      into.push(...parts);
      if (parts.length > 0) this.#notify();
    });
    stream?.on('end', () => {
      if (rest !== '') into.push(rest);
    });
  }

  #notify(): void {
    for (const wake of this.#watchers) wake();
  }

  #complaint(what: string): string {
    const tail = [...this.lines.slice(-10), ...this.errors.slice(-20)].join('\n');
    return `\`${this.command.join(' ')}\` ${what}; its last output:\n${tail || '(none)'}`;
  }
}

/** One machine of a lab: a network namespace with loopback up. */
export class Host {
  readonly name: string;
  /** The namespace's name, as `ip netns` knows it. */
  readonly namespace: string;
  readonly #programs = new Set<Running>();
  /** What enters the host besides its network. */
  #mounts: readonly string[] = [];

  constructor(name: string, namespace: string) {
    this.name = name;
    this.namespace = namespace;
  }

  /** The namespace's file, for setns or `nsenter --net=`. */
  get path(): string {
    return `${NAMESPACE_FOLDER}/${this.namespace}`;
  }

  /** Runs a command to its end and returns its standard output. Throws a LabError when it exits non-zero. */
  async exec(command: readonly string[], options: ExecOptions = {}): Promise<string> {
    const result = await this.try(command, options);
    if (result.code !== 0) throw new LabError(this.name, command, result);
    return result.stdout;
  }

  /** Like exec, but a non-zero exit is a result. Code 124 means that the time (default 30 s) ran out. */
  try(command: readonly string[], options: ExecOptions = {}): Promise<ExecResult> {
    return run([...this.#entering(), ...command], options);
  }

  /** Starts a program in its own process group; it dies with the lab at the latest. */
  spawn(command: readonly string[], options: Omit<ExecOptions, 'input' | 'timeoutMs'> = {}): Running {
    const [nsenter = '', ...enter] = this.#entering();
    const child = spawn(nsenter, [...enter, ...command], {
      detached: true,
      stdio: ['pipe', 'pipe', 'pipe'],
      env: { ...process.env, ...options.env },
      ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    });
    const program = new Running(child, command);
    this.#programs.add(program);
    return program;
  }

  /**
   * Gives the programs that are started here from now on a folder of their own, empty, in place of one that all hosts of
   * this machine share.
   */
  async isolate(folder: string, type: 'tmpfs' | 'bpf' = 'tmpfs'): Promise<void> {
    const script = 'mkdir -p "$0" && mount -t "$1" none "$0" && echo mounted && exec sleep infinity';
    const holder = this.spawn(['unshare', '--mount', '--', 'sh', '-c', script, folder, type]);
    await holder.waitFor('mounted');
    this.#mounts = [`--mount=/proc/${holder.pid}/ns/mnt`];
  }

  #entering(): string[] {
    return ['nsenter', `--net=${this.path}`, ...this.#mounts, '--'];
  }

  /** Reads a sysctl of this host, or sets it when a value is given; returns its value. */
  async sysctl(key: string, value?: string | number): Promise<string> {
    if (value !== undefined) await this.exec(['sysctl', '-q', '-w', `${key}=${value}`]);
    return (await this.exec(['sysctl', '-n', key])).trim();
  }

  /** Runs a text of nft commands as one transaction. */
  async nft(text: string): Promise<string> {
    return this.exec(['nft', '-f', '-'], { input: text });
  }

  /** `ip route replace ...`, for instance `route('default via 10.0.0.1')`; a colon in it selects IPv6. */
  async route(what: string): Promise<void> {
    const family = what.includes(':') ? '-6' : '-4';
    await this.exec(['ip', family, 'route', 'replace', ...what.split(/\s+/)]);
  }

  /** Sets several sysctls of this host by one program, for starting one is what takes long in the VM. */
  async configure(sysctls: Readonly<Record<string, string | number>>): Promise<void> {
    await this.exec(['sysctl', '-q', '-w', ...Object.entries(sysctls).map(([key, value]) => `${key}=${value}`)]);
  }

  /** Makes the host forward packets of both families. */
  async forward(): Promise<void> {
    await this.configure({ 'net.ipv4.ip_forward': 1, 'net.ipv6.conf.all.forwarding': 1 });
  }

  /** Kills every program that runs here, whoever started it, and waits for those that this process started. */
  async killAll(): Promise<void> {
    for (const program of this.#programs) program.killGroup();
    // A child that left its group would keep its parent's output open, and with it `exited`.
    await killNamespace(this.namespace);
    await Promise.all([...this.#programs].map((program) => program.exited));
    this.#programs.clear();
  }

  /** For the exit handler, where nothing can be awaited. */
  killAllNow(): void {
    for (const program of this.#programs) program.killGroup();
  }
}

/** Two hosts joined by a veth pair. */
export class Link {
  readonly a: LinkEnd;
  readonly b: LinkEnd;
  readonly #conditions = new Map<LinkEnd, Conditions>();
  readonly #wire: Running | null;

  constructor(a: LinkEnd, b: LinkEnd, wire: Running | null = null) {
    this.a = a;
    this.b = b;
    this.#wire = wire;
  }

  /** The end that belongs to the host. */
  at(host: Host): LinkEnd {
    if (this.a.host === host) return this.a;
    if (this.b.host === host) return this.b;
    throw new Error(`${host.name} is not on the link ${this.a.host.name} - ${this.b.host.name}`);
  }

  /**
   * Swallows what `from` sends over this link, or both directions without an argument. Nobody is told: interfaces
   * stay up and neighbours stay resolved, as with a dead hop further on. Counted (see `swallowed`).
   */
  async blackhole(from?: Host): Promise<void> {
    // Dropped where it arrives: a drop on the sending host would make its own send calls fail with EPERM.
    for (const end of this.#receivers(from)) {
      await end.host.nft(`
        add table inet ${blackholeTable(end)}
        delete table inet ${blackholeTable(end)}
        table inet ${blackholeTable(end)} {
          chain arriving {
            type filter hook prerouting priority -500; policy accept;
            iifname "${end.dev}" icmpv6 type { nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert } accept
            iifname "${end.dev}" counter drop
          }
        }`);
    }
  }

  /** Packets swallowed since blackhole() of the direction that starts at `from`. */
  async swallowed(from: Host): Promise<number> {
    let packets = 0;
    for (const end of this.#receivers(from)) {
      const text = await end.host.exec(['nft', 'list', 'table', 'inet', blackholeTable(end)]);
      packets += Number(/counter packets (\d+)/.exec(text)?.[1] ?? 0);
    }
    return packets;
  }

  /** Ends blackhole() of one direction or both; harmless when there was none. */
  async restore(from?: Host): Promise<void> {
    for (const end of this.#receivers(from)) {
      await end.host.nft(`add table inet ${blackholeTable(end)}\ndelete table inet ${blackholeTable(end)}\n`);
    }
  }

  /** Unplugs one host's end, which both ends notice; routes over it are lost, as on a real machine. */
  async down(host: Host): Promise<void> {
    await host.exec(['ip', 'link', 'set', this.at(host).dev, 'down']);
  }

  /** Plugs it in again. Routes that went with the interface must be added again. */
  async up(host: Host): Promise<void> {
    const end = this.at(host);
    await host.exec(['ip', 'link', 'set', end.dev, 'up']);
  }

  /**
   * Puts other conditions in the place of those there are, for what `from` sends or, without it, for both directions. Packets that
   * wait stay where they are while only numbers change. Throws a LabError, with the remedy, on a kernel without netem.
   */
  async shape(conditions: Conditions, from?: Host): Promise<void> {
    const senders = from === undefined ? [this.a, this.b] : [this.at(from)];
    const { delayMs = 0, lossPercent = 0, ...others } = conditions;
    const wanted = this.#wire ? others : conditions;
    await Promise.all(
      senders.map(async (end) => {
        await shape(end, this.#conditions.get(end) ?? {}, wanted);
        this.#conditions.set(end, wanted);
      }),
    );
    const wire = this.#wire;
    if (!wire) return;
    const changed = (): number => wire.lines.filter((line) => line === 'changed').length;
    const before = changed();
    for (const end of senders) wire.write(`${end === this.a ? 'a' : 'b'} ${delayMs} ${lossPercent}\n`);
    await waitUntil(() => changed() >= before + senders.length, { deadlineMs: 10_000, what: 'the wire to change' });
  }

  #receivers(from: Host | undefined): LinkEnd[] {
    if (from === undefined) return [this.a, this.b];
    return this.at(from) === this.a ? [this.b] : [this.a];
  }
}

/** A set of hosts and links that goes away as a whole: `await using lab = await Lab.create('name')`. */
export class Lab implements AsyncDisposable {
  readonly name: string;
  readonly #prefix: string;
  readonly #hosts = new Map<string, Host>();
  readonly #onExit: () => void;

  private constructor(name: string) {
    this.name = name;
    this.#prefix = `${PREFIX}-${name}-${identity(process.pid)}`;
    this.#onExit = () => this.#disposeNow();
    process.once('exit', this.#onExit);
  }

  /** A new, empty lab. Removes what a killed run of the same lab left behind. `name`: small letters, digits, dots. */
  static async create(name: string): Promise<Lab> {
    if (!/^[a-z0-9.]{1,40}$/.test(name)) {
      throw new Error(`lab name '${name}': use 1 to 40 small letters, digits or dots`);
    }
    for (const namespace of namespacesOf(name)) {
      // Two labs of one name in one process are a mistake of the test; the remains of a dead process are not.
      if (namespace.owner === identity(process.pid)) throw new Error(`lab '${name}' exists already in this process`);
      if (!isAlive(namespace.owner)) await remove(namespace.full);
    }
    return new Lab(name);
  }

  /** The host of that name, made when it does not exist yet. */
  async host(name: string): Promise<Host> {
    const known = this.#hosts.get(name);
    if (known !== undefined) return known;
    if (!/^[a-z0-9.]{1,20}$/.test(name)) {
      throw new Error(`host name '${name}': use 1 to 20 small letters, digits or dots`);
    }
    const host = new Host(name, `${this.#prefix}-${name}`);
    this.#hosts.set(name, host);
    await local(['ip', 'netns', 'add', host.namespace]);
    await host.exec(['ip', 'link', 'set', 'lo', 'up']);
    // Without this an address is unusable for a second while the kernel looks for duplicates.
    await host.configure({ 'net.ipv6.conf.all.accept_dad': 0, 'net.ipv6.conf.default.accept_dad': 0 });
    return host;
  }

  /** Joins two hosts. Both interfaces are up and addressed on return; directly connected routes exist, no others. */
  async link(a: Host, b: Host, options: LinkOptions = {}): Promise<Link> {
    const [devA, devB] = [options.devA ?? interfaceName(b), options.devB ?? interfaceName(a)];
    const v4 = options.v4 === undefined ? undefined : pair4(options.v4);
    const v6 = options.v6 === undefined ? undefined : pair6(options.v6);
    const mtu = options.mtu === undefined ? [] : ['mtu', String(options.mtu)];
    if (options.wire) {
      await a.exec(['ip', 'tuntap', 'add', 'dev', devA, 'mode', 'tun']);
      await b.exec(['ip', 'tuntap', 'add', 'dev', devB, 'mode', 'tun']);
    } else {
      const near = ['ip', '-n', a.namespace, 'link', 'add', 'name', devA, ...mtu, 'type', 'veth'];
      await local([...near, 'peer', 'name', devB, ...mtu, 'netns', b.namespace]);
    }
    const ends = [
      end(a, devA, v4?.addresses[0], v6?.addresses[0]),
      end(b, devB, v4?.addresses[1], v6?.addresses[1]),
    ] as const;
    for (const side of ends) {
      const commands = [`link set ${side.dev} up ${options.wire ? mtu.join(' ') : ''}`];
      if (options.segments !== undefined) commands.push(`link set ${side.dev} gso_max_segs ${options.segments}`);
      if (side.v4 !== undefined) commands.push(`addr add ${side.v4}/${v4?.length} dev ${side.dev}`);
      if (side.v6 !== undefined) commands.push(`addr add ${side.v6}/${v6?.length} dev ${side.dev} nodad`);
      await side.host.exec(['ip', '-batch', '-'], { input: `${commands.join('\n')}\n` });
    }
    const wire = options.wire ? a.spawn(['python3', WIRE, a.path, devA, b.path, devB]) : null;
    await wire?.waitFor('ready');
    const link = new Link(ends[0], ends[1], wire);
    await link.shape(options);
    return link;
  }

  /** Removes one host before the others, as when a container ends: its namespace lives on while anybody else holds it. */
  async drop(host: Host): Promise<void> {
    this.#hosts.delete(host.name);
    await host.killAll();
    await remove(host.namespace);
  }

  /** Kills every program of the lab and removes its namespaces, and with them links, routes, rules and sysctls. */
  async [Symbol.asyncDispose](): Promise<void> {
    process.off('exit', this.#onExit);
    await Promise.all([...this.#hosts.values()].map((host) => host.killAll()));
    const failures: unknown[] = [];
    for (const host of this.#hosts.values()) {
      await remove(host.namespace).catch((error: unknown) => failures.push(error));
    }
    this.#hosts.clear();
    if (failures.length > 0) throw new AggregateError(failures, `lab '${this.name}' could not be removed entirely`);
  }

  #disposeNow(): void {
    for (const host of this.#hosts.values()) {
      host.killAllNow();
      try {
        execFileSync('ip', ['netns', 'del', host.namespace], { stdio: 'ignore' });
      } catch {
        // The next run of this lab removes what is left.
      }
    }
  }
}

function end(host: Host, dev: string, v4: string | undefined, v6: string | undefined): LinkEnd {
  return { host, dev, ...(v4 === undefined ? {} : { v4 }), ...(v6 === undefined ? {} : { v6 }) };
}

function blackholeTable(end: LinkEnd): string {
  return `lab_blackhole_${end.dev.replaceAll(/[^a-z0-9]/gi, '_')}`;
}

function interfaceName(peer: Host): string {
  return `to-${peer.name}`.slice(0, LONGEST_INTERFACE_NAME);
}

/** The queueing disciplines of these conditions, root first, as arguments of `tc qdisc`. */
function disciplines({ rateMbit, queueMs = DEFAULT_QUEUE_MS, delayMs = 0, lossPercent = 0 }: Conditions): string[][] {
  const found: string[][] = [];
  if (delayMs > 0 || lossPercent > 0) {
    const way = ['delay', `${delayMs}ms`, 'loss', `${lossPercent}%`, 'limit', String(IN_FLIGHT_LIMIT)];
    found.push(['root', 'handle', '1:', 'netem', ...way]);
  }
  if (rateMbit !== undefined) {
    const place = found.length === 0 ? ['root', 'handle', '2:'] : ['parent', '1:1', 'handle', '2:'];
    const limits = ['rate', `${rateMbit}mbit`, 'burst', SHAPER_BURST, 'latency', `${queueMs}ms`];
    found.push([...place, 'tbf', ...limits]);
  }
  return found;
}

async function shape({ host, dev }: LinkEnd, before: Conditions, after: Conditions): Promise<void> {
  const [old, wanted] = [disciplines(before), disciplines(after)];
  const places = (all: string[][]): string => all.map((words) => words.slice(0, 4)).join();
  const lines: string[] = [];
  // Another tree: the old one goes first, because a discipline cannot be changed into one of another kind.
  if (old.length > 0 && places(old) !== places(wanted)) lines.push(`qdisc del dev ${dev} root`);
  for (const words of wanted) lines.push(`qdisc replace dev ${dev} ${words.join(' ')}`);
  if (lines.length === 0) return;
  const command = ['tc', '-batch', '-'];
  const result = await host.try(command, { input: `${lines.join('\n')}\n` });
  if (result.code === 0) return;
  const unknown = result.stderr.includes('qdisc kind is unknown') && lines.some((line) => line.includes('netem'));
  const remedy =
    'this kernel has no netem (module sch_netem), which delay and loss need: run the test in the VM (tests/vm)';
  throw new LabError(host.name, [...command, ...lines], unknown ? { ...result, stderr: remedy } : result);
}

function pair4(network: string): { addresses: [string, string]; length: number } {
  const match = /^(\d+)\.(\d+)\.(\d+)\.(\d+)\/(\d+)$/.exec(network);
  const length = Number(match?.[5]);
  const last = Number(match?.[4]);
  if (match === null || length > 30 || last % 4 !== 0) {
    throw new Error(`'${network}' is no IPv4 network of at least four addresses, such as 10.1.0.0/30`);
  }
  const prefix = `${match[1]}.${match[2]}.${match[3]}`;
  return { addresses: [`${prefix}.${last + 1}`, `${prefix}.${last + 2}`], length };
}

function pair6(network: string): { addresses: [string, string]; length: number } {
  const match = /^([0-9a-f:]+::)\/(\d+)$/i.exec(network);
  if (match === null) throw new Error(`'${network}' is no IPv6 network ending in ::, such as fd00:1::/64`);
  return { addresses: [`${match[1]}1`, `${match[1]}2`], length: Number(match[2]) };
}

/** A process id with its start time: two processes never share it, even when the id is used again. */
function identity(pid: number): string {
  const stat = readFileSync(`/proc/${pid}/stat`, 'utf8');
  // Field 22, counted after the command name, which may itself contain spaces and brackets (proc(5)).
  const started = stat.slice(stat.lastIndexOf(')') + 2).split(' ')[19];
  return `${pid}x${Number(started).toString(36)}`;
}

function isAlive(owner: string): boolean {
  try {
    return identity(Number(owner.split('x')[0])) === owner;
  } catch {
    return false;
  }
}

function namespacesOf(lab: string): { full: string; owner: string }[] {
  let names: string[];
  try {
    names = readdirSync(NAMESPACE_FOLDER);
  } catch {
    return [];
  }
  return names.flatMap((full) => {
    const [prefix, name, owner] = full.split('-');
    return prefix === PREFIX && name === lab && owner !== undefined ? [{ full, owner }] : [];
  });
}

/** Kills what runs in a namespace of ours and deletes it. */
async function remove(namespace: string): Promise<void> {
  if (await killNamespace(namespace)) await local(['ip', 'netns', 'del', namespace]);
}

/** False when there is no such namespace (any more). */
async function killNamespace(namespace: string): Promise<boolean> {
  const pids = await run(['ip', 'netns', 'pids', namespace], {});
  for (const pid of pids.stdout.split('\n').filter((line) => line !== '')) {
    try {
      process.kill(Number(pid), 'SIGKILL');
    } catch {
      // It ended by itself meanwhile.
    }
  }
  return pids.code === 0;
}

async function local(command: readonly string[]): Promise<void> {
  const result = await run(command, {});
  if (result.code !== 0) throw new LabError('lab', command, result);
}

function run(command: readonly string[], options: ExecOptions): Promise<ExecResult> {
  const [program = '', ...args] = command;
  return new Promise((resolve) => {
    const child = execFile(
      program,
      args,
      {
        env: { ...process.env, ...options.env },
        maxBuffer: OUTPUT_LIMIT_BYTES,
        timeout: (options.timeoutMs ?? DEFAULT_EXEC_DEADLINE_MS) * PATIENCE,
        killSignal: 'SIGKILL',
        ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
      },
      (error, stdout, stderr) => {
        if (error === null) resolve({ code: 0, stdout, stderr });
        else if (error.killed) resolve({ code: 124, stdout, stderr: `${stderr}\nkilled after its time ran out` });
        else if (typeof error.code === 'number') resolve({ code: error.code, stdout, stderr });
        else resolve({ code: 127, stdout, stderr: stderr || error.message });
      },
    );
    child.stdin?.on('error', () => undefined);
    child.stdin?.end(options.input ?? '');
  });
}
