import { isDeepStrictEqual } from 'node:util';
import type { ConnectionSample, Diag, SubflowSample } from '../../appliance/kernel/diag.ts';
import type { PathEvent, PathManager, Subflow, SubflowRequest } from '../../appliance/kernel/mptcp.ts';
import { NetlinkError } from '../../appliance/kernel/netlink.ts';
import {
  type Address,
  type Endpoint,
  formatAddress,
  formatEndpoint,
  sameAddress,
  sameEndpoint,
} from '../../appliance/protocol/address.ts';
import type { FakeClock } from './clock.ts';

/** What becomes of a SYN sent to `remote`: it reaches this server, is reset, or is never heard of again. */
export type Way = (local: Endpoint, remote: Endpoint, server: Endpoint) => Endpoint | 'reset' | 'silence';

type Flow = Subflow & {
  readonly localId: number;
  readonly joined: boolean;
  state: 'syn-sent' | 'established';
  timeouts: number;
  acked: number;
};

type Connection = Subflow & {
  readonly token: number;
  readonly serverSide: boolean;
  readonly denyJoinId0: boolean;
  readonly kernelManaged: boolean;
  established: boolean;
  readonly ids: Map<string, number>;
  /** What the peer was told of, by its id. */
  readonly announced: Map<number, string>;
  flows: Flow[];
};

export type Opening = Partial<Pick<Connection, 'serverSide' | 'denyJoinId0' | 'kernelManaged'>>;

const ECONNRESET = 104;

/**
 * The MPTCP of one host as its path manager and its diagnosis show it. Refuses what the kernel refuses, by the same codes
 * (docs/kernel-notes.md), and closes what the server has no room for.
 */
export class FakeKernel {
  /** Extra subflows that servers accept. */
  limit = 2;
  /** Round trip of every path, ms. */
  rtt = 10;
  way: Way = () => 'silence';
  /** While true, events are dropped; `events-lost` follows when it ends. */
  #deaf = false;
  readonly #clock: FakeClock;
  readonly #connections = new Map<number, Connection>();
  readonly #samples = new Map<number, ConnectionSample>();
  #listener: (event: PathEvent) => void = () => undefined;
  #nextToken = 1;
  #nextPort = 50_000;
  /** Every SUBFLOW_CREATE tried. */
  readonly created: SubflowRequest[] = [];

  constructor(clock: FakeClock) {
    this.#clock = clock;
  }

