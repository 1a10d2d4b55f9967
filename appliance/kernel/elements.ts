import { type Namespace, ownNamespace } from './namespaces.ts';
import { attribute, eachAttribute, NetlinkError, type NetlinkSocket, openNetlink, PROTOCOL } from './netlink.ts';

/**
 * Elements of nftables' maps as the kernel hands them over (NETLINK_NETFILTER): nft prints the same as text, which takes
 * ten times as long to write and to read. Numbers: linux/netfilter/{nfnetlink,nf_tables}.h; the user data are nft's own
 * (libnftnl, udata.h).
 */

/**
 * One element. `key` and `data` are in network order, each field of a concatenation filled up to a multiple of 4 bytes;
 * they lie in a buffer that holds hundreds of elements, so whoever keeps them keeps all of it.
 */
export type MapElement = {
  readonly key: Uint8Array;
  /** Empty for what is no plain value: a verdict, an object. */
  readonly data: Uint8Array;
  /** Seconds until it goes, in thousandths; null when it stays. */
  readonly remaining: number | null;
  readonly comment: string | null;
};

const NFPROTO_INET = 1;
/** `NFNL_SUBSYS_NFTABLES`, in the upper half of a message's type. */
const SUBSYSTEM = 10 << 8;
const GET_SET_ELEMENTS = SUBSYSTEM | 13;
/** struct nfgenmsg: family, version, resource; there nf_tables has the lower half of the ruleset's generation. */
const HEADER_BYTES = 4;
const GENERATION_AT = 2;
/** enum nft_set_elem_list_attributes */
const LIST = { TABLE: 1, SET: 2, ELEMENTS: 3 } as const;
/** enum nft_set_elem_attributes */
const ELEMENT = { KEY: 1, DATA: 2, EXPIRATION: 5, USERDATA: 6 } as const;
const DATA_VALUE = 1;
/** `NFTNL_UDATA_SET_ELEM_COMMENT`, among blocks of one byte type, one byte length, value. */
const USERDATA_COMMENT = 0;

/**
 * The most the kernel puts into one message of a dump. It has no place to go on from in a map, but walks again over all that
 * it has handed out already, with every message.
 */
const MESSAGE_BYTES = 32_768;
/** Transactions of anybody in this network namespace interrupt a dump. */
const TRIES = 10;

const EMPTY = new Uint8Array(0);

/** Opens a socket for `readMap`. @throws NetlinkError */
export function openElements(namespace: Namespace = ownNamespace): NetlinkSocket {
  return openNetlink(PROTOCOL.NETFILTER, { namespace, messageBytes: MESSAGE_BYTES });
}

/**
 * Hands over every element of a map of table `inet <table>`, in no order. When the ruleset changes meanwhile, reading
 * begins again, and elements that were handed over come once more.
 * @throws NetlinkError: ENOENT without such a map, EPERM without CAP_NET_ADMIN, EINTR when the ruleset never stays the same.
 */
export async function readMap(
  socket: NetlinkSocket,
  table: string,
  map: string,
  each: (element: MapElement) => void,
): Promise<void> {
  const name = (type: number, text: string): Buffer => attribute(type, Buffer.from(`${text}\0`));
  const header = Buffer.alloc(HEADER_BYTES);
  header[0] = NFPROTO_INET;
  const request = Buffer.concat([header, name(LIST.TABLE, table), name(LIST.SET, map)]);
  const what = `reading map ${map}`;
  const once = async (): Promise<void> => {
    const generations = new Set<number>();
    await socket.dump(what, GET_SET_ELEMENTS, request, (record) => {
      if (record.length >= HEADER_BYTES) generations.add(record.readUInt16BE(GENERATION_AT));
      readElements(record, each);
    });
    // For elements the kernel does not set NLM_F_DUMP_INTR.
    if (generations.size > 1) throw new NetlinkError(what, 'EINTR');
  };
  for (let tries = 1; ; tries++) {
    try {
      await once();
      return;
    } catch (error) {
      if (!(error instanceof NetlinkError) || error.code !== 'EINTR' || tries === TRIES) throw error;
    }
  }
}

/** Reads the elements of one message (`NFT_MSG_NEWSETELEM`). */
export function readElements(record: Buffer, each: (element: MapElement) => void): void {
  eachAttribute(record, HEADER_BYTES, record.length, (type, start, end) => {
    if (type !== LIST.ELEMENTS) return;
    eachAttribute(record, start, end, (_listed, from, to) => each(readElement(record, from, to)));
  });
}

function readElement(bytes: Buffer, from: number, to: number): MapElement {
  let key: Uint8Array = EMPTY;
  let data: Uint8Array = EMPTY;
  let remaining: number | null = null;
  let comment: string | null = null;
  eachAttribute(bytes, from, to, (type, start, end) => {
    if (type === ELEMENT.KEY) key = value(bytes, start, end);
    else if (type === ELEMENT.DATA) data = value(bytes, start, end);
    else if (type === ELEMENT.EXPIRATION && end - start === 8) remaining = Number(bytes.readBigUInt64BE(start)) / 1000;
    else if (type === ELEMENT.USERDATA) comment = commentIn(bytes, start, end);
  });
  return { key, data, remaining, comment };
}

/** The plain value inside a nest of enum nft_data_attributes. */
function value(bytes: Buffer, from: number, to: number): Uint8Array {
  let found: Uint8Array = EMPTY;
  eachAttribute(bytes, from, to, (type, start, end) => {
    if (type === DATA_VALUE) found = bytes.subarray(start, end);
  });
  return found;
}

function commentIn(bytes: Buffer, from: number, to: number): string | null {
  for (let at = from; at + 2 <= to; ) {
    const end = at + 2 + bytes.readUInt8(at + 1);
    if (end > to) break;
    if (bytes[at] === USERDATA_COMMENT) return bytes.toString('utf8', at + 2, Math.max(at + 2, end - 1));
    at = end;
  }
  return null;
}
