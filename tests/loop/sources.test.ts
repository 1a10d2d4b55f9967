import { createSocket } from 'node:dgram';
import { mkdir, mkdtemp, rename, rm, symlink, unlink, writeFile } from 'node:fs/promises';
import { createServer, type IncomingMessage, type ServerResponse } from 'node:http';
import type { AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterEach, describe, expect, onTestFinished, test } from 'vitest';
import type { DetourAddress } from '../../appliance/client/detours.ts';
import {
  lookAtSource,
  MOST_DETOURS,
  type SourcePorts,
  type Sources,
  watchSources,
} from '../../appliance/client/sources.ts';
import { systemClock } from '../../appliance/kernel/clock.ts';
import { systemFiles } from '../../appliance/kernel/files.ts';
import { systemLookup } from '../../appliance/kernel/lookup.ts';
import { systemWeb } from '../../appliance/kernel/web.ts';
import type { Log } from '../../appliance/log.ts';
import { type Address, parseAddress } from '../../appliance/protocol/address.ts';
import type { DetourSource } from '../../appliance/settings.ts';
import { FakeClock } from '../fakes/clock.ts';

const address = (text: string): Address => {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(text);
  return parsed;
};

/** A resolver with a table; a name that is not in it does not exist. */
class Table {
  readonly names = new Map<string, readonly string[]>();
  readonly asked: string[] = [];
  running = 0;
  most = 0;
  addresses = async (host: string): Promise<readonly Address[]> => {
    this.asked.push(host);
    this.running++;
    this.most = Math.max(this.most, this.running);
    await new Promise((resolve) => setImmediate(resolve));
    this.running--;
    const found = this.names.get(host);
    if (!found) throw Object.assign(new Error('no such name'), { code: 'ENOTFOUND' });
    return found.map(address);
  };
}

type Watched = {
  readonly clock: FakeClock;
  readonly table: Table;
  readonly sources: Sources;
  /** The last list, as `name=endpoint`. */
  now(): readonly string[];
  readonly lists: (readonly DetourAddress[])[];
  /** Events of the log with their source. */
  readonly logged: string[];
  readonly words: string[];
  readonly jobs: Map<string, () => void>;
};

const NOBODY: SourcePorts['lookup']['services'] = async () => {
  throw Object.assign(new Error('no server'), { code: 'ECONNREFUSED' });
};

/** Sources over a clock that moves when told, and over real files and a real web. */
function watched(
  sources: readonly DetourSource[],
  ports: { table?: Table; services?: SourcePorts['lookup']['services']; pollMs?: number } = {},
): Watched {
  const clock = new FakeClock();
  const table = ports.table ?? new Table();
  const lists: (readonly DetourAddress[])[] = [];
  const logged: string[] = [];
  const words: string[] = [];
  const jobs = new Map<string, () => void>();
  const note: Log['info'] = (event, { source }, message) => {
    logged.push(`${event} ${source}`);
    words.push(message);
  };
  const running = watchSources({
    sources,
    clock,
    log: { debug() {}, info: note, warn: note, error: note },
    lookup: { addresses: table.addresses, services: ports.services ?? NOBODY },
    files: systemFiles(ports.pollMs ?? 60_000),
    web: systemWeb(),
    schedule(expression, task) {
      jobs.set(expression, task);
      return () => jobs.delete(expression);
    },
    onChange: (addresses) => lists.push(addresses),
  });
  onTestFinished(() => running.stop());
  return {
    clock,
    table,
    sources: running,
    now: () => (lists.at(-1) ?? []).map(({ key, name }) => `${name}=${key}`),
    lists,
    logged,
    words,
    jobs,
  };
}

const fixed = (name: string, host: string, port = 45672): DetourSource => ({ kind: 'static', name, host, port });
const WAIT = { timeout: 5_000, interval: 10 };
/** Waits until the list is this one. */
const becomes = (one: Watched, list: readonly string[]) => expect.poll(one.now, WAIT).toEqual(list);
const status = (one: Watched, source = 0) => one.sources.status()[source];

