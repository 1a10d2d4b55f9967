import { describe, expect, test } from 'vitest';
import { step } from '../../../appliance/client/manager.ts';
import { needsRedirections } from '../../../appliance/client/rescue.ts';
import { type Command, type Event, initial, type Rules, type State } from '../../../appliance/client/state.ts';
import { type Endpoint, formatEndpoint, parseEndpoint, parsePrefix } from '../../../appliance/protocol/address.ts';

const end = (text: string): Endpoint => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};

const CLIENT = end('192.0.2.1:40000');
const SERVER = end('198.51.100.5:443');
const A = end('203.0.113.1:45672');
const B = end('203.0.113.2:45672');
const TOKEN = 0x1234;
/** As often as the daemon looks. */
const LOOK_MS = 100;

/** A host whose kernel is looked at every 100 ms. */
class Story {
  readonly state: State;
  readonly commands: Command[] = [];
  now = 1_000;
  waiting: { token: number; local: Endpoint; remote: Endpoint }[] = [];

  constructor(rules: Partial<Rules> = {}, detours: readonly Endpoint[] = [A]) {
    const usual = {
      maxPaths: 2,
      targets: [],
      exclude: [],
      mode: 'aggregate',
      minAgeMs: 0,
      kinds: ['nat'],
      ordered: false,
      rescue: true,
    } as const;
    this.state = initial({ ...usual, ...rules }, 7);
    for (const endpoint of detours) {
      const detour = formatEndpoint(endpoint);
      this.tell({ kind: 'detour-added', detour, name: detour, endpoint });
      this.tell({ kind: 'detour-up', detour, rttMs: 5, epoch: 1n, local: CLIENT.address });
    }
  }

  tell(event: Event): Command[] {
    const said = step(this.state, event, this.now);
    this.commands.push(...said);
    return said;
  }

  /** Time passes, and the kernel is looked at. */
  pass(ms: number): Command[] {
    const from = this.commands.length;
    for (const until = this.now + ms; this.now < until; ) {
      this.now += LOOK_MS;
      this.tell({ kind: 'connecting', waiting: this.waiting });
    }
    return this.commands.slice(from);
  }

  /** An application asks for a connection. */
  connect(token = TOKEN, remote = SERVER): void {
    this.waiting.push({ token, local: { ...CLIENT, port: CLIENT.port + this.waiting.length }, remote });
  }

  grant(detour: Endpoint, port = 20_001, lifetimeMs = 600_000): void {
    const expiresAt = this.now + lifetimeMs;
    this.tell({ kind: 'lease-granted', detour: formatEndpoint(detour), server: SERVER, port, expiresAt });
  }

  relay(detour: Endpoint, reached: boolean): void {
    this.tell({ kind: 'relay-tried', server: SERVER, detour: formatEndpoint(detour), reached });
  }

  direct(answered: boolean, tookMs = answered ? 10 : 950): Command[] {
    return this.tell({ kind: 'direct-tried', server: SERVER, answered, tookMs });
  }

  /** Where the kernel was told last to lead new connections; undefined when it was told nothing. */
  get led(): readonly string[] | undefined {
    const last = this.of('redirect').at(-1);
    return last?.servers.map(({ server, to }) => `${formatEndpoint(server)} ${formatEndpoint(to)}`);
  }

  of<K extends Command['kind']>(kind: K): Extract<Command, { kind: K }>[] {
    return this.commands.filter((one): one is Extract<Command, { kind: K }> => one.kind === kind);
  }

  /** A SYN waits, and the server has answered through A. */
  reach(): this {
    this.connect();
    this.pass(300);
    this.grant(A);
    this.pass(LOOK_MS);
    this.relay(A, true);
    return this;
  }

  /** Up to the point where new connections to the server go through A. */
  rescue(): this {
    this.reach().pass(400);
    return this;
  }
}

const VIA_A = ['198.51.100.5:443 203.0.113.1:20001'];

