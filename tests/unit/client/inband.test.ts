import { describe, expect, it } from 'vitest';
import { step } from '../../../appliance/client/manager.ts';
import { type Command, type Connection, type Event, initial, type State } from '../../../appliance/client/state.ts';
import { type Endpoint, formatEndpoint, parseEndpoint } from '../../../appliance/protocol/address.ts';

/** Joins that name their server: when there is one instead of a join by a lease, and what follows when it does not work. */

function end(text: string): Endpoint {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(`no endpoint: ${text}`);
  return parsed;
}

const LOCAL = end('192.0.2.7:40000');
const DETOUR = end('203.0.113.1:45672');
const CAPABILITY = 23_456;
const SERVER = '198.51.100.1:443';

class Story {
  readonly state: State;
  now = 1_000;
  epoch = 1n;
  #token = 0;

  constructor(inband = true) {
    this.state = initial(
      {
        maxPaths: 1,
        targets: [],
        exclude: [],
        rescue: false,
        mode: 'aggregate',
        minAgeMs: 0,
        kinds: ['nat'],
        ordered: true,
        inband,
      },
      7,
    );
    this.tell({ kind: 'detour-added', detour: 'd', name: 'd', endpoint: DETOUR });
    this.up();
  }

  tell(...events: Event[]): Command[] {
    return events.flatMap((event) => step(this.state, event, this.now));
  }

  up(capability: number | null = CAPABILITY, local = LOCAL): Command[] {
    const offer = capability === null ? {} : { capability: { port: capability, expiresAt: this.now + 120_000 } };
    return this.tell({
      kind: 'detour-up',
      detour: 'd',
      rttMs: 10,
      epoch: this.epoch,
      local: local.address,
      ...offer,
    });
  }

  /** A connection begins and is established; returns what that led to. */
  connect(server = SERVER, local = LOCAL): { token: number; commands: Command[] } {
    const token = ++this.#token;
    const about = { token, local, remote: end(server), serverSide: false, denyJoinId0: false };
    const commands = this.tell({ kind: 'created', ...about });
    this.now += 20;
    commands.push(...this.tell({ kind: 'established', ...about }));
    return { token, commands };
  }

  later(ms: number): Command[] {
    const out: Command[] = [];
    for (const until = this.now + ms; this.now < until; ) {
      this.now += Math.min(200, until - this.now);
      out.push(...this.tell({ kind: 'tick' }));
    }
    return out;
  }

  grant(server = SERVER, port = 25_000): Command[] {
    return this.tell({
      kind: 'lease-granted',
      detour: 'd',
      server: end(server),
      port,
      expiresAt: this.now + 600_000,
    });
  }

  joined(token: number, port = CAPABILITY): Command[] {
    return this.subflow('subflow-established', token, port, 0);
  }

  subflow(kind: 'subflow-established' | 'subflow-closed', token: number, port: number, error: number): Command[] {
    return this.tell({
      kind,
      token,
      localId: 0,
      backup: false,
      error,
      local: { ...LOCAL, port: 50_000 + token },
      remote: { ...DETOUR, port },
    });
  }

  connection(token: number): Connection {
    const found = this.state.connections.get(token);
    if (!found) throw new Error('no such connection');
    return found;
  }

  path(token: number) {
    return this.connection(token).paths.find(({ kind }) => kind === 'nat');
  }
}

const portsOf = (commands: readonly Command[]): number[] =>
  commands.flatMap((command) => (command.kind === 'create-subflow' ? [command.remote.port] : []));
const asked = (commands: readonly Command[]): string[] =>
  commands.flatMap((command) => (command.kind === 'want-lease' ? [formatEndpoint(command.server)] : []));

