import { readFileSync } from 'node:fs';
import { parseEndpoint } from '../../appliance/protocol/address.ts';
import { Daemon, newKey } from '../lab/daemons.ts';
import { Lab } from '../lab/netns.ts';
import { TunnelClient } from '../lab/tunnel-client.ts';
import { type Figure, median, note } from './figures.ts';
import { iperf } from './relay.ts';

const ROUNDS = 7;
const SERVER = '10.85.2.2';
const PORT = 5_201;
/** proc_stat(5): hundredths of a second (USER_HZ) on every Linux that Node runs on. */
const TICKS_PER_SECOND = 100;

/**
 * What a connection carries by a lease against what it carries through a tunnel, and the CPU time that all three hosts of the
 * laboratory, which are this machine, take for it. Each round measures plain forwarding, the lease and the tunnel once, so
 * that whatever else the machine does hits all of them. Plain TCP, as in relay.ts.
 */
export async function measureTunnels(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.tunnels');
  const [client, router, server] = [await lab.host('client'), await lab.host('router'), await lab.host('server')];
  await lab.link(client, router, { v4: '10.85.1.0/30', v6: 'fd85:1::/64' });
  await lab.link(router, server, { v4: '10.85.2.0/30', v6: 'fd85:2::/64' });
  await client.route('default via 10.85.1.2');
  await server.route('default via 10.85.2.1');
  await router.forward();
  await router.isolate('/run/wireguard');
  const keys = newKey();
  await using daemon = await Daemon.start(router, 'router', {
    keys,
    env: { DETOUR_ALLOW: '10.85.2.0/30', DETOUR_RELAY: 'tcp', DETOUR_VPN: 'wireguard' },
  });
  const { vpn } = await daemon.status<{ vpn: { carrier: string } }>();
  const listener = server.spawn(['iperf3', '--server', '--port', String(PORT), '--forceflush']);
  await listener.waitFor('Server listening');
  const tunnel = await TunnelClient.open(client, 'dtv-bench', '10.85.1.2:45672', keys);
  try {
    const destination = parseEndpoint(`${SERVER}:${PORT}`);
    const leased = destination && (await tunnel.speaker.lease(destination));
    if (!leased || leased.port === 0) throw new Error('no lease');
    const inner = await tunnel.up(1_420);
    const ways = {
      plain: () => iperf(client, listener, SERVER, PORT, 1),
      lease: () => iperf(client, listener, '10.85.1.2', leased.port, 1),
      tunnel: () => iperf(client, listener, SERVER, PORT, 1, inner.v4),
    };
    const measured = { plain: [], lease: [], tunnel: [] } as Record<keyof typeof ways, Run[]>;
    for (let round = 0; round < ROUNDS; round += 1)
      for (const name of Object.keys(measured) as (keyof typeof ways)[]) measured[name].push(await costOf(ways[name]));
    return figuresOf(measured, vpn.carrier);
  } finally {
    await tunnel.close();
  }
}

type Run = { readonly gbps: number; readonly cpuPerGbit: number };

/** A transfer of a second, and the CPU time of the whole machine meanwhile. */
async function costOf(transfer: () => Promise<number>): Promise<Run> {
  const before = busySeconds();
  const gbps = await transfer();
  return { gbps, cpuPerGbit: (busySeconds() - before) / gbps };
}

/** CPU time that was neither idle nor waiting, of all processors, s. */
function busySeconds(): number {
  const [, user = 0, nice = 0, system = 0, , , irq = 0, softirq = 0] = (
    readFileSync('/proc/stat', 'utf8').split('\n', 1)[0] ?? ''
  )
    .split(/\s+/)
    .map(Number);
  return (user + nice + system + irq + softirq) / TICKS_PER_SECOND;
}

function figuresOf(measured: Record<'plain' | 'lease' | 'tunnel', readonly Run[]>, carrier: string): Figure[] {
  const rates = (name: keyof typeof measured): number[] => measured[name].map(({ gbps }) => gbps);
  const costs = (name: keyof typeof measured): number[] => measured[name].map(({ cpuPerGbit }) => cpuPerGbit);
  const ratios = measured.lease.map(({ gbps }, round) => gbps / (measured.tunnel[round]?.gbps ?? Number.NaN));
  note(`tunnels by ${carrier}: lease / tunnel ${ratios.map((ratio) => ratio.toFixed(1)).join(' ')}`);
  const cost = costs('lease').map((seconds, round) => (costs('tunnel')[round] ?? Number.NaN) / seconds);
  return [
    {
      name: `throughput by lease / through a tunnel (${carrier})`,
      value: median(ratios),
      unit: '',
      target: null,
      detail: `median of ${ROUNDS}; Gbit/s: plain ${median(rates('plain')).toFixed(2)}, lease ${median(rates('lease')).toFixed(2)}, tunnel ${median(rates('tunnel')).toFixed(2)}`,
    },
    {
      name: `CPU per Gbit through a tunnel (${carrier}) / by lease`,
      value: median(cost),
      unit: '',
      target: null,
      detail: `all three hosts; CPU s: plain ${median(costs('plain')).toFixed(3)}, lease ${median(costs('lease')).toFixed(3)}, tunnel ${median(costs('tunnel')).toFixed(3)}`,
    },
  ];
}
