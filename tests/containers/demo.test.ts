import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { readdirSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { waitUntil } from '../lab/netns.ts';
import { engine } from './engine.ts';

const root = join(import.meta.dirname, '../..');
const out = join(root, 'out/demo');

describe('the demo', () => {
  it('keeps its promises and says so in the table, the plot and the result', async () => {
    rmSync(out, { recursive: true, force: true });
    const demo = start();
    const [code] = await once(demo.child, 'close');
    expect(code, demo.said()).toBe(0);
    expect(demo.said()).toMatch(/with detours +[\d.]+ +[23]\.\d\d +\d+ ms +matches/);

    const result = JSON.parse(readFileSync(join(out, 'result.json'), 'utf8'));
    expect(Object.keys(result)).toEqual([
      'directMbps',
      'detourMbps',
      'ratio',
      'longestStallMs',
      'sha256Match',
      'bytes',
      'paths',
    ]);
    expect(result.ratio).toBeCloseTo(result.detourMbps / result.directMbps, 6);
    expect(result.ratio).toBeGreaterThanOrEqual(1.8);
    expect(result.longestStallMs).toBeLessThanOrEqual(1000);
    expect(result.sha256Match).toBe(true);
    expect(result.paths.map(({ kind, detour }: Record<string, unknown>) => [kind, detour])).toEqual([
      ['direct', null],
      ['nat', 'a'],
      ['nat', 'b'],
    ]);
    for (const path of result.paths) expect(path.bytes).toBeGreaterThan(result.bytes / 10);
    expect(result.paths.reduce((sum: number, path: { bytes: number }) => sum + path.bytes, 0)).toBeGreaterThanOrEqual(
      result.bytes,
    );

    const plot = readFileSync(join(out, 'throughput.svg'), 'utf8');
    for (const text of ['Time (s)', 'Throughput at the receiver (Mbit/s)', 'direct way cut', 'through detour b']) {
      expect(plot).toContain(text);
    }
    expect(plot.match(/<polygon/g)).toHaveLength(9);
    expect(plot).not.toContain('NaN');
    await nothingIsLeft();
  });

  it('cleans up when it is interrupted, and does not call that a success', async () => {
    const demo = start();
    const { docker } = await engine();
    await waitUntil(async () => (await docker.listContainers({ filters: ours })).length > 3, {
      deadlineMs: 30_000,
      what: 'the demo to have started its containers',
    });
    demo.child.kill('SIGINT');
    const [code] = await once(demo.child, 'close');
    expect(code).toBe(1);
    expect(demo.said()).toContain('stopped by SIGINT');
    await nothingIsLeft();
  });
});

const ours = { label: ['com.docker.compose.project=detour-demo'] };

async function nothingIsLeft(): Promise<void> {
  const { docker } = await engine();
  expect(await docker.listContainers({ all: true, filters: ours })).toEqual([]);
  expect(await docker.listNetworks({ filters: ours })).toEqual([]);
  expect(readdirSync(tmpdir()).filter((name) => name.startsWith('detour-demo-'))).toEqual([]);
}

function start(): { child: ChildProcess; said: () => string } {
  const child = spawn(process.execPath, [join(root, 'compose/demo/run.ts')], { stdio: ['ignore', 'pipe', 'pipe'] });
  let said = '';
  for (const stream of [child.stdout, child.stderr]) {
    stream?.setEncoding('utf8').on('data', (text: string) => {
      said += text;
    });
  }
  return { child, said: () => said };
}
