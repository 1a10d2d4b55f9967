import { spawnSync } from 'node:child_process';
import { mkdtempSync, readdirSync, rmSync, statSync, writeFileSync } from 'node:fs';
import { request } from 'node:http';
import { connect, createServer } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Script } from 'node:vm';
import { Gauge, Registry } from 'prom-client';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { Fatal } from '../../appliance/exit.ts';
import { createLog, type Log } from '../../appliance/log.ts';
import { type Endpoint, formatAddress } from '../../appliance/protocol/address.ts';
import { askDaemon, NoDaemon } from '../../appliance/status/client.ts';
import type { DaemonView, Json, Readiness } from '../../appliance/status/daemon.ts';
import { DASHBOARD } from '../../appliance/status/dashboard.ts';
import { openStatus, type StatusServer } from '../../appliance/status/server.ts';

const LOOPBACK = { family: 4, value: 0x7f000001n } as const;

let folder: string;
let socket: string;
let lines: string[];
let log: Log;
const opened: StatusServer[] = [];

beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'detour-status-'));
  socket = join(folder, 'sub', 'd.sock');
  lines = [];
  log = createLog(
    { component: 'router', logLevel: 'debug', logFormat: 'json' },
    { write: (line) => void lines.push(line) },
  );
});

afterEach(async () => {
  for (const server of opened.splice(0)) await server.close();
  rmSync(folder, { recursive: true, force: true });
});

async function open(http: Endpoint | null = null, path = socket): Promise<StatusServer> {
  const server = await openStatus({ role: 'router', settings: { http, socket: path }, log });
  opened.push(server);
  return server;
}

/** A port nobody has: the kernel's choice, given back. */
async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
  const address = server.address();
  await new Promise((resolve) => server.close(resolve));
  if (address === null || typeof address === 'string') throw new Error('no port');
  return address.port;
}

function view(parts: { readiness?: () => Readiness; status?: () => Promise<Json> } = {}): DaemonView {
  const metrics = new Registry();
  new Gauge({ name: 'detour_router_leases', help: 'Leases.', registers: [metrics] }).set(3);
  return {
    readiness: parts.readiness ?? (() => ({ ready: true, reasons: [] })),
    status: parts.status ?? (async () => ({ leases: [{ port: 20000 }] })),
    metrics,
  };
}

const get = (path: string) => askDaemon(socket, path);
const getJson = async (path: string): Promise<unknown> => JSON.parse((await get(path)).body);

