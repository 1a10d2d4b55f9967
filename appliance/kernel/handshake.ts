import koffi from 'koffi';
import type { Endpoint } from '../protocol/address.ts';
import type { Namespace } from './namespaces.ts';
import { close, connect, getsockopt, openSocket, poll, setsockopt, socketAddress } from './sockets.ts';

/**
 * Whether somebody answers at an endpoint, by an open and a close that carry no byte. Node cannot make an MPTCP socket
 * nor mark one before its SYN leaves, so this talks to the C library; every call returns at once.
 */
export type Handshake = {
  /**
   * `answered`: connected, by MPTCP if that was asked for. `refused`: something else came back, a reset or plain TCP.
   * `silent`: nothing did within `waitMs`, or there is no way there.
   */
  try(remote: Endpoint, protocol: 'tcp' | 'mptcp', waitMs: number): Promise<HandshakeResult>;
};

export type HandshakeResult = 'answered' | 'refused' | 'silent';

/** asm-generic/socket.h, netinet/in.h, linux/mptcp.h, linux/errno.h; the same on amd64 and arm64. */
const IPPROTO_TCP = 6;
const IPPROTO_MPTCP = 262;
const SOL_SOCKET = 1;
const SO_ERROR = 4;
const SO_MARK = 36;
const SOL_MPTCP = 284;
const MPTCP_INFO = 1;
/** struct mptcp_info: where its flags are, and the one that says the other end speaks only TCP. */
const INFO_FLAGS_AT = 8;
const INFO_FALLBACK = 1;
const POLLOUT = 4;
const EINPROGRESS = 115;
const ECONNREFUSED = 111;
const ECONNRESET = 104;
/** How often an open handshake is looked at. */
const LOOK_MS = 20;

/** Handshakes whose packets carry `mark`, so that rules of ours can tell them from the applications'. */
export function systemHandshake(namespace: Namespace, mark: number): Handshake {
  return {
    async try(remote, protocol, waitMs) {
      const number = protocol === 'mptcp' ? IPPROTO_MPTCP : IPPROTO_TCP;
      const fd = openSocket(namespace, remote.address.family, 'stream', number);
      if (fd < 0) return 'silent';
      try {
        setsockopt(fd, SOL_SOCKET, SO_MARK, [mark | 0], 4);
        const address = socketAddress(remote);
        const failed = connect(fd, address, address.length) !== 0 && koffi.errno() !== EINPROGRESS;
        // Such as no route, at once: of a socket that never asked, the kernel would tell nothing later.
        return failed ? 'silent' : await outcome(fd, protocol, waitMs);
      } finally {
        close(fd);
      }
    },
  };
}

function option(fd: number, level: number, name: number, bytes: number): Buffer | null {
  const value = Buffer.alloc(bytes);
  return getsockopt(fd, level, name, value, [bytes]) === 0 ? value : null;
}

async function outcome(fd: number, protocol: 'tcp' | 'mptcp', waitMs: number): Promise<HandshakeResult> {
  const until = performance.now() + waitMs;
  // struct pollfd: fd, events, revents.
  const watched = Buffer.alloc(8);
  watched.writeInt32LE(fd, 0);
  watched.writeInt16LE(POLLOUT, 4);
  while (poll(watched, 1, 0) !== 1) {
    if (performance.now() >= until) return 'silent';
    await new Promise((resolve) => setTimeout(resolve, LOOK_MS));
  }
  const error = option(fd, SOL_SOCKET, SO_ERROR, 4)?.readInt32LE() ?? -1;
  if (error === ECONNREFUSED || error === ECONNRESET) return 'refused';
  if (error !== 0) return 'silent';
  if (protocol === 'tcp') return 'answered';
  const flags = option(fd, SOL_MPTCP, MPTCP_INFO, INFO_FLAGS_AT + 4)?.readUInt32LE(INFO_FLAGS_AT);
  return flags === undefined || (flags & INFO_FALLBACK) !== 0 ? 'refused' : 'answered';
}
