import { setFlagsFromString } from 'node:v8';
import { Counter, Gauge, Registry } from 'prom-client';
import { Fatal } from '../exit.ts';
import { systemAddresses } from '../kernel/addresses.ts';
import { returnFreedMemory } from '../kernel/allocator.ts';
import { systemClock } from '../kernel/clock.ts';
import { systemConntrack } from '../kernel/conntrack.ts';
import { udpDatagrams } from '../kernel/datagrams.ts';
import { type Firewall, systemFirewall } from '../kernel/firewall.ts';
import { ensureForwarding, restoreForwarding } from '../kernel/forwarding.ts';
import { openLinks } from '../kernel/links.ts';
import { tcpListeners } from '../kernel/listeners.ts';
import { type NftFailure, remedyOf, systemNft } from '../kernel/nft.ts';
import { procSysctl, type Sysctl } from '../kernel/sysctl.ts';
import { openWireguard } from '../kernel/wireguard.ts';
import type { Log } from '../log.ts';
import type { PortRange } from '../protocol/address.ts';
import type { RouterSettings } from '../settings.ts';
import type { RunningDaemon } from '../status/daemon.ts';
import { VERSION } from '../version.ts';
import type { TunnelPorts } from './gateway.ts';
import { type Facts, type Forwarding, TUNNEL_INTERFACE } from './keeper.ts';
import { Router } from './server.ts';
import { Table } from './table.ts';

const SYSCTL_ROOT = '/proc/sys';
/** A burst of requests leaves some 10 MB behind; looking for it takes 1 to 3 ms. */
const TRIM_MS = 10_000;

/** An nft failure at start or cleanup, with its remedy. */
function unavailable(failure: NftFailure): Fatal {
  if (failure.kind === 'missing') return new Fatal(69, remedyOf(failure));
  if (failure.kind === 'denied')
    return new Fatal(69, `nft may not change this network namespace: ${remedyOf(failure)}`);
  return new Fatal(69, `nft cannot install the rules of the router: ${remedyOf(failure)}`);
}

const reasonOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

const text = ({ first, last }: PortRange): string => (first === last ? `${first}` : `${first}-${last}`);

/** A range as long as `range` that meets none of `taken` and lies outside `ephemeral`; null when there is none. */
export function freeRange(range: PortRange, taken: readonly number[], ephemeral: PortRange | null): PortRange | null {
  const size = range.last - range.first + 1;
  const busy = [...taken].sort((a, b) => a - b);
  for (const [low, high] of [
    [10_000, (ephemeral?.first ?? 65_536) - 1],
    [(ephemeral?.last ?? 65_535) + 1, 65_535],
    [1_024, 9_999],
  ] as const) {
    let first = low;
    for (const port of [...busy.filter((at) => at >= low && at <= high), high + 1]) {
      if (port - first >= size) return { first, last: first + size - 1 };
      first = port + 1;
    }
  }
  return null;
}

/**
 * Checks that lease ports are nobody else's: a local service on one of them would be cut off from new connections.
 * @throws Fatal (78) naming both and a free range.
 */
async function checkPorts(ports: PortRange, sysctl: Sysctl): Promise<void> {
  const listeners = await tcpListeners();
  const [first, last] = ((await sysctl.read('net.ipv4.ip_local_port_range')) ?? '').split(/\s+/).map(Number);
  const ephemeral = first && last ? { first, last } : null;
  const problems: string[] = [];
  const inside = listeners.filter((port) => ports.first <= port && port <= ports.last);
  if (inside.length > 0) {
    problems.push(
      `something on this host listens on TCP port ${inside.slice(0, 5).join(', ')}${inside.length > 5 ? ', ...' : ''}`,
    );
  }
  if (ephemeral && ports.first <= ephemeral.last && ephemeral.first <= ports.last) {
    problems.push(`this host uses ${text(ephemeral)} for its own connections (net.ipv4.ip_local_port_range)`);
  }
  if (problems.length === 0) return;
  const free = freeRange(ports, listeners, ephemeral);
  const hint = free ? `free here: DETOUR_PORTS=${text(free)}` : 'choose a shorter range';
  throw new Fatal(78, `DETOUR_PORTS=${text(ports)}: ${problems.join('; ')}; ${hint}`);
}

