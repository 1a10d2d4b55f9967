import type { Cancel, Clock } from '../kernel/clock.ts';
import type { DatagramClient, Datagrams } from '../kernel/datagrams.ts';
import type { LinkInfo, Links } from '../kernel/links.ts';
import type { Network } from '../kernel/network.ts';
import type { Nft, NftFailure } from '../kernel/nft.ts';
import type { Carrier, KeyPair, Wireguard } from '../kernel/wireguard.ts';
import type { Log } from '../log.ts';
import {
  type Address,
  contains,
  type Endpoint,
  formatAddress,
  formatPrefix,
  type Prefix,
  parsePrefix,
  prefixOf,
  sameAddress,
  sameEndpoint,
} from '../protocol/address.ts';
import {
  COOKIE_BYTES,
  decodeResponse,
  encodeRequest,
  type Keys,
  type TunnelGrant,
  TYPE,
  VERSION,
} from '../protocol/control.ts';
import type { TunnelOutcome, TunnelQuestion } from './detours.ts';
import { REMOVE_GUARD, RENDER_GUARD, renderAnswers, renderNoAnswers } from './guard.ts';
import { clashOf, freeSlot, isOurSlot, isTunnelName, type Slot, tunnelName } from './numbering.ts';
import type { Event } from './state.ts';

/**
 * Makes the tunnels that enrolment.ts wants, and looks after them: asks the detour for its key and for addresses, makes the
 * interface, its addresses and the routing of what leaves from them, and finds out whether packets pass. The routes of everything
 * else stay as they are.
 */

export type TunnelEvent = Extract<Event, { kind: 'tunnel-up' | 'tunnel-down' | 'tunnel-gone' }>;

/** What of the kernel it takes. */
export type TunnelPorts = {
  readonly links: Links;
  readonly wireguard: Wireguard;
  readonly nft: Nft;
  /** Names the namespace among all of this host. */
  readonly place: string;
};

export type TunnelsOptions = {
  readonly keys: Keys;
  readonly clock: Clock;
  readonly datagrams: Datagrams;
  readonly log: Log;
  readonly ports: TunnelPorts;
  /** Where the kernel would send packets to some address. */
  readonly route: Network['route'];
  /** By which of its addresses to ask a detour now: its key and control address. Null when it does not answer. */
  readonly entrance: (site: string) => { readonly detour: string; readonly endpoint: Endpoint } | null;
  /** Asks a detour; `quick` gives up after one try. */
  readonly ask: (detour: string, question: TunnelQuestion, quick: boolean) => Promise<TunnelOutcome>;
  /** Whether connections run through it. */
  readonly inUse: (site: string) => boolean;
  readonly onEvent: (event: TunnelEvent) => void;
};

export type TunnelView = {
  readonly interface: string;
  readonly carrier: Carrier | null;
  readonly v4: string | null;
  readonly v6: string | null;
  readonly mtu: number | null;
};

export type Tunnels = {
  /** Makes it and keeps it; one that is there is asked for anew, and changed where that makes a difference. Answered by `tunnel-up` or `tunnel-down`, again and again. */
  want(site: string): void;
  /** Finds out at once whether it carries anything; answered likewise. */
  doubt(site: string): void;
  /** Gives it up. What runs through it has ended. */
  release(site: string): void;
  /** Null when there is none. */
  show(site: string): TunnelView | null;
  /** Takes all of them away. */
  stop(): Promise<void>;
};

