import type { Cancel, Clock } from '../kernel/clock.ts';
import type { DatagramClient, Datagrams } from '../kernel/datagrams.ts';
import type { Log } from '../log.ts';
import { type Address, type Endpoint, formatAddress, formatEndpoint, sameAddress } from '../protocol/address.ts';
import {
  COOKIE_BYTES,
  decodeAnswer,
  defaultRetryAfter,
  encodeRequest,
  FLAG_ANNOUNCED,
  FLAG_PEER,
  type Keys,
  MESSAGE_BYTES,
  PROTOCOL_TCP,
  RESULT,
  type Refusal,
  type Request,
  type Response,
  resultName,
  type TunnelGrant,
  type TunnelResponse,
  TYPE,
  VERSION,
} from '../protocol/control.ts';
import type { Capability, Event, Link, Rank } from './state.ts';

/** What this shell tells the manager. */
export type DetourEvent = Extract<
  Event,
  {
    kind:
      | 'detour-added'
      | 'detour-removed'
      | 'detour-up'
      | 'detour-down'
      | 'lease-granted'
      | 'lease-refused'
      | 'lease-lost';
  }
>;

/** One address of a detour. `key` identifies it for as long as it is configured. */
export type DetourAddress = {
  readonly key: string;
  readonly name: string;
  readonly endpoint: Endpoint;
  readonly rank?: Rank | undefined;
};

/** One address of a detour over one interface, or over whichever routing says. */
type Way = DetourAddress & { readonly via: string | null };

/** What a detour is asked about its tunnels; see docs/protocol.md. */
export type TunnelQuestion =
  | { readonly kind: 'router' }
  | { readonly kind: 'client'; readonly publicKey: Uint8Array; readonly choice: number }
  | { readonly kind: 'release'; readonly publicKey: Uint8Array };

export type TunnelOutcome =
  /** Null for a release. */
  | { readonly kind: 'granted'; readonly grant: TunnelGrant | null; readonly expiresAt: number }
  | { readonly kind: 'refused'; readonly why: string; readonly retryAt: number }
  | { readonly kind: 'unanswered' };

/** What became of the question to be announced, or no longer. */
export type AnnounceOutcome =
  | { readonly kind: 'granted'; readonly expiresAt: number }
  | { readonly kind: 'refused'; readonly why: string; readonly retryAt: number }
  | { readonly kind: 'unanswered' };

/** How an exchange with a detour ended: a result's name, or `timeout`. */
export type ExchangeOutcome = string;

export type Detours = {
  /** Replaces the list: talks to new ones, drops those that are no longer in it, hands on new names and ranks. */
  set(addresses: readonly DetourAddress[]): void;
  /** Asks every detour over each of these interfaces from now on; null: over whichever routing says. */
  use(links: readonly Link[] | null): void;
  /** Gets a lease and keeps it. Answered by `lease-granted`, `lease-refused` or `detour-down`. */
  want(detour: string, server: Endpoint): void;
  /** Asks again at once; answered like `want`. */
  doubt(detour: string, server: Endpoint): void;
  /** Gives it back, unless it is shared. */
  release(detour: string, server: Endpoint): void;
  /** Asks about its tunnels. `quick` gives up after one try. */
  tunnel(detour: string, question: TunnelQuestion, quick?: boolean): Promise<TunnelOutcome>;
  /** Asks it to lead joins of anybody to this host, or (`withdrawn`, once) no longer; docs/protocol.md, Announcements. */
  announce(detour: string, server: Endpoint, withdrawn?: boolean): Promise<AnnounceOutcome>;
  /** Asks all of them at once, by the way that the kernel would take now: the network changed. */
  retry(): void;
  /** How the detours see this host: one address per detour that has answered. */
  observed(detour: string): Address | null;
  /** Closes all sockets. Leases stay until they run out: what uses them goes on. */
  stop(): void;
};

