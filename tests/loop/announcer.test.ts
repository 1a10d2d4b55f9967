import { afterEach, describe, expect, it } from 'vitest';
import { announceEach } from '../../appliance/client/announcements.ts';
import { type Announcer, startAnnouncer, takeBack } from '../../appliance/client/announcer.ts';
import type { Memory } from '../../appliance/kernel/memory.ts';
import { type Address, type Endpoint, formatAddress, parseAddress } from '../../appliance/protocol/address.ts';
import { Router } from '../../appliance/router/server.ts';
import type { RouterSettings } from '../../appliance/settings.ts';
import { FakeClock } from '../fakes/clock.ts';
import { FakeKernel } from '../fakes/mptcp.ts';
import { FakeNetwork } from '../fakes/network.ts';
import { FakeNft } from '../fakes/nft.ts';

/** A server that has a detour announced: the real agent's part and the real router, over a network and kernels that are not there. */

function address(text: string): Address {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(`no address: ${text}`);
  return parsed;
}

const KEY = { id: 1, secret: new Uint8Array(32).fill(1), label: null };
const DETOUR: Endpoint = { address: address('80.0.0.1'), port: 45672 };
const SERVER = address('93.184.216.34');
const ROUTER: RouterSettings = {
  keys: [KEY],
  listen: { address: address('::'), port: 45672 },
  ports: { first: 20000, last: 29999 },
  allow: [],
  deny: [],
  relay: 'join',
  leaseTime: 3_600_000,
  legacyV1: false,
  inband: false,
  announce: [{ first: 443, last: 443 }],
  fwmark: { mark: 0xd7000000, mask: 0xff000000 },
  onExit: 'keep',
  vpn: null,
  http: null,
  socket: '',
  logLevel: 'info',
  logFormat: 'json',
};

class Stage {
  readonly clock = new FakeClock();
  readonly network = new FakeNetwork(this.clock);
  readonly nft = new FakeNft(this.clock);
  /** What the server's kernel announces. */
  readonly announced = new Set<string>();
  remembered: ReadonlyMap<string, string> | null = null;
  readonly events: string[] = [];
  #router: Router | null = null;
  #announcer: Announcer | null = null;

  readonly memory: Memory = {
    recall: async () => this.remembered,
    remember: async (values) => {
      this.remembered ??= values;
    },
    forget: async () => {
      this.remembered = null;
    },
  };
  readonly endpoints = {
    add: async (one: Address): Promise<void> => void this.announced.add(formatAddress(one)),
    remove: async (one: Address): Promise<void> => void this.announced.delete(formatAddress(one)),
    close: () => undefined,
  };

  get log() {
    const say = (event: string): void => void this.events.push(event);
    return { debug: say, info: say, warn: say, error: say };
  }

  async router(over: Partial<RouterSettings> = {}): Promise<Router> {
    const router = new Router(
      { ...ROUTER, ...over },
      {
        clock: this.clock,
        log: this.log,
        nft: this.nft,
        datagrams: this.network.host([DETOUR.address]),
        addresses: {
          local: () => [{ address: DETOUR.address, length: 24, interface: 'eth0' }],
          gateways: async () => [],
        },
        conntrack: {
          usage: async () => ({ used: 0, max: 1_000 }),
          flows: async () => ({ count: 0, first: [] }),
          cut: async () => 0,
        },
        listeners: async () => [],
        upkeep: async () => ({ v4: null, v6: null }),
        openTunnels: () => {
          throw new Error('no tunnels here');
        },
      },
    );
    expect(await router.start()).toBeNull();
    this.#router = router;
    return router;
  }

  async announcer(): Promise<Announcer> {
    const announcer = await startAnnouncer(
      { key: KEY, detours: [], ports: [443] },
      {
        clock: this.clock,
        datagrams: this.network.host([SERVER]),
        log: this.log,
        endpoints: this.endpoints,
        memory: this.memory,
      },
    );
    this.#announcer = announcer;
    announcer.set([{ key: 'one', name: 'one', endpoint: DETOUR }]);
    await this.clock.advance(1_000);
    return announcer;
  }

  async ended(task: Promise<unknown> | undefined): Promise<void> {
    await this.clock.advance(5_000);
    await task;
  }

