import { afterEach, describe, expect, it } from 'vitest';
import type { Addresses } from '../../appliance/kernel/addresses.ts';
import type { Conntrack } from '../../appliance/kernel/conntrack.ts';
import type { Nft } from '../../appliance/kernel/nft.ts';
import {
  type Address,
  type Endpoint,
  formatAddress,
  parseAddress,
  parseEndpoint,
  parsePrefix,
} from '../../appliance/protocol/address.ts';
import {
  encodeRequest,
  FLAG_ANNOUNCED,
  PROTOCOL_TCP,
  type Response,
  resultName,
  TYPE,
  tunnelMark,
} from '../../appliance/protocol/control.ts';
import { decodeLegacyResponse, encodeLegacyRequest } from '../../appliance/protocol/legacy.ts';
import type { Forwarding } from '../../appliance/router/keeper.ts';
import { MAP_SIZE } from '../../appliance/router/leases.ts';
import { Router, type RouterPorts } from '../../appliance/router/server.ts';
import type { RouterSettings } from '../../appliance/settings.ts';
import { FakeClock, settle } from '../fakes/clock.ts';
import { FakeNetwork } from '../fakes/network.ts';
import { FakeNft } from '../fakes/nft.ts';
import { FakeTunnels } from '../fakes/wireguard.ts';
import { Speaker, type TunnelAnswer } from '../lab/speaker.ts';

function address(text: string): Address {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(`no address: ${text}`);
  return parsed;
}

function endpoint(text: string): Endpoint {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(`no endpoint: ${text}`);
  return parsed;
}

const key = (id: number) => ({ id, secret: new Uint8Array(32).fill(id), label: null });
const SETTINGS: RouterSettings = {
  keys: [key(1), key(2)],
  listen: { address: address('::'), port: 45672 },
  ports: { first: 20000, last: 29999 },
  allow: [],
  deny: [],
  relay: 'join',
  leaseTime: 3_600_000,
  legacyV1: false,
  inband: false,
  announce: [],
  fwmark: { mark: 0xd7000000, mask: 0xff000000 },
  onExit: 'keep',
  vpn: null,
  http: null,
  socket: '',
  logLevel: 'info',
  logFormat: 'json',
};
const DETOUR = { v4: address('80.0.0.1'), v6: address('2a00:80::1') };
const SERVER = endpoint('93.184.216.34:443');
const OTHER = endpoint('93.184.216.35:443');
const SERVER6 = endpoint('[2606:2800::1]:443');

type Line = { readonly level: string; readonly event: string; readonly [field: string]: unknown };

/** A router on a machine that is not there: its clock, its wires and its kernel are the test's. */
class Bench {
  readonly clock = new FakeClock();
  readonly network = new FakeNetwork(this.clock);
  readonly nft = new FakeNft(this.clock);
  readonly tunnels = new FakeTunnels([], 'router');
  readonly lines: Line[] = [];
  own: { address: Address; length: number; interface: string }[] = [
    { address: DETOUR.v4, length: 24, interface: 'eth0' },
    { address: DETOUR.v6, length: 64, interface: 'eth0' },
  ];
  gateways: Address[] = [address('80.0.0.254')];
  usage = { used: 0, max: 1000 };
  listening: number[] = [];
  readonly cuts: { client: Address; port: number | null }[] = [];
  forwarding: Forwarding = { v4: null, v6: null };
  readonly #running: Router[] = [];

  ports(nft: Nft = this.nft): RouterPorts {
    const say =
      (level: string) =>
      (event: string, fields: object): void => {
        this.lines.push({ ...fields, level, event });
      };
    const addresses: Addresses = { local: () => this.own, gateways: async () => this.gateways };
    const conntrack: Conntrack = {
      usage: async () => this.usage,
      flows: async () => ({ count: 0, first: [] }),
      cut: async (client, port) => this.cuts.push({ client, port }),
    };
    return {
      clock: this.clock,
      log: { debug: say('debug'), info: say('info'), warn: say('warn'), error: say('error') },
      nft,
      datagrams: this.network.host([DETOUR.v4, DETOUR.v6]),
      addresses,
      conntrack,
      listeners: async () => this.listening,
      upkeep: async () => this.forwarding,
      openTunnels: () => this.tunnels,
    };
  }

  async start(over: Partial<RouterSettings> = {}): Promise<Router> {
    const router = new Router({ ...SETTINGS, ...over }, this.ports());
    expect(await router.start()).toBeNull();
    this.#running.push(router);
    return router;
  }

  /** A client with a cookie. */
  async client(from: string, id = 1): Promise<Speaker> {
    const speaker = await this.stranger(from, id);
    expect(resultOf(await speaker.hello())).toBe('OK');
    return speaker;
  }

  /** A client that has not said anything yet. */
  async stranger(from: string, id = 1, secret = key(id).secret): Promise<Speaker> {
    const source = address(from);
    const datagrams = this.network.host([source]);
    const router = { address: source.family === 4 ? DETOUR.v4 : DETOUR.v6, port: 45672 };
    return Speaker.open(datagrams, router, { id, secret }, { silence: () => this.clock.advance(200) });
  }

  events(event: string): Line[] {
    return this.lines.filter((line) => line.event === event);
  }

  async stop(): Promise<void> {
    this.nft.gate = null;
    for (const router of this.#running) {
      const drained = router.drain();
      await this.clock.advance(5_000);
      await drained;
    }
    expect(this.lines.filter(({ level }) => level === 'error')).toEqual([]);
  }
}

const resultOf = (response: Response | null): string => (response ? resultName(response.result) : 'silence');

let bench: Bench;
const fresh = (): Bench => {
  bench = new Bench();
  return bench;
};
afterEach(async () => bench.stop());

/** `10.0.0.1 . 20000` of a granted answer. */
const slot = (client: string, response: Response | null): string => `${client} . ${response?.port}`;

