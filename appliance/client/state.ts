import {
  type Address,
  type DestinationRule,
  type Endpoint,
  formatEndpoint,
  sameAddress,
  sameEndpoint,
} from '../protocol/address.ts';
import { type Book, type Decision, type Mode, type Terms, thompson } from './paths.ts';
import type { Redirection } from './redirect.ts';
import { blackHoled, DIRECT, type Experience, emptyExperience, type Flow } from './worth.ts';

/**
 * What the client knows of its connections, paths, detours and leases, and the words it hears (`Event`) and says (`Command`).
 * Pure. One owner, the daemon, lets `step` change it; nobody else writes to it.
 */

export type ConnectionEvent = {
  readonly kind: 'created' | 'established';
  readonly token: number;
  readonly serverSide: boolean;
  /** RFC 8684 3.1, flag C. */
  readonly denyJoinId0: boolean;
} & Tuple;

export type SubflowEvent = {
  readonly kind: 'subflow-established' | 'subflow-closed' | 'subflow-priority';
  readonly token: number;
  readonly localId: number;
  readonly backup: boolean;
  /** An errno's number, 0 for an orderly end. */
  readonly error: number;
} & Tuple;

/** `expiresAt` in monotonic ms. */
export type Capability = { readonly port: number; readonly expiresAt: number };

/** What the kernel, the detours, the clock and the daemon itself report. Times are the clock's monotonic ms. */
export type Event =
  | ConnectionEvent
  | { readonly kind: 'closed'; readonly token: number }
  | SubflowEvent
  /** A server names another address of its own, port 0 for the connection's; or takes one back. */
  | { readonly kind: 'announced'; readonly token: number; readonly remoteId: number; readonly remote: Endpoint }
  | { readonly kind: 'removed'; readonly token: number; readonly remoteId: number }
  /** Kernel events this program has no use for. */
  | { readonly kind: 'listener-created' | 'listener-closed' }
  | { readonly kind: 'events-lost' }
  /** Links, addresses or routes of this host changed, or it slept; every address that is usable now. */
  | {
      readonly kind: 'network-changed';
      readonly addresses: readonly Address[];
      /** The interfaces that were chosen; null when none were, and routing decides. */
      readonly links: readonly Link[] | null;
    }
  /** From where the kernel would connect to each of these servers now; null where there is no way. */
  | { readonly kind: 'sources-found'; readonly sources: readonly ServerSource[] }
  /** What the kernel has now; asked for at `askedAt`. */
  | {
      readonly kind: 'dump';
      readonly askedAt: number;
      readonly connections: readonly DumpedConnection[];
      /** All tokens that the kernel has, where `connections` is only a part of them; null with every further part. */
      readonly present?: ReadonlySet<number> | null;
    }
  | {
      readonly kind: 'create-failed';
      readonly token: number;
      readonly local: Address;
      readonly remote: Endpoint;
      readonly code: string;
    }
  /** Said again when its name or rank changes. */
  | {
      readonly kind: 'detour-added';
      readonly detour: string;
      readonly name: string;
      readonly endpoint: Endpoint;
      /** The interface that it is asked over, when that was chosen. */
      readonly via?: string | undefined;
      readonly rank?: Rank | undefined;
    }
  | { readonly kind: 'detour-removed'; readonly detour: string }
  /** It answered, now from `local`; sent at every change and every answer to a probe. */
  | {
      readonly kind: 'detour-up';
      readonly detour: string;
      readonly rttMs: number;
      readonly epoch: bigint;
      readonly local: Address;
      /** What tells its tunnels from those with another key; 0 or nothing while it offers none. */
      readonly tunnels?: number;
      /** Its port for joins of ours that name their server themselves (docs/protocol.md, In-band transit). */
      readonly capability?: Capability;
    }
  | { readonly kind: 'detour-down'; readonly detour: string; readonly why: string }
  /** The tunnel to that detour was just found to carry packets. At least one family has an address in it. */
  | {
      readonly kind: 'tunnel-up';
      readonly site: string;
      readonly v4: Address | null;
      readonly v6: Address | null;
      readonly rttMs: number;
    }
  /** It carries nothing, or could not be made; the shell goes on trying while it is wanted. */
  | { readonly kind: 'tunnel-down'; readonly site: string; readonly why: string }
  /** Its addresses are about to go: what runs from them has to end. */
  | { readonly kind: 'tunnel-gone'; readonly site: string; readonly why: string }
  /** Addresses of a predecessor's tunnels, which are gone. */
  | { readonly kind: 'addresses-gone'; readonly addresses: readonly Address[] }
  | {
      readonly kind: 'lease-granted';
      readonly detour: string;
      readonly server: Endpoint;
      readonly port: number;
      readonly expiresAt: number;
    }
  | {
      readonly kind: 'lease-refused';
      readonly detour: string;
      readonly server: Endpoint;
      readonly why: string;
      readonly retryAt: number;
      /** The detour refuses every new lease, not just this one. */
      readonly everywhere: boolean;
    }
  /** It ran out, or its detour forgot it; the shell goes on asking while it is wanted. */
  | { readonly kind: 'lease-lost'; readonly detour: string; readonly server: Endpoint }
  | RescueEvent
  | { readonly kind: 'tick' };

