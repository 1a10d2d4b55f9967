/**
 * A crowd of clients in one process: each has a key, a source address and a socket, and speaks the real protocol.
 *
 *   node load.ts '{"router":"10.80.0.254","port":45672,"sources":["10.80.0.1"],"keys":["id:secret"],"leasesPerKey":240,...}'
 *
 * Reads commands from standard input, one a line, and answers each with one JSON line:
 *   hello                      authenticates every client
 *   fill RATE                  asks for every lease it does not hold, but the spare ones, RATE a second
 *   sustain RATE SECONDS       RATE requests a second: renewals, and one in five a new lease while there are spare ones
 *   churn RATE SECONDS         the same with one request in twenty giving a lease back
 *   probe                      asks for one known lease again and again until it is granted: how long the router was away
 * Requests leave when they are due, whatever is still unanswered, so a slow router does not slow the question.
 */
import { randomBytes } from 'node:crypto';
import { createSocket, type Socket } from 'node:dgram';
import { createInterface } from 'node:readline';
import { setTimeout as delay } from 'node:timers/promises';
import { parseAddress } from '../../appliance/protocol/address.ts';
import {
  decodeResponse,
  deriveKeys,
  encodeRequest,
  type Keys,
  PROTOCOL_TCP,
  RESULT,
  type Response,
  resultName,
  TYPE,
} from '../../appliance/protocol/control.ts';

export type LoadOptions = {
  readonly router: string;
  readonly port: number;
  readonly sources: readonly string[];
  /** As many as sources. */
  readonly keys: readonly string[];
  readonly leasesPerKey: number;
  /** Further leases of each key, for new ones while the others are live. */
  readonly sparePerKey: number;
  /** Leases are for this server's ports 1000 and up. */
  readonly destination: string;
  readonly lifetimeS: number;
};

export type LoadResult = {
  readonly event: string;
  /** Requests sent and granted. */
  readonly granted: number;
  /** Granted requests a second, over the time from the first request to the last answer. */
  readonly perSecond: number;
  /** From sending to the answer, ms; for a request that was sent again, from the first time. */
  readonly p50: number;
  readonly p99: number;
  readonly longest: number;
  readonly resent: number;
  readonly unanswered: number;
  readonly refusals: Readonly<Record<string, number>>;
};

/** As the protocol says: first retransmission after 250 ms, doubling, five tries. */
const RETRY_MS = [250, 500, 1000, 2000, 4000];
/** While a router is away, a question every so often and no repetition: it would meet the router's limit of 50 a second. */
const PROBE_MS = [50];
const PING_EVERY_MS = 25_000;

type Lease = { readonly port: number; detourPort: number; held: boolean; asked: boolean };

class Client {
  readonly leases: Lease[];
  readonly #socket: Socket;
  readonly #keys: Keys;
  readonly #options: LoadOptions;
  readonly #session = randomBytes(8).readBigUInt64BE();
  readonly #waiting = new Map<bigint, { bytes: Uint8Array; resolve: (response: Response | null) => void }>();
  #sequence = 0n;
  #cookie: Uint8Array = new Uint8Array(16);
  resent = 0;