describe('names', () => {
  test('literal addresses are there at once and never looked up', async () => {
    const one = watched([fixed('a', '127.0.0.1'), fixed('b', '2001:db8::1', 7)]);
    expect(one.now()).toEqual(['a=127.0.0.1:45672', 'b=[2001:db8::1]:7']);
    await one.clock.advance(600_000);
    expect(one.table.asked).toEqual([]);
    expect(status(one)).toMatchObject({ source: 'static', state: 'ok', detours: 2, why: null });
  });

  test('a name of a detour gives ways to one machine, a dns: name gives machines', async () => {
    const table = new Table();
    table.names.set('fra.example', ['192.0.2.1', '2001:db8::1']);
    table.names.set('pool.example', ['192.0.2.8', '192.0.2.7', '192.0.2.1']);
    const one = watched([fixed('fra', 'fra.example'), { kind: 'dns', host: 'pool.example', port: 45672 }], { table });
    await one.clock.advance(0);
    expect(one.now()).toEqual([
      'fra=192.0.2.1:45672',
      'fra=[2001:db8::1]:45672',
      'pool.example/192.0.2.7=192.0.2.7:45672',
      'pool.example/192.0.2.8=192.0.2.8:45672',
    ]);
  });

  test('one address by two names is one detour, and the first name is its name', () => {
    expect(watched([fixed('first', '192.0.2.1'), fixed('second', '192.0.2.1')]).now()).toEqual([
      'first=192.0.2.1:45672',
    ]);
  });

  test('that cannot be resolved at the start is tried again soon, and after the end never', async () => {
    const one = watched([fixed('late', 'late.example', 7)]);
    await one.clock.advance(1_000);
    one.table.names.set('late.example', ['192.0.2.1']);
    await one.clock.advance(5_500);
    expect(one.now()).toEqual(['late=192.0.2.1:7']);
    one.sources.stop();
    await one.clock.advance(600_000);
    expect(one.table.asked).toHaveLength(2);
  });

  test('is asked again each minute with jitter; rotated answers are no change, new ones are', async () => {
    const table = new Table();
    table.names.set('pool.example', ['192.0.2.1', '192.0.2.2']);
    const one = watched([{ kind: 'dns', host: 'pool.example', port: 5 }], { table });
    await one.clock.advance(0);
    table.names.set('pool.example', ['192.0.2.2', '192.0.2.1']);
    await one.clock.advance(66_000);
    expect(table.asked.length).toBe(2);
    expect(one.lists.length).toBe(1);
    table.names.set('pool.example', ['192.0.2.2', '192.0.2.3']);
    await one.clock.advance(66_000);
    expect(one.lists.at(-1)?.map(({ key }) => key)).toEqual(['192.0.2.2:5', '192.0.2.3:5']);
  });

  test('that stops resolving keeps its addresses, says so once, and is tried again less and less often', async () => {
    const table = new Table();
    table.names.set('pool.example', ['192.0.2.1']);
    const one = watched([{ kind: 'dns', host: 'pool.example', port: 5 }], { table });
    await one.clock.advance(0);
    table.names.clear();
    await one.clock.advance(66_000);
    expect(one.lists).toHaveLength(1);
    expect(status(one)).toMatchObject({ state: 'ok', detours: 1, why: 'does not resolve: pool.example (ENOTFOUND)' });
    table.asked.length = 0;
    await one.clock.advance(600_000);
    expect(table.asked.length).toBeGreaterThan(8);
    expect(table.asked.length).toBeLessThan(16);
    expect(one.logged).toEqual(['source-flawed dns:pool.example:5']);
    table.names.set('pool.example', ['192.0.2.9']);
    one.sources.retry();
    await one.clock.advance(0);
    expect(one.lists.at(-1)?.map(({ key }) => key)).toEqual(['192.0.2.9:5']);
    expect(one.logged).toEqual(['source-flawed dns:pool.example:5', 'source-recovered dns:pool.example:5']);
    expect(status(one)).toMatchObject({ state: 'ok', why: null });
  });

  test('that never resolved is failing, and its neighbours are not', async () => {
    const one = watched([fixed('a', '192.0.2.1'), { kind: 'dns', host: 'nowhere.example', port: 5 }]);
    expect(status(one, 1)).toMatchObject({ state: 'starting', detours: 0 });
    await one.clock.advance(0);
    expect(one.now()).toEqual(['a=192.0.2.1:45672']);
    expect(status(one, 0)).toMatchObject({ state: 'ok' });
    expect(status(one, 1)).toMatchObject({ state: 'failing', detours: 0 });
  });

  test('may not lead to this machine, its link or a group', async () => {
    const table = new Table();
    table.names.set('liar.example', ['127.0.0.1', '169.254.169.254', '224.0.0.1', '10.0.0.1', '::1']);
    const one = watched([{ kind: 'dns', host: 'liar.example', port: 5 }], { table });
    await one.clock.advance(0);
    expect(one.lists.at(-1)?.map(({ key }) => key)).toEqual(['10.0.0.1:5']);
    expect(status(one)?.why).toMatch(/2 addresses are loopback.*1 address is link-local.*1 address is multicast/);
  });
});

