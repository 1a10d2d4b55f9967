/** What experiments yielded, in few numbers and as Markdown. Pure. */
import { median, quantile } from '../bench/figures.ts';
import type { FlowsOutcome, MessagesOutcome, Outcome, Result, Run, TransferOutcome } from './experiment.ts';

/** The ways that scenarios.ts knows, for people. */
const TITLES: Readonly<Record<string, string>> = {
  tcp: 'TCP direct',
  mptcp: 'MPTCP direct',
  nat: 'MPTCP + NAT',
  vpn: 'MPTCP + VPN',
  tcp_nat: 'TCP via NAT',
};

export function titleOf(way: string): string {
  return TITLES[way] ?? way;
}

/** One way's transfers in a scenario. */
export type Summary = {
  readonly way: string;
  readonly trials: number;
  readonly mbps: Spread;
  readonly longestStallMs: Spread;
  /** Of all bytes, percent, by path. */
  readonly shares: readonly { readonly name: string; readonly percent: number }[];
};

export type Spread = { readonly least: number; readonly median: number; readonly most: number };

export function spreadOf(values: readonly number[]): Spread {
  return { least: quantile(values, 0), median: median(values), most: quantile(values, 1) };
}

export function waysOf(result: Result): string[] {
  return [...new Set(result.runs.map(({ way }) => way))];
}

function outcomesOf<K extends Outcome['kind']>(
  runs: readonly Run[],
  way: string,
  kind: K,
): Extract<Outcome, { kind: K }>[] {
  const isWanted = (outcome: Outcome): outcome is Extract<Outcome, { kind: K }> => outcome.kind === kind;
  return runs.filter((run) => run.way === way).flatMap(({ outcomes }) => outcomes.filter(isWanted));
}

export function transfersOf(result: Result, way: string): TransferOutcome[] {
  return outcomesOf(result.runs, way, 'transfer');
}

/** For each way with a transfer. */
export function summaries(result: Result): Summary[] {
  return waysOf(result).flatMap((way) => {
    const transfers = transfersOf(result, way);
    if (transfers.length === 0) return [];
    const total = transfers.reduce((sum, { paths }) => sum + paths.reduce((all, { bytes }) => all + bytes, 0), 0);
    const names = [...new Set(transfers.flatMap(({ paths }) => paths.map(({ name }) => name)))].toSorted();
    return [
      {
        way,
        trials: transfers.length,
        mbps: spreadOf(transfers.map(({ mbps }) => mbps)),
        longestStallMs: spreadOf(transfers.map(({ longestStallMs }) => longestStallMs)),
        shares: names.map((name) => {
          const bytes = transfers.flatMap(({ paths }) => paths.filter((path) => path.name === name));
          return { name, percent: (bytes.reduce((sum, path) => sum + path.bytes, 0) / total) * 100 };
        }),
      },
    ];
  });
}

export function markdown(header: readonly string[], rows: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]): string => `| ${cells.join(' | ')} |`;
  return [line(header), line(header.map((_, index) => (index === 0 ? '---' : '---:'))), ...rows.map(line)].join('\n');
}

const spelled = ({ least, median: middle, most }: Spread, digits: number): string =>
  least === most
    ? middle.toFixed(digits)
    : `${middle.toFixed(digits)} (${least.toFixed(digits)} to ${most.toFixed(digits)})`;

/** All that one scenario yielded. */
export function resultTable(result: Result): string {
  const parts: string[] = [];
  const transfers = summaries(result);
  if (transfers.length > 0)
    parts.push(
      markdown(
        ['way', 'trials', 'Mbit/s', 'longest stall, ms', 'carried by'],
        transfers.map(({ way, trials, mbps, longestStallMs, shares }) => [
          titleOf(way),
          String(trials),
          spelled(mbps, 2),
          spelled(longestStallMs, 0),
          shares.map(({ name, percent }) => `${name} ${percent.toFixed(0)} %`).join(', '),
        ]),
      ),
    );
  const flows = waysOf(result).flatMap((way) => {
    const found: FlowsOutcome[] = outcomesOf(result.runs, way, 'flows');
    return found.length > 0 ? [{ way, times: found.flatMap(({ completions }) => completions) }] : [];
  });
  const messages = waysOf(result).flatMap((way) => {
    const found: MessagesOutcome[] = outcomesOf(result.runs, way, 'messages');
    return found.length > 0 ? [{ way, times: found.flatMap(({ latencies }) => latencies) }] : [];
  });
  for (const [what, rows] of [
    ['completion, ms', flows],
    ['round trip of messages, ms', messages],
  ] as const)
    if (rows.length > 0)
      parts.push(
        markdown(
          [what, 'n', 'median', '95 %', 'longest'],
          rows.map(({ way, times }) => [
            titleOf(way),
            String(times.length),
            ...[0.5, 0.95, 1].map((share) => quantile(times, share).toFixed(0)),
          ]),
        ),
      );
  return parts.join('\n\n');
}

/** Where and by what it was measured. */
export function conditionsOf({ machine, scenario }: Result): string {
  const { kernel, emulated, cpus, model, load, versions } = machine;
  const where = `Linux ${kernel}, ${cpus} × ${model}${emulated ? ' (emulated)' : ''}, load ${load.toFixed(1)} at the start`;
  const programs = Object.entries(versions).map(([name, version]) => `${name} ${version}`);
  return `${where}; congestion control ${scenario.congestion}; ${programs.join(', ')}`;
}
