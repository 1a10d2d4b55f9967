/**
 * The window into a running daemon: HTTP for probes and Prometheus, a unix socket for the CLI. Both show the same pages,
 * all of them read-only and without secrets.
 */
import { chmodSync, lstatSync, mkdirSync, unlinkSync } from 'node:fs';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { connect } from 'node:net';
import { dirname } from 'node:path';
import { Counter, Gauge, Registry } from 'prom-client';
import { Fatal } from '../exit.ts';
import type { Log } from '../log.ts';
import { formatAddress, formatEndpoint, parseAddress } from '../protocol/address.ts';
import type { CommonSettings, Role } from '../settings.ts';
import { REVISION, VERSION } from '../version.ts';
import type { DaemonView, Json, Readiness } from './daemon.ts';
import { DASHBOARD } from './dashboard.ts';

export type StatusServer = {
  /** The daemon is up: from now on its pages show it. */
  attach(view: DaemonView): void;
  /** The daemon is on its way out: not ready any more, still visible. */
  drain(): void;
  close(): Promise<void>;
};

export type StatusOptions = {
  readonly role: Role;
  readonly settings: Pick<CommonSettings, 'http' | 'socket'>;
  readonly log: Log;
};

/** A page that takes longer shows an error instead: probes and people wait no longer either. */
const PAGE_DEADLINE_MS = 5_000;
const MOST_CONNECTIONS = 64;
const LARGEST_HEADER_BYTES = 8 * 1024;

type Page = { readonly code: number; readonly type: string; readonly body: string };

const json = (code: number, value: Json): Page => ({
  code,
  type: 'application/json; charset=utf-8',
  body: `${JSON.stringify(value)}\n`,
});

const text = (code: number, body: string): Page => ({ code, type: 'text/plain; charset=utf-8', body });

const codeOf = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string' ? error.code : '';

/** Facts about the process itself, under the names that Prometheus's own clients use. */
function processMetrics(role: Role): Registry {
  const registry = new Registry();
  const registers = [registry];
  new Gauge({
    name: 'detour_build_info',
    help: 'Always 1; the labels say what runs.',
    labelNames: ['version', 'revision', 'node_version', 'role'],
    registers,
  }).set({ version: VERSION, revision: REVISION, node_version: process.version, role }, 1);
  new Gauge({
    name: 'process_resident_memory_bytes',
    help: 'Resident memory.',
    registers,
    collect() {
      this.set(process.memoryUsage.rss());
    },
  });
  new Counter({
    name: 'process_cpu_seconds_total',
    help: 'User and system time spent.',
    registers,
    collect() {
      const { user, system } = process.cpuUsage();
      this.reset();
      this.inc((user + system) / 1e6);
    },
  });
  new Gauge({
    name: 'process_start_time_seconds',
    help: 'When the process started, seconds since 1970.',
    registers,
  }).set(Math.round(performance.timeOrigin / 1000));
  return registry;
}

/**
 * Claims the daemon's unix socket and its HTTP address, before the daemon touches anything: whoever holds the socket is
 * the only daemon of its kind here.
 * @throws Fatal when another daemon holds the socket, or an address cannot be had.
 */