describe('bounds', () => {
  test('256 detours in all, those named first, and it says how many were left out', async () => {
    const one = watched([
      ...Array.from({ length: 250 }, (_, n) => fixed(`s${n}`, `198.51.100.${n}`)),
      { kind: 'file', path: await filled(Array.from({ length: 20 }, (_, n) => `f${n}=203.0.113.${n}:1`).join('\n')) },
    ]);
    await expect.poll(() => one.now().length, WAIT).toBe(MOST_DETOURS);
    expect(status(one, 0)).toMatchObject({ detours: 250, leftOut: 0 });
    expect(status(one, 1)).toMatchObject({
      detours: 6,
      leftOut: 14,
      why: expect.stringMatching(/14 addresses are left out/),
    });
  });

  test("a list of dead names never keeps the user's own name waiting", async () => {
    const table = new Table();
    const slow = Promise.withResolvers<readonly Address[]>();
    const quick = table.addresses;
    table.addresses = (host) => (host.startsWith('dead') ? slow.promise : quick(host));
    table.names.set('mine.example', ['192.0.2.1']);
    const records = Array.from({ length: 30 }, (_, n) => ({
      target: `dead${n}.example`,
      port: 5,
      priority: 0,
      weight: 0,
    }));
    const one = watched(
      [
        { kind: 'srv', name: '_d._udp.example' },
        { kind: 'dns', host: 'mine.example', port: 5 },
      ],
      {
        table,
        services: async () => records,
      },
    );
    await one.clock.advance(0);
    expect(one.now()).toEqual(['mine.example/192.0.2.1=192.0.2.1:5']);
    await one.clock.advance(70_000);
    expect(table.asked.filter((name) => name === 'mine.example').length).toBe(2);
    slow.resolve([]);
  });

  test('names of a list are asked one after the other', async () => {
    const table = new Table();
    for (let n = 0; n < 64; n++) table.names.set(`d${n}.example`, [`192.0.2.${n}`]);
    const records = Array.from({ length: 64 }, (_, n) => ({
      target: `d${n}.example`,
      port: 5,
      priority: 0,
      weight: 0,
    }));
    const one = watched([{ kind: 'srv', name: '_d._udp.example' }], { table, services: async () => records });
    await expect.poll(() => one.now().length, WAIT).toBe(64);
    expect(table.most).toBe(1);
  });
});

const folders: string[] = [];
afterEach(async () => {
  for (const folder of folders.splice(0)) await rm(folder, { recursive: true, force: true });
});

async function folder(): Promise<string> {
  const path = await mkdtemp(join(tmpdir(), 'detour-sources-'));
  folders.push(path);
  return path;
}

async function filled(text: string, name = 'detours.yaml'): Promise<string> {
  const path = join(await folder(), name);
  await writeFile(path, text);
  return path;
}

const yaml = (...hosts: readonly number[]): string =>
  `detours:\n${hosts.map((n) => `  - name: d${n}\n    address: 192.0.2.${n}:45672\n`).join('')}`;
const shown = (...hosts: readonly number[]): string[] => hosts.map((n) => `d${n}=192.0.2.${n}:45672`);

