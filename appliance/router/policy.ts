import {
  type Address,
  contains,
  covers,
  type DestinationRule,
  type Endpoint,
  embedsIPv4,
  type Prefix,
  parsePrefix,
  prefixOf,
  sameAddress,
} from '../protocol/address.ts';

/** Where a client may be relayed to. The same lists are rendered into the kernel's rules (ruleset.ts). */

function prefixes(...texts: string[]): readonly Prefix[] {
  return texts.map((text) => {
    const prefix = parsePrefix(text);
    if (!prefix) throw new Error(`not a prefix: ${text}`);
    return prefix;
  });
}

/** What no setting can open: "this network", loopback, link-local, multicast, reserved, Azure's host agent. */
export const NEVER = prefixes(
  '0.0.0.0/8',
  '127.0.0.0/8',
  '168.63.129.16/32',
  '169.254.0.0/16',
  '224.0.0.0/3',
  '::/8', // unspecified, loopback, and four ways to embed IPv4
  '2001::/32', // Teredo embeds IPv4
  '2002::/16', // 6to4 embeds IPv4
  'fe80::/10',
  'ff00::/8',
);

/** Denied unless `DETOUR_ALLOW` opens it (docs/protocol.md, Destinations; RFC 6890 and the IANA registries). */
export const DENIED_BY_DEFAULT = prefixes(
  '10.0.0.0/8',
  '100.64.0.0/10',
  '172.16.0.0/12',
  '192.0.0.0/24',
  '192.0.2.0/24',
  '192.31.196.0/24',
  '192.52.193.0/24',
  '192.88.99.0/24',
  '192.168.0.0/16',
  '192.175.48.0/24',
  '198.18.0.0/15',
  '198.51.100.0/24',
  '203.0.113.0/24',
  // All of IPv6 but 2000::/3, written as what is left over, so that one list serves kernel and daemon.
  '::/3',
  '4000::/2',
  '8000::/1',
  '2001::/23',
  '2001:db8::/32',
  '2002::/16',
  '3fff::/20',
);

/** Mail submission from one client would ruin the address of everyone on the detour. */
export const DENIED_PORT = 25;

/** An address of this host with the length of its on-link prefix, bits. */
export type OwnAddress = { readonly address: Address; readonly length: number };

/** What the operator said and what the host is. */
export type Rules = {
  readonly allow: readonly DestinationRule[];
  readonly deny: readonly DestinationRule[];
  readonly own: readonly OwnAddress[];
};

/** The prefixes of the links that this host is on, none contained in another. */
export function onLink(own: readonly OwnAddress[]): readonly Prefix[] {
  const links = own.map(({ address, length }) => prefixOf(address, length));
  return links.filter(
    (link, index) =>
      !links.some(
        (other, at) =>
          at !== index &&
          contains(other, link.address) &&
          (other.length < link.length || (other.length === link.length && at < index)),
      ),
  );
}

/**
 * Whether `client` may be relayed to `destination` (port 1 to 65535); null when it may. What is wrong with the form of
 * the address comes before what is wrong with the place.
 */
export function judge(
  destination: Endpoint,
  client: Address,
  rules: Rules,
): 'BAD_ADDRESS' | 'DENIED_DESTINATION' | null {
  const { address, port } = destination;
  if (embedsIPv4(address)) return 'BAD_ADDRESS';
  // Its join arrives in the client's family, and the kernel translates addresses within one family only.
  if (address.family !== client.family) return 'BAD_ADDRESS';
  const inside = (prefix: Prefix): boolean => contains(prefix, address);
  if (NEVER.some(inside) || rules.own.some((own) => sameAddress(own.address, address))) return 'DENIED_DESTINATION';
  if (port === DENIED_PORT || rules.deny.some((rule) => covers(rule, destination))) return 'DENIED_DESTINATION';
  if (rules.allow.some((rule) => covers(rule, destination))) return null;
  return DENIED_BY_DEFAULT.some(inside) || onLink(rules.own).some(inside) ? 'DENIED_DESTINATION' : null;
}
