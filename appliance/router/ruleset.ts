import {
  type Address,
  contains,
  type DestinationRule,
  type Endpoint,
  formatAddress,
  formatPrefix,
  type PortRange,
  type Prefix,
  readAddress,
  sameAddress,
} from '../protocol/address.ts';
import { MESSAGE_BYTES } from '../protocol/control.ts';
import { LEGACY_BYTES } from '../protocol/legacy.ts';
import { type Announcement, MOST_ANNOUNCEMENTS } from './announcements.ts';
import { CAPABILITY_LIFETIME, type Capability, MOST_CAPABILITIES } from './capabilities.ts';
import { GRACE, MAP_SIZE, type Owner, type Write } from './leases.ts';
import { DENIED_BY_DEFAULT, DENIED_PORT, NEVER, onLink, type Rules } from './policy.ts';
import { MOST_TUNNELS, TUNNEL_MTU, type Tunnel } from './tunnels.ts';

/**
 * What we put into the kernel, as text for nft, and how to read it back. One table, `inet detour`: the maps of leases
 * and a set of remembered facts outlive every daemon; all else is replaced as a whole in one transaction.
 * Texts are made of numbers and addresses only, never of anything a peer sent. Every command is on a line of its own.
 */

export const TABLE = 'inet detour';
const MAPS = { 4: 'leases4', 6: 'leases6' } as const;
/** Addresses inside tunnels that were granted, for as long as they are. */
const TUNNELS = { 4: 'tunnels4', 6: 'tunnels6' } as const;
/** Ports to which a client's joins bring their server's address with them. */
const AUTH = 'auth4';
/** Ports of ours at which anybody's joins reach a server that asked for it. */
const ANNOUNCED = { 4: 'announced4', 6: 'announced6' } as const;
/** Facts that a later daemon, or `detour cleanup`, must know: comments of this set's elements. */
const MEMORY = 'memory';
const kept = ({ vpn, inband, announce }: RulesetConfig): readonly string[] => [
  MAPS[4],
  MAPS[6],
  MEMORY,
  ...(vpn ? [TUNNELS[4], TUNNELS[6]] : []),
  ...(inband ? [AUTH] : []),
  ...(announce.length > 0 ? [ANNOUNCED[4], ANNOUNCED[6]] : []),
];

/** Datagrams per second from one address (or IPv6 /64) that reach the daemon, and the burst above it. */
const CONTROL_RATE = 'limit rate over 50/second burst 100 packets';
/** docs/protocol.md, Quotas. */
const SYN_RATE = 'limit rate over 50/second burst 100 packets';
const FLOWS_PER_CLIENT = 1024;
/** Who joins through an announced port has no key: a client opens few paths, a port serves many clients. */
const ANNOUNCED_RATE = {
  CLIENT: 'limit rate over 10/second burst 20 packets',
  PORT: 'limit rate over 200/second burst 400 packets',
};
const UDP_HEADER = 8;
/** Seconds: half-open entries go quickly, idle ones after RFC 5382's 2 h 4 min. The host's own defaults stay. */
const TIMEOUTS = 'syn_sent : 20, syn_recv : 30, established : 7440';

export type Fwmark = { readonly mark: number; readonly mask: number };

export type RulesetConfig = {
  /** UDP control address; the zero address means all. */
  readonly listen: Endpoint;
  readonly ports: PortRange;
  readonly keyIds: readonly number[];
  readonly relay: 'join' | 'mptcp' | 'tcp';
  readonly legacyV1: boolean;
  readonly fwmark: Fwmark;
  readonly rules: Rules;
  /** Whether this kernel knows per-flow conntrack timeouts. */
  readonly timeouts: boolean;
  /** The interface of the tunnels; null without any. */
  readonly vpn: string | null;
  /** Whether joins may bring their server's address with them. */
  readonly inband: boolean;
  /** Ports that servers may ask for; empty for none. */
  readonly announce: readonly PortRange[];
};

/** UDP port inside tunnels that answers "port unreachable": so a client finds out which packets pass (RFC 863, discard). */
const ECHO_PORT = 9;
const ECHO_RATE = 'limit rate 200/second';

/** Packets dropped or refused, by cause; named counters of the table. */
export const COUNTERS = [
  'control_malformed',
  'control_unknown_key',
  'control_rate',
  'syn_without_lease',
  'syn_not_relayed',
  'syn_rate',
  'flows_over',
  'destination_denied',
  'answer_refused',
  'input_guarded',
  'relayed_syn',
  'tunnel_not_relayed',
  'tunnel_stray',
  'tunnelled_syn',
  'inband_malformed',
  'inband_syn',
  'announced_rate',
  'announced_syn',
] as const;

const hex = (value: number): string => `0x${(value >>> 0).toString(16).padStart(8, '0')}`;

/** Matches flows that this table translated, and no one else's: nobody sets our mark and DNATs by chance. */
function ours({ mark, mask }: Fwmark): string {
  return `ct status dnat ct mark and ${hex(mask)} == ${hex(mark)}`;
}

const SYN = 'tcp flags & (fin|syn|rst|ack) == syn';
/** Nearly every packet that is relayed: nothing below it concerns them, and each comparison that they are spared shows. */
const NO_SYN = 'tcp flags & syn == 0 accept';
const SYN_ACK = 'tcp flags & (syn|ack) == (syn|ack)';
/** Kind 30, subtype 1, RFC 8684 3.2. */
const JOIN = 'tcp option mptcp subtype 1';

/**
 * The option of docs/protocol.md, In-band transit: kind 253 (RFC 4727), length 8, an IPv4 address, a port. By offsets, in bits: nft 1.0.6
 * crashes on `tcp option 253 length`. The kernel looks at the first option of a kind, and at none that its segment is too short for.
 */