describe('pages', () => {
  it('explain answers only what is asked properly, and only where there is something to explain', async () => {
    const server = await open();
    expect((await get('/v1/explain?address=192.0.2.1')).code).toBe(503);
    server.attach({ ...view(), explain: async (address, port) => ({ address: formatAddress(address), port }) });
    expect(await getJson('/v1/explain?address=192.0.2.1&port=443')).toEqual({ address: '192.0.2.1', port: 443 });
    expect(await getJson('/v1/explain?address=2001:db8::1')).toEqual({ address: '2001:db8::1', port: null });
    for (const query of [
      '',
      '?',
      '?address=',
      '?address=name',
      '?address=192.0.2.1&port=',
      '?address=::1&port=65536',
    ]) {
      expect((await get(`/v1/explain${query}`)).code).toBe(400);
    }
    server.attach(view());
    expect((await get('/v1/explain?address=192.0.2.1')).code).toBe(404);
  });

  it('say starting, then ready, then why not, then stopping', async () => {
    const server = await open();
    expect((await get('/healthz')).code).toBe(503);
    expect((await get('/livez')).code).toBe(200);
    expect(await get('/readyz')).toEqual({ code: 503, body: '{"ready":false,"reasons":["starting"]}\n' });

    let readiness: Readiness = { ready: true, reasons: [] };
    server.attach(view({ readiness: () => readiness }));
    expect((await get('/healthz')).code).toBe(200);
    expect(await get('/readyz')).toEqual({ code: 200, body: '{"ready":true,"reasons":[]}\n' });

    readiness = { ready: false, reasons: ['nft does not answer'] };
    expect(await get('/readyz')).toEqual({ code: 503, body: '{"ready":false,"reasons":["nft does not answer"]}\n' });
    // Trouble elsewhere must not get a daemon restarted.
    expect((await get('/healthz')).code).toBe(200);

    server.drain();
    expect(await get('/readyz')).toEqual({ code: 503, body: '{"ready":false,"reasons":["stopping"]}\n' });
    expect((await get('/healthz')).code).toBe(200);
  });

  it('show the status with version and readiness', async () => {
    (await open()).attach(view());
    expect(await getJson('/v1/status')).toMatchObject({
      version: expect.stringMatching(/^\d+\.\d+\.\d+/),
      role: 'router',
      ready: true,
      reasons: [],
      leases: [{ port: 20000 }],
    });
  });

  it("show the daemon's metrics and what runs", async () => {
    (await open()).attach(view());
    const { body } = await get('/metrics');
    expect(body).toContain('detour_router_leases 3');
    expect(body).toMatch(
      /^detour_build_info\{version="[^"]+",revision="[^"]+",node_version="v[^"]+",role="router"\} 1$/m,
    );
    expect(body).toMatch(/^process_resident_memory_bytes \d+$/m);
    expect(body).toMatch(/^# TYPE process_cpu_seconds_total counter$/m);
  });

  it('read the status once for many who ask together', async () => {
    let readings = 0;
    const { promise: go, resolve } = Promise.withResolvers<void>();
    (await open()).attach(
      view({
        status: async () => {
          readings++;
          await go;
          return { reading: readings };
        },
      }),
    );
    const asked = Array.from({ length: 10 }, () => getJson('/v1/status'));
    await expect.poll(() => readings).toBe(1);
    resolve();
    for (const answer of await Promise.all(asked)) expect(answer).toMatchObject({ reading: 1 });
    expect(await getJson('/v1/status')).toMatchObject({ reading: 2 });
  });

  it('turn an error into 500 and a log line, and say nothing of it to who asks', async () => {
    (await open()).attach(view({ status: () => Promise.reject(new Error('inner fact')) }));
    const { code, body } = await get('/v1/status');
    expect(code).toBe(500);
    expect(body).not.toContain('inner fact');
    expect(lines.map((line) => JSON.parse(line))).toContainEqual(
      expect.objectContaining({ level: 'error', event: 'status-page-failed', reason: 'inner fact' }),
    );
    expect((await get('/healthz')).code).toBe(200);
  });
});

it('has a page whose script is one', () => {
  const [, code = ''] = /<script>(.*)<\/script>/s.exec(DASHBOARD) ?? [];
  expect(code).toContain('v1/status');
  expect(() => new Script(code)).not.toThrow();
});

describe('over HTTP', () => {
  async function overHttp(port: number, path: string, method = 'GET', body?: string) {
    const { promise, resolve, reject } = Promise.withResolvers<{ code: number; headers: object; body: string }>();
    const asked = request({ host: '127.0.0.1', port, path, method, agent: false }, (response) => {
      let text = '';
      response.setEncoding('utf8').on('data', (part) => {
        text += part;
      });
      response.on('end', () => resolve({ code: response.statusCode ?? 0, headers: response.headers, body: text }));
    });
    asked.on('error', reject);
    asked.end(body);
    return promise;
  }

  it('serves the same pages, GET and HEAD, and nothing else', async () => {
    const port = await freePort();
    (await open({ address: LOOPBACK, port })).attach(view());
    expect(await overHttp(port, '/readyz?verbose')).toMatchObject({ code: 200, body: '{"ready":true,"reasons":[]}\n' });
    expect(await overHttp(port, '/readyz', 'HEAD')).toMatchObject({ code: 200, body: '' });
    expect(await overHttp(port, '/')).toMatchObject({
      code: 200,
      body: expect.stringContaining('<title>Detour</title>'),
    });
    expect(await overHttp(port, '/metrics')).toMatchObject({
      headers: expect.objectContaining({ 'content-type': expect.stringContaining('text/plain') }),
    });
    for (const path of ['/nothing', '/v1', '/__proto__', '/constructor', '/..%2f', '//readyz']) {
      expect((await overHttp(port, path)).code).toBe(404);
    }
    expect(await overHttp(port, '/readyz', 'DELETE')).toMatchObject({
      code: 405,
      headers: expect.objectContaining({ allow: 'GET, HEAD' }),
    });
  });

  it('drops garbage and oversized headers, and goes on', async () => {
    const port = await freePort();
    (await open({ address: LOOPBACK, port })).attach(view());
    for (const sent of [
      '\0\u0001\u0002 garbage\r\n\r\n',
      `GET / HTTP/1.1\r\nhost: x\r\nx: ${'y'.repeat(20_000)}\r\n\r\n`,
    ]) {
      const answer = await new Promise<string>((resolve, reject) => {
        let text = '';
        const raw = connect(port, '127.0.0.1', () => raw.write(sent, 'latin1'));
        raw.setEncoding('latin1').on('data', (part) => {
          text += part;
        });
        raw.on('error', reject).on('close', () => resolve(text));
      });
      expect(answer).toMatch(/^HTTP\/1\.1 4\d\d /);
    }
    expect((await overHttp(port, '/healthz')).code).toBe(200);
  });

  it('names DETOUR_HTTP when the address is taken, and lets the socket go', async () => {
    const holder = createServer();
    await new Promise<void>((resolve) => holder.listen(0, '127.0.0.1', resolve));
    const address = holder.address();
    if (address === null || typeof address === 'string') throw new Error('no port');
    try {
      const attempt = openStatus({
        role: 'router',
        settings: { http: { address: LOOPBACK, port: address.port }, socket },
        log,
      });
      await expect(attempt).rejects.toThrow(new RegExp(`^DETOUR_HTTP=127.0.0.1:${address.port}: another program`));
      await expect(attempt).rejects.toMatchObject({ exitCode: 78 });
      await expect(get('/healthz')).rejects.toMatchObject({ reason: 'absent' });
    } finally {
      await new Promise((resolve) => holder.close(resolve));
    }
  });

  it('names DETOUR_HTTP when the machine has no such address', async () => {
    // 203.0.113.0/24 is for documents (RFC 5737): nobody has it.
    const attempt = openStatus({
      role: 'router',
      settings: { http: { address: { family: 4, value: 0xcb007107n }, port: 9467 }, socket },
      log,
    });
    await expect(attempt).rejects.toThrow(/^DETOUR_HTTP=203\.0\.113\.7:9467: this machine has no such address/);
  });
});

describe('the unix socket', () => {
  it('is for its owner alone, and gone afterwards', async () => {
    const server = await open();
    expect(statSync(socket).mode & 0o777).toBe(0o600);
    await server.close();
    expect(readdirSync(join(folder, 'sub'))).toEqual([]);
  });

  it('belongs to one daemon', async () => {
    await open();
    const attempt = open();
    await expect(attempt).rejects.toBeInstanceOf(Fatal);
    await expect(attempt).rejects.toThrow(/another detour router is running here.*DETOUR_SOCKET/);
    expect((await get('/livez')).code).toBe(200);
  });

  it('replaces one that a killed daemon left', async () => {
    const path = join(folder, 'stale.sock');
    // Bound by a process that was killed: its file stays, and nobody listens.
    const code = `require('node:net').createServer().listen(${JSON.stringify(path)}, () => process.kill(process.pid, 'SIGKILL'))`;
    expect(spawnSync(process.execPath, ['-e', code]).signal).toBe('SIGKILL');
    expect(statSync(path).isSocket()).toBe(true);
    await open(null, path);
    expect((await askDaemon(path, '/livez')).code).toBe(200);
  });

  it('spares a file that is no socket', async () => {
    const path = join(folder, 'file');
    writeFileSync(path, 'precious');
    await expect(open(null, path)).rejects.toThrow(/is no socket/);
    expect(statSync(path).size).toBe(8);
  });

  it('says so when its folder cannot be made', async () => {
    writeFileSync(join(folder, 'file'), '');
    await expect(open(null, join(folder, 'file', 'd.sock'))).rejects.toThrow(/^DETOUR_SOCKET=.*cannot be made/);
  });
});

describe('asking', () => {
  it('tells an absent daemon from a silent one', async () => {
    await expect(askDaemon(join(folder, 'none'), '/')).rejects.toMatchObject({ name: 'NoDaemon', reason: 'absent' });
    const mute = createServer();
    await new Promise<void>((resolve) => mute.listen(join(folder, 'mute'), resolve));
    const attempt = askDaemon(join(folder, 'mute'), '/', 50);
    await expect(attempt).rejects.toBeInstanceOf(NoDaemon);
    await expect(attempt).rejects.toMatchObject({ reason: 'silent' });
    mute.close();
  });
});