describe('a conversation', () => {
  it('greets, grants, repeats, renews and releases', async () => {
    const { nft, clock } = fresh();
    const router = await bench.start();
    const client = await bench.stranger('198.51.100.7');
    const hello = await client.hello();
    expect(hello).toMatchObject({ result: 0, lifetime: 120, observed: { port: 40000 }, port: 0, capabilityPort: 0 });
    const granted = await client.lease(SERVER, { lifetime: 300 });
    expect(granted).toMatchObject({ result: 0, lifetime: 300 });
    expect(granted?.epoch.toString(16).padStart(16, '0')).toBe(router.epoch);
    expect(nft.elements('leases4').get(slot('198.51.100.7', granted))).toBe('93.184.216.34 . 443');
    const again = await client.lease(SERVER, { lifetime: 60 });
    expect(again?.port).toBe(granted?.port);
    expect(again?.lifetime).toBeGreaterThanOrEqual(299);
    await clock.advance(150_000);
    expect(resultOf(await client.ask(TYPE.PING))).toBe('CHALLENGE');
    expect(await client.lease(SERVER, { lifetime: 300 })).toMatchObject({
      result: 0,
      port: granted?.port,
      lifetime: 300,
    });
    expect(nft.remaining('leases4', slot('198.51.100.7', granted))).toBeGreaterThan(300);
    expect(await client.release(SERVER)).toMatchObject({ result: 0, port: 0 });
    expect(nft.elements('leases4').size).toBe(0);
    expect(await client.release(SERVER)).toMatchObject({ result: 0 });
    expect(bench.events('lease-granted')).toMatchObject([
      { key: '00000001', client: '198.51.100.7', destination: '93.184.216.34:443', seconds: 300 },
    ]);
    expect(bench.events('lease-released')).toHaveLength(1);
  });

  it('works over IPv6', async () => {
    const { nft } = fresh();
    await bench.start();
    const granted = await (await bench.client('2a00:7::1')).lease(SERVER6);
    expect(nft.elements('leases6').get(slot('2a00:7::1', granted))).toBe('2606:2800::1 . 443');
  });

  it('never answers with more bytes than it was asked with', async () => {
    fresh();
    await bench.start({ legacyV1: true });
    const client = await bench.client('198.51.100.7');
    await client.lease(SERVER);
    await client.lease(endpoint('127.0.0.1:1'));
    await client.ask(9);
    const legacy = await bench.stranger('198.51.100.8');
    await legacy.provoke(encodeLegacyRequest({ destination: SERVER, port: 0 }));
    const { sent } = bench.network;
    expect(sent.length).toBeGreaterThanOrEqual(10);
    for (const [index, { from, bytes }] of sent.entries()) {
      if (from.port === 45672) expect(bytes.length).toBe(sent[index - 1]?.bytes.length);
    }
  });

  it.each([
    ['a destination that is denied', { destination: endpoint('192.168.0.1:443') }, 'DENIED_DESTINATION'],
    ['the detour itself', { destination: endpoint('80.0.0.1:443') }, 'DENIED_DESTINATION'],
    ['its neighbour', { destination: endpoint('80.0.0.9:443') }, 'DENIED_DESTINATION'],
    ['port 25', { destination: endpoint('93.184.216.34:25') }, 'DENIED_DESTINATION'],
    ['port 0', { destination: { ...SERVER, port: 0 } }, 'MALFORMED'],
    ['no destination', { destination: null }, 'MALFORMED'],
    ['6to4', { destination: endpoint('[2002:5db8:d822::1]:443') }, 'BAD_ADDRESS'],
    ['the other family', { destination: SERVER6 }, 'BAD_ADDRESS'],
    ['the zero address with a port', { destination: { address: address('::'), port: 443 } }, 'BAD_ADDRESS'],
    ['UDP', { protocol: 17 }, 'UNSUPPORTED'],
  ])('refuses %s', async (_what, over, result) => {
    fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    const response = await client.lease(SERVER, over);
    expect(resultOf(response)).toBe(result);
    expect(response).toMatchObject({ port: 0, lifetime: 1800 });
    expect(bench.nft.elements('leases4').size).toBe(0);
  });

  it('knows no other types, and no other versions', async () => {
    fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    for (const type of [0, 5, 15, 99]) expect(resultOf(await client.ask(type))).toBe('UNSUPPORTED');
    expect(resultOf(await client.ask(TYPE.HELLO, { vmin: 3, vmax: 9 }))).toBe('UNSUPPORTED');
    expect(resultOf(await client.ask(TYPE.HELLO, { vmin: 1, vmax: 3 }))).toBe('OK');
  });
});

describe('silence', () => {
  it('meets whoever cannot authenticate, and a counter tells why', async () => {
    fresh();
    const router = await bench.start();
    const client = await bench.client('198.51.100.7');
    const good = encodeRequest(client.request(TYPE.PING), client.keys);
    const changed = (at: number, value: number): Uint8Array => {
      const copy = good.slice();
      copy[at] = value;
      return copy;
    };
    const cases: [Uint8Array, string][] = [
      [new Uint8Array(0), 'malformed_length'],
      [good.subarray(0, 95), 'malformed_length'],
      [Buffer.concat([good, new Uint8Array(1)]), 'malformed_length'],
      [new Uint8Array(65_000), 'malformed_length'],
      [encodeLegacyRequest({ destination: SERVER, port: 0 }), 'malformed_length'],
      [changed(0, 0xd6), 'malformed_magic'],
      [changed(1, 1), 'malformed_version'],
      [changed(1, 3), 'malformed_version'],
      [changed(47, 1), 'malformed_reserved'],
      [changed(69, 1), 'malformed_reserved'],
      [changed(79, 1), 'malformed_reserved'],
      [changed(7, 9), 'unknown_key'],
      [changed(95, (good[95] ?? 0) ^ 1), 'bad_mac'],
      [changed(2, TYPE.LEASE), 'bad_mac'],
    ];
    for (const [bytes, cause] of cases) {
      const before = router.counters.get(cause) ?? 0;
      expect(await client.provoke(bytes), cause).toBeNull();
      expect(router.counters.get(cause), cause).toBe(before + 1);
    }
    // Random bytes, many of them, and every single changed byte of a good request.
    for (let n = 0; n < 200; n++) expect(await client.provoke(bench.clock.random(n))).toBeNull();
    for (let at = 0; at < 96; at++)
      expect(await client.provoke(changed(at, (good[at] ?? 0) ^ 0xff)), `byte ${at}`).toBeNull();
    const wrong = await bench.stranger('198.51.100.8', 1, new Uint8Array(32).fill(9));
    expect(await wrong.hello()).toBeNull();
    expect(resultOf(await client.exchange(good))).toBe('OK');
  });
});

describe('cookies', () => {
  it('are asked for, and belong to one address, port, key and session', async () => {
    fresh();
    await bench.start();
    const client = await bench.stranger('198.51.100.7');
    expect(resultOf(await client.lease(SERVER))).toBe('CHALLENGE');
    expect(bench.nft.elements('leases4').size).toBe(0);
    const granted = encodeRequest(
      client.request(TYPE.LEASE, { destination: SERVER, protocol: PROTOCOL_TCP }),
      client.keys,
    );
    // The same bytes from elsewhere: a spoofer who saw them.
    for (const from of ['198.51.100.8:40000', '198.51.100.7:40009']) {
      bench.network.send(endpoint(from), { address: DETOUR.v4, port: 45672 }, granted);
      await bench.clock.advance(10);
      expect(bench.network.sent.at(-1)).toMatchObject({ to: endpoint(from) });
      expect(bench.network.sent.at(-1)?.bytes[3]).toBe(1);
    }
    expect(bench.nft.elements('leases4').size).toBe(0);
    expect(resultOf(await client.exchange(granted))).toBe('OK');
  });

  it('run out after 120 s', async () => {
    fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    await bench.clock.advance(119_000);
    expect(resultOf(await client.ask(TYPE.PING))).toBe('OK');
    await bench.clock.advance(122_000);
    expect(resultOf(await client.ask(TYPE.PING))).toBe('CHALLENGE');
    expect(resultOf(await client.ask(TYPE.PING))).toBe('OK');
  });
});

describe('replays', () => {
  it('get the stored answer, byte by byte, and change nothing', async () => {
    fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    const bytes = encodeRequest(
      client.request(TYPE.LEASE, { destination: SERVER, protocol: PROTOCOL_TCP }),
      client.keys,
    );
    const first = await client.provoke(bytes);
    const runs = bench.nft.runs.length;
    expect(await client.provoke(bytes)).toEqual(first);
    expect(await client.provoke(bytes)).toEqual(first);
    expect(bench.nft.runs.length).toBe(runs);
    await client.release(SERVER);
    expect(await client.provoke(bytes)).toEqual(first);
    expect(bench.nft.elements('leases4').size).toBe(0);
  });

  it('of another request under the same number get nothing', async () => {
    fresh();
    const router = await bench.start();
    const client = await bench.client('198.51.100.7');
    const request = client.request(TYPE.LEASE, { destination: SERVER, protocol: PROTOCOL_TCP });
    expect(resultOf(await client.exchange(encodeRequest(request, client.keys)))).toBe('OK');
    const other = encodeRequest({ ...request, destination: OTHER }, client.keys);
    expect(await client.provoke(other)).toBeNull();
    expect(router.counters.get('replay_ignored')).toBe(1);
    expect(resultOf(await client.ask(TYPE.PING, { sequence: 5_000n }))).toBe('OK');
    expect(await client.ask(TYPE.PING, { sequence: 3_000n })).toBeNull();
    expect(router.counters.get('replay_stale')).toBe(1);
  });

  it('while the first is still under way get nothing, and one answer comes', async () => {
    fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    const { promise, resolve } = Promise.withResolvers<void>();
    bench.nft.gate = promise;
    const bytes = encodeRequest(
      client.request(TYPE.LEASE, { destination: SERVER, protocol: PROTOCOL_TCP }),
      client.keys,
    );
    expect(await client.provoke(bytes)).toBeNull();
    expect(await client.provoke(bytes)).toBeNull();
    const before = bench.network.sent.length;
    bench.nft.gate = null;
    resolve();
    await bench.clock.advance(100);
    expect(bench.network.sent.slice(before).filter(({ from }) => from.port === 45672)).toHaveLength(1);
  });
});

