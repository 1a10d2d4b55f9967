import { readFile } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { askDaemon } from '../../appliance/status/client.ts';
import { Daemon, newKey } from '../lab/daemons.ts';
import { Lab, waitUntil } from '../lab/netns.ts';
import { holdConnections, startServer } from '../lab/traffic.ts';
import { detourWorld, waitForDetours } from '../lab/world.ts';
import { type Figure, note, quantile } from './figures.ts';

const OPEN = 10_000;
const WATCHED_MS = 20_000;
const ASK_EVERY_MS = 100;
/** `USER_HZ` of proc(5): the unit of utime and stime. */
const TICKS_PER_SECOND = 100;
const SERVER_PORT = 5000;

/**
 * What the agent costs while 10,000 connections are open and idle, with the defaults: some have a path through the detour (a router
 * lets one client have 1,024), the others would like one. Measured when the first are through; how long its event
 * loop is held up shows in how long it takes to answer on its socket.
 */
export async function measureCrowd(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.crowd');
  const { client, detour, server, serverAddress, routerEnv, clientEnv } = await detourWorld(lab);
  await startServer(server);
  const key = newKey();
  await using _router = await Daemon.start(detour, 'router', { keys: key, env: routerEnv });
  await using agent = await Daemon.start(client, 'client', { keys: key, env: clientEnv });
  const page = async (path: string): Promise<string> => (await askDaemon(agent.env['DETOUR_SOCKET'] ?? '', path)).body;
  await waitForDetours(agent, 1);
  const held = await holdConnections(client, { to: `${serverAddress}:${SERVER_PORT}`, count: OPEN });
  await waitUntil(async () => (await page('/metrics')).includes(`detour_client_connections{managed="yes"} ${OPEN}`), {
    deadlineMs: 30_000,
    what: `the agent to know ${OPEN} connections`,
    everyMs: 500,
  });
  const waits: number[] = [];
  const before = await cpuSeconds(agent.program.pid);
  const start = performance.now();
  while (performance.now() - start < WATCHED_MS) {
    const asked = performance.now();
    await page('/healthz');
    waits.push(performance.now() - asked);
    await delay(ASK_EVERY_MS);
  }
  const seconds = (performance.now() - start) / 1000;
  const share = ((await cpuSeconds(agent.program.pid)) - before) / seconds;
  const resident = await agent.residentBytes();
  await held.stop();
  note(`crowd: answers took ${quantile(waits, 0.5).toFixed(1)} ms, p99 ${quantile(waits, 0.99).toFixed(1)} ms`);
  return [
    { name: `agent: CPU, ${OPEN} connections open`, value: share * 100, unit: '% of a core', target: { atMost: 5 } },
    {
      name: `agent: resident memory, ${OPEN} connections`,
      value: resident / 2 ** 20,
      unit: 'MB',
      target: { atMost: 128 },
    },
    {
      name: `agent: longest wait for an answer, ${OPEN} connections`,
      value: Math.max(...waits),
      unit: 'ms',
      target: null,
    },
  ];
}

/** User and system time of a process so far, seconds (proc(5), stat). */
async function cpuSeconds(pid: number): Promise<number> {
  const stat = await readFile(`/proc/${pid}/stat`, 'latin1');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}
