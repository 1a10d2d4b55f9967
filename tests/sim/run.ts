import { readFileSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { thompson } from '../../appliance/client/paths.ts';
import { emptyExperience } from '../../appliance/client/worth.ts';
import { type Link, mbit, type Plan, steady } from './network.ts';
import { oracle, play, type Run } from './play.ts';
import {
  alone,
  epsilonGreedy,
  firstN,
  type Maker,
  meanOnly,
  ours,
  quickest,
  roundRobin,
  upperBound,
} from './policies.ts';
import { eight, flapping, harmful, hour, THESIS } from './scenarios.ts';

/**
 * `node tests/sim/run.ts [--fast]`: plays all scenarios and writes the figures into docs/path-selection.md and its picture.
 * Takes half a minute; `--fast` looks at a quarter of the seeds and writes nothing but the tables, to the terminal.
 */

const FAST = process.argv.includes('--fast');
const SECOND = 1_000;
const HOUR = 3_600 * SECOND;
/** Not used for tuning. */
const seeds = (from: number, count: number): number[] =>
  Array.from({ length: FAST ? Math.ceil(count / 4) : count }, (_, index) => from + index);

const mine = ours('Thompson sampling, marginal goodput (used)', { score: thompson });
const POLICIES: readonly Maker[] = [
  mine,
  ours('upper confidence bound, 1 deviation, same rules', { score: upperBound(1) }),
  ours('upper confidence bound, 2 deviations, same rules', { score: upperBound(2) }),
  ours('greatest mean, same rules, no exploration', { score: meanOnly }),
  epsilonGreedy,
  quickest,
  roundRobin,
  firstN,
  alone,
];

const mean = (values: readonly number[]): number => values.reduce((sum, one) => sum + one, 0) / values.length;
const percent = (value: number): string => `${(value * 100).toFixed(1)} %`;
const megabits = (rate: number): string => ((rate * 8) / 1e6).toFixed(1);
const nameOf = (make: Maker): string => make(() => 0.5, emptyExperience()).name;
const between = ({ seconds }: Run, from: number, to: number): number =>
  ((seconds[to - 1] ?? 0) - (seconds[from - 1] ?? 0)) / (to - from);

function table(head: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]): string => `| ${cells.join(' | ')} |`;
  return [line(head), line(head.map((_, index) => (index === 0 ? '---' : '---:'))), ...rows.map(line)].join('\n');
}

function regrets(): { text: string; bars: { name: string; value: number }[] } {
  const held = seeds(501, 12);
  const bars: { name: string; value: number }[] = [];
  const rows = POLICIES.map((make) => {
    const runs = held.map((seed) => {
      const plan = hour(seed);
      const { connection } = play(plan, make, { seed, ms: HOUR });
      return { regret: 1 - connection.delivered / oracle(plan, HOUR), joins: connection.joins };
    });
    const values = runs.map(({ regret }) => regret).sort((a, b) => a - b);
    bars.push({ name: nameOf(make), value: mean(values) });
    return [
      nameOf(make),
      percent(mean(values)),
      percent(values[Math.floor(values.length / 2)] ?? 0),
      percent(values.at(-1) ?? 0),
      mean(runs.map(({ joins }) => joins)).toFixed(0),
    ];
  });
  const head = ['chooser', 'regret, mean', 'median', 'worst', 'joins in the hour'];
  return { text: `${held.length} hours, seeds ${held[0]} to ${held.at(-1)}.\n\n${table(head, rows)}`, bars };
}

function thesis(): string {
  const published: Readonly<Record<string, string>> = {
    easy: '9.4 → 18.8',
    lossy: '4.3 → 13.7',
    delayed: '9.1 → 17.7',
    sym: '9.4 → 9.4',
    sym_lossy: '4.3 → 9.4',
    sym_delayed: '9.1 → 9.4',
  };
  const rows = Object.entries(THESIS).map(([name, plan]) => {
    const rates = (make: Maker): number =>
      mean(seeds(31, 4).map((seed) => between(play(plan, make, { seed, ms: 60 * SECOND }), 1, 60)));
    const [direct, detour] = [rates(alone), rates(mine)];
    return [name, megabits(direct), megabits(detour), (detour / direct).toFixed(2), published[name] ?? ''];
  });
  return table(['scenario', 'direct alone', 'with detours', 'ratio', 'thesis, measured'], rows);
}

