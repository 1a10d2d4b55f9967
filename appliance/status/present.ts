/** `/v1/status` as tables for people. Knows the shape of JSON, not the fields: what a daemon adds shows up by itself. */
import type { Json } from './daemon.ts';

type Row = { readonly [key: string]: Json };

const isRow = (value: Json): value is Row => typeof value === 'object' && value !== null && !Array.isArray(value);
const isList = (value: Json | undefined): value is readonly Json[] => Array.isArray(value);

const BYTE_UNITS = ['B', 'kB', 'MB', 'GB', 'TB'];

function bytes(value: number): string {
  const power = value < 1000 ? 0 : Math.min(BYTE_UNITS.length - 1, Math.floor(Math.log10(value) / 3));
  return `${power === 0 ? value : (value / 1000 ** power).toFixed(1)} ${BYTE_UNITS[power]}`;
}

/** A field's name says its unit. */
function cell(name: string, value: Json | undefined): string {
  if (value === null || value === undefined) return '-';
  if (typeof value === 'number' && name.endsWith('Ms')) return `${Math.round(value * 10) / 10} ms`;
  if (typeof value === 'number' && /bytesPerSecond$/i.test(name)) return `${((value * 8) / 1e6).toFixed(1)} Mbit/s`;
  if (typeof value === 'number' && /bytes$/i.test(name)) return bytes(value);
  return typeof value === 'object' ? JSON.stringify(value) : String(value);
}

const heading = (name: string): string =>
  name
    .replace(/^bytesPerSecond$/, 'rate')
    .replace(/(Ms|Bytes|BytesPerSecond)$/, '')
    .replace(/([a-z])([A-Z])/g, '$1 $2')
    .toUpperCase();

/** Rows with aligned columns; a row's own lists follow it, indented. */
function table(rows: readonly Row[], indent: string): readonly string[] {
  // A column that says nothing in any row is left out: `why` matters only when there is a why.
  const says = (name: string): boolean => rows.some((row) => (row[name] ?? null) !== null && !isList(row[name]));
  const columns = [...new Set(rows.flatMap((row) => Object.keys(row)))].filter(says);
  const cells = [columns.map(heading), ...rows.map((row) => columns.map((name) => cell(name, row[name])))];
  const widths = columns.map((_, i) => Math.max(...cells.map((line) => line[i]?.length ?? 0)));
  const lines = cells.map((line) =>
    `${indent}${line.map((text, i) => text.padEnd(widths[i] ?? 0)).join('  ')}`.trimEnd(),
  );
  const [head = '', ...body] = lines;
  return [head, ...body.flatMap((line, i) => [line, ...nested(rows[i] ?? {}, `${indent}    `)])];
}

function nested(row: Row, indent: string): readonly string[] {
  return Object.values(row).flatMap((value) => (isList(value) ? table(value.filter(isRow), indent) : []));
}

/** Text for a terminal; ends without a newline. */
export function presentStatus(status: Json): string {
  if (!isRow(status)) return JSON.stringify(status);
  const { role, version, ready, reasons, revision: _revision, ...rest } = status;
  const why = isList(reasons) && reasons.length > 0 ? `: ${reasons.join('; ')}` : '';
  const lines = [
    `detour ${role ?? ''} ${version ?? ''}: ${ready === true ? 'ready' : `not ready${why}`}`.replace(/ +/g, ' '),
  ];
  for (const [name, value] of Object.entries(rest)) {
    if (!isList(value)) {
      lines.push(isRow(value) ? `${name}: ${facts(value)}` : `${name}: ${cell(name, value)}`);
      continue;
    }
    const rows = value.filter(isRow);
    if (value.length > 0 && rows.length === 0) {
      lines.push(`${name}: ${value.map((item) => cell(name, item)).join(', ')}`);
      continue;
    }
    lines.push('', `${name} (${value.length})`, ...(rows.length > 0 ? table(rows, '  ') : []));
  }
  return lines.join('\n');
}

const facts = (row: Row): string =>
  Object.entries(row)
    .map(([name, value]) => `${name} ${cell(name, value)}`)
    .join(', ');

/** What `/v1/explain` answered for one address of `host`, for a terminal; ends without a newline. */
export function presentExplanation(host: string, explanation: Json): string {
  if (!isRow(explanation)) return JSON.stringify(explanation);
  const { address, port, prefix, directBytesPerSecond, connections, connectionsLeftOut, detours, workload } =
    explanation;
  const rowsOf = (value: Json | undefined): readonly Row[] => (isList(value) ? value.filter(isRow) : []);
  const whose = typeof workload === 'string' ? `, from ${workload}` : '';
  const where = `${address}${port === null ? '' : `, port ${port}`}${whose}`;
  const lines = [host === address ? where : `${host}: ${where}`];
  const open = rowsOf(connections);
  for (const connection of open) {
    const { token, local, remote, since, why, paths } = connection;
    lines.push('', `connection ${token}, ${local} to ${remote}, since ${since}${why === null ? '' : `: ${why}`}`);
    lines.push(...table(rowsOf(paths), '  '));
  }
  if (connectionsLeftOut !== 0) lines.push('', `and ${connectionsLeftOut} older connections`);
  if (open.length === 0) {
    const direct =
      directBytesPerSecond === null ? '' : `; the direct path carried ${cell('bytesPerSecond', directBytesPerSecond)}`;
    lines.push('', `no connection to it; what is known of ${prefix}${direct}`);
    const rows = rowsOf(detours);
    lines.push(...(rows.length > 0 ? table(rows, '  ') : ['  no detour is known: `detour status` shows the sources']));
  }
  return lines.join('\n');
}
