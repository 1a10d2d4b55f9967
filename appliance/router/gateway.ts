import { Fatal } from '../exit.ts';
import type { Cancel } from '../kernel/clock.ts';
import type { LinkInfo, Links } from '../kernel/links.ts';
import type { DeviceState, KeyPair, PeerChange, PeerState, Wireguard } from '../kernel/wireguard.ts';
import { type Address, formatAddress, formatPrefix, type Prefix, parsePrefix, prefixOf } from '../protocol/address.ts';
import { defaultRetryAfter, RESULT, type Refusal, type TunnelGrant, tunnelMark } from '../protocol/control.ts';
import type { RouterSettings, VpnSettings } from '../settings.ts';
import type { Json } from '../status/daemon.ts';
import { hexKey, type Keeper, type KeeperPorts, TUNNEL_INTERFACE } from './keeper.ts';
import type { Notices } from './notices.ts';
import { FLUSH_TUNNELS, renderTunnel, renderTunnelRemoval, type TunnelElement } from './ruleset.ts';
import { gatewayOf, networkOf, overlapping, TUNNEL_MTU, type Tunnel, type TunnelAsk, Tunnels } from './tunnels.ts';

/** What makes tunnels, opened with `DETOUR_VPN` alone. */
export type TunnelPorts = { readonly links: Links; readonly wireguard: Wireguard };

/** A client's addresses without cookie, and for how long, seconds; or why it gets none and when to ask again. */
export type Enrolment =
  | {
      readonly kind: 'granted';
      readonly lifetime: number;
      readonly grant: Omit<Extract<TunnelGrant, { kind: 'client' }>, 'cookie'>;
    }
  | { readonly kind: 'refused'; readonly result: Refusal; readonly retryAfter: number };

/** For clients whose own networks cover the router's (RFC 2544: measurements inside one network, nobody's Internet). */
const RESERVE = parsePrefix('198.19.0.0/16');
/** Outer headers: 40 of IPv6, 8 of UDP, 32 of WireGuard. */
const OVERHEAD = 80;
/** What every way carries (RFC 8200). */
const LEAST_MTU = 1_280;
const UPKEEP_MS = 30_000;
const SWEEP_MS = 5_000;
/** Requests that wait for the kernel, each some milliseconds; more are not answered. */
const QUEUE_LENGTH = 256;
/** A tunnel in use has a new handshake every two minutes (WireGuard, Rekey-After-Time 120 s, Reject-After-Time 180 s). */
const DEAD_MS = 180_000;
const TABLE_MAIN = 254;
const TABLE_LOCAL = 255;

/**
 * The end of the tunnels: keeps the interface, its peers, and the addresses that the rules let through what the table of
 * tunnels says, whoever changes any of them. One step at a time. Nothing is stored anywhere but in the kernel: a restarted
 * router finds interface, key and peers there, and owners and times beside the addresses in nftables.
 */
export class Gateway {
  readonly #settings: VpnSettings;
  readonly #fwmark: RouterSettings['fwmark'];
  readonly #control: number;
  readonly #ports: KeeperPorts & TunnelPorts;
  readonly #notices: Notices;
  readonly #keeper: Keeper;
  readonly #networks: { v4: Prefix | null; v6: Prefix | null; reserve: Prefix | null };
  /** Of lifetimes, seconds. */
  readonly #longest: number;
  readonly #tunnels: Tunnels;
  #keys: KeyPair | null = null;
  #mtu = TUNNEL_MTU;
  #carrier: 'kernel' | 'wireguard-go' | null = null;
  #fault: string | null = null;
  #last: Promise<unknown> = Promise.resolve();
  #waiting = 0;
  #timer: Cancel | null = null;
  #sinceUpkeep = 0;
  #stopped = false;

  constructor(
    { fwmark, leaseTime, listen }: Pick<RouterSettings, 'fwmark' | 'leaseTime' | 'listen'>,
    settings: VpnSettings,
    ports: KeeperPorts & TunnelPorts,
    keeper: Keeper,
    notices: Notices,
  ) {
    this.#settings = settings;
    this.#fwmark = fwmark;
    this.#control = listen.port;
    this.#longest = Math.floor(leaseTime / 1000);
    this.#ports = ports;
    this.#keeper = keeper;
    this.#notices = notices;
    this.#networks = { v4: settings.v4, v6: settings.v6, reserve: settings.v4 && RESERVE };
    this.#tunnels = new Tunnels(this.#networks, this.#longest);
    keeper.onRestored = () => this.#soon(() => this.#repair());
  }

