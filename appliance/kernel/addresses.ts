import { readFile } from 'node:fs/promises';
import { networkInterfaces } from 'node:os';
import { type Address, parseAddress } from '../protocol/address.ts';
import type { LocalAddress } from './datagrams.ts';

/** Addresses and routes of this namespace. Reading them changes nothing. */
export type Addresses = {
  /** Every address of an interface that is up. */
  local(): readonly LocalAddress[];
  /** Next hops of the default routes of the main table, both families. */
  gateways(): Promise<readonly Address[]>;
};

const littleEndian = (hex: string): bigint => BigInt(`0x${(hex.match(/../g) ?? []).toReversed().join('')}`);

/** Next hops of default routes in the text of /proc/net/route (columns: Iface Destination Gateway ... Mask). */
export function gateways4(text: string): readonly Address[] {
  return text.split('\n').flatMap((line): Address[] => {
    const [, destination, gateway, , , , , mask] = line.trim().split(/\s+/);
    if (destination !== '00000000' || mask !== '00000000' || !gateway || gateway === '00000000') return [];
    return [{ family: 4, value: littleEndian(gateway) }];
  });
}

/** Next hops of default routes in the text of /proc/net/ipv6_route (destination, length, source, length, next hop). */
export function gateways6(text: string): readonly Address[] {
  return text.split('\n').flatMap((line): Address[] => {
    const [destination, length, , , hop] = line.trim().split(/\s+/);
    if (length !== '00' || !hop || !/^0+$/.test(destination ?? '') || /^0+$/.test(hop)) return [];
    return [{ family: 6, value: BigInt(`0x${hop}`) }];
  });
}

export const systemAddresses: Addresses = {
  local: () =>
    Object.entries(networkInterfaces()).flatMap(([name, entries]) =>
      (entries ?? []).flatMap((entry) => {
        const address = parseAddress(entry.address);
        const length = Number(entry.cidr?.split('/')[1] ?? (entry.family === 'IPv4' ? 32 : 128));
        return address ? [{ address, length, interface: name }] : [];
      }),
    ),
  async gateways() {
    // A kernel without IPv6 has no such file.
    const read = (path: string): Promise<string> => readFile(path, 'utf8').catch(() => '');
    const [v4, v6] = await Promise.all([read('/proc/net/route'), read('/proc/net/ipv6_route')]);
    return [...gateways4(v4), ...gateways6(v6)];
  },
};