const INBAND = { KIND: 253, IS_WHOLE: 'tcp option @253,8,8 8', PORT: 'tcp option @253,48,16' };
/** RFC 8684 3.2: the length of MP_JOIN in a SYN. */
const JOIN_IS_WHOLE = 'tcp option @30,8,8 12';

/** The chain whose one rule is not in the text of `renderStatic`, and what that translates to (`Nft.translateToOption`). */
export const TO_OPTION = { chain: 'to_option', target: { kind: INBAND.KIND, address: 2, port: 6 } } as const;

/** What a SYN, and the answer to it, must carry to be relayed. */
function relayedOption(relay: RulesetConfig['relay']): string {
  if (relay === 'join') return JOIN;
  return relay === 'mptcp' ? 'tcp option mptcp exists' : '';
}

const keyword = (address: Address): 'ip' | 'ip6' => (address.family === 4 ? 'ip' : 'ip6');

/** A match on the destination address for each family that `list` has. */
function anyOf(list: readonly Prefix[]): string[] {
  // nft refuses a set whose intervals overlap, so what is contained in another goes.
  const outer = list.filter(
    (one, at) => !list.some((other, index) => index !== at && swallows(other, one, index < at)),
  );
  return (['ip', 'ip6'] as const).flatMap((family) => {
    const texts = outer.filter(({ address }) => keyword(address) === family).map(formatPrefix);
    return texts.length === 0 ? [] : [`${family} daddr { ${texts.join(', ')} }`];
  });
}

function swallows(other: Prefix, one: Prefix, first: boolean): boolean {
  return contains(other, one.address) && (other.length < one.length || (other.length === one.length && first));
}

function ruleMatch({ prefix, ports }: DestinationRule): string {
  const address = `${keyword(prefix.address)} daddr ${formatPrefix(prefix)}`;
  if (ports.length === 0) return address;
  return `${address} tcp dport { ${ports.map(({ first, last }) => (first === last ? first : `${first}-${last}`)).join(', ')} }`;
}

type Chain = { readonly name: string; readonly hook: string | null; readonly rules: readonly string[] };

const drop = (counter: (typeof COUNTERS)[number]): string => `counter name ${counter} drop`;

/** Whether it is a connection of ours that a mark says so of, translated or out of a tunnel. */
const marked = ({ mark, mask }: Fwmark, is: '==' | '!='): string => `ct mark and ${hex(mask)} ${is} ${hex(mark)}`;
const setMark = ({ mark, mask }: Fwmark): string => `ct mark set ct mark and ${hex(~mask)} or ${hex(mark)}`;

const timeoutRules = ({ timeouts }: RulesetConfig): string[] =>
  timeouts ? ['meta nfproto ipv4 ct timeout set "relay4"', 'meta nfproto ipv6 ct timeout set "relay6"'] : [];

/** Segments no longer than packets of `mtu` bytes hold (headers of 20 bytes of TCP and 20 or 40 of IP). */
const clamps = (mtu: number): string[] =>
  (['ipv4', 'ipv6'] as const).map((protocol) => {
    const most = mtu - (protocol === 'ipv4' ? 40 : 60);
    return `meta nfproto ${protocol} tcp option maxseg size > ${most} tcp option maxseg size set ${most}`;
  });

/**
 * What may come out of a tunnel and go into one: the same as through a lease. WireGuard has made sure whose address a packet
 * carries. Everything about the interface is ours, so these chains need not spare what merely passes through the host.
 */
function tunnelChains(config: RulesetConfig): Chain[] {
  const { fwmark, listen } = config;
  const option = relayedOption(config.relay);
  return [
    {
      name: 'tunnel_rate',
      hook: null,
      rules: [
        `update @tunnel_control4 { ip saddr ${CONTROL_RATE} } ${drop('control_rate')}`,
        `update @tunnel_control6 { ip6 saddr ${CONTROL_RATE} } ${drop('control_rate')}`,
        'notrack',
      ],
    },
    {
      name: 'tunnel_syn',
      hook: null,
      rules: [
        `update @tunnel_syn4 { ip saddr ${SYN_RATE} } ${drop('syn_rate')}`,
        `update @tunnel_syn6 { ip6 saddr ${SYN_RATE} } ${drop('syn_rate')}`,
        ...(option === '' ? ['accept'] : [`${option} accept`, drop('syn_not_relayed')]),
      ],
    },
    {
      name: 'tunnel_in',
      hook: null,
      rules: [
        NO_SYN,
        `udp dport ${listen.port} fib daddr type local goto control`,
        `udp dport ${ECHO_PORT} fib daddr type local ${ECHO_RATE} notrack accept`,
        `meta l4proto != tcp ${drop('tunnel_not_relayed')}`,
        // Also the answer to a SYN: nobody connects to a client through its tunnel.
        `tcp flags & (fin|syn|rst|ack) != syn ${drop('tunnel_not_relayed')}`,
        `fib daddr type local ${drop('input_guarded')}`,
        `ip saddr @${TUNNELS[4]} goto tunnel_syn`,
        `ip6 saddr @${TUNNELS[6]} goto tunnel_syn`,
        drop('syn_without_lease'),
      ],
    },
    {
      name: 'tunnel_admit',
      hook: null,
      rules: [
        `add @tunnel_flows4 { ip saddr ct count over ${FLOWS_PER_CLIENT} } ${drop('flows_over')}`,
        `add @tunnel_flows6 { ip6 saddr ct count over ${FLOWS_PER_CLIENT} } ${drop('flows_over')}`,
        `counter name tunnelled_syn ${setMark(fwmark)}`,
        ...timeoutRules(config),
      ],
    },
    {
      // Conntrack takes up connections in their middle; out of a tunnel only those go on that began with an admitted SYN.
      name: 'tunnel_flow',
      hook: null,
      rules: [
        'ct state untracked accept',
        `ct state established ${marked(fwmark, '==')} accept`,
        `ct state new ${SYN} goto tunnel_admit`,
        drop('tunnel_stray'),
      ],
    },
    {
      name: 'tunnel_guard',
      hook: null,
      rules: [
        `udp dport ${listen.port} accept`,
        `udp dport ${ECHO_PORT} reject with icmpx type port-unreachable`,
        drop('input_guarded'),
      ],
    },
    {
      name: 'tunnelled',
      hook: null,
      rules: [
        `oifname "${config.vpn}" ${drop('destination_denied')}`,
        NO_SYN,
        'tcp option maxseg size set rt mtu',
        // What it says is what the server may send, which has to fit into the tunnel.
        ...clamps(TUNNEL_MTU),
        'goto destination',
      ],
    },
    {
      // Nobody opens a connection into a tunnel.
      name: 'to_tunnel',
      hook: null,
      rules: [
        `${marked(fwmark, '!=')} ${drop('tunnel_stray')}`,
        `ct direction original ${drop('tunnel_stray')}`,
        NO_SYN,
        `${SYN_ACK} tcp option maxseg size set rt mtu`,
        ...(option === ''
          ? []
          : [`${SYN_ACK} ${option} accept`, `${SYN_ACK} counter name answer_refused reject with tcp reset`]),
      ],
    },
  ];
}