export type Command =
  | RescueCommand
  | {
      readonly kind: 'create-subflow';
      readonly token: number;
      readonly localId: number;
      readonly local: Address;
      readonly remote: Endpoint;
      readonly backup: boolean;
      /** Of the interface to leave by, when that was chosen. */
      readonly index?: number | undefined;
      /** When the kernel reported ESTABLISHED, if this is a first join that had its lease ready then. */
      readonly establishedAt: number | null;
    }
  | ({ readonly kind: 'destroy-subflow'; readonly token: number } & Tuple)
  /** Tell the server of the end of a destroyed subflow now: its own goodbye waits behind what it still had to send. */
  | ({ readonly kind: 'abort-subflow' } & Tuple)
  /** Get a lease and keep it renewed until released. */
  | { readonly kind: 'want-lease'; readonly detour: string; readonly server: Endpoint }
  /** A join failed: find out whether the lease still stands. */
  | { readonly kind: 'doubt-lease'; readonly detour: string; readonly server: Endpoint }
  | { readonly kind: 'release-lease'; readonly detour: string; readonly server: Endpoint }
  /** Make a tunnel to a detour and keep it until released; one that is there is asked for anew. */
  | { readonly kind: 'want-tunnel'; readonly site: string }
  /** Find out whether it still carries anything. */
  | { readonly kind: 'doubt-tunnel'; readonly site: string }
  | { readonly kind: 'release-tunnel'; readonly site: string }
  /** Use it only when nothing else works, or again like any other (MP_PRIO). */
  | ({ readonly kind: 'set-backup'; readonly token: number; readonly backup: boolean } & Tuple)
  /** Read what the kernel has and report it as a `dump`. */
  | { readonly kind: 'dump' }
  /** Ask the kernel's routing and report `sources-found`. */
  | { readonly kind: 'find-sources'; readonly servers: readonly Address[] }
  /** For metrics and the log: what was decided about a connection's paths; `repair` needed no choice. */
  | {
      readonly kind: 'decided';
      readonly token: number;
      readonly act: Decision['act'] | 'repair';
      /** Null: the direct path. */
      readonly detour: string | null;
      readonly why: string;
    }
  | {
      readonly kind: 'joined';
      readonly token: number;
      readonly detour: string | null;
      readonly outcome: JoinOutcome;
      /** For people; empty for those that worked. */
      readonly why: string;
    }
  | { readonly kind: 'note'; readonly token: number; readonly level: 'info' | 'warn'; readonly what: Note };

/** What rescue.ts hears. */
export type RescueEvent =
  /** Connections whose first SYN nobody has answered; said all the time, also when there are none. */
  | {
      readonly kind: 'connecting';
      readonly waiting: readonly (Tuple & { readonly token: number })[];
    }
  /** A handshake with the server itself: answered, be it by a reset, or not. */
  | {
      readonly kind: 'direct-tried';
      readonly server: Endpoint;
      readonly answered: boolean;
      readonly tookMs: number;
    }
  /** An MPTCP handshake with the server through a detour. */
  | {
      readonly kind: 'relay-tried';
      readonly server: Endpoint;
      readonly detour: string;
      readonly reached: boolean;
    }
  /** Who really answers a connection's first subflow; null when it is the server itself. */
  | { readonly kind: 'translated'; readonly token: number; readonly via: Endpoint | null }
  /** nft did not do what `redirect` asked for. */
  | { readonly kind: 'redirect-failed'; readonly why: string }
  /** At the start: a predecessor left its table, and maybe connections that need it. */
  | { readonly kind: 'redirections-found' };

