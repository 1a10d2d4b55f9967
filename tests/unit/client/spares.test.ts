import { describe, expect, test } from 'vitest';
import { step } from '../../../appliance/client/manager.ts';
import { type Command, type Event, initial, type Rules, type State } from '../../../appliance/client/state.ts';
import { type Endpoint, formatEndpoint, parseEndpoint, parsePrefix } from '../../../appliance/protocol/address.ts';

const end = (text: string): Endpoint => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};
const within = (cidr: string) => {
  const prefix = parsePrefix(cidr);
  if (!prefix) throw new Error(cidr);
  return { prefix, ports: [] };
};

const CLIENT = end('192.0.2.1:40000');
const SERVER = end('93.184.216.34:443');
const SECOND = end('93.184.217.34:443');

class Story {
  readonly state: State;
  now = 1_000;

  constructor(rules: Partial<Rules> = {}) {
    const usual = { maxPaths: 2, targets: [], exclude: [], mode: 'aggregate', minAgeMs: 0, rescue: false } as const;
    this.state = initial({ ...usual, kinds: ['nat', 'announced'], ordered: false, ...rules }, 7);
    const opening = { token: 1, local: CLIENT, remote: SERVER, serverSide: false, denyJoinId0: false };
    this.tell({ kind: 'created', ...opening }, { kind: 'established', ...opening });
  }

  tell(...events: Event[]): Command[] {
    return events.flatMap((event) => step(this.state, event, this.now));
  }

  announce(remoteId: number, to: string, port = 443): Command[] {
    return this.tell({ kind: 'announced', token: 1, remoteId, remote: { ...end(`${to}:443`), port } });
  }

  join(local: string, remote: Endpoint): Command[] {
    const subflow = { token: 1, local: end(local), remote, localId: 0, backup: false, error: 0 };
    return this.tell({ kind: 'subflow-established', ...subflow });
  }

  get paths(): string[] {
    const connection = this.state.connections.get(1);
    return (
      connection?.paths.map(({ kind, state, remote }) => `${kind} ${state} ${remote && formatEndpoint(remote)}`) ?? []
    );
  }
}

const creates = (commands: readonly Command[]) =>
  commands.flatMap((one) => (one.kind === 'create-subflow' ? [formatEndpoint(one.remote)] : []));

describe('an address that the server announces', () => {
  test('becomes a path, without a lease', () => {
    const story = new Story();
    const commands = story.announce(1, '93.184.217.34');
    expect(creates(commands)).toEqual(['93.184.217.34:443']);
    expect(commands.some(({ kind }) => kind === 'want-lease')).toBe(false);
    story.join('192.0.2.1:50001', SECOND);
    expect(story.paths).toEqual(['direct active 93.184.216.34:443', 'spare active 93.184.217.34:443']);
  });

  test('without a port has the connection’s', () => {
    expect(creates(new Story().announce(1, '93.184.217.34', 0))).toEqual(['93.184.217.34:443']);
  });

  test('ends with its withdrawal', () => {
    const story = new Story();
    story.announce(1, '93.184.217.34');
    story.join('192.0.2.1:50001', SECOND);
    const commands = story.tell({ kind: 'removed', token: 1, remoteId: 1 });
    expect(commands).toContainEqual(expect.objectContaining({ kind: 'destroy-subflow', remote: SECOND }));
    // Again and again: no more than the attempts that a connection has.
    let joins = 0;
    for (let id = 2; id < 200; id++) {
      joins += creates(story.announce(id, '93.184.217.34')).length;
      story.tell({ kind: 'removed', token: 1, remoteId: id });
      story.now += 50;
    }
    expect(joins).toBeLessThan(10);
  });

  test('is tried again after a failure, later each time', () => {
    const story = new Story();
    story.announce(1, '93.184.217.34');
    const tries: number[] = [];
    for (; story.now < 60_000; story.now += 200)
      if (creates(story.tell({ kind: 'tick' })).length > 0) tries.push(story.now);
    expect(tries.length).toBeGreaterThan(1);
    expect(tries.length).toBeLessThan(8);
  });

  test('of detours and announced addresses, the kind named first gets the free place', () => {
    for (const [kinds, first] of [
      [['nat', 'announced'], 'want-lease'],
      [['announced', 'nat'], 'create-subflow'],
    ] as const) {
      const story = new Story({ maxPaths: 1, kinds, ordered: true, minAgeMs: 1_000 });
      const local = CLIENT.address;
      story.tell({ kind: 'detour-added', detour: 'a', name: 'a', endpoint: end('203.0.113.1:45672') });
      story.tell({ kind: 'detour-up', detour: 'a', rttMs: 1, epoch: 1n, local });
      expect(story.announce(1, '93.184.217.34')).toEqual([]);
      story.now += 2_000;
      const made = story.tell({ kind: 'tick' }).map(({ kind }) => kind);
      expect(made.filter((kind) => kind === 'want-lease' || kind === 'create-subflow')).toEqual([first]);
    }
  });
});

describe('a hostile server', () => {
  test('that announces ten thousand addresses gets eight remembered and no more joins than a connection may have', () => {
    const story = new Story();
    let joins = 0;
    for (let i = 0; i < 10_000; i++) {
      story.now += 1;
      joins += creates(story.announce(1 + (i % 255), `93.185.${i >> 8}.${i & 255}`)).length;
      expect(story.state.connections.get(1)?.announced.size).toBeLessThanOrEqual(8);
    }
    expect(joins).toBeLessThanOrEqual(8);
    expect(story.paths.filter((text) => text.startsWith('spare')).length).toBeLessThanOrEqual(8);
  });

  test('is not looked at more often than 64 times a second', () => {
    const story = new Story({ maxPaths: 1 });
    for (let i = 0; i < 1_000; i++) story.announce(1, '10.0.0.1');
    expect(story.announce(2, '93.184.217.34')).toEqual([]);
    story.now += 1_001;
    expect(creates(story.announce(2, '93.184.217.34'))).toEqual(['93.184.217.34:443']);
  });

  test.each([
    '10.0.0.1',
    '127.0.0.1',
    '169.254.169.254',
    '192.168.1.1',
    '100.64.0.1',
    '224.0.0.1',
    '255.255.255.255',
    '0.0.0.0',
  ])('sends nobody to %s', (address) => {
    expect(new Story().announce(1, address)).toEqual([]);
  });

  test('sends nobody to this host, to another family, or to the server again', () => {
    const story = new Story();
    story.tell({ kind: 'network-changed', addresses: [end('93.184.218.1:1').address], links: null });
    expect(story.announce(1, '93.184.218.1')).toEqual([]);
    expect(story.announce(2, '93.184.216.34')).toEqual([]);
    expect(story.tell({ kind: 'announced', token: 1, remoteId: 3, remote: end('[2606:2800::1]:443') })).toEqual([]);
  });

  test('moves nobody outside the targets; targets open private addresses, never this host or link', () => {
    const story = new Story({ targets: [within('93.184.216.0/24'), within('10.0.0.0/8'), within('127.0.0.0/8')] });
    expect(story.announce(1, '93.184.217.34')).toEqual([]);
    expect(story.announce(2, '127.0.0.1')).toEqual([]);
    expect(creates(story.announce(3, '10.0.0.1'))).toEqual(['10.0.0.1:443']);
    const excluded = new Story({ exclude: [within('93.184.217.0/24')] });
    expect(excluded.announce(1, '93.184.217.34')).toEqual([]);
  });
});
