import { describe, expect, test } from 'vitest';
import { explainConnection, explainDestination } from '../../../appliance/client/explain.ts';
import { step } from '../../../appliance/client/manager.ts';
import { type Event, initial, type State } from '../../../appliance/client/state.ts';
import { remember, rememberDirect, rememberFailure } from '../../../appliance/client/worth.ts';
import { type Endpoint, parseEndpoint } from '../../../appliance/protocol/address.ts';

const end = (text: string): Endpoint => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};

const CLIENT = end('192.0.2.1:40000');
const SERVER = end('198.51.100.5:443');
const NOW = 1_000;

/** Detours a to e, of which a, b and f answer; f has an IPv6 address alone, and b one of each family. */
function known(): State {
  const state = initial(
    {
      maxPaths: 1,
      targets: [],
      exclude: [],
      rescue: false,
      mode: 'aggregate',
      minAgeMs: 0,
      kinds: ['nat'],
      ordered: false,
    },
    7,
  );
  const tell = (event: Event): void => void step(state, event, NOW);
  const add = (key: string, name: string, endpoint: Endpoint): void =>
    tell({ kind: 'detour-added', detour: key, name, endpoint });
  const up = (key: string, rttMs: number, local = CLIENT): void =>
    tell({ kind: 'detour-up', detour: key, rttMs, epoch: 1n, local: local.address });
  for (const [i, key] of ['a', 'b', 'c', 'd'].entries()) add(key, key, end(`203.0.113.${i + 1}:45672`));
  add('b6', 'b', end('[2001:db8:d::2]:45672'));
  add('f', 'f', end('[2001:db8:d::6]:45672'));
  add('self', 'self', { address: SERVER.address, port: 45672 });
  up('a', 5);
  up('b', 9);
  up('self', 9);
  up('f', 5, end('[2001:db8:c::1]:1'));
  tell({ kind: 'detour-down', detour: 'c', why: 'no answer' });
  return state;
}

function connected(): State {
  const state = known();
  const opening = { token: 1, local: CLIENT, remote: SERVER, serverSide: false, denyJoinId0: false };
  step(state, { ...opening, kind: 'created' }, NOW);
  step(state, { kind: 'lease-granted', detour: 'a', server: SERVER, port: 20_001, expiresAt: NOW + 600_000 }, NOW);
  step(state, { ...opening, kind: 'established' }, NOW);
  return state;
}

const connectionOf = (state: State) => {
  const connection = state.connections.get(1);
  if (!connection) throw new Error('no connection');
  return connection;
};

describe('a connection is explained', () => {
  test('with a line for the direct path and for every detour, used or not, and a reason for each that is not', () => {
    const state = connected();
    const rows = explainConnection(state, connectionOf(state), NOW);
    expect(rows.map(({ detour }) => detour)).toEqual([null, 'a', 'b', 'c', 'd', 'f', 'self']);
    const row = (key: string | null) => rows.find(({ detour }) => detour === key);
    expect(row(null)).toMatchObject({ state: 'active' });
    expect(row('a')).toMatchObject({ state: 'joining', why: 'waiting for the handshake' });
    expect(row('b')).toMatchObject({ state: 'not used', why: 'not tried yet' });
    expect(row('c')).toMatchObject({ state: 'not used', why: 'no answer' });
    expect(row('d')).toMatchObject({ state: 'not used', why: 'it has not answered yet' });
    expect(row('f')?.why).toMatch(/no IPv4 address/);
    expect(row('self')?.why).toBe('it is the server itself (198.51.100.5)');
  });

  test('with why a lease was refused, and for how long', () => {
    const state = connected();
    const refused = { why: 'QUOTA', retryAt: NOW + 30_000, everywhere: false };
    step(state, { kind: 'lease-refused', detour: 'a', server: SERVER, ...refused }, NOW);
    step(
      state,
      {
        kind: 'subflow-closed',
        token: 1,
        localId: 0,
        backup: false,
        error: 111,
        local: end('192.0.2.1:50001'),
        remote: { address: end('203.0.113.1:1').address, port: 20_001 },
      },
      NOW,
    );
    const row = explainConnection(state, connectionOf(state), NOW).find(({ detour }) => detour === 'a');
    expect(row).toMatchObject({ state: 'failed', why: 'closed with error 111' });
    state.detours.set('a', { ...(state.detours.get('a') ?? never()), pausedUntil: NOW + 4_200 });
    const other = explainDestination(state, SERVER.address, NOW).detours.find(({ detour }) => detour === 'a');
    expect(other?.why).toBe('it grants no new leases; again in 5 s');
  });

  test('with the same reason for all of one that gets no paths', () => {
    const state = connected();
    const connection = connectionOf(state);
    connection.unmanaged = 'the server forbids it';
    for (const { detour, why } of explainConnection(state, connection, NOW))
      if (detour !== null && detour !== 'a') expect(why).toBe('the server forbids it');
  });
});

describe('a destination without a connection is explained', () => {
  test('by its prefix: what was measured there, what failed, and what was never tried', () => {
    const state = known();
    const prefix = '4/c63364';
    rememberDirect(state.experience, prefix, 2_500_000);
    remember(state.experience, prefix, 'a', { worth: 1_250_000, rttMs: 10 }, NOW);
    rememberFailure(state.experience, prefix, 'b', NOW);
    const later = NOW + 1_500;
    const { prefix: text, direct, detours } = explainDestination(state, end('198.51.100.77:1').address, later);
    expect({ text, direct }).toEqual({ text: '198.51.100.0/24', direct: 2_500_000 });
    const row = (key: string) => detours.find(({ detour }) => detour === key);
    expect(row('a')).toMatchObject({ state: 'up', adds: 1_250_000 });
    expect(row('a')?.why).toMatch(/^measured; .* 100 % likely$/);
    expect(row('b')).toMatchObject({ state: 'up', adds: null, why: 'it failed; again in 1 s' });
    expect(row('c')).toMatchObject({ state: 'down', adds: null, why: 'no answer' });
    expect(row('self')).toMatchObject({ state: 'up', adds: null });
    expect(row('self')?.why).toMatch(/^not tried yet; taken for one like others, which add \d/);
  });

  test('by IPv6 with detours of IPv6', () => {
    const { prefix, direct, detours } = explainDestination(known(), end('[2001:db8:5:6::1]:1').address, NOW);
    expect({ prefix, direct }).toEqual({ prefix: '2001:db8:5::/48', direct: null });
    expect(detours.find(({ detour }) => detour === 'f')?.why).toBe('not tried yet');
    expect(detours.find(({ detour }) => detour === 'a')?.why).toMatch(/no IPv6 address/);
    expect(detours.filter(({ detour }) => detour === 'b' || detour === 'b6').map(({ detour }) => detour)).toEqual([
      'b6',
    ]);
  });
});

function never(): never {
  throw new Error('no such detour');
}
