import { fileURLToPath } from 'node:url';
import { Daemon, newKey } from '../lab/daemons.ts';
import { Lab, waitUntil } from '../lab/netns.ts';
import { type Figure, note } from './figures.ts';
import type { LoadOptions, LoadResult } from './load.ts';

const CLIENTS = 250;
const LEASES_PER_CLIENT = 240;
/** Together the most that a key may have (256). */
const SPARE_PER_CLIENT = 16;
const LIVE = CLIENTS * LEASES_PER_CLIENT;
const FILL_RATE = 1100;
const SUSTAIN_RATE = 1100;
const SUSTAIN_S = 20;

/** Leases: rate, latency and memory while 60,000 are live, and how soon a restarted router serves them again. */
export async function measureLeases(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.leases');
  const [clients, router] = [await lab.host('clients'), await lab.host('router')];
  // x.x.0.1 and x.x.0.2 are the ends of the link; the other clients are further addresses of the first.
  await lab.link(clients, router, { v4: '10.83.0.0/16' });
  const sources = Array.from(
    { length: CLIENTS },
    (_, index) => `10.83.${1 + Math.floor(index / 200)}.${1 + (index % 200)}`,
  );
  const batch = sources.map((source) => `addr add ${source}/16 dev to-router`).join('\n');
  await clients.exec(['ip', '-batch', '-'], { input: `${batch}\n` });
  await router.forward();
  const keys = sources.map(() => newKey());
  await using daemon = await Daemon.start(router, 'router', {
    keys: keys.join('\n'),
    // The last one as in the images.
    env: { DETOUR_ALLOW: '10.84.0.0/16', DETOUR_LEASE_TIME: '1h', MALLOC_ARENA_MAX: '1' },
  });
  const options: LoadOptions = {
    router: '10.83.0.2',
    port: 45672,
    sources,
    keys,
    leasesPerKey: LEASES_PER_CLIENT,
    sparePerKey: SPARE_PER_CLIENT,
    destination: '10.84.0.1',
    lifetimeS: 3600,
  };
  const program = fileURLToPath(new URL('load.ts', import.meta.url));
  const load = clients.spawn([process.execPath, program, JSON.stringify(options)]);
  await load.waitFor('"open"');
  const command = async (line: string, deadlineMs: number): Promise<string> => {
    const from = load.lines.length;
    load.write(`${line}\n`);
    return waitUntil(
      () => {
        if (!load.running) throw new Error(`the load generator ended: ${load.errors.join('\n')}`);
        return load.lines[from];
      },
      { deadlineMs, what: `'${line}' to finish` },
    );
  };
  const drive = async (line: string): Promise<LoadResult> => {
    const result: LoadResult = JSON.parse(await command(line, 180_000));
    note(
      `leases: ${line}: ${result.granted} granted, ${result.perSecond.toFixed(0)}/s, p50 ${result.p50.toFixed(1)} ms, ` +
        `p99 ${result.p99.toFixed(1)} ms, longest ${result.longest.toFixed(0)} ms, sent again ${result.resent}, ` +
        `unanswered ${result.unanswered}, refused ${JSON.stringify(result.refusals)}`,
    );
    return result;
  };

  const hello = await drive('hello');
  if (hello.granted !== CLIENTS) throw new Error(`only ${hello.granted} of ${CLIENTS} clients were let in`);
  const fill = await drive(`fill ${FILL_RATE}`);
  // On a busy machine the first round may leave some out; what is measured next needs them all.
  if (fill.granted < LIVE) await drive(`fill ${FILL_RATE / 2}`);
  const live = await leaseCount(router);
  if (live < LIVE) throw new Error(`the kernel holds ${live} leases, not ${LIVE}`);
  const sustained = await drive(`sustain ${SUSTAIN_RATE} ${SUSTAIN_S}`);
  const resident = await daemon.residentBytes();

  const churn = await drive(`churn ${SUSTAIN_RATE} 5`);
  // Every twentieth request gave a lease back; have them all again before the restart.
  await drive(`fill ${FILL_RATE / 2}`);
  await daemon.stop();
  const before = await leaseCount(router);
  daemon.restart();
  const probe: { ms: number; samePort: boolean } = JSON.parse(
    await command('probe', 30_000).catch((error: unknown) => {
      throw new Error(`${error}; the router's log:\n${daemon.program.lines.slice(-10).join('\n')}`);
    }),
  );
  const restartedResident = await daemon.residentBytes();
  note(`leases: adopted ${before}, first granted after ${probe.ms.toFixed(0)} ms, same port: ${probe.samePort}`);
  if (before < LIVE) throw new Error(`the kernel held ${before} leases at the restart, not ${LIVE}`);
  if (!probe.samePort) throw new Error('the restarted router gave a live lease another port');

  const failed = sustained.unanswered + Object.values(sustained.refusals).reduce((sum, count) => sum + count, 0);
  const requests = sustained.granted + failed;
  return [
    { name: 'leases: sustained rate, 60,000 live', value: sustained.perSecond, unit: '/s', target: { atLeast: 1000 } },
    {
      name: 'leases: p99, 60,000 live',
      value: sustained.p99,
      unit: 'ms',
      target: { atMost: 25 },
      detail: `p50 ${sustained.p50.toFixed(1)} ms, longest ${sustained.longest.toFixed(0)} ms`,
    },
    {
      name: 'leases: p99 when one request in twenty gives a lease back',
      value: churn.p99,
      unit: 'ms',
      target: null,
      detail: 'deleting makes the kernel wait for its readers',
    },
    { name: 'leases: refused or unanswered', value: failed / requests, unit: '', target: { atMost: 0 } },
    {
      name: 'leases: rate while filling',
      value: fill.perSecond,
      unit: '/s',
      target: null,
      detail: `p99 ${fill.p99.toFixed(1)} ms`,
    },
    {
      name: 'leases: restart with 60,000, process start to first grant',
      value: probe.ms / 1000,
      unit: 's',
      target: { atMost: 3 },
    },
    { name: 'router: resident memory, 60,000 leases', value: resident / 2 ** 20, unit: 'MB', target: { atMost: 96 } },
    {
      name: 'router: resident memory after adopting them',
      value: restartedResident / 2 ** 20,
      unit: 'MB',
      target: { atMost: 96 },
    },
  ];
}

/** Elements that the kernel holds in our maps, counted by nft itself. */
async function leaseCount(router: { exec(command: readonly string[]): Promise<string> }): Promise<number> {
  const rules = JSON.parse(await router.exec(['nft', '--json', 'list', 'ruleset']));
  const maps: { map?: { elem?: unknown[] } }[] = rules.nftables;
  return Math.max(0, ...maps.map((entry) => entry.map?.elem?.length ?? 0));
}