describe('a file', () => {
  test.each<[string, string]>([
    ['YAML', yaml(1, 2)],
    ['YAML in one line', '{detours: [{name: d1, address: "192.0.2.1:45672"}, {name: d2, address: "192.0.2.2:45672"}]}'],
    ['JSON', JSON.stringify({ detours: [1, 2].map((n) => ({ name: `d${n}`, address: `192.0.2.${n}:45672` })) })],
    ['a bare JSON list', JSON.stringify([1, 2].map((n) => ({ name: `d${n}`, address: `192.0.2.${n}:45672` })))],
    ['lines', '# mine\nd1=192.0.2.1:45672\nd2=192.0.2.2:45672\n'],
  ])('may be %s', async (_, text) => {
    const one = watched([{ kind: 'file', path: await filled(text) }]);
    await becomes(one, shown(1, 2));
    expect(status(one)).toMatchObject({ state: 'ok', detours: 2, leftOut: 0, why: null });
  });

  test('is read again when it is written in place', async () => {
    const path = await filled(yaml(1));
    const one = watched([{ kind: 'file', path }]);
    await becomes(one, shown(1));
    await writeFile(path, yaml(2, 3));
    await becomes(one, shown(2, 3));
  });

  test('is read again when an editor puts another file in its place, again and again', async () => {
    const path = await filled(yaml(1));
    const one = watched([{ kind: 'file', path }]);
    await becomes(one, shown(1));
    for (const n of [2, 3, 4]) {
      await writeFile(`${path}.tmp`, yaml(n));
      await rename(`${path}.tmp`, path);
      await becomes(one, shown(n));
    }
  });

  test('of a ConfigMap is read again when the kubelet moves the ..data link', async () => {
    const root = await folder();
    const version = async (name: string, text: string): Promise<void> => {
      await mkdir(join(root, name));
      await writeFile(join(root, name, 'detours.yaml'), text);
      await symlink(name, join(root, '..data_tmp'));
      await rename(join(root, '..data_tmp'), join(root, '..data'));
    };
    await version('..2026_1', yaml(1));
    await symlink(join('..data', 'detours.yaml'), join(root, 'detours.yaml'));
    const one = watched([{ kind: 'file', path: join(root, 'detours.yaml') }]);
    await becomes(one, shown(1));
    for (const n of [2, 3]) {
      await version(`..2026_${n}`, yaml(n));
      await rm(join(root, `..2026_${n - 1}`), { recursive: true });
      await becomes(one, shown(n));
    }
  });

  test('that goes away keeps what it gave, says so once, and counts again when it comes back', async () => {
    const path = await filled(yaml(1));
    const one = watched([{ kind: 'file', path }]);
    await becomes(one, shown(1));
    await unlink(path);
    await expect.poll(() => status(one)?.state, WAIT).toBe('failing');
    expect(status(one)).toMatchObject({ detours: 1, why: 'there is no such file' });
    expect(one.now()).toEqual(shown(1));
    await writeFile(path, yaml(2));
    await becomes(one, shown(2));
    expect(one.logged).toEqual([`source-failed file:${path}`, `source-recovered file:${path}`]);
  });

  test('may come later, with its folder, and its folder may be replaced', async () => {
    const root = join(await folder(), 'etc');
    const path = join(root, 'detours.yaml');
    const one = watched([{ kind: 'file', path }], { pollMs: 50 });
    await expect.poll(() => status(one)?.why, WAIT).toBe('there is no such file');
    for (const n of [1, 2]) {
      await rm(root, { recursive: true, force: true });
      await mkdir(root);
      await writeFile(path, yaml(n));
      await becomes(one, shown(n));
    }
  });

  test('is found by looking where nobody tells of changes', async () => {
    const root = await folder();
    await mkdir(join(root, 'one'));
    await mkdir(join(root, 'two'));
    await writeFile(join(root, 'one', 'list'), yaml(1));
    await writeFile(join(root, 'two', 'list'), yaml(2));
    await symlink('one', join(root, 'now'));
    const one = watched([{ kind: 'file', path: join(root, 'now', 'list') }], { pollMs: 50 });
    await becomes(one, shown(1));
    await symlink('two', join(root, 'next'));
    await rename(join(root, 'next'), join(root, 'now'));
    await becomes(one, shown(2));
  });

  test('with a mistake names it and uses the rest', async () => {
    const path = await filled('d1=192.0.2.1:45672\nnonsense\nd3=192.0.2.3:45672\n');
    const one = watched([{ kind: 'file', path }]);
    await becomes(one, shown(1, 3));
    expect(status(one)).toMatchObject({ state: 'ok', why: 'line 2 is no name=host:port' });
    expect(one.logged).toEqual([`source-flawed file:${path}`]);
  });

  test.each<[string, string, RegExp]>([
    ['bad YAML', 'detours:\n  - name: a\n   address: b\n', /neither JSON nor YAML: .*line 3, column 1/],
    ['broken JSON', '{"detours": [\n{"name": "a", "address": "h:1"},\n}', /neither JSON nor YAML: .*line 3/],
    ['nothing', '\n', /it is empty/],
    ['two documents', 'detours: []\n---\ndetours: []\n', /neither JSON nor YAML/],
    ['a tag', 'detours: !!js/function "x"\n', /tag resolve failed, line 1/],
    ['a bomb', `a: &a [1,1]\nb: &b [${'*a,'.repeat(9)}]\ndetours: [*b]\n`, /aliases/],
    ['two lists', 'detours: []\ndetours: []\n', /"detours" twice/],
    ['a web page', '<!DOCTYPE html>\n<html><body>please log in</body></html>\n', /no list of detours|neither/],
    ['depth', '['.repeat(100_000), /neither JSON nor YAML/],
    ['too much', `#${'x'.repeat(1024 * 1024)}`, /more than 1024 kB/],
    ['too much YAML', `${yaml(1)}#${'x'.repeat(512 * 1024)}`, /more than 512 kB, too much for YAML/],
  ])('that becomes %s changes nothing and says why', async (_, text, why) => {
    const path = await filled(yaml(1));
    const one = watched([{ kind: 'file', path }]);
    await becomes(one, shown(1));
    await writeFile(`${path}.tmp`, text);
    await rename(`${path}.tmp`, path);
    await expect.poll(() => status(one)?.why ?? '', WAIT).toMatch(why);
    expect(status(one)).toMatchObject({ state: 'failing', detours: 1 });
    expect(one.now()).toEqual(shown(1));
  });

  test('that lists nothing on purpose takes everything away', async () => {
    const path = await filled(yaml(1));
    const one = watched([{ kind: 'file', path }]);
    await becomes(one, shown(1));
    await writeFile(path, 'detours: []\n');
    await becomes(one, []);
    expect(status(one)).toMatchObject({ state: 'ok', detours: 0 });
  });

  test.each(['/dev/zero', '/', '/proc/self/mem'])('%s is no list', async (path) => {
    const one = watched([{ kind: 'file', path }]);
    await expect.poll(() => status(one)?.state, WAIT).toBe('failing');
    expect(status(one)?.why).not.toBeNull();
  });

  test('a pipe that nobody writes to holds nothing up', async () => {
    const path = join(await folder(), 'pipe');
    const { execFileSync } = await import('node:child_process');
    execFileSync('mkfifo', [path]);
    const one = watched([{ kind: 'file', path }]);
    await expect.poll(() => status(one)?.why, WAIT).toBe('it is no regular file');
  });

  test('of ten thousand detours gives the first 64', async () => {
    const all = Array.from({ length: 10_000 }, (_, n) => `  - {name: d${n}, address: "h${n}.example:1"}`);
    const table = new Table();
    for (let n = 0; n < 64; n++) table.names.set(`h${n}.example`, [`192.0.2.${n}`]);
    const one = watched([{ kind: 'file', path: await filled(`detours:\n${all.join('\n')}\n`) }], { table });
    await expect.poll(() => one.now().length, WAIT).toBe(64);
    expect(status(one)).toMatchObject({ state: 'ok', detours: 64, leftOut: 9_936 });
    expect(new Set(table.asked).size).toBe(64);
  });
});