describe('a join that names its server', () => {
  it('leaves at ESTABLISHED, without a lease; once one worked, no lease is asked for any more', () => {
    const story = new Story();
    const first = story.connect();
    // The first of its kind: a lease is asked for as well, in case that it does not work.
    expect(asked(first.commands)).toEqual([SERVER]);
    expect(portsOf(first.commands)).toEqual([CAPABILITY]);
    story.joined(first.token);
    expect(story.path(first.token)).toMatchObject({ state: 'active', inband: true });
    expect(story.state.detours.get('d')?.inband).toBe('works');
    const second = story.connect('198.51.100.2:80');
    expect(asked(second.commands)).toEqual([]);
    expect(portsOf(second.commands)).toEqual([CAPABILITY]);
  });

  it('is tried even when the lease is quicker, but not instead of one from before', () => {
    const story = new Story();
    const about = { token: 77, local: LOCAL, remote: end(SERVER), serverSide: false, denyJoinId0: false };
    story.tell({ kind: 'created', ...about });
    story.now += 5;
    story.grant();
    story.now += 5;
    expect(portsOf(story.tell({ kind: 'established', ...about }))).toEqual([CAPABILITY]);
    story.joined(77);
    story.tell({ kind: 'closed', token: 77 });
    story.now += 1_000;
    expect(portsOf(story.connect().commands)).toEqual([25_000]);
  });

  it.each([
    ['the kernel is not prepared', new Story(false)],
    [
      'the detour takes none',
      (() => {
        const story = new Story();
        story.up(null);
        return story;
      })(),
    ],
  ])('is not made when %s', (_, story) => {
    const { commands } = story.connect();
    expect(portsOf(commands)).toEqual([]);
    expect(asked(commands)).toEqual([SERVER]);
    expect(portsOf(story.grant())).toEqual([25_000]);
  });

  it('is not made when the detour’s promise is over, or for IPv6', () => {
    const story = new Story();
    story.now += 119_500;
    expect(portsOf(story.connect().commands)).toEqual([]);
    story.up();
    const six = story.connect('[2001:db8::1]:443', end('[2001:db8::7]:40000'));
    expect(portsOf(six.commands)).toEqual([]);
  });

  it('that nobody answers is made by a lease, in the same connection, about a second later', () => {
    const story = new Story();
    const { token } = story.connect();
    story.grant();
    const commands = story.later(1_400);
    expect(portsOf(commands)).toEqual([25_000]);
    expect(story.state.detours.get('d')?.inband).toBe('fails');
    story.joined(token, 25_000);
    expect(story.path(token)).toMatchObject({ state: 'active', inband: false });
    // Remembered for this network, and nobody waits for it again.
    const next = story.connect('198.51.100.2:80');
    expect(portsOf(next.commands)).toEqual([]);
    expect(portsOf(story.grant('198.51.100.2:80', 25_001))).toEqual([25_001]);
    // The detour is not at fault.
    expect(story.state.detours.get('d')).toMatchObject({ state: 'up', unansweredJoins: 0 });
  });

  it('is tried anew on another network', () => {
    const story = new Story();
    story.connect();
    story.later(1_400);
    expect(story.state.detours.get('d')?.inband).toBe('fails');
    story.up(CAPABILITY, end('192.0.2.99:1'));
    expect(story.state.detours.get('d')?.inband).toBe('unknown');
  });

  it('that is refused is made by a lease at once, and says nothing of the others', () => {
    const story = new Story();
    const { token } = story.connect();
    story.grant();
    const commands = story.subflow('subflow-closed', token, CAPABILITY, 111);
    expect(portsOf(commands)).toEqual([25_000]);
    expect(story.state.detours.get('d')?.inband).toBe('unknown');
    expect(portsOf(story.connect('198.51.100.2:80').commands)).toEqual([CAPABILITY]);
  });

  it('may go missing now and then where others got through: three in a row say that it does not work any more', () => {
    const story = new Story();
    story.joined(story.connect().token);
    for (const [n, verdict] of [
      [2, 'works'],
      [3, 'works'],
      [4, 'fails'],
    ] as const) {
      const { commands } = story.connect(`198.51.100.${n}:443`);
      expect(portsOf(commands)).toEqual([CAPABILITY]);
      // Only now is a lease asked for.
      expect(asked(story.later(1_400))).toEqual([`198.51.100.${n}:443`]);
      expect(story.state.detours.get('d')?.inband).toBe(verdict);
    }
  });

  it('whose answer comes late, while its lease is asked for, counts', () => {
    const story = new Story();
    const { token } = story.connect();
    story.later(1_400);
    expect(story.path(token)?.state).toBe('requested');
    story.joined(token);
    expect(story.path(token)).toMatchObject({ state: 'active' });
  });
});
