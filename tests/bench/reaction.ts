import { createHash } from 'node:crypto';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Daemon, newKey } from '../lab/daemons.ts';
import { Lab, waitUntil } from '../lab/netns.ts';
import { holdConnections, startServer } from '../lab/traffic.ts';
import { detourWorld, waitForDetours } from '../lab/world.ts';
import { type Figure, note, quantile } from './figures.ts';

/** Open in the end, the measured ones included: a router lets one client have 1,024 flows, closing ones included. */
const OPEN = 1000;
const MEASURED = 200;
const EVERY_MS = 25;
const SERVER_PORT = 5000;

/**
 * From the kernel's ESTABLISHED event to the first SYN to the detour, with up to 1,000 connections open and the lease cached. Both
 * moments are read from one packet capture: the kernel raises the event while it processes the first packet after the SYN/ACK
 * (the server's first data acknowledgement), so the time from that packet's arrival is never too short.
 */
export async function measureReaction(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.reaction');
  const world = await detourWorld(lab);
  const { client, detour, server } = world;
  await startServer(server);
  const key = newKey();
  await using _router = await Daemon.start(detour, 'router', { keys: key, env: world.routerEnv });
  await using agent = await Daemon.start(client, 'client', { keys: key, env: world.clientEnv });
  await waitForDetours(agent, 1);
  const to = `${world.serverAddress}:${SERVER_PORT}`;
  // One after the other here too: a router takes 50 new subflows a second from one client.
  await holdConnections(client, { to, count: OPEN - MEASURED, everyMs: EVERY_MS });
  const joined = ['ss', '-tnH', 'state', 'established', 'dst', world.detourAddress];
  await waitUntil(async () => (await client.exec(joined)).trim().split('\n').length >= OPEN - MEASURED, {
    deadlineMs: 60_000,
    what: `${OPEN - MEASURED} connections to have a subflow through the detour`,
    everyMs: 250,
  });
  const folder = await mkdtemp(join(tmpdir(), 'detour-bench-'));
  try {
    const file = join(folder, 'capture.pcap');
    const capture = client.spawn([
      'tcpdump',
      '-i',
      'to-gateway',
      '-Z',
      'root',
      '-s',
      '128',
      '-U',
      '--immediate-mode',
      '--time-stamp-precision=nano',
      '-w',
      file,
      'tcp',
    ]);
    await capture.waitFor('listening on');
    await holdConnections(client, { to, count: MEASURED, everyMs: EVERY_MS });
    await waitUntil(async () => (await client.exec(joined)).trim().split('\n').length >= OPEN, {
      deadlineMs: 20_000,
      what: 'the measured connections to have a subflow through the detour',
      everyMs: 100,
    });
    const resident = await agent.residentBytes();
    await capture.stop('SIGINT');
    const delays = reactionDelays(await readFile(file), SERVER_PORT);
    note(`reaction: ${delays.length} of ${MEASURED} seen, longest ${Math.max(...delays).toFixed(1)} ms`);
    if (delays.length < MEASURED * 0.95) throw new Error(`only ${delays.length} of ${MEASURED} connections got a join`);
    const name = `ESTABLISHED to the detour's SYN, ${OPEN - MEASURED} to ${OPEN} connections open`;
    return [
      { name: `${name}, p50`, value: quantile(delays, 0.5), unit: 'ms', target: { atMost: 5 } },
      { name: `${name}, p99`, value: quantile(delays, 0.99), unit: 'ms', target: { atMost: 20 } },
      {
        name: `agent: resident memory, ${OPEN} connections`,
        value: resident / 2 ** 20,
        unit: 'MB',
        target: { atMost: 96 },
      },
    ];
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

type Segment = {
  readonly ms: number;
  readonly sourcePort: number;
  readonly destinationPort: number;
  readonly syn: boolean;
  readonly ack: boolean;
  /** MPTCP option of the segment: kind 30, without kind and length. */
  readonly mptcp: Buffer | null;
};

/**
 * Milliseconds between the server's first packet after its SYN/ACK and the first SYN with MP_JOIN of the same connection. The
 * join carries the server's token, which is made from the key in the SYN/ACK (RFC 8684, sections 3.1 and 3.2).
 */
function reactionDelays(pcap: Buffer, serverPort: number): number[] {
  const tokens = new Map<number, number>();
  const established = new Map<number, number>();
  const delays = new Map<number, number>();
  for (const segment of segments(pcap)) {
    const subtype = segment.mptcp === null ? -1 : (segment.mptcp[0] ?? 0) >> 4;
    if (segment.sourcePort === serverPort && segment.syn && segment.ack && segment.mptcp !== null && subtype === 0) {
      const key = segment.mptcp.subarray(2, 10);
      tokens.set(segment.destinationPort, createHash('sha256').update(key).digest().readUInt32BE(0));
    } else if (segment.sourcePort === serverPort && !segment.syn) {
      const token = tokens.get(segment.destinationPort);
      if (token !== undefined && !established.has(token)) established.set(token, segment.ms);
    } else if (segment.syn && !segment.ack && segment.mptcp !== null && subtype === 1) {
      const token = segment.mptcp.readUInt32BE(2);
      const since = established.get(token);
      if (since !== undefined && !delays.has(token)) delays.set(token, segment.ms - since);
    }
  }
  return [...delays.values()];
}

/** The TCP segments over IPv4 of a capture in tcpdump's format with nanoseconds (pcap-savefile(5)), Ethernet only. */
function* segments(pcap: Buffer): Generator<Segment> {
  const [magic, ethernet] = [pcap.readUInt32LE(0), 1];
  if (magic !== 0xa1b23c4d || pcap.readUInt32LE(20) !== ethernet)
    throw new Error('the capture has an unexpected format');
  for (let at = 24; at + 16 <= pcap.length; ) {
    const ms = pcap.readUInt32LE(at) * 1000 + pcap.readUInt32LE(at + 4) / 1e6;
    const length = pcap.readUInt32LE(at + 8);
    const frame = pcap.subarray(at + 16, at + 16 + length);
    at += 16 + length;
    if (frame.length < 54 || frame.readUInt16BE(12) !== 0x0800) continue;
    const tcp = frame.subarray(14 + ((frame[14] ?? 0) & 0xf) * 4);
    if (tcp.length < 20) continue;
    const flags = tcp[13] ?? 0;
    yield {
      ms,
      sourcePort: tcp.readUInt16BE(0),
      destinationPort: tcp.readUInt16BE(2),
      syn: (flags & 2) !== 0,
      ack: (flags & 16) !== 0,
      mptcp: mptcpOption(tcp.subarray(20, ((tcp[12] ?? 0) >> 4) * 4)),
    };
  }
}

function mptcpOption(options: Buffer): Buffer | null {
  for (let at = 0; at < options.length; ) {
    const kind = options[at];
    if (kind === 0) return null;
    if (kind === 1) {
      at += 1;
      continue;
    }
    const length = options[at + 1] ?? 0;
    if (length < 2) return null;
    if (kind === 30) return options.subarray(at + 2, at + length);
    at += length;
  }
  return null;
}
