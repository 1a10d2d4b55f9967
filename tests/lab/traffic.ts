/**
 * Traffic for measurements: a server and a client whose transfers are counted where they arrive.
 *
 * As a program (needs nothing but Node, so it can be copied into an image):
 *   node traffic.ts serve --port 5000 [--host ::]
 *   node traffic.ts transfer --to 10.0.0.2:5000 --bytes 1000000 [--seconds 10] [--seed x] [--direction up|down]
 *   node traffic.ts flows --to 10.0.0.2:5000 --count 20 --bytes 10000
 *   node traffic.ts messages --to 10.0.0.2:5000 --count 100 [--every-ms 100] [--size 200]
 *   node traffic.ts hold --to 10.0.0.2:5000 --count 1000 [--every-ms 25]
 * With --congestion NAME its connections, on a server those that it accepts, use that congestion control (needs the package koffi).
 * Every line on standard output is one JSON object with an `event`. Sockets are plain TCP as far as Node knows: started under
 * `mptcpize run` they are Multipath TCP, and `mptcp` in a result says what the kernel made of it.
 * As a module: functions that start it on a host of a lab and hand back typed results.
 */
import { execFile } from 'node:child_process';
import { createCipheriv, createHash } from 'node:crypto';
import { connect, createServer, type Socket } from 'node:net';
import { createInterface } from 'node:readline';
import { setTimeout as delay } from 'node:timers/promises';
import { fileURLToPath } from 'node:url';
import { parseArgs } from 'node:util';
import type { Host, Running } from './netns.ts';

const SLOT_MS = 50;
/** netinet/in.h, netinet/tcp.h */
const IPPROTO_TCP = 6;
const TCP_CONGESTION = 13;
/** Looking starts a program, which is a tenth of a second's work for the emulated processor of the VM. */
const SAMPLE_EVERY_MS = process.env['LAB_VM'] === '1' ? 500 : 100;
const CHUNK_BYTES = 64 * 1024;
/** A header is one short JSON line; whoever sends more without a newline speaks something else. */
const LONGEST_HEADER_BYTES = 1024;

export type Direction = 'up' | 'down';

/** One subflow as the receiver sees it. `bytes` is tcp_info's bytes_received: payload that arrived in order. */
export type PathCount = {
  readonly local: string;
  readonly localPort: number;
  readonly remote: string;
  readonly remotePort: number;
  readonly bytes: number;
};

export type Progress = {
  readonly event: 'progress';
  /** Since the first byte arrived. */
  readonly ms: number;
  readonly bytes: number;
  /** In the order in which they were first seen; a closed subflow keeps its last count. */
  readonly paths: readonly PathCount[];
};

export type TransferResult = {
  readonly event: 'done';
  readonly direction: Direction;
  readonly bytes: number;
  readonly sha256: string;
  /** From the first byte to the last one at the receiver. */
  readonly ms: number;
  readonly mbps: number;
  /** Longest time between two reads that returned data. */
  readonly longestStallMs: number;
  /** When the longest stall began, in ms since the first byte. */
  readonly stallAtMs: number;
  /** Whether the kernel negotiated Multipath TCP: read from sock_diag, not from how the program was started. */
  readonly mptcp: boolean;
  /** Congestion control of the receiver's end, as ss names it. */
  readonly congestion: string;
  readonly paths: readonly PathCount[];
  /** Bytes that arrived in each 50 ms after the first byte. */
  readonly slots: readonly number[];
  readonly series: readonly Progress[];
};

export type MessagesResult = {
  readonly event: 'messages';
  readonly count: number;
  /** Round trips in ms, in the order sent. */
  readonly latencies: readonly number[];
  readonly longestMs: number;
};

export type FlowsResult = {
  readonly event: 'flows';
  readonly bytes: number;
  /** From before the connection was opened until the last byte arrived, in ms, in the order of the flows. */
  readonly completions: readonly number[];
};

type Header =
  | {
      readonly mode: 'transfer';
      readonly direction: Direction;
      readonly bytes: number;
      readonly seed: string;
      /** The receiver ends it after this time, however much has arrived. */
      readonly seconds?: number;
    }
  | { readonly mode: 'echo' };

/** The SHA-256 that a transfer of these bytes must have, computed from the seed alone. */
export function expectedSha256(seed: string, bytes: number): string {
  const hash = createHash('sha256');
  for (const chunk of stream(seed, bytes)) hash.update(chunk);
  return hash.digest('hex');
}

