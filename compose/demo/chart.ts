/** Draws the throughput of each path over time, stacked, as an SVG that needs nothing but itself. */

export type ChartSample = {
  /** Seconds on the chart's axis. */
  readonly at: number;
  /** Bytes received so far, one figure per series; the first sample of a phase sets the base. */
  readonly bytes: readonly number[];
};

export type ChartPhase = { readonly title: string; readonly samples: readonly ChartSample[] };

export type Chart = {
  readonly title: string;
  /** One per figure of a sample, drawn from the bottom up in this order. */
  readonly series: readonly string[];
  /** In the order of time; each continues the axis of the one before. */
  readonly phases: readonly ChartPhase[];
  readonly marks: readonly { readonly at: number; readonly text: string }[];
};

const WIDTH = 960;
const HEIGHT = 460;
const LEFT = 72;
const RIGHT = 24;
const TOP = 84;
const BOTTOM = 64;
/** Width of the window over which bytes become a rate: wide enough to even out the sampling, narrow enough for a stall. */
const WINDOW_S = 0.4;
const STEP_S = 0.1;
/** Okabe and Ito's palette: told apart by colour-blind readers too. */
export const COLOURS = ['#0072b2', '#e69f00', '#009e73', '#cc79a7', '#56b4e9'];
const MARK_COLOUR = '#d00000';

/** The chart as the text of an SVG file. */
export function drawChart(chart: Chart): string {
  const phases = chart.phases.filter((phase) => phase.samples.length > 1);
  const rates = phases.map((phase) => ratesOf(phase.samples, chart.series.length));
  const start = phases[0]?.samples[0]?.at ?? 0;
  const end = phases.at(-1)?.samples.at(-1)?.at ?? start + 1;
  const highest = Math.max(1, ...rates.flat().map((rate) => sum(rate.mbps)));
  const yStep = niceStep(highest / 5);
  const yMax = Math.ceil((highest * 1.02) / yStep) * yStep;
  const x = (at: number): number => LEFT + ((at - start) / (end - start)) * (WIDTH - LEFT - RIGHT);
  const y = (mbps: number): number => HEIGHT - BOTTOM - (mbps / yMax) * (HEIGHT - TOP - BOTTOM);
  const out: string[] = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${WIDTH}" height="${HEIGHT}" viewBox="0 0 ${WIDTH} ${HEIGHT}" font-family="Helvetica, Arial, sans-serif" font-size="14">`,
    `<rect width="${WIDTH}" height="${HEIGHT}" fill="#ffffff"/>`,
    text(LEFT, 26, chart.title, 'start', 'font-size="18" font-weight="bold"'),
  ];
  for (let mbps = 0; mbps <= yMax + 1e-9; mbps += yStep) {
    out.push(line(LEFT, y(mbps), WIDTH - RIGHT, y(mbps), '#dddddd'));
    out.push(text(LEFT - 8, y(mbps) + 5, String(Math.round(mbps * 100) / 100), 'end'));
  }
  rates.forEach((phase) => {
    chart.series.forEach((_, series) => {
      const upTo = (rate: Rate, count: number): number => y(sum(rate.mbps.slice(0, count)));
      const above = phase.map((rate) => point(x(rate.at), upTo(rate, series + 1)));
      const below = phase.toReversed().map((rate) => point(x(rate.at), upTo(rate, series)));
      out.push(`<polygon points="${[...above, ...below].join(' ')}" fill="${colour(series)}" fill-opacity="0.85"/>`);
    });
  });
  phases.forEach((phase, index) => {
    const [from, to] = [x(phase.samples[0]?.at ?? start), x(phase.samples.at(-1)?.at ?? end)];
    if (index > 0) out.push(line(from, TOP - 8, from, HEIGHT - BOTTOM, '#555555'));
    out.push(text((from + to) / 2, TOP - 12, phase.title, 'middle', 'font-weight="bold"'));
  });
  for (const mark of chart.marks) {
    out.push(
      line(x(mark.at), TOP, x(mark.at), HEIGHT - BOTTOM, MARK_COLOUR, 'stroke-width="2" stroke-dasharray="6 4"'),
    );
    out.push(text(x(mark.at) + 6, TOP + 16, mark.text, 'start', `fill="${MARK_COLOUR}" font-weight="bold"`));
  }
  const xStep = niceStep((end - start) / 10);
  for (let at = Math.ceil(start / xStep) * xStep; at <= end + 1e-9; at += xStep) {
    out.push(line(x(at), HEIGHT - BOTTOM, x(at), HEIGHT - BOTTOM + 5, '#333333'));
    out.push(text(x(at), HEIGHT - BOTTOM + 20, String(Math.round(at * 100) / 100), 'middle'));
  }
  out.push(line(LEFT, HEIGHT - BOTTOM, WIDTH - RIGHT, HEIGHT - BOTTOM, '#333333'));
  out.push(line(LEFT, TOP, LEFT, HEIGHT - BOTTOM, '#333333'));
  out.push(text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 18, 'Time (s), pauses between the transfers left out', 'middle'));
  const middle = (TOP + HEIGHT - BOTTOM) / 2;
  const sideways = `transform="rotate(-90 22 ${middle})"`;
  out.push(text(22, middle, 'Throughput at the receiver (Mbit/s)', 'middle', sideways));
  chart.series.forEach((name, series) => {
    const at = LEFT + series * 150;
    out.push(`<rect x="${at}" y="38" width="14" height="14" fill="${colour(series)}" fill-opacity="0.85"/>`);
    out.push(text(at + 20, 50, name, 'start'));
  });
  out.push('</svg>');
  return `${out.join('\n')}\n`;
}

