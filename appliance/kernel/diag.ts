import pLimit from 'p-limit';
import { type Address, type Endpoint, readAddress, sameAddress, writeAddress } from '../protocol/address.ts';
import type { Namespace } from './namespaces.ts';
import {
  address4,
  attribute,
  attributeEnd,
  type NetlinkSocket,
  openNetlink,
  PROTOCOL,
  seekAttribute,
  u32,
} from './netlink.ts';

/**
 * MPTCP connections and their subflows as the kernel counts them (NETLINK_SOCK_DIAG). Offsets and numbers:
 * include/uapi/linux/{inet_diag,mptcp,tcp}.h of Linux 6.1; these structures only ever grow at their end.
 */

/** One subflow now. Byte counts are of this subflow alone and include retransmissions by nobody. */
export type SubflowSample = {
  readonly local: Endpoint;
  readonly remote: Endpoint;
  readonly localId: number;
  /** A join (MP_JOIN), not the connection's first subflow. */
  readonly joined: boolean;
  /** This host sent the SYN. */
  readonly initiated: boolean;
  /** Past the handshake and not yet closing. */
  readonly established: boolean;
  /** The peer has acknowledged data, too: from then on, with its event ESTABLISHED, the kernel takes further subflows. */
  readonly fullyEstablished: boolean;
  /** Either end asked to use it only when nothing else works. */
  readonly backup: boolean;
  /** Smoothed round-trip time, ms; 0 before the first sample. */
  readonly rttMs: number;
  /** Segments sent again, over the life of the subflow. */
  readonly retransmits: number;
  /** Retransmission timeouts in a row; unlike the back-off, probes of a full receiver do not count. */
  readonly timeouts: number;
  /** Segments sent and not yet acknowledged. */
  readonly unacked: number;
  /** For how long there has been something to send that the other end had room for, ms. */
  readonly busyMs: number;
  readonly bytesAcked: number;
  readonly bytesReceived: number;
};

/** One connection with all its subflows. */
export type ConnectionSample = {
  readonly token: number;
  readonly local: Endpoint;
  readonly remote: Endpoint;
  /** This host opened it: its first subflow's SYN asked for MPTCP, or its joins did. */
  readonly initiated: boolean;
  readonly subflows: readonly SubflowSample[];
};

/** An MPTCP connection that this host asked for and nobody has answered yet. */
export type ConnectingSample = Pick<ConnectionSample, 'token' | 'local' | 'remote'>;

export type Diag = {
  /**
   * Every live MPTCP connection of this namespace; those that fell back to TCP are no longer any. One of which nothing changed
   * since the last reading is the same object. Costs a walk over all TCP sockets when there is at least one.
   * @throws NetlinkError
   */
  connections(): Promise<ConnectionSample[]>;
  /** Connections whose first SYN is unanswered. Costs a walk over the MPTCP connections alone. @throws NetlinkError */
  connecting(): Promise<ConnectingSample[]>;
  /**
   * Ends a TCP socket of this namespace, also one that its application has closed: its peer is sent a reset at once (Linux 6.12;
   * before, an orphan's peer is not told). Needs CAP_NET_ADMIN and CONFIG_INET_DIAG_DESTROY.
   * @throws NetlinkError ENOENT when there is none, EOPNOTSUPP when the kernel cannot
   */
  abort(socket: { readonly local: Endpoint; readonly remote: Endpoint }): Promise<void>;
  close(): void;
};

/** linux/sock_diag.h */
const SOCK_DIAG_BY_FAMILY = 20;
const SOCK_DESTROY = 21;
const AF_INET = 2;
const AF_INET6 = 10;
const IPPROTO_TCP = 6;
const IPPROTO_MPTCP = 262;

/** struct inet_diag_req_v2 */
const REQUEST_BYTES = 56;
const REQUEST_STATES_AT = 4;
const REQUEST_ID_AT = 8;
const EXTENSION_INFO = 2;
const REQUEST_PROTOCOL = 3;

/** struct inet_diag_msg: family, state, timer, retrans, then struct inet_diag_sockid. */
const MESSAGE_BYTES = 72;
const STATE_AT = 1;
const MESSAGE_ID_AT = 4;
const SPORT_AT = 4;
const DPORT_AT = 6;
const SOURCE_AT = 8;
const DESTINATION_AT = 24;
/** All ones: any (INET_DIAG_NOCOOKIE). */
const COOKIE_AT = 44;
const ATTRIBUTE_INFO = 2;
const ATTRIBUTE_ULP_INFO = 19;

