import { readFileSync } from 'node:fs';
import { parseEndpoint } from '../../appliance/protocol/address.ts';
import { Daemon, newKey } from '../lab/daemons.ts';
import { type Host, Lab } from '../lab/netns.ts';
import { TunnelClient } from '../lab/tunnel-client.ts';
import { type Figure, median, note } from './figures.ts';
import { iperf } from './relay.ts';

const ROUNDS = 7;
const SERVER = '10.85.2.2';
const PORT = 5_201;
/** proc_stat(5): hundredths of a second (USER_HZ) on every Linux that Node runs on. */
const TICKS_PER_SECOND = 100;

/** The control: two ends of a tunnel that neither encrypts nor signs, as the thesis meant its OpenVPN to be. */
const OPENVPN = { port: 1_195, client: '10.99.0.2', router: '10.99.0.1', table: 99 } as const;
const SOCAT_PORT = 6_000;

type WayName = 'plain' | 'lease' | 'tunnel' | 'socat' | 'openvpn';

/**
 * What a connection carries by a lease against what it carries through a tunnel, through OpenVPN and by a relay that ends connections
 * (socat), and the CPU time that all three hosts of the laboratory, which are this machine, take for it. Each round measures each
 * once, so that whatever else the machine does hits all of them. Plain TCP, as in relay.ts.
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
    const relay = router.spawn([
      ...['socat', '-d', '-d', `TCP-LISTEN:${SOCAT_PORT},fork,reuseaddr`],
      `TCP:${SERVER}:${PORT}`,
    ]);
    await relay.waitFor('listening on');
    await openVpn(client, router);
    const ways: Record<WayName, () => Promise<number>> = {
      plain: () => iperf(client, listener, SERVER, PORT, 1),
      lease: () => iperf(client, listener, '10.85.1.2', leased.port, 1),
      tunnel: () => iperf(client, listener, SERVER, PORT, 1, inner.v4),
      socat: () => iperf(client, listener, '10.85.1.2', SOCAT_PORT, 1),
      openvpn: () => iperf(client, listener, SERVER, PORT, 1, OPENVPN.client),
    };
    const measured = new Map<WayName, Run[]>();
    for (let round = 0; round < ROUNDS; round += 1)
      for (const name of ['plain', 'lease', 'tunnel', 'socat', 'openvpn'] as const)
        measured.set(name, [...(measured.get(name) ?? []), await costOf(ways[name])]);
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

/** Both ends, and what sends the client's traffic there and the router's answers back. */
async function openVpn(client: Host, router: Host): Promise<void> {
  const common = [
    'openvpn',
    '--dev',
    'ovpn0',
    '--dev-type',
    'tun',
    '--proto',
    'udp',
    '--cipher',
    'none',
    '--auth',
    'none',
  ];
  const port = String(OPENVPN.port);
  const ends = [
    router.spawn([...common, '--lport', port, '--ifconfig', OPENVPN.router, OPENVPN.client]),
    client.spawn([...common, '--remote', '10.85.1.2', port, '--nobind', '--ifconfig', OPENVPN.client, OPENVPN.router]),
  ];
  // The router's end is not told to expect anybody, and so has nothing to wait for.
  await ends[1]?.waitFor('Initialization Sequence Completed');
  await client.exec(['ip', 'rule', 'add', 'from', OPENVPN.client, 'lookup', String(OPENVPN.table)]);
  await client.exec(['ip', 'route', 'add', 'default', 'dev', 'ovpn0', 'table', String(OPENVPN.table)]);
  const masquerade = `chain after { type nat hook postrouting priority srcnat; ip saddr ${OPENVPN.client} masquerade; }`;
  await router.nft(`table ip bench_openvpn {\n${masquerade}\n}\n`);
}

function figuresOf(measured: ReadonlyMap<WayName, readonly Run[]>, carrier: string): Figure[] {
  const rates = (name: WayName): number[] => (measured.get(name) ?? []).map(({ gbps }) => gbps);
  const costs = (name: WayName): number[] => (measured.get(name) ?? []).map(({ cpuPerGbit }) => cpuPerGbit);
  const by = (mine: readonly number[], theirs: readonly number[]): number[] =>
    mine.map((value, round) => value / (theirs[round] ?? Number.NaN));
  const controls = [
    { name: 'tunnel', title: `a tunnel (${carrier})`, goal: carrier === 'kernel' ? null : 20 },
    { name: 'socat', title: 'a user-space relay (socat)', goal: 5 },
    { name: 'openvpn', title: 'OpenVPN without encryption', goal: null },
  ] as const;
  const plain = `plain forwarding ${median(rates('plain')).toFixed(2)} Gbit/s, ${median(costs('plain')).toFixed(3)} CPU s per Gbit`;
  return controls.flatMap(({ name, title, goal }) => {
    const ratios = by(rates('lease'), rates(name));
    note(`tunnels: lease / ${title} ${ratios.map((ratio) => ratio.toFixed(1)).join(' ')}`);
    return [
      {
        name: `throughput by lease / by ${title}`,
        value: median(ratios),
        unit: '',
        target: goal === null ? null : { atLeast: goal },
        detail: `median of ${ROUNDS}; Gbit/s: lease ${median(rates('lease')).toFixed(2)}, this ${median(rates(name)).toFixed(2)}; ${plain}`,
      },
      {
        name: `CPU per Gbit by ${title} / by lease`,
        value: median(by(costs(name), costs('lease'))),
        unit: '',
        target: null,
        detail: `all three hosts; CPU s per Gbit: lease ${median(costs('lease')).toFixed(3)}, this ${median(costs(name)).toFixed(3)}`,
      },
    ];
  });
}
