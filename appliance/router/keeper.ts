import type { Addresses } from '../kernel/addresses.ts';
import type { Cancel, Clock } from '../kernel/clock.ts';
import type { Conntrack } from '../kernel/conntrack.ts';
import type { LocalAddress } from '../kernel/datagrams.ts';
import type { Nft, NftFailure } from '../kernel/nft.ts';
import type { Log, LogFields } from '../log.ts';
import { type Address, formatAddress, formatEndpoint, sameAddress } from '../protocol/address.ts';
import { defaultRetryAfter, RESULT, type Result } from '../protocol/control.ts';
import type { RouterSettings } from '../settings.ts';
import { type Announcement, type AnnouncementAsk, Announcements } from './announcements.ts';
import { Capabilities, type Capability, type CapabilityAsk } from './capabilities.ts';
import { type Ask, GRACE, type Lease, Leases, type Owner, type Subject, type Write } from './leases.ts';
import type { Notices } from './notices.ts';
import type { Rules } from './policy.ts';
import {
  type Element,
  type RulesetConfig,
  renderAnnouncement,
  renderAnnouncements,
  renderCapabilities,
  renderCapabilityRemoval,
  type TunnelElement,
} from './ruleset.ts';
import { Table } from './table.ts';

/** The interface of the tunnels. There is one router in a network namespace. */
export const TUNNEL_INTERFACE = 'detour-vpn';

/** What the keeper of the table needs of the outside. */
export type KeeperPorts = {
  readonly clock: Clock;
  readonly log: Log;
  readonly nft: Nft;
  readonly addresses: Addresses;
  readonly conntrack: Conntrack;
  /** TCP ports on which something of this host listens. */
  readonly listeners: () => Promise<readonly number[]>;
  /**
   * Looks after what lies outside our table (forwarding, the host's firewall), at start and every half minute. Answers
   * with what keeps each family from being forwarded; null when nothing does.
   */
  readonly upkeep: (facts: Facts) => Promise<Forwarding>;
};

/** What keeps a family from being forwarded, for people; null when nothing does, `unused` when the host has none of it. */
export type Forwarding = { readonly v4: string | null; readonly v6: string | null };

/** Facts that outlive this process, kept in the kernel's table. */
export type Facts = {
  get(name: string): string | undefined;
  /** Remembers facts before what they describe is changed. False when they could not be stored: change nothing then. */
  remember(facts: ReadonlyMap<string, string>): Promise<boolean>;
};

/** A request that waits for the kernel. */
export type Job =
  | {
      readonly kind: 'lease' | 'release';
      readonly ask: Ask;
      readonly answer: (result: Result, lifetime: number, port: number) => void;
    }
  | {
      readonly kind: 'capability';
      readonly ask: CapabilityAsk;
      /** `port` is 0 when there is none to be had. */
      readonly answer: (port: number) => void;
    }
  | {
      readonly kind: 'announcement';
      readonly ask: AnnouncementAsk;
      /** Whether it is given up. */
      readonly withdrawn: boolean;
      readonly answer: (result: Result, lifetime: number) => void;
    };
type AnnouncementJob = Extract<Job, { readonly kind: 'announcement' }>;
type LeaseJob = Extract<Job, { readonly kind: 'lease' | 'release' }>;
type CapabilityJob = Extract<Job, { readonly kind: 'capability' }>;

const QUEUE_LENGTH = 4_096;
const BATCH = 512;
const SWEEP_MS = 2_000;
const UPKEEP_MS = 30_000;
/** No new leases above this share of the host's conntrack table. */
const CONNTRACK_LIMIT = 0.85;
const DRAIN_MS = 3_000;
/** Up to here nft lists the whole table quickly: it reads every lease for that (docs/kernel-notes.md). */
const FEW_LEASES = 4_096;
/** With more leases, how often the whole table may be read. */
const THOROUGH_MS = 300_000;
const EPOCH = 'epoch';

/** A key's id as people write it. */
export const hexKey = (owner: Owner): string => (owner === 'v1' ? 'v1' : owner.toString(16).padStart(8, '0'));

/**
 * Keeps the kernel's table and what we know of it the same, whoever changes either. Everything that changes the table passes
 * through one worker, one step at a time.
 */
