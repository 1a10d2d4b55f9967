/**
 * The demonstration: one client, two detours, one server, three transfers.
 *
 *   tests/lab/engine.sh run -- node compose/demo/run.ts        (what `make demo` does)
 *
 * Needs the images detour-router:dev, detour-client:dev and detour-lab:dev. Every number is counted by the server, where the
 * data arrives. Writes out/demo/result.json and out/demo/throughput.svg; exits 1 when the gain is below 1.8, the longest
 * stall above one second, or a byte is wrong.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { chmodSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { setTimeout as delay } from 'node:timers/promises';
import { expectedSha256, type PathCount, type Progress, type TransferResult } from '../../tests/lab/traffic.ts';
import { type ChartPhase, drawChart } from './chart.ts';

/** What the demo promises (issue 2): below these it fails. */
const LEAST_RATIO = 1.8;
const LONGEST_STALL_MS = 1000;

/** About ten seconds of 20 Mbit/s, of three times that, and of what is left after the cut. */
const DIRECT_BYTES = 24_000_000;
const DETOUR_BYTES = 60_000_000;
const CUT_BYTES = 60_000_000;
const CUT_AFTER_BYTES = CUT_BYTES * 0.4;

const SERVER = '10.90.9.10';
/** The server's view: whose address a subflow comes from says which way it took. */
const WAYS = [
  { kind: 'direct', detour: null, remote: '10.90.9.2', title: 'direct' },
  { kind: 'nat', detour: 'a', remote: '10.90.9.11', title: 'through detour a' },
  { kind: 'nat', detour: 'b', remote: '10.90.9.12', title: 'through detour b' },
] as const;

const root = join(import.meta.dirname, '../..');
const out = join(root, 'out/demo');

type Measured = TransferResult & {
  readonly title: string;
  readonly sha256Match: boolean;
  readonly cutAtMs: number | null;
};

const secrets = mkdtempSync(join(tmpdir(), 'detour-demo-'));
const interrupted = new AbortController();
const children = new Set<ChildProcess>();

/** Starts a docker command away from the terminal's Ctrl-C, which is for this program to handle. */
function docker(args: readonly string[]): ChildProcess {
  const child = spawn('docker', args, {
    detached: true,
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, DETOUR_DEMO_SECRETS: secrets },
  });
  children.add(child);
  child.once('close', () => children.delete(child));
  return child;
}

function compose(...args: string[]): string[] {
  return ['compose', '--file', join(root, 'compose/demo/compose.yaml'), ...args];
}

type Ended = { readonly code: number; readonly stdout: string; readonly stderr: string };

async function finish(args: readonly string[]): Promise<Ended> {
  const child = docker(args);
  const said = { stdout: '', stderr: '' };
  child.stdout?.setEncoding('utf8').on('data', (text: string) => {
    said.stdout += text;
  });
  child.stderr?.setEncoding('utf8').on('data', (text: string) => {
    said.stderr += text;
  });
  const code = await new Promise<number>((resolve, reject) => {
    child.once('error', (error) => reject(new Error(`docker cannot be started: ${error.message}`)));
    child.once('close', (status, signal) => resolve(signal === null ? (status ?? 1) : 1));
  });
  return { code, ...said };
}

/** Runs a docker command; an error shows what it said. */
async function must(args: readonly string[]): Promise<string> {
  interrupted.signal.throwIfAborted();
  const ended = await finish(args);
  interrupted.signal.throwIfAborted();
  if (ended.code === 0) return ended.stdout;
  throw new Error(`docker ${args.join(' ')} ended with ${ended.code}:\n${ended.stderr.trim() || ended.stdout.trim()}`);
}

function inside(service: string, ...command: string[]): string[] {
  return compose('exec', '--no-TTY', service, ...command);
}

async function until(what: string, deadlineMs: number, probe: () => Promise<boolean>): Promise<void> {
  const deadline = performance.now() + deadlineMs;
  while (!(await probe())) {
    interrupted.signal.throwIfAborted();
    if (performance.now() > deadline) throw new Error(`waited ${deadlineMs / 1000} s in vain: ${what}`);
    await delay(200, undefined, { signal: interrupted.signal });
  }
}