/** Which joins may bring their server's address with them: those that our client's kernel makes, and no others. */
function inbandSyn(): Chain {
  // A SYN with data would carry them past the server's consent. A header of 20 bytes, MP_JOIN and the option are 40 at least, all there may be are 60.
  const sizes = [10, 11, 12, 13, 14, 15].map((words) => `tcp doff ${words} ip length != ${20 + 4 * words}`);
  return {
    name: 'syn_inband',
    hook: null,
    rules: [
      `update @syn4 { ip saddr ${SYN_RATE} } ${drop('syn_rate')}`,
      ...['ip hdrlength != 5', 'tcp doff < 10', ...sizes].map((match) => `${match} ${drop('inband_malformed')}`),
      // The kernel reads on behind the end of options; receivers do not.
      `tcp option eol exists ${drop('inband_malformed')}`,
      `${INBAND.PORT} 0 ${drop('inband_malformed')}`,
      `${JOIN} ${JOIN_IS_WHOLE} ${INBAND.IS_WHOLE} accept`,
      drop('inband_malformed'),
    ],
  };
}

const portSet = (ranges: readonly PortRange[]): string =>
  `{ ${ranges.map(({ first, last }) => (first === last ? first : `${first}-${last}`)).join(', ')} }`;

/** What the limits are for joins of those who hold no key. */
const announcedSyn: Chain = {
  name: 'syn_announced',
  hook: null,
  rules: [
    `update @announced_client4 { ip saddr ${ANNOUNCED_RATE.CLIENT} } ${drop('announced_rate')}`,
    `update @announced_client6 { ip6 saddr & ffff:ffff:ffff:ffff:: ${ANNOUNCED_RATE.CLIENT} } ${drop('announced_rate')}`,
    `update @announced_port { tcp dport ${ANNOUNCED_RATE.PORT} } ${drop('announced_rate')}`,
  ],
};