describe('an answer OK means that the kernel has it', () => {
  it.each(['missing', 'denied', 'rejected', 'full', 'unknown'] as const)(
    'nft fails (%s): no OK, and readiness says so',
    async (kind) => {
      const { nft } = fresh();
      const router = await bench.start();
      const client = await bench.client('198.51.100.7');
      nft.fault = (commands) => (commands.includes('add element') ? { kind } : null);
      const refused = await client.lease(SERVER);
      expect(resultOf(refused)).toBe(kind === 'full' ? 'NO_RESOURCES' : 'INTERNAL');
      expect(nft.elements('leases4').size).toBe(0);
      if (kind !== 'full') expect(router.readiness()).toMatchObject({ ready: false });
      nft.fault = () => null;
      const granted = await client.lease(SERVER);
      expect(resultOf(granted)).toBe('OK');
      expect([...nft.elements('leases4').keys()]).toEqual([slot('198.51.100.7', granted)]);
      await bench.clock.advance(40_000);
      expect(router.readiness()).toEqual({ ready: true, reasons: [] });
    },
  );

  it('nft dies after the kernel has done it: the map is read before the answer', async () => {
    const { nft } = fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    nft.fault = (commands) => (commands.startsWith('add element') ? { kind: 'unknown', after: true } : null);
    const granted = await client.lease(SERVER);
    expect(resultOf(granted)).toBe('OK');
    expect([...nft.elements('leases4').keys()]).toEqual([slot('198.51.100.7', granted)]);
    expect(resultOf(await client.release(SERVER))).toBe('OK');
    expect(nft.elements('leases4').size).toBe(0);
  });

  it('nft dies over a renewal that was not done: refused, and the lease is what it was', async () => {
    const { nft, clock } = fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    const granted = await client.lease(SERVER, { lifetime: 100 });
    await clock.advance(50_000);
    nft.fault = (commands) => (commands.startsWith('add element') ? { kind: 'unknown' } : null);
    expect(resultOf(await client.lease(SERVER, { lifetime: 100 }))).toBe('INTERNAL');
    nft.fault = () => null;
    expect(nft.remaining('leases4', slot('198.51.100.7', granted))).toBeLessThan(56);
    expect(await client.lease(SERVER, { lifetime: 10 })).toMatchObject({
      result: 0,
      port: granted?.port,
      lifetime: 60,
    });
  });

  it('nft dies and then cannot read the map either: refused, and what it left is removed later', async () => {
    const { nft } = fresh();
    const router = await bench.start();
    const client = await bench.client('198.51.100.7');
    let done = false;
    nft.fault = (commands) => {
      const element = commands.startsWith('add element') || commands.startsWith('dump');
      if (!element || done) return null;
      return { kind: 'unknown', after: true };
    };
    expect(resultOf(await client.lease(SERVER))).toBe('INTERNAL');
    expect(nft.elements('leases4').size).toBe(1);
    expect(router.readiness().ready).toBe(false);
    done = true;
    await bench.clock.advance(40_000);
    expect(nft.elements('leases4').size).toBe(0);
    expect(router.readiness()).toEqual({ ready: true, reasons: [] });
  });

  it('a hanging nft grants nothing, and what waits shares one transaction afterwards', async () => {
    const { nft, clock, network } = fresh();
    await bench.start();
    const clients = await Promise.all(['198.51.100.7', '198.51.100.8'].map((from) => bench.client(from)));
    const { promise, resolve } = Promise.withResolvers<void>();
    nft.gate = promise;
    const before = network.sent.length;
    for (const [index, client] of clients.entries()) {
      for (let n = 0; n < 20; n++) {
        const destination = { ...SERVER, port: 1000 + n };
        const request = client.request(TYPE.LEASE, { destination, protocol: PROTOCOL_TCP, suggestedPort: 20_500 });
        network.send(
          { address: address(`198.51.100.${7 + index}`), port: 40_000 + index },
          { address: DETOUR.v4, port: 45672 },
          encodeRequest(request, client.keys),
        );
      }
      await clock.advance(100);
    }
    expect(network.sent.slice(before).filter(({ from }) => from.port === 45672)).toEqual([]);
    expect(nft.elements('leases4').size).toBe(0);
    const runs = nft.runs.length;
    nft.gate = null;
    resolve();
    await clock.advance(100);
    expect(nft.elements('leases4').size).toBe(40);
    expect(nft.runs.length - runs).toBeLessThanOrEqual(3);
    // Nobody got another's port, though all wanted the same one.
    const answers = network.sent.slice(before).filter(({ from }) => from.port === 45672);
    expect(answers.map(({ bytes }) => bytes[3])).toEqual(Array(40).fill(0));
    for (const last of ['7', '8']) {
      const mine = answers.filter(({ to }) => to.address.value === address(`198.51.100.${last}`).value);
      expect(new Set(mine.map(({ bytes }) => (bytes[58] ?? 0) * 256 + (bytes[59] ?? 0))).size).toBe(20);
    }
  });

  it('who is granted something does not wait for who gives something back', async () => {
    const { nft, clock, network } = fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    await client.lease(SERVER);
    const { promise, resolve } = Promise.withResolvers<void>();
    nft.gate = promise;
    const before = network.sent.length;
    const at = (port: number) => ({ destination: { ...SERVER, port }, protocol: PROTOCOL_TCP });
    for (const request of [
      client.request(TYPE.LEASE, at(1001)),
      // While the first is under way:
      client.request(TYPE.RELEASE, at(SERVER.port)),
      client.request(TYPE.LEASE, at(1002)),
    ]) {
      const bytes = encodeRequest(request, client.keys);
      network.send({ address: address('198.51.100.7'), port: 40_000 }, { address: DETOUR.v4, port: 45672 }, bytes);
    }
    await clock.advance(10);
    const runs = nft.runs.length;
    nft.gate = null;
    resolve();
    await clock.advance(100);
    expect(nft.runs.slice(runs).map((commands) => commands.includes('delete element'))).toEqual([false, false, true]);
    const answers = network.sent.slice(before).filter(({ from }) => from.port === 45672);
    const [lease, release] = [TYPE.LEASE, TYPE.RELEASE].map((type) => type | 0x80);
    expect(answers.map(({ bytes }) => bytes[2])).toEqual([lease, lease, release]);
    expect([...nft.elements('leases4').values()]).toEqual(['93.184.216.34 . 1001', '93.184.216.34 . 1002']);
  });

  it('a bad element harms only its own request', async () => {
    const { nft, clock, network } = fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    // Somebody else put this into our map.
    await nft.run(
      'add element inet detour leases4 { 198.51.100.7 . 20010 timeout 600s comment "k00000002" : 1.1.1.1 . 80 }\n',
    );
    const { promise, resolve } = Promise.withResolvers<void>();
    nft.gate = promise;
    const before = network.sent.length;
    for (let n = 0; n < 30; n++) {
      const over = { destination: { ...SERVER, port: 1000 + n }, protocol: PROTOCOL_TCP, suggestedPort: 20_000 + n };
      const bytes = encodeRequest(client.request(TYPE.LEASE, over), client.keys);
      network.send({ address: address('198.51.100.7'), port: 40_000 }, { address: DETOUR.v4, port: 45672 }, bytes);
    }
    await clock.advance(10);
    nft.gate = null;
    resolve();
    await clock.advance(1_000);
    const answers = network.sent.slice(before).filter(({ from }) => from.port === 45672);
    expect(answers.map(({ bytes }) => bytes[3]).filter((result) => result === 0)).toHaveLength(29);
    expect(answers).toHaveLength(30);
    // What was nobody's is gone, so the next try gets it.
    expect(nft.elements('leases4').size).toBe(29);
    expect(resultOf(await client.lease({ ...SERVER, port: 1010 }, { suggestedPort: 20_010 }))).toBe('OK');
  });

  it('refuses what is new when the map is full', async () => {
    const { nft } = fresh();
    const lines: string[] = [];
    await bench.start();
    for (let n = 0; n < MAP_SIZE; n++) {
      lines.push(
        `add element inet detour leases4 { 9.${n >> 16}.${(n >> 8) & 255}.${n & 255} . 20000 timeout 600s comment "k00000001" : 1.1.1.1 . 80 }`,
      );
    }
    expect(await nft.run(`${lines.join('\n')}\n`)).toBeNull();
    const client = await bench.client('198.51.100.7');
    expect(resultOf(await client.lease(SERVER))).toBe('NO_RESOURCES');
  });
});

