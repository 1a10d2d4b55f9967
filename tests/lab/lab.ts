/**
 * `make lab`: plays scenarios and shows what came of them.
 *
 *     node lab.ts                                        lists the scenarios
 *     node lab.ts NAME|FILE.yaml... [--trials N] [--ways tcp,nat] [--vm]
 *
 * Prints a table for each and writes out/lab/NAME/: result.json, boxes.svg, times.svg. With --vm it all happens on Debian 13's kernel in
 * the VM (vm.sh), which is for slow links where there is no KVM. Exits 1 when one could not be played, 64 for bad usage.
 */
import { spawn } from 'node:child_process';
import { mkdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { parseArgs } from 'node:util';
import { parse } from 'yaml';
import { loadModules } from '../vm/modules.ts';
import { Laboratory, type Result, type Run } from './experiment.ts';
import { inVm, requireRoot } from './netns.ts';
import { drawBoxes, drawTimes } from './plots.ts';
import { SCENARIOS } from './scenarios.ts';
import { conditionsOf, resultTable, titleOf } from './tables.ts';
import { readScenario, type Scenario, ScenarioError } from './topology.ts';

const OUT = join(import.meta.dirname, '../../out/lab');
/** For starting the agent and the programs of one run in the VM, and for its boot. */
const OVERHEAD_S = 60;
const BOOT_S = 120;

export type Wish = { readonly trials: number; readonly ways?: readonly string[]; readonly inVm?: boolean };

/** Where `make lab` leaves what came of a scenario. */
export function resultFile(name: string): string {
  return join(OUT, name, 'result.json');
}

/** Plays scenarios, given by name or as files. False when one failed; which, is on standard error. */
export async function playAll(wanted: readonly string[], wish: Wish): Promise<boolean> {
  const scenarios = new Map(wanted.map((name) => [name, find(name)]));
  for (const { name } of scenarios.values()) rmSync(resultFile(name), { force: true });
  if (wish.inVm && !inVm) return playInVm(scenarios, wish);
  if (inVm) await loadModules();
  await using laboratory = new Laboratory();
  let fine = true;
  for (const scenario of scenarios.values()) fine = (await playOne(laboratory, scenario, wish)) && fine;
  return fine;
}

async function playOne(laboratory: Laboratory, scenario: Scenario, { trials, ways }: Wish): Promise<boolean> {
  const started = performance.now();
  const heard = ({ way, trial, outcomes }: Run): void => {
    const [first] = outcomes;
    const rate = first?.kind === 'transfer' ? `, ${first.mbps.toFixed(2)} Mbit/s` : '';
    const after = Math.round((performance.now() - started) / 1000);
    process.stderr.write(`lab: ${scenario.name}: ${titleOf(way)}, trial ${trial}${rate}, after ${after} s\n`);
  };
  try {
    keep(await laboratory.play(scenario, { trials, heard, ...(ways === undefined ? {} : { ways }) }));
    return true;
  } catch (error) {
    process.stderr.write(`lab: ${scenario.name}: ${error instanceof Error ? error.message : String(error)}\n`);
    return false;
  }
}

function keep(result: Result): void {
  const { name, about } = result.scenario;
  const folder = join(OUT, name);
  mkdirSync(folder, { recursive: true });
  writeFileSync(join(folder, 'result.json'), `${JSON.stringify(result)}\n`);
  if (result.runs.some(({ outcomes }) => outcomes.some(({ kind }) => kind === 'transfer'))) {
    writeFileSync(join(folder, 'boxes.svg'), drawBoxes([result], name));
    writeFileSync(join(folder, 'times.svg'), drawTimes([result], name));
  }
  process.stdout.write(`\n${name}: ${about}\n${conditionsOf(result)}\n\n${resultTable(result)}\n\n`);
}

async function playInVm(scenarios: ReadonlyMap<string, Scenario>, { trials, ways }: Wish): Promise<boolean> {
  const each = [...scenarios.values()].map((one) => {
    const seconds = one.traffic.map(
      (traffic) => traffic.atS + (traffic.kind === 'transfer' ? (traffic.seconds ?? 60) : 60),
    );
    return Object.keys(one.ways).length * trials * (Math.max(...seconds) + OVERHEAD_S);
  });
  const timeout = String(Math.ceil(BOOT_S + each.reduce((sum, seconds) => sum + seconds, 0)));
  const limits = ways === undefined ? [] : ['--ways', ways.join(',')];
  const here = [process.execPath, import.meta.filename, ...scenarios.keys(), '--trials', String(trials), ...limits];
  const vm = spawn(join(import.meta.dirname, 'vm.sh'), ['run', '--timeout', timeout, '--', ...here], {
    stdio: ['ignore', 'inherit', 'inherit'],
  });
  return await new Promise((resolve, reject) => {
    vm.once('error', reject);
    vm.once('close', (code) => resolve(code === 0));
  });
}

function find(name: string): Scenario {
  const known = SCENARIOS.get(name);
  if (known) return known;
  if (/\.(ya?ml|json)$/.test(name)) return readScenario(parse(readFileSync(name, 'utf8')));
  throw new ScenarioError([`no scenario '${name}'; there are ${[...SCENARIOS.keys()].join(', ')}, or files *.yaml`]);
}

async function main(): Promise<number> {
  const { positionals, values } = parseArgs({
    allowPositionals: true,
    options: {
      trials: { type: 'string', default: '1' },
      ways: { type: 'string' },
      vm: { type: 'boolean', default: false },
    },
  });
  if (positionals.length === 0) {
    for (const { name, about, ways } of SCENARIOS.values())
      console.log(`${name.padEnd(16)}${about}  [${Object.keys(ways).join(' ')}]`);
    console.log('\nmake lab SCENARIO=NAME [TRIALS=N] [WAYS=tcp,nat], or SCENARIO=FILE.yaml');
    return 0;
  }
  const trials = Number(values.trials);
  if (!Number.isInteger(trials) || trials < 1)
    throw new ScenarioError([`--trials ${values.trials}: give a number from 1`]);
  if (!requireRoot('laboratories')) return 69;
  const ways = values.ways === undefined ? {} : { ways: values.ways.split(',') };
  return (await playAll(positionals, { trials, inVm: values.vm, ...ways })) ? 0 : 1;
}

if (import.meta.main) {
  try {
    process.exitCode = await main();
  } catch (error) {
    if (!(error instanceof ScenarioError)) throw error;
    for (const problem of error.problems) console.error(problem);
    process.exitCode = 64;
  }
}
