/** What client/mptcpify.ts relies on in the maps: the same cases for the kernel's and for tests/fakes/mptcpify.ts. */
import { expect, it } from 'vitest';
import type { Switches } from '../../appliance/kernel/mptcpify.ts';

/** `open` gives empty ones, and closes them after each case. */
export function switchCases(using: (task: (switches: Switches) => void) => void): void {
  it('keeps what is set, and tells it', () => {
    using(({ nets, groups }) => {
      nets.set(0xf0000001, 1);
      groups.set(2n ** 40n + 7n, 3);
      groups.set(1n, 0);
      expect(nets.entries()).toEqual(new Map([[0xf0000001, 1]]));
      expect(new Map([...groups.entries()].sort())).toEqual(
        new Map([
          [1n, 0],
          [2n ** 40n + 7n, 3],
        ]),
      );
    });
  });

  it('takes another value for the same, and forgets', () => {
    using(({ groups }) => {
      groups.set(9n, 1);
      groups.set(9n, 0);
      expect(groups.entries()).toEqual(new Map([[9n, 0]]));
      groups.delete(9n);
      groups.delete(9n);
      expect(groups.entries()).toEqual(new Map());
    });
  });

  it('says so when it is full', () => {
    using(({ nets }) => {
      for (let net = 1; net <= 16_384; net++) nets.set(net, 1);
      expect(() => nets.set(16_385, 1)).toThrow('E2BIG');
      nets.set(16_384, 0);
      nets.delete(1);
      nets.set(16_385, 1);
      expect(nets.entries().size).toBe(16_384);
    });
  });
}