/** What rescue.ts says. */
export type RescueCommand =
  | { readonly kind: 'try-direct'; readonly server: Endpoint; readonly waitMs: number }
  | {
      readonly kind: 'try-relay';
      readonly server: Endpoint;
      readonly detour: string;
      readonly remote: Endpoint;
      readonly waitMs: number;
    }
  | {
      readonly kind: 'redirect';
      /** All that are to be led elsewhere from now on. */
      readonly servers: readonly Redirection[];
      /** Connections whose next SYN has to be looked at anew. */
      readonly stuck: readonly Tuple[];
      /** Connections live that were led elsewhere: the table stays, whatever `servers` says. */
      readonly keep: boolean;
    }
  | ({ readonly kind: 'ask-translation'; readonly token: number } & Tuple)
  /** For the log and metrics. */
  | {
      readonly kind: 'rescue';
      readonly what: 'began' | 'moved' | 'ended' | 'impossible';
      readonly server: Endpoint;
      readonly detour: string | null;
      readonly why: string;
    };

/** How a join ended; `lost` is a path that had been active. */
export type JoinOutcome = 'established' | 'refused' | 'timeout' | 'failed' | 'limit' | 'lost';

export type Note = 'unmanageable' | 'server-limit' | 'direct-lost' | 'inband-fails';

export type Tuple = { readonly local: Endpoint; readonly remote: Endpoint };

export type ServerSource = { readonly server: Address; readonly local: Address | null };

export type DumpedConnection = Tuple & {
  readonly token: number;
  readonly initiated: boolean;
  readonly subflows: readonly (Tuple & {
    readonly localId: number;
    readonly joined: boolean;
    readonly established: boolean;
    readonly fullyEstablished: boolean;
    readonly backup: boolean;
    /** Retransmission timeouts in a row. */
    readonly timeouts: number;
    /** As in worth.ts, `Reading`. */
    readonly unacked: number;
    readonly busyMs: number;
    readonly rttMs: number;
    readonly bytesAcked: number;
    readonly bytesReceived: number;
  })[];
};

/** What its source says about using a detour rather than others of the same source (RFC 2782, priority and weight). */
export type Rank = {
  readonly source: string;
  /** 0 is used first; a greater one only while no detour of a lower one is up. */
  readonly preference: number;
  /** Among equals of preference the lower is tried first; where all have the same, measurement decides alone. */
  readonly order: number;
};

export type Rules = {
  /** Extra subflows per connection. */
  readonly maxPaths: number;
  readonly mode: Mode;
  /** Which further paths may be made; free places go to the kinds named first when `ordered`. */
  readonly kinds: readonly PathKind[];
  readonly ordered: boolean;
  /** Tunnels only to detours whose leases are of no use on this network. */
  readonly fallback?: boolean;
  /** Joins may name their server themselves, where there is no lease yet: the kernel is prepared for it. */
  readonly inband?: boolean;
  /** Connections younger than this, from ESTABLISHED, are left alone; null: measured per destination. */
  readonly minAgeMs: number | null;
  /** Empty means every server. */
  readonly targets: readonly DestinationRule[];
  readonly exclude: readonly DestinationRule[];
  /** Whether servers that do not answer new connections directly are reached through detours. */
  readonly rescue: boolean;
};

export type PathState = 'requested' | 'joining' | 'active' | 'backup' | 'retired' | 'failed';

/** Of further paths: leased from a detour, through a tunnel to one, or to an address that the server announced. */
export type PathKind = 'nat' | 'vpn' | 'announced';

