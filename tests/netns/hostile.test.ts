import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { type Host, requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, holdConnections, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, pathBy, type StatusConnection, World } from './world.ts';

const SERVER = '10.81.0.2:5000';
const PACKETS = join(import.meta.dirname, '../lab/packets.py');
/** RFC 8684, 3.4.2: REMOVE_ADDR (subtype 4) of address id 0, with the padding that TCP wants. */
const REMOVE_ID_0 = '1e044000';

const carriesBoth = (one: StatusConnection): boolean =>
  (pathBy(one, 'detour1')?.deliveredBytes ?? 0) > 500_000 && (pathBy(one, null)?.deliveredBytes ?? 0) > 500_000;

/** Sockets of the host to the server itself. */
async function directSockets(client: Host): Promise<string[]> {
  const text = await client.exec(['ss', '-tnH', 'state', 'established', 'dst', '10.81.0.2']);
  return text.split('\n').flatMap((line) => line.trim().split(/\s+/)[2] ?? []);
}

describe.runIf(requireRoot('tests of hostile detours and servers'))('a hostile host', () => {
  it('that relays forges REMOVE_ADDR of id 0: all subflows close, and the agent brings them back', async () => {
    await using world = await World.create('hostile', { rateMbit: 10 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    await world.startRouters();
    const bytes = 12_000_000;
    for (const guarded of [false, true]) {
      const agent = await world.startAgent();
      await detoursAre(agent.status, 'up');
      const transfer = startTransfer(world.client, { to: SERVER, bytes });
      const before = await connectionIs(agent.status, SERVER, 'both ways to carry', carriesBoth);
      // The kernel's own doing, with the paths that the agent made.
      if (!guarded) await agent.program.stop('SIGKILL');
      const [old] = await directSockets(world.client);
      const remote = pathBy(before, 'detour1')?.remote ?? '';
      await waitUntil(
        async () => {
          await detour.host.exec(['python3', PACKETS, 'option', detour.way.at(detour.host).dev, remote, REMOVE_ID_0]);
          const now = await directSockets(world.client);
          return old !== undefined && !now.includes(old);
        },
        { deadlineMs: 10_000, what: 'the direct subflow to close', everyMs: 100 },
      );
      if (!guarded) {
        const until = performance.now() + 3_000;
        await waitUntil(() => performance.now() > until, { deadlineMs: 5_000, what: 'three seconds', everyMs: 200 });
        expect(await directSockets(world.client)).toEqual([]);
        expect(transfer.program.running).toBe(true);
        transfer.result.catch(() => undefined);
        await transfer.program.stop('SIGKILL');
        continue;
      }
      const result = await transfer.result;
      expect(result.sha256).toBe(expectedSha256('detour', bytes));
      // The promise is 2 s; a busy machine gets three times that.
      expect(result.longestStallMs).toBeLessThan(6_000);
      expect(result.paths.filter(({ remote: from }) => from === '10.80.0.1').length).toBeGreaterThanOrEqual(2);
    }
  });

  it('that serves announces ten thousand addresses: nobody connects to them, and it costs next to nothing', async () => {
    await using world = await World.create('hostile');
    await startServer(world.server);
    await world.startRouters();
    const device = world.direct.at(world.server).dev;
    const flood = async (count: number) => {
      const sender = world.server.spawn(['python3', PACKETS, 'announce', device, SERVER, '10.90', String(count)]);
      await sender.waitFor('ready');
      return sender;
    };
    const towards = async (): Promise<number> => {
      const text = await world.client.exec(['ss', '-tnaH', 'dst', '10.90.0.0/16']);
      return text.split('\n').filter(Boolean).length;
    };
    // A client that was told to accept announcements does connect: they are genuine.
    await world.client.exec(['ip', 'mptcp', 'limits', 'set', 'subflow', '8', 'add_addr_accepted', '8']);
    const few = await flood(50);
    const control = await holdConnections(world.client, { to: SERVER, count: 1 });
    await waitUntil(
      async () => {
        control.write('check\n');
        return (await towards()) > 0;
      },
      { deadlineMs: 30_000, what: 'the control to connect', everyMs: 100 },
    );
    await control.stop('SIGKILL');
    await few.stop('SIGKILL');

    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const number = async (name: string): Promise<number> => {
      const line = (await agent.metrics()).split('\n').find((one) => one.startsWith(name));
      return Number(line?.split(' ')[1] ?? 0);
    };
    const many = await flood(10_000);
    const cpuBefore = await number('process_cpu_seconds_total');
    const held = await holdConnections(world.client, { to: SERVER, count: 1 });
    // Its answers are what the announcements are made to follow.
    const beat = setInterval(() => held.write('check\n'), 25);
    try {
      await many.waitFor('announced', 60_000);
      await waitUntil(async () => (await number('detour_client_events_total{kind="announced"}')) >= 9_000, {
        deadlineMs: 20_000,
        what: 'the agent to hear of them',
      });
    } finally {
      clearInterval(beat);
    }
    expect(await towards()).toBe(0);
    const { connections } = await agent.status();
    for (const { paths } of connections) expect(paths.length).toBeLessThanOrEqual(2);
    expect(await number('detour_client_control_requests_total{type="lease",result="ok"}')).toBeLessThanOrEqual(2);
    expect((await number('process_cpu_seconds_total')) - cpuBefore).toBeLessThan(10);
  });
});