/** The command line that runs this program with the given arguments, over Multipath TCP or plain TCP. */
export function trafficCommand(args: readonly string[], transport: 'mptcp' | 'tcp' = 'mptcp'): string[] {
  const program = [process.execPath, fileURLToPath(import.meta.url), ...args];
  return transport === 'mptcp' ? ['mptcpize', 'run', ...program] : program;
}

/** Starts a server on a host and returns when it listens. */
export async function startServer(
  host: Host,
  options: {
    readonly port?: number;
    readonly address?: string;
    readonly transport?: 'mptcp' | 'tcp';
    readonly congestion?: string;
  } = {},
): Promise<Running> {
  const args = ['serve', '--port', String(options.port ?? 5000), '--host', options.address ?? '::'];
  if (options.congestion !== undefined) args.push('--congestion', options.congestion);
  const server = host.spawn(trafficCommand(args, options.transport));
  await server.waitFor('"listening"');
  return server;
}

export type TransferOptions = {
  /** `10.0.0.2:5000` or `[fd00::2]:5000` */
  readonly to: string;
  readonly bytes: number;
  /** Ends it this long after the first byte arrived, should it not be complete. */
  readonly seconds?: number;
  readonly seed?: string;
  readonly direction?: Direction;
  readonly transport?: 'mptcp' | 'tcp';
  readonly congestion?: string;
};

/** A transfer under way; `result` rejects when the program fails. */
export type Transfer = { readonly program: Running; readonly result: Promise<TransferResult> };

/** Starts a transfer from (or, with direction 'down', to) a host. The numbers are the receiver's. */
export function startTransfer(host: Host, options: TransferOptions): Transfer {
  const args = ['transfer', '--to', options.to, '--bytes', String(options.bytes), '--seed', options.seed ?? 'detour'];
  if (options.seconds !== undefined) args.push('--seconds', String(options.seconds));
  if (options.congestion !== undefined) args.push('--congestion', options.congestion);
  const program = host.spawn(trafficCommand([...args, '--direction', options.direction ?? 'up'], options.transport));
  return { program, result: finalLine<TransferResult>(program, 'done') };
}

/** Sends messages at a steady pace, each echoed by the server, and measures every round trip. */
export function startMessages(
  host: Host,
  options: {
    readonly to: string;
    readonly count: number;
    readonly everyMs?: number;
    readonly transport?: 'mptcp' | 'tcp';
    readonly congestion?: string;
  },
): { readonly program: Running; readonly result: Promise<MessagesResult> } {
  const args = ['messages', '--to', options.to, '--count', String(options.count)];
  if (options.congestion !== undefined) args.push('--congestion', options.congestion);
  const program = host.spawn(
    trafficCommand([...args, '--every-ms', String(options.everyMs ?? 100)], options.transport),
  );
  return { program, result: finalLine<MessagesResult>(program, 'messages') };
}

/** Downloads the same number of bytes over one new connection after the other, and measures how long each takes. */
export function startFlows(
  host: Host,
  options: {
    readonly to: string;
    readonly count: number;
    readonly bytes: number;
    readonly transport?: 'mptcp' | 'tcp';
    readonly congestion?: string;
  },
): { readonly program: Running; readonly result: Promise<FlowsResult> } {
  const args = ['flows', '--to', options.to, '--count', String(options.count), '--bytes', String(options.bytes)];
  if (options.congestion !== undefined) args.push('--congestion', options.congestion);
  const program = host.spawn(trafficCommand(args, options.transport));
  return { program, result: finalLine<FlowsResult>(program, 'flows') };
}

/**
 * Opens many connections, sends a byte each way on each (so that the kernel reports them ESTABLISHED), and holds them
 * until the program is stopped. Writing `check\n` to it makes it send a byte over all of them again and print
 * `{"event":"alive","count":n}`. With `everyMs` they are opened one after the other, that far apart; otherwise 32 at a time.
 */
export async function holdConnections(
  host: Host,
  options: {
    readonly to: string;
    readonly count: number;
    readonly everyMs?: number;
    readonly transport?: 'mptcp' | 'tcp';
  },
): Promise<Running> {
  const args = ['hold', '--to', options.to, '--count', String(options.count)];
  if (options.everyMs !== undefined) args.push('--every-ms', String(options.everyMs));
  const program = host.spawn(trafficCommand(args, options.transport));
  await program.waitFor('"held"', 60_000);
  return program;
}

/**
 * What a program printed at its end. A test that failed before it asked has its reason already: then its lab kills the program, and
 * this rejection, which nobody looks at, must not end the whole run.
 */