export type Path = {
  /** `spare`: to the server itself, without a lease, besides the direct path (spares.ts); `vpn`: so, out of a tunnel. */
  readonly kind: 'direct' | 'nat' | 'vpn' | 'spare';
  /** Key of its detour, its tunnel or the spare; null for the direct path and for a join whose detour is not (or no longer) configured. */
  detour: string | null;
  /** The local address that it was last asked for from. */
  from: Address | null;
  /** Null until the kernel names the port. */
  local: Endpoint | null;
  /** Null until there is a lease. */
  remote: Endpoint | null;
  state: PathState;
  /** When it came into this state. */
  since: number;
  /** For people: why it is not in use. Empty while it is. */
  why: string;
  /** Since when nothing has come while other paths carry, which may be the server's choice: its detour is asked. */
  suspectAt: number | null;
  /** Destroyed because nothing got through; its detour is asked, and the path made again when it answers. */
  buried: boolean;
  /** A subflow of it that was destroyed while nothing got through: its server has not heard, and counts it. */
  ghost: Tuple | null;
  /** The connection's first subflow, led through this detour instead of straight to the server (rescue.ts). */
  led: boolean;
  /** To be joined as backup. */
  reserve: boolean;
  /** Its last join named the server itself and used no lease. */
  inband: boolean;
  /** That did not work for it. */
  leaseOnly: boolean;
  /** Failures in a row. */
  failures: number;
  /** Not before. */
  retryAt: number;
  /** When its turn comes to send its detour a SYN; 0 while it has not queued for one. */
  turnAt: number;
};

/** A way to the server itself besides the direct one; `key` is what the chooser, and what is remembered, calls it. */
export type Spare = {
  readonly kind: 'spare' | 'vpn';
  readonly key: string;
  readonly local: Address;
  readonly remote: Endpoint;
  /** Of the interface to leave by, when that was chosen. */
  readonly index?: number | undefined;
};

/** An interface of this host that was chosen, with one address a family: the one it has, or had last. */
export type Link = {
  readonly name: string;
  readonly index: number;
  readonly v4: Address | null;
  readonly v6: Address | null;
  /** Packets of that family leave by it when nothing is chosen. */
  readonly natural4: boolean;
  readonly natural6: boolean;
};

export type Connection = {
  readonly token: number;
  readonly local: Endpoint;
  readonly remote: Endpoint;
  readonly server: string;
  /** From where the direct path is made again: the connection's own address, or what took its place. */
  home: Address;
  readonly since: number;
  establishedAt: number | null;
  /** Who answers its first subflow, the server or a detour, is being asked: no paths until that is known. */
  unsure: boolean;
  /** Why this connection gets no paths; null when it does. */
  unmanaged: string | null;
  /** The server closed a path at once: it accepts no more of them. */
  full: boolean;
  /** The kernel accepted at least one SUBFLOW_CREATE for it. */
  commanded: boolean;
  /** When the kernel refused the first one: it is gone, or not ours to command; a dump tells which. Null otherwise. */
  doubtedAt: number | null;
  readonly paths: Path[];
  /** What the server announced and may be used, by its address id. */
  announced: ReadonlyMap<number, Endpoint>;
  /** Address ids given to local addresses other than the connection's own. */
  ids: ReadonlyMap<string, number>;
  readonly leases: Set<string>;
  /** What its paths carry and what is tried with them; opened when there is something to decide. */
  book: Book | null;
  /** While it carries nothing and nothing is to be mended, its paths need not be thought about before this. */
  restUntil: number;
  /** What the kernel said of it last. */
  dumped: DumpedConnection | null;
  /** `prefixOf` the server. */
  readonly prefix: string;
  /** While the direct path is silent: how often a fresh one was tried, when the next is due, and whether
   * another connection's success calls for it. */
  revival: { tries: number; at: number; called: boolean } | null;
  /** Joins to the server itself that nobody has answered yet. */
  unanswered: Tuple[];
  /** A place was just given up: the server may not have heard of it before this. */
  settledAt: number;
  /** Local ends of subflows we destroyed, whose close is still to be reported. */
  leaving: ReadonlySet<string>;
  /** No place is given up for the direct path before this: one just was, or the server has yet to hear of it. */
  roomAt: number;
  /** Subflows whose address this host no longer has. The last one is not destroyed before another works. */
  stranded: Tuple[];
  /** Until then the server may still count subflows from an address that this host lost: nobody could tell it of their end. */
  ghostsUntil: number;
};

/** What limits joins through a detour, by leases or by its tunnel. */
export type Traffic = {
  /** When its share of SYNs is used up to (GCRA, theoretical arrival time). */
  synsUntil: number;
  /** Joins in a row that nobody answered: a router drops them while this client has its share of flows. */
  unansweredJoins: number;
  /** Up to when turns are given to paths that wait for one. */
  turnsUntil: number;
  /** Servers to which joins through it failed since the last one that worked. */
  readonly failedServers: Set<string>;
  suspensions: number;
  suspendedUntil: number;
};

