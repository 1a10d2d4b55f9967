import { step } from '../../appliance/client/manager.ts';
import { type Command, type Event, initial, type Rules, type State } from '../../appliance/client/state.ts';
import { type Address, type Endpoint, formatEndpoint } from '../../appliance/protocol/address.ts';
import { Connection, JOIN_TIMEOUT_MS, type Plan } from './network.ts';

/**
 * The manager and the chooser together on one simulated connection: what the network model does comes in as the kernel's and the
 * detours' events and readings, and what `step` commands is done to the network. Leases are asked for over the path to the detour,
 * are lost while it is out of reach, and are renewed at half of their time.
 */

const TOKEN = 1;
const STEP_MS = 50;
const TICK_MS = 200;
/** As the daemon reads the kernel while a connection carries something. */
const READ_MS = 250;
const LEASE_MS = 600_000;
/** How long until a detour's silence is noticed, and how often a silent one is asked. */
const NOTICE_MS = 2_000;
const ASK_MS = 650;
const PROBE_MS = 5_000;
const FIRST_PORT = 20_000;

const v4 = (text: string): Address => ({
  family: 4,
  value: text.split('.').reduce((sum, part) => (sum << 8n) | BigInt(part), 0n),
});
const CLIENT = v4('192.0.2.1');
const SERVER: Endpoint = { address: v4('198.51.100.5'), port: 443 };

type Socket = { readonly path: string; readonly local: Endpoint; readonly remote: Endpoint; known: boolean };

export class Whole {
  readonly state: State;
  readonly network: Connection;
  readonly plan: Plan;
  /** Joins that were sent, besides those of the direct path. */
  joins = 0;
  /** Most subflows at a time. */
  most = 0;
  /** Bytes delivered up to each second. */
  readonly seconds: number[] = [];
  /** What no kernel or router would have let pass. */
  readonly mistakes: string[] = [];
  readonly #sockets = new Map<string, Socket>();
  readonly #detours = new Map<string, { readonly path: string; readonly endpoint: Endpoint }>();
  readonly #silentSince = new Map<string, number>();
  readonly #told = new Map<string, 'up' | 'down'>();
  readonly #leased = new Set<string>();
  readonly #agenda: { readonly at: number; readonly run: () => void }[] = [];
  #port = 40_000;
  #renewing: Endpoint | null = null;

