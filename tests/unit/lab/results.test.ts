import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { report } from '../../bench/report.ts';
import { ratioOf, THESIS, thesisFigures, thesisTable } from '../../bench/thesis.ts';
import type { Outcome, Result, Run } from '../../lab/experiment.ts';
import { drawBoxes, drawTimes } from '../../lab/plots.ts';
import { SCENARIOS } from '../../lab/scenarios.ts';
import { resultTable, summaries } from '../../lab/tables.ts';

const MACHINE: Result['machine'] = {
  kernel: '6.12.0',
  emulated: true,
  cpus: 2,
  model: 'QEMU TCG CPU',
  load: 0.25,
  versions: { node: '24.0.0', nft: '1.1.3' },
};

/** Three seconds at that rate, of which the detour carried a part (0 to 1). */
function transfer(mbps: number, detour = 0, longestStallMs = 20): Outcome {
  const perSlot = (mbps * 1e6 * 0.05) / 8;
  const bytes = perSlot * 60;
  const paths = [
    { name: 'direct', bytes: bytes * (1 - detour) },
    ...(detour > 0 ? [{ name: 'detour', bytes: bytes * detour }] : []),
  ];
  return {
    kind: 'transfer',
    bytes,
    ms: 3000,
    mbps,
    longestStallMs,
    stallAtMs: 0,
    mptcp: detour > 0,
    congestion: 'cubic',
    paths,
    slots: Array.from({ length: 60 }, () => perSlot),
    series: [1000, 2000, 2990, 3000].map((ms) => [ms, ...paths.map((path) => (path.bytes * ms) / 3000)]),
  };
}

function result(name: string, runs: readonly (readonly [way: string, trial: number, outcome: Outcome])[]): Result {
  const scenario = SCENARIOS.get(name);
  if (!scenario) throw new Error(name);
  const played = runs.map(([way, trial, outcome]): Run => ({ way, trial, outcomes: [outcome], events: [] }));
  return { scenario, machine: MACHINE, runs: played };
}

const EASY = result('easy', [
  ['tcp', 1, transfer(10)],
  ['nat', 1, transfer(18, 0.5, 80)],
  ['vpn', 1, transfer(9, 0.4)],
  ['tcp', 2, transfer(8)],
  ['nat', 2, transfer(16, 0.5, 40)],
  ['vpn', 2, transfer(16, 0.4)],
  ['tcp', 3, transfer(9)],
  ['nat', 3, transfer(19.8, 0.5, 60)],
  ['vpn', 3, transfer(14.85, 0.4)],
]);

describe('what experiments yielded', () => {
  it('is summed up by way: median and extremes of rates and stalls, and who carried it', () => {
    const [, nat, vpn] = summaries(EASY);
    expect(nat).toMatchObject({
      way: 'nat',
      trials: 3,
      mbps: { least: 16, median: 18, most: 19.8 },
      longestStallMs: { least: 40, median: 60, most: 80 },
    });
    expect(nat?.shares.map(({ name, percent }) => [name, Math.round(percent)])).toEqual([
      ['detour', 50],
      ['direct', 50],
    ]);
    expect(vpn?.shares.map(({ percent }) => Math.round(percent))).toEqual([40, 60]);
  });

  it('is compared within a trial, not between medians', () => {
    expect(ratioOf(EASY, 'nat', 'tcp')).toEqual({ least: 1.8, median: 2, most: 2.2 });
    expect(ratioOf(EASY, 'vpn', 'nat')).toEqual({ least: 0.5, median: 0.75, most: 1 });
    expect(ratioOf(EASY, 'tcp_nat', 'tcp')).toBeNull();
  });

  it("stands beside the thesis's", () => {
    const [, , row = ''] = thesisTable([EASY]).split('\n');
    expect(row.split('|').map((cell) => cell.trim())).toEqual([
      '',
      'easy',
      '9.00 (9.56)',
      '- (9.42)',
      '18.00 (18.83)',
      '14.85 (18.56)',
      '- (9.56)',
      '**2.00**, 1.80 to 2.20',
      '1.97',
      '≥ 1.95',
      '0.75',
      '',
    ]);
  });

  it('is held against what was promised', () => {
    expect(thesisFigures([EASY]).map(({ name, value, target }) => [name, value, target])).toEqual([
      ['easy: MPTCP with a NAT detour / TCP direct', 2, { atLeast: 1.95 }],
      ['easy: VPN detour / NAT detour', 0.75, { atLeast: 0.95 }],
    ]);
    const beyond = result('lossy2', [
      ['tcp', 1, transfer(4)],
      ['nat', 1, transfer(12, 0.6)],
    ]);
    expect(thesisFigures([beyond]).map(({ target }) => target)).toEqual([null]);
  });

  it('is a table of its own for flows and messages', () => {
    const flows = result('short_1kb', [
      ['tcp', 1, { kind: 'flows', bytes: 1000, completions: [30, 50, 40] }],
      ['nat', 1, { kind: 'flows', bytes: 1000, completions: [31, 33, 90] }],
    ]);
    expect(resultTable(flows)).toBe(
      [
        '| completion, ms | n | median | 95 % | longest |',
        '| --- | ---: | ---: | ---: | ---: |',
        '| TCP direct | 3 | 40 | 50 | 50 |',
        '| MPTCP + NAT | 3 | 33 | 90 | 90 |',
      ].join('\n'),
    );
  });

  it('is a report that names where it was measured and what is behind its goal', () => {
    const text = report({
      command: 'make bench',
      figures: [{ name: 'easy', value: 1.2, unit: '', target: { atLeast: 1.95 } }],
      failures: ['relay: no luck'],
      experiments: [EASY],
    });
    expect(text).toContain(
      'Linux 6.12.0, 2 × QEMU TCG CPU (emulated), load 0.3 at the start; congestion control cubic',
    );
    expect(text).toContain('| easy | 1.200 | ≥ 1.95 | BROKEN |  |');
    expect(text).toContain('FAILED: relay: no luck');
    expect(text).toContain(thesisTable([EASY]));
  });
});

