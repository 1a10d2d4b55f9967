import { confirm, destroy, fail } from './joins.ts';
import { fill } from './slots.ts';
import {
  type Command,
  type Connection,
  type Detour,
  type Event,
  enter,
  entranceOf,
  inUse,
  isLive,
  isNatural,
  isUp,
  noTraffic,
  type Path,
  remove,
  type State,
  type Tunnel,
} from './state.ts';
import { forgetDetour, forgive } from './worth.ts';

/** Which tunnels there should be, and what becomes of them and of the paths through them. Pure. */

const tunnelKey = (site: string): string => `vpn@${site}`;

/**
 * Makes wanted what is to be had and of use, and lets go of the rest: where tunnels are the last resort, also of those that nothing
 * runs through when leases may do again. Called whenever detours change, and every tick.
 */
export function considerTunnels(state: State, now: number, out: Command[]): void {
  const { kinds, fallback = false } = state.rules;
  if (!kinds.includes('vpn')) return;
  const sites = new Map<string, Detour[]>();
  for (const detour of state.detours.values()) {
    if (isNatural(state, detour)) sites.set(detour.name, [...(sites.get(detour.name) ?? []), detour]);
  }
  for (const [site, all] of sites) {
    if (state.tunnels.has(tunnelKey(site)) || !entranceOf(state, site)) continue;
    if (!fallback || all.some(({ useless }) => useless !== null)) want(state, site, out);
  }
  for (const tunnel of [...state.tunnels.values()]) {
    const all = sites.get(tunnel.site) ?? [];
    // One that does not answer may do so again; one that answers and offers none does not mean to.
    const refused = all.length === 0 || all.some((detour) => isUp(detour) && detour.tunnels === 0);
    const needless = fallback && all.some(isUp) && all.every(({ useless }) => useless === null);
    if (refused || (needless && !runsThrough(state, tunnel)))
      release(state, tunnel, refused ? 'its detour offers no tunnel any more' : '', now, out);
  }
}

function want(state: State, site: string, out: Command[]): void {
  const key = tunnelKey(site);
  state.tunnels.set(key, {
    ...noTraffic(),
    key,
    site,
    state: 'asked',
    why: 'it is being made',
    v4: null,
    v6: null,
    rttMs: null,
    mark: entranceOf(state, site)?.tunnels ?? 0,
  });
  out.push({ kind: 'want-tunnel', site });
}

function release(state: State, tunnel: Tunnel, why: string, now: number, out: Command[]): void {
  endPaths(state, tunnel, why, now, out);
  state.tunnels.delete(tunnel.key);
  forgetDetour(state.experience, tunnel.key);
  out.push({ kind: 'release-tunnel', site: tunnel.site });
}

/** Whether a detour's tunnel has another other end by now: its router has a new key. */
export function onMark(state: State, { name, tunnels }: Detour, out: Command[]): void {
  const tunnel = state.tunnels.get(tunnelKey(name));
  if (!tunnel || tunnels === 0 || tunnel.mark === tunnels) return;
  tunnel.mark = tunnels;
  out.push({ kind: 'want-tunnel', site: name });
}

/** Asks for every tunnel anew: the way to it may have changed, and its addresses may be somebody's here. */
export function renewTunnels(state: State, out: Command[]): void {
  for (const { site } of state.tunnels.values()) out.push({ kind: 'want-tunnel', site });
}

const pathThrough = ({ paths }: Connection, { key }: Tunnel): Path | undefined =>
  paths.find((path) => path.kind === 'vpn' && path.detour === key);

const runsThrough = (state: State, tunnel: Tunnel): boolean =>
  [...state.connections.values()].some((connection) => {
    const path = pathThrough(connection, tunnel);
    return path !== undefined && isLive(path);
  });

/** It carries packets. */
export function onTunnelUp(
  state: State,
  { site, v4, v6, rttMs }: Extract<Event, { kind: 'tunnel-up' }>,
  now: number,
  out: Command[],
): void {
  const tunnel = state.tunnels.get(tunnelKey(site));
  if (!tunnel) return;
  const news = tunnel.state !== 'up' && tunnel.state !== 'suspended';
  tunnel.v4 = v4;
  tunnel.v6 = v6;
  tunnel.rttMs = rttMs;
  if (news) {
    // What failed before says nothing about now.
    Object.assign(tunnel, { ...noTraffic(), state: 'up', why: '' });
    forgive(state.experience, tunnel.key);
  }
  for (const connection of state.connections.values()) {
    const path = pathThrough(connection, tunnel);
    if (news && path?.state === 'failed') path.retryAt = now;
    const waits = path !== undefined && confirm(state, connection, path, now, out);
    if (news || waits) fill(state, connection, now, out);
  }
}

/** It carries nothing, or cannot be had. */
export function onTunnelDown(
  state: State,
  { site, why }: Extract<Event, { kind: 'tunnel-down' }>,
  now: number,
  out: Command[],
): void {
  const tunnel = state.tunnels.get(tunnelKey(site));
  if (!tunnel) return;
  tunnel.state = 'down';
  tunnel.why = why;
  for (const connection of state.connections.values()) {
    const path = pathThrough(connection, tunnel);
    if (path?.state !== 'requested') continue;
    // Not the path's fault: it costs no back-off, and `tunnel-up` starts it again.
    enter(path, 'failed', now, `the tunnel carries nothing: ${why}`);
    path.retryAt = now;
    fill(state, connection, now, out);
  }
}

/** Its addresses are about to go. What runs from them ends now, as long as the servers can still be told. */
export function onTunnelGone(
  state: State,
  { site, why }: Extract<Event, { kind: 'tunnel-gone' }>,
  now: number,
  out: Command[],
): void {
  const tunnel = state.tunnels.get(tunnelKey(site));
  if (!tunnel) return;
  tunnel.state = 'asked';
  tunnel.why = why;
  tunnel.v4 = null;
  tunnel.v6 = null;
  endPaths(state, tunnel, why, now, out);
}

function endPaths(state: State, tunnel: Tunnel, why: string, now: number, out: Command[]): void {
  for (const connection of state.connections.values()) {
    const path = pathThrough(connection, tunnel);
    if (!path) continue;
    const { local, remote } = path;
    if (inUse(path) && local && remote) {
      destroy(connection, { local, remote }, out);
      out.push({ kind: 'abort-subflow', local, remote });
      connection.commanded = true;
      fail(connection, path, why, now);
      out.push({ kind: 'joined', token: connection.token, detour: path.detour, outcome: 'lost', why });
    }
    remove(connection, path);
    fill(state, connection, now, out);
  }
}
