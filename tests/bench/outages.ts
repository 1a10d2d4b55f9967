import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { type Host, type Link, waitUntil } from '../lab/netns.ts';
import { type Direction, expectedSha256, startServer, startTransfer, type TransferResult } from '../lab/traffic.ts';
import { connectionIs, detoursAre, pathBy, World } from '../netns/world.ts';
import { type Figure, median, note } from './figures.ts';

const SERVER = '10.81.0.2:5000';
const RATE_MBIT = 10;
/** Short, so that what is measured is the reaction: with a longer one send buffers grow, and a stall is as long as they take to drain. */
const QUEUE_MS = 20;
const ROUNDS = 3;
const OUTAGE_MS = 15_000;
/** How long a path may take to come back before the measurement gives up. */
const LONGEST_MS = 45_000;
const PACKETS = join(import.meta.dirname, '../lab/packets.py');
const REMOVE_ID_0 = '1e044000';

/** `kernel`: the agent made the paths and is killed before anything happens, so that the kernel is alone with them. */
type Arm = 'agent' | 'kernel' | 'direct alone';

/** What paths that break cost, and how soon those that are whole again are used. */
export async function measureOutages(): Promise<Figure[]> {
  const figures: Figure[] = [];
  for (const [direction, goal] of [
    ['up', 500],
    ['down', 600],
  ] as const) {
    const name = direction === 'up' ? 'upload' : 'download';
    const stalls = new Map<Arm, number[]>();
    for (let round = 0; round < ROUNDS; round += 1) {
      for (const arm of ['agent', 'kernel'] as const)
        stalls.set(arm, [...(stalls.get(arm) ?? []), await longestStall(`bench.${name}`, arm, direction)]);
    }
    stalls.set('direct alone', [await longestStall(`bench.${name}`, 'direct alone', direction)]);
    const say = (arm: Arm): string => (stalls.get(arm) ?? []).map((ms) => ms.toFixed(0)).join(' ');
    note(
      `outages: ${name}: agent ${say('agent')} ms, kernel ${say('kernel')} ms, direct alone ${say('direct alone')} ms`,
    );
    figures.push({
      name: `${name}, direct black-holed: longest stall`,
      value: median(stalls.get('agent') ?? []) / 1000,
      unit: 's',
      target: { atMost: goal / 1000 },
      detail: `median of ${ROUNDS}, two detours; the kernel alone with the same paths ${say('kernel')} ms; direct alone: until it is back (${say('direct alone')} ms for 3 s)`,
    });
  }
  figures.push(...(await comebacks()), await forged());
  return figures;
}

async function worldOf(name: string): Promise<World> {
  const world = await World.create(name, { detours: 2, rateMbit: RATE_MBIT });
  const conditions = { rateMbit: RATE_MBIT, queueMs: QUEUE_MS };
  await world.direct.shape(conditions);
  for (const detour of world.detours) await detour.way.shape(conditions);
  await startServer(world.server);
  await world.startRouters();
  return world;
}

async function longestStall(name: string, arm: Arm, direction: Direction): Promise<number> {
  await using world = await worldOf(name);
  const agent = arm === 'direct alone' ? null : await world.startAgent();
  if (agent) await detoursAre(agent.status, 'up');
  const bytes = agent ? 18_000_000 : 6_000_000;
  const transfer = startTransfer(world.client, { to: SERVER, bytes, direction });
  if (agent) {
    await connectionIs(agent.status, SERVER, 'all ways to carry', (one) =>
      [null, 'detour1', 'detour2'].every((by) => (pathBy(one, by)?.deliveredBytes ?? 0) > 1_000_000),
    );
  } else await delay(2_000);
  if (arm === 'kernel') await agent?.program.stop('SIGKILL');
  await world.direct.blackhole();
  if (!agent) {
    await delay(3_000);
    await world.direct.restore();
  }
  return whole(await transfer.result, bytes).longestStallMs;
}

function whole(result: TransferResult, bytes: number): TransferResult {
  if (result.sha256 !== expectedSha256('detour', bytes)) throw new Error('the data arrived changed');
  return result;
}

