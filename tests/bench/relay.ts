import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { Daemon, newKey } from '../lab/daemons.ts';
import { type Host, Lab, type Running, waitUntil } from '../lab/netns.ts';
import { type Figure, median, note } from './figures.ts';
import type { LoadOptions } from './load.ts';

const PAIRS = 15;
const SECONDS = 1;
const SERVER = '10.85.2.2';
/** The router lets a client open 50 flows a second, 100 at once: 65 more are allowed after this time. */
const BUDGET_MS = 1500;
/** load.ts asks for leases of ports 1000 and up; the first is this one. */
const SERVER_PORT = 1000;

/**
 * Throughput through the router's kernel path over that of plain forwarding by the same namespace, in interleaved pairs,
 * so that whatever else the machine does hits both. Plain TCP through DETOUR_RELAY=tcp: established packets meet the
 * same rules and conntrack entries as those of a join, which differ in the SYN alone.
 */
export async function measureRelay(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.relay');
  const [client, router, server] = [await lab.host('client'), await lab.host('router'), await lab.host('server')];
  await lab.link(client, router, { v4: '10.85.1.0/30' });
  await lab.link(router, server, { v4: '10.85.2.0/30' });
  await client.route('default via 10.85.1.2');
  await server.route('default via 10.85.2.1');
  await router.forward();
  const keys = newKey();
  await using _daemon = await Daemon.start(router, 'router', {
    keys,
    env: { DETOUR_ALLOW: '10.85.2.0/30', DETOUR_RELAY: 'tcp' },
  });
  const port = await lease(client, keys);
  const listener = server.spawn(['iperf3', '--server', '--port', String(SERVER_PORT), '--forceflush']);
  await listener.waitFor('Server listening');
  const figures: Figure[] = [];
  for (const streams of [1, 64]) {
    const ratios: number[] = [];
    const rates: number[] = [];
    let budgetAt = performance.now() + BUDGET_MS;
    for (let pair = 0; pair < PAIRS; pair += 1) {
      const plainly = (): Promise<number> => iperf(client, listener, SERVER, SERVER_PORT, streams);
      const through = async (): Promise<number> => {
        await delay(Math.max(0, budgetAt - performance.now()));
        budgetAt = performance.now() + BUDGET_MS;
        return iperf(client, listener, '10.85.1.2', port, streams);
      };
      // Each order as often as the other, so that it does not matter which one comes first.
      const [first, second] = pair % 2 === 0 ? [plainly, through] : [through, plainly];
      const [one, other] = [await first(), await second()];
      const [plain, relayed] = pair % 2 === 0 ? [one, other] : [other, one];
      ratios.push(relayed / plain);
      rates.push(relayed);
    }
    note(`relay: ${streams} streams: ratios ${ratios.map((ratio) => ratio.toFixed(3)).join(' ')}`);
    figures.push({
      name: `relay / plain forwarding, ${streams === 1 ? '1 stream' : `${streams} streams`}`,
      value: median(ratios),
      unit: '',
      target: { atLeast: 0.95 },
      detail: `median of ${PAIRS} pairs; relayed ${median(rates).toFixed(1)} Gbit/s`,
    });
  }
  return figures;
}

/** Gbit/s to an iperf3 server, over a second; `from` is the client's address, when that is chosen. */
export async function iperf(
  client: Host,
  listener: Running,
  to: string,
  port: number,
  streams: number,
  from?: string,
): Promise<number> {
  const tests = (): number => listener.lines.filter((line) => line.startsWith('Server listening')).length;
  const before = tests();
  const bind = from === undefined ? [] : ['--bind', from];
  const where = ['--client', to, '--port', String(port), '--parallel', String(streams), ...bind];
  const report = JSON.parse(await client.exec(['iperf3', ...where, '--time', String(SECONDS), '--json']));
  if (report.error !== undefined) throw new Error(`iperf3 to ${to}:${port} with ${streams} streams: ${report.error}`);
  // Between two tests the server listens anew, and until then refuses.
  await waitUntil(() => tests() > before, { deadlineMs: 5_000, what: 'iperf3 to listen again' });
  return report.end.sum_received.bits_per_second / 1e9;
}

/** Takes one lease for the server and returns the router's port. */
async function lease(client: Host, keys: string): Promise<number> {
  const options: LoadOptions = {
    router: '10.85.1.2',
    port: 45672,
    sources: ['10.85.1.1'],
    keys: [keys],
    leasesPerKey: 1,
    sparePerKey: 0,
    destination: SERVER,
    lifetimeS: 600,
  };
  const program = client.spawn([
    process.execPath,
    fileURLToPath(new URL('load.ts', import.meta.url)),
    JSON.stringify(options),
  ]);
  program.write('hello\nprobe\n');
  const granted: { port: number } = JSON.parse(await program.waitFor('"probe"'));
  await program.stop('SIGKILL');
  return granted.port;
}