describe('clients', () => {
  it('cannot see, take, extend or end one another’s leases', async () => {
    const { nft } = fresh();
    await bench.start();
    const alice = await bench.client('198.51.100.7', 1);
    const bob = await bench.client('198.51.100.8', 2);
    // The same address with another key, as behind one NAT; the same key from another address.
    const carol = await bench.client('198.51.100.7', 2);
    const dave = await bench.client('198.51.100.8', 1);
    const granted = await alice.lease(SERVER, { suggestedPort: 20_007 });
    expect(granted?.port).toBe(20_007);
    const mine = slot('198.51.100.7', granted);
    const remaining = nft.remaining('leases4', mine) ?? 0;
    for (const other of [bob, carol, dave]) {
      expect(resultOf(await other.release(SERVER))).toBe('OK');
      expect(nft.elements('leases4').get(mine)).toBe('93.184.216.34 . 443');
    }
    expect((await carol.lease(OTHER, { suggestedPort: 20_007 }))?.port).not.toBe(20_007);
    expect((await carol.lease(SERVER, { suggestedPort: 20_007, lifetime: 3600 }))?.port).not.toBe(20_007);
    expect((await bob.lease(OTHER, { suggestedPort: 20_007 }))?.port).toBe(20_007);
    expect(nft.elements('leases4').get(mine)).toBe('93.184.216.34 . 443');
    expect(nft.remaining('leases4', mine)).toBeLessThanOrEqual(remaining);
  });

  it('are limited one by one: 64 at once, 20 a second, 256 in all', async () => {
    fresh();
    await bench.start();
    const greedy = await bench.client('198.51.100.7', 1);
    const modest = await bench.client('198.51.100.7', 2);
    const results = new Map<string, number>();
    for (let n = 0; n < 3_000; n++) {
      const result = resultOf(await greedy.lease({ ...SERVER, port: 1 + n + (n >= 24 ? 1 : 0) }));
      results.set(result, (results.get(result) ?? 0) + 1);
      if (result === 'QUOTA') break;
      if (result === 'RATE') await bench.clock.advance(1_000);
      if (n === 100) expect(resultOf(await modest.lease(SERVER))).toBe('OK');
    }
    expect(results.get('OK')).toBe(256);
    expect(results.get('QUOTA')).toBe(1);
    expect(resultOf(await modest.lease(OTHER))).toBe('OK');
  });

  it('that flood are dropped oldest first, and the router lives', async () => {
    const { nft, network, clock } = fresh();
    const router = await bench.start();
    const client = await bench.client('198.51.100.7');
    const { promise, resolve } = Promise.withResolvers<void>();
    nft.gate = promise;
    for (let n = 0; n < 6_000; n++) {
      const bytes = encodeRequest(
        client.request(TYPE.LEASE, { destination: SERVER, protocol: PROTOCOL_TCP }),
        client.keys,
      );
      network.send({ address: address('198.51.100.7'), port: 40_000 }, { address: DETOUR.v4, port: 45672 }, bytes);
    }
    await clock.advance(10);
    expect(router.counters.get('queue_dropped')).toBeGreaterThan(1_000);
    expect(bench.events('queue-full')).toHaveLength(1);
    nft.gate = null;
    resolve();
    await clock.advance(1_000);
    expect(nft.elements('leases4').size).toBe(1);
    expect(resultOf(await client.lease(OTHER))).toBe('OK');
  });
});

describe('a restart', () => {
  it('adopts leases, ports, epoch and time', async () => {
    const { nft, clock } = fresh();
    const first = await bench.start();
    const client = await bench.client('198.51.100.7');
    const granted = await client.lease(SERVER, { lifetime: 600 });
    const six = await (await bench.client('2a00:7::1')).lease(SERVER6);
    await first.drain();
    await clock.advance(100_000);
    const second = await bench.start();
    expect(second.epoch).toBe(first.epoch);
    const later = await bench.client('198.51.100.7');
    const again = await later.lease(SERVER, { lifetime: 60 });
    expect(again).toMatchObject({ result: 0, port: granted?.port });
    expect(again?.lifetime).toBeGreaterThan(490);
    expect(again?.lifetime).toBeLessThanOrEqual(500);
    expect(nft.elements('leases6').has(slot('2a00:7::1', six))).toBe(true);
    expect(resultOf(await later.release(SERVER))).toBe('OK');
    expect(nft.elements('leases4').size).toBe(0);
  });

  it('has a new epoch when the table was lost', async () => {
    const { nft } = fresh();
    const first = await bench.start();
    await first.drain();
    nft.flushRuleset();
    expect((await bench.start()).epoch).not.toBe(first.epoch);
  });

  it('adopts each lease once, also when an interrupted dump hands some over again', async () => {
    const { nft } = fresh();
    const first = await bench.start();
    const client = await bench.client('198.51.100.7');
    for (let n = 0; n < 5; n++) await client.lease({ ...SERVER, port: 1000 + n });
    await first.drain();
    const before = nft.elements('leases4');
    nft.interrupted = 3;
    const second = await bench.start();
    expect(second.leaseCount).toBe(5);
    expect(nft.elements('leases4')).toEqual(before);
  });

  it('removes leases of keys that are no longer accepted, and what is nobody’s', async () => {
    const { nft } = fresh();
    const first = await bench.start();
    await (await bench.client('198.51.100.7', 1)).lease(SERVER, { suggestedPort: 20_001 });
    await (await bench.client('198.51.100.8', 2)).lease(SERVER, { suggestedPort: 20_002 });
    await nft.run(
      'add element inet detour leases4 { 198.51.100.9 . 20003 timeout 600s comment "hello" : 1.1.1.1 . 80 }\n',
    );
    await nft.run(
      'add element inet detour leases4 { 198.51.100.9 . 20004 timeout 600s comment "v1" : 1.1.1.1 . 80 }\n',
    );
    await first.drain();
    await bench.start({ keys: [key(2)] });
    expect([...nft.elements('leases4').keys()]).toEqual(['198.51.100.8 . 20002']);
    expect(bench.cuts).toMatchObject([{ port: 20_001 }, { port: 20_004 }]);
  });

  it('says what is wrong when nft cannot be used', async () => {
    const { nft } = fresh();
    for (const kind of ['missing', 'denied', 'unknown'] as const) {
      nft.fault = () => ({ kind });
      expect(await new Router(SETTINGS, bench.ports()).start()).toMatchObject({ kind });
    }
    nft.fault = () => null;
  });
});