export type DetoursOptions = {
  /** Ask nobody before `use` named the interfaces. */
  readonly bound?: boolean;
  /** Whether others with this key, and perhaps this address as detours see it, use such a lease, too: it is then one lease to the detour. */
  readonly isShared?: (detour: string, server: Endpoint) => boolean;
  readonly keys: Keys;
  readonly clock: Clock;
  readonly datagrams: Datagrams;
  readonly log: Log;
  readonly onEvent: (event: DetourEvent) => void;
  /** For metrics: one per exchange. */
  readonly onExchange?: (type: string, outcome: ExchangeOutcome) => void;
};

/** docs/protocol.md, Retransmission. */
const FIRST_TIMEOUT_MS = 250;
const TRIES = 5;
const SPREAD = 0.1;
const BREAKER_FIRST_MS = 5_000;
const BREAKER_LONGEST_MS = 600_000;
/** A detour whose leases are wanted is asked by single datagrams for a while first: its paths wait for the answer. */
const BRISK_EVERY_MS = 400;
/** While a path waits for the answer about its lease, the question is repeated this often, and for as long as any other. */
const STEADY_MS = 400;
const STEADY_TRIES = 20;
const BRISK_FOR_MS = 60_000;
/** docs/protocol.md, Flow: below the 30 s after which home routers forget a UDP binding. */
const PING_MS = 25_000;
/** The first answer came to a question asked more than once, so its round trip is not known: asked again this soon. */
const REMEASURE_MS = 1_000;
/** docs/protocol.md, In-band transit. */
const CAPABILITY_MS = 120_000;
/** docs/protocol.md, Lifetimes. */
const LIFETIME_S = 600;
const LONGEST_LIFETIME_S = 3_600;
/** No router grants less; one that says so must not make us ask all the time. */
const LEAST_LIFETIME_S = 60;
const RENEW_GAP_MS = 4_000;
/** After an epoch change, so that a router that lost its leases is not asked for all of them at once. */
const RELEASE_SPREAD_MS = 2_000;
/** A detour that changes its epoch more often than this is not believed again so soon. */
const EPOCH_GAP_MS = 5_000;
/** A detour may not silence us for longer, nor make us ask more often. */
const RETRY_AFTER_S = { least: 1, most: 3_600 } as const;
/** A request is challenged once after a restart; more often is a detour that does not want to. */
const CHALLENGES = 2;
/** Exchanges under way with one detour; the router remembers 64 answers per session. */
const OUTSTANDING = 48;
/** Waiting their turn; more leases than this a router does not grant. */
const WAITING = 1_024;
/** The wall clock ran this far ahead of the monotonic one: the machine slept. */
const SLEPT_MS = 5_000;

/** Passing refusals of everything: asking for another server would end the same way (docs/protocol.md, Results). */
const ABOUT_ONE_SERVER: readonly number[] = [RESULT.DENIED_DESTINATION, RESULT.BAD_ADDRESS];

type Lease = {
  readonly server: Endpoint;
  /** Last port granted, suggested when asking again. */
  port: number;
  /** Monotonic ms; 0 while there is none. */
  expiresAt: number;
  asking: boolean;
  /** The last question about it got no answer. */
  unanswered: boolean;
  timer: Cancel | null;
};

type Answer = Response | TunnelResponse;
type Outcome = { readonly response: Answer; readonly sentAt: number } | 'timeout' | 'closed';

const UNANSWERED: TunnelOutcome = { kind: 'unanswered' };

type Exchange = {
  readonly message: Omit<Request, 'session' | 'sequence' | 'cookie' | 'keyId'>;
  readonly settle: (outcome: Outcome) => void;
  challenges: number;
  /** Datagrams sent before it is given up. */
  readonly tries: number;
  /** Repeated at a steady pace instead of ever more slowly. */
  readonly steady: boolean;
};

