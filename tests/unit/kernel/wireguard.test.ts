import { describe, expect, it } from 'vitest';
import { attribute, u8, u16, u32 } from '../../../appliance/kernel/netlink.ts';
import { readDevice, readUapi } from '../../../appliance/kernel/wireguard.ts';
import { formatEndpoint, formatPrefix } from '../../../appliance/protocol/address.ts';

const PRIVATE = '01'.repeat(32);
/** As `wg pubkey` says. */
const PUBLIC = 'a4e09292b651c278b9772c569f5fa9bb13d906b46ab68c9df9dc2b4409f8a209';
const PEERS = ['02'.repeat(32), '03'.repeat(32)] as const;
const bytes = (hex: string): Buffer => Buffer.from(hex, 'hex');
const hex = (key: Uint8Array | undefined): string => Buffer.from(key ?? []).toString('hex');

describe('what wireguard-go says of an interface', () => {
  const TEXT = `private_key=${PRIVATE}
listen_port=51820
public_key=${PEERS[0]}
preshared_key=${'00'.repeat(32)}
protocol_version=1
endpoint=[2001:db8::1]:40001
last_handshake_time_sec=1700000000
last_handshake_time_nsec=500000000
tx_bytes=12
rx_bytes=34
persistent_keepalive_interval=0
allowed_ip=10.215.7.1/32
allowed_ip=fd0d:e70::7:1/128
public_key=${PEERS[1]}
last_handshake_time_sec=0
last_handshake_time_nsec=0
tx_bytes=0
rx_bytes=0
errno=0

`;
  it('is read, each peer with its own', () => {
    const { keys, port, peers } = readUapi(TEXT);
    expect([hex(keys?.privateKey), hex(keys?.publicKey), port]).toEqual([PRIVATE, PUBLIC, 51820]);
    expect(peers.map(({ publicKey }) => hex(publicKey))).toEqual(PEERS);
    expect(peers[0]).toMatchObject({ handshakeAt: 1_700_000_000_500, sent: 12, received: 34 });
    expect(peers[0]?.endpoint && formatEndpoint(peers[0].endpoint)).toBe('[2001:db8::1]:40001');
    expect(peers[0]?.allowed.map(formatPrefix)).toEqual(['10.215.7.1/32', 'fd0d:e70::7:1/128']);
    expect(peers[1]).toMatchObject({ handshakeAt: null, endpoint: null, allowed: [] });
  });

  it('may be little', () => {
    expect(readUapi('listen_port=0\nerrno=0\n\n')).toEqual({ keys: null, port: 0, peers: [] });
    expect(readUapi(`private_key=${'00'.repeat(32)}\nerrno=0\n\n`).keys).toBeNull();
    expect(readUapi('nonsense\n=\nendpoint=1.2.3.4:5\n\n').peers).toEqual([]);
  });
});

describe('what the kernel says of an interface', () => {
  /** struct genlmsghdr, then the attributes of include/uapi/linux/wireguard.h. */
  const message = (...attributes: Buffer[]): Buffer => Buffer.concat([Buffer.of(0, 1, 0, 0), ...attributes]);
  const allowed = (family: number, address: string, length: number): Buffer =>
    attribute(0, [attribute(1, u16(family)), attribute(2, bytes(address)), attribute(3, u8(length))]);
  const peer = (key: string, prefixes: Buffer[], ...more: Buffer[]): Buffer =>
    attribute(0, [attribute(1, bytes(key)), ...more, attribute(9, prefixes)]);
  const timespec = (seconds: bigint): Buffer => {
    const value = Buffer.alloc(16);
    value.writeBigInt64LE(seconds);
    return value;
  };
  const endpoint = Buffer.concat([u16(2), Buffer.of(0xca, 0x6c), bytes('c0000201'), Buffer.alloc(8)]);

  it('is read, also when a peer’s prefixes come in two messages', () => {
    const reading = { privateKey: null, port: 0, peers: [] };
    const device = [attribute(2, Buffer.from('detour-vpn\0')), attribute(3, bytes(PRIVATE)), attribute(6, u16(51820))];
    const first = peer(
      PEERS[0],
      [allowed(2, '0ad70701', 32)],
      attribute(4, endpoint),
      attribute(6, timespec(1_700_000_000n)),
      attribute(7, Buffer.concat([u32(34), u32(0)])),
    );
    readDevice(message(...device, attribute(8, [first])), reading);
    const rest = peer(PEERS[0], [allowed(10, 'fd0d0e70000000000000000000070001', 128)]);
    readDevice(message(attribute(8, [rest, peer(PEERS[1], [], attribute(6, timespec(0n)))])), reading);
    const { peers } = reading as { peers: ReturnType<typeof readUapi>['peers'] };
    expect(reading).toMatchObject({ port: 51820 });
    expect(hex(reading.privateKey ?? undefined)).toBe(PRIVATE);
    expect(peers.map(({ publicKey }) => hex(publicKey))).toEqual(PEERS);
    expect(peers[0]?.allowed.map(formatPrefix)).toEqual(['10.215.7.1/32', 'fd0d:e70::7:1/128']);
    expect(peers[0]).toMatchObject({ handshakeAt: 1_700_000_000_000, received: 34 });
    expect(peers[0]?.endpoint && formatEndpoint(peers[0].endpoint)).toBe('192.0.2.1:51820');
    expect(peers[1]).toMatchObject({ handshakeAt: null, allowed: [] });
  });

  it('is nothing where nothing can be read', () => {
    const reading = { privateKey: null, port: 7, peers: [] };
    for (const garbage of [Buffer.alloc(0), Buffer.alloc(3), message(attribute(8, Buffer.of(1, 0, 0, 0)))])
      readDevice(garbage, reading);
    readDevice(message(attribute(3, bytes('00'.repeat(32))), attribute(8, [attribute(0, [])])), reading);
    expect(reading).toEqual({ privateKey: null, port: 7, peers: [] });
  });
});