  private constructor(socket: Socket, key: string, options: LoadOptions) {
    const [id = '', secret = ''] = key.split(':');
    this.#keys = deriveKeys(Number.parseInt(id, 16), Buffer.from(secret, 'base64url'));
    this.#socket = socket;
    this.#options = options;
    this.leases = Array.from({ length: options.leasesPerKey + options.sparePerKey }, (_, index) => ({
      port: 1000 + index,
      detourPort: 0,
      held: false,
      asked: false,
    }));
    socket.on('message', (bytes) => this.#hear(bytes));
    // A router that is away answers with ICMP; the retransmission is the remedy.
    socket.on('error', () => undefined);
  }

  static async open(source: string, key: string, options: LoadOptions): Promise<Client> {
    const socket = createSocket('udp4');
    await new Promise<void>((resolve, reject) => {
      socket.once('error', reject);
      socket.bind(0, source, resolve);
    });
    socket.removeAllListeners('error');
    return new Client(socket, key, options);
  }

  hello(): Promise<Response | null> {
    return this.#ask(TYPE.HELLO, null);
  }

  ping(): Promise<Response | null> {
    return this.#ask(TYPE.PING, null);
  }

  /** Asks for the lease, or renews it. Follows one challenge, as after a restart of the router. */
  async lease(lease: Lease, patience = RETRY_MS): Promise<Response | null> {
    lease.asked = true;
    let response = await this.#ask(TYPE.LEASE, lease, patience);
    if (response?.result === RESULT.CHALLENGE) response = await this.#ask(TYPE.LEASE, lease, patience);
    if (response?.result === RESULT.OK) {
      lease.detourPort = response.port;
      lease.held = true;
    }
    return response;
  }

  async release(lease: Lease): Promise<Response | null> {
    const response = await this.#ask(TYPE.RELEASE, lease);
    if (response?.result === RESULT.OK) lease.held = false;
    return response;
  }

  async #ask(type: number, lease: Lease | null, patience = RETRY_MS): Promise<Response | null> {
    this.#sequence += 1n;
    const sequence = this.#sequence;
    const address = parseAddress(this.#options.destination);
    if (address === null) throw new Error(`destination ${this.#options.destination} is no address`);
    const bytes = encodeRequest(
      {
        type,
        flags: 0,
        keyId: this.#keys.id,
        session: this.#session,
        sequence,
        cookie: type === TYPE.HELLO ? new Uint8Array(16) : this.#cookie,
        lifetime: type === TYPE.LEASE ? this.#options.lifetimeS : 0,
        vmin: 2,
        vmax: 2,
        destination: lease === null ? null : { address, port: lease.port },
        suggestedPort: lease?.detourPort ?? 0,
        protocol: lease === null ? 0 : PROTOCOL_TCP,
      },
      this.#keys,
    );
    const answered = new Promise<Response | null>((resolve) => this.#waiting.set(sequence, { bytes, resolve }));
    const settled = new AbortController();
    const retrying = this.#retry(sequence, bytes, patience, settled.signal);
    const response = await answered;
    settled.abort();
    await retrying;
    return response;
  }

  async #retry(sequence: bigint, bytes: Uint8Array, patience: readonly number[], signal: AbortSignal): Promise<void> {
    for (const [attempt, wait] of patience.entries()) {
      if (attempt > 0) this.resent += 1;
      this.#socket.send(bytes, this.#options.port, this.#options.router);
      await delay(wait, undefined, { signal }).catch(() => undefined);
      if (signal.aborted) return;
    }
    const waiting = this.#waiting.get(sequence);
    this.#waiting.delete(sequence);
    waiting?.resolve(null);
  }

  #hear(bytes: Uint8Array): void {
    const sequence = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).readBigUInt64BE(16);
    const waiting = this.#waiting.get(sequence);
    if (waiting === undefined) return;
    const response = decodeResponse(bytes, this.#keys, waiting.bytes);
    if (response === null) return;
    this.#cookie = response.cookie;
    this.#waiting.delete(sequence);
    waiting.resolve(response);
  }
}

