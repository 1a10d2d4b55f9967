import { step } from '../../appliance/client/manager.ts';
import { type Command, type Event, initial, type Rules, type State } from '../../appliance/client/state.ts';
import { type Address, type Endpoint, formatEndpoint } from '../../appliance/protocol/address.ts';
import { dice } from './network.ts';

/**
 * A kernel, routers and servers for the pure manager, in simulated time: connections come and go, detours vanish and
 * return, joins are refused, time out or break, and events get lost. The kernel here is the truth; what the manager believes is compared
 * with it.
 */

type Subflow = {
  readonly local: Endpoint;
  readonly remote: Endpoint;
  /** Null for the direct one. */
  readonly detour: string | null;
  readonly localId: number;
  established: boolean;
  since: number;
  backup: boolean;
};

type KernelConnection = {
  readonly token: number;
  readonly local: Endpoint;
  readonly remote: Endpoint;
  readonly accepts: number;
  readonly subflows: Subflow[];
};

export type Circumstances = {
  readonly seed: number;
  readonly detours: number;
  /** New connections per second, and how long they live on average, ms. */
  readonly arrivals: number;
  readonly lifeMs: number;
  /** Detours go down after this long on average, and stay so for that long. */
  readonly upMs: number;
  readonly downMs: number;
  /** Probability that an event of the kernel is lost; the loss itself is always noticed. */
  readonly loss: number;
  /** Mean time until a subflow breaks by itself, ms. */
  readonly breakMs: number;
};

const TICK_MS = 200;
const RTT_MS = 40;
const LEASE_MS = 600_000;
/** How long until a detour's silence is noticed. */
const NOTICE_MS = 2_000;

const v4 = (text: string): Address => ({
  family: 4,
  value: text.split('.').reduce((sum, part) => (sum << 8n) | BigInt(part), 0n),
});

export class Agent {
  readonly state: State;
  readonly kernel = new Map<number, KernelConnection>();
  now = 0;
  joins = 0;
  /** Joins per connection that are no answer to anything that changed. */
  readonly joinsOf = new Map<number, number>();
  /** What no kernel or router would have let pass. */
  readonly mistakes: string[] = [];
  calm = false;
  readonly #rules: Rules;
  readonly #given: Circumstances;
  readonly #roll: () => number;
  readonly #up = new Map<string, boolean>();
  readonly #falls = new Map<string, number>();
  readonly #leases = new Map<string, { port: number; expiresAt: number }>();
  readonly #ports = new Map<string, { detour: string; server: string }>();
  /** What happens at which millisecond. */
  readonly #agenda = new Map<number, (() => void)[]>();
  #tokens = 0;
  #port = 32_768;
  #overrun = false;

  constructor(rules: Rules, given: Circumstances) {
    this.#rules = rules;
    this.#given = given;
    this.#roll = dice(given.seed);
    this.state = initial(rules, given.seed);
    for (let index = 0; index < given.detours; index++) this.#addDetour(index);
    this.#repeat(TICK_MS, () => this.tell({ kind: 'tick' }));
    if (given.arrivals > 0) this.#arrive();
  }

  /** Lets `ms` pass. */
  run(ms: number): void {
    for (const until = this.now + ms; this.now < until; ) {
      this.now++;
      const due = this.#agenda.get(this.now);
      this.#agenda.delete(this.now);
      for (const run of due ?? []) run();
    }
  }

  /** No more trouble: detours come back and stay, nothing breaks, nobody arrives. */
  settle(): void {
    this.calm = true;
    for (const key of this.#up.keys()) this.#rise(key);
  }

  isUp(detour: string): boolean {
    return this.#up.get(detour) ?? false;
  }

  tell(event: Event): void {
    for (const command of step(this.state, event, this.now)) this.#obey(command);
  }

  #after(ms: number, run: () => void): void {
    const at = this.now + Math.max(1, Math.round(ms));
    const due = this.#agenda.get(at);
    if (due) due.push(run);
    else this.#agenda.set(at, [run]);
  }

