/**
 * A model of one Multipath TCP connection over a network that changes: fluid rates instead of packets, so that an hour
 * takes well under a second. What is modelled, and where the numbers come from:
 *
 * - a subflow sends at most what its congestion window allows: slow start from 10 segments (RFC 6928) doubling every
 *   round trip; afterwards growth as in Reno or CUBIC, whichever is faster (RFC 9438, 4.3 and 4.4);
 * - random loss limits it to the larger of CUBIC's and Reno's response (RFC 9438 5.1; Mathis et al. 1997);
 * - subflows that share a bottleneck share its rate (max-min, uncoupled congestion control: Linux has no other);
 * - slow start ends by overshooting the queue; until that is repaired, a round trip later, what was sent after it waits;
 * - a busy bottleneck has a queue, which adds to the round trip of everybody in it;
 * - data is delivered in order: the receive buffer must hold what overtakes the slowest path; it begins with 128 KiB and grows
 *   to twice what was delivered in a round trip (Linux's auto-tuning). When it is full the quicker paths stand still for a
 *   part of the time, while the slowest is always busy (seen on 6.18: docs/path-selection.md, early harm). Paths that differ in
 *   round trip lose a little efficiency even when it does (fitted to the thesis's table: 1.5 % at 30/60 ms, 6 % at 60/220);
 * - a path that dies while in use stalls the connection for half a second, then the others carry on; when it heals, its
 *   subflow waits for the next retransmission timeout, which doubles each time (measured: 20.9 s after 15 s);
 * - joining takes one and a half round trips; a server that has its number of subflows closes further ones at once;
 * - the default scheduler gives an application that sends less than the paths could carry the path of least delay first.
 *
 * Not modelled: packets, reordering inside a path, the scheduler's mistakes, competing flows that react.
 */

export const SEGMENT = 1448;

export type Link = {
  /** Bytes per second left for this connection. */
  rate: number;
  /** What crossing it there and back takes, ms. */
  delayMs: number;
  /** Probability that a packet is lost. */
  loss: number;
  /** What a full queue adds, ms. */
  queueMs: number;
  up: boolean;
};

export type Change = { readonly at: number; readonly link: string; readonly set: Partial<Link> };

export type Plan = {
  readonly links: Readonly<Record<string, Link>>;
  /** Links of every path; `direct` and one for each detour. */
  readonly routes: Readonly<Record<string, readonly string[]>>;
  /** In order of time. */
  readonly changes: readonly Change[];
  /** Bytes. */
  readonly receiveBuffer: number;
  /** Extra subflows that the server accepts. */
  readonly accepts: number;
  /** Bytes per second the application has to send at a time; none for as much as possible. */
  readonly demand?: (at: number) => number;
  /** Relative noise of every link's rate. */
  readonly noise: number;
};

export type Subflow = {
  readonly path: string;
  readonly joinedAt: number;
  established: boolean;
  backup: boolean;
  /** What the congestion window allows, bytes per second. */
  allowed: number;
  slowStart: boolean;
  /** Slow start has overshot its queue: until then it repairs what was lost, and all that came after it waits. */
  repairedAt: number;
  /** Now, bytes per second. */
  rate: number;
  rttMs: number;
  acked: number;
  busyMs: number;
  /** Its path died while it was in use. */
  deadSince: number | null;
  resumesAt: number;
};

