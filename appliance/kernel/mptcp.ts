import { Fatal } from '../exit.ts';
import { type Address, type Endpoint, readAddress } from '../protocol/address.ts';
import { GENERIC_HEADER_BYTES, genericHeader, resolveFamily } from './genetlink.ts';
import type { Namespace } from './namespaces.ts';
import {
  address4,
  attribute,
  integer,
  NetlinkError,
  type NetlinkSocket,
  openNetlink,
  PROTOCOL,
  readAttributes,
  u8,
  u16,
  u32,
} from './netlink.ts';

/**
 * The userspace MPTCP path manager (generic netlink family `mptcp_pm`, Documentation/netlink/specs/mptcp_pm.yaml).
 * Numbers: include/uapi/linux/mptcp_pm.h. Everything happens in the network namespace the socket was made in.
 */

/** One subflow, seen from this host. IPv4-mapped IPv6 has become IPv4. */
export type Subflow = { readonly local: Endpoint; readonly remote: Endpoint };

/** Why a subflow closed: an errno's number, 0 for an orderly end. */
export type PathEvent =
  | ({
      readonly kind: 'created' | 'established';
      readonly token: number;
      readonly serverSide: boolean;
      /** RFC 8684 3.1, flag C: no joins to the server's initial address and port. */
      readonly denyJoinId0: boolean;
    } & Subflow)
  | { readonly kind: 'closed'; readonly token: number }
  | { readonly kind: 'announced'; readonly token: number; readonly remoteId: number; readonly remote: Endpoint }
  | { readonly kind: 'removed'; readonly token: number; readonly remoteId: number }
  | ({
      readonly kind: 'subflow-established' | 'subflow-closed' | 'subflow-priority';
      readonly token: number;
      readonly localId: number;
      readonly remoteId: number;
      readonly backup: boolean;
      /** Why it closed: an errno's number, 0 for an orderly end. */
      readonly error: number;
    } & Subflow)
  | { readonly kind: 'listener-created' | 'listener-closed'; readonly local: Endpoint }
  /** The kernel had more to say than the buffer could hold. */
  | { readonly kind: 'events-lost' };

export type SubflowRequest = {
  readonly token: number;
  readonly localId: number;
  readonly local: Address;
  readonly remote: Endpoint;
  readonly backup: boolean;
  /** The interface that its packets must leave by; otherwise routing decides. */
  readonly index?: number | undefined;
};

export type PathManager = {
  /** Sends the join's SYN. Success says no more than that. @throws NetlinkError */
  subflowCreate(request: SubflowRequest): Promise<void>;
  /** Closes one subflow. @throws NetlinkError (`ESRCH` when there is none) */
  subflowDestroy(token: number, subflow: Subflow): Promise<void>;
  /** Makes a subflow backup or not, telling the peer (MP_PRIO). @throws NetlinkError */
  setBackup(token: number, subflow: Subflow, backup: boolean): Promise<void>;
  /** Tells the peer of an address (ADD_ADDR), which need not be this host's, with the connection's port. @throws NetlinkError */
  announce(token: number, localId: number, address: Address): Promise<void>;
  /** Takes it back (RM_ADDR): the peer closes its subflows to it. @throws NetlinkError */
  withdraw(token: number, localId: number): Promise<void>;
  close(): void;
};

/** What peers are told of: addresses that need not be this host's. */
export type SignalEndpoints = {
  /** Announces an address on all connections, also those to come, with the connection's port. Harmless when it is. @throws NetlinkError */
  add(address: Address): Promise<void>;
  /** Takes it back; subflows to it close. Harmless when it is not announced. @throws NetlinkError */
  remove(address: Address): Promise<void>;
  close(): void;
};

/** How many extra subflows a connection may have that the kernel's own path manager is in charge of; joins of peers count. */
export type SubflowLimit = {
  /** @throws NetlinkError */
  read(): Promise<number>;
  /** Existing connections, too, are held to it from now on. @throws NetlinkError (`EINVAL` above the kernel's most) */
  write(subflows: number): Promise<void>;
};

const FAMILY = 'mptcp_pm';
const EVENT_GROUP = 'mptcp_pm_events';
const COMMAND = {
  ADD_ADDR: 1,
  DEL_ADDR: 2,
  GET_ADDR: 3,
  SET_LIMITS: 5,
  GET_LIMITS: 6,
  SET_FLAGS: 7,
  ANNOUNCE: 8,
  REMOVE: 9,
  SUBFLOW_CREATE: 10,
  SUBFLOW_DESTROY: 11,
} as const;
const ATTRIBUTE = { ADDR: 1, SUBFLOWS: 3, TOKEN: 4, LOC_ID: 5, ADDR_REMOTE: 6 } as const;
const IN_ADDRESS = { FAMILY: 1, ID: 2, ADDR4: 3, ADDR6: 4, PORT: 5, FLAGS: 6, IF_IDX: 7 } as const;
const FLAG_SIGNAL = 1;
const FLAG_BACKUP = 4;
const AF_INET = 2;
const AF_INET6 = 10;

