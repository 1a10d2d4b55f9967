import { execFileSync } from 'node:child_process';
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openElements } from '../../appliance/kernel/elements.ts';
import { openNamespace } from '../../appliance/kernel/namespaces.ts';
import { type Nft, systemNft } from '../../appliance/kernel/nft.ts';
import { type Host, Lab, requireRoot } from '../lab/netns.ts';
import { nftCases } from '../lab/nft-cases.ts';

const folder = mkdtempSync(join(tmpdir(), 'detour-nft-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

/** nft, and sockets, of another network namespace. */
async function nftOf(host: Host): Promise<Nft> {
  return systemNft({ namespace: await openNamespace(host.path), resident: true });
}

/** Puts a map of `count` leases there. */
async function fill(host: Host, count: number): Promise<void> {
  const elements = Array.from(
    { length: count },
    (_, n) => `add element inet detour leases4 { 10.0.${n >> 8}.${n & 255} . 20000 timeout 1h : 192.0.2.1 . 443 }\n`,
  );
  await host.nft(
    'add table inet detour\n' +
      'add map inet detour leases4 { type ipv4_addr . inet_service : ipv4_addr . inet_service; flags timeout; }\n' +
      elements.join(''),
  );
}

/** A transaction of somebody else, in another table: the kernel counts one generation for all. */
function interfere(host: Host, table: string): void {
  execFileSync('nsenter', [`--net=${host.path}`, 'nft', 'add', 'table', 'inet', table]);
}

/** A program that stands in for nft. */
function program(name: string, text: string): string {
  const path = join(folder, name);
  writeFileSync(path, `#!/bin/sh\n${text}\n`);
  chmodSync(path, 0o755);
  return path;
}

describe.runIf(requireRoot('tests of nftables'))('nftables, the real one', () => {
  let lab: Lab;
  let count = 0;
  beforeAll(async () => {
    lab = await Lab.create('router.nft');
  });
  afterAll(async () => lab?.[Symbol.asyncDispose]());
  nftCases(async () => {
    const host = await lab.host(`h${count++}`);
    return { nft: await nftOf(host), elapse: (ms) => delay(ms) };
  });

  it('reads a map again when the ruleset changes while it is read', async () => {
    const host = await lab.host('changing');
    await fill(host, 20_000);
    const seen = new Map<string, number>();
    const failure = await (await nftOf(host)).dump('detour', 'leases4', ({ key }) => {
      const text = Buffer.from(key).toString('hex');
      seen.set(text, (seen.get(text) ?? 0) + 1);
      if (seen.size === 1) interfere(host, 'other');
    });
    expect(failure).toBeNull();
    expect(seen.size).toBe(20_000);
    // Again, and not once more than that: left alone, it is enough.
    expect(new Set(seen.values())).toEqual(new Set([2]));
  });

  it('says of an interrupted dump that it was, where the kernel does', async () => {
    const host = await lab.host('chains');
    const chains = Array.from({ length: 1_000 }, (_, n) => `add chain inet detour c${n}\n`);
    await host.nft(`add table inet detour\n${chains.join('')}`);
    const socket = openElements(await openNamespace(host.path));
    let count = 0;
    // NFT_MSG_GETCHAIN of all families; the first record stands for more to come.
    const dump = socket.dump('listing chains', (10 << 8) | 4, Buffer.alloc(4), () => {
      if (count === 0) interfere(host, 'other');
      count += 1;
    });
    await expect(dump).rejects.toMatchObject({ code: 'EINTR' });
    expect(count).toBeGreaterThan(1);
    socket.close();
  });

  it('gives up on a ruleset that never stays the same, and says so', async () => {
    const host = await lab.host('restless');
    await fill(host, 5_000);
    let count = 0;
    const failure = await (await nftOf(host)).dump('detour', 'leases4', () => {
      if (count % 5_000 === 0) interfere(host, `t${count}`);
      count += 1;
    });
    expect(failure).toMatchObject({ kind: 'rejected', message: expect.stringContaining('other programs') });
  });
});

describe('an nft that fails', () => {
  const text = 'add table inet detour\n';
  const long = text.repeat(2_000);
  it.each([
    ['is not there', join(folder, 'nowhere'), 'missing'],
    [
      'is not allowed to',
      program('eperm', 'cat > /dev/null; echo "Error: Could not process rule: Operation not permitted" >&2; exit 1'),
      'denied',
    ],
    [
      'finds the map full',
      program(
        'enfile',
        'cat > /dev/null; echo "Error: Could not process rule: Too many open files in system" >&2; exit 1',
      ),
      'full',
    ],
    ['crashes', program('segv', 'kill -SEGV $$'), 'unknown'],
    ['is killed', program('kill', 'kill -KILL $$'), 'unknown'],
    ['hangs', program('hang', 'exec sleep 60'), 'unknown'],
    [
      'prints what looks like the end of a run',
      program('liar', 'cat > /dev/null; echo; echo "detour-nft 0"; echo "File exists" >&2; exit 1'),
      'exists',
    ],
  ])('%s: says so, for short texts and for long ones', async (_what, path, kind) => {
    for (const resident of [true, false])
      expect(await systemNft({ program: path, deadline: 500, resident }).run(text)).toMatchObject({ kind });
    const nft = systemNft({ program: path, deadline: 500, resident: true });
    expect(await nft.run(text)).toMatchObject({ kind });
    expect(await nft.run(long)).toMatchObject({ kind });
    expect(await nft.run(text)).toMatchObject({ kind });
    if (kind !== 'full' && kind !== 'exists')
      expect(await nft.list(['list', 'ruleset'], () => undefined)).toMatchObject({ kind });
  });

  it('is started again after it was killed, and works then', async () => {
    const once = join(folder, 'once');
    const recovers = `if [ -e ${once} ]; then cat > /dev/null; else touch ${once}; exec sleep 60; fi`;
    const nft = systemNft({ program: program('recovers', recovers), deadline: 500, resident: true });
    expect(await nft.run(text)).toMatchObject({ kind: 'unknown' });
    expect(await nft.run(text)).toBeNull();
  });

  it('gets a transaction as one line', async () => {
    const seen = join(folder, 'seen');
    const nft = systemNft({ program: program('records', `cat >> ${seen}`), deadline: 2_000, resident: true });
    expect(await nft.run('one\ntwo\n')).toBeNull();
    expect(readFileSync(seen, 'utf8')).toBe('one; two\n');
  });
});
