import type { Cancel, Clock } from '../kernel/clock.ts';
import type { Datagrams } from '../kernel/datagrams.ts';
import type { Memory } from '../kernel/memory.ts';
import type { SignalEndpoints } from '../kernel/mptcp.ts';
import type { Log } from '../log.ts';
import {
  type Address,
  addressFromHex,
  type Endpoint,
  formatAddress,
  formatEndpoint,
  hexOfAddress,
  sameAddress,
} from '../protocol/address.ts';
import { deriveKeys } from '../protocol/control.ts';
import type { Announcing } from '../settings.ts';
import { createDetours, type DetourAddress, type DetourEvent } from './detours.ts';

/**
 * Has detours lead joins of anybody to this server, and has them announced to the clients of its connections (ADD_ADDR).
 * A detour is announced for as long as it has said yes, and taken back (RM_ADDR) when that ends or we do.
 */

export type AnnouncerPorts = {
  readonly clock: Clock;
  readonly datagrams: Datagrams;
  readonly log: Log;
  readonly endpoints: SignalEndpoints;
  /** What is announced, for who comes after a crash. */
  readonly memory: Memory;
};

/** One port of this server at one detour. */
export type AnnouncedStatus = {
  readonly detour: string;
  readonly address: string;
  /** Null before the detour told how it sees us. */
  readonly server: string | null;
  readonly port: number;
  readonly state: 'asked' | 'announced' | 'refused' | 'unanswered';
  readonly why: string | null;
};

export type Announcer = {
  /** Replaces the list of detours. */
  set(addresses: readonly DetourAddress[]): void;
  status(): readonly AnnouncedStatus[];
  /** Takes everything back. */
  stop(): Promise<void>;
};

/** The kernel's path manager announces up to eight (MPTCP_PM_ADDR_MAX in net/mptcp/pm_kernel.c). */
const MOST_ENDPOINTS = 8;
const AGAIN_MS = 5_000;
/** Renewed when so much of its time is over. */
const RENEW = 0.5;

type Site = {
  readonly key: string;
  name: string;
  readonly endpoint: Endpoint;
  epoch: bigint | null;
  local: Address | null;
  readonly ports: Map<number, Post>;
};

type Post = {
  state: AnnouncedStatus['state'];
  why: string | null;
  server: Endpoint | null;
  /** Monotonic ms; 0 while there is none. */
  expiresAt: number;
  /** No earlier than this. */
  retryAt: number;
  asking: boolean;
  timer: Cancel | null;
};

/** Takes back what a predecessor announced and could not take back. Harmless when there is nothing. @throws Fatal (69) */
export async function takeBack({ endpoints, memory }: Pick<AnnouncerPorts, 'endpoints' | 'memory'>): Promise<void> {
  const remembered = await memory.recall();
  if (remembered === null) return;
  for (const text of remembered.values()) {
    const address = addressFromHex(text);
    if (address) await endpoints.remove(address);
  }
  await memory.forget();
}

