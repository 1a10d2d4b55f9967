import { createSocket, type Socket } from 'node:dgram';
import { getSystemErrorName } from 'node:util';
import koffi from 'koffi';
import { type Address, type Endpoint, formatAddress, formatEndpoint, parseAddress } from '../protocol/address.ts';
import { systemAddresses } from './addresses.ts';
import { type Namespace, ownNamespace } from './namespaces.ts';
import { bind as bindTo, close as closeFile, openSocket, socketAddress } from './sockets.ts';

/** A received datagram and the way back to its sender. */
export type Datagram = {
  readonly bytes: Uint8Array;
  readonly from: Endpoint;
  /** The local address it was sent to. */
  readonly to: Endpoint;
};

/** The router's side: hears everyone, and answers from the address it was asked at. */
export type DatagramServer = {
  /** Local endpoints now bound; follows address changes. */
  local(): readonly Endpoint[];
  /**
   * Sends `bytes` from `datagram.to` to `datagram.from`; nothing when it does not listen there. Never throws: a lost answer is
   * asked for again.
   */
  reply(datagram: Datagram, bytes: Uint8Array): void;
  /** Stops receiving; resolves when the sockets are closed. */
  close(): Promise<void>;
};

/** The client's side: one socket connected to one router. */
export type DatagramClient = {
  /** The local endpoint, whose address is the one the kernel's routing chose towards the peer. */
  local(): Endpoint;
  /** Never throws: what is lost is sent again. */
  send(bytes: Uint8Array): void;
  close(): void;
};

export type Datagrams = {
  /**
   * Listens at `listen`; the wildcard means every local address, each by a socket of its own.
   * @throws Error naming the address when it cannot be bound.
   */
  serve(listen: Endpoint, receive: (datagram: Datagram) => void): Promise<DatagramServer>;
  /**
   * Connects to `peer`, from `local` when given. `receive` gets what the peer sends, `unreachable` every ICMP error.
   * @throws Error when there is no route to it, or `local` is no address of this host.
   */
  connect(
    peer: Endpoint,
    receive: (bytes: Uint8Array) => void,
    unreachable: () => void,
    local?: Address,
  ): Promise<DatagramClient>;
};

/** Local addresses of this namespace with the length of their on-link prefix. */
export type LocalAddress = { readonly address: Address; readonly length: number; readonly interface: string };

/** Room for 20,000 datagrams while nft works; the kernel may grant less (net.core.rmem_max). */
const RECEIVE_BUFFER = 4 * 1024 * 1024;
/** How often the wildcard looks for new and vanished addresses, ms. */
const RESCAN_MS = 2_000;

const socketOf = (address: Address): Socket =>
  createSocket({
    type: address.family === 4 ? 'udp4' : 'udp6',
    ipv6Only: address.family === 6,
    recvBufferSize: RECEIVE_BUFFER,
  });

const errorCode = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : String(error);

function bind(socket: Socket, { address, port }: Endpoint): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  socket.once('error', reject);
  socket.bind({ address: formatAddress(address), port, exclusive: true }, () => {
    socket.off('error', reject);
    resolve();
  });
  return promise;
}

/** A socket for one local address, answering from it. */
async function listen(local: Endpoint, receive: (datagram: Datagram) => void): Promise<Socket> {
  const socket = socketOf(local.address);
  try {
    await bind(socket, local);
  } catch (error) {
    socket.close();
    throw new Error(`cannot listen on ${formatEndpoint(local)} (UDP): ${errorCode(error)}`, {
      cause: errorCode(error),
    });
  }
  // ICMP errors of answers end up here; the datagrams themselves are lost, which the protocol copes with.
  socket.on('error', () => undefined);
  socket.on('message', (bytes, from) => {
    const address = parseAddress(from.address);
    if (address) receive({ bytes, from: { address, port: from.port }, to: local });
  });
  return socket;
}

/** Link-local addresses need a zone, which no lease could carry. */
function servable(address: Address, wildcard: Address): boolean {
  if (address.family === 6 && address.value >> 118n === 0x3fan) return false;
  return wildcard.family === 6 || address.family === 4;
}

