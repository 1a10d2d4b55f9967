import { describe, expect, it } from 'vitest';
import { type MapElement, readElements } from '../../../appliance/kernel/elements.ts';

/** As Linux 6.18 sent them: `NFT_MSG_NEWSETELEM` without the message's header. */
const CAPTURED = {
  /**
   * leases4: 198.51.100.7 . 20007 timeout 605s comment "k1a2b3c4d" : 192.0.2.1 . 443, and without timeout
   * 198.51.100.8 . 20008 : 192.0.2.2 . 8443
   */
  two:
    '010000020b0001006465746f757200000c0002006c65617365733400740003004c000100100001000c000100c63364074e270000100002000c00' +
    '0100c000020101bb00000c0004000000000000093b480c0005000000000000093b4010000600000a6b3161326233633464002400010010000100' +
    '0c000100c63364084e280000100002000c000100c000020220fb0000',
  /** leases6: 2001:db8::7 . 20007 timeout 605s comment "v1" : 2001:db8:1::1 . 443 */
  six:
    '010000020b0001006465746f757200000c0002006c6561736573360064000300600001001c0001001800010020010db800000000000000000000' +
    '00074e2700001c0002001800010020010db800010000000000000000000101bb00000c0004000000000000093b480c0005000000000000093b40' +
    '090006000003763100000000',
  /** A map of verdicts: 80 : accept */
  verdict:
    '010000020b0001006465746f757200000d00020076657264696374730000000024000300200001000c0001000600010000500000100002000c00' +
    '02000800010000000001',
  /** The last message of a dump. */
  none: '010000020b0001006465746f757200000c0002006c6561736573340004000300',
};

function read(bytes: Buffer): MapElement[] {
  const found: MapElement[] = [];
  readElements(bytes, (element) => found.push(element));
  return found;
}

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex');
const shown = (text: string) =>
  read(Buffer.from(text, 'hex')).map(({ key, data, ...rest }) => ({ key: hex(key), data: hex(data), ...rest }));

describe('elements of a map', () => {
  it('are read with key, value, time and comment', () => {
    expect(shown(CAPTURED.two)).toEqual([
      { key: 'c63364074e270000', data: 'c000020101bb0000', remaining: 604.992, comment: 'k1a2b3c4d' },
      { key: 'c63364084e280000', data: 'c000020220fb0000', remaining: null, comment: null },
    ]);
    expect(shown(CAPTURED.six)).toEqual([
      {
        key: '20010db80000000000000000000000074e270000',
        data: '20010db800010000000000000000000101bb0000',
        remaining: 604.992,
        comment: 'v1',
      },
    ]);
    expect(shown(CAPTURED.none)).toEqual([]);
  });

  it('have no value that is none', () => {
    expect(shown(CAPTURED.verdict)).toEqual([{ key: '0050', data: '', remaining: null, comment: null }]);
  });

  it('find their comment among other user data', () => {
    const userdata = '10000600000a6b316132623363346400';
    // A block of type 1 with one byte, then the comment "ab"; and a comment whose length is a lie.
    for (const [block, comment] of [
      ['10000600010163000361620000000000', 'ab'],
      ['1000060000ff6b316132623363346400', null],
      ['10000600000000000000000000000000', ''],
    ]) {
      const text = CAPTURED.two.replace(userdata, block ?? '');
      expect(shown(text)[0]?.comment ?? null).toBe(comment);
    }
  });

  it('may be cut anywhere: what is there is read, and nothing throws', () => {
    for (const text of Object.values(CAPTURED)) {
      const bytes = Buffer.from(text, 'hex');
      const whole = read(bytes).length;
      for (let length = 0; length < bytes.length; length++) {
        expect(read(bytes.subarray(0, length)).length).toBeLessThanOrEqual(whole);
      }
    }
  });
});
