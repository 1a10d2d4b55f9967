/**
 * A client with two ways out, and a detour that is reached by both:
 *
 *     client === to-gateway === gateway --- server
 *            === to-second ==== second -----+ |
 *                                gateway --- detour1
 */
import { describe, expect, it } from 'vitest';
import { requireRoot } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, isInUse, type StatusConnection, type StatusPath, World } from './world.ts';

const FAMILIES = [
  ['IPv4', '10.81.0.2:5000', '10.80.0.1:', '10.85.0.1:'],
  ['IPv6', '[fd81::2]:5000', '[fd80::1]:', '[fd85::1]:'],
] as const;
const BYTES = 50_000_000;

/** Adds the second way, with routing by source as a host with two providers needs it. */
async function secondWay(world: World) {
  const { client, gateway, server, lab } = world;
  const second = await lab.host('second');
  const link = await lab.link(client, second, { v4: '10.85.0.0/30', v6: 'fd85::/64', rateMbit: 10 });
  await lab.link(second, server, { v4: '10.86.0.0/30', v6: 'fd86::/64' });
  await lab.link(second, gateway, { v4: '10.87.0.0/30', v6: 'fd87::/64' });
  await second.forward();
  for (const [v, to, net, onward, server1, back, home] of [
    ['-4', '10.85.0.2', '10.85.0.0/30', '10.87.0.2', '10.86.0.2', '10.86.0.1', '10.87.0.1'],
    ['-6', 'fd85::2', 'fd85::/64', 'fd87::2', 'fd86::2', 'fd86::1', 'fd87::1'],
  ] as const) {
    const source = v === '-4' ? '10.85.0.1' : 'fd85::1';
    await client.exec(['ip', v, 'route', 'add', 'default', 'via', to, 'dev', 'to-second', 'table', '200']);
    await client.exec(['ip', v, 'rule', 'add', 'from', source, 'lookup', '200']);
    await second.route(`default via ${onward}`);
    await second.route(`${v === '-4' ? '10.81.0.0/30' : 'fd81::/64'} via ${server1}`);
    await server.route(`${net} via ${back}`);
    await gateway.route(`${net} via ${home}`);
  }
  return { second, link };
}

const carrying = ({ paths }: StatusConnection, local: string): StatusPath | undefined =>
  paths.find((path) => isInUse(path) && path.local?.startsWith(local) && path.deliveredBytes > 500_000);

describe.runIf(requireRoot('tests of a client with two interfaces'))('DETOUR_INTERFACES', () => {
  it.each(FAMILIES)('uses both interfaces, one of them going down and coming back: %s', async (_, to, one, two) => {
    await using world = await World.create('interfaces', { rateMbit: 10 });
    const { link } = await secondWay(world);
    await world.server.exec(['ip', 'mptcp', 'limits', 'set', 'subflow', '8']);
    await startServer(world.server);
    await world.startRouters();
    const agent = await world.startAgent({ DETOUR_INTERFACES: 'to-*', DETOUR_MAX_PATHS: '4' });
    const known = await detoursAre(agent.status, 'up');
    expect(known.detours.map((detour) => `${detour.name} ${detour.interface}`).sort()).toEqual([
      'detour1 to-gateway',
      'detour1 to-second',
      'detour1-6 to-gateway',
      'detour1-6 to-second',
    ]);
    const transfer = startTransfer(world.client, { to, bytes: BYTES });
    const both = await connectionIs(
      agent.status,
      to,
      'both interfaces to carry',
      (now) => carrying(now, one) !== undefined && carrying(now, two) !== undefined,
    );
    // Each by its own link, not both by one.
    expect(both.paths.some((path) => path.kind === 'direct' && path.local?.startsWith(two))).toBe(true);
    const counted = JSON.parse(await world.client.exec(['ip', '-s', '-j', 'link', 'show', 'to-second']));
    expect(counted[0].stats64.tx.bytes).toBeGreaterThan(500_000);
    await link.down(world.client);
    await connectionIs(
      agent.status,
      to,
      'the second to be given up',
      (now) => !now.paths.some((path) => isInUse(path) && path.local?.startsWith(two)),
    );
    await link.up(world.client);
    for (const [v, via] of [
      ['-4', '10.85.0.2'],
      ['-6', 'fd85::2'],
    ] as const) {
      if (v === '-6') await world.client.exec(['ip', v, 'addr', 'replace', 'fd85::1/64', 'dev', 'to-second', 'nodad']);
      await world.client.exec(['ip', v, 'route', 'replace', 'default', 'via', via, 'dev', 'to-second', 'table', '200']);
    }
    await connectionIs(agent.status, to, 'the second to carry again', (now) => carrying(now, two) !== undefined);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
  });

  it('leaves excluded interfaces alone, and without it uses the way that routing says (control)', async () => {
    await using world = await World.create('interfaces', { rateMbit: 20 });
    await secondWay(world);
    await startServer(world.server);
    await world.startRouters();
    for (const settings of [{}, { DETOUR_INTERFACES: 'to-*', DETOUR_INTERFACES_EXCLUDE: '*second' }]) {
      const agent = await world.startAgent(settings);
      await detoursAre(agent.status, 'up');
      const bytes = 10_000_000;
      const transfer = startTransfer(world.client, { to: FAMILIES[0][1], bytes });
      await connectionIs(agent.status, FAMILIES[0][1], 'a path by the detour', (now) =>
        now.paths.some((path) => path.kind === 'nat' && isInUse(path)),
      );
      // Neither joins nor questions to detours.
      expect(await world.client.exec(['ss', '-tunaH'])).not.toMatch(/10\.85\.0\.1|fd85::1/);
      const result = await transfer.result;
      expect(result.sha256).toBe(expectedSha256('detour', bytes));
      expect(result.paths.filter(({ remote }) => remote.startsWith('10.85.'))).toEqual([]);
      await agent.program.stop();
    }
  });
});
