/**
 * The layout of rtnetlink's messages about interfaces, addresses, routes and rules. Numbers: include/uapi/linux/{rtnetlink,
 * if_link,if_addr,fib_rules,if}.h. `BYTES` is the length of a header; names before the empty lines below are places in it, those
 * after them types of attributes.
 */

/** `RTM_*` */
export const MESSAGE = {
  NEWLINK: 16,
  DELLINK: 17,
  GETLINK: 18,
  NEWADDR: 20,
  DELADDR: 21,
  GETADDR: 22,
  NEWROUTE: 24,
  DELROUTE: 25,
  GETROUTE: 26,
  NEWRULE: 32,
  DELRULE: 33,
  GETRULE: 34,
} as const;

/** struct ifinfomsg, `IFLA_*` */
export const LINK = {
  BYTES: 16,
  INDEX: 4,
  FLAGS: 8,
  CHANGE: 12,

  NAME: 3,
  MTU: 4,
  INFO: 18,
  FAMILIES: 26,
} as const;
/** `IFF_*` */
export const LINK_UP = 0x1;
export const LINK_LOOPBACK = 0x8;
export const LINK_RUNNING = 0x40;

/** struct ifaddrmsg, `IFA_*`; `ADDRESS` is the other end's on a point-to-point link, where `LOCAL` is ours. */
export const HELD = {
  BYTES: 8,
  LENGTH: 1,
  FLAGS: 2,
  SCOPE: 3,
  INDEX: 4,

  ADDRESS: 1,
  LOCAL: 2,
  LIFETIMES: 6,
  ALL_FLAGS: 8,
} as const;
/** `RT_SCOPE_LINK`; of less reach are greater numbers. */
export const SCOPE_LINK = 253;

/** struct rtmsg, `RTA_*` */
export const ROUTE = {
  BYTES: 12,
  TO_LENGTH: 1,
  FROM_LENGTH: 2,
  TABLE: 4,
  PROTOCOL: 5,
  SCOPE: 6,
  TYPE: 7,

  TO: 1,
  FROM: 2,
  OUT: 4,
  METRIC: 6,
  SOURCE: 7,
  MANY: 9,
  LONG_TABLE: 15,
} as const;
/** `RTN_*` */
export const ROUTE_UNICAST = 1;
export const ROUTE_LOCAL = 2;
/** From here on, types of routes are refusals of packets or policies again. */
export const ROUTE_BLACKHOLE = 6;

/** struct fib_rule_hdr, `FRA_*` */
export const RULE = {
  BYTES: 12,
  FROM_LENGTH: 2,
  TABLE: 4,
  ACTION: 7,

  FROM: 2,
  PRIORITY: 6,
  LONG_TABLE: 15,
  PROTOCOL: 21,
} as const;

/** `rtm_protocol` and `FRA_PROTOCOL` of what is ours; `ip route` shows it as "proto 215". Free in iproute2's rt_protos. */
export const OWNER = 215;

export const AF_INET = 2;
export const AF_INET6 = 10;
