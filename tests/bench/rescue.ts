import { call } from '../lab/caller.ts';
import { Daemon, newKey } from '../lab/daemons.ts';
import { Lab, waitUntil } from '../lab/netns.ts';
import { startServer } from '../lab/traffic.ts';
import { detourWorld, waitForDetours } from '../lab/world.ts';
import { type Figure, median, note } from './figures.ts';

const ROUNDS = 10;
/** New connections of each round after the one that finds out. */
const LATER = 5;
const CONTROL_S = 5;

/** How soon new connections reach a server whose direct way swallows everything, with and without an agent that rescues. */
export async function measureRescue(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.rescue');
  const world = await detourWorld(lab);
  const { client, gateway, serverAddress } = world;
  await startServer(world.server);
  const key = newKey();
  const routerEnv = { ...world.routerEnv, DETOUR_RELAY: 'mptcp' };
  await using _router = await Daemon.start(world.detour, 'router', { keys: key, env: routerEnv });
  const breakIt = (): Promise<string> =>
    gateway.nft('table ip dead { chain through { type filter hook forward priority 0; oifname "to-server" drop; }; }');
  const mendIt = (): Promise<string> => gateway.nft('delete table ip dead');

  await breakIt();
  const control = await call(client, serverAddress, { limitS: CONTROL_S });
  await mendIt();
  const [first, later, back]: [number[], number[], number[]] = [[], [], []];
  for (let round = 0; round < ROUNDS; round += 1) {
    const env = { ...world.clientEnv, DETOUR_RESCUE: 'on' };
    await using agent = await Daemon.start(client, 'client', { keys: key, env });
    await waitForDetours(agent, 1);
    const rescues = async (): Promise<readonly { readonly state: string }[]> =>
      (await agent.status<{ rescues: readonly { readonly state: string }[] }>()).rescues;
    const connect = async (into: number[]): Promise<void> => {
      const { connected, ms, program } = await call(client, serverAddress);
      await program.stop();
      into.push(connected ? ms : Number.POSITIVE_INFINITY);
    };
    await breakIt();
    await connect(first);
    for (let i = 0; i < LATER; i += 1) await connect(later);
    await mendIt();
    const mended = performance.now();
    await waitUntil(async () => (await rescues()).every(({ state }) => state !== 'rescued'), {
      deadlineMs: 30_000,
      what: 'the rescue to end',
    });
    back.push(performance.now() - mended);
  }
  const ms = (values: readonly number[]): string => values.map((value) => value.toFixed(0)).join(' ');
  note(`rescue: first ${ms(first)}; later ${ms(later)}; back ${ms(back)}`);
  return [
    {
      name: 'new connection, direct dead, no agent',
      value: control.ms,
      unit: 'ms',
      target: null,
      detail: control.connected ? 'connected: the control arm is broken' : `not connected after ${CONTROL_S} s`,
    },
    {
      name: 'new connection, direct dead, rescue on: the one that finds out',
      value: Math.max(...first),
      unit: 'ms',
      // The kernel repeats a SYN after 1 s, and that is the first one that can be led elsewhere.
      target: { atMost: 1_100 },
      detail: `worst of ${ROUNDS}, median ${median(first).toFixed(0)} ms; the kernel repeats its SYN after 1 s`,
    },
    {
      name: 'new connection, direct dead, rescue on: the ones after it',
      value: Math.max(...later),
      unit: 'ms',
      target: { atMost: 1_000 },
      detail: `worst of ${ROUNDS * LATER}, median ${median(later).toFixed(1)} ms`,
    },
    {
      name: 'rescue ends after the direct way is back',
      value: median(back),
      unit: 'ms',
      target: null,
      detail: `median of ${ROUNDS}, worst ${Math.max(...back).toFixed(0)} ms; asked every second at first`,
    },
  ];
}
