import { describe, expect, it } from 'vitest';
import { renderRedirections } from '../../appliance/client/redirect.ts';
import { systemHandshake } from '../../appliance/kernel/handshake.ts';
import { openNamespace } from '../../appliance/kernel/namespaces.ts';
import { parseEndpoint } from '../../appliance/protocol/address.ts';
import { call } from '../lab/caller.ts';
import { type Host, requireRoot, waitUntil } from '../lab/netns.ts';
import { startMessages, startServer } from '../lab/traffic.ts';
import {
  connectionIs,
  type Detour,
  detoursAre,
  hostState,
  type Status,
  type StatusConnection,
  World,
} from './world.ts';

const V4 = '10.81.0.2';
const V6 = 'fd81::2';
const SERVER = `${V4}:5000`;
const ON = { DETOUR_RESCUE: 'on' };
const RELAYS = { DETOUR_RELAY: 'mptcp' };

type Rescue = { readonly server: string; readonly state: string; readonly detour: string | null };

async function rescuesAre(
  status: () => Promise<Status>,
  what: string,
  holds: (rescues: readonly Rescue[]) => boolean,
): Promise<void> {
  let last: unknown;
  await waitUntil(
    async () => {
      const now: Status & { readonly rescues?: readonly Rescue[] } = await status();
      last = now;
      return now.rescues !== undefined && holds(now.rescues);
    },
    { deadlineMs: 30_000, what },
  ).catch((error: unknown) => {
    throw new Error(`${error instanceof Error ? error.message : error}; status: ${JSON.stringify(last)}`);
  });
}

const rescued = (status: () => Promise<Status>, server: string): Promise<void> =>
  rescuesAre(status, `${server} to be rescued`, (all) =>
    all.some((one) => one.server === server && one.state === 'rescued'),
  );

const notRescued = (status: () => Promise<Status>): Promise<void> =>
  rescuesAre(status, 'no rescue to be left', (all) => all.length === 0);

const noConnections = (status: () => Promise<Status>): Promise<unknown> =>
  waitUntil(async () => (await status()).connections.length === 0, {
    deadlineMs: 20_000,
    what: 'the connections to be forgotten',
  });

/** The path that is a connection's first subflow, led through a detour. */
const ledPath = (one: StatusConnection) => one.paths.find((path) => 'rescued' in path && path.state === 'active');

const directPath = (one: StatusConnection) =>
  one.paths.find((path) => path.kind === 'direct' && path.state === 'active');

const ruleset = (host: Host): Promise<string> => host.exec(['nft', 'list', 'ruleset']);

/** A world whose detours let new connections through, with server and routers running. */
async function open(environment: Readonly<Record<string, string>> = RELAYS): Promise<World & { detour: Detour }> {
  const world = await World.create('rescue');
  const [detour] = world.detours;
  if (!detour) throw new Error('no detour');
  await startServer(world.server);
  await world.startRouter(detour, environment);
  return Object.assign(world, { detour });
}

/** With somebody else's translation on the host every connection is tracked, from its first SYN on. */
const track = (host: Host): Promise<string> =>
  host.nft('table ip other { chain out { type nat hook postrouting priority 100; oifname "elsewhere" masquerade; }; }');