/** Inside INET_DIAG_ULP_INFO. */
const ULP_MPTCP = 3;
const SUBFLOW = { TOKEN_LOC: 2, FLAGS: 8, ID_LOC: 10 } as const;
const SUBFLOW_FLAG = {
  MCAP_LOC: 2,
  JOIN_REM: 4,
  JOIN_LOC: 8,
  BKUP_REM: 16,
  BKUP_LOC: 32,
  FULLY_ESTABLISHED: 64,
} as const;

/** struct tcp_info */
const TCP_INFO = {
  RETRANSMITS: 2,
  UNACKED: 24,
  RTT: 68,
  TOTAL_RETRANS: 100,
  BYTES_ACKED: 120,
  BYTES_RECEIVED: 128,
  BUSY_TIME: 168,
  RWND_LIMITED: 176,
} as const;

/** struct mptcp_info */
const MPTCP_INFO = { FLAGS: 8, TOKEN: 12 } as const;
const MPTCP_INFO_FALLBACK = 1;

/** include/net/tcp_states.h */
const STATE = { ESTABLISHED: 1, SYN_SENT: 2, TIME_WAIT: 6, CLOSE: 7, LISTEN: 10, NEW_SYN_RECV: 12 } as const;
const LIVE_STATES = ~((1 << STATE.TIME_WAIT) | (1 << STATE.CLOSE) | (1 << STATE.LISTEN) | (1 << STATE.NEW_SYN_RECV));

/** Opens the port. @throws NetlinkError */
export function openDiag(namespace: Namespace): Diag {
  const open = (): NetlinkSocket => openNetlink(PROTOCOL.SOCK_DIAG, { namespace });
  const connections = inTurn(open, open());
  const read = reader();
  // Of their own, because they are asked often, must not wait for the long one, and cost less side by side: one wake-up.
  const connecting = [AF_INET, AF_INET6].map((family) => ({ family, ...inTurn(open, null) }));
  let ending: NetlinkSocket | null = null;
  return {
    connections: () => connections.run(read),
    async connecting() {
      const found = connecting.map(({ family, run }) => run((socket) => readConnecting(socket, family)));
      return (await Promise.all(found)).flat();
    },
    async abort({ local, remote }) {
      // Not in turn: what is sent to the peer has to leave before what the caller does next.
      ending ??= open();
      const request = Buffer.alloc(REQUEST_BYTES);
      request[0] = remote.address.family === 4 ? AF_INET : AF_INET6;
      request[1] = IPPROTO_TCP;
      request.writeInt32LE(-1, REQUEST_STATES_AT);
      // struct inet_diag_req_v2 ends in the struct inet_diag_sockid that a message has after its first word.
      const id = request.subarray(REQUEST_ID_AT);
      id.writeUInt16BE(local.port, SPORT_AT - MESSAGE_ID_AT);
      id.writeUInt16BE(remote.port, DPORT_AT - MESSAGE_ID_AT);
      writeSocketAddress(local.address, id, SOURCE_AT - MESSAGE_ID_AT);
      writeSocketAddress(remote.address, id, DESTINATION_AT - MESSAGE_ID_AT);
      id.fill(0xff, COOKIE_AT - MESSAGE_ID_AT);
      await ending.request('ending a socket', SOCK_DESTROY, request);
    },
    close() {
      for (const socket of [connections, ...connecting]) socket.close();
      ending?.close();
    },
  };
}

/** One dump at a time: the kernel answers EBUSY to a second one on the same socket. Null: opened when first needed. */
function inTurn(
  open: () => NetlinkSocket,
  opened: NetlinkSocket | null,
): {
  run<T>(task: (socket: NetlinkSocket) => Promise<T>): Promise<T>;
  close(): void;
} {
  let socket = opened;
  const limit = pLimit(1);
  return {
    run: (task) =>
      limit(() => {
        socket ??= open();
        return task(socket);
      }),
    close: () => socket?.close(),
  };
}

async function readConnecting(socket: NetlinkSocket, family: number): Promise<ConnectingSample[]> {
  const found: ConnectingSample[] = [];
  await dump(socket, family, IPPROTO_MPTCP, 1 << STATE.SYN_SENT, (payload) => {
    const token = tokenOf(payload);
    if (token !== null) found.push({ token, ...endsOf(payload) });
  });
  return found;
}

/** The token in a record of an MPTCP connection; null for one that fell back to TCP. */
function tokenOf(payload: Buffer): number | null {
  const info = seekAttribute(payload, MESSAGE_BYTES, payload.length, ATTRIBUTE_INFO);
  if (info < 0 || attributeEnd(payload, info) < info + MPTCP_INFO.TOKEN + 4) return null;
  if ((payload.readUInt32LE(info + MPTCP_INFO.FLAGS) & MPTCP_INFO_FALLBACK) !== 0) return null;
  return payload.readUInt32LE(info + MPTCP_INFO.TOKEN) || null;
}