function finalLine<T extends { readonly event: string }>(program: Running, event: T['event']): Promise<T> {
  const result = readFinalLine<T>(program, event);
  result.catch(() => undefined);
  return result;
}

async function readFinalLine<T extends { readonly event: string }>(program: Running, event: T['event']): Promise<T> {
  const { code, signal } = await program.exited;
  const line = program.lines.find((candidate) => candidate.startsWith(`{"event":"${event}"`));
  if (code !== 0 || line === undefined) {
    const said = program.errors.slice(-10).join('\n');
    throw new Error(`\`${program.command.join(' ')}\` ended with ${code ?? signal} and no ${event}: ${said}`);
  }
  return JSON.parse(line);
}

/** The keystream of AES-128-CTR under a key made from the seed: incompressible, and anyone can make it again. */
function* stream(seed: string, bytes: number): Generator<Buffer> {
  const key = createHash('sha256').update(seed).digest().subarray(0, 16);
  const cipher = createCipheriv('aes-128-ctr', key, Buffer.alloc(16));
  const zeros = Buffer.alloc(CHUNK_BYTES);
  for (let left = bytes; left > 0; left -= CHUNK_BYTES)
    yield cipher.update(zeros.subarray(0, Math.min(left, CHUNK_BYTES)));
}

function print(line: object): void {
  process.stdout.write(`${JSON.stringify(line)}\n`);
}

type Subflow = PathCount & {
  readonly token: string | undefined;
  readonly negotiated: boolean;
  readonly congestion: string;
};