export const noTraffic = (): Traffic => ({
  synsUntil: 0,
  unansweredJoins: 0,
  turnsUntil: 0,
  failedServers: new Set(),
  suspensions: 0,
  suspendedUntil: 0,
});

/** A tunnel to a detour; all addresses of one detour share it, and it carries both families. */
export type Tunnel = Traffic & {
  /** What the chooser, and what is remembered, calls it. */
  readonly key: string;
  /** The detour's name. */
  readonly site: string;
  state: 'asked' | 'up' | 'down' | 'suspended';
  why: string;
  /** This host's addresses inside it. */
  v4: Address | null;
  v6: Address | null;
  rttMs: number | null;
  /** Of the key that it was last asked for with; see `detour-up`. */
  mark: number;
};

export type Detour = Traffic & {
  readonly key: string;
  name: string;
  readonly endpoint: Endpoint;
  readonly address: Address;
  /** The interface that it is used over; null: whichever routing says. */
  readonly via: string | null;
  /** Null when its source does not rank. */
  rank: Rank | null;
  state: 'starting' | 'up' | 'down' | 'suspended';
  why: string;
  rttMs: number | null;
  epoch: bigint | null;
  /** The local address that the kernel routes to it. */
  local: Address | null;
  /** Since when it answers, if it does. */
  upSince: number;
  /** It grants no new leases before this. */
  pausedUntil: number;
  /** See `detour-up`. */
  tunnels: number;
  /** Why its leases are of no use on this network; null as long as nothing speaks against them. */
  useless: string | null;
  capability: Capability | null;
  /** Whether joins that name their server get through to it, on this network. */
  inband: 'unknown' | 'works' | 'fails';
  /** Such joins in a row that nobody answered. */
  inbandMisses: number;
};

export type Lease = {
  readonly detour: string;
  readonly server: Endpoint;
  state: 'asked' | 'granted' | 'refused';
  port: number;
  /** When its detour last said that it stands. */
  grantedAt: number;
  expiresAt: number;
  retryAt: number;
  why: string;
  readonly users: Set<number>;
};

/** A server whose direct path is in doubt, or worse. */
export type Case = {
  readonly server: Endpoint;
  readonly since: number;
  /** When the first was asked of the questions that it has not answered directly; null before that. */
  silentSince: number | null;
  /** A question to it is under way. */
  asking: boolean;
  /** When the next one is due. */
  askAt: number;
  /** What came of asking through a detour. */
  readonly trials: Map<string, 'asking' | 'reached' | 'failed'>;
  /** Why a detour granted no lease; null when none refused. */
  refusal: string | null;
  /** Where new connections to it go; null while they go nowhere else. */
  via: { readonly detour: string; readonly to: Endpoint; readonly since: number } | null;
  /** When a connection last began by way of `via`. */
  metAt: number;
  /** When somebody last wanted to go there. */
  wantedAt: number;
  /** Nothing could be done about it; not again before this. */
  pausedUntil: number;
  failures: number;
};

export type Rescue = {
  readonly cases: Map<string, Case>;
  /** Connections whose first SYN waits, by token, and since when as far as we know. */
  readonly waiting: Map<number, Tuple & { readonly since: number }>;
  /** When servers last answered a question directly. */
  readonly calm: Map<string, number>;
  /** How long servers took to answer that took long. */
  readonly slow: Map<string, number>;
  /** Servers that connections were made to, the latest last, and when. */
  readonly known: Map<string, { readonly server: Endpoint; readonly at: number }>;
  /** When all of those were asked last. */
  sweptAt: number;
  /** Where our own MPTCP handshakes went: those are nobody's connections. */
  readonly questions: Set<string>;
  /** What the kernel was told last, and when. */
  published: string;
  publishedAt: number;
  /** Whether our table may be there. */
  present: boolean;
  /** nft failed: not again before this. */
  pausedUntil: number;
};