test('no text whatsoever makes reading throw, or says more than places and rules', async () => {
  const seeds = [
    yaml(1, 2, 3),
    '{"detours": [{"name": "d1", "address": "192.0.2.1:45672"}, {"name": "d2", "address": "[2001:db8::1]:5"}]}',
    '# mine\nd1=192.0.2.1:45672\nd2=h.example:5\n',
    'detours: &x\n  - {name: a, address: "h:1"}\nmore: *x\n',
  ];
  const scraps = [
    '\n',
    '"',
    '[',
    '{',
    ':',
    '- ',
    '&a ',
    '*a',
    '!!x ',
    '#',
    '\u0000',
    '\ud800',
    '  ',
    '=',
    '% ',
    '---\n',
    '|\n',
    '__proto__',
  ];
  const clock = new FakeClock();
  const draw = (below: number): number => new DataView(clock.random(4).slice().buffer).getUint32(0) % below;
  let text = '';
  const ports = {
    clock,
    lookup: systemLookup(),
    web: systemWeb(),
    files: { read: async () => text, watch: () => () => undefined },
  };
  let good = 0;
  for (let turn = 0; turn < 3_000; turn++) {
    text = seeds[draw(seeds.length)] ?? '';
    for (let cuts = draw(4); cuts >= 0; cuts--) {
      const at = draw(text.length + 1);
      text = text.slice(0, at) + (scraps[draw(scraps.length)] ?? '') + text.slice(at + draw(5));
    }
    const { detours, complaints } = await lookAtSource({ kind: 'file', path: '/list' }, ports);
    good += detours.length;
    for (const { host, port } of detours) expect(`${host} ${port}`).toMatch(/^[a-z0-9.:-]+ \d+$/i);
    // No control characters, nothing of the text: these words go into logs.
    for (const words of complaints) expect(words).toMatch(/^[ -~]{1,160}$/);
  }
  expect(good).toBeGreaterThan(500);
});

type Answer = { status?: number; headers?: Record<string, string>; body?: string | Buffer };

