/**
 * The thesis's numbers beside ours: S. Brennan, Exploring Alternative Routes Using Multipath TCP, Case Western Reserve University, 2017.
 */
import type { Result } from '../lab/experiment.ts';
import { markdown, type Spread, spreadOf, summaries, titleOf, transfersOf } from '../lab/tables.ts';
import type { Figure } from './figures.ts';

type Rates = Readonly<Record<string, number>>;

/**
 * Mbit/s, means of 60 trials, on Linux 4.1 with LIA for Multipath TCP and 4.2 with CUBIC for TCP: its data of February 2018, in which OpenVPN
 * neither encrypts nor signs. Of the extended ones (20 trials) TCP's are of 2017, because those of 2018 ran on the wrong kernel; at 0.5 % its
 * network lost nothing, so those are left out.
 */
export const THESIS: Readonly<Record<string, Rates>> = {
  easy: { tcp: 9.56, mptcp: 9.42, nat: 18.83, vpn: 18.56, tcp_nat: 9.56 },
  lossy: { tcp: 6.27, mptcp: 4.26, nat: 13.73, vpn: 13.38, tcp_nat: 9.56 },
  delayed: { tcp: 9.23, mptcp: 9.11, nat: 17.7, vpn: 17.5, tcp_nat: 9.56 },
  sym: { tcp: 9.56, mptcp: 9.43, nat: 9.42, vpn: 9.29, tcp_nat: 9.36 },
  sym_lossy: { tcp: 6.22, mptcp: 4.27, nat: 9.39, vpn: 9.12, tcp_nat: 9.36 },
  sym_delayed: { tcp: 9.23, mptcp: 9.1, nat: 9.39, vpn: 9.2, tcp_nat: 9.36 },
  lossy2: { tcp: 4.17, mptcp: 2.83, nat: 12.36 },
  lossy5: { tcp: 2.13, mptcp: 1.51, nat: 10.99 },
  delayed20: { tcp: 9.55, mptcp: 9.42, nat: 18.84 },
  delayed50: { tcp: 9.55, mptcp: 9.43, nat: 18.64 },
  sym_lossy2: { tcp: 3.92, mptcp: 2.78, nat: 9.35 },
  sym_lossy5: { tcp: 2.1, mptcp: 1.5, nat: 9.22 },
  sym_delayed20: { tcp: 9.55, mptcp: 9.42, nat: 9.43 },
  sym_delayed50: { tcp: 9.55, mptcp: 9.43, nat: 9.42 },
};

/** What a detour by NAT must bring, as a multiple of TCP alone. */
const GOALS: Rates = { easy: 1.95, lossy: 2.2, delayed: 1.9, sym: 0.97, sym_lossy: 1.5, sym_delayed: 1.0 };
/** A tunnel costs its headers: what it brings must be within this of what NAT brings. */
const VPN_GOAL = 0.95;

const COLUMNS = ['tcp', 'mptcp', 'nat', 'vpn', 'tcp_nat'];

/** What `way` carried over what `other` carried in the same trial, over all trials. Null when one of them is missing. */
export function ratioOf(result: Result, way: string, other: string): Spread | null {
  const [mine, theirs] = [transfersOf(result, way), transfersOf(result, other)];
  const ratios = mine.flatMap(({ mbps }, trial) => {
    const beside = theirs[trial]?.mbps;
    return beside === undefined ? [] : [mbps / beside];
  });
  return ratios.length === 0 ? null : spreadOf(ratios);
}

/** Ours, and the thesis's in brackets, in Mbit/s: medians of our trials, means of the thesis's. */
export function thesisTable(results: readonly Result[]): string {
  const rows = results.map((result) => {
    const theirs = THESIS[result.scenario.name] ?? {};
    const ours = new Map(summaries(result).map(({ way, mbps }) => [way, mbps]));
    const cell = (way: string): string => {
      const [mine, other] = [ours.get(way), theirs[way]];
      return [mine?.median.toFixed(2) ?? '-', other === undefined ? '' : `(${other.toFixed(2)})`].join(' ').trim();
    };
    const gain = ratioOf(result, 'nat', 'tcp');
    const before = theirs['nat'] !== undefined && theirs['tcp'] !== undefined ? theirs['nat'] / theirs['tcp'] : null;
    const spread = gain && gain.least !== gain.most ? `, ${gain.least.toFixed(2)} to ${gain.most.toFixed(2)}` : '';
    const goal = GOALS[result.scenario.name];
    return [
      result.scenario.name,
      ...COLUMNS.map(cell),
      `**${gain?.median.toFixed(2) ?? '-'}**${spread}`,
      before?.toFixed(2) ?? '-',
      goal === undefined ? '' : `≥ ${goal}`,
      ratioOf(result, 'vpn', 'nat')?.median.toFixed(2) ?? '-',
    ];
  });
  const header = ['scenario', ...COLUMNS.map(titleOf), 'NAT / TCP', 'thesis', 'goal', 'VPN / NAT'];
  return markdown(header, rows);
}

/** The same as promises. */
export function thesisFigures(results: readonly Result[]): Figure[] {
  return results.flatMap((result) => {
    const { name } = result.scenario;
    const [gain, vpn] = [ratioOf(result, 'nat', 'tcp'), ratioOf(result, 'vpn', 'nat')];
    const goal = GOALS[name];
    const figures: Figure[] = [];
    if (gain)
      figures.push({
        name: `${name}: MPTCP with a NAT detour / TCP direct`,
        value: gain.median,
        unit: '',
        target: goal === undefined ? null : { atLeast: goal },
      });
    if (vpn)
      figures.push({
        name: `${name}: VPN detour / NAT detour`,
        value: vpn.median,
        unit: '',
        target: name in GOALS ? { atLeast: VPN_GOAL } : null,
      });
    return figures;
  });
}
