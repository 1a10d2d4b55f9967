import { Daemon, newKey } from '../lab/daemons.ts';
import { Lab, waitUntil } from '../lab/netns.ts';
import { holdConnections, startServer } from '../lab/traffic.ts';
import { detourWorld, waitForDetours } from '../lab/world.ts';
import { capturing, joinTimes } from './capture.ts';
import { type Figure, note, quantile } from './figures.ts';

/** Open in the end, the measured ones included: a router lets one client have 1,024 flows, closing ones included. */
const OPEN = 1000;
const MEASURED = 200;
const EVERY_MS = 25;
const SERVER_PORT = 5000;

/**
 * From the kernel's ESTABLISHED event to the first SYN to the detour, with up to 1,000 connections open and the lease cached. Both
 * moments are read from one packet capture: the kernel raises the event while it processes the first packet after the SYN/ACK
 * (the server's first data acknowledgement), so the time from that packet's arrival is never too short.
 */
export async function measureReaction(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.reaction');
  const world = await detourWorld(lab);
  const { client, detour, server } = world;
  await startServer(server);
  const key = newKey();
  await using _router = await Daemon.start(detour, 'router', { keys: key, env: world.routerEnv });
  await using agent = await Daemon.start(client, 'client', { keys: key, env: world.clientEnv });
  await waitForDetours(agent, 1);
  const to = `${world.serverAddress}:${SERVER_PORT}`;
  // One after the other here too: a router takes 50 new subflows a second from one client.
  await holdConnections(client, { to, count: OPEN - MEASURED, everyMs: EVERY_MS });
  const joined = ['ss', '-tnH', 'state', 'established', 'dst', world.detourAddress];
  await waitUntil(async () => (await client.exec(joined)).trim().split('\n').length >= OPEN - MEASURED, {
    deadlineMs: 60_000,
    what: `${OPEN - MEASURED} connections to have a subflow through the detour`,
    everyMs: 250,
  });
  let resident = 0;
  const segments = await capturing(client, async () => {
    await holdConnections(client, { to, count: MEASURED, everyMs: EVERY_MS });
    await waitUntil(async () => (await client.exec(joined)).trim().split('\n').length >= OPEN, {
      deadlineMs: 20_000,
      what: 'the measured connections to have a subflow through the detour',
      everyMs: 100,
    });
    resident = await agent.residentBytes();
  });
  const delays = joinTimes(segments, new Set([to])).flatMap(({ established, joined: at }) =>
    established === null || at === null ? [] : [at - established],
  );
  note(`reaction: ${delays.length} of ${MEASURED} seen, longest ${Math.max(...delays).toFixed(1)} ms`);
  if (delays.length < MEASURED * 0.95) throw new Error(`only ${delays.length} of ${MEASURED} connections got a join`);
  const name = `ESTABLISHED to the detour's SYN, ${OPEN - MEASURED} to ${OPEN} connections open`;
  return [
    { name: `${name}, p50`, value: quantile(delays, 0.5), unit: 'ms', target: { atMost: 5 } },
    { name: `${name}, p99`, value: quantile(delays, 0.99), unit: 'ms', target: { atMost: 20 } },
    {
      name: `agent: resident memory, ${OPEN} connections`,
      value: resident / 2 ** 20,
      unit: 'MB',
      target: { atMost: 96 },
    },
  ];
}