const EVENT = {
  CREATED: 1,
  ESTABLISHED: 2,
  CLOSED: 3,
  ANNOUNCED: 6,
  REMOVED: 7,
  SUB_ESTABLISHED: 10,
  SUB_CLOSED: 11,
  SUB_PRIORITY: 13,
  LISTENER_CREATED: 15,
  LISTENER_CLOSED: 16,
} as const;
const IN_EVENT = {
  TOKEN: 1,
  LOC_ID: 3,
  REM_ID: 4,
  SADDR4: 5,
  SADDR6: 6,
  DADDR4: 7,
  DADDR6: 8,
  SPORT: 9,
  DPORT: 10,
  BACKUP: 11,
  ERROR: 12,
  FLAGS: 13,
  SERVER_SIDE: 18,
} as const;
const EVENT_DENY_JOIN_ID0 = 1;
const EVENT_SERVER_SIDE = 2;

/**
 * Subscribes to events and readies commands. Events arrive in order and may be lost; `events-lost` says so.
 * @throws Fatal (69) naming what the kernel or the container lacks.
 */
export async function openPathManager(namespace: Namespace, onEvent: (event: PathEvent) => void): Promise<PathManager> {
  const commands = openNetlink(PROTOCOL.GENERIC, { namespace });
  let events: NetlinkSocket | null = null;
  try {
    const { id: family, groups } = await resolveFamily(commands, FAMILY);
    const group = groups.get(EVENT_GROUP);
    if (group === undefined) throw new NetlinkError(`looking for the events of ${FAMILY}`, 'ENOENT');
    // A socket of its own: answers to commands and floods of events must not crowd each other out.
    events = openNetlink(PROTOCOL.GENERIC, {
      namespace,
      onNotification: ({ type, payload }) => {
        if (type !== family) return;
        const event = decodeEvent(payload);
        if (event) onEvent(event);
      },
      onLost: () => onEvent({ kind: 'events-lost' }),
    });
    events.join(group);
    const subscription = events;
    const command = async (what: string, number: number, ...attributes: Buffer[]): Promise<void> => {
      await commands.request(what, family, Buffer.concat([genericHeader(number), ...attributes]));
    };
    return {
      subflowCreate: ({ token, localId, local, remote, backup, index }) =>
        command(
          'creating a subflow',
          COMMAND.SUBFLOW_CREATE,
          attribute(ATTRIBUTE.TOKEN, u32(token)),
          attribute(ATTRIBUTE.ADDR, [
            ...address(local),
            attribute(IN_ADDRESS.ID, u8(localId)),
            ...(backup ? [attribute(IN_ADDRESS.FLAGS, u32(FLAG_BACKUP))] : []),
            ...(index === undefined ? [] : [attribute(IN_ADDRESS.IF_IDX, u32(index))]),
          ]),
          attribute(ATTRIBUTE.ADDR_REMOTE, endpoint(remote)),
        ),
      subflowDestroy: (token, { local, remote }) =>
        command(
          'destroying a subflow',
          COMMAND.SUBFLOW_DESTROY,
          attribute(ATTRIBUTE.TOKEN, u32(token)),
          attribute(ATTRIBUTE.ADDR, endpoint(local)),
          attribute(ATTRIBUTE.ADDR_REMOTE, endpoint(remote)),
        ),
      setBackup: (token, { local, remote }, backup) =>
        command(
          'changing the priority of a subflow',
          COMMAND.SET_FLAGS,
          attribute(ATTRIBUTE.TOKEN, u32(token)),
          attribute(ATTRIBUTE.ADDR, [...endpoint(local), attribute(IN_ADDRESS.FLAGS, u32(backup ? FLAG_BACKUP : 0))]),
          attribute(ATTRIBUTE.ADDR_REMOTE, endpoint(remote)),
        ),
      announce: (token, localId, announced) =>
        command(
          'announcing an address',
          COMMAND.ANNOUNCE,
          attribute(ATTRIBUTE.TOKEN, u32(token)),
          attribute(ATTRIBUTE.ADDR, [
            ...address(announced),
            attribute(IN_ADDRESS.ID, u8(localId)),
            attribute(IN_ADDRESS.FLAGS, u32(FLAG_SIGNAL)),
          ]),
        ),
      withdraw: (token, localId) =>
        command(
          'taking an address back',
          COMMAND.REMOVE,
          attribute(ATTRIBUTE.TOKEN, u32(token)),
          attribute(ATTRIBUTE.LOC_ID, u8(localId)),
        ),
      close() {
        subscription.close();
        commands.close();
      },
    };
  } catch (error) {
    events?.close();
    commands.close();
    throw explain(error);
  }
}