describe('a SYN without an answer', () => {
  test('makes us ask the server directly, and every near detour for a lease, after 100 ms', () => {
    const story = new Story();
    story.connect();
    expect(story.pass(100)).toEqual([]);
    expect(story.pass(100)).toEqual([
      { kind: 'try-direct', server: SERVER, waitMs: expect.any(Number) },
      { kind: 'want-lease', detour: formatEndpoint(A), server: SERVER },
    ]);
  });

  test('is nothing when rescue is off, nor for a server that is none of our business', () => {
    const prefix = parsePrefix('198.51.100.0/24');
    if (!prefix) throw new Error('prefix');
    for (const rules of [{ rescue: false }, { exclude: [{ prefix, ports: [] }] }]) {
      const story = new Story(rules);
      story.connect();
      expect(story.pass(3_000)).toEqual([]);
    }
  });

  test('was lost by chance when the server answers us: nothing is led anywhere, and it counts for nothing for a second', () => {
    const story = new Story().reach();
    story.direct(true);
    expect(story.pass(900).filter(({ kind }) => kind === 'try-direct')).toEqual([]);
    expect(story.led).toBeUndefined();
    // It waits for longer than a repetition takes: asked again.
    expect(story.pass(400).map(({ kind }) => kind)).toContain('try-direct');
  });

  test('does not move anybody before the server has been silent to us, too, and has answered through the detour', () => {
    const story = new Story().reach();
    story.pass(100);
    expect(story.led).toBeUndefined();
    story.pass(LOOK_MS);
    expect(story.led).toEqual(VIA_A);
    expect(story.of('rescue')).toMatchObject([{ what: 'began', detour: formatEndpoint(A) }]);

    const unheard = new Story();
    unheard.connect();
    unheard.pass(300);
    unheard.grant(A);
    unheard.pass(2_000);
    expect(unheard.led).toBeUndefined();
  });

  test('has its next SYN looked at anew; those to other servers are left alone', () => {
    const story = new Story();
    story.connect(1, end('198.51.100.6:443'));
    story.rescue();
    expect(story.of('redirect')[0]?.stuck.map(({ remote }) => formatEndpoint(remote))).toEqual([
      formatEndpoint(SERVER),
    ]);
  });

  test('means less where answers are known to take long', () => {
    const story = new Story();
    story.connect();
    story.pass(300);
    story.direct(true, 800);
    story.waiting = [];
    story.pass(2_000);
    const from = story.commands.length;
    story.connect(TOKEN + 1);
    story.pass(1_100);
    expect(story.commands.length).toBe(from);
    story.pass(300);
    expect(story.of('try-direct').length).toBe(2);
  });

  test('of a thousand servers at once is looked into for a bounded number of them', () => {
    const story = new Story();
    for (let i = 0; i < 1_000; i++) story.connect(i + 1, end(`198.51.${100 + (i >> 8)}.${i & 255}:443`));
    story.pass(1_000);
    expect(story.of('try-direct').length).toBe(256);
  });
});

describe('a rescued server', () => {
  test('is asked directly again and again, less often with time, and let go of at its first answer', () => {
    const story = new Story().rescue();
    story.waiting = [];
    story.direct(false);
    const asked = (): number => story.of('try-direct').length;
    const from = asked();
    for (let i = 0; i < 20; i++) {
      story.pass(1_000);
      story.direct(false);
    }
    expect(asked() - from).toBeGreaterThanOrEqual(18);
    story.now += 300_000;
    story.grant(A);
    const later = asked();
    for (let i = 0; i < 20; i++) {
      story.pass(1_000);
      story.direct(false);
    }
    expect(asked() - later).toBeLessThanOrEqual(4);
    expect(story.led).toEqual(VIA_A);
    story.direct(true);
    expect(story.led).toEqual([]);
    expect(story.of('rescue').map(({ what }) => what)).toEqual(['began', 'ended']);
  });

  test('is renewed in the kernel before its element goes there by itself', () => {
    const story = new Story().rescue();
    const from = story.of('redirect').length;
    story.pass(50_000);
    expect(story.of('redirect').length - from).toBe(2);
    expect(story.led).toEqual(VIA_A);
  });

  test('moves to another detour when its own goes away, and to its new port when there is one', () => {
    const story = new Story({}, [A, B]);
    story.rescue();
    story.grant(A, 20_009);
    story.pass(LOOK_MS);
    expect(story.led).toEqual(['198.51.100.5:443 203.0.113.1:20009']);
    story.tell({ kind: 'detour-down', detour: formatEndpoint(A), why: 'no answer' });
    story.pass(LOOK_MS);
    expect(story.led).toEqual([]);
    story.grant(B, 20_002);
    story.pass(LOOK_MS);
    story.relay(B, true);
    expect(story.led).toEqual(['198.51.100.5:443 203.0.113.2:20002']);
  });

  test('is not led where its SYNs get no answer any more', () => {
    const story = new Story().rescue();
    story.waiting = [];
    story.pass(LOOK_MS);
    story.connect(TOKEN + 1);
    story.pass(2_000);
    expect(story.led).toEqual([]);
    expect(story.of('rescue').map(({ what }) => what)).toEqual(['began', 'ended', 'impossible']);
  });

  test('stays where it is when one of many SYNs is lost on the way', () => {
    const story = new Story().rescue();
    story.waiting = [];
    story.pass(LOOK_MS);
    story.connect(TOKEN + 1);
    for (let i = 2; i < 8; i++) {
      story.pass(500);
      const event = { kind: 'created', token: TOKEN + i, local: CLIENT, remote: SERVER } as const;
      story.tell({ ...event, serverSide: false, denyJoinId0: false });
    }
    expect(story.led).toEqual(VIA_A);
  });

  test('that nobody wants for ten minutes is let go of', () => {
    const story = new Story().rescue();
    story.waiting = [];
    story.pass(599_000);
    expect(story.led).toEqual(VIA_A);
    story.pass(2_000);
    expect(story.led).toEqual([]);
    expect([...story.state.leases.values()].flatMap(({ users }) => [...users])).toEqual([]);
  });

  test('is led nowhere when nft fails, and nothing is tried for a minute', () => {
    const story = new Story().rescue();
    const from = story.commands.length;
    story.tell({ kind: 'redirect-failed', why: 'nft failed' });
    story.pass(59_000);
    expect(story.commands.slice(from).map(({ kind }) => kind)).toEqual(['rescue']);
    story.pass(2_000);
    expect(story.led).toEqual(VIA_A);
  });
});