function eights(): string {
  const rows = [mine, epsilonGreedy, quickest, roundRobin, firstN].map((make) => {
    const shares = seeds(201, 20).map((seed) => {
      const { plan, good } = eight(seed);
      const before = new Map<string, number>();
      const { connection } = play(plan, make, {
        seed,
        ms: 120 * SECOND,
        watch: ({ now, carried }) => {
          if (now === 60 * SECOND) for (const [name, bytes] of carried) before.set(name, bytes);
        },
      });
      const since = [...connection.carried].map(([name, bytes]) => ({ name, bytes: bytes - (before.get(name) ?? 0) }));
      const all = since.reduce((sum, { bytes }) => sum + bytes, 0);
      return since.reduce((sum, { name, bytes }) => sum + (good.includes(name) ? bytes : 0), 0) / all;
    });
    return [nameOf(make), percent(mean(shares)), percent(Math.min(...shares))];
  });
  return table(['chooser', 'share of detour bytes on the good two, second minute', 'worst of 20'], rows);
}

function harms(): string {
  const spans = [
    ['first minute', 0, 60],
    ['ten minutes', 0, 600],
    ['last five', 300, 600],
  ] as const;
  const rows = [mine, epsilonGreedy, quickest].map((make) => {
    const ratios = seeds(61, 8).map((seed) => {
      const plan = harmful(seed);
      const [direct, detour] = [alone, make].map((one) => play(plan, one, { seed, ms: 600 * SECOND }));
      if (!direct || !detour) throw new Error('two runs');
      const upTo = ({ seconds }: Run, at: number): number => (at === 0 ? 0 : (seconds[at - 1] ?? 0));
      return spans.map(
        ([, from, to]) => (upTo(detour, to) - upTo(detour, from)) / (upTo(direct, to) - upTo(direct, from)),
      );
    });
    return [nameOf(make), ...spans.map((_, index) => mean(ratios.map((one) => one[index] ?? 0)).toFixed(2))];
  });
  return table(['chooser', ...spans.map(([name]) => `${name}, ratio to direct alone`)], rows);
}

function flaps(): string {
  const rows = [mine, firstN, alone].map((make) => {
    const run = play(flapping(300 * SECOND), make, { seed: 41, ms: 330 * SECOND });
    return [nameOf(make), megabits(between(run, 15, 305)), String(run.connection.joins)];
  });
  return table(['chooser', 'Mbit/s while it flaps', 'joins'], rows);
}

/** The first moment of an hour, for ever: transfers of a given size, with nothing known before. */
function young(seed: number): Plan {
  return { ...hour(seed), changes: [] };
}

function ages(): string {
  const sizes = [
    ['100 kB', 1e5],
    ['1 MB', 1e6],
    ['10 MB', 1e7],
    ['100 MB', 1e8],
  ] as const;
  const held = seeds(401, 24);
  const duration = (make: Maker, seed: number, bytes: number): { ms: number; joins: number } => {
    const { connection } = play(young(seed), make, { seed, ms: 600 * SECOND, bytes, sampleMs: 50 });
    return { ms: connection.now, joins: connection.joins };
  };
  const direct = new Map(
    held.flatMap((seed) => sizes.map(([name, bytes]) => [`${seed} ${name}`, duration(alone, seed, bytes).ms])),
  );
  const rows = [0, 250, 500, 1_000, 2_000, 5_000].map((minAgeMs) => {
    const make = ours('', { score: thompson, minAgeMs });
    const cells = sizes.map(([name, bytes]) => {
      const runs = held.map((seed) => {
        const { ms, joins } = duration(make, seed, bytes);
        return { ratio: ms / (direct.get(`${seed} ${name}`) ?? ms), joins };
      });
      const worst = Math.max(...runs.map(({ ratio }) => ratio));
      return `${mean(runs.map(({ ratio }) => ratio)).toFixed(2)} (${worst.toFixed(2)}), ${mean(runs.map(({ joins }) => joins)).toFixed(1)}`;
    });
    return [`${minAgeMs} ms`, ...cells];
  });
  return table(['minimum age', ...sizes.map(([name]) => name)], rows);
}

