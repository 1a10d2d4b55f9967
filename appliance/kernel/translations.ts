import { type Address, type Endpoint, sameEndpoint, writeAddress } from '../protocol/address.ts';
import type { Namespace } from './namespaces.ts';
import { attribute, NetlinkError, openNetlink, PROTOCOL, readAttributes, u8 } from './netlink.ts';

/**
 * Single entries of the connection tracking table of this namespace, by NETLINK_NETFILTER. Numbers:
 * linux/netfilter/nfnetlink{,_conntrack}.h.
 */

type Tuple = { readonly local: Endpoint; readonly remote: Endpoint };

/** What this host's own TCP connections are translated to. `local` and `remote` are as the socket has them. */
export type Translations = {
  /** Who really answers; null when nobody but `remote` does, or nothing is tracked. @throws NetlinkError */
  of(flow: Tuple): Promise<Endpoint | null>;
  /** Forgets the entry, so that the rules are asked anew about the next segment. Harmless without one. @throws NetlinkError */
  forget(flow: Tuple): Promise<void>;
  close(): void;
};

/** NFNL_SUBSYS_CTNETLINK in the high byte, IPCTNL_MSG_CT_* in the low one. */
const GET = 0x101;
const DELETE = 0x102;
const AF_INET = 2;
const AF_INET6 = 10;
const IPPROTO_TCP = 6;
/** struct nfgenmsg */
const HEADER_BYTES = 4;
const TUPLE = { ORIGINAL: 1, REPLY: 2 } as const;
const TUPLE_PART = { IP: 1, PROTO: 2 } as const;
const IP = { V4_SRC: 1, V4_DST: 2, V6_SRC: 3, V6_DST: 4 } as const;
const PROTO = { NUM: 1, SRC_PORT: 2, DST_PORT: 3 } as const;

/** Opens the port. @throws NetlinkError */
export function openTranslations(namespace: Namespace): Translations {
  const socket = openNetlink(PROTOCOL.NETFILTER, { namespace });
  const ask = async (what: string, type: number, flow: Tuple): Promise<Buffer[]> => {
    try {
      return await socket.request(what, type, question(flow));
    } catch (error) {
      if (error instanceof NetlinkError && error.code === 'ENOENT') return [];
      throw error;
    }
  };
  return {
    async of(flow) {
      const [entry] = await ask('reading a tracked connection', GET, flow);
      const answering = entry && readReply(entry);
      return answering && !sameEndpoint(answering, flow.remote) ? answering : null;
    },
    async forget(flow) {
      await ask('forgetting a tracked connection', DELETE, flow);
    },
    close: () => socket.close(),
  };
}

function bytesOf(address: Address): Buffer {
  const bytes = Buffer.alloc(16);
  writeAddress(address, bytes);
  return address.family === 4 ? bytes.subarray(12) : bytes;
}

const u16be = (value: number): Buffer => Buffer.of(value >> 8, value & 255);

function question({ local, remote }: Tuple): Buffer {
  const v4 = remote.address.family === 4;
  const header = Buffer.alloc(HEADER_BYTES);
  header[0] = v4 ? AF_INET : AF_INET6;
  return Buffer.concat([
    header,
    attribute(TUPLE.ORIGINAL, [
      attribute(TUPLE_PART.IP, [
        attribute(v4 ? IP.V4_SRC : IP.V6_SRC, bytesOf(local.address)),
        attribute(v4 ? IP.V4_DST : IP.V6_DST, bytesOf(remote.address)),
      ]),
      attribute(TUPLE_PART.PROTO, [
        attribute(PROTO.NUM, u8(IPPROTO_TCP)),
        attribute(PROTO.SRC_PORT, u16be(local.port)),
        attribute(PROTO.DST_PORT, u16be(remote.port)),
      ]),
    ]),
  ]);
}

/** The source of an entry's answers; null when the entry is not about TCP over IP. */
function readReply(entry: Buffer): Endpoint | null {
  const tuple = readAttributes(entry, HEADER_BYTES).get(TUPLE.REPLY);
  const parts = tuple && readAttributes(tuple);
  const ip = parts?.get(TUPLE_PART.IP);
  const proto = parts?.get(TUPLE_PART.PROTO);
  if (!ip || !proto) return null;
  const addresses = readAttributes(ip);
  const port = readAttributes(proto).get(PROTO.SRC_PORT);
  const v4 = addresses.get(IP.V4_SRC);
  const v6 = addresses.get(IP.V6_SRC);
  if (port?.length !== 2) return null;
  if (v4?.length === 4) return { address: { family: 4, value: BigInt(v4.readUInt32BE()) }, port: port.readUInt16BE() };
  if (v6?.length !== 16) return null;
  const value = (v6.readBigUInt64BE(0) << 64n) | v6.readBigUInt64BE(8);
  return { address: { family: 6, value }, port: port.readUInt16BE() };
}
