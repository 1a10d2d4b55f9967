import koffi from 'koffi';
import { type Endpoint, writeAddress } from '../protocol/address.ts';
import type { Namespace } from './namespaces.ts';

/**
 * Sockets by the C library, for what Node's own cannot be: made in another namespace, Multipath TCP, marked before the first packet.
 * Every call returns at once.
 */

/** asm-generic/socket.h, netinet/in.h; the same on amd64 and arm64. */
const AF_INET = 2;
const AF_INET6 = 10;
const TYPE = { stream: 1, datagram: 2 } as const;
const SOCK_NONBLOCK = 0o4000;
const SOCK_CLOEXEC = 0o2000000;

const libc = koffi.load(null);
const socket = libc.func('int socket(int domain, int type, int protocol)');
export const bind = libc.func('int bind(int fd, const uint8_t *address, uint32_t length)');
export const connect = libc.func('int connect(int fd, const uint8_t *address, uint32_t length)');
export const poll = libc.func('int poll(_Inout_ uint8_t *fds, uint64_t count, int timeout)');
export const setsockopt = libc.func('int setsockopt(int fd, int level, int name, const int *value, uint32_t length)');
export const getsockopt = libc.func(
  'int getsockopt(int fd, int level, int name, _Inout_ uint8_t *value, _Inout_ uint32_t *length)',
);
export const close = libc.func('int close(int fd)');

/** A new socket that never blocks; negative when there can be none (`koffi.errno()`). Protocol 0 is the type's usual one. */
export function openSocket(namespace: Namespace, family: 4 | 6, type: keyof typeof TYPE, protocol = 0): number {
  return namespace.within(() =>
    socket(family === 4 ? AF_INET : AF_INET6, TYPE[type] | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol),
  );
}

/** struct sockaddr_in and sockaddr_in6. */
export function socketAddress({ address, port }: Endpoint): Buffer {
  const bytes = Buffer.alloc(address.family === 4 ? 16 : 28);
  bytes.writeUInt16LE(address.family === 4 ? AF_INET : AF_INET6);
  bytes.writeUInt16BE(port, 2);
  if (address.family === 4) bytes.writeUInt32BE(Number(address.value), 4);
  else writeAddress(address, bytes, 8);
  return bytes;
}