/** A path is silent for a while: when is it used again? The arms run side by side, each at a rate that costs next to nothing. */
async function comebacks(): Promise<Figure[]> {
  const cases = (['direct', 'detour'] as const).flatMap((which) =>
    (['agent', 'kernel'] as const).map((arm) => ({ which, arm })),
  );
  const times = await Promise.all(
    cases.map(async (one) => ({
      ...one,
      ms: await comeback(`bench.back.${one.which}.${one.arm}`, one.which, one.arm),
    })),
  );
  const of = (which: string, arm: string): number =>
    times.find((one) => one.which === which && one.arm === arm)?.ms ?? Number.NaN;
  return (['direct', 'detour'] as const).map((which) => ({
    name: `${which === 'direct' ? 'the direct path' : "a detour's path"} used again after ${OUTAGE_MS / 1000} s of silence`,
    value: of(which, 'agent') / 1000,
    unit: 's',
    target: { atMost: 1 },
    detail: `the kernel alone with the same paths ${(of(which, 'kernel') / 1000).toFixed(1)} s; to the 10th full segment`,
  }));
}

async function comeback(name: string, which: 'direct' | 'detour', arm: 'agent' | 'kernel'): Promise<number> {
  await using world = await worldOf(name);
  const [detour] = world.detours;
  if (!detour) throw new Error('no detour');
  const agent = await world.startAgent();
  await detoursAre(agent.status, 'up');
  const transfer = startTransfer(world.client, { to: SERVER, bytes: 1_000_000_000 });
  transfer.result.catch(() => undefined);
  await connectionIs(agent.status, SERVER, 'all ways to carry', (one) =>
    [null, 'detour1', 'detour2'].every((by) => (pathBy(one, by)?.deliveredBytes ?? 0) > 1_000_000),
  );
  if (arm === 'kernel') await agent.program.stop('SIGKILL');
  const [link, behind]: [Link, Host] = which === 'direct' ? [world.direct, world.server] : [detour.way, detour.host];
  await link.blackhole();
  await delay(OUTAGE_MS);
  const capture = behind.spawn([
    ...['tcpdump', '-l', '-n', '-tt', '--immediate-mode', '-i', link.at(behind).dev, '-s', '96'],
    'tcp and greater 1200 and src 10.80.0.1',
  ]);
  await capture.waitFor('listening on');
  await link.restore();
  const restoredAt = Date.now();
  const arrived = (): number[] =>
    capture.lines.flatMap((line) => {
      const at = Number(/^(\d+\.\d+) IP /.exec(line)?.[1]) * 1000;
      return at >= restoredAt ? [at] : [];
    });
  const tenth = await waitUntil(() => arrived()[9], { deadlineMs: LONGEST_MS, what: 'the path to carry again' }).catch(
    () => restoredAt + LONGEST_MS,
  );
  await transfer.program.stop('SIGKILL');
  return tenth - restoredAt;
}

/** A hostile detour sends REMOVE_ADDR of id 0, upon which the kernel closes every subflow, the direct one too. */
async function forged(): Promise<Figure> {
  const name = 'direct path closed by a forged REMOVE_ADDR: longest stall';
  const outcomes = new Map<'agent' | 'kernel', number | null>();
  for (const arm of ['agent', 'kernel'] as const) {
    await using world = await worldOf('bench.forged');
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    const agent = await world.startAgent();
    await detoursAre(agent.status, 'up');
    const bytes = 20_000_000;
    const transfer = startTransfer(world.client, { to: SERVER, bytes });
    const before = await connectionIs(agent.status, SERVER, 'all ways to carry', (one) =>
      [null, 'detour1', 'detour2'].every((by) => (pathBy(one, by)?.deliveredBytes ?? 0) > 500_000),
    );
    if (arm === 'kernel') await agent.program.stop('SIGKILL');
    const remote = pathBy(before, 'detour1')?.remote ?? '';
    const old = `:${pathBy(before, null)?.local?.split(':')[1]}`;
    await waitUntil(
      async () => {
        await detour.host.exec(['python3', PACKETS, 'option', detour.way.at(detour.host).dev, remote, REMOVE_ID_0]);
        const text = await world.client.exec([
          'ss',
          '-tnH',
          'state',
          'established',
          'dst',
          '10.81.0.2',
          'sport',
          '=',
          old,
        ]);
        return text.trim() === '';
      },
      { deadlineMs: 10_000, what: 'the forged option to take effect', everyMs: 100 },
    );
    const result = await Promise.race([transfer.result, delay(20_000, null)]);
    if (arm === 'agent' && result === null) throw new Error('the transfer did not end');
    outcomes.set(arm, result && whole(result, bytes).longestStallMs);
    transfer.result.catch(() => undefined);
    await transfer.program.stop('SIGKILL');
  }
  const alone = outcomes.get('kernel');
  return {
    name,
    value: (outcomes.get('agent') ?? Number.NaN) / 1000,
    unit: 's',
    target: { atMost: 2 },
    detail: `the kernel alone: ${typeof alone === 'number' ? `${(alone / 1000).toFixed(1)} s` : 'nothing more arrives (20 s)'}`,
  };
}
