import { type Namespace, ownNamespace } from './namespaces.ts';
import { attribute, openNetlink, PROTOCOL, u8 } from './netlink.ts';

/**
 * The one rule of ours that nft cannot be told: it translates to the address and port in a TCP option. nft 1.0.6 takes it as text; 1.1.3 knows
 * no type for what is in an option, and refuses it as an address. The kernel has always been able to. nft lists it like any other.
 * Numbers: linux/netfilter/{nfnetlink,nf_tables}.h.
 */

/** Where the address (IPv4) and the port are in an option, as bytes from its beginning. */
export type OptionTarget = { readonly kind: number; readonly address: number; readonly port: number };

const NFPROTO = { INET: 1, IPV4: 2 } as const;
/** `NFNL_SUBSYS_NFTABLES`, in the upper half of a message's type. */
const SUBSYSTEM = 10;
const MESSAGE = { BEGIN: 16, END: 17, NEW_RULE: (SUBSYSTEM << 8) | 6, DELETE_RULE: (SUBSYSTEM << 8) | 8 } as const;
/** `NLM_F_CREATE | NLM_F_APPEND` */
const APPEND = 0xc00;
const RULE = { TABLE: 1, CHAIN: 2, EXPRESSIONS: 4 } as const;
const LIST_ELEMENT = 1;
const EXPRESSION = { NAME: 1, DATA: 2 } as const;
/** OPERATION 1 is NFT_EXTHDR_OP_TCPOPT. */
const EXTHDR = { REGISTER: 1, TYPE: 2, OFFSET: 3, LENGTH: 4, OPERATION: 6 } as const;
const TCP_OPTION = 1;
/** TYPE 1 is NFT_NAT_DNAT. */
const NAT = { TYPE: 1, FAMILY: 2, ADDRESS: 3, LAST_ADDRESS: 4, PORT: 5, LAST_PORT: 6 } as const;
const DESTINATION = 1;
/** The registers of 16 bytes that nft uses. */
const REGISTER = { ADDRESS: 1, PORT: 2 } as const;

const be32 = (value: number): Buffer => {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32BE(value);
  return bytes;
};
const name = (type: number, text: string): Buffer => attribute(type, Buffer.from(`${text}\0`));
/** struct nfgenmsg: family, version, resource. */
const header = (family: number, resource: number): Buffer => Buffer.of(family, 0, resource >> 8, resource & 255);

const expression = (kind: string, data: readonly Buffer[]): Buffer =>
  attribute(LIST_ELEMENT, [name(EXPRESSION.NAME, kind), attribute(EXPRESSION.DATA, data)]);

const load = (register: number, kind: number, offset: number, length: number): Buffer =>
  expression('exthdr', [
    attribute(EXTHDR.REGISTER, be32(register)),
    attribute(EXTHDR.TYPE, u8(kind)),
    attribute(EXTHDR.OFFSET, be32(offset)),
    attribute(EXTHDR.LENGTH, be32(length)),
    attribute(EXTHDR.OPERATION, be32(TCP_OPTION)),
  ]);

/**
 * Makes it the only rule of a chain of table `inet <table>`, which nat chains of prerouting lead to with TCP over IPv4 alone. What was there is
 * replaced in the same transaction.
 * @throws NetlinkError: ENOENT without such a chain, EPERM without CAP_NET_ADMIN
 */
export async function translateToOption(
  table: string,
  chain: string,
  { kind, address, port }: OptionTarget,
  namespace: Namespace = ownNamespace,
): Promise<void> {
  const where = [name(RULE.TABLE, table), name(RULE.CHAIN, chain)];
  const rule = [
    load(REGISTER.ADDRESS, kind, address, 4),
    load(REGISTER.PORT, kind, port, 2),
    expression('nat', [
      attribute(NAT.TYPE, be32(DESTINATION)),
      attribute(NAT.FAMILY, be32(NFPROTO.IPV4)),
      ...[NAT.ADDRESS, NAT.LAST_ADDRESS].map((end) => attribute(end, be32(REGISTER.ADDRESS))),
      ...[NAT.PORT, NAT.LAST_PORT].map((end) => attribute(end, be32(REGISTER.PORT))),
    ]),
  ];
  const socket = openNetlink(PROTOCOL.NETFILTER, { namespace });
  try {
    await socket.batch(`the rule of chain ${chain}`, [
      { type: MESSAGE.BEGIN, payload: header(0, SUBSYSTEM) },
      { type: MESSAGE.DELETE_RULE, payload: Buffer.concat([header(NFPROTO.INET, 0), ...where]) },
      {
        type: MESSAGE.NEW_RULE,
        flags: APPEND,
        payload: Buffer.concat([header(NFPROTO.INET, 0), ...where, attribute(RULE.EXPRESSIONS, rule)]),
      },
      { type: MESSAGE.END, payload: header(0, SUBSYSTEM) },
    ]);
  } finally {
    socket.close();
  }
}
