import { describe, expect, it } from 'vitest';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { type Direction, expectedSha256, startServer, startTransfer, type Transfer } from '../lab/traffic.ts';
import { detoursAre, pathBy, World } from './world.ts';

const SERVER = '10.81.0.2:5000';
/** `make bench` does it 200 times. */
const KILLS = 10;

describe.runIf(requireRoot('tests of agents that die and ways that flap'))('over and over', () => {
  it('the agent is killed during transfers: all arrive whole, and the last agent adopts what is still open', async () => {
    await using world = await World.create('endurance', { rateMbit: 10, detours: 2 });
    await startServer(world.server);
    await world.startRouters();
    const bytes = 6_000_000;
    const begin = (direction: Direction): Transfer => startTransfer(world.client, { to: SERVER, bytes, direction });
    const all: Transfer[] = [];
    const current: Record<Direction, Transfer | null> = { up: null, down: null };
    for (let kill = 0; kill < KILLS; kill++) {
      for (const direction of ['up', 'down'] as const) {
        if (current[direction]?.program.running) continue;
        const transfer = begin(direction);
        current[direction] = transfer;
        all.push(transfer);
      }
      const agent = await world.startAgent();
      // At any moment of an agent's life: right after its start, while it asks for leases, while it joins, later.
      const until = performance.now() + ((kill * 97) % 400);
      await waitUntil(() => performance.now() >= until, { deadlineMs: 1_000, what: 'the moment', everyMs: 5 });
      await agent.program.stop('SIGKILL');
    }
    const open = startTransfer(world.client, { to: SERVER, bytes: 1_000_000_000 });
    open.result.catch(() => undefined);
    const last = await world.startAgent();
    await detoursAre(last.status, 'up');
    await waitUntil(
      async () => (await last.status()).connections.some((one) => pathBy(one, 'detour1') && pathBy(one, 'detour2')),
      { deadlineMs: 30_000, what: 'the last agent to have all paths' },
    );
    for (const { result } of all) {
      const { sha256, mptcp } = await result;
      expect({ sha256, mptcp }).toEqual({ sha256: expectedSha256('detour', bytes), mptcp: true });
    }
    await open.program.stop('SIGKILL');
  });

  it('a way flaps at 1 Hz: joins stay within the budget, nothing leaks, and the transfer arrives whole', async () => {
    await using world = await World.create('endurance', { rateMbit: 10, detours: 2 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const bytes = 35_000_000;
    const transfer = startTransfer(world.client, { to: SERVER, bytes });
    const from = performance.now();
    for (let flap = 0; flap < 20; flap++) {
      await (flap % 2 === 0 ? detour.way.blackhole() : detour.way.restore());
      const until = from + (flap + 1) * 1_000;
      await waitUntil(() => performance.now() >= until, { deadlineMs: 5_000, what: 'half a period', everyMs: 20 });
    }
    await detour.way.restore();
    const result = await transfer.result;
    expect(result.sha256).toBe(expectedSha256('detour', bytes));
    // Each attempt after a failure waits at least twice as long: ten falls cannot cause more than one join each.
    expect(result.paths.length).toBeLessThanOrEqual(3 + 10);
    await waitUntil(
      async () => {
        const left = await world.client.exec(['ss', '-tnH', 'state', 'connected', 'dst', detour.v4]);
        return left.trim() === '';
      },
      { deadlineMs: 60_000, what: 'the last subflow to end with its connection', everyMs: 500 },
    );
  });
});