type Rate = { readonly at: number; readonly mbps: readonly number[] };

function ratesOf(samples: readonly ChartSample[], series: number): Rate[] {
  const [first, last] = [samples[0]?.at ?? 0, samples.at(-1)?.at ?? 0];
  const rates: Rate[] = [];
  for (let at = first; at < last + STEP_S; at += STEP_S) {
    const centre = Math.min(at, last);
    const [from, to] = [Math.max(first, centre - WINDOW_S / 2), Math.min(last, centre + WINDOW_S / 2)];
    const mbps = Array.from({ length: series }, (_, index) => {
      const bytes = bytesAt(samples, to, index) - bytesAt(samples, from, index);
      return (Math.max(0, bytes) * 8) / 1e6 / (to - from);
    });
    rates.push({ at: centre, mbps });
  }
  return rates;
}

/** The count at a moment between two samples, on the straight line between them. */
function bytesAt(samples: readonly ChartSample[], at: number, series: number): number {
  const later = samples.findIndex((sample) => sample.at >= at);
  const after = samples[later === -1 ? samples.length - 1 : later];
  const before = samples[Math.max(0, later === -1 ? samples.length - 1 : later - 1)];
  if (after === undefined || before === undefined) return 0;
  const [low, high] = [before.bytes[series] ?? 0, after.bytes[series] ?? 0];
  if (after.at === before.at) return high;
  return low + ((high - low) * (at - before.at)) / (after.at - before.at);
}

/** The smallest of 1, 2, 5 times a power of ten that is not below `least`. */
export function niceStep(least: number): number {
  const power = 10 ** Math.floor(Math.log10(least));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= least - 1e-9) ?? power * 10;
}

function sum(values: readonly number[]): number {
  return values.reduce((total, value) => total + value, 0);
}

function colour(series: number): string {
  return COLOURS[series % COLOURS.length] ?? '#000000';
}

function point(x: number, y: number): string {
  return `${x.toFixed(1)},${y.toFixed(1)}`;
}

export function line(x1: number, y1: number, x2: number, y2: number, stroke: string, more = ''): string {
  const ends = `x1="${x1.toFixed(1)}" y1="${y1.toFixed(1)}" x2="${x2.toFixed(1)}" y2="${y2.toFixed(1)}"`;
  return `<line ${ends} stroke="${stroke}" ${more}/>`;
}

export function text(x: number, y: number, content: string, anchor: 'start' | 'middle' | 'end', more = ''): string {
  const escaped = content.replaceAll('&', '&amp;').replaceAll('<', '&lt;').replaceAll('>', '&gt;');
  return `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" text-anchor="${anchor}" ${more}>${escaped}</text>`;
}