  readonly openPathManager = async (onEvent: (event: PathEvent) => void): Promise<PathManager> => {
    this.#listener = onEvent;
    return {
      subflowCreate: async (request) => this.#create(request),
      subflowDestroy: async (token, subflow) => {
        const connection = this.#find(token, 'destroying a subflow');
        const flow = connection.flows.find((one) => same(one, subflow));
        if (!flow) throw new NetlinkError('destroying a subflow', 'ESRCH');
        this.#drop(connection, flow, 0);
      },
      setBackup: async (token, subflow) => {
        const connection = this.#find(token, 'changing a subflow');
        if (!connection.flows.some((one) => same(one, subflow))) throw new NetlinkError('changing a subflow', 'ESRCH');
      },
      announce: async (token, localId, address) => {
        const what = 'announcing an address';
        const { announced } = this.#find(token, what);
        const known = [...announced].some(([id, text]) => (id === localId) !== (text === formatAddress(address)));
        if (localId === 0 || known) throw new NetlinkError(what, 'EINVAL');
        announced.set(localId, formatAddress(address));
      },
      withdraw: async (token, localId) => {
        const what = 'taking an address back';
        if (!this.#find(token, what).announced.delete(localId)) throw new NetlinkError(what, 'EINVAL');
      },
      close: () => {
        this.#listener = () => undefined;
      },
    };
  };

  get diag(): Diag {
    return {
      connections: async () => [...this.#connections.values()].map((connection) => this.#share(sampleOf(connection))),
      connecting: async () => [],
      abort: async ({ local, remote }) => {
        for (const connection of this.#connections.values()) {
          const flow = connection.flows.find((one) => same(one, { local, remote }));
          if (!flow) continue;
          this.#drop(connection, flow, ECONNRESET);
          return;
        }
        throw new NetlinkError('ending a socket', 'ENOENT');
      },
      close: () => undefined,
    };
  }

  /** What did not change since the last reading is the same object. */
  #share(sample: ConnectionSample): ConnectionSample {
    const before = this.#samples.get(sample.token);
    if (before && isDeepStrictEqual(before, sample)) return before;
    this.#samples.set(sample.token, sample);
    return sample;
  }

  /** An application connects. */
  open(local: Endpoint, remote: Endpoint, opening: Opening = {}): number {
    const token = this.#nextToken++;
    const connection: Connection = {
      token,
      local,
      remote,
      serverSide: opening.serverSide ?? false,
      denyJoinId0: opening.denyJoinId0 ?? false,
      kernelManaged: opening.kernelManaged ?? false,
      established: false,
      ids: new Map(),
      announced: new Map(),
      flows: [{ local, remote, localId: 0, joined: false, state: 'established', timeouts: 0, acked: 0 }],
    };
    this.#connections.set(token, connection);
    this.#tell({ kind: 'created', ...facts(connection) });
    return token;
  }

  /** Its first data is acknowledged. */
  establish(token: number): void {
    const connection = this.#connections.get(token);
    if (!connection) throw new Error(`no connection ${token}`);
    this.send(token);
    connection.established = true;
    this.#tell({ kind: 'established', ...facts(connection) });
  }

  /** A byte on its first subflow is acknowledged. */
  send(token: number): void {
    const first = this.#connections.get(token)?.flows[0];
    if (first) first.acked++;
  }

  /** The application closes; as the kernel does, without a word about each subflow. */
  close(token: number): void {
    if (this.#connections.delete(token)) this.#tell({ kind: 'closed', token });
  }

  /** A subflow breaks with an error. */
  breakFlow(token: number, remote: Endpoint, error: number): void {
    const connection = this.#find(token, 'test');
    const flow = connection.flows.find((one) => sameEndpoint(one.remote, remote));
    if (!flow) throw new Error(`no subflow to ${formatEndpoint(remote)}`);
    this.#drop(connection, flow, error);
  }

  /** Nothing gets through on a subflow, `timeouts` timeouts in a row; of those from one address, when that is given. */
  stall(token: number, remote: Endpoint, timeouts: number, local?: Address): void {
    for (const flow of this.#find(token, 'test').flows) {
      if (!sameEndpoint(flow.remote, remote) || (local && !sameAddress(flow.local.address, local))) continue;
      flow.timeouts = timeouts;
    }
  }

  /** What the peer of a connection has been told of. */
  announced(token: number): string[] {
    return [...(this.#connections.get(token)?.announced.values() ?? [])];
  }

  deafen(): void {
    this.#deaf = true;
  }

  hearAgain(): void {
    this.#deaf = false;
    this.#tell({ kind: 'events-lost' });
  }

  /** Remote ends of the established subflows of a connection, the first one first. */
  flows(token: number): string[] {
    const flows = this.#connections.get(token)?.flows ?? [];
    return flows.filter(({ state }) => state === 'established').map(({ remote }) => formatEndpoint(remote));
  }

  #tell(event: PathEvent): void {
    if (!this.#deaf) this.#listener(event);
  }

  #find(token: number, what: string): Connection {
    const connection = this.#connections.get(token);
    if (!connection || connection.kernelManaged) throw new NetlinkError(what, 'EINVAL');
    return connection;
  }

  #create(request: SubflowRequest): void {
    const what = 'creating a subflow';
    this.created.push(request);
    const connection = this.#find(request.token, what);
    const id = sameAddress(request.local, connection.local.address)
      ? 0
      : connection.ids.get(formatAddress(request.local));
    if (id !== undefined && id !== request.localId) throw new NetlinkError(what, 'EINVAL');
    if (request.local.family !== request.remote.address.family) throw new NetlinkError(what, 'EINVAL');
    if (!connection.established) throw new NetlinkError(what, 'ENOTCONN');
    if (id === undefined) connection.ids.set(formatAddress(request.local), request.localId);
    const flow: Flow = {
      local: { address: request.local, port: this.#nextPort++ },
      remote: request.remote,
      localId: request.localId,
      joined: true,
      state: 'syn-sent',
      timeouts: 0,
      acked: 0,
    };
    connection.flows.push(flow);
    const reached = this.way(flow.local, flow.remote, connection.remote);
    if (reached === 'silence') return;
    this.#clock.after(this.rtt, () => {
      if (!this.#connections.has(connection.token) || !connection.flows.includes(flow)) return;
      // Another host, or the right one that does not know the token, resets (RFC 8684 3.2).
      if (reached === 'reset' || !sameEndpoint(reached, connection.remote)) {
        this.#drop(connection, flow, 111);
        return;
      }
      flow.state = 'established';
      this.#tell({ kind: 'subflow-established', ...flowFacts(connection, flow, 0) });
      const extra = connection.flows.filter(({ joined, state }) => joined && state === 'established').length;
      if (extra > this.limit) this.#clock.after(1, () => this.#drop(connection, flow, 0));
    });
  }

  #drop(connection: Connection, flow: Flow, error: number): void {
    if (!connection.flows.includes(flow)) return;
    connection.flows = connection.flows.filter((one) => one !== flow);
    this.#tell({ kind: 'subflow-closed', ...flowFacts(connection, flow, error) });
  }
}

const same = (a: Subflow, b: Subflow): boolean => sameEndpoint(a.local, b.local) && sameEndpoint(a.remote, b.remote);

const facts = ({ token, local, remote, serverSide, denyJoinId0 }: Connection) => ({
  token,
  local,
  remote,
  serverSide,
  denyJoinId0,
});

const flowFacts = ({ token }: Connection, { local, remote, localId }: Flow, error: number) => ({
  token,
  local,
  remote,
  localId,
  remoteId: 0,
  backup: false,
  error,
});

function sampleOf({ token, local, remote, serverSide, established, flows }: Connection): ConnectionSample {
  const subflows = flows.map(
    (flow): SubflowSample => ({
      local: flow.local,
      remote: flow.remote,
      localId: flow.localId,
      joined: flow.joined,
      initiated: !serverSide,
      established: flow.state === 'established',
      fullyEstablished: flow.state === 'established' && established,
      backup: false,
      rttMs: 10,
      retransmits: 0,
      timeouts: flow.timeouts,
      unacked: flow.timeouts > 0 ? 1 : 0,
      busyMs: 0,
      bytesAcked: flow.acked,
      bytesReceived: 0,
    }),
  );
  return { token, local, remote, initiated: !serverSide, subflows };
}