export class Keeper {
  readonly #settings: Omit<RouterSettings, 'keys'>;
  readonly #ports: KeeperPorts;
  readonly #notices: Notices;
  /** Called after somebody else's change of the rules was undone. */
  onRestored: () => void = () => undefined;
  readonly #table: Table;
  readonly #leases: Leases;
  /** Null while joins may not name their servers. */
  readonly #capabilities: Capabilities | null;
  /** Null while servers may not ask to be announced. */
  readonly #announcements: Announcements | null;
  readonly #facts = new Map<string, string>();
  readonly #timers = new Set<Cancel>();
  readonly #queue: Job[] = [];
  readonly #tasks: (() => Promise<void>)[] = [];
  #keyIds: ReadonlySet<number>;
  #working: Promise<void> | null = null;
  #rules: Rules;
  #own: readonly LocalAddress[] = [];
  #gateways: readonly Address[] = [];
  #timeouts = true;
  #forwarding: Forwarding = { v4: null, v6: null };
  #conntrackFull = false;
  #draining = false;
  /** Whose table it is that we keep: null before we changed anything. */
  #origin: 'new' | 'inherited' | null = null;
  #fault: NftFailure | null = null;
  /** Table and memory may differ: an outcome stayed unknown. */
  #doubtful = false;
  #reconciling = false;
  #upkeeping: Promise<void> | null = null;
  #lookedAt = Number.NEGATIVE_INFINITY;
  #kernelCounters: { at: number; counters: Promise<ReadonlyMap<string, number>> } | null = null;

