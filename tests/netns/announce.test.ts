import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { type Host, type Running, requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connect } from './stage.ts';
import { hostState, World } from './world.ts';

/** A server that has its detours announced (`DETOUR_ANNOUNCE`), and a client without any software of ours. */

const SERVER = '10.81.0.2:5000';
const BYTES = 12_000_000;
const ANNOUNCING = { DETOUR_ROLE: 'server', DETOUR_ANNOUNCE: '5000' };

const endpoints = (host: Host): Promise<string> => host.exec(['ip', 'mptcp', 'endpoint', 'show']);
/** Bytes that the other end of a host's subflows there has acknowledged. */
const sent = async (host: Host, to: string): Promise<number> => {
  const text = await host.exec(['ss', '-tniOH', 'dst', to]);
  return [...text.matchAll(/ bytes_acked:(\d+)/g)].reduce((sum, [, bytes]) => sum + Number(bytes), 0);
};

describe.runIf(requireRoot('tests of announced detours'))('detours that a server announces', () => {
  let world: World;
  let before: Record<string, string>;
  let router: Running;
  const detour = () => {
    const [first] = world.detours;
    if (!first) throw new Error('no detour');
    return first;
  };

  beforeAll(async () => {
    world = await World.create('announce', { rateMbit: 10 });
    before = await hostState(world.server);
    await startServer(world.server);
    // A stock client that takes up what it is told.
    await world.client.exec(['ip', 'mptcp', 'limits', 'set', 'subflow', '2', 'add_addr_accepted', '2']);
    router = await world.startRouter(detour(), { DETOUR_ANNOUNCE_PORTS: '5000,8000-8010' });
  });
  afterAll(() => world?.[Symbol.asyncDispose]());
  let running: Running | null = null;
  afterEach(async () => {
    await running?.stop();
    running = null;
  });

  /** Starts the server's agent and waits until the detour said yes for both families. */
  async function announcing(): ReturnType<World['startAgent']> {
    const agent = await world.startAgent(ANNOUNCING, world.server);
    running = agent.program;
    await waitUntil(async () => (await endpoints(world.server)).includes(detour().v4), {
      deadlineMs: 20_000,
      what: 'the detour to be announced',
    });
    return agent;
  }

  const onItsWay = (): Promise<number> =>
    waitUntil(
      async () => {
        const bytes = await sent(world.client, detour().v4);
        return bytes > 1_000_000 && bytes;
      },
      { deadlineMs: 30_000, what: 'a megabyte through the detour' },
    );

  it('carry a part of a stock client’s connection until they are taken back', async () => {
    const agent = await announcing();
    expect(await agent.status()).toMatchObject({
      ready: true,
      sides: ['server'],
      announced: expect.arrayContaining([
        expect.objectContaining({ detour: 'detour1', server: '10.81.0.2', port: 5000, state: 'announced' }),
      ]),
    });
    // For each family.
    expect(await agent.metrics()).toMatch(/detour_client_announcements\{state="announced"\} 2\n/);
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    await onItsWay();
    expect(await agent.program.stop()).toEqual({ code: 0, signal: null });
    await waitUntil(
      async () => (await world.client.exec(['ss', '-tnH', 'state', 'established', 'dst', detour().v4])).trim() === '',
      { deadlineMs: 20_000, what: 'the end of the path' },
    );
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
    expect(await endpoints(world.server)).toBe('');
    expect(await hostState(world.server)).toEqual(before);
    const left = await detour().host.exec(['nft', 'list', 'map', 'inet', 'detour', 'announced4']);
    expect(left).not.toContain('elements');
  });

  it('are announced one connection at a time where the userspace path manager is in charge, at the ports alone', async () => {
    const agent = await world.startAgent({ ...ANNOUNCING, DETOUR_ROLE: 'client,server' }, world.server);
    running = agent.program;
    await waitUntil(async () => (await agent.status()).announced?.some(({ state }) => state === 'announced'), {
      deadlineMs: 20_000,
      what: 'the detour to say yes',
    });
    const elsewhere = await startServer(world.server, { port: 5001 });
    const events = world.client.spawn(['ip', 'mptcp', 'monitor']);
    const other = startTransfer(world.client, { to: '10.81.0.2:5001', bytes: 100_000 });
    expect((await other.result).mptcp).toBe(true);
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    await onItsWay();
    expect(await endpoints(world.server)).toBe('');
    expect(await agent.program.stop()).toEqual({ code: 0, signal: null });
    await waitUntil(
      async () => (await world.client.exec(['ss', '-tnH', 'state', 'established', 'dst', detour().v4])).trim() === '',
      { deadlineMs: 20_000, what: 'the end of the path' },
    );
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
    const announcements = events.lines.filter((line) => line.includes('ANNOUNCED'));
    expect(announcements.filter((line) => line.includes(detour().v4))).toHaveLength(1);
    await events.stop('SIGKILL');
    await elsewhere.stop('SIGKILL');
    expect(await hostState(world.server)).toEqual(before);
  });

  it('lead joins there and nothing else', async () => {
    const agent = await announcing();
    await world.server.nft(
      'add table inet watch\nflush table inet watch\nadd chain inet watch in { type filter hook prerouting priority -400; }\n' +
        'add rule inet watch in ip saddr 10.83.1.1 tcp dport 5000 tcp flags & (syn|ack) == syn counter\n',
    );
    // Nothing listens there, and nobody is led on.
    expect(await connect(world.client, detour().v4, 5000)).toBe('ECONNREFUSED');
    // Any other port of the operator's, as long as no server asked for it.
    expect(await connect(world.client, detour().v4, 8000)).toBe('ECONNREFUSED');
    expect(await world.server.exec(['nft', 'list', 'chain', 'inet', 'watch', 'in'])).toContain('packets 0');
    expect(await agent.program.stop()).toEqual({ code: 0, signal: null });
    await world.server.nft('delete table inet watch\n');
  });

  it('go on while the router restarts, and are found by whoever cleans up after a crash', async () => {
    const agent = await announcing();
    await router.stop('SIGTERM');
    router = await world.startRouter(detour(), { DETOUR_ANNOUNCE_PORTS: '5000,8000-8010' });
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    await onItsWay();
    await agent.program.stop('SIGKILL');
    expect(await endpoints(world.server)).toContain(detour().v4);
    await world.command(['cleanup', 'client'], ANNOUNCING, world.server);
    expect(await endpoints(world.server)).toBe('');
    expect(await hostState(world.server)).toEqual(before);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
  });
});