/** Starts talking to detours as soon as `set` names them. */
export function createDetours(options: DetoursOptions): Detours {
  const sessions = new Map<string, Session>();
  const known = new Map<string, DetourAddress>();
  let links: readonly Link[] | null = options.bound === true ? [] : null;
  let listed: readonly DetourAddress[] = [];
  const announce = ({ key, name, endpoint, rank, via }: Way): void =>
    options.onEvent({
      kind: 'detour-added',
      detour: key,
      name,
      endpoint,
      ...(via === null ? {} : { via }),
      ...(rank ? { rank } : {}),
    });
  const sourceOf = ({ endpoint, via }: Pick<Way, 'endpoint' | 'via'>): Address | null => {
    const link = links?.find(({ name }) => name === via);
    return (endpoint.address.family === 4 ? link?.v4 : link?.v6) ?? null;
  };
  const ways = (): Way[] =>
    listed.flatMap((one): Way[] => {
      if (links === null) return [{ ...one, via: null }];
      return links
        .map(({ name }) => ({ ...one, key: `${one.key}@${name}`, via: name }))
        .filter((way) => sourceOf(way) !== null);
    });
  function apply(): void {
    const wanted = new Map(ways().map((one) => [one.key, one]));
    for (const [key, session] of sessions) {
      if (wanted.has(key)) continue;
      sessions.delete(key);
      known.delete(key);
      session.close();
      options.onEvent({ kind: 'detour-removed', detour: key });
    }
    for (const [key, address] of wanted) {
      const before = known.get(key);
      if (before && sameDescription(before, address)) continue;
      known.set(key, address);
      announce(address);
      if (before) sessions.get(key)?.rename(address.name);
      else
        sessions.set(
          key,
          openSession(address, options, () => sourceOf(address)),
        );
    }
  }
  return {
    set(addresses) {
      listed = addresses;
      apply();
    },
    use(chosen) {
      links = chosen;
      apply();
    },
    want: (detour, server) => sessions.get(detour)?.want(server),
    doubt: (detour, server) => sessions.get(detour)?.doubt(server),
    release: (detour, server) => sessions.get(detour)?.release(server),
    tunnel: async (detour, question, quick) => (await sessions.get(detour)?.tunnel(question, quick)) ?? UNANSWERED,
    announce: async (detour, server, withdrawn) =>
      (await sessions.get(detour)?.announce(server, withdrawn)) ?? { kind: 'unanswered' },
    retry() {
      for (const session of sessions.values()) session.retry();
    },
    observed: (detour) => sessions.get(detour)?.observed() ?? null,
    stop() {
      for (const session of sessions.values()) session.close();
      sessions.clear();
    },
  };
}

const sameDescription = (a: DetourAddress, b: DetourAddress): boolean =>
  a.name === b.name &&
  a.rank?.source === b.rank?.source &&
  a.rank?.preference === b.rank?.preference &&
  a.rank?.order === b.rank?.order;

type Session = {
  /** The name it goes by in the log. */
  rename(name: string): void;
  want(server: Endpoint): void;
  doubt(server: Endpoint): void;
  release(server: Endpoint): void;
  tunnel(question: TunnelQuestion, quick?: boolean): Promise<TunnelOutcome>;
  announce(server: Endpoint, withdrawn?: boolean): Promise<AnnounceOutcome>;
  /** Asks at once, from the address that the kernel's routing chooses now. */
  retry(): void;
  observed(): Address | null;
  close(): void;
};