/** Forwarding, the host's firewall, and ports of ours that others took; says what is wrong when that changes. */
function upkeep(
  log: Log,
  sysctl: Sysctl,
  firewall: Firewall,
  settings: RouterSettings,
): (facts: Facts) => Promise<Forwarding> {
  const said = new Set<string>();
  return async (memory) => {
    const ports = { sysctl, root: SYSCTL_ROOT, addresses: systemAddresses, log, memory };
    const forwarding = { v4: await ensureForwarding(4, ports), v6: await ensureForwarding(6, ports) };
    const advice = await firewall.ensure(settings.fwmark);
    const complaints = [...advice, ...Object.values(forwarding).filter((reason) => reason !== null)];
    // Somebody who came after us: `docker run --publish` asks nobody.
    const { first, last } = settings.ports;
    const cut = (await tcpListeners()).filter((port) => first <= port && port <= last);
    if (cut.length > 0) {
      complaints.push(
        `something on this host listens on TCP port ${cut.slice(0, 5).join(', ')} by now, in DETOUR_PORTS=${text(settings.ports)}: ` +
          'new connections to it are dropped, because these ports are for leases. Move it, or give DETOUR_PORTS another range',
      );
    }
    for (const reason of complaints) {
      if (!said.has(reason)) log.warn('attention', {}, reason);
    }
    said.clear();
    for (const reason of complaints) said.add(reason);
    return forwarding;
  };
}

function openTunnels(): TunnelPorts {
  const links = openLinks();
  return { links, wireguard: openWireguard(links) };
}

/** Takes away what a router with tunnels left. Its own name and kind tell it. */
async function removeTunnels(): Promise<void> {
  const { links, wireguard } = openTunnels();
  try {
    await wireguard.remove(TUNNEL_INTERFACE);
  } finally {
    wireguard.close();
    links.close();
  }
}

function metricsOf(router: Router): Registry {
  const metrics = new Registry();
  const registers = [metrics];
  new Gauge({
    name: 'detour_router_leases',
    help: 'Leases that the kernel holds now.',
    registers,
    collect() {
      this.set(router.leaseCount);
    },
  });
  if (router.tunnelCount !== null) {
    new Gauge({
      name: 'detour_router_tunnels',
      help: 'Tunnels granted now.',
      registers,
      collect() {
        this.set(router.tunnelCount ?? 0);
      },
    });
  }
  if (router.capabilityCount !== null) {
    new Gauge({
      name: 'detour_router_capabilities',
      help: 'Clients whose joins may name their servers now.',
      registers,
      collect() {
        this.set(router.capabilityCount ?? 0);
      },
    });
  }
  if (router.announcementCount !== null) {
    new Gauge({
      name: 'detour_router_announcements',
      help: 'Servers that joins of anybody are led to now.',
      registers,
      collect() {
        this.set(router.announcementCount ?? 0);
      },
    });
  }
  new Counter({
    name: 'detour_router_datagrams_total',
    help: 'Control datagrams and internal events by what became of them.',
    labelNames: ['cause'],
    registers,
    collect() {
      this.reset();
      for (const [cause, count] of router.counters) this.inc({ cause }, count);
    },
  });
  new Counter({
    name: 'detour_router_kernel_packets_total',
    help: "Packets that the router's kernel rules relayed, dropped or refused, by cause.",
    labelNames: ['cause'],
    registers,
    async collect() {
      const counters = await router.kernelCounters();
      this.reset();
      for (const [cause, count] of counters) this.inc({ cause }, count);
    },
  });
  return metrics;
}

/**
 * Runs a router in this network namespace, until `stop`.
 * @throws Fatal: 78 when ports or addresses are taken, 69 when the machine lacks something.
 */