/** Every TCP socket with a peer in this namespace, with its MPTCP token when it has one. */
async function subflows(): Promise<Subflow[]> {
  // Without the preloaded library of mptcpize, which means nothing to ss.
  const { LD_PRELOAD: _, ...env } = process.env;
  const text = await new Promise<string>((resolve, reject) => {
    execFile('ss', ['-tniOH', 'state', 'connected'], { env, maxBuffer: 64 << 20 }, (error, stdout) =>
      error === null ? resolve(stdout) : reject(error),
    );
  });
  return text.split('\n').flatMap((line) => {
    const match = /^\S+\s+\d+\s+\d+\s+(\S+):(\d+)\s+(\S+):(\d+)/.exec(line);
    if (match === null) return [];
    const mptcp = /tcp-ulp-mptcp flags:(\S*) token:\w+\(id:\d+\)\/(\w+)\(/.exec(line);
    return {
      local: plain(match[1]),
      localPort: Number(match[2]),
      remote: plain(match[3]),
      remotePort: Number(match[4]),
      bytes: Number(/ bytes_received:(\d+)/.exec(line)?.[1] ?? 0),
      token: mptcp?.[2],
      // M: the peer answered MP_CAPABLE; J: MP_JOIN. Neither is set on a connection that fell back to TCP.
      negotiated: /[MJ]/.test(mptcp?.[1] ?? ''),
      congestion: /\s(\w+) wscale:/.exec(line)?.[1] ?? 'unknown',
    };
  });
}

/** An address without brackets, zone and IPv4-in-IPv6 prefix. */
function plain(address: string | undefined): string {
  return (address ?? '')
    .replace(/^\[(.*)\]$/, '$1')
    .replace(/%.*$/, '')
    .replace(/^::ffff:(?=\d+\.)/, '');
}

/** Follows one connection's subflows at the end where the data arrives. */
class PathCounter {
  readonly #socket: Socket;
  readonly #seen = new Map<string, PathCount>();
  #token: string | undefined;
  mptcp = false;
  congestion = 'unknown';

  constructor(socket: Socket) {
    this.#socket = socket;
  }

  get paths(): PathCount[] {
    return [...this.#seen.values()];
  }

  async sample(): Promise<void> {
    const all = await subflows();
    if (this.#token === undefined) {
      const own = all.find(
        (one) =>
          one.localPort === this.#socket.localPort &&
          one.remotePort === this.#socket.remotePort &&
          one.remote === plain(this.#socket.remoteAddress),
      );
      if (own === undefined) return;
      this.mptcp = own.negotiated;
      this.congestion = own.congestion;
      this.#token = own.token ?? '';
      if (own.token === undefined) this.#keep(own);
    }
    for (const one of all) {
      const mine = this.#token === '' ? this.#seen.has(nameOf(one)) : one.token === this.#token;
      if (mine) this.#keep(one);
    }
  }

  #keep({ local, localPort, remote, remotePort, bytes }: Subflow): void {
    const path = { local, localPort, remote, remotePort, bytes };
    this.#seen.set(nameOf(path), path);
  }
}

function nameOf(path: PathCount): string {
  return `${path.local} ${path.localPort} ${path.remote} ${path.remotePort}`;
}

/** Counts and hashes `bytes` bytes from the socket, reporting about ten times a second. */
async function receive(socket: Socket, first: Buffer, header: Header & { mode: 'transfer' }): Promise<TransferResult> {
  const counter = new PathCounter(socket);
  const hash = createHash('sha256');
  const slots: number[] = [];
  const series: Progress[] = [];
  const complete = Promise.withResolvers<void>();
  let [bytes, start, previous, longestStallMs, stallAtMs] = [0, 0, 0, 0, 0];
  const limitMs = header.seconds === undefined ? Number.POSITIVE_INFINITY : header.seconds * 1000;
  let end: NodeJS.Timeout | undefined;
  let over = false;
  const finish = (): void => {
    over = true;
    complete.resolve();
  };
  const expire = (): void => {
    // A silence that lasts until the end is one, too.
    if (start + limitMs - previous > longestStallMs) {
      [longestStallMs, stallAtMs] = [start + limitMs - previous, previous - start];
    }
    while (slots.length < limitMs / SLOT_MS) slots.push(0);
    previous = start + limitMs;
    finish();
  };
  const take = (chunk: Buffer): void => {
    // What comes after the end is on its way to be thrown away.
    const now = performance.now();
    if (chunk.length === 0 || over || (bytes > 0 && now - start >= limitMs)) return;
    if (bytes === 0) {
      start = now;
      if (header.seconds !== undefined) end = setTimeout(expire, limitMs);
    } else if (now - previous > longestStallMs) {
      longestStallMs = now - previous;
      stallAtMs = previous - start;
    }
    previous = now;
    bytes += chunk.length;
    hash.update(chunk);
    const slot = Math.floor((now - start) / SLOT_MS);
    while (slots.length <= slot) slots.push(0);
    slots[slot] = (slots[slot] ?? 0) + chunk.length;
    if (bytes >= header.bytes) finish();
  };
  const report = async (): Promise<void> => {
    await counter.sample();
    if (bytes === 0) return;
    // The last one counts until the last byte, not until it was looked at.
    const ms = (over ? previous : performance.now()) - start;
    const progress: Progress = { event: 'progress', ms, bytes, paths: counter.paths };
    series.push(progress);
    print(progress);
  };
  const sampler = new AbortController();
  const sampling = (async () => {
    while (!sampler.signal.aborted) {
      await report();
      await delay(SAMPLE_EVERY_MS, undefined, { signal: sampler.signal }).catch(() => undefined);
    }
  })();
  sampling.catch((error: unknown) => complete.reject(error));
  try {
    take(first);
    socket.on('data', take);
    socket.on('error', complete.reject);
    socket.once('close', () => complete.reject(new Error(`closed after ${bytes} of ${header.bytes} bytes`)));
    socket.resume();
    await complete.promise;
    sampler.abort();
    await sampling;
    // Once more while the subflows are still open, so that the last bytes are attributed too.
    await report();
  } finally {
    sampler.abort();
    clearTimeout(end);
  }
  const ms = previous - start;
  return {
    event: 'done',
    direction: header.direction,
    bytes,
    sha256: hash.digest('hex'),
    ms,
    mbps: (bytes * 8) / 1000 / ms,
    longestStallMs,
    stallAtMs,
    mptcp: counter.mptcp,
    congestion: counter.congestion,
    paths: counter.paths,
    slots,
    series,
  };
}

async function send(socket: Socket, header: Header & { mode: 'transfer' }): Promise<void> {
  for (const chunk of stream(header.seed, header.bytes)) {
    if (socket.write(chunk)) continue;
    await new Promise<void>((resolve, reject) => {
      const settle = (): void => {
        socket.off('drain', settle).off('close', settle);
        if (socket.destroyed) reject(new Error('the connection closed while sending'));
        else resolve();
      };
      socket.once('drain', settle).once('close', settle);
    });
  }
}

/** The first line from the socket, and what came behind it. */
function readLine(socket: Socket): Promise<{ line: string; rest: Buffer }> {
  return new Promise((resolve, reject) => {
    let held = Buffer.alloc(0);
    const stop = (): void => {
      socket.off('data', take).off('close', closed);
      socket.pause();
    };
    const take = (chunk: Buffer): void => {
      held = Buffer.concat([held, chunk]);
      const end = held.indexOf(10);
      if (end >= 0) {
        stop();
        resolve({ line: held.subarray(0, end).toString(), rest: held.subarray(end + 1) });
      }
    };
    const closed = (): void => reject(new Error('closed before a line was complete'));
    socket.on('data', take).once('close', closed);
    socket.resume();
  });
}

type Choose = (socket: Socket) => void;

/** Every program of a network namespace may use what the host allows; root may use all that the kernel has. */
async function chooserOf(congestion: string | undefined): Promise<Choose> {
  if (congestion === undefined) return () => undefined;
  const { default: koffi } = await import('koffi');
  const setsockopt = koffi.load('libc.so.6').func('int setsockopt(int, int, int, const char *, unsigned int)');
  return (socket) => {
    // Node keeps the descriptor to itself.
    const { fd } = (socket as unknown as { readonly _handle: { readonly fd: number } })._handle;
    if (setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, congestion, congestion.length) !== 0)
      throw new Error(`this kernel does not let us use ${congestion}`);
  };
}

function serve(port: number, host: string, choose: Choose): void {
  const server = createServer({ allowHalfOpen: false, noDelay: true }, (socket) => {
    choose(socket);
    socket.on('error', (error) => print({ event: 'error', message: error.message }));
    answer(socket).catch((error: unknown) => {
      socket.destroy();
      print({ event: 'error', message: error instanceof Error ? error.message : String(error) });
    });
  });
  server.listen(port, host, 4096, () => print({ event: 'listening', port }));
}

async function answer(socket: Socket): Promise<void> {
  const { line, rest } = await readLine(socket);
  if (line.length > LONGEST_HEADER_BYTES) throw new Error('the header is too long');
  const header: Header = JSON.parse(line);
  if (header.mode === 'echo') {
    if (rest.length > 0) socket.write(rest);
    socket.pipe(socket);
  } else if (header.direction === 'up') {
    const result = await receive(socket, rest, header);
    print(result);
    socket.end(`${JSON.stringify(result)}\n`);
  } else {
    await send(socket, header);
    await readLine(socket);
    socket.end();
  }
}

async function open(to: string, header: Header, choose: Choose = () => undefined): Promise<Socket> {
  const match = /^\[?([^\]]+)\]?:(\d+)$/.exec(to);
  if (match === null) throw new Error(`--to ${to}: give address:port or [v6]:port`);
  const socket = connect({ host: match[1] ?? '', port: Number(match[2]), noDelay: true });
  await new Promise<void>((resolve, reject) => {
    socket.once('connect', resolve).once('error', reject);
  });
  choose(socket);
  socket.write(`${JSON.stringify(header)}\n`);
  return socket;
}

