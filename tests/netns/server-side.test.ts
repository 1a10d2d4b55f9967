import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Host, type Running, requireRoot } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { connectionIs, detoursAre, hostState, isInUse, type StatusConnection, World } from './world.ts';

/** `DETOUR_ROLE`: what an agent does on the host that accepts connections. The stock limit there is two extra subflows. */

const SERVER = '10.81.0.2:5000';
const BYTES = 40_000_000;
const SERVER_ONLY = { DETOUR_ROLE: 'server', DETOUR_KEY: '', DETOUR_DETOURS: '' };

const limits = (host: Host): Promise<string> => host.exec(['ip', 'mptcp', 'limits', 'show']);
const extra = ({ paths }: StatusConnection): number =>
  paths.filter((path) => path.kind === 'nat' && isInUse(path)).length;

describe.runIf(requireRoot("tests of the server's side"))('the side of the server', () => {
  let world: World;
  let before: Record<string, string>;

  beforeAll(async () => {
    world = await World.create('serverside', { detours: 4, rateMbit: 20 });
    before = await hostState(world.server);
    expect(await limits(world.server)).toMatch(/subflows 2/);
    await startServer(world.server);
    await world.startRouters();
  });
  afterAll(() => world?.[Symbol.asyncDispose]());

  const command = (words: readonly string[], environment = {}): Promise<string> =>
    world.command(words, { ...SERVER_ONLY, ...environment }, world.server);

  async function end(program: Running): Promise<void> {
    expect(await program.stop()).toEqual({ code: 0, signal: null });
  }

  /** A transfer from a client that wants four extra paths: how many it gets, while it lasts. */
  async function pathsOf(enough: number): Promise<void> {
    const agent = await world.startAgent({ DETOUR_MAX_PATHS: '4' });
    await detoursAre(agent.status, 'up');
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    await connectionIs(agent.status, SERVER, `${enough} extra paths`, (one) => extra(one) === enough);
    expect((await transfer.result).sha256).toBe(expectedSha256('detour', BYTES));
    await end(agent.program);
  }

  it('lets connections have more paths than a stock kernel, which stays in charge, and puts the limit back', async () => {
    const agent = await world.startAgent(SERVER_ONLY, world.server);
    expect(await limits(world.server)).toMatch(/subflows 8/);
    expect(await world.server.sysctl('net.mptcp.pm_type')).toBe('0');
    expect(await agent.status()).toMatchObject({ ready: true, sides: ['server'], detours: [], connections: [] });
    await pathsOf(4);
    await end(agent.program);
    expect(await hostState(world.server)).toEqual(before);
    expect(await limits(world.server)).toMatch(/subflows 2/);
  });

  it('remembers the limit when it is killed', async () => {
    const first = await world.startAgent(SERVER_ONLY, world.server);
    await first.program.stop('SIGKILL');
    expect(await limits(world.server)).toMatch(/subflows 8/);
    const second = await world.startAgent(SERVER_ONLY, world.server);
    await end(second.program);
    expect(await limits(world.server)).toMatch(/subflows 2/);
    const third = await world.startAgent(SERVER_ONLY, world.server);
    await third.program.stop('SIGKILL');
    await command(['cleanup', 'client']);
    expect(await hostState(world.server)).toEqual(before);
    expect(await limits(world.server)).toMatch(/subflows 2/);
  });

  it('leaves what `detour load` did to `detour unload`', async () => {
    expect(await command(['load'])).toMatch(/8 extra subflows/);
    const agent = await world.startAgent(SERVER_ONLY, world.server);
    await end(agent.program);
    expect(await limits(world.server)).toMatch(/subflows 8/);
    await command(['unload']);
    expect(await hostState(world.server)).toEqual(before);
    expect(await limits(world.server)).toMatch(/subflows 2/);
  });

  it("takes joins beside the client's side, too, and puts back both", async () => {
    const agent = await world.startAgent({ DETOUR_ROLE: 'client,server' }, world.server);
    expect(await world.server.sysctl('net.mptcp.pm_type')).toBe('1');
    await pathsOf(4);
    const { connections } = await agent.status();
    expect(connections).toEqual([]);
    await end(agent.program);
    expect(await hostState(world.server)).toEqual(before);
    expect(await limits(world.server)).toMatch(/subflows 2/);
  });
});
