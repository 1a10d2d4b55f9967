/**
 * Runs rings of tests and ends with one line that sums them up: `N passed, N failed` and, if any, `, N skipped`.
 *
 *     node tests/lab/suite.ts lint types unit loop netns images containers
 *
 * Every ring runs, even after one failed. `lint`, `types` and `images` are programs, and count as one test for each.
 * Exit 1 when anything failed, and under CI=true also when anything was skipped: a machine that is meant to run everything
 * must not be green for having run less.
 */
import { spawn } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import type { Report } from './reporter.ts';

const root = join(import.meta.dirname, '../..');
const reports = join(root, 'out/tests');
const PROGRAMS: ReadonlyMap<string, readonly (readonly [string, ...string[]])[]> = new Map([
  ['lint', [['node_modules/.bin/biome', 'check', '.']]],
  ['types', [['node_modules/.bin/tsc', '--noEmit']]],
  ['images', [['images/build.sh'], ['compose/demo/image.sh']]],
]);

/** Runs a program to its end; its exit status, null when a signal or its absence ended it. */
async function ended(
  environment: Readonly<Record<string, string>>,
  command: string,
  ...args: readonly string[]
): Promise<number | null> {
  const env = { ...process.env, ...environment };
  const child = spawn(command, args, { cwd: root, env, stdio: ['ignore', 'inherit', 'inherit'] });
  return await new Promise((resolve) => {
    child.on('error', () => resolve(null));
    child.on('close', resolve);
  });
}

/** Report of one ring. A ring that dies without a report, or files that cannot even be loaded, count as failures. */
async function run(ring: string): Promise<Report> {
  const programs = PROGRAMS.get(ring);
  if (programs !== undefined) {
    const counts = nothing();
    for (const [command, ...args] of programs) {
      const status = await ended({}, join(root, command), ...args);
      if (status === 0) counts.passed += 1;
      else fail(counts, [command, ...args].join(' '), `exit status ${status}`);
    }
    return counts;
  }
  const report = join(reports, `${ring}.json`);
  rmSync(report, { force: true });
  const status = await ended(
    { TEST_RING: ring },
    process.execPath,
    join(root, 'node_modules/vitest/vitest.mjs'),
    'run',
    '--project',
    ring,
    ...['--reporter', 'default', '--reporter', join(import.meta.dirname, 'reporter.ts')],
  );
  const counts = read(report);
  // A worker that crashed shows only in the exit status.
  if (status !== 0 && counts.failed === 0) fail(counts, ring, `vitest ended with ${status}`);
  return counts;
}

function read(report: string): Report {
  try {
    return JSON.parse(readFileSync(report, 'utf8')) as Report;
  } catch {
    const counts = nothing();
    fail(counts, report, 'vitest left no report');
    return counts;
  }
}

const nothing = (): Report => ({ passed: 0, failed: 0, skipped: 0, failures: [], flaky: [] });

function fail(counts: Report, name: string, why: string): void {
  counts.failed += 1;
  counts.failures.push({ name, why });
}

const rings = process.argv.slice(2);
if (rings.length === 0) {
  console.error('usage: node tests/lab/suite.ts RING...   (lint, types, unit, loop, netns, images, containers)');
  process.exit(64);
}
mkdirSync(reports, { recursive: true });
const total = nothing();
for (const ring of rings) {
  const counts = await run(ring);
  total.passed += counts.passed;
  total.failed += counts.failed;
  total.skipped += counts.skipped;
  total.failures.push(...counts.failures);
  total.flaky.push(...counts.flaky);
}
// Again at the end: whoever reads a log from its end must not have to look for it.
for (const { name, why } of total.flaky) console.error(`passed at the second attempt only: ${name}\n${indent(why)}`);
for (const { name, why } of total.failures) console.error(`FAILED: ${name}\n${indent(why)}`);
const strict = process.env['CI'] === 'true';
if (strict && total.skipped > 0) console.error('Under CI=true a skipped test is a failure: see above which, and why.');
console.log(`${total.passed} passed, ${total.failed} failed${total.skipped > 0 ? `, ${total.skipped} skipped` : ''}`);
process.exitCode = total.failed > 0 || total.passed === 0 || (strict && total.skipped > 0) ? 1 : 0;

function indent(text: string): string {
  return text.replaceAll(/^/gm, '    ');
}