function say(line: string): void {
  process.stdout.write(`${line}\n`);
}

/** One changing line on a terminal; on anything else a line each second. */
function ticker(): { show(line: string): void; end(): void } {
  let last = 0;
  return {
    show(line) {
      if (process.stdout.isTTY) {
        process.stdout.write(`\r\x1b[2K${line}`);
      } else if (performance.now() - last >= 1000) {
        last = performance.now();
        say(line);
      }
    },
    end() {
      if (process.stdout.isTTY) process.stdout.write('\r\x1b[2K');
    },
  };
}

function bytesPerWay(paths: readonly PathCount[]): number[] {
  return WAYS.map((way) =>
    paths.filter((path) => path.remote === way.remote).reduce((sum, path) => sum + path.bytes, 0),
  );
}

/** Mbit/s of each way over about the last half second. */
function currentRates(series: readonly Progress[]): number[] {
  const now = series.at(-1);
  const then = series.findLast((sample) => now !== undefined && sample.ms <= now.ms - 500) ?? series[0];
  if (now === undefined || then === undefined || now.ms <= then.ms) return WAYS.map(() => 0);
  const before = bytesPerWay(then.paths);
  return bytesPerWay(now.paths).map((bytes, way) => ((bytes - (before[way] ?? 0)) * 8) / 1000 / (now.ms - then.ms));
}

/** Drops on the gateway whatever goes the direct way, in both directions, without telling anybody. */
async function cutDirectWay(): Promise<void> {
  const rules = `add rule inet gateway cut ip daddr ${SERVER} drop; add rule inet gateway cut ip saddr ${SERVER} drop`;
  await must(inside('gateway', 'nft', rules));
}

async function measure(title: string, bytes: number, cutAfterBytes?: number): Promise<Measured> {
  const seed = `${title} ${randomBytes(8).toString('hex')}`;
  const log = docker(['logs', '--follow', '--tail', '0', 'detour-demo-server-1']);
  const client = docker(
    inside('client', 'mptcpize', 'run', 'node', '/lab/traffic.ts', 'transfer').concat([
      '--to',
      `${SERVER}:5000`,
      '--bytes',
      String(bytes),
      '--seed',
      seed,
    ]),
  );
  const line = ticker();
  const live: Progress[] = [];
  let cutAtMs: number | null = null;
  let cutting: Promise<void> | null = null;
  if (log.stdout !== null) {
    createInterface({ input: log.stdout }).on('line', (text) => {
      if (!text.startsWith('{"event":"progress"')) return;
      const progress: Progress = JSON.parse(text);
      live.push(progress);
      if (cutAfterBytes !== undefined && cutting === null && progress.bytes >= cutAfterBytes) {
        const arrived = performance.now();
        cutting = cutDirectWay().then(() => {
          cutAtMs = progress.ms + performance.now() - arrived;
        });
        cutting.catch(() => client.kill());
      }
      const rates = currentRates(live);
      const ways = WAYS.map((way, index) => `${way.detour ?? 'direct'} ${(rates[index] ?? 0).toFixed(1).padStart(5)}`);
      const total = rates.reduce((sum, rate) => sum + rate, 0);
      const done = `${Math.floor((100 * progress.bytes) / bytes)} %`.padStart(5);
      const note = cutAtMs === null ? '' : '   (direct way cut)';
      line.show(
        `  ${(progress.ms / 1000).toFixed(1).padStart(5)} s ${done}   ${ways.join('   ')}   = ${total.toFixed(1).padStart(5)} Mbit/s${note}`,
      );
    });
  }
  let [printed, complaint] = ['', ''];
  client.stdout?.setEncoding('utf8').on('data', (text: string) => {
    printed += text;
  });
  client.stderr?.setEncoding('utf8').on('data', (text: string) => {
    complaint += text;
  });
  await new Promise((resolve) => client.once('close', resolve));
  log.kill();
  line.end();
  interrupted.signal.throwIfAborted();
  await cutting;
  const done = printed.split('\n').find((text) => text.startsWith('{"event":"done"'));
  if (done === undefined) throw new Error(`the transfer '${title}' failed:\n${complaint}`);
  const result: TransferResult = JSON.parse(done);
  if (!result.mptcp)
    throw new Error(`the transfer '${title}' was no Multipath TCP: is net.mptcp.enabled 1 on this machine?`);
  if (cutAfterBytes !== undefined && cutAtMs === null)
    throw new Error('the transfer was over before the direct way was cut');
  const sha256Match = result.sha256 === expectedSha256(seed, bytes);
  say(
    `  ${(result.bytes / 1e6).toFixed(0)} MB in ${(result.ms / 1000).toFixed(1)} s, ${result.mbps.toFixed(1)} Mbit/s, longest stall ${result.longestStallMs.toFixed(0)} ms`,
  );
  return { ...result, title, sha256Match, cutAtMs };
}