describe('what somebody else changes', () => {
  it.each([
    ['the whole ruleset is flushed', 'absent', (nft: FakeNft) => nft.flushRuleset()],
    ['a rule is added to our chain', 'changed', (nft: FakeNft) => nft.addRule('forwarded', 'accept')],
    ['a map is emptied', 'emptied', (nft: FakeNft) => nft.emptyMap('leases4')],
  ])('%s: restored within 40 s, with leases and epoch', async (_what, found, change) => {
    const { nft, clock } = fresh();
    const router = await bench.start();
    const client = await bench.client('198.51.100.7');
    const granted = await client.lease(SERVER, { lifetime: 600 });
    const rules = nft.rules('forwarded').length;
    const { epoch } = router;
    change(nft);
    await clock.advance(40_000);
    expect(nft.elements('leases4').get(slot('198.51.100.7', granted))).toBe('93.184.216.34 . 443');
    const remaining = nft.remaining('leases4', slot('198.51.100.7', granted)) ?? 0;
    expect(remaining).toBeGreaterThan(555);
    expect(remaining).toBeLessThan(575);
    expect(nft.rules('forwarded')).toHaveLength(rules);
    expect(bench.events('rules-restored')).toMatchObject([{ level: 'warn', found }]);
    expect(router.counters.get('rules_restored')).toBe(1);
    await router.drain();
    expect((await bench.start()).epoch).toBe(epoch);
  });

  it('a lease asked for right after a flush is granted in a restored table', async () => {
    const { nft } = fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    await client.lease(SERVER);
    nft.flushRuleset();
    expect(resultOf(await client.lease(OTHER))).toBe('OK');
    expect(nft.elements('leases4').size).toBe(2);
    expect(nft.rules('nat_in').length).toBe(2);
  });

  it('an address appears: it is denied, in the rules too', async () => {
    const { nft, clock } = fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    bench.own = [...bench.own, { address: address('93.184.216.99'), length: 24, interface: 'eth1' }];
    await clock.advance(5_000);
    expect(resultOf(await client.lease(SERVER))).toBe('DENIED_DESTINATION');
    expect(nft.rules('destination').join('\n')).toContain('93.184.216.99');
  });
});

describe('time', () => {
  it('ends a lease in the kernel and in the table, and says so', async () => {
    const { nft, clock } = fresh();
    const router = await bench.start();
    const client = await bench.client('198.51.100.7');
    const granted = await client.lease(SERVER, { lifetime: 60 });
    await clock.advance(60_000);
    expect(nft.elements('leases4').has(slot('198.51.100.7', granted))).toBe(true);
    await clock.advance(9_000);
    expect(nft.elements('leases4').size).toBe(0);
    expect(router.leaseCount).toBe(0);
    expect(bench.events('lease-expired')).toMatchObject([{ client: '198.51.100.7', port: granted?.port }]);
    // The same destination may have its port back at once; another one may not for a while.
    await client.hello();
    const other = await client.lease(OTHER, { suggestedPort: granted?.port ?? 0 });
    expect(other?.port).not.toBe(granted?.port);
    expect((await client.lease(SERVER, { suggestedPort: granted?.port ?? 0 }))?.port).toBe(granted?.port);
  });
});

describe('keys', () => {
  it('are replaced all at once; who lost one has no leases, no flows and no answers', async () => {
    const { nft } = fresh();
    const router = await bench.start();
    const alice = await bench.client('198.51.100.7', 1);
    const bob = await bench.client('198.51.100.8', 2);
    await alice.lease(SERVER);
    await bob.lease(SERVER);
    await router.reload([key(2), key(3)]);
    expect([...nft.elements('leases4').keys()].every((held) => held.startsWith('198.51.100.8'))).toBe(true);
    expect(bench.cuts).toHaveLength(1);
    expect(await alice.ask(TYPE.PING)).toBeNull();
    expect(resultOf(await bob.ask(TYPE.PING))).toBe('OK');
    expect(resultOf(await (await bench.stranger('198.51.100.9', 3)).hello())).toBe('OK');
    expect(nft.rules('control').join('\n')).toContain('{ 0x00000002, 0x00000003 }');
    await expect(router.reload([{ ...key(4), secret: new Uint8Array(31) }])).rejects.toThrow(RangeError);
    expect(resultOf(await bob.ask(TYPE.PING))).toBe('OK');
  });

  it('with a new secret are new keys', async () => {
    const { nft } = fresh();
    const router = await bench.start();
    const alice = await bench.client('198.51.100.7', 1);
    await alice.lease(SERVER);
    await router.reload([{ ...key(1), secret: new Uint8Array(32).fill(77) }]);
    expect(nft.elements('leases4').size).toBe(0);
    expect(await alice.ask(TYPE.PING)).toBeNull();
  });
});

describe('the end', () => {
  it('lets what is under way finish and refuses what is new', async () => {
    const { nft, clock } = fresh();
    const router = await bench.start();
    const client = await bench.client('198.51.100.7');
    const { promise, resolve } = Promise.withResolvers<void>();
    nft.gate = promise;
    expect(await client.lease(SERVER)).toBeNull();
    const drained = router.drain();
    expect(router.readiness()).toMatchObject({ ready: false, reasons: ['shutting down'] });
    expect(await client.lease(OTHER)).toMatchObject({ result: 67, lifetime: 30 });
    const before = bench.network.sent.length;
    nft.gate = null;
    resolve();
    await clock.advance(100);
    await drained;
    expect(bench.network.sent.slice(before).filter(({ from }) => from.port === 45672)).toHaveLength(1);
    expect(nft.elements('leases4').size).toBe(1);
    expect(await client.hello()).toBeNull();
  });
});

describe('a machine that is not what it should be', () => {
  it('does not serve clients whose addresses something masks, and says so once', async () => {
    fresh();
    bench.gateways = [address('172.17.0.1')];
    await bench.start();
    const client = await bench.client('172.17.0.1');
    expect(resultOf(await client.lease(SERVER))).toBe('BAD_ADDRESS');
    expect(resultOf(await client.lease(OTHER))).toBe('BAD_ADDRESS');
    expect(bench.events('masked-client')).toHaveLength(1);
  });

  it('grants nothing new when conntrack is nearly full, and renews', async () => {
    const { clock } = fresh();
    await bench.start();
    const client = await bench.client('198.51.100.7');
    await client.lease(SERVER, { lifetime: 60 });
    bench.usage = { used: 860, max: 1000 };
    await clock.advance(3_000);
    expect(resultOf(await client.lease(OTHER))).toBe('NO_RESOURCES');
    expect(await client.lease(SERVER, { lifetime: 600 })).toMatchObject({ result: 0, lifetime: 600 });
    expect(bench.events('conntrack-nearly-full')).toHaveLength(1);
    bench.usage = { used: 100, max: 1000 };
    await clock.advance(3_000);
    expect(resultOf(await client.lease(OTHER))).toBe('OK');
  });

  it('serves the family that is forwarded', async () => {
    fresh();
    bench.forwarding = { v4: null, v6: 'net.ipv6.conf.all.forwarding is 0' };
    const router = await bench.start();
    expect(resultOf(await (await bench.client('198.51.100.7')).lease(SERVER))).toBe('OK');
    expect(resultOf(await (await bench.client('2a00:7::1')).lease(SERVER6))).toBe('NO_RESOURCES');
    expect(router.readiness().ready).toBe(true);
  });
});

