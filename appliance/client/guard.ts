import { TUNNEL_PREFIX } from './numbering.ts';

/**
 * What may come out of a tunnel into this host, as text for nft: one table of our own, `inet detour_tunnels`, there for as long
 * as there is a tunnel. The other end is a detour, which may be hostile, and behind a tunnel no home router's NAT stands
 * between it and what listens here. No rule needs conntrack, and none sees a packet of another interface.
 */

export const GUARD_TABLE = 'inet detour_tunnels';
const ANSWERS = 'answers';

/** Where answers of the detour's control port to one socket of ours arrive. */
export type Answers = {
  /** The tunnel's interface. */
  readonly name: string;
  /** UDP port they come from, and the one they go to. */
  readonly from: number;
  readonly to: number;
};

const text = (lines: readonly string[]): string => `${lines.join('\n')}\n`;

/** The transaction after which nothing comes out of tunnels but answers, whatever an earlier agent left. */
export const RENDER_GUARD = text([
  `add table ${GUARD_TABLE}`,
  `delete table ${GUARD_TABLE}`,
  `add table ${GUARD_TABLE}`,
  `add set ${GUARD_TABLE} ${ANSWERS} { type ifname . inet_service . inet_service; }`,
  `add chain ${GUARD_TABLE} arriving { type filter hook prerouting priority raw; policy accept; }`,
  `add chain ${GUARD_TABLE} tunnelled`,
  `add rule ${GUARD_TABLE} arriving iifname "${TUNNEL_PREFIX}*" goto tunnelled`,
  // To the address inside the tunnel and to no other: not to another interface's, and not through this host.
  `add rule ${GUARD_TABLE} tunnelled fib daddr . iif type != local drop`,
  // Nobody opens a connection; what answers one of ours is no bare SYN.
  `add rule ${GUARD_TABLE} tunnelled tcp flags & (syn|ack) == syn drop`,
  `add rule ${GUARD_TABLE} tunnelled meta l4proto tcp accept`,
  `add rule ${GUARD_TABLE} tunnelled icmp type { destination-unreachable, time-exceeded, parameter-problem } accept`,
  `add rule ${GUARD_TABLE} tunnelled icmpv6 type { destination-unreachable, packet-too-big, time-exceeded, parameter-problem } accept`,
  `add rule ${GUARD_TABLE} tunnelled iifname . udp sport . udp dport @${ANSWERS} accept`,
  `add rule ${GUARD_TABLE} tunnelled drop`,
]);

const element = ({ name, from, to }: Answers): string => `${GUARD_TABLE} ${ANSWERS} { "${name}" . ${from} . ${to} }`;

/** Lets answers in. Again is no failure. */
export const renderAnswers = (answers: Answers): string => text([`add element ${element(answers)}`]);

/** Lets them in no longer. It fails when they were not. */
export const renderNoAnswers = (answers: Answers): string => text([`delete element ${element(answers)}`]);

/** The transaction that leaves nothing of it; it succeeds when there is nothing, too. */
export const REMOVE_GUARD = text([`add table ${GUARD_TABLE}`, `delete table ${GUARD_TABLE}`]);
