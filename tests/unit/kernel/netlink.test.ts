import { expect, test } from 'vitest';
import { attribute, integer, readAttributes, u8, u16, u32 } from '../../../appliance/kernel/netlink.ts';

test('attributes are padded to four bytes, and nests are marked', () => {
  expect(attribute(5, u8(7)).toString('hex')).toBe('0500050007000000');
  expect(attribute(1, [attribute(2, u16(0x1234))]).toString('hex')).toBe('0c000180' + '0600020034120000');
});

test('reading undoes writing, whatever order the bytes of a type’s flags', () => {
  const stream = Buffer.concat([
    attribute(4, u32(0xdeadbeef)),
    attribute(5, u8(9)),
    attribute(6, [attribute(1, u16(2))]),
  ]);
  const found = readAttributes(stream);
  expect(integer(found.get(4))).toBe(0xdeadbeef);
  expect(integer(found.get(5))).toBe(9);
  expect(integer(readAttributes(found.get(6) ?? Buffer.alloc(0)).get(1))).toBe(2);
});

test('what is cut short or lies about its length ends the reading', () => {
  const stream = Buffer.concat([attribute(1, u32(1)), attribute(2, u32(2))]);
  for (let length = 0; length <= stream.length; length++) {
    expect(readAttributes(stream.subarray(0, length)).size).toBe(length < 8 ? 0 : length < 16 ? 1 : 2);
  }
  expect(readAttributes(Buffer.from('0000010000000000', 'hex')).size).toBe(0);
  expect(readAttributes(Buffer.from('ffff010000000000', 'hex')).size).toBe(0);
});

test('integers of strange sizes are no integers', () => {
  expect(integer(undefined)).toBeNull();
  expect(integer(Buffer.alloc(3))).toBeNull();
  expect(integer(Buffer.from('0100000000000000', 'hex'))).toBe(1);
});