describe('version 1', () => {
  const ask = (destination: Endpoint, port = 0): Uint8Array => encodeLegacyRequest({ destination, port });

  it('is off unless asked for', async () => {
    fresh();
    await bench.start();
    expect(await (await bench.stranger('198.51.100.7')).provoke(ask(SERVER))).toBeNull();
  });

  it('maps, repeats itself, replaces a port, and expires', async () => {
    const { nft, clock } = fresh();
    await bench.start({ legacyV1: true, leaseTime: 60_000 });
    const client = await bench.stranger('198.51.100.7');
    const first = decodeLegacyResponse((await client.provoke(ask(SERVER, 20_007))) ?? new Uint8Array());
    expect(first).toEqual({ destination: SERVER, port: 20_007 });
    expect(decodeLegacyResponse((await client.provoke(ask(SERVER, 20_008))) ?? new Uint8Array())?.port).toBe(20_007);
    const other = decodeLegacyResponse((await client.provoke(ask(OTHER, 20_007))) ?? new Uint8Array());
    expect(other?.port).not.toBe(20_007);
    expect(
      decodeLegacyResponse((await client.provoke(ask({ ...SERVER, port: 80 }, 80))) ?? new Uint8Array())?.port,
    ).toBeGreaterThanOrEqual(20_000);
    expect(nft.elements('leases4').size).toBe(3);
    await clock.advance(70_000);
    expect(nft.elements('leases4').size).toBe(0);
  });

  it('says nothing to what policy denies, and cannot touch what keys hold', async () => {
    const { nft } = fresh();
    await bench.start({ legacyV1: true });
    const client = await bench.stranger('198.51.100.7');
    for (const text of ['10.0.0.1:443', '127.0.0.1:443', '80.0.0.1:443', '93.184.216.34:25']) {
      expect(await client.provoke(ask(endpoint(text)))).toBeNull();
    }
    expect(await client.provoke(ask({ ...SERVER, port: 0 }))).toBeNull();
    const held = await (await bench.client('198.51.100.7')).lease(SERVER, { suggestedPort: 20_001 });
    const mapped = decodeLegacyResponse((await client.provoke(ask(SERVER, 20_001))) ?? new Uint8Array());
    expect(mapped?.port).not.toBe(held?.port);
    expect(nft.elements('leases4').size).toBe(2);
  });
});

describe('status', () => {
  it('shows leases and clients without secrets', async () => {
    fresh();
    const router = await bench.start();
    await (await bench.client('198.51.100.7')).lease(SERVER, { suggestedPort: 20_001 });
    await settle();
    const status = await router.status();
    expect(status).toMatchObject({
      ready: true,
      leases: [{ key: '00000001', client: '198.51.100.7', port: 20_001, destination: '93.184.216.34:443' }],
      clients: [{ address: '198.51.100.7', leases: 1 }],
      listen: ['80.0.0.1:45672', '[2a00:80::1]:45672'],
      flowCount: 0,
      flows: [],
    });
    expect(JSON.stringify(status)).not.toContain('1'.repeat(16));
  });
});

it('opens what the operator allows', async () => {
  fresh();
  const prefix = parsePrefix('10.1.0.0/16');
  if (!prefix) throw new Error('no prefix');
  await bench.start({ allow: [{ prefix, ports: [{ first: 443, last: 443 }] }] });
  const client = await bench.client('198.51.100.7');
  expect(resultOf(await client.lease(endpoint('10.1.2.3:443')))).toBe('OK');
  expect(resultOf(await client.lease(endpoint('10.1.2.3:444')))).toBe('DENIED_DESTINATION');
});

describe('tunnels', () => {
  const prefix = (text: string) => {
    const parsed = parsePrefix(text);
    if (!parsed) throw new Error(text);
    return parsed;
  };
  const VPN = { vpn: { port: 51820, v4: prefix('10.215.0.0/16'), v6: prefix('fd0d:e70::/48') } };
  const clientKey = (n: number): Uint8Array => new Uint8Array(32).fill(n + 1);
  const device = () => bench.tunnels.devices.get('detour-vpn');
  const peers = (): string[] => [...(device()?.peers.keys() ?? [])].map((text) => text.slice(0, 2)).toSorted();
  const inner = (answer: TunnelAnswer): { v4: Address; v6: Address } => {
    const { tunnel } = answer;
    if (tunnel?.kind !== 'client' || !tunnel.v4 || !tunnel.v6) throw new Error(JSON.stringify(answer.result));
    return { v4: tunnel.v4.address, v6: tunnel.v6.address };
  };
  const lets = (): string[] => [...bench.nft.elements('tunnels4').keys(), ...bench.nft.elements('tunnels6').keys()];

  it('are offered by a router that is told to, in a mark of every answer', async () => {
    await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    const hello = await client.hello();
    const answer = await client.router();
    if (answer.tunnel?.kind !== 'router') throw new Error(answer.result);
    expect(answer.tunnel.port).toBe(51820);
    expect(answer.tunnel.publicKey).toEqual(device()?.keys?.publicKey);
    expect(hello?.flags).toBe(tunnelMark(answer.tunnel.publicKey));
    expect(device()).toMatchObject({ up: true, port: 51820, mtu: 1420 });
    expect(device()?.held.map(({ address: one, length }) => `${formatAddress(one)}/${length}`)).toEqual([
      '10.215.0.1/16',
      'fd0d:e70::1/48',
      '198.19.0.1/16',
    ]);
  });

  it('are not offered by one that is not', async () => {
    await fresh().start();
    const client = await bench.client('81.0.0.1');
    expect((await client.hello())?.flags).toBe(0);
    expect((await client.router()).result).toBe('UNSUPPORTED');
    expect((await client.enrol(clientKey(1))).result).toBe('UNSUPPORTED');
    expect(resultOf(await client.leave(clientKey(1)))).toBe('UNSUPPORTED');
    expect(bench.tunnels.devices.size).toBe(0);
  });

  it('are granted once the kernel has them, renewed, and taken back', async () => {
    await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    const first = await client.enrol(clientKey(1));
    expect(first).toMatchObject({ result: 'OK', lifetime: 600, tunnel: { kind: 'client', mtu: 1420 } });
    const { v4, v6 } = inner(first);
    expect(lets()).toEqual([formatAddress(v4), formatAddress(v6)]);
    const [peer] = device()?.peers.values() ?? [];
    expect(peer?.publicKey).toEqual(clientKey(1));
    expect(peer?.allowed.map(({ length }) => length).toSorted()).toEqual([128, 32]);
    await bench.clock.advance(300_000);
    expect((await client.hello())?.result).toBe(0);
    expect(inner(await client.enrol(clientKey(1)))).toEqual({ v4, v6 });
    expect(bench.nft.remaining('tunnels4', formatAddress(v4))).toBeGreaterThan(600);
    expect(bench.events('tunnel-granted')).toHaveLength(1);
    expect(JSON.stringify(bench.lines)).not.toContain(Buffer.from(clientKey(1)).toString('hex'));
    expect(resultOf(await client.leave(clientKey(1)))).toBe('OK');
    expect([peers(), lets()]).toEqual([[], []]);
    expect(resultOf(await client.leave(clientKey(1)))).toBe('OK');
  });

  it('end when they are not renewed', async () => {
    await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    await client.enrol(clientKey(1), 0, 60);
    await bench.clock.advance(75_000);
    expect([peers(), lets()]).toEqual([[], []]);
    expect(bench.events('tunnel-expired')).toHaveLength(1);
  });

  it('give other addresses on request, and those of before are let through no longer', async () => {
    await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    const before = inner(await client.enrol(clientKey(1)));
    const after = inner(await client.enrol(clientKey(1), 1));
    expect(formatAddress(after.v4)).toMatch(/^198\.19\./);
    expect(after.v6).not.toEqual(before.v6);
    expect(lets()).toEqual([formatAddress(after.v4), formatAddress(after.v6)]);
    expect(peers()).toHaveLength(1);
  });

  it('a client that asks for a thousand gets eight, and those that nobody uses make room', async () => {
    await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    const results = new Map<string, number>();
    for (let n = 0; n < 1_000; n++) {
      const bytes = new Uint8Array(32).fill(9);
      bytes.set([n & 255, n >> 8]);
      const { result } = await client.enrol(bytes);
      results.set(result, (results.get(result) ?? 0) + 1);
    }
    expect(results).toEqual(
      new Map([
        ['OK', 8],
        ['QUOTA', 992],
      ]),
    );
    expect(device()?.peers.size).toBe(8);
    const other = await bench.client('82.0.0.1', 2);
    expect((await other.enrol(clientKey(99))).result).toBe('OK');
    await bench.clock.advance(200_000);
    await client.hello();
    expect((await client.enrol(clientKey(50))).result).toBe('OK');
    expect(bench.events('tunnel-abandoned')).toHaveLength(8);
    expect(device()?.peers.size).toBe(2);
  });

  it('are kept by a restart, with their key, owners and times', async () => {
    const first = await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    const key1 = device()?.keys?.publicKey;
    const { v4 } = inner(await client.enrol(clientKey(1)));
    await (await bench.client('82.0.0.1', 2)).enrol(clientKey(2));
    await bench.clock.advance(100_000);
    await first.drain();
    const second = await bench.start({ ...VPN, keys: [key(1)] });
    expect(device()?.keys?.publicKey).toEqual(key1);
    // Its owner has no key any more.
    expect(peers()).toEqual(['02']);
    expect(second.tunnelCount).toBe(1);
    const again = await bench.client('81.0.0.1');
    expect(inner(await again.enrol(clientKey(1))).v4).toEqual(v4);
    await second.drain();
    await bench.clock.advance(700_000);
    await bench.start(VPN);
    expect([peers(), lets()]).toEqual([[], []]);
  });

  it('begin anew, with another key, when the machine lost everything', async () => {
    const first = await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    await client.enrol(clientKey(1));
    const before = device()?.keys?.publicKey;
    await first.drain();
    bench.tunnels.reboot();
    await bench.start(VPN);
    expect(device()?.keys?.publicKey).not.toEqual(before);
    expect([peers(), lets()]).toEqual([[], []]);
  });

  it('come back, with the same key, when somebody removes interface, peers or rules', async () => {
    await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    const { v4 } = inner(await client.enrol(clientKey(1)));
    const before = device()?.keys?.publicKey;
    bench.tunnels.reboot();
    expect((await client.enrol(clientKey(1))).result).toBe('OK');
    expect(device()?.keys?.publicKey).toEqual(before);
    expect(peers()).toEqual(['02']);
    device()?.peers.clear();
    bench.nft.flushRuleset();
    await bench.clock.advance(60_000);
    expect(peers()).toEqual(['02']);
    expect(lets()).toContain(formatAddress(v4));
    expect(bench.events('tunnels-restored')).toHaveLength(1);
  });

  it('go with the key that they were asked with', async () => {
    const router = await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    const { v4, v6 } = inner(await client.enrol(clientKey(1)));
    await router.reload([key(2)]);
    expect([peers(), lets()]).toEqual([[], []]);
    expect(bench.cuts).toEqual([v4, v6].map((one) => ({ client: one, port: null })));
  });

  it('a key of WireGuard cannot be taken by another client', async () => {
    await fresh().start(VPN);
    await (await bench.client('81.0.0.1', 1)).enrol(clientKey(1));
    const thief = await bench.client('82.0.0.1', 2);
    expect((await thief.enrol(clientKey(1))).result).toBe('NOT_AUTHORIZED');
    await thief.leave(clientKey(1));
    expect(peers()).toEqual(['02']);
    expect((await thief.enrol(new Uint8Array(32))).result).toBe('MALFORMED');
  });

  it('a failure of nft or of WireGuard is no grant, and leaves nothing', async () => {
    await fresh().start(VPN);
    const client = await bench.client('81.0.0.1');
    bench.nft.fault = (text) => (text.includes('tunnels4') ? { kind: 'rejected' } : null);
    expect((await client.enrol(clientKey(1))).result).toBe('INTERNAL');
    bench.nft.fault = () => null;
    bench.tunnels.refuses = 'no buffer space';
    expect((await client.enrol(clientKey(1))).result).toBe('INTERNAL');
    expect([peers(), lets()]).toEqual([[], []]);
    bench.tunnels.refuses = null;
    expect((await client.enrol(clientKey(1))).result).toBe('OK');
  });

  it('a machine that cannot carry them says so, with the line that helps', async () => {
    fresh().tunnels.missing = 'this kernel has no WireGuard. host: modprobe wireguard';
    const router = new Router({ ...SETTINGS, ...VPN }, bench.ports());
    await expect(router.start()).rejects.toMatchObject({ exitCode: 69, message: expect.stringContaining('modprobe') });
    const drained = router.drain();
    await bench.clock.advance(5_000);
    await drained;
  });

  it.each([
    ['10.0.0.0/8', 'DETOUR_VPN_NETWORK: 10.215.0.0/16 overlaps with 10.0.0.0/8'],
    ['fd0d:e70:0:1::/64', 'DETOUR_VPN_NETWORK: fd0d:e70::/48 overlaps with fd0d:e70:0:1::/64'],
  ])('a network of its own in the way is no start: %s', async (network, message) => {
    fresh().tunnels.foreign.push({ to: prefix(network), table: 254, index: 2 });
    const router = new Router({ ...SETTINGS, ...VPN }, bench.ports());
    await expect(router.start()).rejects.toMatchObject({ exitCode: 78, message: expect.stringContaining(message) });
    const drained = router.drain();
    await bench.clock.advance(5_000);
    await drained;
  });

  it('does without the reserve where that is in the way', async () => {
    fresh().tunnels.foreign.push({ to: prefix('198.18.0.0/15'), table: 254, index: 2 });
    await bench.start(VPN);
    const client = await bench.client('81.0.0.1');
    expect(formatAddress(inner(await client.enrol(clientKey(1), 1)).v4)).toMatch(/^10\.215\./);
  });
});

