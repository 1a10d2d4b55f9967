import { describe, expect, it } from 'vitest';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, pathBy, type StatusConnection, type StatusPath, World } from './world.ts';

const SERVER = '10.81.0.2:5000';

const direct = ({ paths }: StatusConnection): StatusPath | undefined => paths.find(({ kind }) => kind === 'direct');
const delivered = ({ paths }: StatusConnection): number =>
  paths.reduce((sum, { deliveredBytes }) => sum + deliveredBytes, 0);

describe.runIf(requireRoot('tests of paths that break and are mended'))('the agent mends', () => {
  it('a direct way that was silent: it is used again soon after it is back, on a subflow of its own', async () => {
    await using world = await World.create('paths', { rateMbit: 10 });
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const bytes = 40_000_000;
    const transfer = startTransfer(world.client, { to: SERVER, bytes });
    const before = await connectionIs(
      agent.status,
      SERVER,
      'both ways to carry',
      (one) => (pathBy(one, 'detour1')?.deliveredBytes ?? 0) > 1_000_000 && delivered(one) > 3_000_000,
    );
    const old = direct(before)?.local;
    await world.direct.blackhole();
    await connectionIs(agent.status, SERVER, 'the detour to carry on alone', (one) => {
      const at = pathBy(one, 'detour1')?.deliveredBytes ?? 0;
      return at > (pathBy(before, 'detour1')?.deliveredBytes ?? 0) + 4_000_000;
    });
    await world.direct.restore();
    await connectionIs(agent.status, SERVER, 'the direct way to carry again', (one) => {
      const path = direct(one);
      return path?.state === 'active' && path.local !== old && path.deliveredBytes > 300_000;
    });
    expect(await agent.metrics()).toMatch(/detour_client_decisions_total\{act="repair"\} [1-9]/);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', bytes));
  });

  it('a detour that was silent, although the server is full and counts the path that it lost', async () => {
    await using world = await World.create('paths', { rateMbit: 10, detours: 2 });
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const bytes = 60_000_000;
    const transfer = startTransfer(world.client, { to: SERVER, bytes });
    await connectionIs(agent.status, SERVER, 'all ways to carry', (one) =>
      [null, 'detour1', 'detour2'].every((by) => (pathBy(one, by)?.deliveredBytes ?? 0) > 1_000_000),
    );
    await detour.way.blackhole();
    await waitUntil(
      async () => (await agent.status()).detours.some(({ name, state }) => name === 'detour1' && state === 'down'),
      { deadlineMs: 40_000, what: 'the agent to find the detour gone' },
    );
    await detour.way.restore();
    await connectionIs(
      agent.status,
      SERVER,
      'its path to carry again',
      (one) => (pathBy(one, 'detour1')?.deliveredBytes ?? 0) > 300_000,
    );
    expect(await agent.metrics()).not.toContain('outcome="limit"');
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', bytes));
  });

  it('a direct subflow that was killed', async () => {
    await using world = await World.create('paths', { rateMbit: 10, detours: 2 });
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const bytes = 40_000_000;
    const transfer = startTransfer(world.client, { to: SERVER, bytes });
    const before = await connectionIs(
      agent.status,
      SERVER,
      'all ways to carry',
      (one) => Boolean(pathBy(one, 'detour1') && pathBy(one, 'detour2')) && delivered(one) > 3_000_000,
    );
    const old = direct(before)?.local ?? '';
    await world.client.exec(['ss', '-K', 'dst', '10.81.0.2', 'sport', '=', `:${old.split(':')[1]}`]);
    // The server takes two more than the first one, which this now is not: one of the detours has to go.
    await connectionIs(agent.status, SERVER, 'the direct way to carry again', (one) => {
      const path = direct(one);
      return path?.state === 'active' && path.local !== old && path.deliveredBytes > 300_000;
    });
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', bytes));
  });
});

describe.runIf(requireRoot('tests of detours that are no help'))('the agent does no harm', () => {
  it.each(['up', 'down'] as const)(
    'by a detour that is much too slow (%s): it is in reserve before it costs much',
    async (direction) => {
      await using world = await World.create('paths', { rateMbit: 20 });
      const [detour] = world.detours;
      if (!detour) throw new Error('no detour');
      await detour.way.shape({ rateMbit: 1, queueMs: 400 });
      await startServer(world.server);
      const bytes = 50_000_000;
      const control = await startTransfer(world.client, { to: SERVER, bytes, direction }).result;
      await world.startRouters();
      const agent = await world.startAgent();
      await detoursAre(agent.status, 'up');
      const transfer = startTransfer(world.client, { to: SERVER, bytes, direction });
      await connectionIs(agent.status, SERVER, 'the detour to be in reserve', (one) =>
        one.paths.some(({ kind, backup, verdict }) => kind === 'nat' && backup && verdict !== null),
      );
      const result = await transfer.result;
      expect(result.sha256).toBe(expectedSha256('detour', bytes));
      console.info(`${direction}: alone ${control.mbps.toFixed(1)} Mbit/s, with the agent ${result.mbps.toFixed(1)}`);
      // Measured 0.96 to 0.98; without the early look 0.63 (up) and 0.81 (down).
      expect(result.mbps / control.mbps).toBeGreaterThan(0.85);
    },
  );
});