/** A web server whose every answer is made by the test. */
async function webServer(
  respond: (request: IncomingMessage, response: ServerResponse) => Answer | null,
): Promise<{ url: string; requests: IncomingMessage[] }> {
  const requests: IncomingMessage[] = [];
  const server = createServer((request, response) => {
    requests.push(request);
    const answer = respond(request, response);
    if (!answer) return;
    response.writeHead(answer.status ?? 200, answer.headers);
    response.end(answer.body);
  });
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  onTestFinished(() => {
    server.closeAllConnections();
    server.close();
  });
  return { url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/list.json`, requests };
}

const web = (url: string, at: string | null = null): DetourSource => ({ kind: 'web', url, at });
const json = (...hosts: readonly number[]): string =>
  JSON.stringify({ detours: hosts.map((n) => ({ name: `d${n}`, address: `192.0.2.${n}:45672` })) });
/** Lets what was asked arrive, then moves on to the next question. */
const MINUTE = 66_100;

describe('a web list', () => {
  test('is asked every minute with ETag and Last-Modified, and 304 changes nothing', async () => {
    let version = 1;
    const { url, requests } = await webServer((request) => {
      const etag = `"v${version}"`;
      if (request.headers['if-none-match'] === etag) return { status: 304, headers: { etag } };
      return { headers: { etag, 'last-modified': 'Mon, 23 Nov 2026 10:00:00 GMT' }, body: json(version) };
    });
    const one = watched([web(url)]);
    await becomes(one, shown(1));
    expect(requests[0]?.headers).not.toHaveProperty('if-none-match');
    await one.clock.advance(MINUTE);
    await expect.poll(() => requests.length, WAIT).toBe(2);
    expect(requests[1]?.headers).toMatchObject({
      'if-none-match': '"v1"',
      'if-modified-since': 'Mon, 23 Nov 2026 10:00:00 GMT',
    });
    await expect.poll(() => status(one)?.answeredAt, WAIT).toBeGreaterThan(50_000);
    expect(one.lists).toHaveLength(1);
    version = 2;
    await one.clock.advance(MINUTE);
    await becomes(one, shown(2));
    expect(status(one)).toMatchObject({ state: 'ok', failures: 0 });
  });

  test('that fails keeps what it gave, says so once, backs off, and recovers', async () => {
    let broken = false;
    const times: number[] = [];
    const { url } = await webServer(() => {
      times.push(one.clock.now());
      return broken ? { status: 500 } : { body: json(1) };
    });
    const one = watched([web(url)]);
    await becomes(one, shown(1));
    broken = true;
    // In small steps, each with its time for the answer: a step that began before it would count into the next wait.
    for (const step = 500; times.length < 8 && one.clock.now() < 600_000; ) {
      const asked = times.length;
      await one.clock.advance(step);
      if (times.length > asked) await expect.poll(() => status(one)?.failures, WAIT).toBe(times.length - 1);
    }
    const gaps = times.slice(1).map((at, n) => (at - (times[n] ?? 0)) / 1000);
    for (const [n, wait] of [60, 5, 10, 20, 40, 60, 60].entries()) {
      expect(gaps[n], `wait ${n}`).toBeGreaterThan(wait * 0.89);
      expect(gaps[n], `wait ${n}`).toBeLessThan(wait * 1.11 + 1);
    }
    expect(status(one)?.why).toBe('it answers with status 500');
    expect(one.now()).toEqual(shown(1));
    expect(one.logged).toEqual([`source-failed ${url}`]);
    broken = false;
    one.sources.retry();
    await expect.poll(() => status(one)?.state, WAIT).toBe('ok');
    expect(one.logged).toEqual([`source-failed ${url}`, `source-recovered ${url}`]);
  });

  test('may not name this machine, however it is written', async () => {
    const list = [
      '127.0.0.1:1',
      '[::1]:1',
      '[::ffff:127.0.0.1]:2',
      'self.example:1',
      '169.254.169.254:80',
      '10.0.0.1:1',
    ];
    const table = new Table();
    table.names.set('self.example', ['127.0.0.1']);
    const { url } = await webServer(() => ({
      body: JSON.stringify(list.map((address, n) => ({ name: `d${n}`, address }))),
    }));
    const one = watched([web(url)], { table });
    await becomes(one, ['d5=10.0.0.1:1']);
    await expect.poll(() => status(one)?.why, WAIT).toMatch(/4 addresses are loopback/);
  });

  test.each<[string, (request: IncomingMessage, response: ServerResponse) => Answer | null, RegExp]>([
    ['a huge answer', () => ({ body: 'x'.repeat(2 * 1024 * 1024) }), /more than 1024 kB/],
    [
      'an endless answer',
      (_, response) => {
        response.writeHead(200);
        const more = (): void => {
          while (!response.destroyed && response.write('x'.repeat(65_536)));
          if (!response.destroyed) response.once('drain', more);
        };
        more();
        return null;
      },
      /more than 1024 kB/,
    ],
    [
      'a small answer that unpacks to a huge one',
      () => ({ headers: { 'content-encoding': 'gzip' }, body: gzipSync(Buffer.alloc(64 * 1024 * 1024)) }),
      /more than 1024 kB/,
    ],
    [
      'a loop of redirects',
      (request) => ({ status: 302, headers: { location: request.url ?? '' } }),
      /more than 3 times/,
    ],
    [
      'a redirect to a neighbour',
      () => ({ status: 302, headers: { location: 'http://127.0.0.1:1/' } }),
      /neither https nor/,
    ],
    ['a redirect to a file', () => ({ status: 302, headers: { location: 'file:///etc/passwd' } }), /neither https nor/],
    ['a redirect to nowhere', () => ({ status: 302 }), /neither https nor/],
    ['an unasked 304', () => ({ status: 304 }), /status 304/],
    [
      'a broken connection',
      (request) => {
        request.destroy();
        return null;
      },
      /^[A-Z_]+$/,
    ],
    ['a login page', () => ({ body: '<!DOCTYPE html>\n<html lang="en">log in</html>' }), /no list of detours|neither/],
    ['YAML for minutes', () => ({ body: '"'.repeat(200_000) }), /more than 64 kB, too much for YAML/],
  ])('%s is refused', async (_, respond, why) => {
    const { url } = await webServer(respond);
    const one = watched([web(url)]);
    await expect.poll(() => status(one)?.why ?? '', WAIT).toMatch(why);
    expect(status(one)).toMatchObject({ state: 'failing', detours: 0, failures: 1 });
  });

  test('that trickles is given up when its time is over', async () => {
    const { url, requests } = await webServer((_, response) => {
      response.writeHead(200);
      const drip = setInterval(() => response.write(' '), 200);
      response.on('close', () => clearInterval(drip));
      return null;
    });
    const began = performance.now();
    const found = await lookAtSource(web(url), {
      clock: systemClock,
      lookup: systemLookup(),
      files: systemFiles(),
      web: systemWeb(300),
    });
    expect(found).toEqual({ detours: [], complaints: ['no whole answer in time'] });
    expect(performance.now() - began).toBeLessThan(5_000);
    expect(requests).toHaveLength(1);
  });

  test('gets its password, which goes nowhere else', async () => {
    const other = await webServer(() => ({ body: json(1) }));
    const { url, requests } = await webServer((request) =>
      request.url?.startsWith('/list.json')
        ? { status: 307, headers: { location: '/moved' } }
        : { body: JSON.stringify([{ name: 'x', address: 'nonsense' }]) },
    );
    const secret = url.replace('//', '//user:hunt%40er2@').concat('?token=hunt%40er2');
    const one = watched([web(secret), web(other.url)]);
    await becomes(one, shown(1));
    await expect.poll(() => status(one)?.why, WAIT).toMatch(/detours\[0\]\.address/);
    const basic = `Basic ${Buffer.from('user:hunt@er2').toString('base64')}`;
    expect(requests.map(({ url, headers }) => [url, headers.authorization])).toEqual([
      ['/list.json?token=hunt%40er2', basic],
      ['/moved', basic],
    ]);
    expect(other.requests[0]?.headers.authorization).toBeUndefined();
    expect(JSON.stringify([one.logged, one.words, one.sources.status()])).not.toMatch(/er2|token/);
  });

  test('is asked at the times its user chose, and at the start', async () => {
    const { url, requests } = await webServer(() => ({ body: json(1) }));
    const one = watched([web(url, '0 3 * * *')]);
    await becomes(one, shown(1));
    await one.clock.advance(3_600_000);
    expect(requests).toHaveLength(1);
    one.jobs.get('0 3 * * *')?.();
    await expect.poll(() => requests.length, WAIT).toBe(2);
    one.sources.stop();
    expect(one.jobs.size).toBe(0);
  });
});

type ServiceAnswer = { priority: number; weight: number; port: number; target: string };

/** A name server on loopback with service records (RFC 1035 4.1, RFC 2782); null is NXDOMAIN. */
async function nameServer(
  records: () => readonly ServiceAnswer[] | null,
): Promise<{ address: string; asked: string[] }> {
  const asked: string[] = [];
  const socket = createSocket('udp4');
  const encodeName = (name: string): Buffer =>
    Buffer.concat([
      ...name.split('.').flatMap((label) => (label === '' ? [] : [Buffer.from([label.length]), Buffer.from(label)])),
      Buffer.from([0]),
    ]);
  socket.on('message', (query, from) => {
    let end = 12;
    const labels: string[] = [];
    for (let length = query[end] ?? 0; length > 0; length = query[end] ?? 0) {
      labels.push(query.toString('latin1', end + 1, end + 1 + length));
      end += 1 + length;
    }
    asked.push(labels.join('.'));
    const question = query.subarray(12, end + 5);
    const answers = records();
    const header = Buffer.from(query.subarray(0, 12));
    header.writeUInt16BE(answers ? 0x8180 : 0x8183, 2);
    header.writeUInt16BE(answers?.length ?? 0, 6);
    header.writeUInt32BE(0, 8);
    const body = (answers ?? []).map(({ priority, weight, port, target }) => {
      const name = encodeName(target);
      const fixed = Buffer.alloc(18);
      // A pointer to the question's name, type SRV, class IN, 60 s.
      for (const [at, value] of [0xc00c, 33, 1, 0, 60, 6 + name.length, priority, weight, port].entries()) {
        fixed.writeUInt16BE(value, 2 * at);
      }
      return Buffer.concat([fixed, name]);
    });
    socket.send(Buffer.concat([header, question, ...body]), from.port, from.address);
  });
  await new Promise<void>((resolve) => socket.bind(0, '127.0.0.1', resolve));
  onTestFinished(() => void socket.close());
  return { address: `127.0.0.1:${socket.address().port}`, asked };
}

describe('service records', () => {
  const source: DetourSource = { kind: 'srv', name: '_detour._udp.example.org' };
  const table = new Table();
  table.names.set('a.example.org', ['192.0.2.1', '2001:db8::1']);
  table.names.set('b.example.org', ['192.0.2.2']);

  test('give targets with their ports, priorities and weights', async () => {
    let records: readonly ServiceAnswer[] | null = [
      { priority: 20, weight: 0, port: 7, target: 'b.example.org' },
      { priority: 10, weight: 5, port: 45672, target: 'a.example.org' },
      { priority: 10, weight: 0, port: 9, target: 'nowhere.example.org' },
    ];
    const server = await nameServer(() => records);
    const one = watched([source], { table, services: systemLookup([server.address]).services });
    await becomes(one, [
      'a.example.org=192.0.2.1:45672',
      'a.example.org=[2001:db8::1]:45672',
      'b.example.org=192.0.2.2:7',
    ]);
    expect(server.asked).toEqual(['_detour._udp.example.org']);
    expect(one.lists.at(-1)?.map(({ rank }) => rank)).toEqual([
      { source: 'srv:_detour._udp.example.org', preference: 0, order: 0 },
      { source: 'srv:_detour._udp.example.org', preference: 0, order: 0 },
      { source: 'srv:_detour._udp.example.org', preference: 1, order: 0 },
    ]);
    expect(status(one)).toMatchObject({ state: 'ok', why: 'does not resolve: nowhere.example.org (ENOTFOUND)' });

    // The name is gone: that may be an outage of the zone, so what it gave still counts.
    records = null;
    await one.clock.advance(MINUTE);
    await expect.poll(() => status(one)?.state, WAIT).toBe('failing');
    expect(one.now()).toHaveLength(3);

    // A target of "." is an answer: there is no such service here.
    records = [{ priority: 0, weight: 0, port: 0, target: '' }];
    one.sources.retry();
    await becomes(one, []);
    expect(status(one)).toMatchObject({ state: 'ok' });
  });

  test('that come and go leave the order of the others alone', async () => {
    let targets = ['a.example.org', 'b.example.org'];
    const server = await nameServer(() =>
      targets.map((target, n) => ({ priority: 0, weight: 10 * (n + 1), port: 45672, target })),
    );
    const one = watched([source], { table, services: systemLookup([server.address]).services });
    await expect.poll(() => one.now().length, WAIT).toBe(3);
    const order = (): string[] => one.now().filter((text) => !text.includes('['));
    const before = order();
    targets = ['a.example.org', 'b.example.org', 'nowhere.example.org'];
    await one.clock.advance(MINUTE);
    await expect.poll(() => server.asked.length, WAIT).toBe(2);
    await expect.poll(() => status(one)?.why, WAIT).toMatch(/nowhere/);
    expect(order()).toEqual(before);
  });

  test('from a server that is silent fail within seconds', async () => {
    const silent = createSocket('udp4');
    await new Promise<void>((resolve) => silent.bind(0, '127.0.0.1', resolve));
    onTestFinished(() => void silent.close());
    const one = watched([source], { services: systemLookup([`127.0.0.1:${silent.address().port}`]).services });
    await expect.poll(() => status(one)?.state, { timeout: 15_000, interval: 50 }).toBe('failing');
    expect(status(one)?.why).toMatch(/nobody answers \(ETIMEOUT\)/);
  });
});