/** One connection as it was read last. */
type Entry = {
  sample: ConnectionSample;
  /** The reading that it was seen in, and how many of its subflows that has handed over. */
  reading: number;
  seen: number;
  /** Its subflows in this reading; null as long as they are what they were in the last one. */
  changed: SubflowSample[] | null;
};

/**
 * Readings that share what did not change: ten thousand idle connections would otherwise be ten thousand new objects every few seconds,
 * and sweeping those up cost more than anything else the agent did (8 % of a core).
 */
function reader(): (socket: NetlinkSocket) => Promise<ConnectionSample[]> {
  const entries = new Map<number, Entry>();
  let reading = 0;
  return async (socket) => {
    reading++;
    for (const family of [AF_INET, AF_INET6]) {
      await dump(socket, family, IPPROTO_MPTCP, LIVE_STATES, (payload) => {
        const token = tokenOf(payload);
        if (token === null) return;
        let entry = entries.get(token);
        if (!entry || !isAt(payload, entry.sample)) {
          const sample = { token, ...endsOf(payload), initiated: false, subflows: [] };
          entry = { sample, reading, seen: 0, changed: null };
          entries.set(token, entry);
        }
        entry.reading = reading;
        entry.seen = 0;
        entry.changed = null;
      });
    }
    for (const [token, entry] of entries) if (entry.reading !== reading) entries.delete(token);
    if (entries.size > 0) {
      for (const family of [AF_INET, AF_INET6])
        await dump(socket, family, IPPROTO_TCP, LIVE_STATES, (payload) => take(entries, payload));
    }
    return [...entries.values()].map(complete);
  };
}

/** Takes in one TCP socket, if it is a subflow. */
function take(entries: ReadonlyMap<number, Entry>, payload: Buffer): void {
  const found = locate(payload);
  const entry = found && entries.get(found.token);
  if (!found || !entry) return;
  const before = entry.sample.subflows[entry.seen];
  const same = before !== undefined && isUnchanged(payload, found, before);
  if (!same) entry.changed ??= entry.sample.subflows.slice(0, entry.seen);
  entry.changed?.push(same ? before : readSubflow(payload, found));
  entry.seen++;
}

/** The connection when all of its subflows were handed over. */
function complete(entry: Entry): ConnectionSample {
  const { sample, seen } = entry;
  const subflows = entry.changed ?? (seen < sample.subflows.length ? sample.subflows.slice(0, seen) : null);
  if (subflows) {
    const first = subflows.find(({ joined }) => !joined);
    const initiated = first ? first.initiated : subflows.some((one) => one.initiated);
    entry.sample = { ...sample, initiated, subflows };
  }
  return entry.sample;
}

function dump(
  socket: NetlinkSocket,
  family: number,
  protocol: number,
  states: number,
  each: (record: Buffer) => void,
): Promise<void> {
  const request = Buffer.alloc(REQUEST_BYTES);
  request[0] = family;
  // The field has 8 bits and 262 does not fit: the attribute below overrides it.
  request[1] = protocol & 0xff;
  request[2] = EXTENSION_INFO;
  request.writeInt32LE(states, REQUEST_STATES_AT);
  const payload = Buffer.concat([request, attribute(REQUEST_PROTOCOL, u32(protocol))]);
  return socket.dump('listing sockets', SOCK_DIAG_BY_FAMILY, payload, (bytes) => {
    if (bytes.length >= MESSAGE_BYTES) each(bytes);
  });
}

const endsOf = (bytes: Buffer): { local: Endpoint; remote: Endpoint } => ({
  local: { address: socketAddress(bytes, SOURCE_AT), port: bytes.readUInt16BE(SPORT_AT) },
  remote: { address: socketAddress(bytes, DESTINATION_AT), port: bytes.readUInt16BE(DPORT_AT) },
});

/** Whether a record has these ends. */
const isAt = (bytes: Buffer, { local, remote }: { local: Endpoint; remote: Endpoint }): boolean =>
  bytes.readUInt16BE(SPORT_AT) === local.port &&
  bytes.readUInt16BE(DPORT_AT) === remote.port &&
  sameAddress(socketAddress(bytes, SOURCE_AT), local.address) &&
  sameAddress(socketAddress(bytes, DESTINATION_AT), remote.address);

function socketAddress(bytes: Buffer, at: number): Address {
  return bytes[0] === AF_INET ? address4(bytes.readUInt32BE(at)) : readAddress(bytes, at);
}

function writeSocketAddress({ family, value }: Address, bytes: Buffer, at: number): void {
  if (family === 4) bytes.writeUInt32BE(Number(value), at);
  else writeAddress({ family, value }, bytes, at);
}