  #repeat(ms: number, run: () => void): void {
    this.#after(ms, () => {
      run();
      this.#repeat(ms, run);
    });
  }

  #exponential(mean: number): number {
    return -mean * Math.log(1 - this.#roll());
  }

  /** A kernel event: may be lost, which is always noticed. */
  #report(event: Event): void {
    if (!this.calm && this.#roll() < this.#given.loss) {
      if (!this.#overrun) this.#after(5, () => this.#resync());
      this.#overrun = true;
    } else this.tell(event);
  }

  #resync(): void {
    this.#overrun = false;
    this.tell({ kind: 'events-lost' });
  }

  #addDetour(index: number): void {
    const key = `203.0.113.${index + 1}:45672`;
    const endpoint = { address: v4(`203.0.113.${index + 1}`), port: 45_672 };
    this.#up.set(key, true);
    this.tell({ kind: 'detour-added', detour: key, name: `d${index}`, endpoint });
    this.#after(RTT_MS, () => this.#answer(key));
    this.#repeat(5_000, () => this.#answer(key));
    this.#after(this.#exponential(this.#given.upMs), () => this.#fall(key));
  }

  #answer(key: string): void {
    if (!this.isUp(key)) return;
    this.tell({ kind: 'detour-up', detour: key, rttMs: RTT_MS / 2, epoch: 1n, local: v4('192.0.2.1') });
  }

  #fall(key: string): void {
    if (this.calm || !this.isUp(key)) return;
    this.#up.set(key, false);
    const fall = (this.#falls.get(key) ?? 0) + 1;
    this.#falls.set(key, fall);
    this.#after(NOTICE_MS, () => {
      if (!this.isUp(key) && this.#falls.get(key) === fall)
        this.tell({ kind: 'detour-down', detour: key, why: 'no answer' });
    });
    // Its subflows are black holes now; some of them break, the others are left hanging.
    for (const connection of this.kernel.values()) {
      for (const subflow of [...connection.subflows]) {
        if (subflow.detour === key && subflow.established && this.#roll() < 0.5) this.#break(connection, subflow, 110);
      }
    }
    this.#after(this.#exponential(this.#given.downMs), () => this.#rise(key));
  }

  #rise(key: string): void {
    if (!this.#up.has(key) || this.isUp(key)) return;
    this.#up.set(key, true);
    this.#after(RTT_MS, () => this.#answer(key));
    if (!this.calm) this.#after(this.#exponential(this.#given.upMs), () => this.#fall(key));
  }

  #arrive(): void {
    this.#after(this.#exponential(1_000 / this.#given.arrivals), () => {
      if (this.calm) return;
      this.open(this.#exponential(this.#given.lifeMs));
      this.#arrive();
    });
  }

  /** Opens a connection that lives for `ms`. */
  open(ms: number): number {
    const token = ++this.#tokens;
    const local = { address: v4('192.0.2.1'), port: this.#ephemeral() };
    const remote = { address: v4(`198.51.100.${1 + Math.floor(this.#roll() * 20)}`), port: 443 };
    const direct = { local, remote, detour: null, localId: 0, established: true, since: 0, backup: false };
    this.kernel.set(token, { token, local, remote, accepts: this.#roll() < 0.2 ? 1 : 2, subflows: [direct] });
    const flags = { token, serverSide: false, denyJoinId0: false, local, remote };
    this.#report({ kind: 'created', ...flags });
    this.#after(RTT_MS, () => {
      if (this.kernel.has(token)) this.#report({ kind: 'established', ...flags });
    });
    this.#after(ms, () => this.#close(token));
    return token;
  }

  #close(token: number): void {
    if (this.kernel.delete(token)) this.#report({ kind: 'closed', token });
  }

  #ephemeral(): number {
    this.#port = this.#port >= 60_999 ? 32_768 : this.#port + 1;
    return this.#port;
  }

  #break(connection: KernelConnection, subflow: Subflow, error: number): void {
    const at = connection.subflows.indexOf(subflow);
    if (at < 0 || !this.kernel.has(connection.token)) return;
    connection.subflows.splice(at, 1);
    const { localId, local, remote, backup } = subflow;
    this.#report({ kind: 'subflow-closed', token: connection.token, localId, backup, error, local, remote });
  }

  #obey(command: Command): void {
    switch (command.kind) {
      case 'create-subflow':
        this.#create(command);
        break;
      case 'destroy-subflow': {
        const connection = this.kernel.get(command.token);
        const same = (a: Endpoint, b: Endpoint): boolean => formatEndpoint(a) === formatEndpoint(b);
        const subflow = connection?.subflows.find(
          (one) => same(one.local, command.local) && same(one.remote, command.remote),
        );
        if (subflow?.detour === null) this.mistakes.push(`the direct path of ${command.token} was destroyed`);
        else if (connection && subflow) this.#after(1, () => this.#break(connection, subflow, 0));
        break;
      }
      case 'set-backup': {
        const same = (a: Endpoint, b: Endpoint): boolean => formatEndpoint(a) === formatEndpoint(b);
        const subflow = this.kernel
          .get(command.token)
          ?.subflows.find((one) => same(one.local, command.local) && same(one.remote, command.remote));
        if (subflow) subflow.backup = command.backup;
        break;
      }
      case 'want-lease':
        this.#after(RTT_MS, () => this.#lease(command.detour, command.server));
        break;
      case 'doubt-lease':
        this.#after(RTT_MS, () => this.#lease(command.detour, command.server));
        break;
      case 'release-lease':
        this.#leases.delete(`${command.detour}|${formatEndpoint(command.server)}`);
        break;
      case 'dump': {
        const askedAt = this.now;
        this.#after(3, () => this.#dump(askedAt));
        break;
      }
      default:
        break;
    }
  }

  #lease(detour: string, server: Endpoint): void {
    const key = `${detour}|${formatEndpoint(server)}`;
    if (!this.isUp(detour)) {
      // The shell goes on asking for as long as the lease is wanted.
      if (this.state.leases.has(key)) this.#after(1_000, () => this.#lease(detour, server));
      return;
    }
    if (!this.state.leases.has(key)) return;
    const port = this.#leases.get(key)?.port ?? 20_000 + this.#ports.size;
    const expiresAt = this.now + LEASE_MS;
    this.#leases.set(key, { port, expiresAt });
    this.#ports.set(`${detour}|${port}`, { detour, server: formatEndpoint(server) });
    // As the shell does: half of the time is left when it asks again.
    this.#after(LEASE_MS / 2, () => {
      if (this.#leases.get(key)?.expiresAt === expiresAt) this.#lease(detour, server);
    });
    this.tell({ kind: 'lease-granted', detour, server, port, expiresAt });
  }

  #create(command: Extract<Command, { kind: 'create-subflow' }>): void {
    const connection = this.kernel.get(command.token);
    if (!connection) {
      const { token, local, remote } = command;
      this.#after(1, () => this.tell({ kind: 'create-failed', token, local, remote, code: 'ESRCH' }));
      return;
    }
    const detour = [...this.#up.keys()].find((key) => formatEndpoint({ ...command.remote, port: 45_672 }) === key);
    if (detour === undefined) {
      this.mistakes.push(`a join to ${formatEndpoint(command.remote)}, which is no detour`);
      return;
    }
    this.joins++;
    this.joinsOf.set(command.token, (this.joinsOf.get(command.token) ?? 0) + 1);
    const lease = this.#ports.get(`${detour}|${command.remote.port}`);
    if (lease?.server !== formatEndpoint(connection.remote)) {
      this.mistakes.push(`a join of ${command.token} to a port that is not leased for its server`);
      return;
    }
    // A join given up for lost may still be under way, and what is established is known after a moment.
    if (connection.subflows.some((one) => one.detour === detour && one.established && this.now - one.since > 1_000))
      this.mistakes.push(`a second path of ${command.token} through ${detour}`);
    const subflow: Subflow = {
      local: { address: command.local, port: this.#ephemeral() },
      remote: command.remote,
      detour,
      localId: command.localId,
      established: false,
      since: 0,
      backup: command.backup,
    };
    connection.subflows.push(subflow);
    this.#after(1.5 * RTT_MS, () => this.#handshake(connection, subflow));
  }

  #handshake(connection: KernelConnection, subflow: Subflow): void {
    if (!this.kernel.has(connection.token) || !connection.subflows.includes(subflow)) return;
    const { local, remote, localId, backup } = subflow;
    if (subflow.detour === null || !this.isUp(subflow.detour)) {
      // Silence: the kernel gives up by itself much later (six SYNs, RFC 6298).
      this.#after(60_000, () => this.#break(connection, subflow, 110));
      return;
    }
    if (!this.calm && this.#roll() < 0.03) {
      this.#break(connection, subflow, 111);
      return;
    }
    subflow.established = true;
    subflow.since = this.now;
    this.#report({ kind: 'subflow-established', token: connection.token, localId, backup, error: 0, local, remote });
    const extra = connection.subflows.filter((one) => one.established && one.detour !== null).length;
    if (extra > connection.accepts) this.#after(5, () => this.#break(connection, subflow, 0));
    else
      this.#after(this.#exponential(this.#given.breakMs), () => {
        if (!this.calm) this.#break(connection, subflow, 104);
      });
  }

  #dump(askedAt: number): void {
    this.tell({
      kind: 'dump',
      askedAt,
      connections: [...this.kernel.values()].map(({ token, local, remote, subflows }) => ({
        token,
        local,
        remote,
        initiated: true,
        subflows: subflows.map((one) => ({
          local: one.local,
          remote: one.remote,
          localId: one.localId,
          joined: one.detour !== null,
          established: one.established,
          fullyEstablished: one.established,
          backup: one.backup,
          timeouts: 0,
          unacked: 0,
          busyMs: 0,
          rttMs: RTT_MS,
          bytesAcked: 0,
          bytesReceived: 0,
        })),
      })),
    });
  }

  /** Where the manager and the kernel disagree, in words; only meaningful when all is quiet. */
  differences(): string[] {
    const found: string[] = [];
    for (const token of this.state.connections.keys())
      if (!this.kernel.has(token)) found.push(`${token} is gone, and still managed`);
    for (const connection of this.kernel.values()) {
      const believed = this.state.connections.get(connection.token);
      if (!believed) {
        found.push(`${connection.token} is not managed`);
        continue;
      }
      const live = believed.paths.filter(
        ({ kind, state }) => kind === 'nat' && (state === 'active' || state === 'backup'),
      );
      const real = connection.subflows.filter((one) => one.established && one.detour !== null);
      if (live.length !== real.length)
        found.push(`${connection.token} has ${real.length} detours, and is believed to have ${live.length}`);
      const wanted = Math.min(this.#rules.maxPaths, connection.accepts, this.#given.detours);
      if (real.length !== wanted) found.push(`${connection.token} has ${real.length} detours and could have ${wanted}`);
    }
    return found;
  }
}