/** That limit of a network namespace. */
export function subflowLimit(namespace: Namespace): SubflowLimit {
  const ask = async (what: string, number: number, ...attributes: Buffer[]): Promise<Buffer> => {
    const socket = openNetlink(PROTOCOL.GENERIC, { namespace });
    try {
      const { id } = await resolveFamily(socket, FAMILY);
      const [answer] = await socket.request(what, id, Buffer.concat([genericHeader(number), ...attributes]));
      return answer ?? Buffer.alloc(0);
    } catch (error) {
      throw explain(error);
    } finally {
      socket.close();
    }
  };
  return {
    async read() {
      const answer = await ask('reading the limit of subflows', COMMAND.GET_LIMITS);
      return integer(readAttributes(answer, GENERIC_HEADER_BYTES).get(ATTRIBUTE.SUBFLOWS)) ?? 0;
    },
    async write(subflows) {
      await ask('changing the limit of subflows', COMMAND.SET_LIMITS, attribute(ATTRIBUTE.SUBFLOWS, u32(subflows)));
    },
  };
}

/** Those of the kernel's own path manager in a network namespace. Only endpoints with no other flag are touched: an operator's own may have more. */
export function signalEndpoints(namespace: Namespace): SignalEndpoints {
  async function within<T>(task: (socket: NetlinkSocket, family: number) => Promise<T>): Promise<T> {
    const socket = openNetlink(PROTOCOL.GENERIC, { namespace });
    try {
      return await task(socket, (await resolveFamily(socket, FAMILY)).id);
    } catch (error) {
      throw explain(error);
    } finally {
      socket.close();
    }
  }
  const same = (nest: Map<number, Buffer>, wanted: Address): boolean => {
    const bytes = nest.get(wanted.family === 4 ? IN_ADDRESS.ADDR4 : IN_ADDRESS.ADDR6);
    const isSignal = integer(nest.get(IN_ADDRESS.FLAGS)) === FLAG_SIGNAL && !integer(nest.get(IN_ADDRESS.PORT));
    return isSignal && bytes !== undefined && BigInt(`0x${bytes.toString('hex')}`) === wanted.value;
  };
  return {
    add: (wanted) =>
      within(async (socket, family) => {
        const nest = attribute(ATTRIBUTE.ADDR, [...address(wanted), attribute(IN_ADDRESS.FLAGS, u32(FLAG_SIGNAL))]);
        try {
          await socket.request('announcing an address', family, Buffer.concat([genericHeader(COMMAND.ADD_ADDR), nest]));
        } catch (error) {
          if (!(error instanceof NetlinkError) || error.code !== 'EEXIST') throw error;
        }
      }),
    remove: (wanted) =>
      within(async (socket, family) => {
        const ids: number[] = [];
        await socket.dump('reading what is announced', family, genericHeader(COMMAND.GET_ADDR), (record) => {
          const nest = readAttributes(record, GENERIC_HEADER_BYTES).get(ATTRIBUTE.ADDR);
          const found = nest && readAttributes(nest);
          const id = found && integer(found.get(IN_ADDRESS.ID));
          if (found && id != null && same(found, wanted)) ids.push(id);
        });
        for (const id of ids) {
          const nest = attribute(ATTRIBUTE.ADDR, [...address(wanted), attribute(IN_ADDRESS.ID, u8(id))]);
          await socket.request(
            'taking an address back',
            family,
            Buffer.concat([genericHeader(COMMAND.DEL_ADDR), nest]),
          );
        }
      }),
    close: () => undefined,
  };
}

function explain(error: unknown): unknown {
  if (!(error instanceof NetlinkError)) return error;
  if (error.code === 'ENOENT') {
    return new Fatal(
      69,
      'this kernel has no MPTCP path manager (generic netlink family mptcp_pm): Linux 6.6 or later built with ' +
        'CONFIG_MPTCP=y is needed; check `uname -r` and `sysctl net.mptcp.enabled`',
    );
  }
  if (error.code === 'EPERM' || error.code === 'EACCES') {
    return new Fatal(
      69,
      'the kernel refuses MPTCP events to this process: it needs CAP_NET_ADMIN. docker: --cap-add NET_ADMIN; ' +
        'compose: cap_add: [NET_ADMIN]; kubernetes: securityContext.capabilities.add: ["NET_ADMIN"]; and run as root',
    );
  }
  return error;
}