/** Where the parts of a record of a subflow begin. */
type Located = { readonly token: number; readonly flags: number; readonly info: number; readonly localId: number };

/** Null for a TCP socket that is no subflow. */
function locate(payload: Buffer): Located | null {
  const end = payload.length;
  const info = seekAttribute(payload, MESSAGE_BYTES, end, ATTRIBUTE_INFO);
  const ulp = seekAttribute(payload, MESSAGE_BYTES, end, ATTRIBUTE_ULP_INFO);
  if (info < 0 || ulp < 0 || attributeEnd(payload, info) < info + TCP_INFO.RWND_LIMITED + 8) return null;
  const mptcp = seekAttribute(payload, ulp, attributeEnd(payload, ulp), ULP_MPTCP);
  if (mptcp < 0) return null;
  const detail = (type: number): number | null => {
    const at = seekAttribute(payload, mptcp, attributeEnd(payload, mptcp), type);
    return at < 0 ? null : payload.readUIntLE(at, Math.min(4, attributeEnd(payload, at) - at));
  };
  const token = detail(SUBFLOW.TOKEN_LOC);
  const flags = detail(SUBFLOW.FLAGS);
  return token === null || flags === null ? null : { token, flags, info, localId: detail(SUBFLOW.ID_LOC) ?? 0 };
}

function readSubflow(payload: Buffer, { flags, info, localId }: Located): SubflowSample {
  const has = (flag: number): boolean => (flags & flag) !== 0;
  const short = (at: number): number => payload.readUInt32LE(info + at);
  const long = (at: number): number => short(at) + short(at + 4) * 2 ** 32;
  return {
    ...endsOf(payload),
    localId,
    joined: has(SUBFLOW_FLAG.JOIN_LOC) || has(SUBFLOW_FLAG.JOIN_REM),
    initiated: has(SUBFLOW_FLAG.MCAP_LOC) || has(SUBFLOW_FLAG.JOIN_LOC),
    established: payload[STATE_AT] === STATE.ESTABLISHED,
    fullyEstablished: has(SUBFLOW_FLAG.FULLY_ESTABLISHED),
    backup: has(SUBFLOW_FLAG.BKUP_LOC) || has(SUBFLOW_FLAG.BKUP_REM),
    rttMs: short(TCP_INFO.RTT) / 1000,
    retransmits: short(TCP_INFO.TOTAL_RETRANS),
    timeouts: payload.readUInt8(info + TCP_INFO.RETRANSMITS),
    unacked: short(TCP_INFO.UNACKED),
    busyMs: (long(TCP_INFO.BUSY_TIME) - long(TCP_INFO.RWND_LIMITED)) / 1000,
    bytesAcked: long(TCP_INFO.BYTES_ACKED),
    bytesReceived: long(TCP_INFO.BYTES_RECEIVED),
  };
}

/** Whether reading a record would give what is known; as `readSubflow`, field by field, but makes nothing. */
function isUnchanged(payload: Buffer, { flags, info, localId }: Located, known: SubflowSample): boolean {
  const has = (flag: number): boolean => (flags & flag) !== 0;
  const short = (at: number): number => payload.readUInt32LE(info + at);
  const long = (at: number): number => short(at) + short(at + 4) * 2 ** 32;
  return (
    long(TCP_INFO.BYTES_ACKED) === known.bytesAcked &&
    long(TCP_INFO.BYTES_RECEIVED) === known.bytesReceived &&
    short(TCP_INFO.UNACKED) === known.unacked &&
    short(TCP_INFO.RTT) / 1000 === known.rttMs &&
    short(TCP_INFO.TOTAL_RETRANS) === known.retransmits &&
    payload.readUInt8(info + TCP_INFO.RETRANSMITS) === known.timeouts &&
    (long(TCP_INFO.BUSY_TIME) - long(TCP_INFO.RWND_LIMITED)) / 1000 === known.busyMs &&
    (payload[STATE_AT] === STATE.ESTABLISHED) === known.established &&
    has(SUBFLOW_FLAG.FULLY_ESTABLISHED) === known.fullyEstablished &&
    (has(SUBFLOW_FLAG.BKUP_LOC) || has(SUBFLOW_FLAG.BKUP_REM)) === known.backup &&
    (has(SUBFLOW_FLAG.JOIN_LOC) || has(SUBFLOW_FLAG.JOIN_REM)) === known.joined &&
    (has(SUBFLOW_FLAG.MCAP_LOC) || has(SUBFLOW_FLAG.JOIN_LOC)) === known.initiated &&
    localId === known.localId &&
    isAt(payload, known)
  );
}
