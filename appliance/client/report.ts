import type { ConnectionSample, SubflowSample } from '../kernel/diag.ts';
import { type Address, formatAddress, formatEndpoint, sameAddress } from '../protocol/address.ts';
import type { Json } from '../status/daemon.ts';
import { explainConnection, explainDestination, type Row } from './explain.ts';
import { shortfall } from './slots.ts';
import type { Connection, Detour, Path, Rescue, State } from './state.ts';
import type { TunnelView } from './tunnels.ts';
import { DIRECT } from './worth.ts';

/** One namespace as `/v1/status` and `/v1/explain` show it. */

/** Of the connections to one host, the latest so many are explained. */
const MOST_EXPLAINED = 100;

export type JsonObject = { readonly [key: string]: Json };

/** `wallAt` makes a date of a monotonic time. */
type WallAt = (at: number) => string;

/** The detours of a namespace; `observed`: from which address each sees it. */
export function showDetours(state: State, observed: (detour: string) => Address | null): JsonObject[] {
  return [...state.detours.values()].map((detour) => {
    const seen = observed(detour.key);
    return {
      name: detour.name,
      interface: detour.via,
      local: detour.local && formatAddress(detour.local),
      address: formatEndpoint(detour.endpoint),
      state: detour.state,
      rttMs: detour.rttMs === null ? null : round(detour.rttMs),
      epoch: detour.epoch === null ? null : detour.epoch.toString(16).padStart(16, '0'),
      strategy: strategyOf(state, detour),
      why: detour.why || null,
      observed: seen && formatAddress(seen),
    };
  });
}

/** In what ways paths go through a detour: by leases, by its tunnel, or by either. */
function strategyOf({ rules: { kinds, inband }, tunnels }: State, detour: Detour): string {
  const tunnelled = [...tunnels.values()].some((tunnel) => tunnel.site === detour.name && tunnel.state !== 'asked');
  const named = inband && detour.capability !== null && detour.inband !== 'fails';
  return [...(named ? ['inband'] : []), ...(kinds.includes('nat') ? ['nat'] : []), ...(tunnelled ? ['vpn'] : [])].join(
    ',',
  );
}

/** The tunnels of a namespace; `view`: what the kernel has of each. */
export function showTunnels(state: State, view: (site: string) => TunnelView | null): JsonObject[] {
  return [...state.tunnels.values()].map(({ site, state: at, rttMs, why }) => ({
    detour: site,
    state: at,
    ...(view(site) ?? { interface: null, carrier: null, v4: null, v6: null, mtu: null }),
    rttMs: rttMs === null ? null : round(rttMs),
    why: why || null,
  }));
}

/** Its connections, with what the kernel counted, by token. */
export function showConnections(
  state: State,
  kernel: ReadonlyMap<number, ConnectionSample>,
  now: number,
  wallAt: WallAt,
): JsonObject[] {
  return [...state.connections.values()].map((connection) =>
    showConnection(state, connection, kernel.get(connection.token), now, wallAt),
  );
}

/** What `/v1/explain` says of the ways to a server, `port` null: to any of its ports. */
export function showExplanation(
  state: State,
  address: Address,
  port: number | null,
  now: number,
  wallAt: WallAt,
): JsonObject {
  const connections = [...state.connections.values()].filter(
    ({ remote }) => sameAddress(remote.address, address) && (port === null || remote.port === port),
  );
  const { prefix, direct, detours } = explainDestination(state, address, now);
  return {
    address: formatAddress(address),
    port,
    prefix,
    directBytesPerSecond: whole(direct),
    connections: connections.slice(-MOST_EXPLAINED).map((connection) => explainOne(state, connection, now, wallAt)),
    connectionsLeftOut: Math.max(0, connections.length - MOST_EXPLAINED),
    detours: detours.map(({ detour, adds, why, ...rest }) => ({
      ...named(state, detour),
      ...rest,
      addsBytesPerSecond: whole(adds),
      why: why || null,
    })),
  };
}

