import { describe, expect, test } from 'vitest';
import { explainConnection } from '../../../appliance/client/explain.ts';
import { step } from '../../../appliance/client/manager.ts';
import { type Command, type Event, initial, type Rules, type State } from '../../../appliance/client/state.ts';
import { type Address, type Endpoint, formatAddress, parseEndpoint } from '../../../appliance/protocol/address.ts';

const end = (text: string): Endpoint => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const at = (text: string): Address => end(text.includes(':') ? `[${text}]:1` : `${text}:1`).address;

const SERVER = end('93.184.216.34:443');
const CLIENT = at('192.0.2.1');
const INSIDE = { v4: at('10.215.7.1'), v6: at('fd0d:e70::7') };

class Story {
  readonly state: State;
  now = 1_000;

  constructor(rules: Partial<Rules> = {}) {
    const usual = { maxPaths: 2, targets: [], exclude: [], mode: 'aggregate', minAgeMs: 0, rescue: false } as const;
    this.state = initial({ ...usual, kinds: ['vpn'], ordered: true, ...rules }, 7);
  }

  tell(...events: Event[]): Command[] {
    return events.flatMap((event) => step(this.state, event, this.now));
  }

  /** A detour of that name answers at an address. */
  detour(name: string, address: string, tunnels = 1, rttMs = 10): Command[] {
    const endpoint = end(address.includes(':') ? `[${address}]:45672` : `${address}:45672`);
    const local = endpoint.address.family === 4 ? CLIENT : at('2001:db8::1');
    return this.tell(
      { kind: 'detour-added', detour: address, name, endpoint },
      { kind: 'detour-up', detour: address, rttMs, epoch: 1n, local, tunnels },
    );
  }

  up(site: string, over: Partial<Extract<Event, { kind: 'tunnel-up' }>> = {}): Command[] {
    return this.tell({ kind: 'tunnel-up', site, ...INSIDE, rttMs: 12, ...over });
  }

  connect(token = 1, remote = SERVER): Command[] {
    const local = { address: remote.address.family === 4 ? CLIENT : at('2001:db8::1'), port: 40_000 + token };
    const opening = { token, local, remote, serverSide: false, denyJoinId0: false };
    return this.tell({ kind: 'created', ...opening }, { kind: 'established', ...opening });
  }

  /** What the kernel says of a join out of the tunnel. */
  joined(kind: 'subflow-established' | 'subflow-closed', token = 1, error = 0, port = 50_000): Command[] {
    const connection = this.state.connections.get(token);
    if (!connection) throw new Error('no connection');
    const { remote } = connection;
    const address = remote.address.family === 4 ? INSIDE.v4 : INSIDE.v6;
    return this.tell({ kind, token, local: { address, port }, remote, localId: 1, backup: false, error });
  }

  paths(token = 1): string[] {
    return (this.state.connections.get(token)?.paths ?? []).map(
      ({ kind, detour, state }) => `${kind} ${detour} ${state}`,
    );
  }
}

const kinds = (commands: readonly Command[]): string[] => commands.map(({ kind }) => kind);
const tunnelling = (commands: readonly Command[]): string[] =>
  commands.flatMap((one) => (one.kind.endsWith('-tunnel') && 'site' in one ? [`${one.kind} ${one.site}`] : []));
const creates = (commands: readonly Command[]) => commands.filter((one) => one.kind === 'create-subflow');