export async function openStatus({ role, settings, log }: StatusOptions): Promise<StatusServer> {
  let view: DaemonView | null = null;
  let draining = false;
  const own = processMetrics(role);

  const readiness = (): Readiness => {
    if (draining) return { ready: false, reasons: ['stopping'] };
    return view?.readiness() ?? { ready: false, reasons: ['starting'] };
  };

  let reading: Promise<Json> | null = null;
  /** Many who ask at once share one reading: it may cost a dump of the kernel's tables. */
  const readStatus = (current: DaemonView): Promise<Json> => {
    reading ??= current.status().finally(() => {
      reading = null;
    });
    return reading;
  };

  const pages: Readonly<Record<string, (query: URLSearchParams) => Page | Promise<Page>>> = {
    '/healthz': () => (view ? json(200, { status: 'ok', role }) : json(503, { status: 'starting', role })),
    '/livez': () => json(200, { status: 'ok', role }),
    '/readyz': () => {
      const { ready, reasons } = readiness();
      return json(ready ? 200 : 503, { ready, reasons });
    },
    '/metrics': async () => {
      const parts = [own, ...(view ? [view.metrics] : [])].map((registry) => registry.metrics());
      return {
        code: 200,
        type: Registry.PROMETHEUS_CONTENT_TYPE,
        body: `${(await Promise.all(parts)).join('\n').trimEnd()}\n`,
      };
    },
    '/v1/status': async () => {
      const { ready, reasons } = readiness();
      const head = { version: VERSION, revision: REVISION, role, ready, reasons };
      if (!view) return json(503, head);
      const status = await readStatus(view);
      // Ours first for the reader, and ours last, because only we know whether it is stopping.
      return json(200, typeof status === 'object' && status !== null ? { ...head, ...status, ...head } : head);
    },
    '/v1/explain': async (query) => {
      if (!view) return json(503, { reasons: readiness().reasons });
      if (!view.explain) return text(404, 'a router has nothing to explain\n');
      const address = parseAddress(query.get('address') ?? '');
      const port = query.has('port') ? Number(query.get('port')) : null;
      if (!address || (port !== null && !(Number.isInteger(port) && port >= 1 && port <= 65535)))
        return text(400, 'ask with address=ADDRESS, and port=1..65535 if you like\n');
      return json(200, await view.explain(address, port));
    },
    '/': () => ({ code: 200, type: 'text/html; charset=utf-8', body: DASHBOARD }),
  };

  const pageOf = async (request: IncomingMessage): Promise<Page> => {
    const [path = '', query = ''] = (request.url ?? '').split('?', 2);
    const page = Object.hasOwn(pages, path) ? pages[path] : undefined;
    if (!page) return text(404, 'not found\n');
    if (request.method !== 'GET' && request.method !== 'HEAD') return text(405, 'only GET\n');
    const { promise: late, reject } = Promise.withResolvers<never>();
    const timer = setTimeout(() => reject(new Error('deadline passed')), PAGE_DEADLINE_MS);
    try {
      return await Promise.race([page(new URLSearchParams(query)), late]);
    } catch (error) {
      const reason = error instanceof Error ? error.message : 'unknown error';
      log.error('status-page-failed', { path, reason }, `The page ${path} could not be made`);
      return text(500, 'failed; the log says why\n');
    } finally {
      clearTimeout(timer);
    }
  };

  const answer = async (request: IncomingMessage, response: ServerResponse): Promise<void> => {
    const page = await pageOf(request);
    response.writeHead(page.code, {
      'content-type': page.type,
      'content-length': Buffer.byteLength(page.body),
      'cache-control': 'no-store',
      'x-content-type-options': 'nosniff',
      'content-security-policy':
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'",
      ...(page.code === 405 ? { allow: 'GET, HEAD' } : {}),
    });
    response.end(request.method === 'HEAD' ? undefined : page.body);
    // Nothing reads a body: whatever comes with a request is thrown away with its connection.
    if (request.method !== 'GET' && request.method !== 'HEAD') request.destroy();
  };

  const newServer = (): Server => {
    const server = createServer(
      { maxHeaderSize: LARGEST_HEADER_BYTES, requestTimeout: 5_000, headersTimeout: 5_000, keepAliveTimeout: 5_000 },
      (request, response) => {
        response.on('error', () => {});
        void answer(request, response);
      },
    );
    server.maxConnections = MOST_CONNECTIONS;
    return server;
  };

  const servers: Server[] = [];
  const close = async (): Promise<void> => {
    await Promise.all(
      servers.map((server) => {
        const { promise, resolve } = Promise.withResolvers<void>();
        server.close(() => resolve());
        server.closeAllConnections();
        return promise;
      }),
    );
  };

  try {
    const unix = newServer();
    await claimSocket(unix, settings.socket, role);
    servers.push(unix);
    if (settings.http) {
      const tcp = newServer();
      await listenHttp(tcp, settings.http);
      servers.push(tcp);
      log.info('http-listening', { address: formatEndpoint(settings.http) }, 'Health, metrics and status are served');
    }
  } catch (error) {
    await close();
    throw error;
  }

  return {
    attach(current) {
      view = current;
    },
    drain() {
      draining = true;
    },
    close,
  };
}