async function transfer(to: string, header: Header & { mode: 'transfer' }, choose: Choose): Promise<void> {
  const socket = await open(to, header, choose);
  print({ event: 'connected', localPort: socket.localPort });
  const failed = new Promise<never>((_, reject) => socket.once('error', reject));
  if (header.direction === 'up') {
    const reply = readLine(socket);
    // With a limit of time the answer comes before all is sent.
    const sending = send(socket, header).catch((error: unknown) => {
      if (header.seconds === undefined) throw error;
    });
    const { line } = await Promise.race([failed, header.seconds === undefined ? sending.then(() => reply) : reply]);
    process.stdout.write(`${line}\n`);
    // What the kernel still holds would go on for seconds.
    if (header.seconds !== undefined) socket.resetAndDestroy();
  } else {
    const result = await Promise.race([failed, receive(socket, Buffer.alloc(0), header)]);
    print(result);
    if (header.seconds === undefined) socket.end('done\n');
    else socket.resetAndDestroy();
  }
  socket.destroySoon();
}

async function flows(to: string, count: number, bytes: number, choose: Choose): Promise<void> {
  const completions: number[] = [];
  while (completions.length < count) {
    const start = performance.now();
    const socket = await open(to, { mode: 'transfer', direction: 'down', bytes, seed: 'detour' }, choose);
    if (completions.length === 0) print({ event: 'connected', localPort: socket.localPort });
    await new Promise<void>((resolve, reject) => {
      let arrived = 0;
      socket.on('data', (chunk: Buffer) => {
        arrived += chunk.length;
        if (arrived >= bytes) resolve();
      });
      socket.once('error', reject).once('close', () => reject(new Error(`closed after ${arrived} of ${bytes} bytes`)));
    });
    completions.push(performance.now() - start);
    const closed = new Promise((resolve) => socket.once('close', resolve));
    socket.end('done\n');
    await closed;
  }
  print({ event: 'flows', bytes, completions } satisfies FlowsResult);
}

