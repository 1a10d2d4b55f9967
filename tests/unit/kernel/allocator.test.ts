import { execFileSync } from 'node:child_process';
import { join } from 'node:path';
import { expect, it } from 'vitest';

const MODULE = join(import.meta.dirname, '../../../appliance/kernel/allocator.ts');

/** 100 MB in small pieces, of which one in a hundred stays: what is between them is free and nobody's. */
const PROGRAM = `
  import { returnFreedMemory } from ${JSON.stringify(MODULE)};
  let pieces = Array.from({ length: 100_000 }, () => Buffer.allocUnsafeSlow(1_000).fill(1));
  pieces = pieces.filter((_, n) => n % 100 === 0);
  // The memory of collected buffers is freed by a thread of its own.
  while (process.memoryUsage().arrayBuffers > 10_000_000) {
    globalThis.gc();
    await new Promise((resolve) => setImmediate(resolve));
  }
  const before = process.memoryUsage.rss();
  returnFreedMemory();
  console.log(JSON.stringify({ before, after: process.memoryUsage.rss(), kept: pieces.length }));
`;

it('freed memory goes back to the system, also from between what is in use', () => {
  const flags = ['--expose-gc', '--input-type=module', '-e', PROGRAM];
  const { before, after } = JSON.parse(execFileSync(process.execPath, flags, { encoding: 'utf8' }));
  expect(before - after).toBeGreaterThan(50 * 2 ** 20);
});