function writeSecrets(): void {
  const id = randomBytes(4).toString('hex');
  const line = `${id}:${randomBytes(32).toString('base64url')}\n`;
  // Readable to root without CAP_DAC_OVERRIDE inside a container even when this program is not run by root; the folder around
  // them is ours alone.
  chmodSync(secrets, 0o711);
  for (const name of ['keys', 'key']) writeFileSync(join(secrets, name), line, { mode: 0o644 });
}

async function start(): Promise<void> {
  writeSecrets();
  // Of a run that was killed and could not clean up.
  await finish(compose('--profile', '*', 'down', '--volumes', '--timeout', '2'));
  await must(compose('up', '--detach', 'client', 'gateway', 'server', 'detour-a', 'detour-b'));
  await must(compose('run', '--rm', '--no-deps', 'client-route'));
  await until('the gateway sets up its uplinks', 10_000, async () => {
    return (await finish(inside('gateway', 'nft', 'list', 'table', 'inet', 'gateway'))).code === 0;
  });
  for (const detour of ['detour-a', 'detour-b']) {
    await until(`${detour} becomes healthy (docker logs detour-demo-${detour}-1)`, 20_000, async () => {
      return (await finish(inside(detour, 'detour', 'healthcheck', '--ready'))).code === 0;
    });
  }
}

async function startAgent(): Promise<void> {
  await must(compose('up', '--detach', '--no-deps', 'agent'));
  await until('the agent reaches both detours (docker logs detour-demo-agent-1)', 20_000, async () => {
    const { code, stdout } = await finish(inside('agent', 'detour', 'status', '--json'));
    if (code !== 0) return false;
    const status: { detours: { rttMs: number | null }[] } = JSON.parse(stdout);
    return status.detours.length === 2 && status.detours.every((detour) => typeof detour.rttMs === 'number');
  });
}

async function stop(): Promise<void> {
  for (const child of children) child.kill();
  const ended = await finish(compose('--profile', '*', 'down', '--volumes', '--timeout', '3'));
  if (ended.code !== 0) say(`cleaning up failed: ${ended.stderr.trim()}`);
}

function table(direct: Measured, detours: Measured, cut: Measured, ratio: number): string {
  const rows = [
    ['', 'Mbit/s', 'ratio', 'longest stall', 'SHA-256', ...WAYS.map((way) => `MB ${way.title}`)],
    ...[direct, detours, cut].map((phase) => [
      phase.title,
      phase.mbps.toFixed(1),
      phase === direct ? '1.00' : phase === detours ? ratio.toFixed(2) : (phase.mbps / direct.mbps).toFixed(2),
      `${phase.longestStallMs.toFixed(0)} ms`,
      phase.sha256Match ? 'matches' : 'DIFFERS',
      ...bytesPerWay(phase.paths).map((bytes) => (bytes / 1e6).toFixed(1)),
    ]),
  ];
  const widths = rows[0]?.map((_, column) => Math.max(...rows.map((row) => row[column]?.length ?? 0))) ?? [];
  return rows
    .map((row) =>
      row
        .map((cell, column) => (column === 0 ? cell.padEnd(widths[column] ?? 0) : cell.padStart(widths[column] ?? 0)))
        .join('   '),
    )
    .join('\n');
}