  async stop(): Promise<void> {
    await this.ended(this.#announcer?.stop());
    await this.ended(this.#router?.drain());
  }
}

describe('a server that has detours announced', () => {
  let stage: Stage;
  const fresh = (): Stage => {
    stage = new Stage();
    return stage;
  };
  afterEach(() => stage.stop());

  it('asks, announces what said yes, goes on asking, and takes it back', async () => {
    const { nft, announced, clock } = fresh();
    await stage.router();
    const announcer = await stage.announcer();
    expect(announcer.status()).toEqual([
      {
        detour: 'one',
        address: '80.0.0.1:45672',
        server: '93.184.216.34',
        port: 443,
        state: 'announced',
        why: null,
      },
    ]);
    expect([...announced]).toEqual(['80.0.0.1']);
    expect([...nft.elements('announced4')]).toEqual([['443', '93.184.216.34 . 443']]);
    await clock.advance(3_000_000);
    expect(nft.elements('announced4').size).toBe(1);
    expect([...announced]).toEqual(['80.0.0.1']);
    await stage.ended(announcer.stop());
    expect(nft.elements('announced4').size).toBe(0);
    expect(announced.size).toBe(0);
    expect(stage.remembered).toBeNull();
  });

  it('announces nothing that says no, and says why, once', async () => {
    const { announced, clock, events } = fresh();
    await stage.router({ announce: [] });
    const announcer = await stage.announcer();
    await clock.advance(10_000_000);
    expect(announcer.status()).toMatchObject([{ state: 'refused', why: 'UNSUPPORTED' }]);
    expect(announced.size).toBe(0);
    expect(events.filter((event) => event === 'not-announced')).toHaveLength(1);
  });

  it('takes a detour back whose promise ran out, and announces it again when it answers', async () => {
    const { announced, clock, nft } = fresh();
    const router = await stage.router();
    const announcer = await stage.announcer();
    await stage.ended(router.drain());
    await clock.advance(300_000);
    // What the kernels do goes on without the router.
    expect([...announced]).toEqual(['80.0.0.1']);
    await clock.advance(400_000);
    expect(announced.size).toBe(0);
    expect(nft.elements('announced4').size).toBe(0);
    await stage.router();
    await clock.advance(700_000);
    expect(announcer.status()).toMatchObject([{ state: 'announced' }]);
    expect([...announced]).toEqual(['80.0.0.1']);
  });

  it('announces again at once what a router lost', async () => {
    const { clock, nft } = fresh();
    const router = await stage.router();
    await stage.announcer();
    await stage.ended(router.drain());
    nft.flushRuleset();
    await stage.router();
    await clock.advance(60_000);
    expect(nft.elements('announced4').size).toBe(1);
  });

  it('drops a detour that is no longer in the list', async () => {
    const { announced, clock } = fresh();
    await stage.router();
    const announcer = await stage.announcer();
    announcer.set([]);
    await clock.advance(100);
    expect(announced.size).toBe(0);
    expect(announcer.status()).toEqual([]);
  });

  it('takes back what a killed predecessor announced', async () => {
    const { announced } = fresh();
    announced.add('80.0.0.9');
    stage.remembered = new Map([['endpoint_a', '50000009']]);
    await takeBack(stage);
    expect(announced.size).toBe(0);
    expect(stage.remembered).toBeNull();
  });
});

describe('announcements with the userspace path manager', () => {
  const CLIENT: Endpoint = { address: address('203.0.113.9'), port: 50_000 };
  const HTTPS: Endpoint = { address: SERVER, port: 443 };
  const OTHER = address('80.0.0.2');
  const kernel = (): FakeKernel => new FakeKernel(new FakeClock());
  const accepted = (on: FakeKernel, local: Endpoint = HTTPS, opening: object = {}): number => {
    const token = on.open(local, CLIENT, { serverSide: true, ...opening });
    on.establish(token);
    return token;
  };
  /** What an event sets off has happened. */
  const told = (): Promise<void> => new Promise((resolve) => setImmediate(resolve));
  const open = (on: FakeKernel, events: string[] = []) => {
    const say = (event: string): void => void events.push(event);
    const log = { debug: say, info: say, warn: say, error: say };
    return announceEach([443], { openPathManager: on.openPathManager, openDiag: () => on.diag, log });
  };

  it('reach connections of before, of now and of later, until they are taken back', async () => {
    const on = kernel();
    const before = accepted(on);
    const endpoints = await open(on);
    const now = accepted(on);
    await endpoints.add(DETOUR.address);
    await endpoints.add(OTHER);
    const later = accepted(on);
    await told();
    const all = [before, now, later].map((token) => on.announced(token));
    expect(all).toEqual(Array.from({ length: 3 }, () => ['80.0.0.1', '80.0.0.2']));
    await endpoints.remove(DETOUR.address);
    expect([before, now, later].map((token) => on.announced(token))).toEqual([
      ['80.0.0.2'],
      ['80.0.0.2'],
      ['80.0.0.2'],
    ]);
    // An id that is free again is used again: there are eight.
    for (let round = 0; round < 20; round++) {
      await endpoints.add(DETOUR.address);
      await endpoints.remove(DETOUR.address);
    }
    await endpoints.remove(DETOUR.address);
  });

  it('leave connections alone that are ours to open, at another port or of another family', async () => {
    const on = kernel();
    const endpoints = await open(on);
    await endpoints.add(DETOUR.address);
    const others = [
      accepted(on, { address: SERVER, port: 22 }),
      accepted(on, { address: address('fd00::1'), port: 443 }),
      accepted(on, HTTPS, { serverSide: false }),
    ];
    expect(others.map((token) => on.announced(token))).toEqual([[], [], []]);
  });

  it('survive connections that end meanwhile, or are older than the path manager', async () => {
    const [on, events] = [kernel(), [] as string[]];
    accepted(on, HTTPS, { kernelManaged: true });
    const endpoints = await open(on, events);
    const gone = accepted(on);
    const here = accepted(on);
    on.deafen();
    on.close(gone);
    await endpoints.add(DETOUR.address);
    expect(on.announced(here)).toEqual(['80.0.0.1']);
    expect(events).toEqual(['not-told', 'not-told']);
    // What was not heard of is looked for.
    const missed = accepted(on);
    on.hearAgain();
    await told();
    expect(on.announced(missed)).toEqual(['80.0.0.1']);
    endpoints.close();
  });
});
