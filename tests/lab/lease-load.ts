/**
 * Asks a router for many leases from many addresses, as fast as it is told, and measures how long each takes.
 *   node lease-load.ts --router 10.9.1.2:45672 --keys FILE --clients 10.9.1.16 --count 240 --leases 250 --rate 1000 [--seconds 10]
 * `FILE` has one key a line; client n has the address `clients` + n and the n-th key. First every client gets `leases`
 * leases (one destination each), then for `seconds` leases are renewed at `rate` a second. Prints one JSON line for each
 * phase. The router's own limits (20 new leases a second and key, 50 datagrams a second and address) apply.
 */
import { createSocket, type Socket } from 'node:dgram';
import { readFileSync } from 'node:fs';
import { parseArgs } from 'node:util';
import { formatAddress, parseAddress, parseEndpoint } from '../../appliance/protocol/address.ts';
import {
  decodeResponse,
  deriveKeys,
  encodeRequest,
  type Keys,
  PROTOCOL_TCP,
  resultName,
  TYPE,
} from '../../appliance/protocol/control.ts';
import { readKey } from './speaker.ts';

const PATIENCE_MS = 3_000;

type Client = {
  readonly keys: Keys;
  readonly socket: Socket;
  readonly session: bigint;
  sequence: bigint;
  cookie: Uint8Array;
  readonly waiting: Map<bigint, (bytes: Uint8Array) => void>;
};

const { values } = parseArgs({
  options: {
    router: { type: 'string' },
    keys: { type: 'string' },
    clients: { type: 'string' },
    count: { type: 'string', default: '240' },
    leases: { type: 'string', default: '250' },
    rate: { type: 'string', default: '1000' },
    seconds: { type: 'string', default: '10' },
    destination: { type: 'string', default: '10.9.2.1' },
  },
});
const router = parseEndpoint(values.router ?? '');
const first = parseAddress(values.clients ?? '');
const destination = parseAddress(values.destination);
if (!router || !first || !destination || !values.keys)
  throw new Error('--router, --keys, --clients: see the comment above');
const lines = readFileSync(values.keys, 'utf8').split(/\s+/).filter(Boolean);
const [count, perClient, rate, seconds] = [values.count, values.leases, values.rate, values.seconds].map(Number) as [
  number,
  number,
  number,
  number,
];

async function open(index: number): Promise<Client> {
  const key = readKey(lines[index % lines.length] ?? '');
  const socket = createSocket(first?.family === 6 ? 'udp6' : 'udp4');
  const address = { family: first?.family ?? 4, value: (first?.value ?? 0n) + BigInt(index) } as const;
  await new Promise<void>((resolve) => socket.bind({ address: formatAddress(address), port: 0 }, resolve));
  const waiting = new Map<bigint, (bytes: Uint8Array) => void>();
  socket.on('message', (bytes) => waiting.get(bytes.readBigUInt64BE(16))?.(bytes));
  const session = BigInt(Date.now()) * 1000n + BigInt(index);
  return { keys: deriveKeys(key.id, key.secret), socket, session, sequence: 0n, cookie: new Uint8Array(16), waiting };
}

/** The result's name and the milliseconds it took. */
async function ask(client: Client, type: number, port: number): Promise<{ result: string; ms: number }> {
  client.sequence += 1n;
  const sequence = client.sequence;
  const bytes = encodeRequest(
    {
      type,
      flags: 0,
      keyId: client.keys.id,
      session: client.session,
      sequence,
      cookie: client.cookie,
      lifetime: 600,
      vmin: 2,
      vmax: 2,
      destination: type === TYPE.LEASE && destination ? { address: destination, port } : null,
      suggestedPort: 0,
      protocol: type === TYPE.LEASE ? PROTOCOL_TCP : 0,
    },
    client.keys,
  );
  const { promise, resolve } = Promise.withResolvers<Uint8Array | null>();
  client.waiting.set(sequence, resolve);
  const timer = setTimeout(() => resolve(null), PATIENCE_MS);
  const start = performance.now();
  client.socket.send(bytes, router?.port, formatAddress(router?.address ?? { family: 4, value: 0n }));
  const answer = await promise;
  const ms = performance.now() - start;
  clearTimeout(timer);
  client.waiting.delete(sequence);
  const response = answer && decodeResponse(answer, client.keys, bytes);
  if (!response) return { result: 'silence', ms };
  client.cookie = response.cookie;
  return { result: resultName(response.result), ms };
}

/** Runs `total` tasks at `perSecond`, and says what came of them. */
async function paced(
  name: string,
  total: number,
  perSecond: number,
  task: (n: number) => Promise<{ result: string; ms: number }>,
): Promise<void> {
  const start = performance.now();
  const results = new Map<string, number>();
  const times: number[] = [];
  const open = new Set<Promise<void>>();
  for (let n = 0; n < total; ) {
    const due = Math.min(total, Math.floor(((performance.now() - start) / 1000) * perSecond));
    for (; n < due; n++) {
      const one: Promise<void> = task(n).then(({ result, ms }) => {
        results.set(result, (results.get(result) ?? 0) + 1);
        times.push(ms);
        open.delete(one);
      });
      open.add(one);
    }
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
  await Promise.all(open);
  times.sort((a, b) => a - b);
  const at = (share: number): number =>
    Number((times[Math.min(times.length - 1, Math.floor(times.length * share))] ?? 0).toFixed(2));
  const elapsed = (performance.now() - start) / 1000;
  process.stdout.write(
    `${JSON.stringify({ phase: name, total, perSecond: Math.round(total / elapsed), p50: at(0.5), p99: at(0.99), worst: at(1), results: Object.fromEntries(results) })}\n`,
  );
}

const clients = await Promise.all(Array.from({ length: count }, (_, index) => open(index)));
const pick = (n: number): Client => clients[n % count] as Client;
await paced('hello', count, 1000, (n) => ask(pick(n), TYPE.HELLO, 0));
await paced('create', count * perClient, rate, (n) => ask(pick(n), TYPE.LEASE, 1000 + Math.floor(n / count)));
await paced('renew', rate * seconds, rate, (n) => ask(pick(n), TYPE.LEASE, 1000 + (Math.floor(n / count) % perClient)));
for (const { socket } of clients) socket.close();