test('on another network every server is asked again at once', () => {
  const story = new Story().rescue();
  story.waiting = [];
  story.now += 200_000;
  story.grant(A);
  story.direct(false);
  const asked = story.of('try-direct').length;
  story.pass(2_000);
  expect(story.of('try-direct').length).toBe(asked);
  story.tell({ kind: 'network-changed', addresses: [CLIENT.address], links: null });
  story.pass(LOOK_MS);
  expect(story.of('try-direct').length).toBe(asked + 1);
});

test('servers used lately are asked, too, when one does not answer', () => {
  const story = new Story();
  const others = Array.from({ length: 100 }, (_, i) => end(`198.51.100.${100 + i}:443`));
  for (const [i, remote] of others.entries()) {
    const event = { kind: 'created', token: 500 + i, local: { ...CLIENT, port: 50_000 + i }, remote } as const;
    story.tell({ ...event, serverSide: false, denyJoinId0: false });
    story.tell({ kind: 'closed', token: 500 + i });
  }
  story.rescue();
  const asked = story.of('try-direct').map(({ server }) => formatEndpoint(server));
  expect(asked).toEqual([formatEndpoint(SERVER), ...others.slice(-32).map(formatEndpoint)]);
  expect(story.led).toEqual(VIA_A);
});

describe('a server that no detour reaches', () => {
  test.each([
    [
      'the detour relays joins alone, or the server speaks TCP',
      (story: Story) => story.relay(A, false),
      /DETOUR_RELAY/,
    ],
    [
      'the detour grants no lease',
      (story: Story) => {
        const about = { detour: formatEndpoint(A), server: SERVER };
        story.tell({ kind: 'lease-refused', ...about, why: 'QUOTA', retryAt: story.now + 30_000, everywhere: true });
      },
      /QUOTA/,
    ],
  ])('is said to be so once, and asked about again later: %s', (_, happen, why) => {
    const story = new Story();
    story.connect();
    story.pass(300);
    if (why.test('DETOUR_RELAY')) story.grant(A);
    story.pass(LOOK_MS);
    happen(story);
    story.pass(1_000);
    expect(story.of('rescue')).toEqual([
      { kind: 'rescue', what: 'impossible', server: SERVER, detour: null, why: expect.stringMatching(why) },
    ]);
    const asked = story.of('try-direct').length;
    story.direct(false);
    story.pass(8_000);
    expect(story.of('try-direct').length).toBe(asked);
    story.pass(3_000);
    expect(story.of('try-direct').length).toBe(asked + 1);
    expect(story.led).toBeUndefined();
  });

  test('is asked for again as soon as a detour comes up', () => {
    const story = new Story({}, []);
    story.connect();
    story.pass(1_000);
    const asked = story.of('try-direct').length;
    story.direct(false);
    const about = { detour: formatEndpoint(A), name: 'a', endpoint: A };
    story.tell({ kind: 'detour-added', ...about });
    story.tell({ kind: 'detour-up', detour: formatEndpoint(A), rttMs: 5, epoch: 1n, local: CLIENT.address });
    story.pass(LOOK_MS);
    expect(story.of('try-direct').length).toBe(asked + 1);
    expect(story.of('want-lease').length).toBe(1);
  });

  test('that nobody wants is forgotten', () => {
    const story = new Story({}, []);
    story.connect();
    story.pass(1_000);
    story.waiting = [];
    story.pass(31_000);
    expect(story.state.rescue?.cases.size).toBe(0);
  });

  test('because no detour is up is one of those', () => {
    const story = new Story({}, []);
    story.connect();
    story.pass(1_000);
    expect(story.of('rescue')).toMatchObject([{ what: 'impossible', why: expect.stringContaining('no detour') }]);
  });
});