function drawing(phases: readonly Measured[]): string {
  let offset = 0;
  const marks: { at: number; text: string }[] = [];
  const drawn = phases.map((phase): ChartPhase => {
    const begin = offset;
    const samples = phase.series.map((sample) => ({ at: begin + sample.ms / 1000, bytes: bytesPerWay(sample.paths) }));
    samples.unshift({ at: begin, bytes: WAYS.map(() => 0) });
    if (phase.cutAtMs !== null) marks.push({ at: begin + phase.cutAtMs / 1000, text: 'direct way cut' });
    offset = samples.at(-1)?.at ?? begin;
    return { title: phase.title, samples };
  });
  return drawChart({
    title: 'One Multipath TCP connection, from one network card, over 20 Mbit/s ways',
    series: WAYS.map((way) => way.title),
    phases: drawn,
    marks,
  });
}

async function demo(): Promise<boolean> {
  say('Starting a client, its gateway, two detours and a server ...');
  await start();
  say('\n1  direct only: no agent on the client');
  const direct = await measure('direct only', DIRECT_BYTES);
  say('\n2  with detours: the agent runs beside the client, nothing else has changed');
  await startAgent();
  const detours = await measure('with detours', DETOUR_BYTES);
  say('\n3  with detours, and the direct way is cut in the middle of the transfer, for good');
  const cut = await measure('with detours, then cut', CUT_BYTES, CUT_AFTER_BYTES);

  const ratio = detours.mbps / direct.mbps;
  const longestStallMs = Math.max(detours.longestStallMs, cut.longestStallMs);
  const sha256Match = [direct, detours, cut].every((phase) => phase.sha256Match);
  const perWay = WAYS.map((_, way) =>
    [detours, cut].reduce((sum, phase) => sum + (bytesPerWay(phase.paths)[way] ?? 0), 0),
  );
  const result = {
    directMbps: direct.mbps,
    detourMbps: detours.mbps,
    ratio,
    longestStallMs,
    sha256Match,
    // Of the two transfers with detours; the sum over the paths is larger by what MPTCP sent twice.
    bytes: detours.bytes + cut.bytes,
    paths: WAYS.map(({ kind, detour }, way) => ({ kind, detour, bytes: perWay[way] ?? 0 })),
  };
  mkdirSync(out, { recursive: true });
  writeFileSync(join(out, 'result.json'), `${JSON.stringify(result, null, 2)}\n`);
  writeFileSync(join(out, 'throughput.svg'), drawing([direct, detours, cut]));

  say(`\n${table(direct, detours, cut, ratio)}\n`);
  const complaints = [
    ratio < LEAST_RATIO ? `the ratio ${ratio.toFixed(2)} is below ${LEAST_RATIO}` : null,
    longestStallMs > LONGEST_STALL_MS
      ? `a stall of ${longestStallMs.toFixed(0)} ms is above ${LONGEST_STALL_MS} ms`
      : null,
    sha256Match ? null : 'data arrived changed: the SHA-256 differs',
  ].filter((complaint) => complaint !== null);
  for (const complaint of complaints) say(`FAILED: ${complaint}`);
  if (complaints.length === 0) {
    say(`${ratio.toFixed(2)} times the direct way alone; the transfer outlived the direct way and arrived whole.`);
  }
  say('Written: out/demo/result.json, out/demo/throughput.svg');
  return complaints.length === 0;
}

for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP'] as const) {
  process.on(signal, () => {
    if (interrupted.signal.aborted) return;
    interrupted.abort(new Error(`stopped by ${signal}`));
    for (const child of children) child.kill();
  });
}

try {
  process.exitCode = (await demo()) ? 0 : 1;
} catch (error) {
  process.exitCode = 1;
  say(`\nFAILED: ${error instanceof Error ? error.message : String(error)}`);
  if (!interrupted.signal.aborted) {
    const logs = await finish(
      compose('--profile', '*', 'logs', '--no-color', '--tail', '20', 'agent', 'detour-a', 'detour-b', 'gateway'),
    );
    say(logs.stdout.trim());
  }
} finally {
  await stop();
  rmSync(secrets, { recursive: true, force: true });
}
