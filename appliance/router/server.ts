import type { Datagram, DatagramServer, Datagrams } from '../kernel/datagrams.ts';
import type { NftFailure } from '../kernel/nft.ts';
import { type Address, type Endpoint, formatAddress, formatEndpoint, sameAddress } from '../protocol/address.ts';
import {
  decodeRequest,
  defaultRetryAfter,
  deriveKeys,
  encodeResponse,
  FLAG_ANNOUNCED,
  FLAG_PEER,
  type Keys,
  PROTOCOL_TCP,
  RESULT,
  type Refusal,
  type Request,
  type Response,
  type Result,
  requestIsAuthentic,
  type TunnelGrant,
  type TunnelResponse,
  TYPE,
  VERSION,
} from '../protocol/control.ts';
import { COOKIE_LIFETIME, CookieJar } from '../protocol/cookie.ts';
import { decodeLegacyRequest, encodeLegacyResponse, LEGACY_BYTES } from '../protocol/legacy.ts';
import { type Session, Sessions } from '../protocol/window.ts';
import type { RouterSettings } from '../settings.ts';
import type { Json, Readiness } from '../status/daemon.ts';
import { Gateway, type TunnelPorts } from './gateway.ts';
import { hexKey, Keeper, type KeeperPorts } from './keeper.ts';
import { Notices } from './notices.ts';
import { judge } from './policy.ts';

/** The outside, as the router sees it. */
export type RouterPorts = KeeperPorts & {
  readonly datagrams: Datagrams;
  /** Opened with `DETOUR_VPN` alone. @throws NetlinkError */
  readonly openTunnels: () => TunnelPorts;
};

/** What was known about a datagram when it could first be answered. */
type Conversation = {
  readonly datagram: Datagram;
  readonly request: Request;
  readonly keys: Keys;
  readonly session: Session | null;
};

const STATUS_LEASES = 1_000;

/** A running router: who asks, whether they may, and what they are told. What it grants is the keeper's to put into the kernel. */
export class Router {
  readonly #settings: Omit<RouterSettings, 'keys'>;
  readonly #ports: RouterPorts;
  readonly #notices: Notices;
  readonly #keeper: Keeper;
  /** Null while it offers no tunnels. */
  readonly #gateway: Gateway | null;
  readonly #jar: CookieJar;
  readonly #sessions = new Sessions();
  readonly #keys = new Map<number, { keys: Keys; label: string | null }>();
  readonly #started: number;
  /** One for all addresses, or for the one that was named and for each of the tunnels. */
  #servers: DatagramServer[] = [];
  #draining = false;

