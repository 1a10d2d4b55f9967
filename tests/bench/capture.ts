/** Packet captures as measurements read them: TCP segments over IPv4, with what Multipath TCP says in them. */
import { createHash } from 'node:crypto';
import { mkdtemp, readFile, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type { Host } from '../lab/netns.ts';

/** One TCP segment, on whichever interface it was seen. Ends are `10.0.0.1:5000`. */
export type Segment = {
  readonly ms: number;
  readonly from: string;
  readonly to: string;
  readonly syn: boolean;
  readonly ack: boolean;
  /** Bytes of payload. */
  readonly payload: number;
  /** Its MPTCP option (kind 30) without kind and length. */
  readonly mptcp: Buffer | null;
};

/** How one connection came by its second path, in milliseconds of the client's clock. Null is what never happened. */
export type JoinTimes = {
  /** The SYN that opened the connection. */
  readonly opened: number;
  /** The server's first packet after its SYN/ACK, which is what makes the kernel call the connection established. */
  readonly established: number | null;
  /** The first SYN with MP_JOIN. */
  readonly joined: number | null;
  /** The first payload that arrived by that join. */
  readonly carried: number | null;
};

/** Snaplen: more than all headers and options. */
const SNAP_BYTES = 192;
/** pcap-savefile(5): nanoseconds, written by a little-endian machine. */
const MAGIC = 0xa1b23c4d;
const FILE_HEADER_BYTES = 24;
const PACKET_HEADER_BYTES = 16;
/** LINKTYPE_LINUX_SLL2 of pcap-linktype(7): 20 bytes, which begin with the protocol. It is what `any` has. */
const LINKTYPE_SLL2 = 276;
const SLL2_BYTES = 20;
const ETHERTYPE_IPV4 = 0x0800;
/** RFC 8684, section 3: subtypes of the option. */
const MP_CAPABLE = 0;
const MP_JOIN = 1;

/** Runs `task` while all TCP on all interfaces of a host is captured, and returns the segments in the order of their times. */
export async function capturing(host: Host, task: () => Promise<void>): Promise<Segment[]> {
  const folder = await mkdtemp(join(tmpdir(), 'detour-bench-'));
  try {
    const file = join(folder, 'capture.pcap');
    const capture = host.spawn([
      ...['tcpdump', '-i', 'any', '-y', 'LINUX_SLL2', '-Z', 'root', '-s', String(SNAP_BYTES)],
      ...['-U', '--immediate-mode', '--time-stamp-precision=nano', '-w', file, 'tcp'],
    ]);
    await capture.waitFor('listening on');
    await task();
    await capture.stop('SIGINT');
    return [...segmentsOf(await readFile(file))];
  } finally {
    await rm(folder, { recursive: true, force: true });
  }
}

/**
 * The times of every connection to `servers` (`10.0.0.2:5000`) that a client's capture has the beginning of. A join carries the server's token,
 * which is made from the key in its SYN/ACK (RFC 8684, sections 3.1 and 3.2).
 */
export function joinTimes(segments: readonly Segment[], servers: ReadonlySet<string>): JoinTimes[] {
  const opened = new Map<string, number>();
  const tokens = new Map<string, number>();
  const connections = new Map<number, { -readonly [Key in keyof JoinTimes]: JoinTimes[Key] }>();
  const joins = new Map<string, number>();
  for (const { ms, from, to, syn, ack, payload, mptcp } of segments) {
    const subtype = mptcp === null ? -1 : (mptcp[0] ?? 0) >> 4;
    if (syn && !ack && subtype === MP_CAPABLE && servers.has(to) && !opened.has(from)) opened.set(from, ms);
    else if (syn && ack && subtype === MP_CAPABLE && mptcp && servers.has(from) && !tokens.has(to)) {
      const token = createHash('sha256').update(mptcp.subarray(2, 10)).digest().readUInt32BE(0);
      const since = opened.get(to);
      if (since === undefined) continue;
      tokens.set(to, token);
      connections.set(token, { opened: since, established: null, joined: null, carried: null });
    } else if (syn && !ack && subtype === MP_JOIN && mptcp) {
      const token = mptcp.readUInt32BE(2);
      const connection = connections.get(token);
      if (!connection) continue;
      joins.set(`${from} ${to}`, token);
      connection.joined ??= ms;
    } else if (!syn) {
      const token = servers.has(from) ? tokens.get(to) : undefined;
      const connection = connections.get(token ?? -1);
      if (connection) connection.established ??= ms;
      const joining = connections.get(joins.get(`${to} ${from}`) ?? -1);
      if (joining && payload > 0) joining.carried ??= ms;
    }
  }
  return [...connections.values()];
}

function* segmentsOf(pcap: Buffer): Generator<Segment> {
  if (pcap.readUInt32LE(0) !== MAGIC || (pcap.readUInt32LE(20) & 0xffff) !== LINKTYPE_SLL2)
    throw new Error('the capture has an unexpected format');
  for (let at = FILE_HEADER_BYTES; at + PACKET_HEADER_BYTES <= pcap.length; ) {
    const ms = pcap.readUInt32LE(at) * 1000 + pcap.readUInt32LE(at + 4) / 1e6;
    const length = pcap.readUInt32LE(at + 8);
    const frame = pcap.subarray(at + PACKET_HEADER_BYTES, at + PACKET_HEADER_BYTES + length);
    at += PACKET_HEADER_BYTES + length;
    if (frame.length < SLL2_BYTES + 40 || frame.readUInt16BE(0) !== ETHERTYPE_IPV4) continue;
    const ip = frame.subarray(SLL2_BYTES);
    const ipBytes = ((ip[0] ?? 0) & 0xf) * 4;
    const tcp = ip.subarray(ipBytes);
    if (tcp.length < 20) continue;
    const tcpBytes = ((tcp[12] ?? 0) >> 4) * 4;
    const flags = tcp[13] ?? 0;
    const end = (offset: number, port: number): string => `${ip.subarray(offset, offset + 4).join('.')}:${port}`;
    yield {
      ms,
      from: end(12, tcp.readUInt16BE(0)),
      to: end(16, tcp.readUInt16BE(2)),
      syn: (flags & 2) !== 0,
      ack: (flags & 16) !== 0,
      payload: ip.readUInt16BE(2) - ipBytes - tcpBytes,
      mptcp: mptcpOption(tcp.subarray(20, tcpBytes)),
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
