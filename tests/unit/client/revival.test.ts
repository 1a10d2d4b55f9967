import { describe, expect, test } from 'vitest';
import { step } from '../../../appliance/client/manager.ts';
import { openBook } from '../../../appliance/client/paths.ts';
import { nextTry, rest, revived } from '../../../appliance/client/revival.ts';
import { type Connection, initial, type State } from '../../../appliance/client/state.ts';
import { DIRECT, fold } from '../../../appliance/client/worth.ts';
import { type Endpoint, parseEndpoint } from '../../../appliance/protocol/address.ts';

const end = (text: string): Endpoint => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};

const SERVER = end('198.51.100.5:443');
const local = (token: number): Endpoint => end(`192.0.2.1:${40_000 + token}`);

/** Connections 1 to `count` to one server whose direct paths have been silent for a second. */
function silent(count: number): { state: State; now: number; connections: readonly Connection[] } {
  const state = initial(
    {
      maxPaths: 2,
      targets: [],
      exclude: [],
      mode: 'aggregate',
      minAgeMs: 0,
      kinds: ['nat'],
      ordered: false,
      rescue: false,
    },
    7,
  );
  const connections: Connection[] = [];
  for (let token = 1; token <= count; token++) {
    const opening = { token, local: local(token), remote: SERVER, serverSide: false, denyJoinId0: false };
    for (const kind of ['created', 'established'] as const) step(state, { ...opening, kind }, 0);
    const connection = state.connections.get(token);
    if (!connection) throw new Error('no connection');
    connection.book = openBook(0);
    const reading = { path: DIRECT, bytesReceived: 0, rttMs: 10, busyMs: 0, backoff: 0, backup: false };
    for (let now = 0; now <= 2_000; now += 250) {
      const lost = now > 1_000;
      fold(
        connection.book.observation,
        [{ ...reading, bytesAcked: lost ? 1e6 : now * 1_000, unacked: lost ? 10 : 0 }],
        now,
      );
    }
    connections.push(connection);
  }
  return { state, now: 2_000, connections };
}

/** When tries leave, ms after the first, as the shell would have them: the kernel is read four times a second. */
function triesOf(state: State, connection: Connection, from: number, ms: number): { at: number; how: string }[] {
  const tries: { at: number; how: string }[] = [];
  for (let now = from; now < from + ms; now += 250) {
    const how = nextTry(state, connection, now);
    if (how !== 'none') tries.push({ at: now - from, how });
  }
  return tries;
}

function first(connections: readonly Connection[]): Connection {
  const [one] = connections;
  if (!one) throw new Error('no connection');
  return one;
}

describe('a silent direct path', () => {
  test('is tried by pairs half a second apart, whose SYNs the kernel repeats, and after a minute less and less often', () => {
    const { state, now, connections } = silent(1);
    const tries = triesOf(state, first(connections), now, 300_000);
    const times = tries.map(({ at }) => at);
    expect(times.slice(0, 6)).toEqual([0, 500, 5_000, 5_500, 10_000, 10_500]);
    const late = times.filter((at) => at > 60_000);
    expect(late.length).toBeLessThanOrEqual(6);
    for (const [i, at] of late.entries()) if (i > 0) expect(at - (late[i - 1] ?? 0)).toBeGreaterThanOrEqual(10_000);
  });

  test('keeps tries for a minute: a subflow destroyed is all data sent again', () => {
    const { state, now, connections } = silent(1);
    for (const { at, how } of triesOf(state, first(connections), now, 300_000))
      expect(how).toBe(at < 60_000 ? 'another' : 'instead');
  });

  test('that is well needs none, and nor does one of which nothing is known', () => {
    const { state, now, connections } = silent(1);
    const one = first(connections);
    triesOf(state, one, now, 1_000);
    one.book = null;
    expect(triesOf(state, one, now + 1_000, 10_000)).toEqual([]);
    expect({ revival: one.revival, scouts: state.scouts.size }).toEqual({ revival: null, scouts: 0 });
  });
});

describe('of many connections to one server', () => {
  test('one tries for all, and when it is answered the others follow', () => {
    const { state, now, connections } = silent(50);
    const busy = connections.filter((one) => triesOf(state, one, now, 10_000).length > 0);
    expect(busy.map(({ token }) => token)).toEqual([1]);
    revived(state, first(connections), now + 10_000);
    const after = connections.slice(1).map((one) => triesOf(state, one, now + 10_000, 1_000).length);
    expect(Math.min(...after)).toBeGreaterThan(0);
  });

  test('another takes over when the first is gone or well again', () => {
    const { state, now, connections } = silent(3);
    const [one, two, three] = connections;
    if (!one || !two || !three) throw new Error('no connections');
    expect(triesOf(state, one, now, 250).length).toBeGreaterThan(0);
    expect(triesOf(state, two, now, 250)).toEqual([]);
    step(state, { kind: 'closed', token: 1 }, now + 250);
    expect(triesOf(state, two, now + 500, 250).length).toBeGreaterThan(0);
    expect(triesOf(state, three, now + 500, 250)).toEqual([]);
    rest(state, two);
    expect(triesOf(state, three, now + 1_000, 250).length).toBeGreaterThan(0);
  });
});