/** Starts asking as soon as `set` names detours. @throws Fatal (69) when the kernel does not let us announce */
export async function startAnnouncer({ key, ports }: Announcing, with_: AnnouncerPorts): Promise<Announcer> {
  const { clock, datagrams, log, endpoints, memory } = with_;
  const sites = new Map<string, Site>();
  /** Addresses that the kernel announces for us, in hex. */
  const held = new Map<string, Address>();
  let stopped = false;
  let last: Promise<unknown> = Promise.resolve();
  await takeBack(with_);
  const detours = createDetours({
    keys: deriveKeys(key.id, key.secret),
    clock,
    datagrams,
    log,
    onEvent,
  });

  function onEvent(event: DetourEvent): void {
    if (stopped) return;
    if (event.kind === 'detour-added') {
      const { detour: at, name, endpoint } = event;
      const site = sites.get(at);
      if (site) site.name = name;
      else sites.set(at, { key: at, name, endpoint, epoch: null, local: null, ports: new Map(ports.map(fresh)) });
    } else if (event.kind === 'detour-removed') {
      const site = sites.get(event.detour);
      sites.delete(event.detour);
      for (const post of site?.ports.values() ?? []) post.timer?.();
      settle();
    } else if (event.kind === 'detour-up') {
      const site = sites.get(event.detour);
      if (!site) return;
      const isNew = site.epoch !== event.epoch || !site.local || !sameAddress(site.local, event.local);
      site.epoch = event.epoch;
      site.local = event.local;
      for (const [port, post] of site.ports) {
        if (isNew) post.retryAt = 0;
        if (isNew || post.expiresAt <= clock.now()) void ask(site, port, post);
      }
    }
  }

  function fresh(port: number): [number, Post] {
    return [port, { state: 'asked', why: null, server: null, expiresAt: 0, retryAt: 0, asking: false, timer: null }];
  }

  const isCurrent = (site: Site): boolean => !stopped && sites.get(site.key) === site;

  async function ask(site: Site, port: number, post: Post): Promise<void> {
    const observed = detours.observed(site.key);
    if (post.asking || !observed || post.retryAt > clock.now() || !isCurrent(site)) return;
    post.asking = true;
    post.timer?.();
    const server = { address: observed, port };
    const outcome = await detours.announce(site.key, server);
    post.asking = false;
    if (!isCurrent(site)) return;
    post.server = server;
    if (outcome.kind === 'granted') {
      if (post.expiresAt <= clock.now()) {
        const fields = { detour: site.name, server: formatEndpoint(server) };
        log.info('announced', fields, `Detour ${site.name} leads joins to ${formatEndpoint(server)}`);
      }
      post.state = 'announced';
      post.why = null;
      post.expiresAt = outcome.expiresAt;
      later(site, port, post, (outcome.expiresAt - clock.now()) * RENEW);
    } else {
      const why = outcome.kind === 'refused' ? outcome.why : 'no answer';
      if (outcome.kind === 'refused' && why !== post.why)
        log.warn('not-announced', { detour: site.name, server: formatEndpoint(server), why }, hintOf(why, site.name));
      post.state = outcome.kind;
      post.why = why;
      post.retryAt = outcome.kind === 'refused' ? outcome.retryAt : 0;
      // What was promised before goes on until then, whatever the answer to the renewal.
      if (outcome.kind === 'refused' && post.expiresAt > clock.now()) post.state = 'announced';
      later(site, port, post, Math.max(AGAIN_MS, post.retryAt - clock.now()));
    }
    settle();
  }

  /** Asks again then, or when what was promised is over, to take it back. */
  function later(site: Site, port: number, post: Post, ms: number): void {
    const left = post.expiresAt - clock.now();
    post.timer = clock.after(left > 0 ? Math.min(ms, left) : ms, () => {
      post.timer = null;
      if (!isCurrent(site)) return;
      settle();
      if (post.retryAt > clock.now()) later(site, port, post, post.retryAt - clock.now());
      else void ask(site, port, post);
    });
  }

  /** Makes the kernel announce those that said yes, and no others, one step after the other. */
  function settle(): void {
    last = last.then(adjust).catch((error: unknown) => {
      log.warn('announcing-failed', { reason: messageOf(error) }, 'The kernel does not announce a detour');
    });
  }

  async function adjust(): Promise<void> {
    const now = clock.now();
    const wanted = new Map<string, Address>();
    for (const { endpoint, ports: posts } of stopped ? [] : sites.values()) {
      const isGood = [...posts.values()].some(({ expiresAt }) => expiresAt > now);
      if (isGood && wanted.size < MOST_ENDPOINTS) wanted.set(hexOfAddress(endpoint.address), endpoint.address);
    }
    const gone = [...held].filter(([text]) => !wanted.has(text));
    const added = [...wanted].filter(([text]) => !held.has(text));
    if (gone.length + added.length === 0) return;
    for (const [text, address] of gone) {
      await endpoints.remove(address);
      held.delete(text);
    }
    for (const [text, address] of added) held.set(text, address);
    // Before they are there: who comes after a crash has to know of them.
    await memory.forget();
    if (held.size > 0) await memory.remember(new Map([...held.keys()].map((text, index) => [nameOf(index), text])));
    for (const [text, address] of added) {
      try {
        await endpoints.add(address);
      } catch (error) {
        held.delete(text);
        throw error;
      }
    }
  }

  return {
    set: (addresses) => detours.set(addresses),
    status: () =>
      [...sites.values()].flatMap(({ name, endpoint, ports: posts }) =>
        [...posts].map(([port, { state, why, server }]) => ({
          detour: name,
          address: formatEndpoint(endpoint),
          server: server && formatAddress(server.address),
          port,
          state,
          why,
        })),
      ),
    async stop() {
      stopped = true;
      for (const { ports: posts } of sites.values()) for (const { timer } of posts.values()) timer?.();
      settle();
      await last;
      // First nobody is told of them any more, then they need not be there.
      await Promise.all(
        [...sites.values()].flatMap(({ key: at, ports: posts }) =>
          [...posts.values()].flatMap(({ server, expiresAt }) =>
            server && expiresAt > clock.now() ? [detours.announce(at, server, true)] : [],
          ),
        ),
      );
      detours.stop();
      endpoints.close();
    },
  };
}

/** As `Memory` wants names. */
const nameOf = (index: number): string => `endpoint_${String.fromCharCode(97 + index)}`;

function hintOf(why: string, name: string): string {
  if (why === 'UNSUPPORTED') return `Detour ${name} announces nobody: its operator has to set DETOUR_ANNOUNCE_PORTS`;
  if (why === 'NO_RESOURCES')
    return `Detour ${name} has that port no more: another server was first, or something listens there`;
  if (why === 'DENIED_DESTINATION')
    return `Detour ${name} does not announce that port, or this address: its operator has to add it to DETOUR_ANNOUNCE_PORTS, or to DETOUR_ALLOW`;
  return `Detour ${name} does not announce this server`;
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));