function chains(config: RulesetConfig): Chain[] {
  const { listen, ports, fwmark, rules, vpn, inband, announce } = config;
  const control = listen.port;
  /** A rule about the tunnels' interface, where there is one. */
  const tunnel = (rule: string): string[] => (vpn === null ? [] : [rule.replace('VPN', `"${vpn}"`)]);
  const bound = listen.address.value === 0n ? '' : `${keyword(listen.address)} daddr ${formatAddress(listen.address)} `;
  // In a host's namespace these hooks also see what merely passes through; only what is addressed to us is ours.
  const toControl = `${bound}udp dport ${control} fib daddr type local`;
  const toLease = `tcp dport ${ports.first}-${ports.last} ${SYN} fib daddr type local`;
  const option = relayedOption(config.relay);
  const leased = (family: 'ip' | 'ip6', map: string): string => `${family} saddr . tcp dport @${map}`;
  const authorised = leased('ip', AUTH);
  /** Matches of joins to announced ports by family, with what is to become of them; none where no port may be. */
  const announced = (verdict: (family: 'ip' | 'ip6', map: string) => string): string[] =>
    announce.length === 0
      ? []
      : (['ip', 'ip6'] as const).map((family) => {
          const map = family === 'ip' ? ANNOUNCED[4] : ANNOUNCED[6];
          const to = `tcp dport ${portSet(announce)} ${SYN} fib daddr type local ${JOIN}`;
          return `meta nfproto ${family === 'ip' ? 'ipv4' : 'ipv6'} ${to} tcp dport @${map} ${verdict(family, map)}`;
        });
  const legacyLength = UDP_HEADER + LEGACY_BYTES;
  const denied: string[] = [
    `fib daddr type != unicast ${drop('destination_denied')}`,
    ...anyOf(NEVER).map((match) => `${match} ${drop('destination_denied')}`),
    // ISATAP interface identifiers embed IPv4 under any prefix (RFC 5214 6.1).
    `ip6 daddr & ::fdff:ffff:0:0 == ::5efe:0:0 ${drop('destination_denied')}`,
    ...anyOf(rules.own.map(({ address }) => ({ address, length: address.family === 4 ? 32 : 128 }))).map(
      (match) => `${match} ${drop('destination_denied')}`,
    ),
    `tcp dport ${DENIED_PORT} ${drop('destination_denied')}`,
    ...rules.deny.map((rule) => `${ruleMatch(rule)} ${drop('destination_denied')}`),
    ...rules.allow.map((rule) => `${ruleMatch(rule)} return`),
    ...anyOf(DENIED_BY_DEFAULT).map((match) => `${match} ${drop('destination_denied')}`),
    ...anyOf(onLink(rules.own).filter(({ length }) => length > 0)).map(
      (match) => `${match} ${drop('destination_denied')}`,
    ),
  ];
  return [
    ...(vpn === null ? [] : tunnelChains(config)),
    ...(announce.length > 0 ? [announcedSyn] : []),
    ...(inband ? [inbandSyn(), { name: TO_OPTION.chain, hook: null, rules: [] }] : []),
    {
      name: 'control',
      hook: null,
      rules: [
        ...(config.legacyV1
          ? [
              `udp length ${legacyLength} @th,64,16 != 0x0100 ${drop('control_malformed')}`,
              `udp length ${legacyLength} goto control_rate`,
            ]
          : []),
        `udp length != ${UDP_HEADER + MESSAGE_BYTES} ${drop('control_malformed')}`,
        `@th,64,16 != 0xd702 ${drop('control_malformed')}`,
        `@th,96,32 != { ${config.keyIds.map(hex).join(', ')} } ${drop('control_unknown_key')}`,
        'goto control_rate',
      ],
    },
    {
      name: 'control_rate',
      hook: null,
      rules: [
        ...tunnel('iifname VPN goto tunnel_rate'),
        `update @control4 { ip saddr ${CONTROL_RATE} } ${drop('control_rate')}`,
        `update @control6 { ip6 saddr & ffff:ffff:ffff:ffff:: ${CONTROL_RATE} } ${drop('control_rate')}`,
        'notrack',
      ],
    },
    {
      // Before conntrack: a flood that has no lease costs no entry there.
      name: 'syn',
      hook: null,
      rules: [
        `${leased('ip', MAPS[4])} goto syn_leased`,
        `${leased('ip6', MAPS[6])} goto syn_leased`,
        ...(inband ? [`${authorised} goto syn_inband`] : []),
        drop('syn_without_lease'),
      ],
    },
    {
      name: 'syn_leased',
      hook: null,
      rules: [
        `update @syn4 { ip saddr ${SYN_RATE} } ${drop('syn_rate')}`,
        `update @syn6 { ip6 saddr & ffff:ffff:ffff:ffff:: ${SYN_RATE} } ${drop('syn_rate')}`,
        ...(option === '' ? [] : [`${option} accept`, drop('syn_not_relayed')]),
      ],
    },
    {
      name: 'raw_in',
      hook: 'type filter hook prerouting priority raw; policy accept;',
      rules: [
        ...tunnel('iifname VPN goto tunnel_in'),
        NO_SYN,
        `${toControl} goto control`,
        `${toLease} goto syn`,
        ...announced(() => 'goto syn_announced'),
      ],
    },
    {
      name: 'raw_out',
      hook: 'type filter hook output priority raw; policy accept;',
      rules: [`udp sport ${control} fib saddr type local notrack`],
    },
    {
      name: 'admit',
      hook: null,
      rules: [
        `add @flows4 { ip saddr ct count over ${FLOWS_PER_CLIENT} } ${drop('flows_over')}`,
        `add @flows6 { ip6 saddr & ffff:ffff:ffff:ffff:: ct count over ${FLOWS_PER_CLIENT} } ${drop('flows_over')}`,
        ...timeoutRules(config),
      ],
    },
    {
      // After conntrack made the entry, before it is confirmed.
      name: 'new_flow',
      hook: 'type filter hook prerouting priority mangle; policy accept;',
      rules: [
        ...tunnel('iifname VPN goto tunnel_flow'),
        NO_SYN,
        `${toLease} ct state new ${leased('ip', MAPS[4])} goto admit`,
        `${toLease} ct state new ${leased('ip6', MAPS[6])} goto admit`,
        ...(inband ? [`${toLease} ct state new ${authorised} goto admit`] : []),
        ...announced(() => 'ct state new goto admit'),
      ],
    },
    {
      name: 'nat_in',
      hook: 'type nat hook prerouting priority dstnat; policy accept;',
      rules: [
        ...(['ip', 'ip6'] as const).map((family) => {
          const map = family === 'ip' ? MAPS[4] : MAPS[6];
          return (
            `${leased(family, map)} ${toLease} ${option} counter name relayed_syn ${setMark(fwmark)} ` +
            `dnat ${family} to ${family} saddr . tcp dport map @${map}`
          );
        }),
        ...(inband
          ? [
              `${authorised} ${toLease} ${JOIN} ${INBAND.IS_WHOLE} counter name inband_syn ${setMark(fwmark)} ` +
                `goto ${TO_OPTION.chain}`,
            ]
          : []),
        ...announced(
          (family, map) => `counter name announced_syn ${setMark(fwmark)} dnat ${family} to tcp dport map @${map}`,
        ),
      ],
    },
    {
      // DNAT to an address of this host ends up here and not in forward, whatever the lists there say.
      name: 'guard_in',
      hook: 'type filter hook input priority filter; policy accept;',
      rules: [...tunnel('iifname VPN goto tunnel_guard'), `${ours(fwmark)} ${drop('input_guarded')}`],
    },
    { name: 'destination', hook: null, rules: denied },
    {
      name: 'relayed',
      hook: null,
      rules: [
        // What it said is done, and the server need not know. One more of its kind would be left over.
        ...(inband
          ? [
              `ct direction original ${SYN} reset tcp option ${INBAND.KIND}`,
              `ct direction original ${SYN} tcp option ${INBAND.KIND} exists ${drop('inband_malformed')}`,
            ]
          : []),
        `ct direction original ${SYN} goto destination`,
        ...(option === ''
          ? []
          : [
              `ct direction reply ${SYN_ACK} ${option} accept`,
              `ct direction reply ${SYN_ACK} counter name answer_refused reject with tcp reset`,
            ]),
      ],
    },
    {
      name: 'forwarded',
      hook: 'type filter hook forward priority filter; policy accept;',
      rules: [
        ...tunnel('iifname VPN goto tunnelled'),
        ...tunnel('oifname VPN goto to_tunnel'),
        NO_SYN,
        `${ours(fwmark)} goto relayed`,
      ],
    },
    {
      // Also the permanent rule that needs conntrack: were there none, NATed flows would be reset.
      name: 'nat_out',
      hook: 'type nat hook postrouting priority srcnat; policy accept;',
      rules: [`${ours(fwmark)} masquerade`, ...tunnel(`iifname VPN ${marked(fwmark, '==')} masquerade`)],
    },
  ];
}