/** Sends `count` requests at a steady rate and reports how they were answered. */
async function drive(
  event: string,
  rate: number,
  count: number,
  clients: readonly Client[],
  request: (index: number) => Promise<Response | null>,
): Promise<LoadResult> {
  const latencies: number[] = [];
  const refusals: Record<string, number> = {};
  const running: Promise<void>[] = [];
  let [unanswered, lastAnswer] = [0, 0];
  const resentBefore = clients.reduce((sum, client) => sum + client.resent, 0);
  const start = performance.now();
  const one = async (index: number): Promise<void> => {
    const sent = performance.now();
    const response = await request(index);
    const now = performance.now();
    if (response === null) {
      unanswered += 1;
    } else if (response.result !== RESULT.OK) {
      refusals[resultName(response.result)] = (refusals[resultName(response.result)] ?? 0) + 1;
    } else {
      latencies.push(now - sent);
      lastAnswer = now;
    }
  };
  for (let sent = 0; sent < count; ) {
    const due = Math.min(count, Math.floor(((performance.now() - start) / 1000) * rate) + 1);
    for (; sent < due; sent += 1) running.push(one(sent));
    await delay(1);
  }
  await Promise.all(running);
  const sorted = latencies.toSorted((a, b) => a - b);
  const at = (share: number): number => sorted[Math.max(0, Math.ceil(share * sorted.length) - 1)] ?? Number.NaN;
  return {
    event,
    granted: latencies.length,
    perSecond: (latencies.length * 1000) / (lastAnswer - start),
    p50: at(0.5),
    p99: at(0.99),
    longest: at(1),
    resent: clients.reduce((sum, client) => sum + client.resent, 0) - resentBefore,
    unanswered,
    refusals,
  };
}

async function main(options: LoadOptions): Promise<void> {
  const clients = await Promise.all(
    options.sources.map((source, index) => Client.open(source, options.keys[index] ?? '', options)),
  );
  const clientOf = (index: number): Client => {
    const client = clients[index % clients.length];
    if (client === undefined) throw new Error('there are no clients');
    return client;
  };
  const leaseOf = (client: Client, index: number): Lease => {
    const lease = client.leases[index % client.leases.length];
    if (lease === undefined) throw new Error('a client has no leases');
    return lease;
  };
  // Keeps the cookies fresh, as every client does; spread out, so that it does not come in bursts.
  let next = 0;
  setInterval(() => clientOf(next++).ping(), PING_EVERY_MS / clients.length).unref();

  process.stdout.write('{"event":"open"}\n');
  for await (const line of createInterface({ input: process.stdin })) {
    const [command, rate = '0', seconds = '0'] = line.trim().split(' ');
    let result: object;
    if (command === 'hello') {
      result = await drive('hello', 500, clients.length, clients, (index) => clientOf(index).hello());
    } else if (command === 'fill') {
      const missing = Array.from({ length: options.leasesPerKey }, (_, index) =>
        clients.map((client) => ({ client, lease: leaseOf(client, index) })),
      )
        .flat()
        .filter(({ lease }) => !lease.held);
      const ask = (index: number): Promise<Response | null> => {
        const { client, lease } = missing[index] ?? {};
        return client === undefined || lease === undefined ? Promise.resolve(null) : client.lease(lease);
      };
      result = await drive('fill', Number(rate), missing.length, clients, ask);
    } else if (command === 'sustain' || command === 'churn') {
      const count = Math.floor(Number(rate) * Number(seconds));
      result = await drive(command, Number(rate), count, clients, (index) => {
        const client = clientOf(index);
        const spare =
          (index + Math.floor(index / clients.length)) % 5 === 0
            ? client.leases.find((lease) => !lease.asked)
            : undefined;
        if (spare !== undefined) return client.lease(spare);
        const lease = leaseOf(client, Math.floor(Math.random() * options.leasesPerKey));
        return command === 'churn' && lease.held && index % 20 === 0 ? client.release(lease) : client.lease(lease);
      });
    } else if (command === 'probe') {
      const client = clientOf(0);
      const lease = leaseOf(client, 0);
      const port = lease.detourPort;
      const start = performance.now();
      let response: Response | null = null;
      while (response?.result !== RESULT.OK) response = await client.lease(lease, PROBE_MS);
      result = { event: 'probe', ms: performance.now() - start, samePort: response.port === port, port: response.port };
    } else {
      throw new Error(`unknown command '${command}'`);
    }
    process.stdout.write(`${JSON.stringify(result)}\n`);
  }
}

if (import.meta.main) await main(JSON.parse(process.argv[2] ?? '{}'));