/** `source` is the address to ask from when `via` is given. */
function openSession(
  { key, endpoint, via, ...described }: Way,
  options: DetoursOptions,
  source: () => Address | null,
): Session {
  const { keys, clock, datagrams, log, onEvent, onExchange } = options;
  const id = new DataView(new Uint8Array(clock.random(8)).buffer).getBigUint64(0);
  const leases = new Map<string, Lease>();
  const outstanding = new Map<
    bigint,
    { bytes: Uint8Array; receive: (response: Answer) => void; repeat: (() => void) | null }
  >();
  const waiting: Exchange[] = [];
  const label = (text: string): string => (via === null ? text : `${text} over ${via}`);
  let name = label(described.name);
  let socket: DatagramClient | null = null;
  let sequence = 0n;
  let cookie: Uint8Array = new Uint8Array(COOKIE_BYTES);
  let epoch: bigint | null = null;
  let epochSeenAt = Number.NEGATIVE_INFINITY;
  let observed: Address | null = null;
  /** See `tunnelMark`. */
  let mark = 0;
  let capability: Capability | null = null;
  /** From where it was last asked with success. */
  let answeredFrom: Address | null = null;
  /** Probes begun: one that a later one has overtaken says nothing any more. */
  let probes = 0;
  let srtt: number | null = null;
  /** Longest the answers so far can have taken; counts until one says exactly how long. */
  let rttBound = FIRST_TIMEOUT_MS;
  let up = false;
  let breaker = 0;
  /** When it stopped answering; null while it answers. */
  let downAt: number | null = null;
  let running = 0;
  /** A steady question is under way. */
  let scouting = false;
  let closed = false;
  let timer: Cancel | null = null;
  /** Wall minus monotonic; grows when the machine sleeps. */
  let skew = clock.wall() - clock.now();
  /** Since the last answer. */
  let slept = false;

  const chance = (): number => {
    const bytes = new Uint8Array(clock.random(4));
    return new DataView(bytes.buffer).getUint32(0) / 2 ** 32;
  };
  /** Between `ms` less 10 % and `ms` plus 10 %. */
  const roughly = (ms: number): number => ms * (1 - SPREAD + 2 * SPREAD * chance());

  function schedule(ms: number, task: () => Promise<void>): void {
    timer?.();
    timer = clock.after(ms, () => {
      timer = null;
      void task();
    });
  }

  function receive(bytes: Uint8Array): void {
    if (bytes.length !== MESSAGE_BYTES) return;
    const asked = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength).getBigUint64(16);
    const pending = outstanding.get(asked);
    // Not an answer to anything we asked, or not by who knows the key: silence.
    const response = pending && decodeAnswer(bytes, keys, pending.bytes);
    if (!response) return;
    outstanding.delete(asked);
    pending.receive(response);
    // It answers again: what was asked in vain meanwhile need not wait for its turn.
    for (const other of outstanding.values()) {
      const { repeat } = other;
      // Once, until it is overdue again: each answer would otherwise repeat all the others.
      other.repeat = null;
      repeat?.();
    }
  }

  /** Connects a fresh socket; its local address is what the kernel's routing chooses now. */
  async function reconnect(): Promise<boolean> {
    let fresh: DatagramClient;
    try {
      fresh = await datagrams.connect(endpoint, receive, () => undefined, source() ?? undefined);
    } catch (error) {
      log.debug('detour-unreachable', { detour: name }, error instanceof Error ? error.message : 'no route');
      return false;
    }
    if (closed) {
      fresh.close();
      return false;
    }
    const before = socket;
    if (before && sameAddress(before.local().address, fresh.local().address)) {
      fresh.close();
      return true;
    }
    socket = fresh;
    before?.close();
    return true;
  }

  /** One question with its retransmissions and challenges. Answers arrive by `settle`, exactly once. */
  function begin(exchange: Exchange): void {
    running++;
    sequence += 1n;
    const mine = sequence;
    const bytes = encodeRequest({ ...exchange.message, session: id, sequence: mine, cookie, keyId: keys.id }, keys);
    const startedAt = clock.now();
    let sentAt = startedAt;
    let tries = 0;
    let wait = Math.max(exchange.steady ? STEADY_MS : FIRST_TIMEOUT_MS, srtt === null ? 0 : 3 * srtt);
    let cancel: Cancel | null = null;

    const finish = (outcome: Outcome): void => {
      cancel?.();
      outstanding.delete(mine);
      running--;
      exchange.settle(outcome);
      pump();
    };
    const transmit = (): void => {
      if (closed) {
        finish('closed');
        return;
      }
      if (tries === exchange.tries) {
        finish('timeout');
        return;
      }
      tries++;
      sentAt = clock.now();
      socket?.send(bytes);
      cancel = clock.after(roughly(wait), overdue);
      if (!exchange.steady) wait *= 2;
    };
    const overdue = (): void => {
      const entry = outstanding.get(mine);
      if (entry) entry.repeat = repeat;
      transmit();
    };
    const repeat = (): void => {
      cancel?.();
      // The last try gets its time anew.
      tries = Math.min(tries, exchange.tries - 1);
      transmit();
    };
    outstanding.set(mine, {
      bytes,
      repeat: null,
      receive(response) {
        // Karn: an answer to a question asked twice does not say how long it took.
        if (tries === 1) measure(clock.now() - sentAt);
        else rttBound = clock.now() - startedAt;
        if ('cookie' in response) cookie = response.cookie;
        else if (response.tunnel.kind === 'client') cookie = response.tunnel.cookie;
        if (response.result !== RESULT.CHALLENGE || exchange.challenges >= CHALLENGES) {
          finish({ response, sentAt: startedAt });
          return;
        }
        exchange.challenges++;
        cancel?.();
        outstanding.delete(mine);
        running--;
        begin(exchange);
      },
    });
    transmit();
  }

  function pump(): void {
    while (running < OUTSTANDING) {
      const next = waiting.shift();
      if (!next) return;
      begin(next);
    }
  }

  type Manner = {
    /** Before those that wait already, and however many they are. */
    readonly urgent?: boolean;
    readonly tries?: number;
    readonly steady?: boolean;
  };

  function ask(
    type: number,
    what: Partial<Exchange['message']>,
    { urgent = false, tries = TRIES, steady = false }: Manner = {},
  ): Promise<Outcome> {
    return new Promise((resolve) => {
      const exchange: Exchange = {
        message: {
          type,
          flags: 0,
          lifetime: 0,
          vmin: VERSION,
          vmax: VERSION,
          destination: null,
          suggestedPort: 0,
          protocol: 0,
          ...what,
        },
        challenges: 0,
        tries,
        steady,
        settle(outcome) {
          onExchange?.(
            typeName(type),
            typeof outcome === 'string' ? outcome : resultName(outcome.response.result).toLowerCase(),
          );
          resolve(outcome);
        },
      };
      if (closed || (waiting.length >= WAITING && !urgent)) {
        resolve('closed');
        return;
      }
      if (urgent) waiting.unshift(exchange);
      else waiting.push(exchange);
      pump();
    });
  }

  /** What a question about a server's lease holds. */
  const about = (destination: Endpoint): Partial<Exchange['message']> => ({ destination, protocol: PROTOCOL_TCP });

  function measure(rtt: number): void {
    // RFC 6298 2.3, alpha 1/8.
    srtt = srtt === null ? rtt : srtt + (rtt - srtt) / 8;
  }

  /** What every authentic answer tells, whatever it answers. */
  function learn(response: Answer): void {
    const first = epoch === null;
    const changed = epoch !== null && epoch !== response.epoch;
    const seen = 'observed' in response ? response.observed.address : observed;
    const moved = observed !== null && seen !== null && !sameAddress(observed, seen);
    if (moved && seen) {
      log.info(
        'observed-address',
        { detour: name, observed: formatAddress(seen) },
        `Detour ${name} sees this host at another address: asking for all leases again`,
      );
    }
    observed = seen;
    const marked = 'flags' in response && response.flags !== mark;
    if ('flags' in response) mark = response.flags;
    if (changed && clock.now() - epochSeenAt < EPOCH_GAP_MS) return;
    if (first || changed) epochSeenAt = clock.now();
    epoch = response.epoch;
    if (changed)
      log.info('detour-epoch', { detour: name }, `Detour ${name} lost its leases: asking for all of them again`);
    if (changed || moved) askAllAgain();
    // Who has a tunnel there should know at once; the first answer is told in any case.
    if (marked && up) announceUp();
  }

  function announceUp(): void {
    if (!socket || epoch === null) return;
    if (!up) {
      log.info(
        'detour-up',
        { detour: name, address: formatEndpoint(endpoint), rttMs: Math.round((srtt ?? rttBound) * 10) / 10 },
        `Detour ${name} answers`,
      );
    }
    const recovered = !up;
    up = true;
    breaker = 0;
    downAt = null;
    const { address: local } = socket.local();
    const offered = { ...(mark === 0 ? {} : { tunnels: mark }), ...(capability === null ? {} : { capability }) };
    onEvent({ kind: 'detour-up', detour: key, rttMs: srtt ?? rttBound, epoch, local, ...offered });
    if (!recovered) return;
    for (const lease of leases.values()) if (lease.unanswered || lease.expiresAt <= clock.now()) void obtain(lease);
  }

  function goDown(why: string): void {
    if (closed) return;
    if (up || breaker === 0) {
      log.warn(
        'detour-down',
        { detour: name, address: formatEndpoint(endpoint), why },
        `Detour ${name} does not answer: ${why}`,
      );
    }
    const news = up || breaker === 0;
    up = false;
    downAt ??= clock.now();
    if (isBrisk()) {
      breaker ||= BREAKER_FIRST_MS;
      if (news) onEvent({ kind: 'detour-down', detour: key, why });
      schedule(roughly(BRISK_EVERY_MS), probe);
      return;
    }
    breaker = breaker === 0 ? BREAKER_FIRST_MS : Math.min(breaker * 2, BREAKER_LONGEST_MS);
    onEvent({ kind: 'detour-down', detour: key, why });
    schedule(roughly(breaker), probe);
  }

  const isBrisk = (): boolean => downAt !== null && clock.now() - downAt < BRISK_FOR_MS && leases.size > 0;

  /** HELLO after start and after silence; PING while all is well. */
  async function probe(): Promise<void> {
    if (closed) return;
    const mine = ++probes;
    if (Math.abs(clock.wall() - clock.now() - skew) > SLEPT_MS) slept = true;
    skew = clock.wall() - clock.now();
    const reached = await reconnect();
    if (closed || mine !== probes) return;
    if (!reached || !socket) {
      goDown('there is no route to it');
      return;
    }
    const from = socket.local().address;
    const moved = answeredFrom !== null && !sameAddress(answeredFrom, from);
    const outcome = await ask(
      up && !moved ? TYPE.PING : TYPE.HELLO,
      {},
      { urgent: true, tries: isBrisk() ? 1 : TRIES },
    );
    if (closed || mine !== probes || outcome === 'closed') return;
    if (outcome === 'timeout') {
      goDown('no answer; is it running, is its UDP port open, is the key right?');
      return;
    }
    const { response, sentAt } = outcome;
    const port = 'capabilityPort' in response ? response.capabilityPort : 0;
    capability = port === 0 ? null : { port, expiresAt: sentAt + CAPABILITY_MS };
    learn(response);
    if (response.result !== RESULT.OK && response.result !== RESULT.CHALLENGE) {
      goDown(`it refuses: ${resultName(response.result)}`);
      schedule(retryAfter(response), probe);
      return;
    }
    answeredFrom = from;
    // Leases are kept by client address: what was granted to the old one is of no use, and after a sleep nothing is certain.
    if (moved || slept) askAllAgain();
    slept = false;
    announceUp();
    schedule(roughly(srtt === null ? REMEASURE_MS : PING_MS), probe);
  }

  function askAllAgain(): void {
    const all = [...leases.values()];
    for (const lease of all) {
      lease.expiresAt = 0;
      onEvent({ kind: 'lease-lost', detour: key, server: lease.server });
      lease.timer?.();
      const after = all.length === 1 ? 0 : RELEASE_SPREAD_MS * chance();
      lease.timer = clock.after(after, () => void obtain(lease));
    }
  }

  const current = (lease: Lease): boolean => !closed && leases.get(formatEndpoint(lease.server)) === lease;

  /** Asks for a lease, new or renewed, and plans what comes after the answer. */
  async function obtain(lease: Lease, doubted = false): Promise<void> {
    if (lease.asking || !current(lease)) return;
    lease.asking = true;
    // One steady question finds out about the detour; many at once would meet the router's limit of datagrams.
    const steady = doubted && !scouting;
    if (steady) scouting = true;
    lease.timer?.();
    lease.timer = null;
    const outcome = await ask(
      TYPE.LEASE,
      { ...about(lease.server), suggestedPort: lease.port, lifetime: LIFETIME_S },
      { urgent: steady, tries: steady ? STEADY_TRIES : TRIES, steady },
    );
    lease.asking = false;
    if (steady) scouting = false;
    lease.unanswered = outcome === 'timeout';
    if (!current(lease)) {
      // Released while the question was under way: what was granted now is given back.
      if (typeof outcome !== 'string' && outcome.response.result === RESULT.OK && !closed) await giveBack(lease.server);
      return;
    }
    if (outcome === 'closed') {
      refused(lease, 'too many requests are waiting', clock.now() + RETRY_AFTER_S.least * 1000, true);
      return;
    }
    if (outcome === 'timeout') {
      onLeaseTimeout(lease);
      return;
    }
    const { response, sentAt } = outcome;
    learn(response);
    const port = 'port' in response ? response.port : 0;
    if (response.result === RESULT.OK && port > 0 && response.lifetime > 0) {
      const lifetime = Math.min(response.lifetime, LONGEST_LIFETIME_S) * 1000;
      lease.port = port;
      lease.expiresAt = sentAt + lifetime;
      planRenewal(lease, sentAt, lifetime, 0);
      if (!up) {
        announceUp();
        schedule(roughly(PING_MS), probe);
      }
      onEvent({
        kind: 'lease-granted',
        detour: key,
        server: lease.server,
        port: lease.port,
        expiresAt: lease.expiresAt,
      });
      return;
    }
    const why = response.result === RESULT.OK ? 'it granted nonsense' : resultName(response.result);
    refused(lease, why, clock.now() + retryAfter(response), !ABOUT_ONE_SERVER.includes(response.result));
  }

  function onLeaseTimeout(lease: Lease): void {
    if (lease.expiresAt > clock.now()) {
      // Still good: the renewals that are left will try again, and PING finds out about the detour.
      const remaining = lease.expiresAt - clock.now();
      lease.timer = clock.after(Math.max(RENEW_GAP_MS, remaining / 2), () => void obtainOrLose(lease));
      if (!up) return;
    }
    if (up) goDown('a request for a lease got no answer');
    else onEvent({ kind: 'detour-down', detour: key, why: 'a request for a lease got no answer' });
  }

  async function obtainOrLose(lease: Lease): Promise<void> {
    if (lease.expiresAt <= clock.now() && current(lease)) {
      lease.expiresAt = 0;
      onEvent({ kind: 'lease-lost', detour: key, server: lease.server });
    }
    await obtain(lease);
  }

  function refused(lease: Lease, why: string, retryAt: number, everywhere: boolean): void {
    // A lease that is still good outlives a refused renewal; only new joins must not count on it for long.
    leases.delete(formatEndpoint(lease.server));
    lease.timer?.();
    onEvent({ kind: 'lease-refused', detour: key, server: lease.server, why, retryAt, everywhere });
  }

  /** Renewal at 1/2 to 5/8 of the lifetime, then 3/4, then 7/8, at least 4 s apart; `obtain` plans anew on success. */
  function planRenewal(lease: Lease, from: number, lifetime: number, attempt: number): void {
    const share = [0.5 + 0.125 * chance(), 0.75, 0.875][attempt];
    lease.timer?.();
    const at = share === undefined ? lease.expiresAt : from + lifetime * share + 1_000 * chance();
    const after = Math.max(attempt === 0 ? 0 : RENEW_GAP_MS, at - clock.now());
    lease.timer = clock.after(after, () => {
      if (share === undefined) void obtainOrLose(lease);
      else void obtain(lease);
    });
  }

  async function giveBack(server: Endpoint): Promise<void> {
    if (up && !options.isShared?.(key, server)) await ask(TYPE.RELEASE, about(server));
  }

  async function tunnel(question: TunnelQuestion, quick = false): Promise<TunnelOutcome> {
    const { kind } = question;
    const peer =
      kind === 'router' ? null : { publicKey: question.publicKey, choice: kind === 'client' ? question.choice : 0 };
    const outcome = await ask(
      kind === 'release' ? TYPE.RELEASE : TYPE.TUNNEL,
      { ...(peer ? { flags: FLAG_PEER, peer } : {}), lifetime: kind === 'client' ? LIFETIME_S : 0 },
      { urgent: true, tries: quick ? 1 : TRIES },
    );
    if (typeof outcome === 'string' || closed) return UNANSWERED;
    const { response, sentAt } = outcome;
    learn(response);
    if (response.result !== RESULT.OK)
      return { kind: 'refused', why: resultName(response.result), retryAt: clock.now() + retryAfter(response) };
    const grant = 'tunnel' in response ? response.tunnel : null;
    if (kind !== 'release' && grant?.kind !== kind) return UNANSWERED;
    const lifetime = Math.min(Math.max(response.lifetime, LEAST_LIFETIME_S), LONGEST_LIFETIME_S);
    return { kind: 'granted', grant, expiresAt: sentAt + lifetime * 1000 };
  }

  async function announce(server: Endpoint, withdrawn = false): Promise<AnnounceOutcome> {
    const outcome = await ask(
      withdrawn ? TYPE.RELEASE : TYPE.ANNOUNCE,
      { ...about(server), ...(withdrawn ? { flags: FLAG_ANNOUNCED } : { lifetime: LIFETIME_S }) },
      { tries: withdrawn ? 1 : TRIES },
    );
    if (typeof outcome === 'string' || closed) return { kind: 'unanswered' };
    const { response, sentAt } = outcome;
    learn(response);
    if (response.result !== RESULT.OK)
      return { kind: 'refused', why: resultName(response.result), retryAt: clock.now() + retryAfter(response) };
    // It could be led to by another port only where clients do not go.
    if (!withdrawn && (!('port' in response) || response.port !== server.port)) return { kind: 'unanswered' };
    const lifetime = Math.min(Math.max(response.lifetime, LEAST_LIFETIME_S), LONGEST_LIFETIME_S);
    return { kind: 'granted', expiresAt: sentAt + lifetime * 1000 };
  }

  function want(server: Endpoint): void {
    const known = leases.get(formatEndpoint(server));
    if (known) {
      if (known.expiresAt <= clock.now()) void obtain(known);
      return;
    }
    const lease: Lease = { server, port: 0, expiresAt: 0, asking: false, unanswered: false, timer: null };
    leases.set(formatEndpoint(server), lease);
    void obtain(lease);
  }

  void probe();
  return {
    rename(to) {
      name = label(to);
    },
    want,
    tunnel,
    announce,
    doubt(server) {
      const lease = leases.get(formatEndpoint(server));
      if (lease) void obtain(lease, true);
      else want(server);
    },
    release(server) {
      const text = formatEndpoint(server);
      const lease = leases.get(text);
      if (!lease) return;
      leases.delete(text);
      lease.timer?.();
      if (lease.expiresAt > clock.now()) void giveBack(server);
    },
    retry() {
      timer?.();
      timer = null;
      if (downAt !== null) downAt = clock.now();
      void probe();
    },
    observed: () => observed,
    close() {
      closed = true;
      timer?.();
      for (const lease of leases.values()) lease.timer?.();
      socket?.close();
      for (const exchange of waiting.splice(0)) exchange.settle('closed');
      outstanding.clear();
    },
  };
}

function retryAfter(response: Answer): number {
  const said = response.lifetime || defaultRetryAfter(response.result as Refusal);
  return Math.min(Math.max(said, RETRY_AFTER_S.least), RETRY_AFTER_S.most) * 1000;
}

function typeName(type: number): string {
  for (const [text, value] of Object.entries(TYPE)) if (value === type) return text.toLowerCase();
  return `type-${type}`;
}
