import { expect, test } from 'vitest';
import { decodeEvent } from '../../../appliance/kernel/mptcp.ts';
import { formatEndpoint } from '../../../appliance/protocol/address.ts';

/** Payloads (from the generic netlink header on) that Linux 6.18 sent. */
const CAPTURED = {
  created:
    '010100000800010047ff97040600020002000000080005000a010001080007000a010002060009009ad2000006000a001f40000005000300000000000500040000000000',
  established6:
    '0201000008000100b94711b206000d0001000000060002000a00000014000600fd01000000000000000000000000000114000800fd01000000000000000000000000000206000900b208000006000a001f40000005000300000000000500040000000000',
  mapped:
    '0101000008000100e769aa9606000d0001000000060002000a0000001400060000000000000000000000ffff0a0100011400080000000000000000000000ffff0a010002060009009b8e000006000a001f40000005000300000000000500040000000000',
  joined:
    '0a0100000800010047ff97040600020002000000080005000a010005080007000a01000206000900de51000006000a001f4000000500030007000000050004000000000005000b0000000000',
  left: '0b0100000800010047ff97040600020002000000080005000a010005080007000a01000206000900a089000006000a001f4000000500030007000000050004000000000005000b0000000000',
  closed: '030100000800010047ff9704',
  listening: '0f01000006000200020000000600090000510000080005000a010001',
} as const;

const decode = (name: keyof typeof CAPTURED) => decodeEvent(Buffer.from(CAPTURED[name], 'hex'));

/** With endpoints as text, for reading. */
const readable = (name: keyof typeof CAPTURED) => {
  const event = decode(name);
  if (!event) return null;
  const text: Record<string, unknown> = { ...event };
  if ('local' in event) text['local'] = formatEndpoint(event.local);
  if ('remote' in event) text['remote'] = formatEndpoint(event.remote);
  return text;
};

test('a connection', () => {
  expect(readable('created')).toEqual({
    kind: 'created',
    token: 0x0497ff47,
    local: '10.1.0.1:39634',
    remote: '10.1.0.2:8000',
    serverSide: false,
    denyJoinId0: false,
  });
});

test('an IPv6 connection whose server forbids joins to its first address', () => {
  expect(readable('established6')).toMatchObject({
    kind: 'established',
    local: '[fd01::1]:45576',
    remote: '[fd01::2]:8000',
    denyJoinId0: true,
  });
});

test('IPv4-mapped addresses are IPv4', () => {
  expect(readable('mapped')).toMatchObject({ local: '10.1.0.1:39822', remote: '10.1.0.2:8000' });
});

test('subflows', () => {
  expect(readable('joined')).toEqual({
    kind: 'subflow-established',
    token: 0x0497ff47,
    local: '10.1.0.5:56913',
    remote: '10.1.0.2:8000',
    localId: 7,
    remoteId: 0,
    backup: false,
    error: 0,
  });
  expect(readable('left')).toMatchObject({ kind: 'subflow-closed', error: 0 });
});

test('the end, and a listener', () => {
  expect(readable('closed')).toEqual({ kind: 'closed', token: 0x0497ff47 });
  expect(readable('listening')).toEqual({ kind: 'listener-created', local: '10.1.0.1:81' });
});

test('unknown commands, unknown attributes and cut-off messages are skipped', () => {
  const bytes = Buffer.from(CAPTURED.created, 'hex');
  const unknown = Buffer.from(bytes);
  unknown[0] = 99;
  expect(decodeEvent(unknown)).toBeNull();
  const more = Buffer.concat([bytes, Buffer.from('0800ff3f01020304', 'hex')]);
  expect(decodeEvent(more)).toEqual(decode('created'));
  for (let length = 0; length < bytes.length; length++) {
    const cut = decodeEvent(bytes.subarray(0, length));
    // Both ports are there from byte 50 on; what comes behind them is not needed.
    if (length < 50) expect(cut).toBeNull();
    else expect(cut).toEqual(decode('created'));
  }
});