/** The names of the chains that `config` leads to. */
export const chainNames = (config: RulesetConfig): readonly string[] => chains(config).map(({ name }) => name);

/** What the table consists of now, by the names nft lists. */
export type TableNames = { readonly chains: readonly string[]; readonly sets: readonly string[] };

/** Reads the names of our table's chains and sets out of `LIST_RULES` or `LIST_CHAINS`. */
export function readNames(lines: readonly string[]): TableNames {
  const names: { chains: string[]; sets: string[] } = { chains: [], sets: [] };
  let table = '';
  for (const line of lines) {
    table = /^table (\S+ \S+) \{/.exec(line)?.[1] ?? table;
    const [, kind, name] = /^\t(chain|set) (\S+) \{/.exec(line) ?? [];
    if (table !== TABLE || name === undefined) continue;
    (kind === 'chain' ? names.chains : names.sets).push(name);
  }
  return names;
}

/**
 * Only the parts that outlive daemons: enough to hold leases and facts. `typeof` rather than `type`, here and in every
 * set with one field to its key: a set that nft 1.1.3 (our image) declares by `type` makes nft 1.0.6 (Debian 12, maybe the
 * host) crash when it lists anything at all.
 */
function lasting(vpn = false, inband = false, announce = false): string[] {
  return [
    `add table ${TABLE}`,
    `add map ${TABLE} ${MAPS[4]} { type ipv4_addr . inet_service : ipv4_addr . inet_service; flags timeout; size ${MAP_SIZE}; }`,
    `add map ${TABLE} ${MAPS[6]} { type ipv6_addr . inet_service : ipv6_addr . inet_service; flags timeout; size ${MAP_SIZE}; }`,
    `add set ${TABLE} ${MEMORY} { typeof tcp dport; }`,
    ...(vpn
      ? [
          `add set ${TABLE} ${TUNNELS[4]} { typeof ip saddr; flags timeout; size ${2 * MOST_TUNNELS}; }`,
          `add set ${TABLE} ${TUNNELS[6]} { typeof ip6 saddr; flags timeout; size ${2 * MOST_TUNNELS}; }`,
        ]
      : []),
    ...(inband
      ? [`add set ${TABLE} ${AUTH} { type ipv4_addr . inet_service; flags timeout; size ${2 * MOST_CAPABILITIES}; }`]
      : []),
    ...(announce
      ? [
          `add map ${TABLE} ${ANNOUNCED[4]} { typeof tcp dport : ip daddr . tcp dport; flags timeout; size ${2 * MOST_ANNOUNCEMENTS}; }`,
          `add map ${TABLE} ${ANNOUNCED[6]} { typeof tcp dport : ip6 daddr . tcp dport; flags timeout; size ${2 * MOST_ANNOUNCEMENTS}; }`,
        ]
      : []),
  ];
}

/**
 * The transaction that makes the table's rules what `config` says, whatever an older version left (`present`, null
 * when there is no table), without touching leases or memory.
 */
export function renderStatic(config: RulesetConfig, present: TableNames | null): string {
  const removed: string[] = [];
  if (present) {
    // What the text cannot say stays as it is, so that it is there at any time.
    const replaced = present.chains.filter((name) => !config.inband || name !== TO_OPTION.chain);
    for (const name of replaced) removed.push(`flush chain ${TABLE} ${name}`);
    for (const name of replaced) removed.push(`delete chain ${TABLE} ${name}`);
    for (const name of present.sets) if (!kept(config).includes(name)) removed.push(`delete set ${TABLE} ${name}`);
  }
  const meter = (name: string, key: string, flags: string): string =>
    `add set ${TABLE} ${name} { typeof ${key}; size ${MAP_SIZE}; ${flags} }`;
  const perSecond = 'flags dynamic,timeout; timeout 1m;';
  const added = [
    ...COUNTERS.map((name) => `add counter ${TABLE} ${name}`),
    meter('control4', 'ip saddr', perSecond),
    meter('control6', 'ip6 saddr', perSecond),
    meter('syn4', 'ip saddr', perSecond),
    meter('syn6', 'ip6 saddr', perSecond),
    meter('flows4', 'ip saddr', 'flags dynamic;'),
    meter('flows6', 'ip6 saddr', 'flags dynamic;'),
    ...(config.announce.length === 0
      ? []
      : [
          meter('announced_client4', 'ip saddr', perSecond),
          meter('announced_client6', 'ip6 saddr', perSecond),
          meter('announced_port', 'tcp dport', perSecond),
        ]),
    ...(config.vpn === null
      ? []
      : (['control', 'syn', 'flows'] as const).flatMap((what) => {
          const flags = what === 'flows' ? 'flags dynamic;' : perSecond;
          return [meter(`tunnel_${what}4`, 'ip saddr', flags), meter(`tunnel_${what}6`, 'ip6 saddr', flags)];
        })),
    ...(config.timeouts
      ? [
          `add ct timeout ${TABLE} relay4 { protocol tcp; l3proto ip; policy = { ${TIMEOUTS} }; }`,
          `add ct timeout ${TABLE} relay6 { protocol tcp; l3proto ip6; policy = { ${TIMEOUTS} }; }`,
        ]
      : []),
  ];
  const all = chains(config);
  return lines([
    ...lasting(config.vpn !== null, config.inband, config.announce.length > 0),
    ...removed,
    ...added,
    ...all.map(({ name, hook }) => `add chain ${TABLE} ${name}${hook === null ? '' : ` { ${hook} }`}`),
    ...all.flatMap(({ name, rules }) => rules.map((rule) => `add rule ${TABLE} ${name} ${rule}`)),
  ]);
}

const lines = (commands: readonly string[]): string => `${commands.join('\n')}\n`;

/** The transaction that leaves nothing of ours; it succeeds when there is nothing, too. */
export const REMOVE_TABLE = lines([`add table ${TABLE}`, `delete table ${TABLE}`]);

/** A fact worth remembering across daemons: letters, digits and `._=-/:@`, up to 100 of them. */
const FACT = /^[\w.=/:@-]{1,100}$/;

/**
 * The transaction that replaces what is remembered.
 * @throws Error for a fact that would not survive the way through nft.
 */
export function renderMemory(facts: readonly string[]): string {
  for (const fact of facts) if (!FACT.test(fact)) throw new Error(`cannot be remembered: ${fact}`);
  const elements = facts.map((fact, index) => `${index + 1} comment "${fact}"`);
  return lines([
    ...lasting(),
    `flush set ${TABLE} ${MEMORY}`,
    ...(elements.length === 0 ? [] : [`add element ${TABLE} ${MEMORY} { ${elements.join(', ')} }`]),
  ]);
}

export const LIST_MEMORY: readonly string[] = ['list', 'set', ...TABLE.split(' '), MEMORY];
/** The rules without elements and counts: the same text as long as nobody changed them. */
export const LIST_RULES: readonly string[] = ['-s', '-t', 'list', 'table', ...TABLE.split(' ')];
/** Chains of all `inet` tables, without their rules. */
export const LIST_CHAINS: readonly string[] = ['list', 'chains', 'inet'];
export const LIST_COUNTERS: readonly string[] = ['list', 'counters', 'table', ...TABLE.split(' ')];
/** Where the leases of a family's clients are, as names of table (of family inet) and map. */
export const leaseMap = (family: 4 | 6): { readonly table: string; readonly map: string } => ({
  table: TABLE.split(' ')[1] ?? '',
  map: MAPS[family],
});
/** Facts in a line of `LIST_MEMORY`. */
export function readFacts(line: string): string[] {
  return [...line.matchAll(/\d+ comment "([^"]*)"/g)].map((match) => match[1] ?? '');
}

/** Name and packets of the counters in the whole text of `LIST_COUNTERS`. */
export function readCounters(text: string): Map<string, number> {
  const found = text.matchAll(/counter (\S+) \{\s*packets (\d+)/g);
  return new Map([...found].map((match) => [match[1] ?? '', Number(match[2])]));
}

/** A lease as the kernel holds it; `remaining` seconds. */
export type Element = {
  readonly owner: Owner;
  readonly client: Address;
  readonly port: number;
  readonly destination: Endpoint;
  readonly remaining: number;
};

const comment = (owner: Owner): string => (owner === 'v1' ? 'v1' : `k${(owner >>> 0).toString(16).padStart(8, '0')}`);

function ownerOf(text: string | null): Owner | null {
  if (text === 'v1') return 'v1';
  return text !== null && /^k[0-9a-f]{8}$/.test(text) ? Number.parseInt(text.slice(1), 16) : null;
}

/**
 * The commands for one planned write, to be joined with others in one transaction. `lifetime` is what the client will
 * be told; the kernel keeps the element `GRACE` seconds longer. `refreshes`: what `PROBE` found out. A renewal or removal
 * does not mind whether the element has expired meanwhile: it is put there first, which changes nothing when it is.
 */
export function renderWrite({ kind, lease, lifetime }: Write, refreshes: boolean): string {
  const map = `${TABLE} ${MAPS[lease.client.family]}`;
  const key = `${formatAddress(lease.client)} . ${lease.port}`;
  const { destination } = lease;
  const add = `add element ${map} { ${key} timeout ${lifetime + GRACE}s comment "${comment(lease.owner)}" : ${formatAddress(destination.address)} . ${destination.port} }`;
  const remove = `delete element ${map} { ${key} }`;
  if (kind === 'add') return lines([add]);
  if (kind === 'remove') return lines([add, remove]);
  // Delete and add always gives a new timeout, but a delete makes the transaction wait 10 ms for an RCU grace period.
  return refreshes
    ? lines([add.replace(' comment', ` expires ${lifetime + GRACE}s comment`)])
    : lines([add, remove, add]);
}

/** Fails with `exists` when the element is there. */
export function renderCreation(lease: Write['lease'], lifetime: number): string {
  return renderWrite({ kind: 'add', lease, lifetime }, false).replace(/^add/, 'create');
}

/**
 * Finds out whether adding an element again gives it a new timeout: since Linux 6.12 it does, before that it silently
 * does not. Three transactions; after the second, `LIST_PROBE` shows the element, and `readProbe` says what it means.
 */
export const PROBE = [
  lines([
    `add table ${TABLE}`,
    `add set ${TABLE} probe { typeof tcp dport; flags timeout; }`,
    `add element ${TABLE} probe { 1 timeout 60s }`,
  ]),
  lines([`add element ${TABLE} probe { 1 timeout 600s expires 600s }`]),
  lines([`delete set ${TABLE} probe`]),
] as const;
export const LIST_PROBE: readonly string[] = ['list', 'set', ...TABLE.split(' '), 'probe'];

export function readProbe(text: string): boolean {
  return seconds(/expires (\w+)/.exec(text)?.[1] ?? '') > 60;
}

/** Removes an element that belongs to nobody; one that has expired meanwhile is no failure. */
export function renderRemoval({ owner, client, port, destination }: Element): string {
  return renderWrite({ kind: 'remove', lease: { owner, client, port, destination, expires: 0 }, lifetime: 60 }, false);
}

const UNITS: Readonly<Record<string, number>> = { d: 86_400, h: 3_600, m: 60, s: 1, ms: 0.001 };

function seconds(text: string): number {
  let total = 0;
  for (const [, count, unit] of text.matchAll(/(\d+)(ms|[dhms])/g)) total += Number(count) * (UNITS[unit ?? ''] ?? 0);
  return total;
}

/** A key of the map that is nobody's lease, as text that `renderForeignRemoval` takes. */
export type Foreign = { readonly family: 4 | 6; readonly key: string };

/** An element as `Nft.dump` hands it over: bytes in network order, the port filled up to 4 bytes. */
type Found = {
  readonly key: Uint8Array;
  readonly data: Uint8Array;
  readonly remaining: number | null;
  readonly comment: string | null;
};

const ADDRESS_BYTES = { 4: 4, 6: 16 } as const;
const PORT_BYTES = 4;

/** Reads addresses, one object for each however often it comes: 60,000 leases name few. */
export class AddressBook {
  readonly #v4 = new Map<number, Address>();
  readonly #v6 = new Map<string, Address>();

  /** The address at the beginning of `bytes`. IPv4-mapped ones become IPv4, as everywhere. */
  read(family: 4 | 6, bytes: Uint8Array): Address {
    if (family === 6) {
      const key = String.fromCharCode(...bytes.subarray(0, ADDRESS_BYTES[6]));
      const known = this.#v6.get(key) ?? readAddress(bytes);
      this.#v6.set(key, known);
      return known;
    }
    const [a = 0, b = 0, c = 0, d = 0] = bytes;
    const number = ((a << 24) | (b << 16) | (c << 8) | d) >>> 0;
    let known = this.#v4.get(number);
    if (!known) {
      known = { family: 4, value: BigInt(number) };
      this.#v4.set(number, known);
    }
    return known;
  }
}

/** The lease that an element of a family's map is, or else its key: nobody of ours can have put it there. */
export function readElement(family: 4 | 6, found: Found, known: AddressBook): Element | Foreign {
  const { key, data, remaining, comment } = found;
  const owner = ownerOf(comment);
  const width = ADDRESS_BYTES[family];
  const client = known.read(family, key);
  const address = known.read(family, data);
  const whole = key.length === width + PORT_BYTES && data.length === width + PORT_BYTES;
  if (owner === null || remaining === null || !whole || client.family !== family || address.family !== family) {
    return { family, key: `${plainAddress(family, key)} . ${portIn(key, width)}` };
  }
  return { owner, client, port: portIn(key, width), destination: { address, port: portIn(data, width) }, remaining };
}

const portIn = (bytes: Uint8Array, at: number): number => ((bytes[at] ?? 0) << 8) | (bytes[at + 1] ?? 0);

/** An address as nft takes it, also one that we would read as another. */
function plainAddress(family: 4 | 6, bytes: Uint8Array): string {
  if (family === 4) return bytes.subarray(0, ADDRESS_BYTES[4]).join('.');
  return Array.from({ length: 8 }, (_, group) => portIn(bytes, 2 * group).toString(16)).join(':');
}

/** Removes elements without an owner. */
export function renderForeignRemoval(foreign: readonly Foreign[]): string {
  return lines(foreign.map(({ family, key }) => `delete element ${TABLE} ${MAPS[family]} { ${key} }`));
}

/** Whether the kernel's element is the lease: the same way for the same client to the same place. */
export function isSame(element: Element, lease: Write['lease']): boolean {
  return (
    element.port === lease.port &&
    element.owner === lease.owner &&
    sameAddress(element.client, lease.client) &&
    element.destination.port === lease.destination.port &&
    sameAddress(element.destination.address, lease.destination.address)
  );
}

/** An address inside a tunnel as the kernel holds it; `remaining` seconds. */
export type TunnelElement = {
  readonly owner: number;
  readonly choice: number;
  readonly address: Address;
  readonly remaining: number;
};

/** Where the addresses of a family are, as names of table and set. */
export const tunnelSet = (family: 4 | 6): { readonly table: string; readonly map: string } => ({
  table: leaseMap(family).table,
  map: TUNNELS[family],
});

const tunnelElement = (address: Address): string => `${TABLE} ${TUNNELS[address.family]} { ${formatAddress(address)}`;
const addressesOf = ({ v4, v6 }: Tunnel): Address[] => [v4, v6].filter((address) => address !== null);

/** What the address has to be in the set first, or it could not be deleted. */
function withoutTunnel(tunnel: Tunnel): string[] {
  return addressesOf(tunnel).flatMap((address) => [
    `add element ${tunnelElement(address)} timeout 60s }`,
    `delete element ${tunnelElement(address)} }`,
  ]);
}

/**
 * The transaction that lets a tunnel's addresses through for `lifetime` seconds and a little more, whether they were or not, and
 * those no longer that it had before.
 */
export function renderTunnel(tunnel: Tunnel, lifetime: number, instead: Tunnel | null): string {
  const about = `timeout ${lifetime + GRACE}s comment "${comment(tunnel.owner)}c${tunnel.choice}"`;
  return lines([
    ...(instead ? withoutTunnel(instead) : []),
    ...withoutTunnel(tunnel),
    ...addressesOf(tunnel).map((address) => `add element ${tunnelElement(address)} ${about} }`),
  ]);
}

/** The transaction after which a tunnel's addresses are let through no longer; one that has expired is no failure. */
export const renderTunnelRemoval = (tunnel: Tunnel): string => lines(withoutTunnel(tunnel));

/** The transaction after which no tunnel's are. */
export const FLUSH_TUNNELS = lines([`flush set ${TABLE} ${TUNNELS[4]}`, `flush set ${TABLE} ${TUNNELS[6]}`]);

/** The tunnel's address that an element of a family's set is; null for what nobody of ours can have put there. */
export function readTunnelElement(family: 4 | 6, { key, remaining, comment: text }: Found): TunnelElement | null {
  const [, owner, choice] = /^k([0-9a-f]{8})c(\d{1,5})$/.exec(text ?? '') ?? [];
  if (key.length < ADDRESS_BYTES[family] || remaining === null || owner === undefined) return null;
  const bytes = new Uint8Array(16);
  if (family === 4) bytes.fill(0xff, 10, 12);
  bytes.set(key.subarray(0, ADDRESS_BYTES[family]), family === 4 ? 12 : 0);
  return { owner: Number.parseInt(owner, 16), choice: Number(choice), address: readAddress(bytes), remaining };
}

/** A capability as the kernel holds it; `remaining` seconds. */
export type CapabilityElement = Omit<Capability, 'expires'> & { readonly remaining: number };

/** Where capabilities are, as names of table and set. */
export const CAPABILITY_SET = { table: leaseMap(4).table, map: AUTH };

const capabilityKey = ({ client, port }: Pick<Capability, 'client' | 'port'>): string =>
  `${TABLE} ${AUTH} { ${formatAddress(client)} . ${port}`;

/** What is removed has to be in the set first, or it could not be. */
export const renderCapabilityRemoval = (capability: Pick<Capability, 'client' | 'port'>): string =>
  lines([`add element ${capabilityKey(capability)} timeout 60s }`, `delete element ${capabilityKey(capability)} }`]);

/** The commands that let a client's joins name their server at this port for `lifetime` seconds and a little more, whether they might before or not. */
export function renderCapability(capability: Capability, refreshes: boolean, lifetime = CAPABILITY_LIFETIME): string {
  const { owner, session } = capability;
  const seconds = lifetime + GRACE;
  const about = `comment "${comment(owner)}s${session.toString(16).padStart(16, '0')}" }`;
  const key = capabilityKey(capability);
  return refreshes
    ? lines([`add element ${key} timeout ${seconds}s expires ${seconds}s ${about}`])
    : renderCapabilityRemoval(capability) + lines([`add element ${key} timeout ${seconds}s ${about}`]);
}

/** The capability that an element of the set is; null for what nobody of ours can have put there. */
export function readCapability({ key, remaining, comment: text }: Found): CapabilityElement | null {
  const [, owner, session] = /^k([0-9a-f]{8})s([0-9a-f]{16})$/.exec(text ?? '') ?? [];
  if (key.length !== ADDRESS_BYTES[4] + PORT_BYTES || remaining === null || owner === undefined) return null;
  return {
    owner: Number.parseInt(owner, 16),
    session: BigInt(`0x${session}`),
    client: new AddressBook().read(4, key),
    port: portIn(key, ADDRESS_BYTES[4]),
    remaining,
  };
}

/** The transaction after which these may name their servers and nobody else, each for so many seconds and a little more. */
export const renderCapabilities = (
  all: readonly { readonly capability: Capability; readonly lifetime: number }[],
): string =>
  lines([`flush set ${TABLE} ${AUTH}`]) +
  all.map(({ capability, lifetime }) => renderCapability(capability, true, lifetime)).join('');

/** An announcement as the kernel holds it; `remaining` seconds. */
export type AnnouncementElement = Omit<Announcement, 'expires'> & { readonly remaining: number };

/** Where the announcements of a family are, as names of table and map. */
export const announcedMap = (family: 4 | 6): { readonly table: string; readonly map: string } => ({
  table: leaseMap(family).table,
  map: ANNOUNCED[family],
});

/** The commands that lead joins to a server for `lifetime` seconds and a little more, or with 0 no longer, whether they did before or not. */
export function renderAnnouncement({ owner, server }: Omit<Announcement, 'expires'>, lifetime: number): string {
  const { address, port } = server;
  const map = `${TABLE} ${ANNOUNCED[address.family]}`;
  const add = `add element ${map} { ${port} timeout ${lifetime + GRACE}s comment "${comment(owner)}" : ${formatAddress(address)} . ${port} }`;
  const remove = `delete element ${map} { ${port} }`;
  return lines(lifetime === 0 ? [add, remove] : [add, remove, add]);
}

/** The transaction after which these are led through and no others, each for so many seconds and a little more. */
export const renderAnnouncements = (
  all: readonly { readonly announcement: Announcement; readonly lifetime: number }[],
): string =>
  lines([`flush map ${TABLE} ${ANNOUNCED[4]}`, `flush map ${TABLE} ${ANNOUNCED[6]}`]) +
  all.map(({ announcement, lifetime }) => renderAnnouncement(announcement, lifetime)).join('');

/** The announcement that an element of a family's map is; null for what nobody of ours can have put there. */
export function readAnnouncement(
  family: 4 | 6,
  { key, data, remaining, comment: text }: Found,
): AnnouncementElement | null {
  const owner = ownerOf(text);
  const width = ADDRESS_BYTES[family];
  if (typeof owner !== 'number' || remaining === null || data.length !== width + PORT_BYTES || key.length < 2)
    return null;
  const server = { address: new AddressBook().read(family, data), port: portIn(data, width) };
  return server.port === portIn(key, 0) && server.address.family === family ? { owner, server, remaining } : null;
}
