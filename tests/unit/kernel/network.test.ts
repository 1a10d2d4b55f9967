import { expect, test } from 'vitest';
import { attribute, u32 } from '../../../appliance/kernel/netlink.ts';
import { newsOf, readHeld } from '../../../appliance/kernel/network.ts';
import { OWNER } from '../../../appliance/kernel/rtnetlink.ts';
import { formatAddress } from '../../../appliance/protocol/address.ts';

const bytes = (hex: string): Buffer => Buffer.from(hex.replaceAll(' ', ''), 'hex');

/** struct rtmsg of a family and type, to a destination. */
const route = (family: number, type: number, to?: Buffer): Buffer =>
  Buffer.concat([
    Buffer.of(family, (to?.length ?? 0) * 8, 0, 0, 254, 3, 0, type, 0, 0, 0, 0),
    to ? attribute(1, to) : Buffer.alloc(0),
  ]);
/** struct ifaddrmsg of interface 2, and IFA_FLAGS. */
const held = (scope: number, flags: number, address: Buffer, local = address): Buffer =>
  Buffer.concat([
    Buffer.of(address.length === 4 ? 2 : 10, 24, flags & 0xff, scope, 2, 0, 0, 0),
    attribute(1, address),
    ...(address.length === 4 ? [attribute(2, local)] : []),
    attribute(8, u32(flags)),
  ]);

const PUBLIC6 = bytes('20010db8 00000000 00000000 00000001');
const LINK6 = bytes('fe800000 00000000 00000000 00000001');

test.each([
  ['a link', 16, Buffer.alloc(16), 'link'],
  ['an address', 20, held(0, 0x80, bytes('c0000201')), 'link'],
  ['a link-local address', 20, held(253, 0x80, LINK6), null],
  ['a default route', 24, route(2, 1), 'way'],
  ['a refusing route', 25, route(2, 7, bytes('c0000200')), 'way'],
  ['a local route', 24, route(2, 2, bytes('c0000201')), null],
  ['a broadcast route', 24, route(2, 3, bytes('c00002ff')), null],
  ['a link-local route', 24, route(10, 1, LINK6), null],
  ['a multicast route', 24, route(10, 1, bytes('ff000000 00000000 00000000 00000000')), null],
  ['an IPv6 route', 24, route(10, 1, PUBLIC6), 'way'],
  ['a rule', 32, Buffer.alloc(12), 'way'],
  ['a route of our own', 24, Buffer.from(route(2, 1)).fill(OWNER, 5, 6), null],
  ['a rule of our own', 33, Buffer.concat([Buffer.alloc(12), attribute(21, Buffer.of(OWNER))]), null],
  ['a neighbour', 28, Buffer.alloc(12), null],
  ['a route cut short', 24, Buffer.alloc(3), null],
  ['an address cut short', 20, Buffer.alloc(3), null],
])('%s', (_, type, payload, news) => {
  expect(newsOf(type, payload)).toBe(news);
});

test('of an address, ours counts, not the other end of a point-to-point link', () => {
  const found = readHeld(held(0, 0x80, bytes('0a000002'), bytes('0a000001')));
  expect(found && formatAddress(found.address)).toBe('10.0.0.1');
  expect(found?.index).toBe(2);
});

test('addresses that nothing can be sent from are none', () => {
  expect(readHeld(held(0, 0x80 | 0x40, PUBLIC6))).toBeNull();
  expect(readHeld(held(0, 0x80 | 0x08, PUBLIC6))).toBeNull();
  expect(readHeld(held(0, 0x80 | 0x40 | 0x04, PUBLIC6))).not.toBeNull();
  expect(readHeld(held(254, 0x80, bytes('7f000001')))).toBeNull();
  expect(readHeld(Buffer.alloc(5))).toBeNull();
});
