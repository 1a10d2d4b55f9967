/** Draws experiments as SVG files that need nothing but themselves. Pure. */
import { COLOURS, line, niceStep, text } from '../../compose/demo/chart.ts';
import { quantile } from '../bench/figures.ts';
import type { Result, TransferOutcome } from './experiment.ts';
import { titleOf, transfersOf, waysOf } from './tables.ts';

const FONT = 'font-family="Helvetica, Arial, sans-serif" font-size="13"';
const INK = '#333333';
const GRID = '#dddddd';

function svg(width: number, height: number, parts: readonly string[]): string {
  const size = `width="${width}" height="${height}" viewBox="0 0 ${width} ${height}"`;
  const ground = `<rect width="${width}" height="${height}" fill="#ffffff"/>`;
  return `${[`<svg xmlns="http://www.w3.org/2000/svg" ${size} ${FONT}>`, ground, ...parts, '</svg>'].join('\n')}\n`;
}

const colour = (index: number): string => COLOURS[index % COLOURS.length] ?? INK;

function legend(names: readonly string[], left: number, y: number, step: number): string[] {
  return names.flatMap((name, index) => {
    const x = left + index * step;
    return [
      `<rect x="${x}" y="${y - 11}" width="12" height="12" fill="${colour(index)}"/>`,
      text(x + 18, y, name, 'start'),
    ];
  });
}

/**
 * A box for each way of each scenario: median, quartiles, and whiskers to the extremes of its trials' rates. Where `reference` knows a
 * rate, a hollow diamond shows it.
 */
export function drawBoxes(
  results: readonly Result[],
  title: string,
  reference: Readonly<Record<string, Readonly<Record<string, number>>>> = {},
): string {
  const ways = [...new Set(results.flatMap(waysOf))].filter((way) =>
    results.some((result) => transfersOf(result, way).length > 0),
  );
  const [left, top, height, slot, gap] = [64, 84, 440, 20, 26];
  const group = ways.length * slot + gap;
  const width = Math.max(left + (ways.length + 1) * 130, left + results.length * group + 24);
  const bottom = height - 56;
  const rates = results.flatMap((result) => ways.flatMap((way) => transfersOf(result, way).map(({ mbps }) => mbps)));
  const known = Object.values(reference).flatMap((one) => Object.values(one));
  const step = niceStep(Math.max(1, ...rates, ...known) / 6);
  const most = Math.ceil(Math.max(1, ...rates, ...known) / step) * step;
  const y = (mbps: number): number => bottom - (mbps / most) * (bottom - top);
  const parts = [
    text(left, 26, title, 'start', 'font-size="17" font-weight="bold"'),
    ...legend(ways.map(titleOf), left, 56, 130),
  ];
  if (known.length > 0) {
    const x = left + ways.length * 130;
    parts.push(diamond(x + 6, 51), text(x + 18, 56, 'thesis, mean', 'start'));
  }
  for (let mbps = 0; mbps <= most + 1e-9; mbps += step) {
    parts.push(line(left, y(mbps), width - 24, y(mbps), GRID), text(left - 8, y(mbps) + 4, tick(mbps), 'end'));
  }
  results.forEach((result, place) => {
    const start = left + gap / 2 + place * group;
    parts.push(text(start + (ways.length * slot) / 2, bottom + 22, result.scenario.name, 'middle'));
    ways.forEach((way, index) => {
      const values = transfersOf(result, way).map(({ mbps }) => mbps);
      const x = start + index * slot + slot / 2;
      if (values.length > 0) {
        const [low, first, middle, third, high] = [0, 0.25, 0.5, 0.75, 1].map((share) => y(quantile(values, share)));
        parts.push(
          line(x, low ?? 0, x, high ?? 0, INK),
          `<rect x="${x - 6}" y="${(third ?? 0).toFixed(1)}" width="12" height="${Math.max(1, (first ?? 0) - (third ?? 0)).toFixed(1)}" fill="${colour(index)}" stroke="${INK}"/>`,
          line(x - 6, middle ?? 0, x + 6, middle ?? 0, INK, 'stroke-width="2"'),
        );
      }
      const theirs = reference[result.scenario.name]?.[way];
      if (theirs !== undefined) parts.push(diamond(x, y(theirs)));
    });
  });
  const middle = (top + bottom) / 2;
  parts.push(
    line(left, bottom, width - 24, bottom, INK),
    line(left, top, left, bottom, INK),
    text(20, middle, 'Throughput at the receiver (Mbit/s)', 'middle', `transform="rotate(-90 20 ${middle})"`),
  );
  return svg(width, height, parts);
}

const tick = (value: number): string => String(Math.round(value * 100) / 100);

function diamond(x: number, y: number): string {
  const points = [
    [x, y - 5],
    [x + 5, y],
    [x, y + 5],
    [x - 5, y],
  ].map((point) => point.map((value) => value.toFixed(1)).join(','));
  return `<polygon points="${points.join(' ')}" fill="#ffffff" fill-opacity="0.7" stroke="#d00000" stroke-width="1.5"/>`;
}

/**
 * Rows are scenarios, columns their ways; in each field the throughput of every path over time, one on top of the other, in that way's
 * median trial. Events are dashed lines.
 */