/** One hour as lines, and the regrets as bars: plain SVG, no more than a screen. */
function picture(bars: readonly { name: string; value: number }[]): string {
  const seed = 303;
  const plan = hour(seed);
  const width = 900;
  const lineHeight = 220;
  const minutes = 60;
  const perMinute = (run: Run): number[] =>
    Array.from({ length: minutes }, (_, index) => between(run, Math.max(1, index * 60), (index + 1) * 60));
  const best = bestPerMinute(plan, minutes);
  const lines = [
    { name: 'oracle', colour: '#999999', rates: best },
    { name: 'with detours', colour: '#0a6e4f', rates: perMinute(play(plan, mine, { seed, ms: HOUR })) },
    { name: 'first two of the list', colour: '#b5651d', rates: perMinute(play(plan, firstN, { seed, ms: HOUR })) },
    { name: 'direct alone', colour: '#4460aa', rates: perMinute(play(plan, alone, { seed, ms: HOUR })) },
  ];
  const top = Math.max(...lines.flatMap(({ rates }) => rates));
  const x = (index: number): string => (60 + (index * (width - 80)) / (minutes - 1)).toFixed(1);
  const y = (rate: number): string => (30 + (1 - rate / top) * (lineHeight - 50)).toFixed(1);
  const text = (at: readonly [number, number], words: string, rest = ''): string =>
    `<text x="${at[0]}" y="${at[1]}" font-family="sans-serif" font-size="12" fill="#333" ${rest}>${words}</text>`;
  const parts = [
    text([60, 16], `One simulated hour (seed ${seed}): Mbit/s, minute by minute`),
    text([8, 36], megabits(top)),
    text([8, lineHeight - 18], '0'),
    ...lines.flatMap(({ name, colour, rates }, index) => [
      `<polyline fill="none" stroke="${colour}" stroke-width="${name === 'with detours' ? 2.5 : 1.5}" points="${rates.map((rate, minute) => `${x(minute)},${y(rate)}`).join(' ')}"/>`,
      text([60 + index * 190, lineHeight], name, `style="fill:${colour}"`),
    ]),
    text([60, lineHeight + 36], 'Mean regret against an oracle, %'),
    ...bars.flatMap(({ name, value }, index) => {
      const at = lineHeight + 50 + index * 22;
      return [
        `<rect x="330" y="${at}" width="${(value * 700).toFixed(1)}" height="14" fill="${index === 0 ? '#0a6e4f' : '#bbbbbb'}"/>`,
        text([60, at + 12], name),
        text([336 + value * 700, at + 12], (value * 100).toFixed(1)),
      ];
    }),
  ];
  const height = lineHeight + 60 + bars.length * 22;
  return `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${width} ${height}" role="img" aria-label="Goodput of one simulated hour, and regret by chooser"><rect width="100%" height="100%" fill="white"/>\n${parts.join('\n')}\n</svg>\n`;
}

function bestPerMinute(plan: Plan, minutes: number): number[] {
  const total = Array.from({ length: minutes + 1 }, (_, index) =>
    index === 0 ? 0 : oracle(plan, index * 60 * SECOND),
  );
  return Array.from({ length: minutes }, (_, index) => ((total[index + 1] ?? 0) - (total[index] ?? 0)) / 60);
}

/** That the model is one of a network: what a single path carries, against what it must. */
function sanity(): string {
  const links = (link: Link): Plan => ({
    links: { only: link },
    routes: { direct: ['only'] },
    changes: [],
    receiveBuffer: 6_291_456,
    accepts: 2,
    noise: 0,
  });
  const cases = [
    ['10 Mbit/s, 30 ms', { rate: mbit(10), delayMs: 30, loss: 0, queueMs: 40, up: true }, 'the link'],
    ['10 Mbit/s, 30 ms, 1 % loss', { rate: mbit(10), delayMs: 30, loss: 0.01, queueMs: 40, up: true }, 'thesis: 4.3'],
    ['1 Gbit/s, 200 ms', { rate: mbit(1000), delayMs: 200, loss: 0, queueMs: 0, up: true }, '6 MiB of buffer: 252'],
  ] as const;
  const rows = cases.map(([name, link, expected]) => {
    const plan = links(link);
    const run = play(plan, alone, { seed: 1, ms: 120 * SECOND });
    return [name, megabits(between(run, 60, 120)), megabits(steady(run.connection.links, plan, ['direct'])), expected];
  });
  return table(['one path', 'played', 'steady state', 'expected'], rows);
}

const began = performance.now();
const { text, bars } = regrets();
const sections = [
  ['An hour of changes', text],
  ["The thesis's scenarios", thesis()],
  ['Eight detours, two good', eights()],
  ['Detours that do harm', harms()],
  ['A detour that flaps at 1 Hz', flaps()],
  [
    'Minimum age',
    `Duration against direct alone, mean (worst) of ${seeds(401, 24).length} networks, and joins per connection.\n\n${ages()}`,
  ],
  ['The model itself', sanity()],
] as const;
const figures = sections.map(([title, body]) => `### ${title}\n\n${body}`).join('\n\n');
console.log(figures);
console.log(`\n${((performance.now() - began) / 1000).toFixed(0)} s`);
if (!FAST) {
  const docs = join(import.meta.dirname, '../../docs');
  const page = join(docs, 'path-selection.md');
  const [before, , after] = readFileSync(page, 'utf8').split(/(<!-- figures -->[\s\S]*<!-- end of figures -->)/);
  writeFileSync(page, `${before}<!-- figures -->\n\n${figures}\n\n<!-- end of figures -->${after}`);
  writeFileSync(join(docs, 'path-selection.svg'), picture(bars));
}
