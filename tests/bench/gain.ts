import { Daemon, newKey } from '../lab/daemons.ts';
import { Lab } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { type DetourWorld, detourWorld, waitForDetours } from '../lab/world.ts';
import { type Figure, median, note } from './figures.ts';

const RATE_MBIT = 20;
/** A home router's worth of buffer. Shorter ones cost plain TCP throughput as well. */
const QUEUE_MS = 100;
const ROUNDS = 3;
const DIRECT_BYTES = 12_500_000;

/** One connection over two equal paths, compared with the same transfer while there is no agent. */
export async function measureGain(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.gain');
  const world = await detourWorld(lab, { rateMbit: RATE_MBIT, queueMs: QUEUE_MS });
  await startServer(world.server);
  const key = newKey();
  await using _router = await Daemon.start(world.detour, 'router', { keys: key, env: world.routerEnv });
  const ratios: number[] = [];
  const rates: number[] = [];
  for (let round = 0; round < ROUNDS; round += 1) {
    const direct = await transfer(world, DIRECT_BYTES);
    await using agent = await Daemon.start(world.client, 'client', { keys: key, env: world.clientEnv });
    await waitForDetours(agent, 1);
    const both = await transfer(world, 2 * DIRECT_BYTES);
    ratios.push(both / direct);
    rates.push(direct);
  }
  note(`gain: ratios ${ratios.map((ratio) => ratio.toFixed(3)).join(' ')}`);
  return [
    {
      name: `direct and one detour, ${RATE_MBIT} Mbit/s each / direct alone`,
      value: median(ratios),
      unit: '',
      target: { atLeast: 1.9 },
      detail: `median of ${ROUNDS}; direct alone ${median(rates).toFixed(1)} Mbit/s`,
    },
  ];
}

async function transfer(world: DetourWorld, bytes: number): Promise<number> {
  const result = await startTransfer(world.client, { to: `${world.serverAddress}:5000`, bytes }).result;
  if (!result.mptcp) throw new Error('the transfer was no Multipath TCP');
  if (result.sha256 !== expectedSha256('detour', bytes)) throw new Error('the data arrived changed');
  return result.mbps;
}
