import { expect, test } from 'vitest';
import { step } from '../../../appliance/client/manager.ts';
import { type Command, type Event, initial, type State } from '../../../appliance/client/state.ts';
import { type Address, type Endpoint, parseAddress, parseEndpoint } from '../../../appliance/protocol/address.ts';

const end = (text: string): Endpoint => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const at = (text: string): Address => {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(text);
  return parsed;
};

const CLIENT = end('192.0.2.1:40000');
const SERVER = end('198.51.100.5:443');
const DETOUR = end('203.0.113.1:45672');
const LEASED = end('203.0.113.1:20001');
const JOINED = end('192.0.2.1:50001');
const NEW = at('192.0.2.99');

/** A connection with a direct path and one by a detour, on a host with the address of `CLIENT`. */
function running(): { state: State; tell: (now: number, ...events: Event[]) => Command[] } {
  const rules = {
    maxPaths: 2,
    targets: [],
    exclude: [],
    rescue: false,
    mode: 'aggregate',
    minAgeMs: 0,
    kinds: ['nat'],
    ordered: false,
  } as const;
  const state = initial(rules, 7);
  const tell = (now: number, ...events: Event[]): Command[] => events.flatMap((event) => step(state, event, now));
  const opening = { token: 1, local: CLIENT, remote: SERVER, serverSide: false, denyJoinId0: false };
  tell(
    1_000,
    { kind: 'network-changed', addresses: [CLIENT.address], links: null },
    { kind: 'detour-added', detour: 'a', name: 'a', endpoint: DETOUR },
    { kind: 'detour-up', detour: 'a', rttMs: 10, epoch: 1n, local: CLIENT.address },
    { kind: 'created', ...opening },
    { kind: 'lease-granted', detour: 'a', server: SERVER, port: LEASED.port, expiresAt: 600_000 },
    { kind: 'established', ...opening },
    { kind: 'subflow-established', token: 1, local: JOINED, remote: LEASED, localId: 0, backup: false, error: 0 },
  );
  return { state, tell };
}

const states = (state: State): string[] =>
  state.connections.get(1)?.paths.map(({ kind, state: is }) => `${kind} ${is}`) ?? [];
const only = <K extends Command['kind']>(commands: readonly Command[], kind: K) =>
  commands.filter((one): one is Extract<Command, { kind: K }> => one.kind === kind);

test('its only address is gone: nothing is destroyed before something else works, then all of the old', () => {
  const { state, tell } = running();
  const lost = tell(5_000, { kind: 'network-changed', addresses: [], links: null });
  expect(states(state)).toEqual(['direct failed', 'nat failed']);
  expect(only(lost, 'destroy-subflow')).toEqual([]);
  expect(only(lost, 'create-subflow')).toEqual([]);
  expect(only(lost, 'find-sources')).toEqual([{ kind: 'find-sources', servers: [SERVER.address] }]);
  const found = tell(
    6_000,
    { kind: 'network-changed', addresses: [NEW], links: null },
    { kind: 'sources-found', sources: [{ server: SERVER.address, local: NEW }] },
  );
  expect(only(found, 'create-subflow')).toMatchObject([{ local: NEW, remote: SERVER, localId: 1 }]);
  const local = { address: NEW, port: 50_002 };
  const works = tell(6_010, {
    kind: 'subflow-established',
    token: 1,
    local,
    remote: SERVER,
    localId: 1,
    backup: false,
    error: 0,
  });
  expect(only(works, 'destroy-subflow').map((one) => one.local)).toEqual([CLIENT, JOINED]);
  expect(states(state)[0]).toBe('direct active');
});

test('one of two addresses is gone: what runs from the other goes on, and the old ends at once', () => {
  const { state, tell } = running();
  const other = { address: NEW, port: 50_003 };
  tell(
    2_000,
    { kind: 'network-changed', addresses: [CLIENT.address, NEW], links: null },
    { kind: 'subflow-closed', token: 1, local: CLIENT, remote: SERVER, localId: 0, backup: false, error: 104 },
    { kind: 'subflow-established', token: 1, local: other, remote: SERVER, localId: 1, backup: false, error: 0 },
  );
  const lost = tell(5_000, { kind: 'network-changed', addresses: [NEW], links: null });
  expect(only(lost, 'destroy-subflow').map(({ local, remote }) => ({ local, remote }))).toEqual([
    { local: JOINED, remote: LEASED },
  ]);
  expect(states(state)).toEqual(['direct active', 'nat failed']);
  // The detour is asked from its new side; until it has answered there is no way to it.
  expect(state.detours.get('a')?.local).toBeNull();
  const again = tell(
    5_050,
    { kind: 'lease-lost', detour: 'a', server: SERVER },
    { kind: 'detour-up', detour: 'a', rttMs: 10, epoch: 1n, local: NEW },
    { kind: 'lease-granted', detour: 'a', server: SERVER, port: 20_002, expiresAt: 600_000 },
  );
  expect(only(again, 'create-subflow')).toMatchObject([{ local: NEW, localId: 1, remote: { port: 20_002 } }]);
});

