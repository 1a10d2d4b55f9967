/** The laboratory's experiments as measurements: plays them and hands back what promises there are about them. */
import { existsSync, readFileSync } from 'node:fs';
import type { Result } from '../lab/experiment.ts';
import { playAll, resultFile } from '../lab/lab.ts';
import { MAIN, SCENARIOS } from '../lab/scenarios.ts';
import type { Figure } from './figures.ts';
import { thesisFigures } from './thesis.ts';

/** The extended series of the thesis, and what it never measured. */
const EXTENDED = [...SCENARIOS.keys()].filter((name) => /(lossy|delayed)\d/.test(name));
const OTHERS = [...SCENARIOS.keys()].filter((name) => !MAIN.includes(name) && !EXTENDED.includes(name));

/** One trial of three ways through the six scenarios: four minutes. */
export function measureShortExperiments(): Promise<Figure[]> {
  return measured([{ names: MAIN, trials: 1, ways: ['tcp', 'nat', 'vpn'] }]);
}

/** Everything, most of it once: half an hour. */
export function measureExperiments(): Promise<Figure[]> {
  return measured([
    { names: MAIN, trials: 3 },
    { names: EXTENDED, trials: 1, ways: ['tcp', 'mptcp', 'nat'] },
    { names: OTHERS, trials: 1 },
  ]);
}

async function measured(
  parts: readonly { readonly names: readonly string[]; readonly trials: number; readonly ways?: readonly string[] }[],
): Promise<Figure[]> {
  const failed: string[] = [];
  for (const { names, ...wish } of parts) {
    if (!(await playAll(names, wish))) failed.push(...names.filter((name) => !existsSync(resultFile(name))));
  }
  if (failed.length > 0) throw new Error(`could not be played: ${failed.join(', ')}; see above`);
  return thesisFigures(experiments());
}

/** What out/lab has of the scenarios that we know, in their order. */
export function experiments(): Result[] {
  return [...SCENARIOS.keys()].flatMap((name) => {
    const file = resultFile(name);
    return existsSync(file) ? [JSON.parse(readFileSync(file, 'utf8'))] : [];
  });
}