describe('a rescued connection', () => {
  const created = { kind: 'created', token: TOKEN, local: CLIENT, remote: SERVER, serverSide: false } as const;

  /** The kernel reports it, and conntrack who answers. */
  const begin = (via: Endpoint | null): Story => {
    const story = new Story().rescue();
    story.waiting = [];
    story.tell({ ...created, denyJoinId0: false });
    story.tell({ ...created, kind: 'established', denyJoinId0: false });
    // Until that is known it gets no paths.
    expect(story.of('create-subflow')).toEqual([]);
    expect(story.of('ask-translation').map(({ token }) => token)).toEqual([TOKEN]);
    story.tell({ kind: 'translated', token: TOKEN, via });
    return story;
  };
  const paths = (story: Story): string[] =>
    (story.state.connections.get(TOKEN)?.paths ?? []).map(
      ({ kind, state, led }) => `${kind} ${state}${led ? ' led' : ''}`,
    );

  test('has its detour’s path, and a direct one as soon as the server answers', () => {
    const story = begin({ ...A, port: 20_001 });
    expect(paths(story)).toEqual(['direct failed', 'nat active led']);
    expect(story.of('create-subflow')).toEqual([]);
    expect(needsRedirections(story.state)).toBe(true);
    story.direct(true);
    expect(story.of('create-subflow')).toMatchObject([{ localId: 0, remote: SERVER }]);
    expect(story.of('redirect').at(-1)).toMatchObject({ servers: [], keep: true });
    const local = { ...CLIENT, port: 41_000 };
    const joined = { token: TOKEN, localId: 0, backup: false, error: 0, remote: SERVER } as const;
    story.tell({ kind: 'subflow-established', ...joined, local });
    expect(paths(story)).toEqual(['direct active', 'nat active led']);
    // Its end is the detour's, not the direct path's.
    story.tell({ kind: 'subflow-closed', ...joined, local: CLIENT, error: 110 });
    expect(paths(story)).toEqual(['direct active', 'nat failed led']);
    story.pass(2_000);
    expect(story.of('redirect').at(-1)).toMatchObject({ servers: [], keep: false });
  });

  test('that gets its direct path back by itself ends the rescue of its server', () => {
    const story = begin({ ...A, port: 20_001 });
    const joined = { token: TOKEN, localId: 0, backup: false, error: 0, remote: SERVER } as const;
    story.tell({ kind: 'subflow-established', ...joined, local: { ...CLIENT, port: 41_000 } });
    story.pass(LOOK_MS);
    expect(story.led).toEqual([]);
  });

  test('whose own SYN was answered after all is an ordinary one', () => {
    const story = begin(null);
    expect(paths(story)).toEqual(['direct active', 'nat joining']);
  });

  test('that a predecessor left is found, and keeps its translation', () => {
    const story = new Story();
    story.tell({ kind: 'redirections-found' });
    expect(story.of('redirect')).toMatchObject([{ servers: [], keep: true }]);
    const subflow = {
      local: CLIENT,
      remote: SERVER,
      localId: 0,
      joined: false,
      established: true,
      fullyEstablished: true,
      backup: false,
      timeouts: 0,
      unacked: 0,
      busyMs: 0,
      rttMs: 1,
      bytesAcked: 1,
      bytesReceived: 1,
    };
    const connection = { token: TOKEN, local: CLIENT, remote: SERVER, initiated: true, subflows: [subflow] };
    story.tell({ kind: 'dump', askedAt: story.now, connections: [connection] });
    expect(story.of('create-subflow')).toEqual([]);
    story.tell({ kind: 'translated', token: TOKEN, via: { ...A, port: 20_001 } });
    expect(paths(story)).toEqual(['direct failed', 'nat active led']);
    story.pass(20_000);
    expect(story.of('redirect').length).toBe(1);
    story.tell({ kind: 'closed', token: TOKEN });
    story.pass(2_000);
    expect(story.of('redirect').at(-1)).toMatchObject({ keep: false });
  });

  test('is none of the handshakes we make ourselves', () => {
    const story = new Story().rescue();
    const remote = { ...A, port: 20_001 };
    story.tell({ ...created, token: 99, remote, denyJoinId0: false });
    story.tell({
      kind: 'dump',
      askedAt: story.now,
      connections: [{ token: 99, local: CLIENT, remote, initiated: true, subflows: [] }],
    });
    expect([...story.state.connections.keys()]).toEqual([]);
  });
});