describe('tunnels that are asked for', () => {
  test('one for all addresses of a detour, as soon as one of them answers', () => {
    const story = new Story();
    expect(tunnelling(story.detour('fra', '203.0.113.1'))).toEqual(['want-tunnel fra']);
    expect(tunnelling(story.detour('fra', '2001:db8:d::1'))).toEqual([]);
    expect(tunnelling(story.detour('lon', '203.0.113.2'))).toEqual(['want-tunnel lon']);
  });

  test('none of a router that offers none, nor where the strategy has none', () => {
    expect(tunnelling(new Story().detour('fra', '203.0.113.1', 0))).toEqual([]);
    expect(tunnelling(new Story({ kinds: ['nat'] }).detour('fra', '203.0.113.1'))).toEqual([]);
  });

  test('anew when the router has another key, or this host another network', () => {
    const story = new Story();
    story.detour('fra', '203.0.113.1', 7);
    const again = { kind: 'detour-up', detour: '203.0.113.1', rttMs: 10, epoch: 1n, local: CLIENT } as const;
    expect(tunnelling(story.tell({ ...again, tunnels: 7 }))).toEqual([]);
    expect(tunnelling(story.tell({ ...again, tunnels: 8 }))).toEqual(['want-tunnel fra']);
    expect(tunnelling(story.tell({ ...again, tunnels: 8 }))).toEqual([]);
    const moved = story.tell({ kind: 'network-changed', addresses: [at('198.51.100.9')], links: null });
    expect(tunnelling(moved)).toEqual(['want-tunnel fra']);
  });

  test('are given up when the detour goes, or offers none any more; and what ran through them ends first', () => {
    const story = new Story();
    story.detour('fra', '203.0.113.1');
    story.up('fra');
    story.connect();
    story.joined('subflow-established');
    const answer = { detour: '203.0.113.1', rttMs: 10, epoch: 1n, local: CLIENT, tunnels: 0 };
    const commands = story.tell({ kind: 'detour-up', ...answer });
    expect(kinds(commands).filter((kind) => /destroy|abort|release-tunnel/.test(kind))).toEqual([
      'destroy-subflow',
      'abort-subflow',
      'release-tunnel',
    ]);
    expect(story.paths()).toEqual(['direct null active']);
    const other = new Story();
    other.detour('fra', '203.0.113.1');
    expect(tunnelling(other.tell({ kind: 'detour-removed', detour: '203.0.113.1' }, { kind: 'tick' }))).toEqual([
      'release-tunnel fra',
    ]);
  });

  test('over chosen interfaces only by the one that packets take by themselves', () => {
    const story = new Story();
    const link = (name: string, index: number, natural: boolean) => ({
      name,
      index,
      v4: CLIENT,
      v6: null,
      natural4: natural,
      natural6: false,
    });
    const links = [link('eth0', 2, true), link('wlan0', 3, false)];
    story.tell({ kind: 'network-changed', addresses: [CLIENT], links });
    const endpoint = end('203.0.113.1:45672');
    const add = (via: string): Event[] => [
      { kind: 'detour-added', detour: `fra@${via}`, name: 'fra', endpoint, via },
      { kind: 'detour-up', detour: `fra@${via}`, rttMs: 1, epoch: 1n, local: CLIENT, tunnels: 1 },
    ];
    expect(tunnelling(story.tell(...add('wlan0')))).toEqual([]);
    expect(tunnelling(story.tell(...add('eth0')))).toEqual(['want-tunnel fra']);
  });
});

describe('tunnels as the last resort', () => {
  const LAST = { kinds: ['nat', 'vpn'], ordered: false, fallback: true } as const;
  const refused = (story: Story, why: string): Command[] =>
    story.tell(
      {
        kind: 'lease-refused',
        detour: '203.0.113.1',
        server: SERVER,
        why,
        retryAt: story.now + 1_800_000,
        everywhere: false,
      },
      { kind: 'tick' },
    );

  test.each([
    ['BAD_ADDRESS', ['want-tunnel fra']],
    ['NO_RESOURCES', ['want-tunnel fra']],
    ['DENIED_DESTINATION', []],
    ['QUOTA', []],
  ])('a lease is refused with %s: %j', (why, expected) => {
    const story = new Story(LAST);
    expect(tunnelling(story.detour('fra', '203.0.113.1'))).toEqual([]);
    story.connect();
    expect(tunnelling(refused(story, why))).toEqual(expected);
  });

  test('go when another network may do without, unless something runs through them', () => {
    for (const busy of [false, true]) {
      const story = new Story(LAST);
      story.detour('fra', '203.0.113.1');
      story.connect();
      refused(story, 'BAD_ADDRESS');
      story.up('fra');
      if (busy) story.joined('subflow-established');
      else story.tell({ kind: 'closed', token: 1 });
      const moved = story.tell({ kind: 'network-changed', addresses: [CLIENT], links: null });
      expect(tunnelling(moved)).toEqual([busy ? 'want-tunnel fra' : 'release-tunnel fra']);
    }
  });
});

