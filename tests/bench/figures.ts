/** What a measurement yields, and the little statistics that the measurements share. */

export type Figure = {
  readonly name: string;
  readonly value: number;
  readonly unit: string;
  /** The promise, as in the design's budgets; null for a figure that only explains another. */
  readonly target: { readonly atLeast: number } | { readonly atMost: number } | null;
  /** What the figure was made from, for whoever wants to look closer. */
  readonly detail?: string;
};

export function isMet(figure: Figure): boolean {
  if (figure.target === null) return true;
  return 'atLeast' in figure.target ? figure.value >= figure.target.atLeast : figure.value <= figure.target.atMost;
}

/** The value below which the given share (0 to 1) of the values lie; nearest rank. NaN for no values. */
export function quantile(values: readonly number[], share: number): number {
  const sorted = values.toSorted((a, b) => a - b);
  return sorted[Math.min(sorted.length - 1, Math.max(0, Math.ceil(share * sorted.length) - 1))] ?? Number.NaN;
}

export function median(values: readonly number[]): number {
  return quantile(values, 0.5);
}

/** The progress of a measurement, to standard error, so that standard output holds the table alone. */
export function note(line: string): void {
  process.stderr.write(`bench: ${line}\n`);
}