/** docs/protocol.md, Tunnels. */
const LAST_CHOICE = 7;
/** UDP port inside the tunnel that answers "port unreachable". */
const ECHO_PORT = 9;
/** Outer headers: IP, 8 of UDP, 32 of WireGuard. */
const OVERHEAD = { 4: 60, 6: 80 } as const;
const IP_UDP_HEADERS = { 4: 28, 6: 48 } as const;
/** What every way carries (RFC 8200), and what fits into the 1,500 bytes of an Ethernet by IPv6. */
const LEAST_MTU = 1_280;
const MOST_MTU = 1_420;
/** A tunnel that worked is asked so often before it is doubted in earnest. */
const CHECK_WAITS_MS = [250, 250, 500] as const;
/** A new one may have lost the first packet of its handshake, which WireGuard repeats after 5 s (REKEY_TIMEOUT). */
const FIRST_WAITS_MS = [250, 250, 500, 1_000, 2_000, 2_500] as const;
const WIDE_WAITS_MS = [150, 250, 400] as const;
/** Below the 30 s after which home routers forget a UDP binding. */
const CHECK_MS = 25_000;
const RETRY_FIRST_MS = 5_000;
const RETRY_LONGEST_MS = 600_000;
const SPREAD = 0.1;
/** A key that nothing depends on is replaced when it is this old. */
const ROTATE_MS = 12 * 3_600_000;
/** How long goodbyes to detours may take. */
const LEAVE_MS = 400;
const TABLE_LOCAL = 255;

const EVERYTHING: readonly Prefix[] = ['0.0.0.0/0', '::/0'].map(prefix);
/** Addresses that say nothing of whether this host has a family. */
const NEAR = ['127.0.0.0/8', '169.254.0.0/16', '::1/128', 'fe80::/10'].map(prefix);

function prefix(literal: string): Prefix {
  const parsed = parsePrefix(literal);
  if (!parsed) throw new Error(`not a prefix: ${literal}`);
  return parsed;
}

/** A failure that is told as it is, and when to try again; null: after a while that grows. */
class Unavailable extends Error {
  readonly retryAt: number | null;

  constructor(message: string, retryAt: number | null = null) {
    super(message);
    this.retryAt = retryAt;
  }
}

type Grant = Extract<TunnelGrant, { kind: 'client' }>;
type Inside = { readonly address: Address; readonly gateway: Address };

/** What the kernel has of one. */
type Made = {
  readonly index: number;
  readonly slot: Slot;
  /** Families that have a route. */
  readonly routed: Set<4 | 6>;
  /** Public keys of both ends, and where the other one is; null before the first were set. */
  ends: { readonly own: Uint8Array; readonly router: Uint8Array; readonly at: Endpoint } | null;
  inside: readonly Inside[];
  mtu: number;
};

type Tunnel = {
  readonly site: string;
  readonly name: string;
  released: boolean;
  keys: KeyPair;
  keysAt: number;
  choice: number;
  carrier: Carrier | null;
  made: Made | null;
  /** A socket inside it, to the detour's control port. */
  probe: {
    readonly socket: DatagramClient;
    readonly peer: Endpoint;
    listener: ((bytes: Uint8Array) => void) | null;
  } | null;
  /** UDP port of the control protocol inside. */
  control: number;
  renewAt: number;
  expiresAt: number;
  /** It is to be asked for again, whether it carries or not. */
  anew: boolean;
  failures: number;
  /** What was said last of what is wrong; null while nothing is. */
  why: string | null;
  /** What is under way. */
  busy: Promise<void> | null;
  /** Somebody asked meanwhile. */
  again: boolean;
  timer: Cancel | null;
};

/** Takes away what earlier agents left, also in other processes' keeping. @returns the addresses that went with it. @throws NetlinkError, WireguardError */
export async function sweepTunnels({ links, wireguard, nft }: TunnelPorts): Promise<readonly Address[]> {
  const gone: Address[] = [];
  for (const { own } of await links.rules()) {
    if (!own || !isOurSlot(own)) continue;
    gone.push(own.from);
    await links.removeRule(own);
  }
  const left = (await links.links()).filter(({ name }) => isTunnelName(name));
  for (const { name } of left) await wireguard.remove(name);
  if (left.length + gone.length > 0) await nft.run(REMOVE_GUARD);
  return gone;
}