  constructor(
    settings: Omit<RouterSettings, 'keys'>,
    keyIds: ReadonlySet<number>,
    ports: KeeperPorts,
    notices: Notices,
  ) {
    this.#settings = settings;
    this.#keyIds = keyIds;
    this.#ports = ports;
    this.#notices = notices;
    this.#table = new Table(ports.nft);
    const capabilities = settings.inband ? new Capabilities(settings.ports, GRACE) : null;
    this.#capabilities = capabilities;
    this.#leases = new Leases({
      ports: settings.ports,
      longest: Math.floor(settings.leaseTime / 1000),
      isReserved: (client, port) => capabilities?.holds(client, port) ?? false,
    });
    this.#announcements =
      settings.announce.length > 0 ? new Announcements(Math.floor(settings.leaseTime / 1000), GRACE) : null;
    this.#rules = { allow: settings.allow, deny: settings.deny, own: [] };
  }

  /** Adopts what an earlier daemon left in the kernel, puts our rules there, and looks after them from now on. */
  async start(): Promise<NftFailure | null> {
    const facts = await this.#table.facts();
    if (facts && 'kind' in facts) return facts;
    for (const fact of facts ?? []) {
      const at = fact.indexOf('=');
      if (at > 0) this.#facts.set(fact.slice(0, at), fact.slice(at + 1));
    }
    const fresh = !this.#facts.has(EPOCH);
    if (fresh) this.#facts.set(EPOCH, this.#newEpoch());
    this.#own = this.#ports.addresses.local();
    this.#rules = { ...this.#rules, own: this.#own };
    this.#gateways = await this.#ports.addresses.gateways();
    this.#origin = fresh ? 'new' : 'inherited';
    const failure =
      (await this.#table.probe()) ??
      (await this.#install()) ??
      (fresh ? await this.#table.remember(this.#memory()) : null);
    if (failure) return failure;
    const adopted = await this.#adopt();
    if (adopted) return adopted;
    await this.#upkeep();
    await this.#measureConntrack();
    // The measure of what somebody else changes.
    if (this.#leases.size < FEW_LEASES) await this.#table.check(true);
    this.#every(SWEEP_MS, () => this.#sweep());
    this.#every(UPKEEP_MS, () => this.#reconcileSoon());
    return null;
  }

  /** Whose table it is: `inherited` from an earlier daemon, or `new`; null before anything was changed. */
  get origin(): 'new' | 'inherited' | null {
    return this.#origin;
  }

  /** Changes when leases may have been lost; 16 hex digits. */
  get epoch(): string {
    return this.#facts.get(EPOCH) ?? '0';
  }

  /** What destinations are allowed now. */
  get rules(): Rules {
    return this.#rules;
  }

  /** Next hops of this host's default routes. */
  get gateways(): readonly Address[] {
    return this.#gateways;
  }

  get forwarding(): Forwarding {
    return this.#forwarding;
  }

  /** Leases in the kernel now. */
  get leases(): { readonly count: number; readonly live: Iterable<Lease> } {
    return { count: this.#leases.size, live: this.#leases.live() };
  }

  /** Those whose joins may name their servers; null when nobody's may. */
  get capabilities(): readonly Capability[] | null {
    return this.#capabilities?.all() ?? null;
  }

  /** Servers that anybody's joins are led to; null when none may ask for it. */
  get announcements(): readonly Announcement[] | null {
    return this.#announcements?.all() ?? null;
  }

  /** What keeps leases from being granted, for people. */
  get troubles(): readonly string[] {
    const reasons: string[] = [];
    if (this.#fault) reasons.push(`nft: ${this.#fault.message}`);
    if (this.#doubtful) reasons.push('the outcome of an nft run is not known yet');
    const { v4, v6 } = this.#forwarding;
    // One family that works is a working detour.
    if (v4 !== null && v6 !== null) reasons.push(`IPv4: ${v4}`, `IPv6: ${v6}`);
    return reasons;
  }

  /** Packets that the kernel's rules dropped or refused, by cause. */
  kernelCounters(): Promise<ReadonlyMap<string, number>> {
    const now = this.#ports.clock.now();
    const age = this.#leases.size < FEW_LEASES ? 1_000 : THOROUGH_MS;
    if (!this.#kernelCounters || now - this.#kernelCounters.at >= age) {
      this.#kernelCounters = { at: now, counters: this.#table.counters() };
    }
    return this.#kernelCounters.counters;
  }

  /** Queues a request for one of the next transactions; when too many wait, the oldest is dropped and never answered. */
  submit(job: Job): void {
    this.#queue.push(job);
    if (this.#queue.length > QUEUE_LENGTH) {
      this.#queue.shift();
      this.#notices.count('queue_dropped');
      this.#notices.warn(
        'queue-full',
        { length: QUEUE_LENGTH },
        'more requests than nft can follow: dropping the oldest',
      );
    }
    this.#wake();
  }

  /**
   * Changes what else the table holds, in a transaction of its own between those of leases. Where the table is gone altogether
   * it is put back first.
   */
  async change(text: string): Promise<NftFailure | null> {
    let failure: NftFailure | null = null;
    await this.#exclusively(async () => {
      failure = await this.#changeTable(text);
    });
    return failure;
  }

  /** The addresses inside tunnels that the kernel lets through. Where the table is gone altogether it is put back first. */
  async tunnels(): Promise<readonly (TunnelElement | null)[] | NftFailure> {
    const found = await this.#table.tunnels();
    if (!('kind' in found) || found.kind !== 'absent') return found;
    await this.#exclusively(() => this.#restore('absent'));
    return this.#table.tunnels();
  }

  /** Accepts these keys from now on. A revoked one takes its leases and its flows with it, even when its id comes back. */
  async rekey(keyIds: ReadonlySet<number>, revoked: readonly number[]): Promise<void> {
    this.#keyIds = keyIds;
    await this.#exclusively(async () => {
      const failure = await this.#install();
      if (failure) this.#blame(failure);
      for (const id of revoked) await this.#revoke(id);
    });
    // Whoever asks for this may have flushed a firewall too: look after all of it now, not in half a minute.
    this.#reconcileSoon();
  }

  /** Finishes the transaction under way and starts no other. Takes no longer than a few seconds. */
  async drain(): Promise<void> {
    this.#draining = true;
    for (const cancel of this.#timers) cancel();
    this.#timers.clear();
    const { promise, resolve } = Promise.withResolvers<void>();
    const cancel = this.#ports.clock.after(DRAIN_MS, resolve);
    // Also what looks after the firewall: after a cleanup it must not put our rule back.
    await Promise.race([Promise.all([this.#working, this.#upkeeping]), promise]);
    cancel();
  }

  get #factStore(): Facts {
    return {
      get: (name) => this.#facts.get(name),
      remember: async (facts) => {
        const before = new Map(this.#facts);
        for (const [name, value] of facts) this.#facts.set(name, value);
        const failure = await this.#table.remember(this.#memory());
        if (!failure) return true;
        this.#facts.clear();
        for (const [name, value] of before) this.#facts.set(name, value);
        return false;
      },
    };
  }

  #memory(): string[] {
    return [...this.#facts].map(([name, value]) => `${name}=${value}`);
  }

  #newEpoch(): string {
    return Buffer.from(this.#ports.clock.random(8)).toString('hex');
  }

  #wake(): void {
    this.#working ??= this.#work()
      .catch((error: unknown) => {
        this.#ports.log.error('worker-failed', { reason: String(error) }, 'a bug: please report it');
      })
      .finally(() => {
        this.#working = null;
        if (this.#queue.length > 0 || this.#tasks.length > 0) this.#wake();
      });
  }

  async #work(): Promise<void> {
    // Let the datagrams that are already here join the first batch.
    await Promise.resolve();
    while (this.#queue.length > 0 || this.#tasks.length > 0) {
      const task = this.#tasks.shift();
      if (task) await task();
      else await this.#batch(this.#queue.splice(0, BATCH));
    }
  }

  /** Runs `task` when no transaction is under way, and none starts until it is done. */
  #exclusively(task: () => Promise<void>): Promise<void> {
    return new Promise((resolve, reject) => {
      this.#tasks.push(() => task().then(resolve, reject));
      this.#wake();
    });
  }

  /** Requests that came while a transaction ran share the next one. */
  async #batch(jobs: readonly Job[]): Promise<void> {
    const now = this.#ports.clock.now();
    const planned: { job: LeaseJob; write: Write }[] = [];
    const postponed: Job[] = [];
    const capabilities: CapabilityJob[] = [];
    const announcements: AnnouncementJob[] = [];
    for (const job of jobs) {
      if (job.kind === 'announcement') {
        announcements.push(job);
        continue;
      }
      if (job.kind === 'capability') {
        capabilities.push(job);
        continue;
      }
      const { ask } = job;
      const refuseNew = this.#conntrackFull || this.#blocked(ask.client) !== null;
      const plan =
        job.kind === 'lease'
          ? this.#leases.plan(ask, now, this.#draw(), refuseNew)
          : this.#leases.planRelease(ask, now);
      if (plan.kind === 'write') planned.push({ job, write: plan.write });
      else if (plan.kind === 'busy') postponed.push(job);
      else if (plan.kind === 'refused') job.answer(RESULT[plan.result], plan.retryAfter, 0);
      else job.answer(RESULT.OK, plan.lease ? this.#remaining(plan.lease, now) : 0, plan.lease?.port ?? 0);
    }
    // A transaction that deletes waits for all readers in the kernel, some 10 ms: who is granted something need not.
    await this.#carryOut(planned.filter(({ write }) => write.kind !== 'remove'));
    await this.#authorise(capabilities);
    for (const job of announcements) await this.#announce(job);
    await this.#carryOut(planned.filter(({ write }) => write.kind === 'remove'));
    this.#queue.unshift(...postponed);
  }

  /** A transaction for each: they are few, and last long. */
  async #announce({ withdrawn, ask, answer }: AnnouncementJob): Promise<void> {
    const table = this.#announcements;
    const { clock, log } = this.#ports;
    if (!table) {
      answer(RESULT.UNSUPPORTED, defaultRetryAfter(RESULT.UNSUPPORTED));
      return;
    }
    if (withdrawn) {
      const held = table.get(ask.owner, ask.server);
      const failure = held && (await this.#changeTable(renderAnnouncement(held, 0)));
      if (held && !failure) {
        table.remove(held);
        log.info('announcement-withdrawn', this.#auditServer(held), 'withdrawn by its server');
      }
      answer(failure ? RESULT.INTERNAL : RESULT.OK, failure ? defaultRetryAfter(RESULT.INTERNAL) : 0);
      return;
    }
    const listening = await this.#ports.listeners();
    const plan =
      this.#conntrackFull || this.#blocked(ask.server.address) !== null
        ? ({ kind: 'refused', result: 'NO_RESOURCES' } as const)
        : table.plan(ask, clock.now(), (port) => listening.includes(port));
    if (plan.kind === 'refused') {
      answer(RESULT[plan.result], defaultRetryAfter(RESULT[plan.result]));
      return;
    }
    const failure = await this.#changeTable(renderAnnouncement(plan.announcement, plan.lifetime));
    if (failure) {
      answer(RESULT.INTERNAL, defaultRetryAfter(RESULT.INTERNAL));
      return;
    }
    table.committed({ ...plan.announcement, expires: clock.now() + plan.lifetime * 1000 });
    if (plan.isNew)
      log.info('announcement-granted', { ...this.#auditServer(plan.announcement), seconds: plan.lifetime }, 'granted');
    answer(RESULT.OK, plan.lifetime);
  }

  #auditServer({ owner, server }: Announcement): LogFields {
    return { key: hexKey(owner), server: formatEndpoint(server) };
  }

  /** In the worker: one transaction, in a table that is put back first when it is gone. */
  async #changeTable(text: string): Promise<NftFailure | null> {
    let failure = await this.#table.change(text);
    if (failure?.kind === 'absent') {
      await this.#restore('absent');
      failure = await this.#table.change(text);
    }
    if (failure) this.#blame(failure);
    return failure;
  }

  /** One transaction for all who ask for a capability, and the answers to them. */
  async #authorise(jobs: readonly CapabilityJob[]): Promise<void> {
    const table = this.#capabilities;
    if (jobs.length === 0) return;
    const now = this.#ports.clock.now();
    const writes = jobs.map(({ ask }) => {
      const known = this.#blocked(ask.client) === null && !this.#conntrackFull ? table : null;
      const taken = (port: number): boolean => this.#leases.isTaken(ask.client, port, now);
      const write = known?.plan(ask, now, () => this.#draw(), taken) ?? null;
      // At once, so that the next one of this batch gets another port. What the kernel then refuses is nobody's for a while.
      if (write) table?.committed(write);
      return write;
    });
    const planned = writes.filter((write) => write !== null);
    const run = (): Promise<NftFailure | null> =>
      this.#table.authorise(
        planned.map(({ capability }) => capability),
        planned.flatMap(({ instead }) => instead ?? []),
      );
    let failure = planned.length === 0 ? null : await run();
    if (failure?.kind === 'absent') {
      await this.#restore('absent');
      failure = await run();
    }
    if (failure) this.#blame(failure);
    for (const [index, job] of jobs.entries()) job.answer(failure ? 0 : (writes[index]?.capability.port ?? 0));
  }

  /** One transaction, and the answers to it. */
  async #carryOut(planned: readonly { readonly job: LeaseJob; readonly write: Write }[]): Promise<void> {
    const { clock, log } = this.#ports;
    const outcomes = await this.#commit(planned.map(({ write }) => write));
    const after = clock.now();
    for (const [index, { job, write }] of planned.entries()) {
      const failure = outcomes[index] ?? null;
      if (failure) {
        this.#leases.failed(write);
        const result = failure.kind === 'full' ? RESULT.NO_RESOURCES : RESULT.INTERNAL;
        job.answer(result, defaultRetryAfter(result), 0);
        continue;
      }
      this.#leases.committed(write, after);
      if (write.kind === 'remove') log.info('lease-released', this.#audit(write.lease), 'released by its client');
      else if (write.kind === 'add') {
        log.info('lease-granted', { ...this.#audit(write.lease), seconds: write.lifetime }, 'granted');
      } else log.debug('lease-renewed', { ...this.#audit(write.lease), seconds: write.lifetime }, 'renewed');
      job.answer(RESULT.OK, write.lifetime, write.kind === 'remove' ? 0 : write.lease.port);
    }
  }

  /** Commits, and where the table is gone altogether puts it back and tries once more. */
  async #commit(writes: readonly Write[]): Promise<readonly (NftFailure | null)[]> {
    let outcomes = await this.#table.commit(writes);
    if (outcomes.some((failure) => failure?.kind === 'absent')) {
      await this.#restore('absent');
      outcomes = await this.#table.commit(writes);
    }
    const failure = outcomes.find(
      (outcome) => outcome !== null && outcome.kind !== 'full' && outcome.kind !== 'exists',
    );
    if (failure) this.#blame(failure);
    else if (writes.length > 0) this.#fault = null;
    if (outcomes.some((outcome) => outcome !== null)) {
      // A full map or a taken slot means that the kernel has elements we do not know of.
      this.#doubtful = true;
      this.#reconcileSoon();
    }
    return outcomes;
  }

  /** Between two batches; however many ask for it, it happens once. */
  #reconcileSoon(): void {
    if (this.#reconciling) return;
    this.#reconciling = true;
    this.#tasks.push(() => this.#reconcile());
    this.#wake();
  }

  #blame(failure: NftFailure): void {
    this.#fault = failure;
    this.#notices.count(`nft_${failure.kind}`);
    this.#notices.warn(
      'nft-failed',
      { kind: failure.kind, reason: failure.message },
      'nft failed: no lease is granted meanwhile',
    );
  }

  #blocked(client: Address): string | null {
    return client.family === 4 ? this.#forwarding.v4 : this.#forwarding.v6;
  }

  #draw(): number {
    return Buffer.from(this.#ports.clock.random(4)).readUInt32BE() / 2 ** 32;
  }

  #remaining(lease: Lease, now: number): number {
    return Math.max(0, Math.floor((lease.expires - now) / 1000));
  }

  #audit(lease: Subject & { readonly port: number }): LogFields {
    return {
      key: hexKey(lease.owner),
      client: formatAddress(lease.client),
      port: lease.port,
      destination: formatEndpoint(lease.destination),
    };
  }

  #every(ms: number, task: () => void | Promise<void>): void {
    const { clock, log } = this.#ports;
    const again = (): void => {
      const jitter = 0.8 + 0.4 * this.#draw();
      const cancel = clock.after(ms * jitter, () => {
        this.#timers.delete(cancel);
        Promise.resolve(task())
          .catch((error: unknown) => log.error('timer-failed', { reason: String(error) }, 'a bug: please report it'))
          .finally(() => {
            if (!this.#draining) again();
          });
      });
      this.#timers.add(cancel);
    };
    again();
  }

  async #sweep(): Promise<void> {
    for (const lease of this.#leases.sweep(this.#ports.clock.now())) {
      this.#ports.log.info('lease-expired', this.#audit(lease), 'not renewed');
    }
    this.#capabilities?.sweep(this.#ports.clock.now());
    for (const over of this.#announcements?.sweep(this.#ports.clock.now()) ?? [])
      this.#ports.log.info('announcement-expired', this.#auditServer(over), 'not renewed');
    await this.#measureConntrack();
    this.#notices.flush();
    const own = this.#ports.addresses.local();
    if (sameOwn(own, this.#own)) return;
    await this.#exclusively(async () => {
      this.#own = own;
      this.#rules = { ...this.#rules, own };
      this.#ports.log.info('addresses-changed', { addresses: own.length }, 'following a change of local addresses');
      const failure = await this.#install();
      if (failure) this.#blame(failure);
    });
  }

  async #measureConntrack(): Promise<void> {
    const usage = await this.#ports.conntrack.usage();
    const full = usage !== null && usage.max > 0 && usage.used / usage.max > CONNTRACK_LIMIT;
    if (full && !this.#conntrackFull) {
      this.#ports.log.warn(
        'conntrack-nearly-full',
        { ...usage },
        'no new leases until flows end; raise net.netfilter.nf_conntrack_max',
      );
    }
    this.#conntrackFull = full;
  }

  /** Beside the worker, because it starts programs that take longer than a lease may wait. */
  #upkeepSoon(): void {
    if (this.#draining) return;
    this.#upkeeping ??= this.#upkeep()
      .catch((error: unknown) =>
        this.#ports.log.error('upkeep-failed', { reason: String(error) }, 'a bug: please report it'),
      )
      .finally(() => {
        this.#upkeeping = null;
      });
  }

  async #upkeep(): Promise<void> {
    this.#forwarding = await this.#ports.upkeep(this.#factStore);
  }

  /** Makes the kernel what it ought to be, whoever changed it. Runs in the worker. */
  async #reconcile(): Promise<void> {
    this.#reconciling = false;
    this.#gateways = await this.#ports.addresses.gateways();
    const now = this.#ports.clock.now();
    const thorough = this.#leases.size < FEW_LEASES || now - this.#lookedAt >= THOROUGH_MS;
    if (thorough) this.#lookedAt = now;
    const state = await this.#table.check(thorough);
    if (typeof state !== 'string') {
      this.#blame(state);
      return;
    }
    if (state !== 'intact') await this.#restore(state);
    else {
      // One that is about to expire proves nothing.
      const sample = this.#sample(now);
      const held = sample ? await this.#table.holds(sample, this.#remaining(sample, now)) : true;
      if (typeof held !== 'boolean') {
        this.#blame(held);
        return;
      }
      if (!held) await this.#restore('emptied');
      else if (this.#doubtful) await this.#compare();
      if (this.#fault) await this.#tryAgain();
    }
    this.#upkeepSoon();
  }

  #sample(now: number): Lease | null {
    for (const lease of this.#leases.live()) if (this.#remaining(lease, now) > GRACE) return lease;
    return null;
  }

  /** Whether nft works again: a write that changes nothing. */
  async #tryAgain(): Promise<void> {
    const failure = await this.#table.remember(this.#memory());
    if (failure) this.#blame(failure);
    else this.#fault = null;
  }

  async #restore(what: 'absent' | 'changed' | 'emptied'): Promise<void> {
    const failure = (what === 'emptied' ? null : await this.#install()) ?? (await this.#table.remember(this.#memory()));
    if (failure) {
      this.#blame(failure);
      return;
    }
    const restored = await this.#compare();
    await this.#putCapabilities();
    await this.#putAnnouncements();
    this.#notices.count('rules_restored');
    this.#ports.log.warn('rules-restored', { found: what, leases: restored }, 'somebody changed our rules; restored');
    this.onRestored();
  }

  /** Makes the kernel's capabilities ours, and no others. */
  async #putCapabilities(): Promise<NftFailure | null> {
    if (!this.#capabilities) return null;
    const now = this.#ports.clock.now();
    const left = this.#capabilities.all().map((capability) => ({
      capability,
      lifetime: Math.floor((capability.expires - now) / 1000),
    }));
    const failure = await this.#table.change(renderCapabilities(left.filter(({ lifetime }) => lifetime > 0)));
    if (failure) this.#blame(failure);
    return failure;
  }

  /** Makes the kernel's announcements ours, and no others. */
  async #putAnnouncements(): Promise<NftFailure | null> {
    if (!this.#announcements) return null;
    const now = this.#ports.clock.now();
    const left = this.#announcements.all().map((announcement) => ({
      announcement,
      lifetime: Math.floor((announcement.expires - now) / 1000),
    }));
    const failure = await this.#table.change(renderAnnouncements(left.filter(({ lifetime }) => lifetime > 0)));
    if (failure) this.#blame(failure);
    return failure;
  }

  /** Removes what the kernel has and we do not, and puts there what it lacks. Answers with how many it lacked. */
  async #compare(): Promise<number> {
    const comparison = this.#leases.compare();
    const stray: Element[] = [];
    const failure = await this.#table.read((element) => {
      if (!comparison.found(element, element.port)) stray.push(element);
    });
    if (failure) {
      this.#blame(failure);
      return 0;
    }
    await this.#table.discard(stray);
    const writes = comparison.missing(this.#ports.clock.now());
    const outcomes = await this.#table.commitMany(writes);
    const failed = outcomes.find((outcome) => outcome !== null);
    if (failed) this.#blame(failed);
    this.#doubtful = failed !== undefined;
    return writes.length;
  }

  async #install(): Promise<NftFailure | null> {
    const { listen, ports, relay, legacyV1, fwmark } = this.#settings;
    const config: RulesetConfig = {
      listen,
      ports,
      relay,
      legacyV1,
      fwmark,
      keyIds: [...this.#keyIds],
      rules: this.#rules,
      timeouts: this.#timeouts,
      vpn: this.#settings.vpn && TUNNEL_INTERFACE,
      inband: this.#settings.inband,
      announce: this.#settings.announce,
    };
    const outcome = await this.#table.install(config);
    if ('kind' in outcome) return outcome;
    if (this.#timeouts && !outcome.timeouts) {
      this.#ports.log.warn(
        'no-conntrack-timeouts',
        {},
        "this kernel has no per-flow conntrack timeouts: the host's apply",
      );
    }
    this.#timeouts = outcome.timeouts;
    return null;
  }

  /** Takes over the leases that the kernel holds; those whose owner has no right to them any more go. */
  async #adopt(): Promise<NftFailure | null> {
    const now = this.#ports.clock.now();
    const refused: Element[] = [];
    const strangers = new Set<Owner>();
    const failure = await this.#table.read((element) => {
      const { owner, port, remaining } = element;
      if (!this.#leases.adopt(element, port, remaining, now)) refused.push(element);
      else if (owner === 'v1' ? !this.#settings.legacyV1 : !this.#keyIds.has(owner)) strangers.add(owner);
    });
    if (failure) return failure;
    await this.#table.discard(refused);
    for (const owner of strangers) await this.#revoke(owner);
    return (
      (this.#capabilities && (await this.#adoptCapabilities(this.#capabilities))) ??
      (this.#announcements && (await this.#adoptAnnouncements(this.#announcements)))
    );
  }

  /** As long as its key may, and its port is one that may be announced. */
  async #adoptAnnouncements(announcements: Announcements): Promise<NftFailure | null> {
    const found = await this.#table.announcements();
    if ('kind' in found) return found;
    const now = this.#ports.clock.now();
    const may = (port: number): boolean =>
      this.#settings.announce.some(({ first, last }) => first <= port && port <= last);
    for (const element of found) {
      if (!element || !this.#keyIds.has(element.owner) || !may(element.server.port)) continue;
      announcements.adopt({ ...element, expires: now + Math.max(0, element.remaining - GRACE) * 1000 });
    }
    return this.#putAnnouncements();
  }

  /** A client's session outlives this daemon, and so does its port: its joins go on. */
  async #adoptCapabilities(capabilities: Capabilities): Promise<NftFailure | null> {
    const found = await this.#table.capabilities();
    if ('kind' in found) return found;
    const now = this.#ports.clock.now();
    for (const element of found) {
      if (!element || !this.#keyIds.has(element.owner)) continue;
      if (this.#leases.isTaken(element.client, element.port, now)) continue;
      capabilities.adopt({ ...element, expires: now + Math.max(0, element.remaining - GRACE) * 1000 });
    }
    return this.#putCapabilities();
  }

  async #revoke(owner: Owner): Promise<void> {
    const { clock, conntrack, log } = this.#ports;
    const writes = this.#leases.planRevocation(owner, clock.now());
    const outcomes = await this.#table.commitMany(writes);
    let cut = 0;
    for (const [index, write] of writes.entries()) {
      const failure = outcomes[index] ?? null;
      if (failure) {
        this.#leases.failed(write);
        this.#blame(failure);
        continue;
      }
      this.#leases.committed(write, clock.now());
      cut += await conntrack.cut(write.lease.client, write.lease.port, this.#settings.fwmark);
    }
    for (const held of this.#announcements?.all() ?? []) {
      if (held.owner !== owner) continue;
      const failure = await this.#table.change(renderAnnouncement(held, 0));
      if (failure) this.#blame(failure);
      else this.#announcements?.remove(held);
    }
    const capabilities = owner === 'v1' ? [] : (this.#capabilities?.revoke(owner) ?? []);
    if (capabilities.length > 0) {
      const failure = await this.#table.change(capabilities.map(renderCapabilityRemoval).join(''));
      if (failure) this.#blame(failure);
      for (const { client, port } of capabilities) cut += await conntrack.cut(client, port, this.#settings.fwmark);
    }
    log.info('key-revoked', { key: hexKey(owner), leases: writes.length, flows: cut }, 'its leases and flows are gone');
  }
}

function sameOwn(a: readonly LocalAddress[], b: readonly LocalAddress[]): boolean {
  return (
    a.length === b.length &&
    a.every(({ address, length }, index) => {
      const other = b[index];
      return other !== undefined && other.length === length && sameAddress(other.address, address);
    })
  );
}