  /**
   * Takes over the interface that an earlier router left, or makes one. The rules must be there already.
   * @throws Fatal: 69 when this machine can carry no tunnels, 78 when their networks are its own
   */
  async start(keyIds: ReadonlySet<number>): Promise<void> {
    await this.#checkNetworks();
    try {
      const found = await this.#inherit();
      this.#mtu = await this.#fittingMtu();
      await (found ? this.#adopt(found, keyIds) : this.#make());
    } catch (error) {
      throw error instanceof Fatal ? error : new Fatal(69, `DETOUR_VPN=wireguard: ${messageOf(error)}`);
    }
    this.#tick();
    this.#ports.log.info(
      'tunnels-offered',
      { port: this.#settings.port, carrier: this.#carrier, tunnels: this.#tunnels.size, mtu: this.#mtu },
      this.#carrier === 'wireguard-go'
        ? 'offering tunnels by wireguard-go, because this kernel has no WireGuard: slower by far'
        : 'offering tunnels',
    );
  }

  /** See `tunnelMark`; 0 while there is no key. */
  get mark(): number {
    return this.#keys ? tunnelMark(this.#keys.publicKey) : 0;
  }

  get grant(): Extract<TunnelGrant, { kind: 'router' }> | null {
    const { port } = this.#settings;
    return this.#keys && { kind: 'router', publicKey: this.#keys.publicKey, port, control: this.#control };
  }

  /** The router's own addresses inside the tunnels. */
  get addresses(): readonly Address[] {
    const { v4, v6, reserve } = this.#networks;
    return [v4, v6, reserve].flatMap((network) => (network ? [gatewayOf(network)] : []));
  }

  get size(): number {
    return this.#tunnels.size;
  }

  /** What is wrong with it, for people; null when nothing is. */
  get trouble(): string | null {
    return this.#fault;
  }

  async status(): Promise<{ readonly vpn: Json; readonly tunnels: readonly Json[] }> {
    const { clock } = this.#ports;
    const device = await this.#read().catch(() => null);
    const peers = byKey(device?.peers ?? []);
    const vpn = {
      carrier: this.#carrier,
      port: this.#settings.port,
      mtu: this.#mtu,
      networks: Object.values(this.#networks)
        .flatMap((network) => (network ? [formatPrefix(network)] : []))
        .join(' '),
      trouble: this.#fault,
    };
    return {
      vpn,
      tunnels: this.#tunnels.all().map((tunnel) => {
        const peer = peers.get(text(tunnel.publicKey));
        return {
          ...this.#audit(tunnel),
          expiresInSeconds: Math.max(0, Math.round((tunnel.expires - clock.now()) / 1000)),
          handshakeSecondsAgo: peer?.handshakeAt == null ? null : Math.round((clock.wall() - peer.handshakeAt) / 1000),
          receivedBytes: peer?.received ?? 0,
          sentBytes: peer?.sent ?? 0,
        };
      }),
    };
  }

  /** Answers once the kernel has what is granted. */
  enrol(ask: TunnelAsk, answer: (enrolment: Enrolment) => void): void {
    if (this.#waiting >= QUEUE_LENGTH) {
      this.#notices.count('queue_dropped');
      return;
    }
    this.#soon(async () => answer(await this.#enrol(ask)));
  }