export type State = {
  readonly rules: Rules;
  readonly detours: Map<string, Detour>;
  readonly connections: Map<number, Connection>;
  readonly leases: Map<string, Lease>;
  /** By key. */
  readonly tunnels: Map<string, Tunnel>;
  /** Leases nobody uses, the longest unused first, and since when. */
  readonly idle: Map<string, number>;
  /** Connections that must be looked at again, and when. */
  readonly due: Map<number, number>;
  readonly terms: Terms;
  readonly experience: Experience;
  /** How many announcements were looked at in the current second. */
  announced: { since: number; count: number };
  /** Addresses this host had at the last look, and those it had before and lost. As `addressKey`. */
  present: ReadonlySet<string>;
  readonly gone: Set<string>;
  /** See `network-changed`. */
  links: readonly Link[] | null;
  /** Null when `rules` say no. */
  readonly rescue: Rescue | null;
  /** Of the connections to one server whose direct path is silent, the one that tries it for all. */
  readonly scouts: Map<string, number>;
  /** When a connection of ours last carried anything or had something to mend: until it is quiet, look often. */
  livelyAt: number;
  /** State of the generator of random numbers. */
  random: number;
};

/** A connection that rests is looked at again after this, whatever happens. */
export const REST_MS = 10_000;
export const RETRY_FIRST_MS = 1_000;
export const RETRY_LONGEST_MS = 60_000;

/** A path that lived this long starts its retries afresh. */
export const STABLE_MS = 30_000;

/** Over its limit a Linux server closes a join right after accepting it; the close is about a round trip behind. */
export const LIMIT_WINDOW_MS = 200;

/** `seed`: 32 random bits, from which every draw follows. */
export function initial(rules: Rules, seed: number): State {
  return {
    rules,
    detours: new Map(),
    connections: new Map(),
    leases: new Map(),
    tunnels: new Map(),
    idle: new Map(),
    due: new Map(),
    scouts: new Map(),
    terms: { mode: rules.mode, minAgeMs: rules.minAgeMs, score: thompson },
    experience: emptyExperience(),
    announced: { since: 0, count: 0 },
    present: new Set(),
    gone: new Set(),
    links: null,
    rescue: rules.rescue ? emptyRescue() : null,
    livelyAt: Number.NEGATIVE_INFINITY,
    random: seed >>> 0,
  };
}

function emptyRescue(): Rescue {
  return {
    cases: new Map(),
    waiting: new Map(),
    calm: new Map(),
    slow: new Map(),
    known: new Map(),
    sweptAt: Number.NEGATIVE_INFINITY,
    questions: new Set(),
    published: '',
    publishedAt: Number.NEGATIVE_INFINITY,
    present: false,
    pausedUntil: Number.NEGATIVE_INFINITY,
  };
}

/** Names the lease of a detour for a server (`formatEndpoint`). */
export const leaseKey = (detour: string, server: string): string => `${detour}|${server}`;

/** What most connections have for ever, so they share it: an empty Map takes 184 bytes, and there may be ten thousand of each. */
export const NO_ENTRIES: ReadonlyMap<never, never> = new Map<never, never>();
export const NOTHING: ReadonlySet<never> = new Set<never>();

/** Keeps the address id that a connection uses for a local address. */
export function keepId(connection: Connection, local: Address, id: number): void {
  const key = addressKey(local);
  if (connection.ids.get(key) !== id) connection.ids = new Map(connection.ids).set(key, id);
}

export const addressKey = ({ family, value }: Address): string => `${family}:${value}`;

/** An address that this host was never seen to have is not gone: it may be one that no interface carries (AnyIP). */
export const isGone = (state: State, address: Address): boolean => state.gone.has(addressKey(address));

export const isLive = ({ kind, state }: Path): boolean =>
  kind !== 'direct' && state !== 'failed' && state !== 'retired';

export const livePaths = (connection: Connection): number => connection.paths.filter(isLive).length;

/** Puts a path into a state; `since` moves when the state changes. */
export function enter(path: Path, state: PathState, now: number, why = ''): void {
  if (path.state !== state) path.since = now;
  path.state = state;
  path.suspectAt = null;
  path.buried = false;
  path.why = why;
}

/** A path of which nothing is known yet but what it is. */
export function newPath(what: Pick<Path, 'kind' | 'detour' | 'local' | 'remote' | 'state' | 'since'>): Path {
  return {
    ...what,
    from: null,
    why: '',
    suspectAt: null,
    buried: false,
    ghost: null,
    led: false,
    failures: 0,
    retryAt: 0,
    turnAt: 0,
    reserve: false,
    inband: false,
    leaseOnly: false,
  };
}

