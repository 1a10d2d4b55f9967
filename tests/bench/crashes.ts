import { setTimeout as delay } from 'node:timers/promises';
import { Daemon, newKey } from '../lab/daemons.ts';
import { Lab } from '../lab/netns.ts';
import { type Direction, expectedSha256, startServer, startTransfer, type Transfer } from '../lab/traffic.ts';
import { detourWorld, waitForDetours } from '../lab/world.ts';
import { type Figure, note } from './figures.ts';

const KILLS = 200;
/** Transfers under way at any time, half of them in each direction. */
const AT_ONCE = 6;
const BYTES = 4_000_000;
/** An agent lives at most this long after its first sign of life: some die before they have subscribed, some with paths up. */
const LIFE_MS = 1_500;

/**
 * The agent is killed 200 times, each time at another moment of its life, while connections come and go: what they carry
 * must arrive whole, and the last agent must know every connection that is open then. Without an agent nothing is killed, so
 * the control is the same traffic beside no agent at all.
 */
export async function measureCrashes(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.crashes');
  const world = await detourWorld(lab, { rateMbit: 20 });
  await startServer(world.server);
  const keys = newKey();
  await using _router = await Daemon.start(world.detour, 'router', { keys, env: world.routerEnv });
  const to = `${world.serverAddress}:5000`;
  const all: Transfer[] = [];
  const current: Transfer[] = [];
  const renew = (): void => {
    for (let i = 0; i < AT_ONCE; i += 1) {
      if (current[i]?.program.running) continue;
      const direction: Direction = i % 2 === 0 ? 'up' : 'down';
      const transfer = startTransfer(world.client, { to, bytes: BYTES, direction });
      transfer.result.catch(() => undefined);
      current[i] = transfer;
      all.push(transfer);
    }
  };
  const controls = await Promise.allSettled(
    Array.from({ length: AT_ONCE }, () => startTransfer(world.client, { to, bytes: BYTES }).result),
  );
  await using agent = await Daemon.start(world.client, 'client', { keys, env: world.clientEnv });
  let adopted = 0;
  for (let kill = 0; kill < KILLS; kill += 1) {
    renew();
    await agent.program.waitFor('"event":"starting"');
    await delay((kill * 197) % LIFE_MS);
    await agent.stop('SIGKILL');
    if (agent.program.lines.some((line) => line.includes('"event":"path-established"'))) adopted += 1;
    agent.restart();
    if (kill % 20 === 19) note(`crashes: ${kill + 1} kills, ${all.length} transfers`);
  }
  await agent.ready();
  await waitForDetours(agent, 1);
  renew();
  const open = current.filter(({ program }) => program.running).length;
  const status = await agent.status<{ connections: unknown[] }>();
  const outcomes = await Promise.allSettled(all.map(({ result }) => result));
  const isWhole = (outcome: PromiseSettledResult<{ readonly sha256: string }>): boolean =>
    outcome.status === 'fulfilled' && outcome.value.sha256 === expectedSha256('detour', BYTES);
  const broken = outcomes.filter((outcome) => !isWhole(outcome));
  for (const outcome of broken) note(`crashes: ${outcome.status === 'rejected' ? outcome.reason : 'arrived changed'}`);
  note(`crashes: ${open} transfers open at the end, ${status.connections.length} connections known to the last agent`);
  return [
    {
      name: `agent killed ${KILLS} times: transfers that arrived whole`,
      value: (outcomes.length - broken.length) / outcomes.length,
      unit: '',
      target: { atLeast: 1 },
      detail: `${outcomes.length - broken.length} of ${outcomes.length}; without an agent ${controls.filter(isWhole).length} of ${controls.length}; ${adopted} agents lived to make a path`,
    },
  ];
}