  constructor(settings: RouterSettings, ports: RouterPorts) {
    const { keys, ...rest } = settings;
    this.#settings = rest;
    this.#ports = ports;
    this.#started = ports.clock.now();
    this.#notices = new Notices(ports.clock, ports.log);
    this.#jar = new CookieJar((bytes) => ports.clock.random(bytes), this.#started);
    for (const { id, secret, label } of keys) this.#keys.set(id, { keys: deriveKeys(id, secret), label });
    this.#keeper = new Keeper(rest, new Set(this.#keys.keys()), ports, this.#notices);
    this.#gateway =
      rest.vpn && new Gateway(rest, rest.vpn, { ...ports, ...ports.openTunnels() }, this.#keeper, this.#notices);
  }

  /**
   * Adopts what an earlier daemon left in the kernel, puts our rules there, and starts to answer. On failure it says
   * why, and nothing listens.
   * @throws Fatal when tunnels are asked for and cannot be had
   */
  async start(): Promise<NftFailure | null> {
    const failure = await this.#keeper.start();
    if (failure) return failure;
    const { datagrams, log } = this.#ports;
    await this.#gateway?.start(new Set(this.#keys.keys()));
    const { ports, relay, listen } = this.#settings;
    // What is asked inside a tunnel is answered there, wherever else it listens.
    const inside = listen.address.value === 0n ? [] : (this.#gateway?.addresses ?? []);
    for (const address of [listen.address, ...inside]) {
      const at = { address, port: listen.port };
      this.#servers.push(await datagrams.serve(at, (datagram) => this.#receive(datagram)));
    }
    log.info(
      'router-started',
      { epoch: this.epoch, leases: this.leaseCount, ports: `${ports.first}-${ports.last}`, relay },
      this.#keeper.origin === 'inherited' ? 'answering; took over what an earlier daemon left' : 'answering',
    );
    return null;
  }

  get epoch(): string {
    return this.#keeper.epoch;
  }

  /** Whose table it is: `inherited` from an earlier daemon, or `new`; null before anything was changed. */
  get origin(): 'new' | 'inherited' | null {
    return this.#keeper.origin;
  }

  readiness(): Readiness {
    const reasons = [...this.#keeper.troubles];
    const trouble = this.#gateway?.trouble ?? null;
    if (trouble !== null) reasons.push(`tunnels: ${trouble}`);
    if (this.#draining) reasons.unshift('shutting down');
    else if (this.#servers.length === 0) reasons.unshift('not listening yet');
    return { ready: reasons.length === 0, reasons };
  }

  async status(): Promise<{ readonly [key: string]: Json }> {
    const { clock, conntrack } = this.#ports;
    const { count, live } = this.#keeper.leases;
    const now = clock.now();
    const clients = new Map<string, number>();
    const leases: Json[] = [];
    for (const lease of live) {
      const client = formatAddress(lease.client);
      clients.set(client, (clients.get(client) ?? 0) + 1);
      if (leases.length >= STATUS_LEASES) continue;
      leases.push({
        key: hexKey(lease.owner),
        client,
        port: lease.port,
        destination: formatEndpoint(lease.destination),
        expiresInSeconds: Math.max(0, Math.round((lease.expires - now) / 1000)),
      });
    }
    const usage = await conntrack.usage();
    const flows = await conntrack.flows(this.#settings.fwmark, STATUS_LEASES);
    return {
      ...this.readiness(),
      epoch: this.epoch,
      uptimeSeconds: this.#uptime(now),
      listen: this.#servers.flatMap((server) => server.local()).map(formatEndpoint),
      relay: this.#settings.relay,
      forwarding: this.#keeper.forwarding,
      leaseCount: count,
      leases,
      ...(this.#keeper.capabilities && {
        inband: this.#keeper.capabilities.slice(0, STATUS_LEASES).map(({ owner, client, port, expires }) => ({
          key: hexKey(owner),
          client: formatAddress(client),
          port,
          expiresInSeconds: Math.max(0, Math.round((expires - now) / 1000)),
        })),
      }),
      ...(this.#keeper.announcements && {
        announced: this.#keeper.announcements.map(({ owner, server, expires }) => ({
          key: hexKey(owner),
          server: formatEndpoint(server),
          expiresInSeconds: Math.max(0, Math.round((expires - now) / 1000)),
        })),
      }),
      clients: [...clients].slice(0, STATUS_LEASES).map(([address, held]) => ({ address, leases: held })),
      flowCount: flows?.count ?? null,
      flows: (flows?.first ?? []).map(({ client, port, destination, state }) => ({
        client: formatEndpoint(client),
        port,
        destination: formatEndpoint(destination),
        state,
      })),
      conntrack: usage,
      ...(await this.#gateway?.status()),
    };
  }

  /** Tunnels granted now; null when it offers none. */
  get tunnelCount(): number | null {
    return this.#gateway?.size ?? null;
  }

  /** Clients whose joins may name their servers; null when nobody's may. */
  get capabilityCount(): number | null {
    return this.#keeper.capabilities?.length ?? null;
  }

  /** Servers that are announced; null when none may be. */
  get announcementCount(): number | null {
    return this.#keeper.announcements?.length ?? null;
  }

  /** Leases in the kernel now. */
  get leaseCount(): number {
    return this.#keeper.leases.count;
  }

  /** By cause; names are stable, the metrics are made of them. */
  get counters(): ReadonlyMap<string, number> {
    return this.#notices.counters;
  }

  /** Packets that the kernel's rules dropped or refused, by cause. */
  kernelCounters(): Promise<ReadonlyMap<string, number>> {
    return this.#keeper.kernelCounters();
  }

  /**
   * Replaces the accepted keys, all at once, and looks after the kernel's side. A key that is gone takes its leases and its
   * flows with it.
   * @throws RangeError for a secret of the wrong length; nothing has changed then.
   */
  async reload(keys: RouterSettings['keys']): Promise<void> {
    const next = new Map(keys.map(({ id, secret, label }) => [id, { keys: deriveKeys(id, secret), label }]));
    const revoked = [...this.#keys.keys()].filter((id) => !next.has(id));
    // A new secret under an old id is another key: who knew the old one has no more business here.
    for (const [id, { keys: held }] of this.#keys) {
      const other = next.get(id)?.keys;
      if (other && !Buffer.from(other.c2s).equals(held.c2s)) revoked.push(id);
    }
    this.#keys.clear();
    for (const [id, key] of next) this.#keys.set(id, key);
    for (const id of revoked) this.#sessions.forget(id);
    await this.#keeper.rekey(new Set(next.keys()), revoked);
    await this.#gateway?.revoke(revoked);
    this.#ports.log.debug('keys-replaced', { keys: next.size, revoked: revoked.length }, 'accepting the new keys');
  }

  /** Stops answering. Leases and rules stay in the kernel. Takes no longer than a few seconds. */
  async drain(): Promise<void> {
    this.#draining = true;
    await this.#gateway?.drain();
    await this.#keeper.drain();
    await Promise.all(this.#servers.map((server) => server.close()));
    this.#servers = [];
  }

  #uptime(now: number): number {
    return Math.floor((now - this.#started) / 1000);
  }

  #receive(datagram: Datagram): void {
    const { bytes, from } = datagram;
    if (this.#settings.legacyV1 && bytes.length === LEGACY_BYTES) {
      this.#receiveLegacy(datagram);
      return;
    }
    const request = decodeRequest(bytes);
    if (typeof request === 'string') {
      this.#notices.count(`malformed_${request}`);
      return;
    }
    const key = this.#keys.get(request.keyId);
    if (!key) {
      this.#notices.count('unknown_key');
      return;
    }
    if (!requestIsAuthentic(bytes, key.keys)) {
      this.#notices.count('bad_mac');
      return;
    }
    const now = this.#ports.clock.now();
    const { type, keyId, session: sessionId } = request;
    const open: Conversation = { datagram, request, keys: key.keys, session: null };
    if (type === TYPE.HELLO) {
      if (request.vmin > VERSION || request.vmax < VERSION) {
        this.#refuse(open, 'UNSUPPORTED');
        return;
      }
      this.#welcome(open, false);
      return;
    }
    const subject = { address: from.address, port: from.port, keyId, session: sessionId };
    if (!this.#jar.accepts(request.cookie, subject, now)) {
      this.#answer(open, RESULT.CHALLENGE, 0, 0);
      return;
    }
    const session = this.#sessions.use(keyId, sessionId);
    const freshness = session.window.check(request.sequence);
    if (freshness === 'stale') {
      this.#notices.count('replay_stale');
      return;
    }
    if (freshness === 'repeated') {
      const stored = session.answerTo(request.sequence, bytes);
      this.#notices.count(stored ? 'replay_answered' : 'replay_ignored');
      if (stored) this.#reply(datagram, stored);
      return;
    }
    session.window.advance(request.sequence);
    this.#serve({ ...open, session });
  }

  #serve(conversation: Conversation): void {
    const { request, datagram } = conversation;
    const { type, destination, protocol } = request;
    if (type === TYPE.PING) {
      this.#welcome(conversation, true);
      return;
    }
    if (type === TYPE.TUNNEL || request.peer) {
      this.#serveTunnel(conversation);
      return;
    }
    const isAnnouncement = type === TYPE.ANNOUNCE || (type === TYPE.RELEASE && request.flags === FLAG_ANNOUNCED);
    if (type !== TYPE.LEASE && type !== TYPE.RELEASE && !isAnnouncement) {
      this.#refuse(conversation, 'UNSUPPORTED');
      return;
    }
    if (!destination || destination.port === 0) {
      this.#refuse(conversation, 'MALFORMED');
      return;
    }
    if (protocol !== PROTOCOL_TCP) {
      this.#refuse(conversation, 'UNSUPPORTED');
      return;
    }
    const client = datagram.from.address;
    if (isAnnouncement) {
      this.#serveServer(conversation, destination);
      return;
    }
    if (type === TYPE.LEASE) {
      const refusal = this.#admit(destination, client);
      if (refusal) {
        this.#refuse(conversation, refusal);
        return;
      }
    }
    this.#keeper.submit({
      kind: type === TYPE.LEASE ? 'lease' : 'release',
      ask: {
        owner: request.keyId,
        client,
        destination,
        suggestedPort: request.suggestedPort,
        lifetime: request.lifetime,
      },
      answer: (result, lifetime, port) => {
        // Revoked while it waited: its holder is a stranger now.
        if (this.#keys.get(request.keyId)?.keys === conversation.keys)
          this.#answer(conversation, result, lifetime, port);
      },
    });
  }

  /** A server asks that anybody's joins be led to it, or no longer. */
  #serveServer(conversation: Conversation, server: Endpoint): void {
    const { request, keys, datagram } = conversation;
    const { announce } = this.#settings;
    if (announce.length === 0) {
      this.#refuse(conversation, 'UNSUPPORTED');
      return;
    }
    if (request.type === TYPE.ANNOUNCE) {
      const refusal = this.#admit(server, datagram.from.address);
      const isOwn = sameAddress(server.address, datagram.from.address);
      const isOpen = announce.some(({ first, last }) => first <= server.port && server.port <= last);
      if (refusal || !isOwn || !isOpen) {
        this.#refuse(conversation, refusal ?? 'DENIED_DESTINATION');
        return;
      }
    }
    this.#keeper.submit({
      kind: 'announcement',
      withdrawn: request.type === TYPE.RELEASE,
      ask: { owner: request.keyId, server, lifetime: request.lifetime },
      answer: (result, lifetime) => {
        const isGranted = result === RESULT.OK && request.type === TYPE.ANNOUNCE;
        if (this.#keys.get(request.keyId)?.keys === keys)
          this.#answer(conversation, result, lifetime, isGranted ? server.port : 0);
      },
    });
  }

  /** OK to HELLO and PING, once the kernel lets the client's joins name their servers. `proven`: it has shown a cookie. */
  #welcome(conversation: Conversation, proven: boolean): void {
    const { request, keys, datagram } = conversation;
    const client = datagram.from.address;
    const isMasked = this.#keeper.gateways.some((gateway) => sameAddress(gateway, client));
    if (!this.#settings.inband || client.family !== 4 || isMasked || this.#draining) {
      this.#answer(conversation, RESULT.OK, COOKIE_LIFETIME, 0);
      return;
    }
    this.#keeper.submit({
      kind: 'capability',
      ask: { owner: request.keyId, client, session: request.session, proven },
      answer: (port) => {
        if (this.#keys.get(request.keyId)?.keys === keys)
          this.#answer(conversation, RESULT.OK, COOKIE_LIFETIME, 0, port);
      },
    });
  }

  /** The router's end of the tunnels, the client's, or the end of one. */
  #serveTunnel(conversation: Conversation): void {
    const { request, keys } = conversation;
    const { keyId: owner, type, flags, peer, lifetime, destination } = request;
    const gateway = this.#gateway;
    const offer = gateway?.grant;
    if (!gateway || !offer || (flags & ~FLAG_PEER) !== 0) {
      this.#refuse(conversation, 'UNSUPPORTED');
      return;
    }
    if (!peer) {
      if (destination) this.#refuse(conversation, 'MALFORMED');
      else this.#grant(conversation, 0, offer);
      return;
    }
    const { publicKey, choice } = peer;
    // Revoked while it waited: its holder is a stranger now.
    const accepted = (): boolean => this.#keys.get(owner)?.keys === keys;
    if (type === TYPE.RELEASE) {
      gateway.release(owner, publicKey, () => accepted() && this.#answer(conversation, RESULT.OK, 0, 0));
    } else if (publicKey.every((byte) => byte === 0)) this.#refuse(conversation, 'MALFORMED');
    else if (this.#draining) this.#refuse(conversation, 'DRAINING');
    else {
      gateway.enrol({ owner, publicKey, choice, lifetime }, (enrolment) => {
        if (!accepted()) return;
        if (enrolment.kind === 'refused') this.#answer(conversation, enrolment.result, enrolment.retryAfter, 0);
        else
          this.#grant(conversation, enrolment.lifetime, { ...enrolment.grant, cookie: this.#cookieFor(conversation) });
      });
    }
  }

  /** What policy says to a lease for `client`; null when it may ask the table. */
  #admit(destination: Endpoint, client: Address): 'BAD_ADDRESS' | 'DENIED_DESTINATION' | 'DRAINING' | null {
    if (this.#keeper.gateways.some((gateway) => sameAddress(gateway, client))) {
      this.#notices.warn(
        'masked-client',
        { address: formatAddress(client) },
        'requests arrive from our own default gateway: something (docker-proxy, with published ports) replaces the ' +
          "clients' addresses, so no lease could match their joins. Run the router with network_mode: host, or set " +
          '"userland-proxy": false in /etc/docker/daemon.json',
      );
      return 'BAD_ADDRESS';
    }
    const verdict = judge(destination, client, this.#keeper.rules);
    if (verdict) return verdict;
    return this.#draining ? 'DRAINING' : null;
  }

  #refuse(conversation: Conversation, refusal: Exclude<keyof typeof RESULT, 'OK' | 'CHALLENGE'>): void {
    const result: Refusal = RESULT[refusal];
    this.#answer(conversation, result, defaultRetryAfter(result), 0);
  }

  #answer(conversation: Conversation, result: Result, lifetime: number, port: number, capabilityPort = 0): void {
    this.#say(conversation, {
      ...this.#headOf(conversation, result, lifetime),
      observed: conversation.datagram.from,
      port,
      capabilityPort,
      flags: this.#gateway?.mark ?? 0,
      cookie: this.#cookieFor(conversation),
    });
  }

  #grant(conversation: Conversation, lifetime: number, tunnel: TunnelGrant): void {
    this.#say(conversation, { ...this.#headOf(conversation, RESULT.OK, lifetime), tunnel });
  }

  #cookieFor({ datagram, request }: Conversation): Uint8Array {
    const subject = { ...datagram.from, keyId: request.keyId, session: request.session };
    return this.#jar.issue(subject, this.#ports.clock.now());
  }

  #headOf({ request: { type, keyId, session, sequence } }: Conversation, result: Result, lifetime: number) {
    const uptime = this.#uptime(this.#ports.clock.now());
    return { type, result, keyId, session, sequence, epoch: BigInt(`0x${this.epoch}`), uptime, lifetime };
  }

  #say({ datagram, request, keys, session }: Conversation, response: Response | TunnelResponse): void {
    const bytes = encodeResponse(response, keys, datagram.bytes);
    session?.remember(request.sequence, datagram.bytes, bytes);
    this.#notices.count(`answered_${response.result}`);
    this.#reply(datagram, bytes);
  }

  /** Whoever heard it answers; the others do not know that address. */
  #reply(datagram: Datagram, bytes: Uint8Array): void {
    for (const server of this.#servers) server.reply(datagram, bytes);
  }

  #receiveLegacy(datagram: Datagram): void {
    const message = decodeLegacyRequest(datagram.bytes);
    if (!message || message.destination.port === 0) {
      this.#notices.count('malformed_v1');
      return;
    }
    const { destination, port: suggestedPort } = message;
    const client = datagram.from.address;
    // This protocol has no refusals: who may not have a mapping hears nothing.
    if (this.#admit(destination, client)) {
      this.#notices.count('refused_v1');
      return;
    }
    this.#keeper.submit({
      kind: 'lease',
      ask: { owner: 'v1', client, destination, suggestedPort, lifetime: Math.floor(this.#settings.leaseTime / 1000) },
      answer: (result, _lifetime, port) => {
        this.#notices.count(result === RESULT.OK ? 'answered_v1' : 'refused_v1');
        if (result === RESULT.OK) this.#reply(datagram, encodeLegacyResponse({ destination, port }));
      },
    });
  }
}