export function drawTimes(results: readonly Result[], title: string): string {
  const ways = [...new Set(results.flatMap(waysOf))].filter((way) =>
    results.some((result) => transfersOf(result, way).length > 0),
  );
  const [left, top, fieldWidth, fieldHeight, gap] = [136, 92, 190, 96, 20];
  const [width, height] = [
    Math.max(520, left + ways.length * (fieldWidth + gap)),
    top + results.length * (fieldHeight + gap) + 40,
  ];
  const paths = pathsOf(results);
  const parts = [
    text(16, 26, title, 'start', 'font-size="17" font-weight="bold"'),
    ...legend(paths, 16, 54, 110),
    text(left, height - 12, 'Time (s); vertical: throughput at the receiver (Mbit/s)', 'start'),
    ...ways.map((way, column) =>
      text(left + column * (fieldWidth + gap) + fieldWidth / 2, top - 10, titleOf(way), 'middle', 'font-weight="bold"'),
    ),
  ];
  results.forEach((result, row) => {
    const y0 = top + row * (fieldHeight + gap);
    const shown = ways.map((way) => ({ way, transfer: medianTransfer(result, way) }));
    const layers = shown.map(({ transfer }) => (transfer ? ratesOf(transfer, paths) : []));
    const highest = Math.max(1, ...layers.flat().map(({ mbps }) => mbps.reduce((sum, value) => sum + value, 0)));
    const step = niceStep(highest / 2);
    const most = Math.ceil(highest / step) * step;
    const seconds = Math.max(1, ...shown.map(({ transfer }) => (transfer?.ms ?? 0) / 1000));
    parts.push(text(16, y0 + fieldHeight / 2, result.scenario.name, 'start', 'font-weight="bold"'));
    shown.forEach(({ way, transfer }, column) => {
      if (!transfer) return;
      const x0 = left + column * (fieldWidth + gap);
      const x = (at: number): number => x0 + (at / seconds) * fieldWidth;
      const y = (mbps: number): number => y0 + fieldHeight - (Math.min(mbps, most) / most) * fieldHeight;
      for (let mbps = 0; mbps <= most + 1e-9; mbps += step) {
        parts.push(line(x0, y(mbps), x0 + fieldWidth, y(mbps), GRID));
        if (column === 0) parts.push(text(x0 - 6, y(mbps) + 4, tick(mbps), 'end', 'font-size="10"'));
      }
      const rates = layers[column] ?? [];
      paths.forEach((_, layer) => {
        const upTo = (one: Rate, count: number): number =>
          y(one.mbps.slice(0, count).reduce((sum, value) => sum + value, 0));
        const above = rates.map((one) => `${x(one.at).toFixed(1)},${upTo(one, layer + 1).toFixed(1)}`);
        const below = rates.toReversed().map((one) => `${x(one.at).toFixed(1)},${upTo(one, layer).toFixed(1)}`);
        if (rates.some(({ mbps }) => (mbps[layer] ?? 0) > 0))
          parts.push(
            `<polygon points="${[...above, ...below].join(' ')}" fill="${colour(layer)}" fill-opacity="0.85"/>`,
          );
      });
      for (const { atS } of result.runs.find((run) => run.way === way)?.events ?? [])
        parts.push(line(x(atS), y0, x(atS), y0 + fieldHeight, '#d00000', 'stroke-dasharray="5 3"'));
      const every = niceStep(seconds / 5);
      for (let at = 0; at <= seconds + 1e-9; at += every)
        parts.push(text(x(at), y0 + fieldHeight + 12, tick(at), 'middle', 'font-size="10"'));
      parts.push(line(x0, y0 + fieldHeight, x0 + fieldWidth, y0 + fieldHeight, INK));
    });
  });
  return svg(width, height, parts);
}

/** The direct one first, so that it has the same colour everywhere. */
function pathsOf(results: readonly Result[]): string[] {
  const names = results.flatMap(({ runs }) =>
    runs.flatMap(({ outcomes }) => outcomes.flatMap((one) => (one.kind === 'transfer' ? one.paths : []))),
  );
  const others = [...new Set(names.map(({ name }) => name))].filter((name) => name !== 'direct').toSorted();
  return ['direct', ...others];
}

function medianTransfer(result: Result, way: string): TransferOutcome | undefined {
  const sorted = transfersOf(result, way).toSorted((a, b) => a.mbps - b.mbps);
  return sorted[Math.floor((sorted.length - 1) / 2)];
}

type Rate = { readonly at: number; readonly mbps: readonly number[] };

/** How much each path carried between two looks at it; in the middle between them. */
function ratesOf(transfer: TransferOutcome, paths: readonly string[]): Rate[] {
  const columns = paths.map((name) => transfer.paths.findIndex((path) => path.name === name) + 1);
  return transfer.series.flatMap((sample, index) => {
    const before = transfer.series[index - 1] ?? sample.map(() => 0);
    const [from = 0, to = 0] = [before[0], sample[0]];
    // The last look comes soon after the one before, and a little after the time that it stands for.
    if (to - from < MINIMUM_SPAN_MS) return [];
    const mbps = columns.map((column) =>
      column === 0 ? 0 : (Math.max(0, (sample[column] ?? 0) - (before[column] ?? 0)) * 8) / 1000 / (to - from),
    );
    return [{ at: (from + to) / 2000, mbps }];
  });
}

const MINIMUM_SPAN_MS = 80;
