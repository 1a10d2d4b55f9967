import { type Change, dice, type Link, mbit, type Plan } from './network.ts';

/** Networks to choose in. Rates in Mbit/s and round trips in ms, as people write them. */

export const link = (rate: number, delayMs: number, rest: Partial<Link> = {}): Link => ({
  rate: mbit(rate),
  delayMs,
  loss: 0,
  queueMs: 40,
  up: true,
  ...rest,
});

const plan = (rest: Partial<Plan> & Pick<Plan, 'links' | 'routes'>): Plan => ({
  changes: [],
  receiveBuffer: 6_291_456, // net.ipv4.tcp_rmem[2] of Linux
  accepts: 2,
  noise: 0.05,
  ...rest,
});

/** The thesis's topology: client-r1-r2-server, and r1-r3-r2 with the detour behind r3; six links of 5 ms one way. */
function thesis(rates: readonly number[], second: Partial<Link>): Plan {
  const links = Object.fromEntries(rates.map((rate, index) => [`l${index + 1}`, link(rate, index === 5 ? 20 : 10)]));
  Object.assign(links['l2'] as Link, second);
  return plan({ links, routes: { direct: ['l1', 'l2', 'l3'], detour: ['l1', 'l4', 'l6', 'l5', 'l3'] } });
}

const CORE = [20, 10, 20, 10, 10, 20];
const SYM = [10, 10, 10, 10, 10, 10];

export const THESIS: Readonly<Record<string, Plan>> = {
  easy: thesis(CORE, {}),
  lossy: thesis(CORE, { loss: 0.01 }),
  delayed: thesis(CORE, { delayMs: 200 }),
  sym: thesis(SYM, {}),
  sym_lossy: thesis(SYM, { loss: 0.01 }),
  sym_delayed: thesis(SYM, { delayMs: 200 }),
};

/** Eight detours, of which two are good. Which ones, and how good, is drawn. */
export function eight(seed: number): { plan: Plan; good: readonly string[] } {
  const roll = dice(seed);
  const names = Array.from({ length: 8 }, (_, index) => `d${index + 1}`);
  const good = [...names].sort(() => roll() - 0.5).slice(0, 2);
  const links: Record<string, Link> = { access: link(200, 4), core: link(10 + 10 * roll(), 26) };
  const routes: Record<string, readonly string[]> = { direct: ['access', 'core'] };
  for (const name of names) {
    links[name] = good.includes(name)
      ? link(15 + 15 * roll(), 30 + 50 * roll())
      : link(0.5 + 2.5 * roll(), 20 + 180 * roll(), { loss: 0.02 * roll() });
    routes[name] = ['access', name];
  }
  return { plan: plan({ links, routes }), good };
}

/**
 * An hour in which everything changes: every route gets a new rate, delay and loss some ten times, a tenth of the
 * changes are outages, two detours share a provider, and one shares the bottleneck of the direct path.
 */
export function hour(seed: number, everyMs = 360_000): Plan {
  const roll = dice(seed);
  const logUniform = (low: number, high: number): number => low * (high / low) ** roll();
  const exponential = (mean: number): number => -mean * Math.log(1 - roll());
  const links: Record<string, Link> = { access: link(150, 4), core: link(logUniform(5, 40), 20 + 40 * roll()) };
  const routes: Record<string, readonly string[]> = { direct: ['access', 'core'] };
  const count = 4 + Math.floor(roll() * 5);
  for (let index = 1; index <= count; index++) {
    const name = `d${index}`;
    links[name] = link(logUniform(2, 50), 20 + 120 * roll(), { loss: roll() < 0.3 ? 0.01 * roll() : 0 });
    routes[name] = index === 1 ? ['access', 'core', name] : ['access', name];
  }
  links['provider'] = link(logUniform(10, 40), 2);
  routes['d2'] = ['access', 'provider', 'd2'];
  routes['d3'] = ['access', 'provider', 'd3'];
  const changes: Change[] = [];
  for (const name of Object.keys(links)) {
    if (name === 'access') continue;
    const mean = links[name]?.rate ?? 0;
    for (let at = exponential(everyMs); at < 3_600_000; at += exponential(everyMs)) {
      const rounded = Math.round(at / 100) * 100;
      if (roll() < 0.1 && name !== 'core' && name !== 'provider') {
        changes.push({ at: rounded, link: name, set: { up: false } });
        changes.push({ at: rounded + Math.round(5_000 + 40_000 * roll()), link: name, set: { up: true } });
      } else {
        const rate = Math.max(mbit(0.5), Math.min(mbit(60), mean * logUniform(0.25, 4)));
        changes.push({ at: rounded, link: name, set: { rate, loss: roll() < 0.3 ? 0.01 * roll() : 0 } });
      }
    }
  }
  changes.sort((a, b) => a.at - b.at);
  return plan({ links, routes, changes });
}

/** One detour that is there and not there, each for half a second. */
export function flapping(ms: number): Plan {
  const changes: Change[] = [];
  for (let at = 10_000; at < 10_000 + ms; at += 1_000) {
    changes.push({ at, link: 'd1', set: { up: false } }, { at: at + 500, link: 'd1', set: { up: true } });
  }
  return plan({
    links: { access: link(100, 4), core: link(10, 26), d1: link(10, 40), d2: link(8, 60) },
    routes: { direct: ['access', 'core'], d1: ['access', 'd1'], d2: ['access', 'd2'] },
    changes,
  });
}

/** Detours so slow that the receive buffer cannot hold what overtakes them: each one makes the connection slower. */
export function harmful(seed: number): Plan {
  const roll = dice(seed);
  const links: Record<string, Link> = { access: link(200, 4), core: link(40 + 40 * roll(), 16) };
  const routes: Record<string, readonly string[]> = { direct: ['access', 'core'] };
  for (let index = 1; index <= 4; index++) {
    links[`d${index}`] = link(1 + 4 * roll(), 250 + 250 * roll());
    routes[`d${index}`] = ['access', `d${index}`];
  }
  return plan({ links, routes, receiveBuffer: 500_000 + 500_000 * roll() });
}

/** One detour a twentieth as wide as the direct path, behind a deep queue: what it is given takes half a second. */
export function narrow(rate = 1): Plan {
  return plan({
    links: { access: link(200, 1), core: link(20, 9), d1: link(rate, 9, { queueMs: 600 }) },
    routes: { direct: ['access', 'core'], d1: ['access', 'd1'] },
  });
}