describe('in-band transit', () => {
  const CLIENT = '198.51.100.7';

  it('is off unless asked for, and then every HELLO and PING names a port that the kernel has', async () => {
    const { nft, clock } = fresh();
    const router = await bench.start({ inband: true });
    const client = await bench.stranger(CLIENT);
    const hello = await client.hello();
    const key = `${CLIENT} . ${hello?.capabilityPort}`;
    expect(hello).toMatchObject({ result: 0, lifetime: 120, port: 0 });
    expect([...nft.elements('auth4')]).toEqual([[key, '']]);
    expect(nft.remaining('auth4', key)).toBe(125);
    await clock.advance(60_000);
    const ping = await client.ask(TYPE.PING);
    expect(ping?.capabilityPort).toBe(hello?.capabilityPort);
    expect(nft.remaining('auth4', key)).toBe(125);
    expect(router.capabilityCount).toBe(1);
    expect(await router.status()).toMatchObject({ inband: [{ client: CLIENT, port: hello?.capabilityPort }] });
    await clock.advance(130_000);
    expect(nft.elements('auth4').size).toBe(0);
    expect(router.capabilityCount).toBe(0);
  });

  it('extends them on kernels that do not refresh elements, too', async () => {
    const { nft, clock } = fresh();
    nft.refreshes = false;
    await bench.start({ inband: true });
    const client = await bench.stranger(CLIENT);
    const port = (await client.hello())?.capabilityPort;
    await clock.advance(90_000);
    expect((await client.ask(TYPE.PING))?.capabilityPort).toBe(port);
    expect(nft.remaining('auth4', `${CLIENT} . ${port}`)).toBe(125);
  });

  it('gives each session its own port, one of a lease never, and a lease never one of them', async () => {
    const { nft } = fresh();
    await bench.start({ inband: true, ports: { first: 20000, last: 20003 } });
    const speakers = [await bench.client(CLIENT), await bench.client(CLIENT)];
    expect(nft.elements('auth4').size).toBe(2);
    const [one] = speakers;
    const leases = [await one?.lease(SERVER), await one?.lease(OTHER)];
    expect(leases.map((answer) => answer?.result)).toEqual([0, 0]);
    const used = [...nft.elements('auth4').keys(), ...nft.elements('leases4').keys()];
    expect(new Set(used).size).toBe(4);
    expect(resultOf((await one?.lease(endpoint('93.184.216.36:443'))) ?? null)).toBe('NO_RESOURCES');
    expect((await (await bench.stranger(CLIENT)).hello())?.capabilityPort).toBe(0);
  });

  it('has none over IPv6, and none for a client whose address is masked', async () => {
    const { nft } = fresh();
    await bench.start({ inband: true });
    expect((await (await bench.stranger('2a00:7::1')).hello())?.capabilityPort).toBe(0);
    expect((await (await bench.stranger('80.0.0.254')).hello())?.capabilityPort).toBe(0);
    expect(nft.elements('auth4').size).toBe(0);
  });

  it('answers without a port when nft fails', async () => {
    const { nft } = fresh();
    await bench.start({ inband: true });
    nft.fault = (text) => (text.includes('auth4') && text.startsWith('add element') ? { kind: 'rejected' } : null);
    const client = await bench.stranger(CLIENT);
    expect(await client.hello()).toMatchObject({ result: 0, capabilityPort: 0 });
    nft.fault = () => null;
    expect((await client.ask(TYPE.PING))?.capabilityPort).toBeGreaterThanOrEqual(20000);
  });

  it('goes on with the same ports after a restart, without those of keys that are gone', async () => {
    const { nft, clock } = fresh();
    const first = await bench.start({ inband: true });
    const client = await bench.client(CLIENT, 1);
    const port = (await client.ask(TYPE.PING))?.capabilityPort;
    await bench.client('198.51.100.8', 2);
    await clock.advance(20_000);
    const drained = first.drain();
    await clock.advance(5_000);
    await drained;
    await bench.start({ inband: true, keys: [key(1)] });
    expect([...nft.elements('auth4').keys()]).toEqual([`${CLIENT} . ${port}`]);
    expect(nft.remaining('auth4', `${CLIENT} . ${port}`)).toBeLessThanOrEqual(100);
    expect((await client.hello())?.capabilityPort).toBe(port);
  });

  it('goes with its key, and its flows with it', async () => {
    const { nft } = fresh();
    const router = await bench.start({ inband: true });
    const port = (await (await bench.stranger(CLIENT, 2)).hello())?.capabilityPort;
    await router.reload([key(1)]);
    expect(nft.elements('auth4').size).toBe(0);
    expect(bench.cuts).toEqual([{ client: address(CLIENT), port }]);
  });

  it('comes back when somebody flushed the rules, and no rule knows of it when it is switched off', async () => {
    const { nft, clock } = fresh();
    const router = await bench.start({ inband: true });
    const client = await bench.client(CLIENT);
    const port = (await client.ask(TYPE.PING))?.capabilityPort;
    nft.flushRuleset();
    await clock.advance(40_000);
    expect([...nft.elements('auth4').keys()]).toEqual([`${CLIENT} . ${port}`]);
    const drained = router.drain();
    await clock.advance(5_000);
    await drained;
    await bench.start();
    expect(nft.rules('syn').join()).not.toContain('auth4');
    expect((await client.hello())?.capabilityPort).toBe(0);
  });
});