async function serve(endpoint: Endpoint, receive: (datagram: Datagram) => void): Promise<DatagramServer> {
  const sockets = new Map<string, { local: Endpoint; socket: Socket }>();
  const wildcard = endpoint.address.value === 0n;
  const wanted = (): Endpoint[] =>
    wildcard
      ? systemAddresses
          .local()
          .filter(({ address }) => servable(address, endpoint.address))
          .map(({ address }) => ({ address, port: endpoint.port }))
      : [endpoint];
  const add = async (local: Endpoint): Promise<void> => {
    const key = formatEndpoint(local);
    if (!sockets.has(key)) sockets.set(key, { local, socket: await listen(local, receive) });
  };
  const closeAll = async (): Promise<void> => {
    await Promise.all([...sockets.values()].map(({ socket }) => new Promise<void>((resolve) => socket.close(resolve))));
  };
  let scanning = Promise.resolve();
  try {
    for (const local of wanted()) await add(local);
  } catch (error) {
    await closeAll();
    throw error;
  }
  const scan = async (): Promise<void> => {
    const now = wanted();
    const keys = new Set(now.map(formatEndpoint));
    for (const [key, { socket }] of sockets) {
      if (keys.has(key)) continue;
      sockets.delete(key);
      socket.close();
    }
    // An address still in duplicate detection cannot be bound yet: the next scan tries again.
    for (const local of now) await add(local).catch(() => undefined);
  };
  const timer = wildcard
    ? setInterval(() => {
        scanning = scanning.then(scan);
      }, RESCAN_MS)
    : null;
  return {
    local: () => [...sockets.values()].map(({ local }) => local),
    reply({ from, to }, bytes) {
      sockets.get(formatEndpoint(to))?.socket.send(bytes, from.port, formatAddress(from.address), () => undefined);
    },
    async close() {
      if (timer) clearInterval(timer);
      await scanning;
      await closeAll();
      sockets.clear();
    },
  };
}

/** A socket of that namespace, as Node has it; bound to `from` if that is given. @throws Error with the system's code as cause */
function socketIn(namespace: Namespace, { address: { family } }: Endpoint, from: Address | undefined): Socket {
  const fd = openSocket(namespace, family, 'datagram');
  const local = from && socketAddress({ address: from, port: 0 });
  if (fd < 0 || (local && bindTo(fd, local, local.length) !== 0)) {
    const code = getSystemErrorName(-koffi.errno());
    if (fd >= 0) closeFile(fd);
    throw new Error(`cannot bind: ${code}`, { cause: code });
  }
  return createSocket(family === 4 ? 'udp4' : 'udp6').bind({ fd });
}

async function connect(
  namespace: Namespace,
  peer: Endpoint,
  receive: (bytes: Uint8Array) => void,
  unreachable: () => void,
  from?: Address,
): Promise<DatagramClient> {
  const noRoute = (code: unknown): Error => new Error(`no route to ${formatEndpoint(peer)}: ${code}`, { cause: code });
  let socket: Socket;
  try {
    socket = socketIn(namespace, peer, from);
  } catch (error) {
    throw noRoute(error instanceof Error ? error.cause : error);
  }
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  try {
    socket.once('error', reject);
    socket.once('connect', () => {
      socket.off('error', reject);
      resolve();
    });
    // Without a callback: it would get the error, and no `error` event would come.
    socket.connect(peer.port, formatAddress(peer.address));
    await promise;
  } catch (error) {
    socket.close();
    throw noRoute(errorCode(error));
  }
  let open = true;
  socket.on('error', () => unreachable());
  socket.on('message', (bytes) => receive(bytes));
  const { address, port } = socket.address();
  const local = parseAddress(address.split('%')[0] ?? '');
  if (!local) throw new Error(`the kernel named a strange local address: ${address}`);
  return {
    local: () => ({ address: local, port }),
    send(bytes) {
      // An ICMP error of the datagram before is reported by the send after it.
      if (open) socket.send(bytes, (error) => error && open && unreachable());
    },
    close() {
      if (!open) return;
      open = false;
      socket.close();
    },
  };
}

/** UDP sockets; servers are of this process's own namespace, clients of the one that is given. */
export const udpDatagrams = (namespace: Namespace = ownNamespace): Datagrams => ({
  serve,
  connect: (...args) => connect(namespace, ...args),
});