  /** Gives a tunnel up; `done` when it is gone, or never was. */
  release(owner: number, publicKey: Uint8Array, done: () => void): void {
    this.#soon(async () => {
      const tunnel = this.#tunnels.get(publicKey);
      if (tunnel?.owner === owner) {
        await this.#remove([tunnel]);
        this.#ports.log.info('tunnel-released', this.#audit(tunnel), 'released by its client');
      }
      done();
    });
  }

  /** Takes the tunnels of keys that are not accepted any more, and the flows in them. */
  revoke(owners: readonly number[]): Promise<void> {
    return this.#exclusively(async () => {
      for (const owner of owners) {
        const tunnels = this.#tunnels.of(owner);
        if (tunnels.length === 0) continue;
        await this.#remove(tunnels);
        let cut = 0;
        for (const address of tunnels.flatMap(({ v4, v6 }) => [v4, v6]))
          if (address) cut += await this.#ports.conntrack.cut(address, null, this.#fwmark);
        this.#ports.log.info('tunnels-revoked', { key: hexKey(owner), tunnels: tunnels.length, flows: cut }, 'gone');
      }
    });
  }

  /** Finishes what is under way. Interface, peers and flows stay. */
  async drain(): Promise<void> {
    this.#stopped = true;
    this.#timer?.();
    await this.#last.catch(() => undefined);
  }

  async #enrol(ask: TunnelAsk): Promise<Enrolment> {
    const { clock, log } = this.#ports;
    let plan = this.#tunnels.plan(ask, clock.now());
    if (plan.kind === 'refused' && plan.result === 'QUOTA' && (await this.#makeRoom(ask.owner)))
      plan = this.#tunnels.plan(ask, clock.now());
    if (plan.kind === 'refused') return refusal(plan.result, plan.retryAfter);
    // Who asks again may have been cut off: by somebody who took the interface away, for example.
    if ((await this.#link()) === null) await this.#repair();
    if (plan.kind === 'settled')
      return this.#granted(plan.tunnel, Math.floor((plan.tunnel.expires - clock.now()) / 1000));
    const { tunnel, lifetime, instead, renewal } = plan;
    const failure = await this.#keeper.change(renderTunnel(tunnel, lifetime, instead));
    if (failure) return refusal(failure.kind === 'full' ? 'NO_RESOURCES' : 'INTERNAL', null);
    try {
      if (!renewal) await this.#change([peerOf(tunnel)]);
    } catch (error) {
      this.#blame(error);
      await this.#keeper.change(renderTunnelRemoval(tunnel));
      // What was there before is not let through any more either.
      if (instead) await this.#remove([instead]);
      this.#soon(() => this.#repair());
      return refusal('INTERNAL', null);
    }
    const granted = this.#tunnels.commit(plan, clock.now());
    if (renewal) log.debug('tunnel-renewed', { ...this.#audit(granted), seconds: lifetime }, 'renewed');
    else log.info('tunnel-granted', { ...this.#audit(granted), seconds: lifetime }, 'granted');
    return this.#granted(granted, lifetime);
  }

  #granted({ v4, v6 }: Tunnel, lifetime: number): Enrolment {
    const { v4: first, reserve, v6: only } = this.#networks;
    const within = (address: Address | null, ...networks: readonly (Prefix | null)[]) => {
      const network = address && networkOf(address, networks);
      return address && network ? { address, length: network.length } : null;
    };
    const grant = { kind: 'client', v4: within(v4, first, reserve), v6: within(v6, only), mtu: this.#mtu } as const;
    return { kind: 'granted', lifetime, grant };
  }

  /** Gives up tunnels of a key that nobody uses: clients that were killed cannot say goodbye. */
  async #makeRoom(owner: number): Promise<boolean> {
    const device = await this.#read().catch(() => null);
    const peers = byKey(device?.peers ?? []);
    const { clock, log } = this.#ports;
    const dead = this.#tunnels.of(owner).filter(({ publicKey, since }) => {
      const at = peers.get(text(publicKey))?.handshakeAt ?? null;
      return clock.now() - since > DEAD_MS && (at === null || clock.wall() - at > DEAD_MS);
    });
    if (!device || dead.length === 0) return false;
    await this.#remove(dead);
    for (const tunnel of dead) log.info('tunnel-abandoned', this.#audit(tunnel), 'unused, and its key is at its limit');
    return true;
  }

  async #remove(tunnels: readonly Tunnel[]): Promise<void> {
    await this.#change(tunnels.map(({ publicKey }) => ({ publicKey, remove: true }))).catch((error: unknown) =>
      this.#blame(error),
    );
    await this.#keeper.change(tunnels.map(renderTunnelRemoval).join(''));
    for (const tunnel of tunnels) this.#tunnels.remove(tunnel, this.#ports.clock.now());
  }

  #change(peers: readonly PeerChange[]): Promise<void> {
    return this.#ports.wireguard.change(TUNNEL_INTERFACE, { peers });
  }

  #read(): Promise<DeviceState | null> {
    return this.#ports.wireguard.read(TUNNEL_INTERFACE);
  }

  async #link(): Promise<LinkInfo | null> {
    return (await this.#ports.links.links()).find(({ name }) => name === TUNNEL_INTERFACE) ?? null;
  }

  /** What an earlier router left and can be used as it is; anything else of that name goes. */
  async #inherit(): Promise<DeviceState | null> {
    const { links, wireguard } = this.#ports;
    const link = await this.#link();
    if (!link) return null;
    if (link.kind !== 'wireguard' && link.kind !== 'tun')
      throw new Fatal(
        69,
        `the name ${TUNNEL_INTERFACE} is taken by an interface of another kind: ip link show ${TUNNEL_INTERFACE}`,
      );
    this.#carrier = link.kind === 'wireguard' ? 'kernel' : 'wireguard-go';
    const device = await this.#read().catch(() => null);
    const held: string[] = [];
    await links.routes(({ to, table, index }) => {
      if (table === TABLE_LOCAL && index === link.index) held.push(formatAddress(to.address));
    });
    const wanted = this.addresses.map(formatAddress);
    if (device?.keys && held.every((address) => wanted.includes(address))) return device;
    await wireguard.remove(TUNNEL_INTERFACE);
    return null;
  }

  async #make(): Promise<void> {
    const { wireguard } = this.#ports;
    this.#keys ??= wireguard.newKeys();
    await this.#build();
    await this.#keeper.change(FLUSH_TUNNELS);
  }

  /** The interface with key and addresses, and no peers. */
  async #build(): Promise<void> {
    const { wireguard } = this.#ports;
    if (!this.#keys) return;
    this.#carrier = await wireguard.create(TUNNEL_INTERFACE);
    const link = await this.#link();
    if (!link) throw new Error(`the interface ${TUNNEL_INTERFACE} is gone already`);
    await wireguard.change(TUNNEL_INTERFACE, { privateKey: this.#keys.privateKey, port: this.#settings.port });
    await this.#raise(link.index);
  }

  async #raise(index: number): Promise<void> {
    const { links } = this.#ports;
    await links.raise(index, this.#mtu);
    for (const network of Object.values(this.#networks)) {
      if (!network) continue;
      try {
        await links.assign(index, gatewayOf(network), network.length, false);
      } catch (error) {
        if (codeOf(error) === 'EEXIST') continue;
        // A host without IPv6 carries the other family.
        if (network.address.family === 4) throw error;
        this.#networks.v6 = null;
      }
    }
    if (!this.#networks.v4 && !this.#networks.v6)
      throw new Error('this host has no IPv6, and no IPv4 network is given');
  }

  async #adopt(device: DeviceState, keyIds: ReadonlySet<number>): Promise<void> {
    const { wireguard, clock } = this.#ports;
    this.#keys = device.keys;
    if (device.port !== this.#settings.port) await wireguard.change(TUNNEL_INTERFACE, { port: this.#settings.port });
    const link = await this.#link();
    if (link) await this.#raise(link.index);
    const elements = await this.#elements();
    const strangers: PeerChange[] = [];
    for (const { publicKey, allowed } of device.peers) {
      const of = (family: 4 | 6): Address | null =>
        allowed.find(({ address }) => address.family === family)?.address ?? null;
      const [v4, v6] = [of(4), of(6)];
      const element = [v4, v6].flatMap((address) => elements.get(address ? formatAddress(address) : '') ?? [])[0];
      const known = element && keyIds.has(element.owner);
      const found = known && { owner: element.owner, choice: element.choice, publicKey, v4, v6 };
      if (!found || !this.#tunnels.adopt(found, element.remaining, clock.now()))
        strangers.push({ publicKey, remove: true });
    }
    if (strangers.length > 0) await this.#change(strangers);
    await this.#repair();
  }

  async #elements(): Promise<Map<string, TunnelElement>> {
    const found = await this.#keeper.tunnels();
    if ('kind' in found) throw new Error(`reading the addresses of tunnels: ${found.message}`);
    return new Map(found.flatMap((one) => (one ? [[formatAddress(one.address), one] as const] : [])));
  }

  /** Puts back what somebody took away, and takes away what is nobody's. */
  async #repair(): Promise<void> {
    if (this.#stopped) return;
    const { clock, log } = this.#ports;
    try {
      let device = await this.#read().catch(() => null);
      const lost = device === null || !device.keys || !sameKey(device.keys.publicKey, this.#keys?.publicKey);
      if (lost) {
        await this.#ports.wireguard.remove(TUNNEL_INTERFACE);
        await this.#build();
        device = await this.#read();
        log.warn(
          'tunnels-restored',
          { tunnels: this.#tunnels.size },
          'the interface of the tunnels was gone; made again',
        );
      }
      const present = byKey(device?.peers ?? []);
      const changes: PeerChange[] = [];
      for (const tunnel of this.#tunnels.all()) {
        if (!present.delete(text(tunnel.publicKey))) changes.push(peerOf(tunnel));
      }
      for (const { publicKey } of present.values()) changes.push({ publicKey, remove: true });
      if (changes.length > 0) await this.#change(changes);
      const elements = await this.#elements();
      const missing = this.#tunnels.all().filter((tunnel) => {
        const own = [tunnel.v4, tunnel.v6].filter((address) => address !== null);
        return !own.every((address) => elements.get(formatAddress(address))?.owner === tunnel.owner);
      });
      for (const tunnel of missing) {
        const left = Math.floor((tunnel.expires - clock.now()) / 1000);
        if (left > 0) await this.#keeper.change(renderTunnel(tunnel, left, null));
      }
      this.#fault = null;
    } catch (error) {
      this.#blame(error);
    }
  }

  async #sweep(): Promise<void> {
    const over = this.#tunnels.over(this.#ports.clock.now());
    if (over.length === 0) return;
    await this.#remove(over);
    for (const tunnel of over) this.#ports.log.info('tunnel-expired', this.#audit(tunnel), 'not renewed');
  }

  #tick(): void {
    if (this.#stopped) return;
    this.#timer = this.#ports.clock.after(SWEEP_MS, () => {
      this.#soon(() => this.#sweep());
      this.#sinceUpkeep += SWEEP_MS;
      if (this.#sinceUpkeep >= UPKEEP_MS) {
        this.#sinceUpkeep = 0;
        this.#soon(() => this.#repair());
      }
      this.#tick();
    });
  }

  /** Where this host's own networks are in the way: refuses to start, or does without the reserve. */
  async #checkNetworks(): Promise<void> {
    const link = await this.#link();
    const taken: Prefix[] = [];
    await this.#ports.links.routes(({ to, index }) => {
      if (to.length > 0 && index !== link?.index) taken.push(to);
    });
    const { v4, v6 } = this.#settings;
    const clash = overlapping(
      [v4, v6].filter((network) => network !== null),
      taken,
    );
    if (clash) {
      const { network, other } = clash;
      const example = network.address.family === 4 ? '10.216.0.0/16' : 'fd0d:e71::/48';
      throw new Fatal(
        78,
        `DETOUR_VPN_NETWORK: ${formatPrefix(network)} overlaps with ${formatPrefix(other)}, to which this host has a route (ip route show table all); ` +
          `give it another one, for example ${example}`,
      );
    }
    if (this.#networks.reserve && overlapping([this.#networks.reserve], taken)) this.#networks.reserve = null;
  }

  /** What fits through the links that the Internet is behind. */
  async #fittingMtu(): Promise<number> {
    const { links } = this.#ports;
    const all = new Map((await links.links()).map(({ index, mtu }) => [index, mtu]));
    let mtu = TUNNEL_MTU;
    await links.routes(({ to, table, index }) => {
      const outer = to.length === 0 && table === TABLE_MAIN && index !== null ? all.get(index) : undefined;
      if (outer !== undefined) mtu = Math.min(mtu, outer - OVERHEAD);
    });
    return Math.max(LEAST_MTU, mtu);
  }

  #blame(error: unknown): void {
    this.#fault = messageOf(error);
    this.#notices.count('wireguard_failed');
    this.#notices.warn('wireguard-failed', { reason: this.#fault }, 'WireGuard failed: no tunnel is granted meanwhile');
  }

  #audit({ owner, v4, v6 }: Tunnel): { key: string; v4: string | null; v6: string | null } {
    return { key: hexKey(owner), v4: v4 && formatAddress(v4), v6: v6 && formatAddress(v6) };
  }

  #exclusively(task: () => Promise<void>): Promise<void> {
    this.#waiting++;
    const mine = this.#last.then(task).finally(() => this.#waiting--);
    this.#last = mine.catch(() => undefined);
    return mine;
  }

  #soon(task: () => Promise<void>): void {
    this.#exclusively(task).catch((error: unknown) => {
      this.#ports.log.error('gateway-failed', { reason: messageOf(error) }, 'a bug: please report it');
    });
  }
}

const codeOf = (error: unknown): unknown => (error instanceof Error && 'code' in error ? error.code : null);
const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

const text = (key: Uint8Array): string => Buffer.from(key).toString('hex');
const sameKey = (a: Uint8Array, b: Uint8Array | undefined): boolean => b !== undefined && text(a) === text(b);
const byKey = (peers: readonly PeerState[]): Map<string, PeerState> =>
  new Map(peers.map((peer) => [text(peer.publicKey), peer]));

function peerOf({ publicKey, v4, v6 }: Tunnel): PeerChange {
  const allowed = [v4, v6].flatMap((address) => (address ? [prefixOf(address, address.family === 4 ? 32 : 128)] : []));
  return { publicKey, allowed };
}

function refusal(result: Exclude<keyof typeof RESULT, 'OK' | 'CHALLENGE'>, retryAfter: number | null): Enrolment {
  return { kind: 'refused', result: RESULT[result], retryAfter: retryAfter ?? defaultRetryAfter(RESULT[result]) };
}
