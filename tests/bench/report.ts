/** What `make bench` writes for people. Pure. */
import type { Result } from '../lab/experiment.ts';
import { MAIN } from '../lab/scenarios.ts';
import { conditionsOf, markdown, resultTable } from '../lab/tables.ts';
import { type Figure, isMet } from './figures.ts';
import { THESIS, thesisTable } from './thesis.ts';

export type Bench = {
  readonly command: string;
  readonly figures: readonly Figure[];
  readonly failures: readonly string[];
  readonly experiments: readonly Result[];
};

export function format(value: number): string {
  return Math.abs(value) >= 100 ? value.toFixed(0) : Math.abs(value) >= 10 ? value.toFixed(1) : value.toFixed(3);
}

export function promise(target: Figure['target']): string {
  if (target === null) return '';
  return 'atLeast' in target ? `≥ ${target.atLeast}` : `≤ ${target.atMost}`;
}

export function verdict(figure: Figure): string {
  return figure.target === null ? '' : isMet(figure) ? 'kept' : 'BROKEN';
}

/** The tables as a Markdown document; drawings are named, not contained. */
export function report({ command, figures, failures, experiments }: Bench): string {
  const main = experiments.filter(({ scenario }) => MAIN.includes(scenario.name));
  const extended = experiments.filter(({ scenario }) => !MAIN.includes(scenario.name) && scenario.name in THESIS);
  const others = experiments.filter((result) => !main.includes(result) && !extended.includes(result));
  const parts = ['# Results', `Made by \`${command}\`.`];
  const [first] = experiments;
  if (first) parts.push(`Scenarios: ${conditionsOf(first)}.`);
  if (main.length > 0)
    parts.push(
      "## The thesis's scenarios",
      'Mbit/s at the receiver, seconds 1 to 10: medians of our trials, in brackets means of the thesis.',
      thesisTable(main),
      '![Throughput of each way in each scenario](boxes.svg)',
      '![Throughput of each path over time](times.svg)',
    );
  if (extended.length > 0) parts.push('## Other losses and delays', thesisTable(extended));
  for (const result of others)
    parts.push(`## ${result.scenario.name}`, `${capital(result.scenario.about)}.`, resultTable(result));
  if (others.length > 0) parts.push('![The same over time](others.svg)');
  if (figures.length > 0)
    parts.push(
      '## Promises',
      markdown(
        ['measured', 'value', 'promised', '', 'made from'],
        figures.map((figure) => [
          figure.name,
          `${format(figure.value)} ${figure.unit}`.trim(),
          promise(figure.target),
          verdict(figure),
          figure.detail ?? '',
        ]),
      ),
    );
  for (const failure of failures) parts.push(`FAILED: ${failure}`);
  return `${parts.join('\n\n')}\n`;
}

function capital(text: string): string {
  return text.charAt(0).toUpperCase() + text.slice(1);
}