/** One run of `make lab SCENARIO=small`: two ways of 5 Mbit/s, one of which swallows everything from 4 s on. */
const RECORDED: Result = JSON.parse(readFileSync(join(import.meta.dirname, '../../vectors/lab-small.json'), 'utf8'));

describe('a recorded run', () => {
  it('is of the scenario as it is described today', () => {
    expect(RECORDED.scenario).toEqual(SCENARIOS.get('small'));
  });

  it('has one row in the table', () => {
    expect(resultTable(RECORDED).split('\n')[2]).toBe('| MPTCP + NAT | 1 | 6.50 | 508 | detour 66 %, direct 34 % |');
  });

  it('shows in the drawing that the direct path ended where it was lost, and that the other went on', () => {
    const svg = drawTimes([RECORDED], 'small');
    const points = (of: string | undefined): [x: number, y: number][] =>
      (of ?? '').split(' ').map((point) => {
        const [x = 0, y = 0] = point.split(',').map(Number);
        return [x, y];
      });
    const [direct, detour] = [...svg.matchAll(/<polygon points="([^"]+)"/g)].map(([, of]) => points(of));
    const lost = Number(/<line x1="([\d.]+)"[^>]*stroke="#d00000"/.exec(svg)?.[1]);
    expect(lost).toBeGreaterThan(0);
    const above = (layer: [number, number][] | undefined): [number, number][] =>
      layer?.slice(0, layer.length / 2) ?? [];
    const base = Math.max(...(direct ?? []).map(([, y]) => y));
    // A field is 190 wide for 8 s: from half a second after the loss on.
    const late = ([x]: [number, number]): boolean => x > lost + 12;
    expect(above(direct).filter(late).length).toBeGreaterThan(10);
    for (const [, y] of above(direct).filter(late)) expect(y).toBeCloseTo(base, 0);
    const heights = above(detour)
      .filter(late)
      .map(([, y]) => base - y);
    expect(Math.max(...heights)).toBeGreaterThan(20);
  });
});

/** The numbers of an attribute of all elements of a kind, in the order of the drawing. */
function numbers(svg: string, element: RegExp): number[] {
  return [...svg.matchAll(element)].map(([, value]) => Number(value));
}

describe('drawings', () => {
  it('have a box for each way of a scenario, higher for more', () => {
    const svg = drawBoxes([EASY], 'Easy & short', THESIS);
    expect(svg).toContain('Easy &amp; short');
    for (const title of ['TCP direct', 'MPTCP + NAT', 'MPTCP + VPN', 'thesis, mean'])
      expect(svg).toContain(`>${title}<`);
    // Upper edges of the boxes: legends and ground are drawn with whole numbers.
    const [tcp = 0, nat = 0, vpn = 0, ...more] = numbers(svg, /<rect x="[\d.]+" y="(\d+\.\d)" width="12"/g);
    expect(more).toEqual([]);
    expect(nat).toBeLessThan(vpn);
    expect(vpn).toBeLessThan(tcp);
    // The legend's, and one for each way that the thesis and we have.
    expect(svg.match(/stroke="#d00000"/g)).toHaveLength(4);
  });

  it('show the throughput of each path over time, one upon the other, and events', () => {
    const played = result('failover', [['nat', 1, transfer(8, 0.25)]]);
    const svg = drawTimes(
      [{ ...played, runs: played.runs.map((run) => ({ ...run, events: [{ atS: 1.5, what: 'lost' }] })) }],
      'T',
    );
    const layers = [...svg.matchAll(/<polygon points="([^"]+)"/g)].map(([, points = '']) =>
      points.split(' ').map((point) => Number(point.split(',')[1])),
    );
    expect(layers).toHaveLength(2);
    const [direct = [], detour = []] = layers;
    // 2 Mbit/s upon 6; a field of 96 stands for 10.
    const [base = 0, top = 0] = [direct.at(-1), direct[0]];
    expect(base - top).toBeCloseTo(96 * 0.6, 0);
    expect(top - (detour[0] ?? 0)).toBeCloseTo(96 * 0.2, 0);
    expect(svg.match(/stroke-dasharray/g)).toHaveLength(1);
    // What was seen 10 ms after the sample before it makes no rate of its own.
    expect(direct).toHaveLength(6);
  });

  it('are well-formed when there is nothing to show', () => {
    for (const svg of [drawBoxes([], 'none'), drawTimes([], 'none')]) {
      expect(svg.startsWith('<svg ')).toBe(true);
      expect(svg).not.toContain('NaN');
      expect(svg).not.toContain('Infinity');
    }
  });
});