describe.runIf(requireRoot('tests of rescue'))('a server that does not answer directly', () => {
  it.each([
    ['IPv4', V4, `${V4}:5000`, false],
    ['IPv6', V6, `[${V6}]:5000`, false],
    ['IPv4, on a host that tracks connections', V4, `${V4}:5000`, true],
  ])('is reached through a detour, and directly again when it answers: %s', async (_, to, server, tracked) => {
    await using world = await open();
    if (tracked) await track(world.client);
    const before = await hostState(world.client);
    // The control arm: the same agent without rescue.
    const without = await world.startAgent();
    await detoursAre(without.status, 'up');
    await world.direct.blackhole();
    expect(await call(world.client, to, { limitS: 4 })).toMatchObject({ connected: false, why: 'timed out' });
    await without.program.stop();

    const agent = await world.startAgent(ON);
    await detoursAre(agent.status, 'up');
    const first = await call(world.client, to);
    expect(first).toMatchObject({ connected: true, peer: to });
    // By its second SYN, after one second; the third would leave after two.
    expect(first.ms).toBeLessThan(1_900);
    await rescued(agent.status, server);
    expect(await agent.metrics()).toContain('detour_client_rescues_total{what="began"} 1');
    const next = await call(world.client, to);
    expect(next.ms).toBeLessThan(700);
    await next.speak();
    const connection = await connectionIs(agent.status, server, 'the detour to be named', (one) =>
      Boolean(ledPath(one)),
    );
    expect(ledPath(connection)).toMatchObject({ kind: 'nat', remote: server });
    expect(connection.paths.filter(({ kind, state }) => kind === 'nat' && state === 'active').length).toBe(1);

    await world.direct.restore();
    await notRescued(agent.status);
    const direct = await call(world.client, to);
    expect(direct.ms).toBeLessThan(700);
    await direct.speak();
    await waitUntil(
      async () => {
        const { connections } = await agent.status();
        return connections.length === 3 && connections.every((one) => directPath(one));
      },
      { deadlineMs: 20_000, what: 'direct paths for those that were rescued' },
    );
    for (const one of [first, next, direct]) {
      await one.speak();
      await one.program.stop();
    }
    await noConnections(agent.status);
    expect((await agent.program.stop()).code).toBe(0);
    expect(await hostState(world.client)).toEqual(before);
  });

  it('is reached through a detour that another interface leads to', async () => {
    await using world = await open();
    const { client, detour } = world;
    const side = await world.lab.link(client, detour.host, { v4: '10.84.0.0/30', devA: 'side', devB: 'side' });
    await client.route(`${detour.v4} via ${side.at(detour.host).v4}`);
    const agent = await world.startAgent(ON);
    const { detours } = await detoursAre(agent.status, 'up');
    expect(detours.map(({ observed }) => observed)).toContain('10.84.0.1');
    await world.direct.blackhole();
    const caller = await call(client, V4);
    expect(caller).toMatchObject({ connected: true, peer: V4 });
    await caller.speak();
    const connection = await connectionIs(agent.status, SERVER, 'the detour to be named', (one) =>
      Boolean(ledPath(one)),
    );
    // The application keeps the address that was chosen for the server.
    expect(ledPath(connection)?.local).toMatch(/^10\.80\.0\.1:/);
  });

  it('is reached at once when a live connection found out before', async () => {
    await using world = await open();
    const agent = await world.startAgent(ON);
    await detoursAre(agent.status, 'up');
    startMessages(world.client, { to: SERVER, count: 10_000 }).result.catch(() => undefined);
    await connectionIs(agent.status, SERVER, 'a path', (one) =>
      one.paths.some(({ kind, state }) => kind === 'nat' && state === 'active'),
    );
    await world.direct.blackhole();
    await rescued(agent.status, SERVER);
    const { ms } = await call(world.client, V4);
    expect(ms).toBeLessThan(700);
  });

  it('is reached at once when another one did not answer', async () => {
    await using world = await open();
    await startServer(world.server, { port: 5001 });
    const agent = await world.startAgent(ON);
    await detoursAre(agent.status, 'up');
    const before = await call(world.client, V4, { port: 5001 });
    await before.speak();
    await before.program.stop();
    await world.direct.blackhole();
    expect((await call(world.client, V4)).connected).toBe(true);
    await rescued(agent.status, `${V4}:5001`);
    const { connected, ms } = await call(world.client, V4, { port: 5001 });
    expect(connected).toBe(true);
    expect(ms).toBeLessThan(700);
  });

  it('is not reached through a detour that relays joins alone, and the log names the remedy', async () => {
    await using world = await open({});
    const before = await ruleset(world.client);
    const agent = await world.startAgent(ON);
    await detoursAre(agent.status, 'up');
    await world.direct.blackhole();
    const { connected, why } = await call(world.client, V4, { limitS: 5 });
    expect({ connected, why }).toEqual({ connected: false, why: 'timed out' });
    expect(await agent.program.waitFor('rescue-impossible')).toContain('DETOUR_RELAY=mptcp');
    await rescuesAre(agent.status, 'to be given up', (all) => all.every(({ state }) => state === 'unreachable'));
    await agent.program.stop();
    expect(await ruleset(world.client)).toBe(before);
  });

  it('is left alone when it speaks only TCP: an application that waits is not refused', async () => {
    await using world = await World.create('rescue');
    await startServer(world.server, { transport: 'tcp' });
    for (const detour of world.detours) await world.startRouter(detour, RELAYS);
    const agent = await world.startAgent(ON);
    await detoursAre(agent.status, 'up');
    await world.direct.blackhole();
    const waiting = call(world.client, V4, { limitS: 20 });
    await agent.program.waitFor('rescue-impossible');
    await world.direct.restore();
    expect(await waiting).toMatchObject({ connected: true, peer: V4 });
  });

  it('is not rescued when it is excluded', async () => {
    await using world = await open();
    const agent = await world.startAgent({ ...ON, DETOUR_EXCLUDE: '10.81.0.0/30' });
    await detoursAre(agent.status, 'up');
    await world.direct.blackhole();
    expect((await call(world.client, V4, { limitS: 3 })).connected).toBe(false);
    expect(await agent.metrics()).not.toMatch(/detour_client_rescues_total\{/);
    expect(await agent.metrics()).not.toMatch(/control_requests_total\{type="lease"/);
  });

  it('that answers is not rescued, whatever becomes of the connection’s own SYN', async () => {
    await using world = await open();
    const agent = await world.startAgent(ON);
    await detoursAre(agent.status, 'up');
    // Something on the way drops what it does not know, and the kernel falls back to TCP after its third SYN.
    await world.gateway.nft(
      'table ip picky { chain through { type filter hook forward priority 0; tcp option mptcp subtype 0 drop; }; }',
    );
    const before = await ruleset(world.client);
    const { connected, ms } = await call(world.client, V4);
    expect(connected).toBe(true);
    expect(ms).toBeGreaterThan(1_900);
    expect(await agent.metrics()).not.toMatch(/detour_client_rescues_total\{/);
    expect(await ruleset(world.client)).toBe(before);
  });
});

describe.runIf(requireRoot('tests of rescue'))('a handshake', () => {
  it('says who answers, who refuses, and who is silent', async () => {
    await using world = await World.create('rescue');
    await startServer(world.server);
    await startServer(world.server, { port: 5001, transport: 'tcp' });
    await world.client.exec(['ip', 'route', 'add', 'unreachable', '10.99.0.0/24']);
    const handshake = systemHandshake(await openNamespace(world.client.path), 0xd7000000);
    const ask = async (to: string, protocol: 'tcp' | 'mptcp'): Promise<string> => {
      const remote = parseEndpoint(to);
      if (!remote) throw new Error(to);
      return handshake.try(remote, protocol, 500);
    };
    for (const host of [V4, `[${V6}]`]) {
      expect(await ask(`${host}:5000`, 'tcp')).toBe('answered');
      expect(await ask(`${host}:5000`, 'mptcp')).toBe('answered');
      expect(await ask(`${host}:5001`, 'tcp')).toBe('answered');
      expect(await ask(`${host}:5001`, 'mptcp')).toBe('refused');
      expect(await ask(`${host}:5002`, 'tcp')).toBe('refused');
    }
    expect(await ask('10.99.0.1:5000', 'tcp')).toBe('silent');
    await world.direct.blackhole();
    for (const host of [V4, `[${V6}]`]) expect(await ask(`${host}:5000`, 'tcp')).toBe('silent');
    expect(await ask(`${V4}:5000`, 'mptcp')).toBe('silent');
  });
});

describe.runIf(requireRoot('tests of rescue'))('the kernel', () => {
  it('asks no rule about a SYN that it tracks already, and translates for as long as a rule needs it', async () => {
    await using world = await open();
    const { client, detour } = world;
    await detour.host.nft(`add element inet detour leases4 { 10.80.0.1 . 25000 timeout 600s : ${V4} . 5000 }`);
    await track(client);
    await world.direct.blackhole();
    const calling = call(client, V4);
    const entry = ['-p', 'tcp', '-d', V4, '--orig-port-dst', '5000'];
    await waitUntil(async () => (await client.exec(['conntrack', '-L', ...entry])).includes('SYN_SENT'), {
      deadlineMs: 5_000,
      what: 'the first SYN to be tracked',
    });
    const [server, to] = [parseEndpoint(SERVER), parseEndpoint(`${detour.v4}:25000`)];
    if (!server || !to) throw new Error('no endpoints');
    await client.nft(renderRedirections([{ server, to }], { mark: 0xd7000000, mask: 0xff000000 }));
    const repeated = async (times: number): Promise<boolean> =>
      Number(/^TcpExtTCPSynRetrans\s+(\d+)/m.exec(await client.exec(['nstat', '-asz']))?.[1]) >= times;
    await waitUntil(() => repeated(1), { deadlineMs: 5_000, what: 'a second SYN' });
    expect(await client.exec(['conntrack', '-L', ...entry])).toContain('[UNREPLIED]');
    await client.exec(['conntrack', '-D', ...entry]);
    const caller = await calling;
    // The fourth SYN would ask for TCP alone.
    expect(caller).toMatchObject({ connected: true, peer: V4 });
    await caller.speak();
    await client.nft('delete table inet detour_rescue');
    // Somebody else's rule needs the translation, too.
    await caller.speak();
    await client.nft('delete table ip other');
    await expect(caller.speak(2_000)).rejects.toThrow('echo');
  });
});

describe.runIf(requireRoot('tests of rescue'))('what rescue puts on a host', () => {
  it('goes at the end, but for what a live connection needs, and the next agent sees to the rest', async () => {
    await using world = await open();
    const before = await ruleset(world.client);
    const agent = await world.startAgent(ON);
    await detoursAre(agent.status, 'up');
    await world.direct.blackhole();
    const caller = await call(world.client, V4);
    await caller.speak();
    await connectionIs(agent.status, SERVER, 'the detour to be named', (one) => Boolean(ledPath(one)));
    expect((await agent.program.stop()).code).toBe(0);
    // Nobody new is led anywhere, and who was goes on.
    expect(await ruleset(world.client)).not.toContain(V4);
    expect((await call(world.client, V4, { limitS: 2 })).connected).toBe(false);
    await caller.speak();
    const second = await world.startAgent(ON);
    await detoursAre(second.status, 'up');
    await connectionIs(second.status, SERVER, 'the detour to be named again', (one) => Boolean(ledPath(one)));
    await caller.speak();
    await caller.program.stop();
    await world.direct.restore();
    await waitUntil(async () => (await ruleset(world.client)).includes('detour_rescue') === false, {
      deadlineMs: 30_000,
      what: 'the table to go with the last connection that needs it',
    });
    await second.program.stop();
    expect(await ruleset(world.client)).toBe(before);
  });

  it.each([
    ['cleanup', (world: World) => world.command(['cleanup', 'client'])],
    [
      'the next start without rescue',
      async (world: World) => {
        const agent = await world.startAgent();
        await agent.program.stop();
      },
    ],
    [
      'the next start with rescue',
      async (world: World) => {
        const agent = await world.startAgent(ON);
        await agent.program.stop();
      },
    ],
  ])('goes with %s after a crash', async (_, act) => {
    await using world = await open();
    const before = await hostState(world.client);
    const agent = await world.startAgent(ON);
    await detoursAre(agent.status, 'up');
    await world.direct.blackhole();
    const caller = await call(world.client, V4);
    await caller.program.stop();
    await rescued(agent.status, SERVER);
    await noConnections(agent.status);
    await agent.program.stop('SIGKILL');
    expect(await ruleset(world.client)).toContain(`${V4} . 5000`);
    await act(world);
    expect(await hostState(world.client)).toEqual(before);
  });
});