/** What `/v1/explain` says of one connection. */
function explainOne(state: State, connection: Connection, now: number, wallAt: WallAt): Json {
  return {
    token: hex(connection.token),
    local: formatEndpoint(connection.local),
    remote: formatEndpoint(connection.remote),
    since: wallAt(connection.since),
    why: shortfall(state, connection),
    paths: explainConnection(state, connection, now).map(({ detour, rate, adds, why, ...rest }) => ({
      ...named(state, detour),
      ...rest,
      bytesPerSecond: whole(rate),
      addsBytesPerSecond: whole(adds),
      why: why || null,
    })),
  };
}

/** A detour by its name and control address; the direct path has none. */
function named(state: State, detour: string | null): { detour: string; address: string | null } {
  if (detour === null) return { detour: DIRECT, address: null };
  const tunnel = state.tunnels.get(detour);
  if (tunnel) return { detour: `${tunnel.site} (vpn)`, address: null };
  const known = state.detours.get(detour);
  return { detour: known?.name ?? detour, address: known ? formatEndpoint(known.endpoint) : null };
}

/** What people call the detour that a path runs through. */
const siteOf = ({ detours, tunnels }: State, key: string): string =>
  tunnels.get(key)?.site ?? detours.get(key)?.name ?? key;

/** Servers that do not answer directly, or are being asked. */
export function showRescues(state: State, { cases }: Rescue, wallAt: WallAt): JsonObject[] {
  return [...cases.values()].map(({ server, since, via, failures }) => ({
    server: formatEndpoint(server),
    state: via ? 'rescued' : failures > 0 ? 'unreachable' : 'asked',
    detour: via && named(state, via.detour).detour,
    since: wallAt(since),
  }));
}

function showConnection(
  state: State,
  connection: Connection,
  sample: ConnectionSample | undefined,
  now: number,
  wallAt: WallAt,
): JsonObject {
  const rows = explainConnection(state, connection, now);
  return {
    token: hex(connection.token),
    local: formatEndpoint(connection.local),
    remote: formatEndpoint(connection.remote),
    since: wallAt(connection.since),
    why: shortfall(state, connection),
    paths: connection.paths.map((path) =>
      showPath(
        state,
        path,
        sample?.subflows ?? [],
        rows.find(({ detour }) => detour === path.detour),
        wallAt,
      ),
    ),
    unused: rows
      .filter(({ state: at }) => at === 'not used')
      .map(({ detour, adds, why }) => ({ ...named(state, detour), addsBytesPerSecond: whole(adds), why: why || null })),
  };
}

function showPath(
  state: State,
  path: Path,
  subflows: readonly SubflowSample[],
  row: Row | undefined,
  wallAt: WallAt,
): Json {
  const { local, remote } = path;
  const text = { local: local && formatEndpoint(local), remote: remote && formatEndpoint(remote) };
  const now = subflows.find(
    (one) => text.local === formatEndpoint(one.local) && text.remote === formatEndpoint(one.remote),
  );
  return {
    kind: path.kind === 'spare' ? 'direct' : path.kind === 'nat' && path.inband ? 'inband' : path.kind,
    detour: path.detour === null || path.kind === 'spare' ? null : siteOf(state, path.detour),
    ...text,
    state: path.state,
    backup: now?.backup ?? path.state === 'backup',
    rttMs: now ? round(now.rttMs) : null,
    deliveredBytes: now ? now.bytesAcked + now.bytesReceived : 0,
    retransmits: now?.retransmits ?? 0,
    since: wallAt(path.since),
    bytesPerSecond: row ? whole(row.rate) : null,
    why: path.why || (path.state === 'active' ? null : row?.why) || null,
    verdict: row?.why || null,
    ...(path.led ? { rescued: true } : {}),
  };
}

const whole = (rate: number | null): number | null => (rate === null ? null : Math.round(rate));

const round = (ms: number): number => Math.round(ms * 1000) / 1000;

export const hex = (token: number): string => token.toString(16).padStart(8, '0');