/** mulberry32: small, seeded, good enough for simulation. Numbers in [0, 1). */
export function dice(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

export const mbit = (rate: number): number => (rate * 1e6) / 8;

/** The application's stall when a path in use dies: about what kernels show with two paths (docs/kernel-notes.md). */
const STALL_MS = 500;
/** Retransmission timeouts begin here and double (RFC 6298, Linux's TCP_RTO_MIN plus some round trip). */
const FIRST_TIMEOUT_MS = 250;
/** What an unanswered join costs before anybody notices. */
export const JOIN_TIMEOUT_MS = 5_000;
/** Share of efficiency lost when the quickest path takes no time compared with the slowest. */
const UNEVEN = 0.05;
/** net.ipv4.tcp_rmem[1] of Linux. */
const FIRST_WINDOW = 131_072;

export class Connection {
  readonly plan: Plan;
  readonly links: Map<string, Link>;
  readonly subflows = new Map<string, Subflow>();
  now = 0;
  delivered = 0;
  /** Delivered through detours. */
  readonly carried = new Map<string, number>();
  /** Round trip of every byte, summed, for the mean latency of an application that sets the pace. */
  latency = 0;
  /** Joins sent. */
  joins = 0;
  readonly #routes = new Map<string, readonly Link[]>();
  readonly #noise = new Map<string, number>();
  readonly #roll: () => number;
  #next = 0;
  #stalledUntil = 0;
  #window: number;

  constructor(plan: Plan, seed: number) {
    this.plan = plan;
    this.#window = Math.min(FIRST_WINDOW, plan.receiveBuffer);
    this.links = new Map(Object.entries(plan.links).map(([name, link]) => [name, { ...link }]));
    this.#roll = dice(seed);
    for (const [path, names] of Object.entries(plan.routes)) {
      const route = names.map((name) => this.links.get(name)).filter((one) => one !== undefined);
      if (route.length !== names.length) throw new Error(`the route of ${path} has a link that does not exist`);
      this.#routes.set(path, route);
    }
    this.subflows.set('direct', this.#fresh('direct', false));
    const direct = this.subflows.get('direct');
    if (direct) direct.established = true;
  }

  route(path: string): readonly Link[] {
    const route = this.#routes.get(path);
    if (!route) throw new Error(`no path ${path}`);
    return route;
  }

  baseRtt(path: string): number {
    return this.route(path).reduce((sum, link) => sum + link.delayMs, 0);
  }

  isUp(path: string): boolean {
    return this.route(path).every((link) => link.up);
  }

  join(path: string, backup: boolean): void {
    if (this.subflows.has(path)) throw new Error(`${path} is joined already`);
    this.joins++;
    this.subflows.set(path, this.#fresh(path, backup));
  }

  close(path: string): void {
    if (path === 'direct') throw new Error('the direct path is not ours to close');
    this.subflows.delete(path);
  }

  /** A fresh subflow in the place of one that there is. */
  renew(path: string): void {
    this.subflows.set(path, { ...this.#fresh(path, false), established: true });
  }

  /** Lets `ms` pass. Steps much longer than a round trip lose the shape of slow start, nothing else. */
  step(ms: number): void {
    this.now += ms;
    while ((this.plan.changes[this.#next]?.at ?? Number.POSITIVE_INFINITY) <= this.now) {
      const change = this.plan.changes[this.#next++];
      const link = change && this.links.get(change.link);
      if (link) Object.assign(link, change.set);
    }
    this.#wander(ms);
    this.#handshakes();
    this.#outages();
    this.#carry(ms);
  }

  #fresh(path: string, backup: boolean): Subflow {
    const rttMs = this.baseRtt(path);
    return {
      path,
      joinedAt: this.now,
      established: false,
      backup,
      allowed: (10 * SEGMENT * 1000) / Math.max(1, rttMs),
      slowStart: true,
      repairedAt: 0,
      rate: 0,
      rttMs,
      acked: 0,
      busyMs: 0,
      deadSince: null,
      resumesAt: 0,
    };
  }

  /** Rates wander around their mean: an Ornstein-Uhlenbeck process with a memory of 1.5 s. */
  #wander(ms: number): void {
    if (this.plan.noise === 0) return;
    const keep = Math.exp(-ms / 1500);
    const spread = this.plan.noise * Math.sqrt(1 - keep * keep);
    for (const name of this.links.keys()) {
      const normal = Math.sqrt(-2 * Math.log(1 - this.#roll())) * Math.cos(2 * Math.PI * this.#roll());
      this.#noise.set(name, (this.#noise.get(name) ?? 0) * keep + spread * normal);
    }
  }

  #handshakes(): void {
    for (const subflow of [...this.subflows.values()]) {
      if (subflow.established) continue;
      const waited = this.now - subflow.joinedAt;
      if (!this.isUp(subflow.path)) {
        if (waited >= JOIN_TIMEOUT_MS) this.subflows.delete(subflow.path);
      } else if (waited >= 1.5 * this.baseRtt(subflow.path)) {
        const extra = [...this.subflows.values()].filter((one) => one.established && one.path !== 'direct').length;
        if (extra >= this.plan.accepts) this.subflows.delete(subflow.path);
        else subflow.established = true;
      }
    }
  }

  #outages(): void {
    for (const subflow of this.subflows.values()) {
      if (!subflow.established) continue;
      const up = this.isUp(subflow.path);
      if (!up && subflow.deadSince === null) {
        subflow.deadSince = this.now;
        subflow.resumesAt = Number.POSITIVE_INFINITY;
        if (subflow.rate > 0) this.#stalledUntil = Math.max(this.#stalledUntil, this.now + STALL_MS);
      } else if (up && subflow.deadSince !== null) {
        if (subflow.resumesAt === Number.POSITIVE_INFINITY) {
          let timeout = FIRST_TIMEOUT_MS;
          let at = subflow.deadSince + timeout;
          while (at < this.now) {
            timeout *= 2;
            at += timeout;
          }
          subflow.resumesAt = at;
        }
        if (this.now >= subflow.resumesAt) {
          subflow.deadSince = null;
          subflow.allowed = (2 * SEGMENT * 1000) / Math.max(1, subflow.rttMs);
          subflow.slowStart = true;
        }
      } else if (!up) subflow.resumesAt = Number.POSITIVE_INFINITY;
    }
  }

  #carry(ms: number): void {
    const usable = [...this.subflows.values()].filter((one) => one.established && one.deadSince === null);
    const preferred = usable.filter((one) => !one.backup);
    const active = preferred.length > 0 ? preferred : usable;
    for (const subflow of this.subflows.values()) {
      if (active.includes(subflow)) continue;
      subflow.rate = 0;
      // What was in flight when it died is still unacknowledged.
      if (subflow.deadSince !== null && !subflow.backup) subflow.busyMs += ms;
    }
    if (this.now < this.#stalledUntil) {
      for (const subflow of active) {
        subflow.rate = 0;
        subflow.busyMs += ms;
      }
    } else this.#share(active, ms);
    for (const subflow of this.subflows.values()) {
      const bytes = (subflow.rate * ms) / 1000;
      subflow.acked += bytes;
      this.delivered += bytes;
      this.latency += bytes * subflow.rttMs;
      if (subflow.path !== 'direct') {
        this.carried.set(subflow.path, (this.carried.get(subflow.path) ?? 0) + bytes);
      }
    }
  }

  #share(active: readonly Subflow[], ms: number): void {
    const left = new Map<Link, number>();
    for (const [name, link] of this.links) left.set(link, link.rate * Math.max(0.1, 1 + (this.#noise.get(name) ?? 0)));
    const limits = active.map((one) => Math.min(one.allowed, this.#lossLimit(one)));
    const rates = maxMin(
      active.map((one) => this.route(one.path)),
      limits,
      left,
    );
    const crowded = new Set([...left].filter(([link, rest]) => rest < link.rate * 0.02).map(([link]) => link));
    let sum = 0;
    let slowest = 0;
    let waiting = 0;
    let quickest = Number.POSITIVE_INFINITY;
    for (const [index, subflow] of active.entries()) {
      const rate = rates[index] ?? 0;
      const route = this.route(subflow.path);
      const rtt = route.reduce((all, link) => all + link.delayMs + (crowded.has(link) ? 0.7 * link.queueMs : 0), 0);
      subflow.rttMs += (rtt - subflow.rttMs) * (1 - Math.exp(-ms / Math.max(50, rtt)));
      const free = rate >= subflow.allowed * 0.999;
      if (!free) {
        if (subflow.slowStart) {
          const full = route.reduce((all, link) => all + link.delayMs + (crowded.has(link) ? link.queueMs : 0), 0);
          subflow.repairedAt = this.now + full;
        }
        subflow.slowStart = false;
        subflow.allowed = Math.max(rate, subflow.allowed * Math.exp(-ms / Math.max(100, rtt)), 2 * SEGMENT);
      } else if (subflow.slowStart) subflow.allowed *= 2 ** (ms / Math.max(1, subflow.rttMs));
      else subflow.allowed += Math.max(this.#renoGrowth(subflow), this.#cubicGrowth(subflow)) * (ms / 1000);
      subflow.rate = rate;
      sum += rate;
      slowest = Math.max(slowest, subflow.rttMs);
      waiting = Math.max(waiting, subflow.rttMs + Math.max(0, subflow.repairedAt - this.now));
      quickest = Math.min(quickest, subflow.rttMs);
    }
    if (sum <= 0) return;
    const uneven = active.length > 1 ? 1 - UNEVEN * (1 - quickest / slowest) : 1;
    const buffered = (this.#window * 1000) / (active.length > 1 ? waiting : slowest);
    const possible = Math.min(sum * uneven, buffered);
    const room = Math.min(this.plan.receiveBuffer, (2 * possible * slowest) / 1000);
    this.#window += Math.max(0, room - this.#window) * (1 - Math.exp(-ms / Math.max(1, slowest)));
    const wanted = this.plan.demand?.(this.now) ?? Number.POSITIVE_INFINITY;
    if (wanted < possible) {
      let rest = wanted;
      for (const subflow of [...active].sort((a, b) => a.rttMs - b.rttMs)) {
        const part = Math.min(rest, subflow.rate * 0.9);
        subflow.rate = part;
        rest -= part;
        subflow.busyMs += part > 0 ? Math.min(ms, (ms * part) / Math.max(part, subflow.allowed) + 0.05 * ms) : 0;
      }
      return;
    }
    if (possible === buffered && active.length > 1) {
      const delay = ({ rttMs, repairedAt }: Subflow): number => Math.max(rttMs, repairedAt - this.now);
      const last = active.reduce((a, b) => (delay(b) > delay(a) ? b : a));
      last.rate = Math.min(last.rate, possible);
      last.busyMs += ms;
      const share = (possible - last.rate) / Math.max(1, sum - last.rate);
      for (const subflow of active) {
        if (subflow === last) continue;
        subflow.rate *= share;
        subflow.busyMs += ms * share;
      }
      return;
    }
    for (const subflow of active) {
      subflow.rate *= possible / sum;
      subflow.busyMs += ms;
    }
  }

  #lossLimit(subflow: Subflow): number {
    const loss = 1 - this.route(subflow.path).reduce((kept, link) => kept * (1 - link.loss), 1);
    if (loss <= 0) return Number.POSITIVE_INFINITY;
    const rtt = Math.max(0.001, subflow.rttMs / 1000);
    const reno = 1.22 / Math.sqrt(loss);
    const cubic = 1.054 * (rtt / loss) ** 0.75;
    return (Math.max(reno, cubic, 1) * SEGMENT) / rtt;
  }

  #renoGrowth(subflow: Subflow): number {
    const rtt = Math.max(0.001, subflow.rttMs / 1000);
    return (0.53 * SEGMENT) / (rtt * rtt);
  }

  /** The mean growth over the time CUBIC takes from its last loss back to its window and beyond (K, with C = 0.4, beta = 0.7). */
  #cubicGrowth(subflow: Subflow): number {
    const rtt = Math.max(0.001, subflow.rttMs / 1000);
    const window = (subflow.allowed * rtt) / SEGMENT;
    return (0.3 * subflow.allowed) / Math.max(0.5, Math.cbrt((window * 0.3) / 0.4));
  }
}

/** Fair shares of links by progressive filling; `left` keeps what remains of each. */
export function maxMin(
  routes: readonly (readonly Link[])[],
  limits: readonly number[],
  left: Map<Link, number>,
): number[] {
  const rates = routes.map(() => 0);
  let open = [...routes.keys()];
  const users = new Map<Link, number>();
  while (open.length > 0) {
    users.clear();
    for (const index of open) for (const link of routes[index] ?? []) users.set(link, (users.get(link) ?? 0) + 1);
    let step = Number.POSITIVE_INFINITY;
    for (const index of open) step = Math.min(step, (limits[index] ?? 0) - (rates[index] ?? 0));
    for (const [link, count] of users) step = Math.min(step, (left.get(link) ?? 0) / count);
    step = Math.max(0, step);
    for (const index of open) rates[index] = (rates[index] ?? 0) + step;
    for (const [link, count] of users) left.set(link, Math.max(0, (left.get(link) ?? 0) - step * count));
    open = open.filter(
      (index) =>
        (rates[index] ?? 0) < (limits[index] ?? 0) - 1e-6 &&
        (routes[index] ?? []).every((link) => (left.get(link) ?? 0) > link.rate * 1e-9),
    );
  }
  return rates;
}

/** What a set of paths carries once everything has settled, bytes per second; noise aside. */
export function steady(links: ReadonlyMap<string, Link>, plan: Plan, paths: readonly string[]): number {
  const alive = paths.filter((path) => (plan.routes[path] ?? []).every((name) => links.get(name)?.up));
  const routes = alive.map((path) => (plan.routes[path] ?? []).map((name) => links.get(name) as Link));
  const left = new Map([...links.values()].map((link) => [link, link.rate]));
  const base = routes.map((route) => route.reduce((sum, link) => sum + link.delayMs, 0));
  const limits = routes.map((route, index) => {
    const loss = 1 - route.reduce((kept, link) => kept * (1 - link.loss), 1);
    if (loss <= 0) return Number.POSITIVE_INFINITY;
    const rtt = Math.max(1, base[index] ?? 1) / 1000;
    return (Math.max(1.22 / Math.sqrt(loss), 1.054 * (rtt / loss) ** 0.75, 1) * SEGMENT) / rtt;
  });
  const rates = maxMin(routes, limits, left);
  const sum = rates.reduce((all, rate) => all + rate, 0);
  if (sum === 0) return 0;
  const crowded = new Set([...left].filter(([link, rest]) => rest < link.rate * 0.02).map(([link]) => link));
  const rtts = routes.map((route) =>
    route.reduce((all, link) => all + link.delayMs + (crowded.has(link) ? 0.7 * link.queueMs : 0), 0),
  );
  const slowest = Math.max(...rtts);
  const uneven = alive.length > 1 ? 1 - UNEVEN * (1 - Math.min(...rtts) / slowest) : 1;
  return Math.min(sum * uneven, (plan.receiveBuffer * 1000) / slowest);
}