async function messages(to: string, count: number, everyMs: number, size: number, choose: Choose): Promise<void> {
  const socket = await open(to, { mode: 'echo' }, choose);
  print({ event: 'connected', localPort: socket.localPort });
  const latencies: number[] = [];
  const sent: number[] = [];
  const complete = Promise.withResolvers<void>();
  let echoed = 0;
  socket.once('error', complete.reject);
  socket.once('close', () => complete.reject(new Error(`closed after ${latencies.length} of ${count} messages`)));
  socket.on('data', (chunk: Buffer) => {
    echoed += chunk.length;
    while (latencies.length < Math.floor(echoed / size)) {
      latencies.push(performance.now() - (sent[latencies.length] ?? 0));
    }
    if (latencies.length >= count) complete.resolve();
  });
  const start = performance.now();
  for (let index = 0; index < count; index += 1) {
    // Against the start, so that one late message does not shift the pace of the others.
    await delay(Math.max(0, start + index * everyMs - performance.now()));
    sent.push(performance.now());
    socket.write(Buffer.alloc(size, index & 0xff));
  }
  await complete.promise;
  print({ event: 'messages', count, latencies, longestMs: Math.max(...latencies) } satisfies MessagesResult);
  socket.destroy();
}

async function hold(to: string, count: number, everyMs: number): Promise<void> {
  const sockets: Socket[] = [];
  let started = 0;
  const ping = (socket: Socket): Promise<boolean> =>
    new Promise((resolve) => {
      const finish = (alive: boolean) => (): void => {
        socket.off('data', heard).off('close', closed);
        resolve(alive);
      };
      const [heard, closed] = [finish(true), finish(false)];
      socket.once('data', heard).once('close', closed);
      if (socket.destroyed) closed();
      else socket.write('.');
    });
  const openSome = async (): Promise<void> => {
    while (started < count) {
      started += 1;
      if (everyMs > 0) await delay(everyMs);
      const socket = await open(to, { mode: 'echo' });
      socket.on('error', (error) => print({ event: 'error', message: error.message }));
      sockets.push(socket);
      if (!(await ping(socket))) throw new Error('a connection closed while it was set up');
    }
  };
  await Promise.all(Array.from({ length: everyMs > 0 ? 1 : 32 }, openSome));
  print({ event: 'held', count });
  for await (const line of createInterface({ input: process.stdin })) {
    if (line.trim() !== 'check') continue;
    const alive = await Promise.all(sockets.map(ping));
    print({ event: 'alive', count: alive.filter(Boolean).length });
  }
}

async function main(): Promise<void> {
  const { positionals, values } = parseArgs({
    allowPositionals: true,
    options: {
      port: { type: 'string', default: '5000' },
      host: { type: 'string', default: '::' },
      to: { type: 'string', default: '' },
      bytes: { type: 'string', default: '1000000' },
      seconds: { type: 'string' },
      seed: { type: 'string', default: 'detour' },
      direction: { type: 'string', default: 'up' },
      count: { type: 'string', default: '100' },
      'every-ms': { type: 'string' },
      size: { type: 'string', default: '200' },
      congestion: { type: 'string' },
    },
  });
  const choose = await chooserOf(values.congestion);
  switch (positionals[0]) {
    case 'serve':
      return serve(Number(values.port), values.host, choose);
    case 'transfer': {
      const direction = values.direction === 'down' ? 'down' : 'up';
      const seconds = values.seconds === undefined ? {} : { seconds: Number(values.seconds) };
      const bytes = Number(values.bytes);
      return transfer(values.to, { mode: 'transfer', direction, bytes, seed: values.seed, ...seconds }, choose);
    }
    case 'flows':
      return flows(values.to, Number(values.count), Number(values.bytes), choose);
    case 'messages':
      return messages(values.to, Number(values.count), Number(values['every-ms'] ?? 100), Number(values.size), choose);
    case 'hold':
      return hold(values.to, Number(values.count), Number(values['every-ms'] ?? 0));
    default:
      throw new Error(`unknown command '${positionals[0] ?? ''}': use serve, transfer, flows, messages or hold`);
  }
}

if (import.meta.main) {
  try {
    await main();
  } catch (error) {
    console.error(error instanceof Error ? error.message : error);
    process.exit(1);
  }
}
