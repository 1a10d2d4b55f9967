import { describe, expect, it } from 'vitest';
import { changes, choiceOf, choiceOfLoad, ROOT_GROUP } from '../../../appliance/client/switches.ts';

describe('who is chosen', () => {
  it('is everybody in the namespaces that are served, by the root of all groups', () => {
    expect(choiceOf(true, [7, 8], [])).toEqual({
      nets: new Map([
        [7, true],
        [8, true],
      ]),
      groups: new Map([[ROOT_GROUP, true]]),
    });
  });

  it('is nobody but those who ask, when labels decide', () => {
    expect(choiceOf(false, [7], [{ mptcp: true, groups: [20n, 21n] }])).toEqual({
      nets: new Map([[7, true]]),
      groups: new Map([
        [20n, true],
        [21n, true],
      ]),
    });
  });

  it('leaves out who says no where all are chosen', () => {
    expect(choiceOf(true, [7], [{ mptcp: false, groups: [20n] }]).groups).toEqual(
      new Map([
        [ROOT_GROUP, true],
        [20n, false],
      ]),
    );
  });

  it('is for `detour load` its own network, and for labels nobody yet', () => {
    expect(choiceOfLoad(true, 7)).toEqual({ nets: new Map([[7, true]]), groups: new Map([[ROOT_GROUP, true]]) });
    expect(choiceOfLoad(false, 7)).toEqual({ nets: new Map(), groups: new Map() });
  });
});

/** Bit 0: yes. Bit 1: put there by `detour load`. */
describe('what changes in a map', () => {
  it('is nothing when it is as wanted', () => {
    expect(changes(new Map([[5, 1]]), new Map([[5, true]]))).toEqual([]);
  });

  it('is what is missing, what is another way, and what an agent that was killed left', () => {
    const present = new Map([
      [5, 1],
      [6, 1],
    ]);
    const wanted = new Map([
      [6, false],
      [7, true],
    ]);
    expect(changes(present, wanted)).toEqual([
      { key: 5, value: null },
      { key: 6, value: 0 },
      { key: 7, value: 1 },
    ]);
  });

  it('is never what `detour load` put there, unless it is `detour load` that asks', () => {
    const present = new Map([
      [5, 3],
      [6, 3],
      [8, 1],
    ]);
    const wanted = new Map([
      [5, true],
      [8, true],
    ]);
    expect(changes(present, wanted)).toEqual([]);
    expect(changes(present, wanted, true)).toEqual([
      { key: 6, value: null },
      { key: 8, value: 3 },
    ]);
  });
});
