import { closeSync, openSync, readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { getSystemErrorName } from 'node:util';
import koffi from 'koffi';
import { RawNetlinkSocket } from 'netlink/dist/raw.js';
import type { Address } from '../protocol/address.ts';
import { type Namespace, ownNamespace } from './namespaces.ts';

/**
 * Netlink framing (linux/netlink.h) over the package's raw socket. The package's own higher layer is not used: its
 * errors lose their number, its reader drops attributes it does not know, and it collects a whole dump in memory.
 *
 * Netlink speaks host byte order; both architectures of the images are little-endian.
 */

/** `NETLINK_ROUTE`, `NETLINK_SOCK_DIAG`, `NETLINK_NETFILTER` and `NETLINK_GENERIC`. */
export const PROTOCOL = { ROUTE: 0, SOCK_DIAG: 4, NETFILTER: 12, GENERIC: 16 } as const;

const HEADER_BYTES = 16;
const ATTRIBUTE_HEADER_BYTES = 4;
/** Strips `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER` from an attribute's type. */
const ATTRIBUTE_TYPE_MASK = 0x3fff;
const NESTED = 0x8000;
const TYPE_ERROR = 2;
const TYPE_DONE = 3;
/** Below this, message types belong to netlink itself (`NLMSG_MIN_TYPE`). */
const FIRST_OWN_TYPE = 16;
const FLAG_REQUEST = 1;
const FLAG_ACK = 4;
const FLAG_DUMP = 0x300;
/** `NLM_F_CREATE | NLM_F_EXCL` */
export const CREATE = 0x600;
/** In an answer: what is dumped changed since the dump began. */
const FLAG_DUMP_INTERRUPTED = 0x10;

/** The kernel said no. */
export class NetlinkError extends Error {
  override readonly name = 'NetlinkError';
  /** As system calls name it: `EPERM`, `ENOTCONN`. */
  readonly code: string;

  constructor(what: string, code: string) {
    super(`${what}: ${code}`);
    this.code = code;
  }
}

/** A message that answers no request: type and payload. */
export type Notification = { readonly type: number; readonly payload: Buffer };

/** `flags` besides those of every request. */
export type BatchMessage = { readonly type: number; readonly flags?: number; readonly payload: Buffer };

export type NetlinkSocket = {
  /**
   * Sends one request and resolves with the payloads of its answers once the kernel acknowledged it. The kernel has
   * acted before this returns, unless the socket's queue is full.
   * @param flags besides those of every request: `CREATE`, for a thing that must not exist yet
   * @throws NetlinkError with the kernel's code.
   */
  request(what: string, type: number, payload: Buffer, flags?: number): Promise<Buffer[]>;
  /**
   * Sends a dump request and hands over each record as it comes.
   * @throws NetlinkError with the kernel's code; EINTR at the end of a dump during which something changed: records may
   * be missing, or have come twice.
   */
  dump(what: string, type: number, payload: Buffer, each: (record: Buffer) => void): Promise<void>;
  /**
   * Sends several messages as one, and resolves when the kernel acknowledged the last but one: nf_tables takes transactions so, between a
   * message that begins and one that ends them, and says of every message what is wrong with it.
   * @throws NetlinkError with the code of the first that the kernel refused.
   */
  batch(what: string, messages: readonly BatchMessage[]): Promise<void>;
  /** Joins a multicast group. @throws NetlinkError */
  join(group: number): void;
  close(): void;
};

export type NetlinkOptions = {
  /** Whose kernel objects are read and changed; this process's own when absent. */
  readonly namespace?: Namespace;
  readonly onNotification?: (message: Notification) => void;
  /** The kernel had to drop notifications, or the socket failed. */
  readonly onLost?: () => void;
  /**
   * Size of the buffer that each message is read into, bytes; longer ones are lost. Without it the kernel is asked for
   * the size first. It fills a dump's messages as far as the buffer allows (32 kB, netlink_dump of af_netlink.c) and else
   * some 4 kB each: worth it where each message makes the kernel walk all it has dumped before.
   */
  readonly messageBytes?: number;
};

/** asm-generic/socket.h and linux/netlink.h */
const SOL_SOCKET = 1;
const SO_RCVBUFFORCE = 33;
const SOL_NETLINK = 270;
const NETLINK_NO_ENOBUFS = 5;
/** Notifications and acknowledgements come in bursts, each about 1 kB of kernel memory; this holds some 16,000 (the kernel doubles it). */
const RECEIVE_BUFFER_BYTES = 8 << 20;
/** The kernel answers inside the system call that asks; who has no answer by then lost it. */
const ANSWER_MS = 10_000;
/** How soon after a notification lost ones are looked for. */
const DROPS_CHECK_MS = 500;

const setsockopt = koffi
  .load(null)
  .func('int setsockopt(int fd, int level, int name, const int *value, uint32_t length)');

/** Packs one attribute; a list of buffers becomes a nest. */
export function attribute(type: number, value: Buffer | readonly Buffer[]): Buffer {
  const nested = !Buffer.isBuffer(value);
  const payload = nested ? Buffer.concat(value) : value;
  const bytes = Buffer.alloc(ATTRIBUTE_HEADER_BYTES + align(payload.length));
  bytes.writeUInt16LE(ATTRIBUTE_HEADER_BYTES + payload.length, 0);
  bytes.writeUInt16LE(nested ? type | NESTED : type, 2);
  payload.copy(bytes, ATTRIBUTE_HEADER_BYTES);
  return bytes;
}

export function u8(value: number): Buffer {
  return Buffer.of(value);
}

export function u16(value: number): Buffer {
  const bytes = Buffer.alloc(2);
  bytes.writeUInt16LE(value);
  return bytes;
}

export function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

/** Hands over type, start and end of each attribute between `from` and `to`; ends at the first that is cut short. */
export function eachAttribute(
  bytes: Buffer,
  from: number,
  to: number,
  visit: (type: number, start: number, end: number) => void,
): void {
  let at = from;
  while (at + ATTRIBUTE_HEADER_BYTES <= to) {
    const length = bytes.readUInt16LE(at);
    if (length < ATTRIBUTE_HEADER_BYTES || at + length > to) break;
    visit(bytes.readUInt16LE(at + 2) & ATTRIBUTE_TYPE_MASK, at + ATTRIBUTE_HEADER_BYTES, at + length);
    at += align(length);
  }
}

/**
 * Where the value of the first attribute of a type begins, between `from` and `to`; -1 when there is none. For readings of
 * thousands of records: nothing is allocated. Its length is two bytes, four before the value, and counts those four.
 */
export function seekAttribute(bytes: Buffer, from: number, to: number, type: number): number {
  for (let at = from; at + ATTRIBUTE_HEADER_BYTES <= to; ) {
    const length = bytes.readUInt16LE(at);
    if (length < ATTRIBUTE_HEADER_BYTES || at + length > to) return -1;
    if ((bytes.readUInt16LE(at + 2) & ATTRIBUTE_TYPE_MASK) === type) return at + ATTRIBUTE_HEADER_BYTES;
    at += align(length);
  }
  return -1;
}

/** Where the value that begins at `start`, as `seekAttribute` found it, ends. */
export const attributeEnd = (bytes: Buffer, start: number): number =>
  start - ATTRIBUTE_HEADER_BYTES + bytes.readUInt16LE(start - ATTRIBUTE_HEADER_BYTES);

/** All attributes of a stream by type, known or not; reading stops at the first that is cut short. */
export function readAttributes(bytes: Buffer, offset = 0): Map<number, Buffer> {
  const found = new Map<number, Buffer>();
  eachAttribute(bytes, offset, bytes.length, (type, start, end) => found.set(type, bytes.subarray(start, end)));
  return found;
}

/** Reads an integer attribute of 1, 2, 4 or 8 bytes; null when it is absent or of another size. */
export function integer(bytes: Buffer | undefined): number | null {
  switch (bytes?.length) {
    case 1:
      return bytes.readUInt8();
    case 2:
      return bytes.readUInt16LE();
    case 4:
      return bytes.readUInt32LE();
    case 8:
      return Number(bytes.readBigUInt64LE());
    default:
      return null;
  }
}

/** Hosts have few addresses and connections many: they share them. Bounded, because servers may be many, too. */
const known4 = new Map<number, Address>();
const MOST_KNOWN = 4_096;

/** An IPv4 address as the number that its bytes make in network order. */
export function address4(value: number): Address {
  let address = known4.get(value);
  if (!address) {
    if (known4.size >= MOST_KNOWN) known4.clear();
    address = { family: 4, value: BigInt(value) };
    known4.set(value, address);
  }
  return address;
}

const align = (length: number): number => (length + 3) & ~3;

type Waiting = {
  readonly what: string;
  readonly each: (record: Buffer) => void;
  readonly resolve: () => void;
  readonly reject: (error: NetlinkError) => void;
  readonly since: number;
  interrupted: boolean;
};

/** Opens a socket. @throws NetlinkError when the kernel refuses one. */
export function openNetlink(protocol: number, options: NetlinkOptions = {}): NetlinkSocket {
  const waiting = new Map<number, Waiting>();
  let sequence = 0;
  let closed = false;
  let expire: NodeJS.Timeout | null = null;

  // Port 0 lets the kernel choose: the package's own choice is made from the process id, which is 1 in every container.
  const { namespace = ownNamespace } = options;
  const rowOf = (port: number): SocketRow | null => namespace.within(() => readSocketRow(protocol, port));
  let likely = '';
  const socket = opening('opening a netlink socket', () =>
    namespace.within(() => {
      likely = nextDescriptor();
      const raw = new RawNetlinkSocket(protocol, {
        localPort: 0,
        recvBufferSize: 0,
        sendBufferSize: 0,
        ...(options.messageBytes === undefined ? {} : { messagePeeking: false, msgBufferSize: options.messageBytes }),
      });
      raw.unref();
      return raw;
    }),
  );
  const { port } = socket.address();
  toughen(rowOf(port), likely);
  const watch = options.onLost === undefined ? null : watchDrops(() => rowOf(port)?.drops, options.onLost);

  function settle(seq: number, code: string | null): void {
    const request = waiting.get(seq);
    if (!request) return;
    waiting.delete(seq);
    if (waiting.size === 0 && !closed) socket.unref();
    if (code === null) request.resolve();
    else request.reject(new NetlinkError(request.what, code));
  }

  function expireAnswers(): void {
    expire = null;
    const limit = performance.now() - ANSWER_MS;
    // In the order they were asked.
    for (const [seq, { since }] of waiting) {
      if (since > limit) {
        expire = setTimeout(expireAnswers, since - limit).unref();
        return;
      }
      settle(seq, 'ETIMEDOUT');
    }
  }

  function take(type: number, flags: number, seq: number, payload: Buffer): void {
    const request = seq === 0 ? undefined : waiting.get(seq);
    if (request && (flags & FLAG_DUMP_INTERRUPTED) !== 0) request.interrupted = true;
    if (type === TYPE_ERROR) {
      const errno = payload.length < 4 ? -1 : payload.readInt32LE();
      settle(seq, errno === 0 ? null : nameOf(errno));
    } else if (type === TYPE_DONE) {
      // The errno of a dump that broke off is in DONE.
      const errno = payload.length < 4 ? 0 : payload.readInt32LE();
      settle(seq, errno < 0 ? nameOf(errno) : request?.interrupted ? 'EINTR' : null);
    } else if (type >= FIRST_OWN_TYPE) {
      if (request) request.each(payload);
      else {
        watch?.check();
        options.onNotification?.({ type, payload });
      }
    }
  }

  const guarded = (task: () => void): void => {
    try {
      task();
    } catch (error) {
      // Thrown from here it would end the process inside native code; from a turn of its own it is an ordinary exception.
      setImmediate(() => {
        throw error;
      });
    }
  };

  function read(bytes: Buffer): void {
    let at = 0;
    while (at + HEADER_BYTES <= bytes.length) {
      const length = bytes.readUInt32LE(at);
      if (length < HEADER_BYTES || at + length > bytes.length) break;
      const payload = bytes.subarray(at + HEADER_BYTES, at + length);
      take(bytes.readUInt16LE(at + 4), bytes.readUInt16LE(at + 6), bytes.readUInt32LE(at + 8), payload);
      at += align(length);
    }
  }

  socket.on('message', (bytes, from) => {
    // Only port 0 is the kernel; other processes may address our port too.
    if (from.port === 0) guarded(() => read(bytes));
  });
  const lose = (code: string): void => {
    guarded(() => options.onLost?.());
    // Answers may have been among what was dropped: whoever waits for one must not wait forever.
    for (const seq of [...waiting.keys()]) settle(seq, code);
  };
  socket.on('error', (error) => lose(error.code ?? 'EIO'));
  socket.on('truncatedMessage', () => lose('EMSGSIZE'));

  /** All of them under one sequence number: what is said of any settles the request. */
  function send(what: string, messages: readonly BatchMessage[], each: Waiting['each']): Promise<void> {
    return new Promise((resolve, reject) => {
      if (closed) {
        reject(new NetlinkError(what, 'EBADF'));
        return;
      }
      sequence = sequence === 0xffffffff ? 1 : sequence + 1;
      const seq = sequence;
      // Who waits for an answer keeps the process running; who waits for notifications does not.
      if (waiting.size === 0) socket.ref();
      waiting.set(seq, { what, each, resolve, reject, since: performance.now(), interrupted: false });
      expire ??= setTimeout(expireAnswers, ANSWER_MS).unref();
      const framed = messages.map(({ type, flags = 0, payload }) => {
        const message = Buffer.alloc(HEADER_BYTES + align(payload.length));
        message.writeUInt32LE(HEADER_BYTES + payload.length, 0);
        message.writeUInt16LE(type, 4);
        message.writeUInt16LE(flags | FLAG_REQUEST, 6);
        message.writeUInt32LE(seq, 8);
        payload.copy(message, HEADER_BYTES);
        return message;
      });
      socket.send(Buffer.concat(framed), {}, (error) => {
        if (error) settle(seq, error.code);
      });
    });
  }

  return {
    async request(what, type, payload, flags = 0) {
      const records: Buffer[] = [];
      await send(what, [{ type, flags: FLAG_ACK | flags, payload }], (record) => records.push(record));
      return records;
    },
    dump: (what, type, payload, each) => send(what, [{ type, flags: FLAG_DUMP, payload }], each),
    batch: (what, messages) =>
      send(
        what,
        messages.map((message, index) =>
          index === messages.length - 2 ? { ...message, flags: (message.flags ?? 0) | FLAG_ACK } : message,
        ),
        () => undefined,
      ),
    join(group) {
      opening(`joining multicast group ${group}`, () => socket.addMembership(group));
    },
    close() {
      if (closed) return;
      closed = true;
      watch?.stop();
      if (expire) clearTimeout(expire);
      socket.close();
      for (const seq of [...waiting.keys()]) settle(seq, 'ECANCELED');
    },
  };
}

/**
 * Gives a socket a large buffer, and keeps an overrun from being an error of it. Left to itself an overrun raises
 * EPOLLERR, which libuv reports as an error of its poll handle, upon which the native part of the package throws where
 * nobody can catch it: the process is gone (tests/netns/client.test.ts, docs/kernel-notes.md).
 */
function toughen(row: SocketRow | null, likely: string): void {
  const isIt = (fd: string): boolean => {
    try {
      return readlinkSync(`/proc/self/fd/${fd}`) === `socket:[${row?.inode}]`;
    } catch {
      return false;
    }
  };
  // With a thousand sockets open, looking through all of them takes 2 ms.
  const fd = isIt(likely) ? likely : readdirSync('/proc/self/fd').find(isIt);
  if (fd === undefined) throw new NetlinkError('finding the socket among the open files', 'ENOENT');
  const set = (level: number, option: number, value: number): boolean =>
    setsockopt(Number(fd), level, option, [value], 4) === 0;
  if (!set(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)) throw new NetlinkError('setting NETLINK_NO_ENOBUFS', 'EINVAL');
  // Refused in a user namespace; the default then holds some 300 messages, and more of them are found to be lost.
  set(SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BUFFER_BYTES);
}

/** What the next file that is opened will most likely be: the lowest number that is free, unless a thread of libuv's takes it first. */
function nextDescriptor(): string {
  const fd = openSync('/dev/null', 'r');
  closeSync(fd);
  return String(fd);
}

/** Looks, soon after something arrived, whether the kernel counted drops meanwhile. */
function watchDrops(count: () => number | undefined, onLost: () => void): { check(): void; stop(): void } {
  let drops = 0;
  let timer: NodeJS.Timeout | null = null;
  return {
    check() {
      timer ??= setTimeout(() => {
        timer = null;
        const now = count() ?? drops;
        if (now === drops) return;
        drops = now;
        onLost();
      }, DROPS_CHECK_MS).unref();
    },
    stop() {
      if (timer) clearTimeout(timer);
    },
  };
}

type SocketRow = { readonly drops: number; readonly inode: string };

/** One line of net/netlink, of this thread's namespace (/proc/net is that of the process's first): sk Eth Pid Groups Rmem Wmem Dump Locks Drops Inode. */
function readSocketRow(protocol: number, port: number): SocketRow | null {
  for (const line of readFileSync('/proc/thread-self/net/netlink', 'latin1').split('\n')) {
    const [, eth, pid, , , , , , drops, inode] = line.trim().split(/\s+/);
    if (eth === String(protocol) && pid === String(port) && inode) return { drops: Number(drops), inode };
  }
  return null;
}

function opening<T>(what: string, act: () => T): T {
  try {
    return act();
  } catch (error) {
    const code = error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : 'UNKNOWN';
    throw new NetlinkError(what, code);
  }
}

function nameOf(errno: number): string {
  try {
    return getSystemErrorName(errno);
  } catch {
    // Kernel-internal numbers (ENOTSUPP is 524) have no name here.
    return `errno ${-errno}`;
  }
}
