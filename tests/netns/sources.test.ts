import { mkdtempSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it, onTestFinished } from 'vitest';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, holdConnections, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, type Detour, detoursAre, pathBy, World } from './world.ts';

const SERVER = '10.81.0.2:5000';
const SERVER6 = '[fd81::2]:5000';

const listOf = (...detours: readonly Detour[]): string =>
  JSON.stringify({
    detours: detours.flatMap(({ name, v4, v6 }) => [
      { name, address: `${v4}:45672` },
      { name, address: `[${v6}]:45672` },
    ]),
  });

describe.runIf(requireRoot('tests of sources with real traffic'))('detours that come and go', () => {
  it('new ones are used, vanished ones drained, and a broken list changes nothing, all without a restart', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'detour-list-'));
    onTestFinished(() => rmSync(folder, { recursive: true, force: true }));
    const path = join(folder, 'detours.json');
    const write = (text: string): void => {
      writeFileSync(`${path}.tmp`, text);
      renameSync(`${path}.tmp`, path);
    };
    await using world = await World.create('sources', { detours: 2, rateMbit: 20 });
    const [one, two] = world.detours;
    if (!one || !two) throw new Error('the world has two detours');
    await startServer(world.server);
    await world.startRouters();
    write(listOf(one));
    const agent = await world.startAgent({ DETOUR_DETOURS: `file:${path}` });
    await detoursAre(agent.status, 'up');
    const bytes = 20_000_000;
    const transfer = startTransfer(world.client, { to: SERVER, bytes });
    const before = await connectionIs(agent.status, SERVER, 'a path', (now) => Boolean(pathBy(now, one.name)));
    const drained = pathBy(before, one.name);

    write(listOf(two));
    const after = await connectionIs(agent.status, SERVER, 'the new detour', (now) => Boolean(pathBy(now, two.name)));
    expect(
      after.paths.find(({ local, remote }) => local === drained?.local && remote === drained?.remote),
    ).toMatchObject({
      state: expect.stringMatching(/active|backup/),
      detour: null,
      why: expect.stringMatching(/no longer configured/),
    });
    expect((await agent.status()).detours.map(({ name }) => name)).toEqual([two.name, two.name]);
    await holdConnections(world.client, { to: SERVER6, count: 1 });
    const fresh = await connectionIs(agent.status, SERVER6, 'a path', (now) => Boolean(pathBy(now, two.name)));
    expect(fresh.paths).toHaveLength(2);

    write('{"detours": [');
    const metric = `detour_client_source_up{source="file:${path}"}`;
    await waitUntil(async () => (await agent.metrics()).includes(`${metric} 0`), {
      deadlineMs: 5_000,
      what: 'the metric to tell of the broken list',
    });
    expect(await agent.status()).toMatchObject({
      ready: true,
      sources: [{ source: `file:${path}`, state: 'failing', detours: 2, why: expect.stringMatching(/neither JSON/) }],
    });
    const result = await transfer.result;
    expect(result.sha256).toBe(expectedSha256('detour', bytes));
    expect(result.paths.length).toBe(3);
  });
});
