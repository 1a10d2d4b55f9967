import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { requireVm } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { detoursAre, type Status, World } from '../netns/world.ts';
import { loadModules } from './modules.ts';

const BYTES = 4_000_000;
const DIGEST = expectedSha256('detour', BYTES);

describe.runIf(requireVm('transfers on the kernel of a distribution'))('on the kernel of a distribution', () => {
  const scope = new AsyncDisposableStack();
  let world: World;
  let status: () => Promise<Status>;

  beforeAll(async () => {
    await loadModules();
    world = scope.use(await World.create('vm', { rateMbit: 5 }));
    // The detour is the longer way.
    await world.detours[0]?.way.shape({ rateMbit: 5, delayMs: 20 });
    await startServer(world.server);
    await world.startRouters();
    status = (await world.startAgent()).status;
    await detoursAre(status, 'up');
  });
  afterAll(() => scope.disposeAsync());

  it.each([
    ['IPv4', '10.81.0.2:5000', 'up'],
    ['IPv4', '10.81.0.2:5000', 'down'],
    ['IPv6', '[fd81::2]:5000', 'up'],
    ['IPv6', '[fd81::2]:5000', 'down'],
  ] as const)('a transfer uses both ways and arrives whole: %s, %s, %s', async (_, to, direction) => {
    const result = await startTransfer(world.client, { to, bytes: BYTES, direction }).result;
    expect(result.sha256).toBe(DIGEST);
    expect(result.mptcp).toBe(true);
    expect(result.paths.length).toBe(2);
    for (const path of result.paths) expect(path.bytes).toBeGreaterThan(BYTES / 20);
  });
});