test('what it carried before it moved is not held against the paths that start anew', () => {
  const { state, tell } = running();
  const ends: Record<'direct' | 'nat', Endpoint> = { direct: CLIENT, nat: JOINED };
  let remote = LEASED;
  const sent = { direct: 0, nat: 0 };
  const carry = (from: number, until: number, rate: number): Command[] => {
    const commands: Command[] = [];
    for (let now = from; now < until; now += 250) {
      for (const path of ['direct', 'nat'] as const) sent[path] += rate / 4;
      const subflow = (path: 'direct' | 'nat', to: Endpoint) => ({
        local: ends[path],
        remote: to,
        localId: 0,
        joined: path === 'nat',
        established: true,
        fullyEstablished: true,
        backup: false,
        timeouts: 0,
        unacked: 1,
        busyMs: now,
        rttMs: 10,
        bytesAcked: sent[path],
        bytesReceived: 0,
      });
      const subflows = [subflow('direct', SERVER), subflow('nat', remote)];
      const connections = [{ token: 1, local: CLIENT, remote: SERVER, initiated: true, subflows }];
      commands.push(...tell(now, { kind: 'dump', askedAt: now, connections }));
    }
    return commands;
  };
  expect(only(carry(1_100, 7_000, 1_250_000), 'set-backup')).toEqual([]);
  remote = { ...LEASED, port: 20_002 };
  ends.direct = { address: NEW, port: 50_002 };
  ends.nat = { address: NEW, port: 50_003 };
  const common = { token: 1, localId: 1, backup: false, error: 0 } as const;
  tell(
    7_000,
    { kind: 'network-changed', addresses: [NEW], links: null },
    { kind: 'sources-found', sources: [{ server: SERVER.address, local: NEW }] },
    { kind: 'subflow-established', ...common, local: ends.direct, remote: SERVER },
    { kind: 'lease-lost', detour: 'a', server: SERVER },
    { kind: 'detour-up', detour: 'a', rttMs: 10, epoch: 1n, local: NEW },
    { kind: 'lease-granted', detour: 'a', server: SERVER, port: 20_002, expiresAt: 600_000 },
    { kind: 'subflow-established', ...common, local: ends.nat, remote },
  );
  expect(states(state)).toEqual(['direct active', 'nat active']);
  Object.assign(sent, { direct: 0, nat: 0 });
  // What was in flight is sent again first, so that the rate has to grow from next to nothing.
  expect(only(carry(7_100, 9_500, 50_000), 'set-backup')).toEqual([]);
});

test('a reading of the kernel does not bring back what is stranded', () => {
  const { state, tell } = running();
  tell(5_000, { kind: 'network-changed', addresses: [], links: null });
  const counts = { timeouts: 0, unacked: 0, busyMs: 0, rttMs: 10, bytesAcked: 0, bytesReceived: 0 };
  const shared = { localId: 0, established: true, fullyEstablished: true, backup: false, ...counts };
  tell(6_000, {
    kind: 'dump',
    askedAt: 5_990,
    connections: [
      {
        token: 1,
        local: CLIENT,
        remote: SERVER,
        initiated: true,
        subflows: [
          { local: CLIENT, remote: SERVER, joined: false, ...shared },
          { local: JOINED, remote: LEASED, joined: true, ...shared },
        ],
      },
    ],
  });
  expect(states(state)).toEqual(['direct failed', 'nat failed']);
});

test('a server that still counts what is lost is asked again, and does not lose its places for ever', () => {
  const { state, tell } = running();
  tell(5_000, { kind: 'network-changed', addresses: [NEW], links: null });
  tell(
    5_010,
    { kind: 'sources-found', sources: [{ server: SERVER.address, local: NEW }] },
    { kind: 'lease-lost', detour: 'a', server: SERVER },
    { kind: 'detour-up', detour: 'a', rttMs: 10, epoch: 1n, local: NEW },
    { kind: 'lease-granted', detour: 'a', server: SERVER, port: 20_002, expiresAt: 600_000 },
  );
  const [local, remote] = [{ address: NEW, port: 50_004 }, end('203.0.113.1:20002')];
  const subflow = { token: 1, local, remote, localId: 1, backup: false, error: 0 };
  tell(5_020, { kind: 'subflow-established', ...subflow }, { kind: 'subflow-closed', ...subflow });
  expect(state.connections.get(1)?.full).toBe(false);
  let retried: Command[] = [];
  for (let now = 5_200; now < 20_000; now += 200) retried = [...retried, ...tell(now, { kind: 'tick' })];
  expect(only(retried, 'create-subflow').some((one) => one.remote.port === 20_002)).toBe(true);
});

test('an address that no interface carries is not gone', () => {
  const { state, tell } = running();
  const anywhere = end('192.0.2.77:40001');
  const opening = { token: 2, local: anywhere, remote: SERVER, serverSide: false, denyJoinId0: false };
  tell(2_000, { kind: 'created', ...opening }, { kind: 'established', ...opening });
  tell(3_000, { kind: 'network-changed', addresses: [CLIENT.address, NEW], links: null });
  expect(state.connections.get(2)?.paths[0]?.state).toBe('active');
});