export function createTunnels(options: TunnelsOptions): Tunnels {
  const { keys, clock, datagrams, log, ports, onEvent } = options;
  const { links, wireguard, nft, place } = ports;
  const tunnels = new Map<string, Tunnel>();
  /** Of those given up, by detour, until they are gone. */
  const endings = new Map<string, Promise<void>>();
  const session = new DataView(new Uint8Array(clock.random(8)).buffer).getBigUint64(0);
  let sequence = 0n;
  let stopped = false;
  /** The guard is in the kernel. */
  let guarded = false;
  /** What changes numbers or rules happens one at a time. */
  let turn: Promise<unknown> = Promise.resolve();

  const inTurn = <T>(task: () => Promise<T>): Promise<T> => {
    const mine = turn.then(task);
    turn = mine.catch(() => undefined);
    return mine;
  };
  const roughly = (ms: number): number => {
    const chance = new DataView(new Uint8Array(clock.random(4)).buffer).getUint32(0) / 2 ** 32;
    return ms * (1 - SPREAD + 2 * SPREAD * chance);
  };
  const isGone = (tunnel: Tunnel): boolean => stopped || tunnel.released;

  function schedule(tunnel: Tunnel, ms: number): void {
    tunnel.timer?.();
    tunnel.timer = isGone(tunnel) ? null : clock.after(ms, () => run(tunnel));
  }

  /** Checks it, or makes it; one at a time, and once more when somebody asked meanwhile. */
  function run(tunnel: Tunnel): void {
    if (isGone(tunnel)) return;
    if (tunnel.busy) {
      tunnel.again = true;
      return;
    }
    tunnel.timer?.();
    tunnel.timer = null;
    tunnel.again = false;
    tunnel.busy = work(tunnel)
      .catch((error: unknown) => fail(tunnel, error))
      .finally(() => {
        tunnel.busy = null;
        if (tunnel.again) run(tunnel);
      });
  }

  async function work(tunnel: Tunnel): Promise<void> {
    const { anew } = tunnel;
    tunnel.anew = false;
    const worked = tunnel.made !== null && tunnel.why === null;
    const rttMs = worked ? await checked(tunnel) : null;
    if (isGone(tunnel)) return;
    if (rttMs !== null && !anew && clock.now() < tunnel.renewAt) {
      await rotate(tunnel);
      up(tunnel, rttMs);
      return;
    }
    try {
      await establish(tunnel, rttMs === null && !(worked && anew));
    } catch (error) {
      // What was promised holds until it runs out, whoever does not answer meanwhile.
      if (rttMs === null || !(error instanceof Unavailable) || clock.now() >= tunnel.expiresAt) throw error;
      tunnel.renewAt = clock.now() + RETRY_FIRST_MS;
      up(tunnel, rttMs);
    }
  }

  /** Round trip through a tunnel that worked, and its guard with it. */
  async function checked(tunnel: Tunnel): Promise<number | null> {
    if (tunnel.anew) return null;
    await guard(tunnel);
    return ping(tunnel, CHECK_WAITS_MS);
  }

  /**
   * Asks for everything, makes what differs from what there is, and finds out whether packets pass. A `silent` one gets a new
   * handshake even when nothing differs.
   */
  async function establish(tunnel: Tunnel, silent: boolean): Promise<void> {
    const entrance = options.entrance(tunnel.site);
    if (!entrance) throw new Unavailable('its detour does not answer');
    const { detour, endpoint } = entrance;
    const router = answered(await options.ask(detour, { kind: 'router' }, false));
    const { grant, expiresAt } = await enrol(tunnel, detour);
    if (isGone(tunnel) || router.grant?.kind !== 'router') return;
    const { publicKey, port, control } = router.grant;
    tunnel.control = control;
    tunnel.expiresAt = expiresAt;
    tunnel.renewAt = clock.now() + (expiresAt - clock.now()) / 2;
    const ends = { own: tunnel.keys.publicKey, router: publicKey, at: { address: endpoint.address, port } };
    const fresh = await inTurn(() => make(tunnel, ends, grant, silent));
    if (isGone(tunnel)) return;
    const rttMs = await ping(tunnel, FIRST_WAITS_MS);
    if (isGone(tunnel)) return;
    if (rttMs === null) {
      throw new Unavailable(
        `nothing comes back through it, although its detour answers: is UDP port ${port} open on the way?`,
      );
    }
    if (fresh) await widen(tunnel, grant.mtu);
    up(tunnel, rttMs);
  }

  function answered(outcome: TunnelOutcome): Extract<TunnelOutcome, { kind: 'granted' }> {
    if (outcome.kind === 'granted') return outcome;
    if (outcome.kind === 'unanswered') throw new Unavailable('its detour does not answer');
    throw new Unavailable(`its detour refuses: ${outcome.why}`, outcome.retryAt);
  }

  /** Addresses that are of use here. */
  async function enrol(tunnel: Tunnel, detour: string): Promise<{ grant: Grant; expiresAt: number }> {
    let clashed = '';
    for (let tries = 0; tries <= LAST_CHOICE; tries++) {
      const { publicKey } = tunnel.keys;
      const outcome = await options.ask(detour, { kind: 'client', publicKey, choice: tunnel.choice }, false);
      if (outcome.kind === 'refused' && outcome.why === 'NOT_AUTHORIZED') {
        // Somebody else named this key first: it says so of no other.
        tunnel.keys = wireguard.newKeys();
        tunnel.keysAt = clock.now();
        continue;
      }
      const { grant, expiresAt } = answered(outcome);
      if (grant?.kind !== 'client') throw new Unavailable('its detour answers nonsense');
      const found = await clash(tunnel, insides(grant));
      if (!found) return { grant, expiresAt };
      clashed = `${formatAddress(found.address)} lies in ${formatPrefix(found.network)}, which this host has already`;
      log.info('tunnel-renumbered', { detour: tunnel.site }, `Asking for another address inside a tunnel: ${clashed}`);
      tunnel.choice = (tunnel.choice + 1) % (LAST_CHOICE + 1);
    }
    throw new Unavailable(
      `no address inside it is free on this host: ${clashed}; on the detour, choose another DETOUR_VPN_NETWORK`,
    );
  }

  const insides = ({ v4, v6 }: Grant): Inside[] =>
    [v4, v6].flatMap((one) => {
      if (!one) return [];
      const network = prefixOf(one.address, one.length).address;
      return [{ address: one.address, gateway: { family: network.family, value: network.value + 1n } }];
    });

  /** Networks of this host that are none of our doing, and which families it has. */
  async function surroundings(): Promise<{ networks: Prefix[]; families: ReadonlySet<4 | 6> }> {
    const ours = new Set((await links.links()).flatMap(({ name, index }) => (isTunnelName(name) ? [index] : [])));
    const networks: Prefix[] = [];
    const families = new Set<4 | 6>();
    await links.routes(({ to, table, index }) => {
      if (index !== null && ours.has(index)) return;
      networks.push(to);
      if (table === TABLE_LOCAL && !NEAR.some((near) => contains(near, to.address))) families.add(to.address.family);
    });
    return { networks, families };
  }

  /** What of this host an address inside the tunnel is in the way of. */
  async function clash(
    tunnel: Tunnel,
    inside: readonly Inside[],
  ): Promise<{ address: Address; network: Prefix } | null> {
    const { networks } = await surroundings();
    const taken = [...tunnels.values()].flatMap((other) =>
      other === tunnel ? [] : (other.made?.inside ?? []).map(({ address }) => address),
    );
    for (const { address, gateway } of inside) {
      for (const one of [address, gateway]) {
        const network = clashOf(one, networks, one === address ? taken : []);
        if (network) return { address: one, network };
      }
    }
    return null;
  }

  /**
   * Brings the kernel in line with what was granted.
   * @returns whether the other end, or the way to it, is a new one
   * @throws what the ports throw; nothing of the tunnel is left then
   */
  async function make(
    tunnel: Tunnel,
    ends: NonNullable<Made['ends']>,
    grant: Grant,
    silent: boolean,
  ): Promise<boolean> {
    if (isGone(tunnel)) return false;
    try {
      await guard(null);
      const { families } = await surroundings();
      const wanted = insides(grant).filter(({ address }) => families.has(address.family));
      if (wanted.length === 0) throw new Unavailable('it carries no family that this host has');
      const made = await interfaceOf(tunnel);
      const kept = (one: Inside): boolean => wanted.some(({ address }) => sameAddress(one.address, address));
      const old = made.inside.filter((one) => !kept(one));
      // As long as it carries, servers can be told of the end of what ran from there.
      if (old.length > 0) onEvent({ kind: 'tunnel-gone', site: tunnel.site, why: 'it has other addresses now' });
      const fresh = silent || made.ends === null || !sameEnds(made.ends, ends);
      if (fresh) {
        await wireguard.change(tunnel.name, {
          privateKey: tunnel.keys.privateKey,
          port: 0,
          // Removed first: only a new peer begins with a new handshake.
          peers: [
            ...(made.ends ? [{ publicKey: made.ends.router, remove: true } as const] : []),
            { publicKey: ends.router, allowed: EVERYTHING, endpoint: ends.at },
          ],
        });
        made.ends = ends;
      }
      const before = made.inside.map(({ address }) => address);
      made.inside = [...made.inside.filter(kept)];
      for (const one of wanted) {
        if (!before.some((address) => sameAddress(address, one.address))) await assign(made, one);
      }
      await listen(tunnel, made);
      // After the new ones: with an interface's last address its routes would go.
      for (const { address } of old) {
        await links.removeRule({ from: address, ...made.slot });
        await links.withdraw(made.index, address, widthOf(address));
      }
      return fresh;
    } catch (error) {
      if ((tunnel.made?.inside.length ?? 0) > 0)
        onEvent({ kind: 'tunnel-gone', site: tunnel.site, why: 'it could not be kept' });
      await unmake(tunnel);
      throw error;
    }
  }

  /** The interface, made if it is not there, or not any more. */
  async function interfaceOf(tunnel: Tunnel): Promise<Made> {
    const present = await linkOf(tunnel.name);
    if (present && tunnel.made?.index === present.index) return tunnel.made;
    await unmake(tunnel);
    tunnel.carrier = await wireguard.create(tunnel.name);
    const link = await linkOf(tunnel.name);
    if (!link) throw new Error(`the interface ${tunnel.name} is gone already`);
    const slot = await slotFor();
    const made: Made = { index: link.index, slot, routed: new Set(), ends: null, inside: [], mtu: LEAST_MTU };
    tunnel.made = made;
    await links.raise(link.index, LEAST_MTU);
    return made;
  }

  /** What leaves from the address leaves by the tunnel; what leaves from any other does not. */
  async function assign(made: Made, inside: Inside): Promise<void> {
    const { address } = inside;
    const { family } = address;
    made.inside = [...made.inside, inside];
    await links.assign(made.index, address, widthOf(address), true);
    if (!made.routed.has(family)) await links.addDefault(made.slot.table, made.index, family);
    made.routed.add(family);
    await links.addRule({ from: address, ...made.slot });
  }

  const linkOf = async (name: string): Promise<LinkInfo | null> =>
    (await links.links()).find((one) => one.name === name) ?? null;

  async function slotFor(): Promise<Slot> {
    const tables = new Set<number>();
    await links.routes(({ table }) => tables.add(table));
    for (const { made } of tunnels.values()) if (made) tables.add(made.slot.table);
    const slot = freeSlot(await links.rules(), tables);
    if (!slot) throw new Unavailable('no table and priority of ours is free (ip rule, ip route show table all)');
    return slot;
  }

  /** Sees to the rules of guard.ts, and that they let answers to this tunnel in. @throws Unavailable */
  async function guard(tunnel: Tunnel | null): Promise<void> {
    const probe = tunnel?.probe;
    if (guarded && !probe) return;
    if (guarded && tunnel && probe) {
      const failure = await nft.run(renderAnswers(answersOf(tunnel.name, probe)));
      if (!failure) return;
      // Somebody flushed the rules, ours with them.
      if (failure.kind !== 'absent') throw unguarded(failure);
    }
    const all = [...tunnels.values()].flatMap(({ name, probe: one }) =>
      one ? [renderAnswers(answersOf(name, one))] : [],
    );
    const failure = await nft.run(`${RENDER_GUARD}${all.join('')}`);
    guarded = failure === null;
    if (failure) throw unguarded(failure);
  }

  /** Without them whoever runs the detour could reach what listens on this host. */
  const unguarded = ({ message }: NftFailure): Unavailable => new Unavailable(`nft cannot guard it: ${message}`);

  /** Opens the socket inside, and lets answers to it in. */
  async function listen(tunnel: Tunnel, made: Made): Promise<void> {
    const [inside] = made.inside;
    if (!inside) return;
    const peer: Endpoint = { address: inside.gateway, port: tunnel.control };
    const { probe } = tunnel;
    if (probe && sameEndpoint(probe.peer, peer) && sameAddress(probe.socket.local().address, inside.address)) return;
    await deafen(tunnel);
    const socket = await datagrams.connect(
      peer,
      (bytes) => tunnel.probe?.listener?.(bytes),
      () => undefined,
      inside.address,
    );
    tunnel.probe = { socket, peer, listener: null };
    await guard(tunnel);
  }

  const answersOf = (name: string, { socket, peer }: NonNullable<Tunnel['probe']>) => ({
    name,
    from: peer.port,
    to: socket.local().port,
  });

  async function deafen(tunnel: Tunnel): Promise<void> {
    const { probe } = tunnel;
    tunnel.probe = null;
    if (!probe) return;
    probe.socket.close();
    if (guarded) await nft.run(renderNoAnswers(answersOf(tunnel.name, probe)));
  }

  /** Round trip through the tunnel, ms; null when nothing came back. */
  async function ping(tunnel: Tunnel, waits: readonly number[]): Promise<number | null> {
    const { probe } = tunnel;
    if (!probe) return null;
    for (const wait of waits) {
      sequence += 1n;
      const question = encodeRequest({ ...HELLO, keyId: keys.id, session, sequence }, keys);
      const askedAt = clock.now();
      const heard = await within(wait, (resolve) => {
        probe.listener = (bytes) => {
          if (decodeResponse(bytes, keys, question)) resolve(true);
        };
        probe.socket.send(question);
      });
      probe.listener = null;
      if (heard) return clock.now() - askedAt;
      if (isGone(tunnel) || tunnel.probe !== probe) return null;
    }
    return null;
  }

  /** True when `begin` says so within the time. */
  async function within(ms: number, begin: (resolve: (yes: boolean) => void) => void): Promise<boolean> {
    const { promise, resolve } = Promise.withResolvers<boolean>();
    const cancel = clock.after(ms, () => resolve(false));
    begin(resolve);
    const outcome = await promise;
    cancel();
    return outcome;
  }

  /**
   * Uses larger packets when they pass: a datagram as long as the MTU is answered by "port unreachable". Where routers on the way
   * drop them and say nothing, the smaller ones that every way carries stay.
   */
  async function widen(tunnel: Tunnel, told: number): Promise<void> {
    const { made } = tunnel;
    const [inside] = made?.inside ?? [];
    if (!made?.ends || !inside) return;
    const { address: at } = made.ends.at;
    const way = await options.route(at).catch(() => null);
    const outer = (await links.links()).find(({ index }) => index === way?.index)?.mtu ?? MOST_MTU;
    const mtu = Math.min(told || MOST_MTU, MOST_MTU, outer - OVERHEAD[at.family]);
    if (mtu <= LEAST_MTU) return;
    await links.raise(made.index, mtu);
    const passes = await echoes(inside, mtu).catch(() => false);
    made.mtu = passes ? mtu : LEAST_MTU;
    if (!passes) await links.raise(made.index, LEAST_MTU);
  }

  async function echoes({ address, gateway }: Inside, mtu: number): Promise<boolean> {
    let refused: (yes: boolean) => void = () => undefined;
    const at = { address: gateway, port: ECHO_PORT };
    const socket = await datagrams.connect(
      at,
      () => undefined,
      () => refused(true),
      address,
    );
    const datagram = new Uint8Array(mtu - IP_UDP_HEADERS[address.family]);
    try {
      for (const wait of WIDE_WAITS_MS) {
        const heard = await within(wait, (resolve) => {
          refused = resolve;
          socket.send(datagram);
        });
        if (heard) return true;
      }
      return false;
    } finally {
      socket.close();
    }
  }

  /** Replaces a key that is old, while nobody would notice: another key has other addresses. */
  async function rotate(tunnel: Tunnel): Promise<void> {
    if (clock.now() - tunnel.keysAt < ROTATE_MS || options.inUse(tunnel.site)) return;
    await leave(tunnel);
    tunnel.keys = wireguard.newKeys();
    tunnel.keysAt = clock.now();
    tunnel.anew = true;
    tunnel.again = true;
    log.info('tunnel-rekeyed', { detour: tunnel.site }, 'Made a new key for a tunnel');
  }

  function up(tunnel: Tunnel, rttMs: number): void {
    const { made, site } = tunnel;
    if (!made || isGone(tunnel)) return;
    const of = (family: 4 | 6): Address | null =>
      made.inside.find(({ address }) => address.family === family)?.address ?? null;
    const [v4, v6] = [of(4), of(6)];
    if (tunnel.why !== null) {
      const { carrier } = tunnel;
      const shown = { detour: site, interface: tunnel.name, carrier, mtu: made.mtu };
      log.info(
        'tunnel-up',
        { ...shown, v4: v4 && formatAddress(v4), v6: v6 && formatAddress(v6) },
        `A tunnel to detour ${site} carries packets`,
      );
    }
    tunnel.why = null;
    tunnel.failures = 0;
    onEvent({ kind: 'tunnel-up', site, v4, v6, rttMs });
    schedule(tunnel, Math.min(roughly(CHECK_MS), Math.max(0, tunnel.renewAt - clock.now())));
  }

  function fail(tunnel: Tunnel, error: unknown): void {
    if (isGone(tunnel)) return;
    const why = error instanceof Error ? error.message : String(error);
    if (why !== tunnel.why)
      log.warn('tunnel-down', { detour: tunnel.site, why }, `No tunnel to detour ${tunnel.site}: ${why}`);
    tunnel.why = why;
    const wait = Math.min(RETRY_FIRST_MS * 2 ** Math.min(tunnel.failures++, 10), RETRY_LONGEST_MS);
    const retryAt = error instanceof Unavailable ? error.retryAt : null;
    onEvent({ kind: 'tunnel-down', site: tunnel.site, why });
    schedule(tunnel, roughly(Math.max(wait, retryAt === null ? 0 : retryAt - clock.now())));
  }

  /** Tells the detour, if it hears it. */
  async function leave({ site, keys: { publicKey }, made }: Tunnel): Promise<void> {
    const entrance = made && options.entrance(site);
    if (!entrance) return;
    const told = options.ask(entrance.detour, { kind: 'release', publicKey }, true);
    await within(LEAVE_MS, (resolve) => void told.finally(() => resolve(true)));
  }

  /** Leaves nothing of it in the kernel. */
  async function unmake(tunnel: Tunnel): Promise<void> {
    await deafen(tunnel);
    const { made } = tunnel;
    tunnel.made = null;
    if (made) {
      for (const { address } of made.inside) await links.removeRule({ from: address, ...made.slot }).catch(ignore);
    }
    await wireguard.remove(tunnel.name).catch(ignore);
  }

  const ignore = (error: unknown): void =>
    log.debug(
      'tunnel-left',
      { reason: error instanceof Error ? error.message : String(error) },
      'Taking a tunnel away failed',
    );

  async function end(tunnel: Tunnel): Promise<void> {
    tunnel.released = true;
    tunnel.timer?.();
    await leave(tunnel).catch(() => undefined);
    await inTurn(() => unmake(tunnel));
  }

  return {
    want(site) {
      const known = tunnels.get(site);
      if (known) {
        known.anew = true;
        run(known);
        return;
      }
      const fresh: Tunnel = {
        site,
        name: tunnelName(site, place),
        released: false,
        keys: wireguard.newKeys(),
        keysAt: clock.now(),
        choice: 0,
        carrier: null,
        made: null,
        probe: null,
        control: 0,
        renewAt: clock.now(),
        expiresAt: clock.now(),
        anew: false,
        failures: 0,
        why: '',
        busy: null,
        again: false,
        timer: null,
      };
      tunnels.set(site, fresh);
      // It gets the interface's name from the one before.
      void (endings.get(site) ?? Promise.resolve()).then(() => run(fresh));
    },
    doubt(site) {
      const tunnel = tunnels.get(site);
      if (tunnel) run(tunnel);
    },
    release(site) {
      const tunnel = tunnels.get(site);
      if (!tunnel) return;
      tunnels.delete(site);
      const ending = end(tunnel)
        .then(() => (tunnels.size === 0 ? inTurn(unguard) : undefined))
        .catch(ignore)
        .finally(() => {
          if (endings.get(site) === ending) endings.delete(site);
        });
      endings.set(site, ending);
    },
    show(site) {
      const tunnel = tunnels.get(site);
      if (!tunnel) return null;
      const of = (family: 4 | 6): string | null => {
        const found = tunnel.made?.inside.find(({ address }) => address.family === family);
        return found ? formatAddress(found.address) : null;
      };
      const { name, carrier, made } = tunnel;
      return { interface: name, carrier: made && carrier, v4: of(4), v6: of(6), mtu: made?.mtu ?? null };
    },
    async stop() {
      stopped = true;
      await Promise.all([...endings.values(), ...[...tunnels.values()].map(end)]);
      tunnels.clear();
      await inTurn(unguard);
      wireguard.close();
      links.close();
    },
  };

  async function unguard(): Promise<void> {
    if (!guarded || (tunnels.size > 0 && !stopped)) return;
    guarded = false;
    await nft.run(REMOVE_GUARD);
  }
}

const HELLO = {
  type: TYPE.HELLO,
  flags: 0,
  cookie: new Uint8Array(COOKIE_BYTES),
  lifetime: 0,
  vmin: VERSION,
  vmax: VERSION,
  destination: null,
  suggestedPort: 0,
  protocol: 0,
} as const;

const widthOf = ({ family }: Address): number => (family === 4 ? 32 : 128);

const sameEnds = (a: NonNullable<Made['ends']>, b: NonNullable<Made['ends']>): boolean =>
  sameBytes(a.own, b.own) && sameBytes(a.router, b.router) && sameEndpoint(a.at, b.at);

const sameBytes = (a: Uint8Array, b: Uint8Array): boolean =>
  a.length === b.length && a.every((byte, at) => byte === b[at]);