export async function startRouter(settings: RouterSettings, log: Log): Promise<RunningDaemon> {
  // Left to itself, V8 takes 200 MB for 30 MB of leases; small, a router fits on the smallest VPS, and forks fast.
  setFlagsFromString('--optimize-for-size');
  setFlagsFromString('--semi-space-growth-factor=1');
  const sysctl = procSysctl(SYSCTL_ROOT);
  const nft = systemNft({ resident: true });
  const firewall = systemFirewall(nft, log);
  await checkPorts(settings.ports, sysctl);
  const router = new Router(settings, {
    clock: systemClock,
    log,
    nft,
    datagrams: udpDatagrams(),
    addresses: systemAddresses,
    conntrack: systemConntrack(sysctl),
    listeners: tcpListeners,
    upkeep: upkeep(log, sysctl, firewall, settings),
    openTunnels,
  });
  // Of a predecessor that offered some.
  if (!settings.vpn) await removeTunnels();
  /** What an earlier daemon left may carry flows and stays; what this start put there goes. */
  const giveUp = async (error: Fatal): Promise<never> => {
    await router.drain();
    if (router.origin === 'new') {
      await clean(settings, log).catch((problem: unknown) => {
        log.warn(
          'not-cleaned-up',
          { reason: reasonOf(problem) },
          'something of this start is left: run `detour cleanup router`',
        );
      });
    }
    throw error;
  };
  const failure = await router
    .start()
    .catch((error: unknown) =>
      giveUp(error instanceof Fatal ? error : new Fatal(78, `DETOUR_LISTEN: ${reasonOf(error)}`)),
    );
  if (failure) return giveUp(unavailable(failure));
  if (settings.legacyV1) {
    log.warn(
      'legacy-v1',
      {},
      'DETOUR_LEGACY_V1 is on: anyone who can send to the control port gets leases, within the policy',
    );
  }
  const { ready, reasons } = router.readiness();
  if (!ready) return giveUp(new Fatal(69, reasons.join('\n')));
  const trimming = setInterval(returnFreedMemory, TRIM_MS).unref();
  const view = {
    readiness: () => router.readiness(),
    status: async () => ({ version: VERSION, ...(await router.status()) }),
    metrics: metricsOf(router),
  };
  return {
    view,
    reload: (keys) => router.reload(keys),
    async stop() {
      clearInterval(trimming);
      await router.drain();
      if (settings.onExit === 'cleanup') await clean(settings, log);
    },
  };
}

async function clean(settings: Pick<RouterSettings, 'fwmark'>, log: Log): Promise<void> {
  const nft = systemNft();
  const sysctl = procSysctl(SYSCTL_ROOT);
  const table = new Table(nft);
  const facts = await table.facts();
  if (facts && 'kind' in facts) throw unavailable(facts);
  const remembered = new Map(
    (facts ?? []).map((fact): [string, string] => [
      fact.slice(0, fact.indexOf('=')),
      fact.slice(fact.indexOf('=') + 1),
    ]),
  );
  await systemFirewall(nft, log).remove(settings.fwmark);
  // Before the rules that guard it.
  await removeTunnels();
  const failures = await restoreForwarding(sysctl, remembered);
  if (failures.length > 0) {
    // The table stays: it is the only place that knows the old values.
    throw new Fatal(1, `the old values of some sysctls could not be put back: ${failures.join('; ')}`);
  }
  const failure = await table.remove();
  if (failure) throw unavailable(failure);
  log.info('cleaned-up', {}, 'nothing of ours is left in nftables, iptables and sysctls');
}

/**
 * Removes everything that routers left in this namespace: table, leases, firewall rules, changed sysctls. Needs no keys
 * and no running daemon, and may be repeated.
 * @throws Fatal when something could not be removed.
 */
export async function cleanupRouter(settings: Pick<RouterSettings, 'fwmark'>, log: Log): Promise<void> {
  await clean(settings, log);
}
