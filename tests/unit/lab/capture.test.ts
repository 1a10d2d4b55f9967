import { createHash } from 'node:crypto';
import { describe, expect, it } from 'vitest';
import { joinTimes, type Segment } from '../../bench/capture.ts';

const [CLIENT, SERVER, DETOUR] = ['10.0.0.1:40000', '10.0.0.2:443', '10.0.0.3:20001'];
const KEY = Buffer.from('0102030405060708', 'hex');
const TOKEN = createHash('sha256').update(KEY).digest().subarray(0, 4);
const CAPABLE = Buffer.from([0x01, 0x81]);
const capable = (key: Buffer): Buffer => Buffer.concat([CAPABLE, key]);
const join = (token: Buffer): Buffer => Buffer.concat([Buffer.from([0x10, 0x01]), token, Buffer.alloc(4)]);
const DSS = Buffer.from([0x20, 0x01]);

function segment(ms: number, from: string, to: string, over: Partial<Segment> = {}): Segment {
  return { ms, from, to, syn: false, ack: true, payload: 0, mptcp: DSS, ...over };
}

const OPENED = [
  segment(0, CLIENT, SERVER, { syn: true, ack: false, mptcp: CAPABLE }),
  segment(40, SERVER, CLIENT, { syn: true, mptcp: capable(KEY) }),
  segment(41, CLIENT, SERVER, { payload: 100 }),
];
const times = (segments: readonly Segment[]) => joinTimes(segments, new Set([SERVER]));

describe('the times of joins in a capture', () => {
  it('are those of the connection whose token the join carries', () => {
    const joined = [
      ...OPENED,
      segment(80, SERVER, CLIENT),
      segment(81, '10.0.0.1:50000', DETOUR, { syn: true, ack: false, mptcp: join(Buffer.from('ffffffff', 'hex')) }),
      segment(82, '10.0.0.1:50001', DETOUR, { syn: true, ack: false, mptcp: join(TOKEN) }),
      // Sent again.
      segment(1_082, '10.0.0.1:50001', DETOUR, { syn: true, ack: false, mptcp: join(TOKEN) }),
      segment(1_122, DETOUR, '10.0.0.1:50001', { syn: true, mptcp: join(TOKEN) }),
      segment(1_130, DETOUR, '10.0.0.1:50001'),
      // Of somebody else's join.
      segment(1_131, DETOUR, '10.0.0.1:50000', { payload: 900 }),
      segment(1_140, DETOUR, '10.0.0.1:50001', { payload: 900 }),
      segment(1_150, DETOUR, '10.0.0.1:50001', { payload: 900 }),
    ];
    expect(times(joined)).toEqual([{ opened: 0, established: 80, joined: 82, carried: 1_140 }]);
  });

  it('are null for what never happened, and plain TCP and other servers do not count', () => {
    const other = '10.0.0.9:443';
    expect(
      times([
        ...OPENED,
        segment(0, '10.0.0.1:40001', SERVER, { syn: true, ack: false, mptcp: CAPABLE }),
        segment(40, SERVER, '10.0.0.1:40001', { syn: true, mptcp: null }),
        segment(0, '10.0.0.1:40002', other, { syn: true, ack: false, mptcp: CAPABLE }),
        segment(40, other, '10.0.0.1:40002', { syn: true, mptcp: capable(KEY) }),
      ]),
    ).toEqual([{ opened: 0, established: null, joined: null, carried: null }]);
  });

  it('of a join to the server itself, from another address, are told apart from the first path', () => {
    const inner = '10.215.0.2:51000';
    expect(
      times([
        ...OPENED,
        segment(80, SERVER, CLIENT),
        segment(81, inner, SERVER, { syn: true, ack: false, mptcp: join(TOKEN) }),
        segment(100, SERVER, CLIENT, { payload: 900 }),
        segment(121, SERVER, inner, { payload: 900 }),
      ]),
    ).toEqual([{ opened: 0, established: 80, joined: 81, carried: 121 }]);
  });
});
