import { describe, expect, it } from 'vitest';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer, type Transfer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, isInUse, pathBy, type StatusConnection, type StatusPath, World } from './world.ts';

const SERVER = '10.81.0.2:5000';
const BYTES = 40_000_000;

const direct = ({ paths }: StatusConnection): StatusPath | undefined => paths.find(({ kind }) => kind === 'direct');
const delivered = ({ paths }: StatusConnection): number =>
  paths.reduce((sum, { deliveredBytes }) => sum + deliveredBytes, 0);
const from = (path: StatusPath | undefined, address: string): boolean =>
  path !== undefined &&
  isInUse(path) &&
  path.local?.startsWith(`${address}:`) === true &&
  path.deliveredBytes > 300_000;

/** The client's network gives it another address: what a laptop sees that changes from one network to another. */
async function move(world: World): Promise<void> {
  await world.gateway.exec(['ip', 'addr', 'add', '10.84.0.2/30', 'dev', 'to-client']);
  await world.client.exec(['ip', 'addr', 'del', '10.80.0.1/30', 'dev', 'to-gateway']);
  await world.client.exec(['ip', 'addr', 'add', '10.84.0.1/30', 'dev', 'to-gateway']);
  await world.client.route('default via 10.84.0.2');
}

const received = ({ program }: Transfer): number => {
  const line = program.lines.findLast((one) => one.startsWith('{"event":"progress"'));
  return line === undefined ? 0 : JSON.parse(line).bytes;
};

describe.runIf(requireRoot('tests of a client whose network changes'))('a client that moves', () => {
  it.each(['up', 'down'] as const)('keeps its connection, and both paths run again: %s', async (direction) => {
    await using world = await World.create('roaming', { rateMbit: 10 });
    // The server cannot know that the old subflows are dead, and counts them.
    await world.server.exec(['ip', 'mptcp', 'limits', 'set', 'subflow', '8']);
    const server = await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES, direction });
    await connectionIs(
      agent.status,
      SERVER,
      'both ways to carry',
      (one) => Boolean(pathBy(one, 'detour1')) && delivered(one) > 3_000_000,
    );
    await move(world);
    await connectionIs(
      agent.status,
      SERVER,
      'both ways to carry from the new address',
      (one) => from(direct(one), '10.84.0.1') && from(pathBy(one, 'detour1'), '10.84.0.1'),
    );
    const result = await transfer.result;
    expect(result.sha256).toBe(expectedSha256('detour', BYTES));
    console.info(`${direction}: longest stall ${result.longestStallMs.toFixed(0)} ms`);
    expect(server.running).toBe(true);
    expect(await agent.metrics()).toMatch(/detour_client_network_changes_total [1-9]/);
  });

  it('keeps it on a server that takes two more subflows, as servers do', async () => {
    await using world = await World.create('roaming', { rateMbit: 10 });
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    await connectionIs(
      agent.status,
      SERVER,
      'both ways to carry',
      (one) => Boolean(pathBy(one, 'detour1')) && delivered(one) > 3_000_000,
    );
    await move(world);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
  });

  it('without the agent its connection hangs (control)', async () => {
    await using world = await World.create('roaming', { rateMbit: 10 });
    await startServer(world.server);
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES, direction: 'down' });
    const end = transfer.result.catch(() => null);
    await waitUntil(() => received(transfer) > 2_000_000, { deadlineMs: 20_000, what: 'the transfer to run' });
    await move(world);
    // What was in the queues arrives yet.
    let [last, since] = [0, performance.now()];
    await waitUntil(
      () => {
        const now = received(transfer);
        if (now !== last) [last, since] = [now, performance.now()];
        return performance.now() - since > 8_000;
      },
      { deadlineMs: 30_000, what: 'it to stop' },
    );
    expect(last).toBeLessThan(BYTES / 2);
    transfer.program.killGroup();
    await end;
  });

  it('carries on when its interface was down for a while, and when its route was', async () => {
    await using world = await World.create('roaming', { rateMbit: 10 });
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    const first = await connectionIs(
      agent.status,
      SERVER,
      'both ways to carry',
      (one) => Boolean(pathBy(one, 'detour1')) && delivered(one) > 2_000_000,
    );
    await world.access.down(world.client);
    await connectionIs(agent.status, SERVER, 'the loss to be noticed', (one) => direct(one)?.state === 'failed');
    await world.access.up(world.client);
    await world.client.route('default via 10.80.0.2');
    const second = await connectionIs(
      agent.status,
      SERVER,
      'both ways to carry again',
      (one) =>
        from(direct(one), '10.80.0.1') &&
        direct(one)?.local !== direct(first)?.local &&
        from(pathBy(one, 'detour1'), '10.80.0.1'),
    );
    await world.client.exec(['ip', 'route', 'del', 'default']);
    await detoursAre(agent.status, 'down');
    await world.client.route('default via 10.80.0.2');
    await connectionIs(
      agent.status,
      SERVER,
      'both ways to carry more',
      (one) => direct(one)?.state === 'active' && delivered(one) > delivered(second) + 2_000_000,
    );
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
  });
});
