import { describe, expect, it } from 'vitest';
import { type Host, requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, isInUse, type StatusConnection, type StatusPath, World } from './world.ts';

const SERVER = '10.81.0.2:5000';
/** The server's address on its link with the detour's host, which here is just another router. */
const SECOND = '10.83.1.2';
const BYTES = 25_000_000;

const second = ({ paths }: StatusConnection): StatusPath | undefined =>
  paths.find((path) => path.remote === `${SECOND}:5000` && isInUse(path));

async function announce(world: World): Promise<void> {
  const [detour] = world.detours;
  if (!detour) throw new Error('no detour');
  await detour.host.forward();
  await world.gateway.route(`10.83.1.0/30 via ${detour.v4}`);
  await world.server.exec(['ip', 'mptcp', 'endpoint', 'add', SECOND, 'dev', 'to-detour1', 'signal']);
}

const received = async (host: Host, from: string): Promise<number> => {
  const text = await host.exec(['ss', '-tniOH', 'dst', from]);
  return [...text.matchAll(/ bytes_acked:(\d+)/g)].reduce((sum, [, bytes]) => sum + Number(bytes), 0);
};

describe.runIf(requireRoot('tests of announced addresses'))('an address that the server announces', () => {
  it('carries a part of the connection when asked for', async () => {
    await using world = await World.create('announced', { rateMbit: 10 });
    await announce(world);
    await startServer(world.server);
    const agent = await world.startAgent({ DETOUR_STRATEGY: 'auto,announced', DETOUR_TARGETS: '10.0.0.0/8' });
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    const connection = await connectionIs(
      agent.status,
      SERVER,
      'the second address to carry',
      (one) => (second(one)?.deliveredBytes ?? 0) > 1_000_000,
    );
    expect(second(connection)).toMatchObject({ kind: 'direct', detour: null });
    expect(await received(world.client, SECOND)).toBeGreaterThan(1_000_000);
    // What it takes back ends.
    await world.server.exec(['ip', 'mptcp', 'endpoint', 'flush']);
    await connectionIs(agent.status, SERVER, 'its end', (one) => second(one) === undefined);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
  });

  it('is nobody’s destination when not asked for, nor when it is no target', async () => {
    await using world = await World.create('announced', { rateMbit: 10 });
    await announce(world);
    await startServer(world.server);
    for (const settings of [{}, { DETOUR_STRATEGY: 'auto,announced' }]) {
      const agent = await world.startAgent(settings);
      const transfer = startTransfer(world.client, { to: SERVER, bytes: 5_000_000 });
      await waitUntil(async () => /detour_client_events_total\{kind="announced"\} [1-9]/.test(await agent.metrics()), {
        deadlineMs: 10_000,
        what: 'the agent to hear of it',
      });
      const result = await transfer.result;
      expect(result.paths.map(({ local }) => local)).toEqual(['10.81.0.2']);
      await agent.program.stop();
    }
  });
});