function address(value: Address): Buffer[] {
  const bytes = Buffer.alloc(value.family === 4 ? 4 : 16);
  let rest = value.value;
  for (let i = bytes.length - 1; i >= 0; i--) {
    bytes[i] = Number(rest & 255n);
    rest >>= 8n;
  }
  return [
    attribute(IN_ADDRESS.FAMILY, u16(value.family === 4 ? AF_INET : AF_INET6)),
    attribute(value.family === 4 ? IN_ADDRESS.ADDR4 : IN_ADDRESS.ADDR6, bytes),
  ];
}

/** The port inside an address nest is in host byte order, unlike everywhere else. */
const endpoint = (value: Endpoint): Buffer[] => [
  ...address(value.address),
  attribute(IN_ADDRESS.PORT, u16(value.port)),
];

/** Reads one event; null for kinds this program does not know, or that lack what they must have. */
export function decodeEvent(payload: Buffer): PathEvent | null {
  const attributes = readAttributes(payload, GENERIC_HEADER_BYTES);
  const token = integer(attributes.get(IN_EVENT.TOKEN));
  const remoteId = integer(attributes.get(IN_EVENT.REM_ID)) ?? 0;
  const local = eventEndpoint(attributes, IN_EVENT.SADDR4, IN_EVENT.SADDR6, IN_EVENT.SPORT);
  const command = payload[0];
  const portOptional = command === EVENT.ANNOUNCED;
  const remote = eventEndpoint(attributes, IN_EVENT.DADDR4, IN_EVENT.DADDR6, IN_EVENT.DPORT, portOptional);
  switch (command) {
    case EVENT.CREATED:
    case EVENT.ESTABLISHED: {
      if (token === null || !local || !remote) return null;
      const flags = integer(attributes.get(IN_EVENT.FLAGS)) ?? 0;
      return {
        kind: command === EVENT.CREATED ? 'created' : 'established',
        token,
        local,
        remote,
        // A flag since 6.18, an attribute of its own before.
        serverSide: (flags & EVENT_SERVER_SIDE) !== 0 || integer(attributes.get(IN_EVENT.SERVER_SIDE)) === 1,
        denyJoinId0: (flags & EVENT_DENY_JOIN_ID0) !== 0,
      };
    }
    case EVENT.CLOSED:
      return token === null ? null : { kind: 'closed', token };
    case EVENT.ANNOUNCED:
      return token === null || !remote ? null : { kind: 'announced', token, remoteId, remote };
    case EVENT.REMOVED:
      return token === null ? null : { kind: 'removed', token, remoteId };
    case EVENT.SUB_ESTABLISHED:
    case EVENT.SUB_CLOSED:
    case EVENT.SUB_PRIORITY:
      if (token === null || !local || !remote) return null;
      return {
        kind:
          command === EVENT.SUB_ESTABLISHED
            ? 'subflow-established'
            : command === EVENT.SUB_CLOSED
              ? 'subflow-closed'
              : 'subflow-priority',
        token,
        local,
        remote,
        localId: integer(attributes.get(IN_EVENT.LOC_ID)) ?? 0,
        remoteId,
        backup: integer(attributes.get(IN_EVENT.BACKUP)) === 1,
        error: integer(attributes.get(IN_EVENT.ERROR)) ?? 0,
      };
    case EVENT.LISTENER_CREATED:
    case EVENT.LISTENER_CLOSED:
      return local
        ? { kind: command === EVENT.LISTENER_CREATED ? 'listener-created' : 'listener-closed', local }
        : null;
    default:
      return null;
  }
}

function eventEndpoint(
  attributes: Map<number, Buffer>,
  v4: number,
  v6: number,
  port: number,
  portOptional = false,
): Endpoint | null {
  const four = attributes.get(v4);
  const six = attributes.get(v6);
  const portBytes = attributes.get(port);
  if (portBytes?.length !== 2 && !portOptional) return null;
  // Ports in events are big-endian; an ANNOUNCED without a port means the connection's own.
  const number = portBytes?.length === 2 ? portBytes.readUInt16BE() : 0;
  if (four?.length === 4) return { address: address4(four.readUInt32BE()), port: number };
  if (six?.length === 16) return { address: readAddress(six), port: number };
  return null;
}