  constructor(plan: Plan, rules: Rules, seed: number) {
    this.plan = plan;
    this.network = new Connection(plan, seed);
    this.state = initial(rules, seed);
    const paths = Object.keys(plan.routes).filter((path) => path !== 'direct');
    for (const [index, path] of paths.entries()) {
      const endpoint = { address: v4(`203.0.113.${index + 1}`), port: 45_672 };
      const detour = formatEndpoint(endpoint);
      this.#detours.set(detour, { path, endpoint });
      this.#tell({ kind: 'detour-added', detour, name: path, endpoint });
      this.#ask(detour);
    }
    const local = this.#nextLocal();
    this.#sockets.set('direct', { path: 'direct', local, remote: SERVER, known: true });
    const opening = { token: TOKEN, serverSide: false, denyJoinId0: false, local, remote: SERVER };
    this.#after(300, () => {
      this.#tell({ kind: 'created', ...opening });
      this.#after(this.network.baseRtt('direct'), () => this.#tell({ kind: 'established', ...opening }));
    });
  }

  run(ms: number): void {
    for (const until = this.network.now + ms; this.network.now < until; ) {
      this.network.step(STEP_MS);
      const { now } = this.network;
      if (now % 1_000 === 0) this.seconds.push(this.network.delivered);
      this.#compare();
      for (const due of this.#agenda.filter(({ at }) => at <= now)) {
        this.#agenda.splice(this.#agenda.indexOf(due), 1);
        due.run();
      }
      if (now % TICK_MS === 0) this.#tell({ kind: 'tick' });
      if (now % READ_MS === 0) this.#read();
      this.most = Math.max(this.most, this.network.subflows.size);
    }
  }

  /** Paths that the manager takes for usable, and those that there are. */
  paths(): { readonly believed: readonly string[]; readonly real: readonly string[] } {
    const names = (this.state.connections.get(TOKEN)?.paths ?? [])
      .filter(({ kind, state }) => kind === 'nat' && (state === 'active' || state === 'backup'))
      .map(({ detour }) => this.#detours.get(detour ?? '')?.path ?? '?');
    const real = [...this.network.subflows.values()].filter(
      ({ established, path }) => established && path !== 'direct',
    );
    return { believed: names.sort(), real: real.map(({ path }) => path).sort() };
  }

  #after(ms: number, run: () => void): void {
    this.#agenda.push({ at: this.network.now + ms, run });
  }

  #tell(event: Event): void {
    for (const command of step(this.state, event, this.network.now)) this.#obey(command);
  }

  #nextLocal(): Endpoint {
    return { address: CLIENT, port: ++this.#port };
  }

  /** Control messages, for as long as the simulation runs. */
  #ask(detour: string): void {
    const path = this.#detours.get(detour)?.path ?? '';
    const rtt = this.network.baseRtt(path) / 2;
    const { now } = this.network;
    if (this.network.isUp(path)) {
      this.#silentSince.delete(detour);
      this.#after(rtt, () => {
        this.#told.set(detour, 'up');
        this.#tell({ kind: 'detour-up', detour, rttMs: rtt, epoch: 1n, local: CLIENT });
      });
    } else {
      const since = this.#silentSince.get(detour) ?? now;
      this.#silentSince.set(detour, since);
      if (now - since >= NOTICE_MS && this.#told.get(detour) === 'up') {
        this.#told.set(detour, 'down');
        this.#tell({ kind: 'detour-down', detour, why: 'no answer' });
      }
    }
    this.#after(this.#silentSince.has(detour) ? ASK_MS : PROBE_MS, () => this.#ask(detour));
  }

  #lease(detour: string): void {
    const key = `${detour}|${formatEndpoint(SERVER)}`;
    const found = this.#detours.get(detour);
    if (!found || !this.state.leases.has(key)) return;
    if (!this.network.isUp(found.path)) {
      this.#after(ASK_MS, () => this.#lease(detour));
      return;
    }
    this.#after(this.network.baseRtt(found.path) / 2, () => {
      if (!this.state.leases.has(key)) return;
      this.#leased.add(detour);
      const [port, expiresAt] = [FIRST_PORT + [...this.#detours.keys()].indexOf(detour), this.network.now + LEASE_MS];
      this.#tell({ kind: 'lease-granted', detour, server: SERVER, port, expiresAt });
      this.#after(LEASE_MS / 2, () => {
        if (this.state.leases.get(key)?.expiresAt === expiresAt) this.#lease(detour);
      });
    });
  }

  #obey(command: Command): void {
    switch (command.kind) {
      case 'want-lease':
      case 'doubt-lease':
        this.#lease(command.detour);
        break;
      case 'release-lease':
        this.#leased.delete(command.detour);
        break;
      case 'create-subflow':
        this.#create(command);
        break;
      case 'destroy-subflow': {
        const local = formatEndpoint(command.local);
        const socket = [...this.#sockets.values()].find((one) => formatEndpoint(one.local) === local);
        if (!socket) break;
        if (socket.path === 'direct') {
          this.mistakes.push('the direct path was destroyed');
          break;
        }
        this.#sockets.delete(socket.path);
        if (this.network.subflows.has(socket.path)) this.network.close(socket.path);
        this.#after(1, () => this.#closed(socket, 0));
        break;
      }
      case 'set-backup': {
        const local = formatEndpoint(command.local);
        const socket = [...this.#sockets.values()].find((one) => formatEndpoint(one.local) === local);
        const subflow = socket && this.network.subflows.get(socket.path);
        if (subflow) subflow.backup = command.backup;
        break;
      }
      default:
        break;
    }
  }

  #create({ remote, backup }: Extract<Command, { kind: 'create-subflow' }>): void {
    if (formatEndpoint(remote) === formatEndpoint(SERVER)) {
      this.#renew();
      return;
    }
    const [detour, found] =
      [...this.#detours].find(([, one]) => one.endpoint.address.value === remote.address.value) ?? [];
    if (!detour || !found || !this.#leased.has(detour)) {
      this.mistakes.push(`a join to ${formatEndpoint(remote)} without a lease`);
      return;
    }
    this.joins++;
    if (this.#sockets.get(found.path)?.known) {
      this.mistakes.push(`a second path through ${found.path}`);
      return;
    }
    if (this.network.subflows.has(found.path)) this.network.close(found.path);
    this.#sockets.set(found.path, { path: found.path, local: this.#nextLocal(), remote, known: false });
    this.network.join(found.path, backup);
  }

  /** A fresh subflow to the server itself: answered when the direct way is there, and then it takes the place of the silent one. */
  #renew(): void {
    if (this.#renewing) return;
    const local = this.#nextLocal();
    this.#renewing = local;
    this.#after(1.5 * this.network.baseRtt('direct'), () => {
      this.#renewing = null;
      const old = this.#sockets.get('direct');
      if (!old || !this.network.isUp('direct')) return;
      this.network.renew('direct');
      this.#sockets.set('direct', { path: 'direct', local, remote: SERVER, known: true });
      const event = { token: TOKEN, localId: 0, backup: false, error: 0, remote: SERVER };
      this.#tell({ kind: 'subflow-established', ...event, local });
      this.#closed(old, 0);
    });
  }

  #closed({ local, remote }: Socket, error: number): void {
    this.#tell({ kind: 'subflow-closed', token: TOKEN, localId: 0, backup: false, error, local, remote });
  }

  /** What became of joins since the last step. */
  #compare(): void {
    for (const socket of [...this.#sockets.values()]) {
      const { path, local, remote } = socket;
      const subflow = this.network.subflows.get(path);
      const event = { token: TOKEN, localId: 0, backup: subflow?.backup ?? false, error: 0, local, remote };
      if (subflow?.established && !socket.known) {
        socket.known = true;
        this.#tell({ kind: 'subflow-established', ...event });
      } else if (!subflow) {
        this.#sockets.delete(path);
        // Over the server's limit it is up for a moment; a join that nobody answers ends without a word.
        if (!this.network.isUp(path)) continue;
        this.#tell({ kind: 'subflow-established', ...event });
        this.#after(JOIN_TIMEOUT_MS / 1_000, () => this.#closed(socket, 0));
      }
    }
  }

  #read(): void {
    const subflows = [...this.#sockets.values()].flatMap(({ path, local, remote }) => {
      const subflow = this.network.subflows.get(path);
      if (!subflow) return [];
      const { established, backup, busyMs, rttMs, acked, deadSince } = subflow;
      const stuck = deadSince !== null && !backup;
      return {
        ...{
          local,
          remote,
          localId: 0,
          joined: path !== 'direct',
          established,
          fullyEstablished: established,
          backup,
          busyMs,
          rttMs,
        },
        ...{ timeouts: stuck ? 1 : 0, unacked: stuck ? 10 : 0, bytesAcked: Math.round(acked), bytesReceived: 0 },
      };
    });
    const local = this.state.connections.get(TOKEN)?.local;
    if (!local) return;
    const connection = { token: TOKEN, local, remote: SERVER, initiated: true, subflows };
    this.#tell({ kind: 'dump', askedAt: this.network.now, connections: [connection] });
  }
}