describe('a path through a tunnel', () => {
  test('leaves from the address inside and goes to the server itself', () => {
    const story = new Story();
    story.detour('fra', '203.0.113.1');
    story.up('fra');
    const [command] = creates(story.connect());
    expect(command).toMatchObject({ remote: SERVER, local: INSIDE.v4, localId: 1 });
    story.joined('subflow-established');
    expect(story.paths()).toEqual(['direct null active', 'vpn vpn@fra active']);
  });

  test('is given to connections of families that it carries', () => {
    const story = new Story();
    story.detour('fra', '203.0.113.1');
    story.up('fra', { v6: null });
    expect(creates(story.connect(1, end('[2606:2800::1]:443')))).toEqual([]);
    expect(creates(story.connect(2))).toHaveLength(1);
    story.up('fra');
    expect(creates(story.connect(3, end('[2606:2800::2]:443')))).toMatchObject([{ local: INSIDE.v6 }]);
  });

  test('and one by a lease of the same detour are one choice; the first kind of the strategy is taken', () => {
    for (const kind of ['vpn', 'nat'] as const) {
      const story = new Story({ kinds: kind === 'vpn' ? ['vpn', 'nat'] : ['nat', 'vpn'], maxPaths: 4 });
      story.detour('fra', '203.0.113.1');
      story.up('fra');
      story.connect();
      expect(story.paths().map((path) => path.split(' ')[0])).toEqual(['direct', kind]);
    }
  });

  test('is asked about when nothing comes, and made again when it turns out to have been dead', () => {
    const story = new Story();
    story.detour('fra', '203.0.113.1');
    story.up('fra');
    story.connect();
    story.joined('subflow-established');
    story.tell({ kind: 'tunnel-down', site: 'fra', why: 'nothing comes back' });
    expect(story.state.tunnels.get('vpn@fra')).toMatchObject({ state: 'down', why: 'nothing comes back' });
    // The paths that exist are for the readings to judge.
    expect(story.paths()).toEqual(['direct null active', 'vpn vpn@fra active']);
    expect(creates(story.connect(2))).toEqual([]);
    expect(creates(story.up('fra')).map((one) => 'token' in one && one.token)).toEqual([2]);
  });

  test('that is answered too late is no direct path', () => {
    const story = new Story();
    story.detour('fra', '203.0.113.1');
    story.up('fra');
    story.connect();
    story.now += 6_000;
    story.tell({ kind: 'tick' });
    expect(story.paths()[1]).toBe('vpn vpn@fra failed');
    const direct = { token: 1, local: { address: CLIENT, port: 40_001 }, remote: SERVER, localId: 0, backup: false };
    story.tell({ kind: 'subflow-closed', ...direct, error: 104 });
    const commands = story.joined('subflow-established');
    expect(kinds(commands)).toContain('destroy-subflow');
    expect(story.paths()[0]).toMatch(/^direct null (failed|joining)/);
  });

  test('that fails makes its detour be asked; three servers in a row, and none is tried for a while', () => {
    const story = new Story();
    story.detour('fra', '203.0.113.1');
    story.up('fra');
    for (const token of [1, 2, 3]) {
      story.connect(token, end(`93.184.216.${token}:443`));
      expect(tunnelling(story.joined('subflow-closed', token, 111))).toEqual(['doubt-tunnel fra']);
    }
    expect(story.state.tunnels.get('vpn@fra')).toMatchObject({ state: 'suspended' });
    story.up('fra');
    expect(creates(story.connect(4, end('93.184.216.4:443')))).toEqual([]);
    const connection = story.state.connections.get(4);
    if (!connection) throw new Error('no connection');
    const row = explainConnection(story.state, connection, story.now).find(({ detour }) => detour === 'vpn@fra');
    expect(row?.why).toMatch(/joins through it fail .*; again in 30 s/);
    story.now += 31_000;
    expect(creates(story.tell({ kind: 'tick' })).length).toBeGreaterThan(0);
  });

  test('waits for its turn when there are many at once: a router drops what comes too fast', () => {
    const story = new Story();
    story.detour('fra', '203.0.113.1');
    story.up('fra');
    let made = 0;
    for (let token = 1; token <= 300; token++) made += creates(story.connect(token)).length;
    expect(made).toBeLessThanOrEqual(81);
    for (let elapsed = 0; elapsed < 1_000; elapsed += 200) {
      story.now += 200;
      made += creates(story.tell({ kind: 'tick' })).length;
    }
    expect(made).toBeLessThanOrEqual(81 + 50);
  });

  test('ends when its address is about to go, and is made from the next one', () => {
    const story = new Story();
    story.detour('fra', '203.0.113.1');
    story.up('fra');
    story.connect();
    story.joined('subflow-established');
    const gone = story.tell({ kind: 'tunnel-gone', site: 'fra', why: 'it has other addresses now' });
    expect(kinds(gone)).toEqual(expect.arrayContaining(['destroy-subflow', 'abort-subflow']));
    expect(story.paths()).toEqual(['direct null active']);
    const [command] = creates(story.up('fra', { v4: at('198.19.7.1') }));
    expect(command && 'local' in command && 'family' in command.local && formatAddress(command.local)).toBe(
      '198.19.7.1',
    );
  });
});

test('what a predecessor’s tunnel carried is ended when something else works, and is no path', () => {
  const story = new Story();
  story.tell({ kind: 'addresses-gone', addresses: [INSIDE.v4] });
  const subflow = (address: Address, port: number, joined: boolean) => ({
    local: { address, port },
    remote: SERVER,
    localId: joined ? 1 : 0,
    joined,
    established: true,
    fullyEstablished: true,
    backup: false,
    timeouts: 0,
    unacked: 0,
    busyMs: 0,
    rttMs: 10,
    bytesAcked: 0,
    bytesReceived: 0,
  });
  const local = { address: CLIENT, port: 40_001 };
  const subflows = [subflow(INSIDE.v4, 50_000, true), subflow(CLIENT, 40_001, false)];
  const connections = [{ token: 1, local, remote: SERVER, initiated: true, subflows }];
  const commands = story.tell({ kind: 'dump', askedAt: story.now, connections });
  expect(story.paths()).toEqual(['direct null active']);
  story.now += 1_000;
  const later = story.tell({ kind: 'network-changed', addresses: [CLIENT], links: null });
  expect([...commands, ...later]).toContainEqual(
    expect.objectContaining({ kind: 'destroy-subflow', local: { address: INSIDE.v4, port: 50_000 } }),
  );
});
