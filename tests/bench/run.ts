/**
 * `make bench`: measures what the design promises, prints a table, writes out/bench: result.json, README.md and drawings. Needs root and
 * dist/detour.js. Without arguments what takes ten minutes together, with --full everything, else the measurements that are named;
 * `report` measures nothing and makes the tables and drawings of experiments again, from what out/lab has. Exits 1 when a promise is not kept.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { cpus, loadavg, release } from 'node:os';
import { join } from 'node:path';
import { requireRoot } from '../lab/netns.ts';
import { drawBoxes, drawTimes } from '../lab/plots.ts';
import { MAIN } from '../lab/scenarios.ts';
import { measureCrashes } from './crashes.ts';
import { measureCrowd } from './crowd.ts';
import { experiments, measureExperiments, measureShortExperiments } from './experiments.ts';
import { type Figure, isMet, note } from './figures.ts';
import { measureGain } from './gain.ts';
import { measureJoins } from './joins.ts';
import { measureLeases } from './leases.ts';
import { measureOutages } from './outages.ts';
import { measureReaction } from './reaction.ts';
import { measureRelay } from './relay.ts';
import { format, promise, report, verdict } from './report.ts';
import { measureRescue } from './rescue.ts';
import { THESIS } from './thesis.ts';
import { measureTunnels } from './tunnels.ts';
import { measureWays } from './ways.ts';
import { measureWorkloads } from './workloads.ts';

type Measurements = Readonly<Record<string, () => Promise<Figure[]>>>;

/** Together less than ten minutes. */
const SHORT: Measurements = {
  scenarios: measureShortExperiments,
  tunnels: measureTunnels,
  rescue: measureRescue,
  ways: measureWays,
};
const FULL: Measurements = {
  experiments: measureExperiments,
  relay: measureRelay,
  gain: measureGain,
  reaction: measureReaction,
  crowd: measureCrowd,
  leases: measureLeases,
  rescue: measureRescue,
  tunnels: measureTunnels,
  ways: measureWays,
  joins: measureJoins,
  workloads: measureWorkloads,
  crashes: measureCrashes,
  outages: measureOutages,
};
const REPORT = 'report';

function table(figures: readonly Figure[]): string {
  const rows = [
    ['measured', 'value', 'promised', '', ''],
    ...figures.map((figure) => [
      figure.name,
      `${format(figure.value)} ${figure.unit}`.trim(),
      promise(figure.target),
      verdict(figure),
      figure.detail ?? '',
    ]),
  ];
  const widths = [0, 1, 2, 3, 4].map((column) => Math.max(...rows.map((row) => row[column]?.length ?? 0)));
  return rows
    .map((row) =>
      row
        .map((cell, column) => cell.padEnd(widths[column] ?? 0))
        .join('  ')
        .trimEnd(),
    )
    .join('\n');
}

if (!requireRoot('the measurements')) process.exit(69);
const wanted = process.argv.slice(2);
const all: Measurements = { ...SHORT, ...FULL };
const unknown = wanted.filter((name) => !(name in all || name === '--full' || name === REPORT));
if (unknown.length > 0) {
  note(`unknown measurement ${unknown.join(', ')}; there are ${[...Object.keys(all), REPORT].join(', ')}, and --full`);
  process.exit(64);
}
const chosen = wanted.length === 0 ? Object.keys(SHORT) : wanted.includes('--full') ? Object.keys(FULL) : wanted;
const loadBefore = loadavg()[0] ?? 0;
if (loadBefore > 0.5)
  note(`the machine is busy (load ${loadBefore.toFixed(1)}): the figures will be worse than it can do`);
const figures: Figure[] = [];
const failures: string[] = [];
for (const [name, measure] of Object.entries(all)) {
  if (!chosen.includes(name)) continue;
  note(`${name} ...`);
  try {
    figures.push(...(await measure()));
  } catch (error) {
    failures.push(`${name}: ${error instanceof Error ? error.message : String(error)}`);
  }
}
console.log(table(figures));
for (const failure of failures) console.log(`FAILED  ${failure}`);
const out = join(import.meta.dirname, '../../out/bench');
mkdirSync(out, { recursive: true });
const machine = { kernel: release(), cpus: cpus().length, model: cpus()[0]?.model ?? 'unknown', loadBefore };
writeFileSync(join(out, 'result.json'), `${JSON.stringify({ machine, figures, failures }, null, 2)}\n`);
const played = ['scenarios', 'experiments', REPORT].some((name) => chosen.includes(name)) ? experiments() : [];
if (played.length > 0) {
  writeFileSync(join(out, 'experiments.json'), `${JSON.stringify(played)}\n`);
  const [main, others] = [true, false].map((wish) =>
    played.filter(({ scenario }) => MAIN.includes(scenario.name) === wish),
  );
  const kinds = { boxes: "The thesis's scenarios", times: "The thesis's scenarios, each path over time" };
  writeFileSync(join(out, 'boxes.svg'), drawBoxes(main ?? [], kinds.boxes, THESIS));
  writeFileSync(join(out, 'times.svg'), drawTimes(main ?? [], kinds.times));
  writeFileSync(join(out, 'others.svg'), drawTimes(others ?? [], 'Other scenarios, each path over time'));
}
const command = ['node tests/bench/run.ts', ...wanted].join(' ');
writeFileSync(join(out, 'README.md'), report({ command, figures, failures, experiments: played }));
process.exitCode = failures.length > 0 || figures.some((figure) => !isMet(figure)) ? 1 : 0;
