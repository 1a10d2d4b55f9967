import { createPrivateKey, createPublicKey, generateKeyPairSync, type KeyObject } from 'node:crypto';
import { unlink } from 'node:fs/promises';
import { createConnection } from 'node:net';
import { execa } from 'execa';
import {
  type Endpoint,
  formatEndpoint,
  formatPrefix,
  type Prefix,
  parseEndpoint,
  parsePrefix,
} from '../protocol/address.ts';
import { GENERIC_HEADER_BYTES, genericHeader, resolveFamily } from './genetlink.ts';
import { addressBytes, type Links } from './links.ts';
import { type Namespace, ownNamespace } from './namespaces.ts';
import {
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
import { socketAddress } from './sockets.ts';

/**
 * WireGuard interfaces: the kernel's (generic netlink family `wireguard`, include/uapi/linux/wireguard.h) where there are any,
 * else those of wireguard-go, a program that carries one TUN interface each and is spoken to over a unix socket
 * (https://www.wireguard.com/xplatform/). Keys are 32 bytes each.
 */

export type KeyPair = { readonly privateKey: Uint8Array; readonly publicKey: Uint8Array };

export type PeerState = {
  readonly publicKey: Uint8Array;
  readonly endpoint: Endpoint | null;
  /** What may come from it, and is sent to it. */
  readonly allowed: readonly Prefix[];
  /** Wall clock, ms; null before the first. */
  readonly handshakeAt: number | null;
  /** Bytes. */
  readonly received: number;
  readonly sent: number;
};

export type DeviceState = {
  /** Null without a private key. */
  readonly keys: KeyPair | null;
  /** UDP port. */
  readonly port: number;
  readonly peers: readonly PeerState[];
};

/** What becomes of one peer: it goes, or it has exactly these prefixes, and its endpoint when that is given. */
export type PeerChange =
  | { readonly publicKey: Uint8Array; readonly remove: true }
  | {
      readonly publicKey: Uint8Array;
      readonly remove?: false;
      readonly allowed: readonly Prefix[];
      readonly endpoint?: Endpoint;
    };

export type DeviceChange = {
  readonly privateKey?: Uint8Array;
  /** UDP port; 0 for any. */
  readonly port?: number;
  /** In this order; others stay as they are. */
  readonly peers?: readonly PeerChange[];
};

/** Who carries the packets of an interface. */
export type Carrier = 'kernel' | 'wireguard-go';

export type Wireguard = {
  /** A new key of Curve25519. */
  newKeys(): KeyPair;
  /**
   * Makes an interface, which is down and has no key. It outlives this process.
   * @throws WireguardError: `missing` where neither the kernel nor wireguard-go can carry one, `exists`
   */
  create(name: string): Promise<Carrier>;
  /** Null when there is no such interface, or it is no WireGuard. @throws WireguardError */
  read(name: string): Promise<DeviceState | null>;
  /** All of it, or as much as was done before it failed. @throws WireguardError */
  change(name: string, change: DeviceChange): Promise<void>;
  /** Harmless when there is none. @throws WireguardError */
  remove(name: string): Promise<void>;
  close(): void;
};

export class WireguardError extends Error {
  override readonly name = 'WireguardError';
  /** `missing`: this machine cannot carry tunnels; the message has the line that helps. */
  readonly kind: 'missing' | 'denied' | 'exists' | 'failed';

  constructor(kind: WireguardError['kind'], message: string) {
    super(message);
    this.kind = kind;
  }
}

const KIND_KERNEL = 'wireguard';
const KIND_USERSPACE = 'tun';
const PROGRAM = 'wireguard-go';
/** Where wireguard-go has its sockets, whatever the namespace: names of interfaces must differ on the whole host. */
const SOCKETS = '/var/run/wireguard';
const socketPath = (name: string): string => `${SOCKETS}/${name}.sock`;
const PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin';
const ANSWER_MS = 5_000;

const REMEDY =
  'WireGuard needs Linux with CONFIG_WIREGUARD (host: modprobe wireguard), or wireguard-go and a TUN device. ' +
  'docker: --device /dev/net/tun; compose: devices: [/dev/net/tun]; ' +
  'Kubernetes: a hostPath volume of /dev/net/tun (type CharDevice); host: apt-get install wireguard-go && modprobe tun';

/** DER of an X25519 private key up to the 32 bytes of the key itself (RFC 8410, section 7). */
const PKCS8 = Buffer.from('302e020100300506032b656e04220420', 'hex');

const raw = (key: KeyObject, part: 'd' | 'x'): Uint8Array =>
  new Uint8Array(Buffer.from(key.export({ format: 'jwk' })[part] ?? '', 'base64url'));

/** The public key that belongs to a private one. */
function pairOf(privateKey: Uint8Array): KeyPair {
  const key = createPrivateKey({ key: Buffer.concat([PKCS8, privateKey]), format: 'der', type: 'pkcs8' });
  return { privateKey, publicKey: raw(createPublicKey(key), 'x') };
}

/** Keys that are all zeros are none. */
const isKey = (bytes: Uint8Array | undefined): bytes is Uint8Array =>
  bytes?.length === 32 && bytes.some((byte) => byte !== 0);

/** One way to carry an interface. */
type Backend = {
  create(name: string): Promise<void>;
  read(name: string): Promise<DeviceState>;
  change(name: string, change: DeviceChange): Promise<void>;
};

/** Interfaces of that namespace; needs CAP_NET_ADMIN there. */
export function openWireguard(links: Links, namespace: Namespace = ownNamespace): Wireguard {
  const kernel = kernelBackend(links, namespace);
  const userspace = userspaceBackend(namespace);
  const backendOf = async (name: string): Promise<Backend | null> => {
    const link = (await links.links()).find((one) => one.name === name);
    if (link?.kind === KIND_KERNEL) return kernel;
    return link?.kind === KIND_USERSPACE ? userspace : null;
  };
  return {
    newKeys() {
      const { privateKey, publicKey } = generateKeyPairSync('x25519');
      return { privateKey: raw(privateKey, 'd'), publicKey: raw(publicKey, 'x') };
    },
    async create(name) {
      try {
        await kernel.create(name);
        return 'kernel';
      } catch (error) {
        if (!(error instanceof WireguardError) || error.kind !== 'missing') throw error;
      }
      await userspace.create(name);
      return 'wireguard-go';
    },
    async read(name) {
      const backend = await backendOf(name);
      return backend?.read(name) ?? null;
    },
    async change(name, change) {
      const backend = await backendOf(name);
      if (!backend) throw new WireguardError('failed', `there is no WireGuard interface ${name}`);
      await backend.change(name, change);
    },
    async remove(name) {
      const backend = await backendOf(name);
      if (!backend) return;
      const end = backend === userspace ? await watchEnd(name) : null;
      await links.remove(name).catch((error: unknown) => {
        throw explained(error);
      });
      if (!end) return;
      // wireguard-go ends with its interface. Until it has, it would take away the socket of a successor with that name.
      await end();
      // One that was killed leaves its own.
      await unlink(socketPath(name)).catch(() => undefined);
    },
    close: () => kernel.close(),
  };
}

const FAMILY = 'wireguard';
const COMMAND = { GET_DEVICE: 0, SET_DEVICE: 1 } as const;
const DEVICE = { NAME: 2, PRIVATE_KEY: 3, PUBLIC_KEY: 4, PORT: 6, PEERS: 8 } as const;
const PEER = {
  PUBLIC_KEY: 1,
  FLAGS: 3,
  ENDPOINT: 4,
  HANDSHAKE: 6,
  RECEIVED: 7,
  SENT: 8,
  ALLOWED: 9,
} as const;
const PEER_REMOVE = 1;
const PEER_REPLACE_ALLOWED = 2;
const ALLOWED = { FAMILY: 1, ADDRESS: 2, LENGTH: 3 } as const;
const AF_INET = 2;
const AF_INET6 = 10;
/** Peers in one message: a netlink message of ours stays far below what the kernel takes. */
const PEERS_AT_ONCE = 64;

function kernelBackend(links: Links, namespace: Namespace): Backend & { close(): void } {
  let socket: NetlinkSocket | null = null;
  let family: number | null = null;
  const open = async (): Promise<{ socket: NetlinkSocket; family: number }> => {
    socket ??= openNetlink(PROTOCOL.GENERIC, { namespace });
    family ??= (await resolveFamily(socket, FAMILY)).id;
    return { socket, family };
  };
  const nameOf = (name: string): Buffer => attribute(DEVICE.NAME, Buffer.from(`${name}\0`));
  return {
    async create(name) {
      try {
        await links.add(name, KIND_KERNEL);
      } catch (error) {
        throw explained(error);
      }
    },
    async read(name) {
      try {
        const { socket: asked, family: type } = await open();
        const reading: Reading = { privateKey: null, port: 0, peers: [] };
        const question = Buffer.concat([genericHeader(COMMAND.GET_DEVICE), nameOf(name)]);
        await asked.dump(`reading ${name}`, type, question, (record) => readDevice(record, reading));
        const { privateKey, port, peers } = reading;
        return { keys: privateKey && pairOf(privateKey), port, peers };
      } catch (error) {
        throw explained(error);
      }
    },
    async change(name, { privateKey, port, peers = [] }) {
      try {
        const { socket: asked, family: type } = await open();
        const head = [genericHeader(COMMAND.SET_DEVICE), nameOf(name)];
        const device = [
          ...(privateKey ? [attribute(DEVICE.PRIVATE_KEY, Buffer.from(privateKey))] : []),
          ...(port === undefined ? [] : [attribute(DEVICE.PORT, u16(port))]),
        ];
        if (device.length > 0) await asked.request(`setting up ${name}`, type, Buffer.concat([...head, ...device]));
        for (let at = 0; at < peers.length; at += PEERS_AT_ONCE) {
          const list = peers.slice(at, at + PEERS_AT_ONCE).map((peer) => attribute(0, peerAttributes(peer)));
          const request = Buffer.concat([...head, attribute(DEVICE.PEERS, list)]);
          await asked.request(`changing peers of ${name}`, type, request);
        }
      } catch (error) {
        throw explained(error);
      }
    },
    close() {
      socket?.close();
      socket = null;
    },
  };
}

function peerAttributes(peer: PeerChange): Buffer[] {
  const key = attribute(PEER.PUBLIC_KEY, Buffer.from(peer.publicKey));
  if (peer.remove) return [key, attribute(PEER.FLAGS, u32(PEER_REMOVE))];
  return [
    key,
    attribute(PEER.FLAGS, u32(PEER_REPLACE_ALLOWED)),
    ...(peer.endpoint ? [attribute(PEER.ENDPOINT, socketAddress(peer.endpoint))] : []),
    attribute(
      PEER.ALLOWED,
      peer.allowed.map(({ address, length }) =>
        attribute(0, [
          attribute(ALLOWED.FAMILY, u16(address.family === 4 ? AF_INET : AF_INET6)),
          attribute(ALLOWED.ADDRESS, addressBytes(address)),
          attribute(ALLOWED.LENGTH, u8(length)),
        ]),
      ),
    ),
  ];
}

type Reading = { privateKey: Uint8Array | null; port: number; peers: PeerState[] };

/** Takes in one message of a dump: a device with many peers comes in several, and a peer with many prefixes in two of them. */
export function readDevice(record: Buffer, reading: Reading): void {
  const attributes = readAttributes(record, GENERIC_HEADER_BYTES);
  const key = attributes.get(DEVICE.PRIVATE_KEY);
  if (isKey(key)) reading.privateKey = new Uint8Array(key);
  reading.port = integer(attributes.get(DEVICE.PORT)) ?? reading.port;
  for (const nest of listed(attributes.get(DEVICE.PEERS))) {
    const peer = readPeer(nest);
    if (!peer) continue;
    const last = reading.peers.at(-1);
    if (last && Buffer.from(last.publicKey).equals(peer.publicKey)) {
      reading.peers[reading.peers.length - 1] = { ...last, allowed: [...last.allowed, ...peer.allowed] };
    } else reading.peers.push(peer);
  }
}

/** The members of an array of attributes, whose types mean nothing. */
function listed(bytes: Buffer | undefined): Buffer[] {
  const found: Buffer[] = [];
  for (let at = 0; bytes && at + 4 <= bytes.length; ) {
    const length = bytes.readUInt16LE(at);
    if (length < 4 || at + length > bytes.length) break;
    found.push(bytes.subarray(at + 4, at + length));
    at += (length + 3) & ~3;
  }
  return found;
}

function readPeer(nest: Buffer): PeerState | null {
  const attributes = readAttributes(nest);
  const publicKey = attributes.get(PEER.PUBLIC_KEY);
  if (!isKey(publicKey)) return null;
  const handshake = attributes.get(PEER.HANDSHAKE);
  const seconds = handshake && handshake.length >= 16 ? Number(handshake.readBigInt64LE()) : 0;
  const nanoseconds = handshake && handshake.length >= 16 ? Number(handshake.readBigInt64LE(8)) : 0;
  return {
    publicKey: new Uint8Array(publicKey),
    endpoint: readSocketAddress(attributes.get(PEER.ENDPOINT)),
    allowed: listed(attributes.get(PEER.ALLOWED)).flatMap(readAllowed),
    handshakeAt: handshakeAt(seconds, nanoseconds),
    received: integer(attributes.get(PEER.RECEIVED)) ?? 0,
    sent: integer(attributes.get(PEER.SENT)) ?? 0,
  };
}

const handshakeAt = (seconds: number, nanoseconds: number): number | null =>
  seconds === 0 && nanoseconds === 0 ? null : seconds * 1000 + nanoseconds / 1e6;

function readAllowed(nest: Buffer): Prefix[] {
  const attributes = readAttributes(nest);
  const bytes = attributes.get(ALLOWED.ADDRESS);
  const length = integer(attributes.get(ALLOWED.LENGTH));
  if (!bytes || length === null) return [];
  const text = bytes.length === 4 ? bytes.join('.') : [...hextets(bytes)].join(':');
  const prefix = parsePrefix(`${text}/${length}`);
  return prefix ? [prefix] : [];
}

function* hextets(bytes: Buffer): Generator<string> {
  for (let at = 0; at + 2 <= bytes.length; at += 2) yield bytes.readUInt16BE(at).toString(16);
}

/** struct sockaddr_in or sockaddr_in6; null for neither. */
function readSocketAddress(bytes: Buffer | undefined): Endpoint | null {
  if (!bytes || bytes.length < 16) return null;
  const port = bytes.readUInt16BE(2);
  const text =
    bytes.readUInt16LE() === AF_INET
      ? `${bytes.subarray(4, 8).join('.')}:${port}`
      : `[${[...hextets(bytes.subarray(8, 24))].join(':')}]:${port}`;
  return parseEndpoint(text);
}

function explained(error: unknown): unknown {
  if (!(error instanceof NetlinkError)) return error;
  switch (error.code) {
    // EOPNOTSUPP is the same number.
    case 'ENOTSUP':
      return new WireguardError('missing', `this kernel has no WireGuard. ${REMEDY}`);
    case 'EPERM':
    case 'EACCES':
      return new WireguardError('denied', `${error.message}: it needs CAP_NET_ADMIN`);
    case 'EEXIST':
      return new WireguardError('exists', error.message);
    default:
      return new WireguardError('failed', error.message);
  }
}

function userspaceBackend(namespace: Namespace): Backend {
  return {
    async create(name) {
      // It opens the interface and its socket, leaves a process of its own behind, and ends.
      const started = namespace.within(() =>
        execa(PROGRAM, [name], {
          reject: false,
          timeout: ANSWER_MS,
          stdin: 'ignore',
          // In a process group of its own, or whatever ends ours from a terminal ends the tunnels as well.
          detached: true,
          // Our environment may hold keys, and that process is there for longer than we are.
          extendEnv: false,
          env: { PATH },
        }),
      );
      const { failed, code, stderr } = await started;
      if (!failed) {
        // That process sets the MTU once more before it answers (docs/kernel-notes.md).
        await converse(name, 'get=1\n\n');
        return;
      }
      if (code === 'ENOENT')
        throw new WireguardError('missing', `neither this kernel nor ${PROGRAM} is there. ${REMEDY}`);
      const said = /ERROR: .*? Failed to (.*)/.exec(stderr ?? '')?.[1] ?? 'it did not start';
      if (/busy|exists/i.test(said)) throw new WireguardError('exists', `${PROGRAM} ${name}: ${said}`);
      throw new WireguardError(
        'missing',
        `this kernel has no WireGuard, and ${PROGRAM} cannot run: ${said}. ${REMEDY}`,
      );
    },
    async read(name) {
      return readUapi(await converse(name, 'get=1\n\n'));
    },
    async change(name, change) {
      await converse(name, `set=1\n${[...uapiLines(change)].join('\n')}\n\n`);
    },
  };
}

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');

function* uapiLines({ privateKey, port, peers = [] }: DeviceChange): Generator<string> {
  if (privateKey) yield `private_key=${hex(privateKey)}`;
  if (port !== undefined) yield `listen_port=${port}`;
  for (const peer of peers) {
    yield `public_key=${hex(peer.publicKey)}`;
    if (peer.remove) {
      yield 'remove=true';
      continue;
    }
    if (peer.endpoint) yield `endpoint=${formatEndpoint(peer.endpoint)}`;
    yield 'replace_allowed_ips=true';
    for (const prefix of peer.allowed) yield `allowed_ip=${formatPrefix(prefix)}`;
  }
}

/** Reads the answer to `get=1`. */
export function readUapi(text: string): DeviceState {
  let keys: KeyPair | null = null;
  let port = 0;
  const peers: { -readonly [key in keyof PeerState]: PeerState[key] }[] = [];
  let [seconds, nanoseconds] = [0, 0];
  for (const line of text.split('\n')) {
    const [name, value = ''] = line.split(/=(.*)/s);
    const peer = peers.at(-1);
    if (name === 'private_key') {
      const bytes = new Uint8Array(Buffer.from(value, 'hex'));
      if (isKey(bytes)) keys = pairOf(bytes);
    } else if (name === 'listen_port') port = Number(value);
    else if (name === 'public_key') {
      const publicKey = new Uint8Array(Buffer.from(value, 'hex'));
      peers.push({ publicKey, endpoint: null, allowed: [], handshakeAt: null, received: 0, sent: 0 });
      [seconds, nanoseconds] = [0, 0];
    } else if (!peer) continue;
    else if (name === 'endpoint') peer.endpoint = parseEndpoint(value);
    else if (name === 'allowed_ip') {
      const prefix = parsePrefix(value);
      if (prefix) peer.allowed = [...peer.allowed, prefix];
    } else if (name === 'last_handshake_time_sec' || name === 'last_handshake_time_nsec') {
      if (name.endsWith('nsec')) nanoseconds = Number(value);
      else seconds = Number(value);
      peer.handshakeAt = handshakeAt(seconds, nanoseconds);
    } else if (name === 'rx_bytes') peer.received = Number(value);
    else if (name === 'tx_bytes') peer.sent = Number(value);
  }
  return { keys, port, peers };
}

/** Watches who has an interface's socket. Returns what waits for that process's end, for `ANSWER_MS` at most. */
async function watchEnd(name: string): Promise<() => Promise<void>> {
  const socket = createConnection(socketPath(name));
  const watching = Promise.withResolvers<void>();
  const ended = Promise.withResolvers<void>();
  socket.resume();
  socket.on('connect', watching.resolve);
  socket.on('error', () => undefined);
  socket.on('close', () => {
    watching.resolve();
    ended.resolve();
  });
  await watching.promise;
  return () => {
    socket.setTimeout(ANSWER_MS, () => socket.destroy());
    return ended.promise;
  };
}

/** One question to an interface's socket. @throws WireguardError */
function converse(name: string, question: string): Promise<string> {
  const { promise, resolve, reject } = Promise.withResolvers<string>();
  const fail = (why: string): void => reject(new WireguardError('failed', `${PROGRAM} of ${name}: ${why}`));
  const socket = createConnection(socketPath(name));
  let text = '';
  socket.setEncoding('latin1');
  socket.setTimeout(ANSWER_MS, () => socket.destroy(new Error('no answer')));
  socket.on('connect', () => socket.write(question));
  socket.on('data', (part: string) => {
    text += part;
    if (!text.endsWith('\n\n')) return;
    const errno = /errno=(-?\d+)\n\n$/.exec(text)?.[1];
    if (errno === '0') resolve(text);
    else fail(`it refused (${errno ?? 'without a reason'})`);
    socket.end();
  });
  socket.on('error', (error) => fail(error.message));
  socket.on('close', () => fail('it hung up'));
  return promise;
}
