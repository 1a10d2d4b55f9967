import { type Address, formatAddress, formatPrefix, prefixOf, sameAddress } from '../protocol/address.ts';
import { type Explanation, mbps } from './paths.ts';
import { explainPaths, isReserve } from './slots.ts';
import {
  type Connection,
  type Detour,
  insideOf,
  leaseKey,
  type Path,
  type PathState,
  type State,
  type Tunnel,
} from './state.ts';
import { type Belief, beliefs, DIRECT, PREFIX_LENGTH, prefixOf as prefixKeyOf } from './worth.ts';

/** For people: what is known of every detour, and why it is used or not. Reading changes nothing. */

/** One way to a server. */
export type Row = {
  /** Key of the detour; null: the direct path. */
  readonly detour: string | null;
  readonly state: PathState | 'not used';
  /** What it carries now, bytes/s. */
  readonly rate: number | null;
  /** What it was last found to add to its connection, bytes/s; null when that was never measured. */
  readonly adds: number | null;
  readonly why: string;
};

/** Every path that the connection has, and every detour that it could have one through. */
export function explainConnection(state: State, connection: Connection, now: number): Row[] {
  const known = new Map(explainPaths(state, connection, now).map((one) => [one.path, one]));
  const rows = connection.paths.map((path) => rowOf(path, known.get(path.detour ?? DIRECT)));
  const believed = beliefsOf(state, connection.remote.address, [...state.detours.keys()], now);
  for (const detour of state.detours.values()) {
    if (isIrrelevant(state, detour, connection.remote.address)) continue;
    const at = connection.paths.find((path) => path.detour === detour.key);
    if (at && at.state !== 'failed' && at.state !== 'retired') continue;
    const candidate = known.get(detour.key);
    const why = candidate?.why ?? (at?.why || whyUnusable(state, connection, detour, now));
    const belief = believed.get(detour.key);
    const adds = belief && belief.holds > 0 ? belief.measured : null;
    const row: Row = { detour: detour.key, state: at?.state ?? 'not used', rate: null, adds, why };
    const shown = rows.findIndex((one) => at !== undefined && one.detour === detour.key);
    if (shown < 0) rows.push(row);
    else rows[shown] = row;
  }
  for (const tunnel of state.tunnels.values()) {
    const at = rows.findIndex(({ detour }) => detour === tunnel.key);
    const path = connection.paths.find(({ detour }) => detour === tunnel.key);
    if (path && path.state !== 'failed' && path.state !== 'retired') continue;
    const candidate = known.get(tunnel.key);
    const why = candidate?.why ?? (path?.why || whyNotThrough(tunnel, connection.remote.address, now));
    const row: Row = {
      detour: tunnel.key,
      state: path?.state ?? 'not used',
      rate: null,
      adds: candidate?.adds ?? null,
      why,
    };
    if (at < 0) rows.push(row);
    else rows[at] = row;
  }
  return rows;
}

/** Why no connection to `address` could use the tunnel now. */
function whyNotThrough(tunnel: Tunnel, { family }: Address, now: number): string {
  if (tunnel.state === 'asked' || tunnel.state === 'down') return tunnel.why;
  if (insideOf(tunnel, family) === null) return `it carries no IPv${family}`;
  if (tunnel.suspendedUntil > now) return `${tunnel.why}; again in ${seconds(tunnel.suspendedUntil - now)}`;
  return 'its turn has not come';
}

function rowOf(path: Path, explained: Explanation | undefined): Row {
  return {
    detour: path.detour,
    state: path.state,
    rate: explained ? explained.rate : null,
    adds: explained?.adds ?? null,
    why: path.why || explained?.why || '',
  };
}

/** What is known of a destination to which there need be no connection. */
export type Destination = {
  /** As text; destinations within it are taken for one. */
  readonly prefix: string;
  /** What the direct path was found to carry, bytes/s; null when never measured. */
  readonly direct: number | null;
  readonly detours: readonly {
    readonly detour: string;
    readonly state: Detour['state'];
    readonly adds: number | null;
    readonly why: string;
  }[];
};

/** What is believed of every detour towards `address`. */
export function explainDestination(state: State, address: Address, now: number): Destination {
  const believed = beliefsOf(state, address, [...state.detours.keys()], now);
  const direct = state.experience.prefixes.get(prefixKeyOf(address))?.direct ?? 0;
  return {
    prefix: formatPrefix(prefixOf(address, PREFIX_LENGTH[address.family])),
    direct: direct > 0 ? direct : null,
    detours: [...state.detours.values()]
      .filter((detour) => !isIrrelevant(state, detour, address))
      .map((detour) => {
        const belief = believed.get(detour.key);
        return {
          detour: detour.key,
          state: detour.state,
          adds: belief && belief.holds > 0 ? belief.measured : null,
          why: whyNever(state, detour, address, now) || (belief ? hearsay(belief, now) : ''),
        };
      }),
  };
}

function beliefsOf(state: State, address: Address, keys: readonly string[], now: number): Map<string, Belief> {
  const all = beliefs(state.experience, prefixKeyOf(address), keys, 0, now);
  return new Map(keys.flatMap((key, i) => (all[i] ? [[key, all[i]] as const] : [])));
}

/** Of a detour with addresses of both families only the one that can serve is worth a line. */
function isIrrelevant(state: State, detour: Detour, { family }: Address): boolean {
  return (
    detour.address.family !== family &&
    [...state.detours.values()].some((other) => other.name === detour.name && other.address.family === family)
  );
}

/** Why no connection to `address` could use the detour now; empty when one could. */
function whyNever(state: State, detour: Detour, address: Address, now: number): string {
  if (detour.address.family !== address.family)
    return `it has no IPv${address.family} address, and a connection is relayed in its own family`;
  if (sameAddress(detour.address, address)) return `it is the server itself (${formatAddress(address)})`;
  if (detour.state === 'starting' || detour.state === 'down') return detour.why;
  if (detour.suspendedUntil > now) return `${detour.why}; again in ${seconds(detour.suspendedUntil - now)}`;
  if (isReserve(state, detour, now)) return 'its source wants others used first, and one of them is up';
  if (detour.pausedUntil > now) return `it grants no new leases; again in ${seconds(detour.pausedUntil - now)}`;
  return '';
}

function whyUnusable(state: State, connection: Connection, detour: Detour, now: number): string {
  if (connection.unmanaged !== null) return connection.unmanaged;
  if (!state.rules.kinds.includes('nat')) return 'DETOUR_STRATEGY has no leases';
  const never = whyNever(state, detour, connection.remote.address, now);
  if (never !== '') return never;
  const lease = state.leases.get(leaseKey(detour.key, connection.server));
  if (lease?.state === 'refused' && lease.retryAt > now)
    return `no lease: ${lease.why}; again in ${seconds(lease.retryAt - now)}`;
  return connection.establishedAt === null ? 'the connection is not established yet' : 'its turn has not come';
}

function hearsay(belief: Belief, now: number): string {
  if (belief.retryAt > now) return `it failed; again in ${seconds(belief.retryAt - now)}`;
  const usual = `taken for one like others, which add ${mbps(belief.usual)}`;
  if (belief.holds === 0) return belief.usual > 0 ? `not tried yet; ${usual}` : 'not tried yet';
  return `measured; that this still holds is taken to be ${Math.round(belief.holds * 100)} % likely`;
}

const seconds = (ms: number): string => `${Math.ceil(ms / 1000)} s`;
