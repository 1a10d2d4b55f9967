/**
 * `make bench`: measures what the design promises, prints a table, writes out/bench/result.json. Needs root and dist/detour.js.
 * Names of measurements as arguments select some of them; those that take many minutes run only by name. Exits 1 when a
 * promise is not kept.
 */
import { mkdirSync, writeFileSync } from 'node:fs';
import { cpus, loadavg, release } from 'node:os';
import { join } from 'node:path';
import { requireRoot } from '../lab/netns.ts';
import { measureCrashes } from './crashes.ts';
import { measureCrowd } from './crowd.ts';
import { type Figure, isMet, note } from './figures.ts';
import { measureGain } from './gain.ts';
import { measureLeases } from './leases.ts';
import { measureOutages } from './outages.ts';
import { measureReaction } from './reaction.ts';
import { measureRelay } from './relay.ts';
import { measureRescue } from './rescue.ts';
import { measureTunnels } from './tunnels.ts';
import { measureWorkloads } from './workloads.ts';

const MEASUREMENTS: Readonly<Record<string, () => Promise<Figure[]>>> = {
  relay: measureRelay,
  gain: measureGain,
  reaction: measureReaction,
  crowd: measureCrowd,
  leases: measureLeases,
  rescue: measureRescue,
  tunnels: measureTunnels,
  workloads: measureWorkloads,
};
/** Run by name only. */
const LONG: Readonly<Record<string, () => Promise<Figure[]>>> = {
  crashes: measureCrashes,
  outages: measureOutages,
};

function format(value: number): string {
  return Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(3);
}

function promise(target: Figure['target']): string {
  if (target === null) return '';
  return 'atLeast' in target ? `>= ${target.atLeast}` : `<= ${target.atMost}`;
}

function table(figures: readonly Figure[]): string {
  const rows = [
    ['measured', 'value', 'promised', '', ''],
    ...figures.map((figure) => [
      figure.name,
      `${format(figure.value)} ${figure.unit}`.trim(),
      promise(figure.target),
      figure.target === null ? '' : isMet(figure) ? 'kept' : 'BROKEN',
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
const unknown = wanted.filter((name) => !(name in MEASUREMENTS || name in LONG));
if (unknown.length > 0) {
  note(`unknown measurement ${unknown.join(', ')}; there are ${Object.keys({ ...MEASUREMENTS, ...LONG }).join(', ')}`);
  process.exit(64);
}
const loadBefore = loadavg()[0] ?? 0;
if (loadBefore > 0.5)
  note(`the machine is busy (load ${loadBefore.toFixed(1)}): the figures will be worse than it can do`);
const figures: Figure[] = [];
const failures: string[] = [];
for (const [name, measure] of Object.entries({ ...MEASUREMENTS, ...LONG })) {
  if (wanted.length > 0 ? !wanted.includes(name) : name in LONG) continue;
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
process.exitCode = failures.length > 0 || figures.some((figure) => !isMet(figure)) ? 1 : 0;
