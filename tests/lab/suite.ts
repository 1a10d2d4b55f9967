/**
 * Runs rings of tests and ends with one line that sums them up: `N passed, N failed` and, if any, `, N skipped`.
 *
 *     node tests/lab/suite.ts lint types unit loop netns vm images containers k8s
 *
 * Every ring runs, even after one failed; vm beside netns, which waits for most of its time, with its output when it is done. In rings
 * that share the kernel and the clock with everything else on the machine, files with a failure run once more when the rest is
 * done; what only passed then is named at the end. `lint`, `types` and `images` are programs, and count as one test for each.
 * Exit 1 when anything failed, and under CI=true also when anything was skipped: a machine that is meant to run everything
 * must not be green for having run less.
 */
import { spawn } from 'node:child_process';
import { closeSync, mkdirSync, openSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { emptyReport, type FileReport, type Report } from './reporter.ts';

const root = join(import.meta.dirname, '../..');
const reports = join(root, 'out/tests');
const PROGRAMS: ReadonlyMap<string, readonly (readonly [string, ...string[]])[]> = new Map([
  ['lint', [['node_modules/.bin/biome', 'check', '.']]],
  ['types', [['node_modules/.bin/tsc', '--noEmit']]],
  ['images', [['images/build.sh'], ['compose/demo/image.sh']]],
]);

/** What a ring's tests run inside of. It ends with LACKING, and says why, where the machine cannot. */
const INSIDE: ReadonlyMap<string, readonly [string, ...string[]]> = new Map([
  // Nice to those beside it, whose clock is the machine's.
  ['vm', ['nice', '-n', '19', join(import.meta.dirname, 'vm.sh'), 'run', '--timeout', '3000', '--']],
]);
/** sysexits.h: EX_UNAVAILABLE */
const LACKING = 69;

/** Rings that share the machine with another one. */
const BESIDE: ReadonlyMap<string, string> = new Map([['netns', 'vm']]);

const RERUN: ReadonlySet<string> = new Set(['netns', 'containers', 'vm', 'k8s']);

/** Runs a program to its end; its exit status, null when a signal or its absence ended it. A `log` keeps its output until then. */
async function ended(
  environment: Readonly<Record<string, string>>,
  log: string | null,
  command: string,
  ...args: readonly string[]
): Promise<number | null> {
  const env = { ...process.env, ...environment };
  const output = log === null ? 'inherit' : openSync(log, 'w');
  const child = spawn(command, args, { cwd: root, env, stdio: ['ignore', output, output] });
  const status = await new Promise<number | null>((resolve) => {
    child.on('error', () => resolve(null));
    child.on('close', resolve);
  });
  if (log !== null && output !== 'inherit') {
    closeSync(output);
    process.stdout.write(readFileSync(log));
  }
  return status;
}

/** Report of one ring; `quiet` until it is done. A ring that dies without a report, or files that cannot even be loaded, count as failures. */
async function run(ring: string, quiet = false): Promise<Report> {
  const programs = PROGRAMS.get(ring);
  if (programs !== undefined) {
    const counts = emptyReport();
    for (const [command, ...args] of programs) {
      const status = await ended({}, null, join(root, command), ...args);
      if (status === 0) counts.passed += 1;
      else fail(counts, [command, ...args].join(' '), `exit status ${status}`);
    }
    return { [ring]: counts };
  }
  const report = await runFiles(ring, quiet, []);
  const failed = Object.keys(report).filter((file) => file !== '' && (report[file]?.failed ?? 0) > 0);
  if (failed.length === 0 || !RERUN.has(ring)) return report;
  console.error(`\nOnce more, now that the rest is done: ${failed.join(', ')}`);
  const again = await runFiles(ring, quiet, failed);
  for (const file of failed) {
    const counts = again[file] ?? report[file] ?? emptyReport();
    // What failed both times is told below; what did not has to be looked into, too.
    const known = new Set(counts.failures.map(({ name }) => name));
    counts.flaky.push(...(report[file]?.failures ?? []).filter(({ name }) => !known.has(name)));
    again[file] = counts;
  }
  return { ...report, ...again };
}

/** Runs a ring, or some of its files. */
async function runFiles(ring: string, quiet: boolean, files: readonly string[]): Promise<Report> {
  const path = join(reports, `${ring}.json`);
  rmSync(path, { force: true });
  const vitest = join(root, 'node_modules/vitest/vitest.mjs');
  const reporters = ['--reporter', 'default', '--reporter', join(import.meta.dirname, 'reporter.ts')];
  const [command, ...before] = [...(INSIDE.get(ring) ?? []), process.execPath];
  const status = await ended(
    { TEST_RING: ring },
    quiet ? join(reports, `${ring}.log`) : null,
    command,
    ...before,
    vitest,
    'run',
    '--project',
    ring,
    ...reporters,
    ...files,
  );
  if (INSIDE.has(ring) && status === LACKING) return { '': { ...emptyReport(), skipped: 1 } };
  let report: Report;
  try {
    report = JSON.parse(readFileSync(path, 'utf8')) as Report;
  } catch {
    report = {};
    failAnywhere(report, ring, `vitest ended with ${status} and left no report`);
  }
  // A worker that crashed shows only in the exit status.
  const failed = Object.values(report).some((counts) => counts.failed > 0);
  if (status !== 0 && !failed) failAnywhere(report, ring, `vitest ended with ${status}`);
  return report;
}

function failAnywhere(report: Report, name: string, why: string): void {
  const counts = report[''] ?? emptyReport();
  fail(counts, name, why);
  report[''] = counts;
}

function fail(counts: FileReport, name: string, why: string): void {
  counts.failed += 1;
  counts.failures.push({ name, why });
}

const rings = process.argv.slice(2);
if (rings.length === 0) {
  console.error(
    'usage: node tests/lab/suite.ts RING...   (lint, types, unit, loop, netns, vm, images, containers, k8s)',
  );
  process.exit(64);
}
mkdirSync(reports, { recursive: true });
const total = emptyReport();
const begun = new Map<string, Promise<Report>>();
for (const ring of rings) {
  const beside = BESIDE.get(ring);
  if (beside !== undefined && rings.includes(beside)) begun.set(beside, run(beside, true));
  for (const counts of Object.values(await (begun.get(ring) ?? run(ring)))) {
    total.passed += counts.passed;
    total.failed += counts.failed;
    total.skipped += counts.skipped;
    total.failures.push(...counts.failures);
    total.flaky.push(...counts.flaky);
  }
}
// Again at the end: whoever reads a log from its end must not have to look for it.
for (const { name, why } of total.flaky) console.error(`passed at a later attempt only: ${name}\n${indent(why)}`);
for (const { name, why } of total.failures) console.error(`FAILED: ${name}\n${indent(why)}`);
const strict = process.env['CI'] === 'true';
if (strict && total.skipped > 0) console.error('Under CI=true a skipped test is a failure: see above which, and why.');
console.log(`${total.passed} passed, ${total.failed} failed${total.skipped > 0 ? `, ${total.skipped} skipped` : ''}`);
process.exitCode = total.failed > 0 || total.passed === 0 || (strict && total.skipped > 0) ? 1 : 0;

function indent(text: string): string {
  return text.replaceAll(/^/gm, '    ');
}