describe('announcements', () => {
  const HOST = '93.184.216.34';
  const HOST6 = '2606:2800::1';
  const PORTS = [
    { first: 443, last: 443 },
    { first: 8000, last: 8009 },
  ];
  const at = (port: number, host = HOST): Endpoint => ({ address: address(host), port });
  const announce = (speaker: Speaker, server: Endpoint, over: object = {}): Promise<Response | null> =>
    speaker.ask(TYPE.ANNOUNCE, { destination: server, protocol: PROTOCOL_TCP, lifetime: 600, ...over });
  const withdraw = (speaker: Speaker, server: Endpoint): Promise<Response | null> =>
    speaker.ask(TYPE.RELEASE, { destination: server, protocol: PROTOCOL_TCP, flags: FLAG_ANNOUNCED });

  it('are UNSUPPORTED unless the operator names ports', async () => {
    fresh();
    await bench.start();
    const server = await bench.client(HOST);
    expect(resultOf(await announce(server, at(443)))).toBe('UNSUPPORTED');
    expect(resultOf(await withdraw(server, at(443)))).toBe('UNSUPPORTED');
  });

  it('are made at the port of the server, renewed, and taken back', async () => {
    const { nft, clock } = fresh();
    const router = await bench.start({ announce: PORTS });
    const server = await bench.client(HOST);
    expect(await announce(server, at(443))).toMatchObject({ result: 0, port: 443, lifetime: 600 });
    expect([...nft.elements('announced4')]).toEqual([['443', `${HOST} . 443`]]);
    expect(nft.remaining('announced4', '443')).toBe(605);
    await clock.advance(100_000);
    expect(await announce(server, at(443))).toMatchObject({ result: 0, lifetime: 600 });
    expect(nft.remaining('announced4', '443')).toBe(605);
    expect(await router.status()).toMatchObject({ announced: [{ key: '00000001', server: `${HOST}:443` }] });
    expect(await withdraw(server, at(443))).toMatchObject({ result: 0, port: 0 });
    expect(nft.elements('announced4').size).toBe(0);
    expect(await withdraw(server, at(443))).toMatchObject({ result: 0 });
    const server6 = await bench.client(HOST6);
    expect(await announce(server6, at(8001, HOST6))).toMatchObject({ result: 0, port: 8001 });
    expect([...nft.elements('announced6')]).toEqual([['8001', `${HOST6} . 8001`]]);
    await clock.advance(610_000);
    expect(nft.elements('announced6').size).toBe(0);
    expect(await router.status()).toMatchObject({ announced: [] });
  });

  it('are for the server’s own address and the operator’s ports, where nothing listens', async () => {
    const { nft } = fresh();
    await bench.start({ announce: PORTS });
    const server = await bench.client(HOST);
    expect(resultOf(await announce(server, at(443, '93.184.216.35')))).toBe('DENIED_DESTINATION');
    expect(resultOf(await announce(server, at(444)))).toBe('DENIED_DESTINATION');
    expect(resultOf(await announce(server, at(0)))).toBe('MALFORMED');
    expect(resultOf(await announce(server, at(443), { protocol: 17 }))).toBe('UNSUPPORTED');
    const inside = await bench.client('192.168.1.2');
    expect(resultOf(await announce(inside, at(443, '192.168.1.2')))).toBe('DENIED_DESTINATION');
    bench.listening = [443];
    expect(resultOf(await announce(server, at(443)))).toBe('NO_RESOURCES');
    expect(nft.elements('announced4').size).toBe(0);
  });

  it('belong to the first server and key that asks', async () => {
    const { nft, clock } = fresh();
    await bench.start({ announce: PORTS });
    const first = await bench.client(HOST);
    await announce(first, at(443));
    const other = await bench.client('93.184.216.35', 2);
    expect(resultOf(await announce(other, at(443, '93.184.216.35')))).toBe('NO_RESOURCES');
    expect(await withdraw(other, at(443))).toMatchObject({ result: 0 });
    const stolen = await bench.client(HOST, 2);
    expect(resultOf(await announce(stolen, at(443)))).toBe('NO_RESOURCES');
    expect([...nft.elements('announced4')]).toEqual([['443', `${HOST} . 443`]]);
    for (let port = 8000; port < 8007; port++) expect(resultOf(await announce(first, at(port)))).toBe('OK');
    expect(resultOf(await announce(first, at(8007)))).toBe('QUOTA');
    await clock.advance(606_000);
    const later = await bench.client('93.184.216.35', 2);
    expect(resultOf(await announce(later, at(443, '93.184.216.35')))).toBe('OK');
  });

  it('outlive a restart, a flush and not their key', async () => {
    const { nft, clock } = fresh();
    const first = await bench.start({ announce: PORTS });
    await announce(await bench.client(HOST), at(443));
    await announce(await bench.client('93.184.216.35', 2), at(8000, '93.184.216.35'));
    const drained = first.drain();
    await clock.advance(5_000);
    await drained;
    const second = await bench.start({ announce: PORTS });
    expect(nft.elements('announced4').size).toBe(2);
    nft.flushRuleset();
    await clock.advance(40_000);
    expect(nft.elements('announced4').size).toBe(2);
    await second.reload([key(1)]);
    expect([...nft.elements('announced4').keys()]).toEqual(['443']);
  });
});