/** The path that a tuple of the kernel belongs to; one whose port is not known yet is found by its remote end. */
export function pathOf(connection: Connection | undefined, { local, remote }: Tuple): Path | undefined {
  if (!connection) return undefined;
  const same = connection.paths.filter((path) => path.remote !== null && sameEndpoint(path.remote, remote));
  return (
    same.find((path) => path.local !== null && sameEndpoint(path.local, local)) ??
    same.find(({ local: at, from }) => at === null && (from === null || sameAddress(from, local.address)))
  );
}

/** The detour at an address; of one that is used over several interfaces, that of the local address. */
export function detourAt(state: State, address: Address, local: Address | null): Detour | undefined {
  const there = [...state.detours.values()].filter((detour) => sameAddress(detour.address, address));
  if (local === null) return there[0];
  return (
    there.find(({ via }) => via === null || ownsAddress(state, via, local)) ?? (state.links ? undefined : there[0])
  );
}

/** Whether the chosen interface of that name has the address. */
export const ownsAddress = (state: State, name: string, address: Address): boolean => {
  const link = state.links?.find((one) => one.name === name);
  return link !== undefined && [link.v4, link.v6].some((own) => own !== null && sameAddress(own, address));
};

/** Whether packets to it leave, when nothing is chosen, by the interface that it is asked over. */
export const isNatural = (state: State, { via, address }: Detour): boolean => {
  const link = via === null ? null : state.links?.find(({ name }) => name === via);
  return link === null || (address.family === 4 ? link?.natural4 : link?.natural6) === true;
};

export const isUp = ({ state }: Detour): boolean => state === 'up' || state === 'suspended';

/**
 * The address of a detour by which its tunnel is to be asked for, and made: the quickest that answers. Of those over chosen
 * interfaces only one that packets take by themselves, because a tunnel cannot choose.
 */
export function entranceOf(state: State, site: string): Detour | undefined {
  let best: Detour | undefined;
  for (const detour of state.detours.values()) {
    if (detour.name !== site || !isUp(detour) || detour.tunnels === 0 || !isNatural(state, detour)) continue;
    if (!best || (detour.rttMs ?? Number.POSITIVE_INFINITY) < (best.rttMs ?? Number.POSITIVE_INFINITY)) best = detour;
  }
  return best;
}

/** The address that connections of a family have in a tunnel; null when it carries none of them. */
export const insideOf = ({ v4, v6 }: Tunnel, family: 4 | 6): Address | null => (family === 4 ? v4 : v6);

/** What the chooser takes for one detour: its addresses share a name, its interfaces do not. */
export const siteOf = ({ name, via }: Detour): string => (via === null ? name : `${name}@${via}`);

export const rttOf = (state: State, { detour }: Path): number =>
  (detour === null ? null : (state.detours.get(detour) ?? state.tunnels.get(detour))?.rttMs) ?? 0;

export function remove(connection: Connection, path: Path): void {
  const at = connection.paths.indexOf(path);
  if (at > 0) connection.paths.splice(at, 1);
}

export const inUse = ({ state }: Path): boolean => state === 'active' || state === 'backup';

/** Numerical Recipes' generator, mixed: good enough to spread experiments. In [0, 1). */
export function draw(state: State): number {
  state.random = (Math.imul(state.random, 1664525) + 1013904223) >>> 0;
  let mixed = Math.imul(state.random ^ (state.random >>> 15), 0x2c1b3c6d);
  mixed = Math.imul(mixed ^ (mixed >>> 12), 0x297a2d39);
  return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32;
}

export const isSilent = (flow: Flow | undefined, now: number): boolean => flow !== undefined && blackHoled(flow, now);

/** What the chooser calls a path: its detour, or, when that is not configured, where it leads. */
export const pathKey = (path: Path): string => {
  if (path.kind === 'direct') return DIRECT;
  return path.detour ?? `?${path.remote ? formatEndpoint(path.remote) : ''}`;
};

export const sameTuple = (a: Tuple, b: Tuple): boolean =>
  sameEndpoint(a.local, b.local) && sameEndpoint(a.remote, b.remote);

export const pathIs = (path: Path, { local, remote }: Tuple): boolean =>
  path.local !== null && path.remote !== null && sameEndpoint(path.local, local) && sameEndpoint(path.remote, remote);