function listen(server: Server, options: { path: string } | { host: string; port: number }): Promise<void> {
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  server.once('error', reject);
  server.listen(options, () => {
    server.off('error', reject);
    // Too many open files and the like: the connection is lost, the daemon is not.
    server.on('error', () => {});
    resolve();
  });
  return promise;
}

async function listenHttp(server: Server, address: NonNullable<CommonSettings['http']>): Promise<void> {
  const shown = `DETOUR_HTTP=${formatEndpoint(address)}`;
  const { port } = address;
  try {
    await listen(server, { host: formatAddress(address.address), port });
  } catch (error) {
    const code = codeOf(error);
    // A kernel without IPv6 has no [::]; every address is then every IPv4 address.
    if (code === 'EAFNOSUPPORT' && address.address.value === 0n) return listen(server, { host: '0.0.0.0', port });
    if (code === 'EADDRINUSE') {
      throw new Fatal(78, `${shown}: another program uses this port; set DETOUR_HTTP to another one, or to off`);
    }
    if (code === 'EADDRNOTAVAIL' || code === 'EAFNOSUPPORT') {
      throw new Fatal(78, `${shown}: this machine has no such address; use one of its own, or :${port} for all`);
    }
    if (code === 'EACCES') {
      throw new Fatal(69, `${shown}: ports below 1024 need the capability NET_BIND_SERVICE; use a higher port`);
    }
    throw new Fatal(1, `${shown}: cannot listen (${code || 'unknown error'})`, { cause: error });
  }
}

/** Whether somebody answers at this unix socket. */
function isAnswering(path: string): Promise<boolean> {
  const { promise, resolve } = Promise.withResolvers<boolean>();
  const socket = connect(path);
  socket.once('connect', () => resolve(true));
  socket.once('error', (error) => resolve(codeOf(error) === 'EAGAIN'));
  return promise.finally(() => socket.destroy());
}

/** Binds the unix socket for its owner alone; one left behind by a killed daemon is replaced. */
async function claimSocket(server: Server, path: string, role: Role): Promise<void> {
  const shown = `DETOUR_SOCKET=${path}`;
  const bind = async (): Promise<void> => {
    // Between bind and chmod anyone could connect, so the mask does it; bind happens before listen() returns.
    const before = process.umask(0o177);
    try {
      const bound = listen(server, { path });
      process.umask(before);
      await bound;
      chmodSync(path, 0o600);
    } finally {
      process.umask(before);
    }
  };
  try {
    mkdirSync(dirname(path), { recursive: true, mode: 0o755 });
    await bind();
  } catch (error) {
    const code = codeOf(error);
    if (code !== 'EADDRINUSE') {
      const remedy =
        code === 'EROFS'
          ? 'give the container a tmpfs for it (--tmpfs /run), or name another path'
          : 'name a path that can be written';
      throw new Fatal(code === 'EROFS' ? 69 : 78, `${shown}: cannot be made (${code || 'unknown error'}); ${remedy}`);
    }
    if (!lstatSync(path, { throwIfNoEntry: false })?.isSocket()) {
      throw new Fatal(78, `${shown}: is there and is no socket; name another path, or remove it`);
    }
    if (await isAnswering(path)) {
      throw new Fatal(
        1,
        `another detour ${role} is running here (it answers at ${path}); stop it first, or give this one its own DETOUR_SOCKET, DETOUR_HTTP and network namespace`,
      );
    }
    unlinkSync(path);
    await bind();
  }
}
