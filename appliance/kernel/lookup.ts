import { lookup, Resolver } from 'node:dns/promises';
import { type Address, parseAddress } from '../protocol/address.ts';

/** A service record, RFC 2782. All numbers are 0 to 65535. */
export type ServiceRecord = {
  /** Without a dot at its end; empty when the service is said not to exist (a target of `.`). */
  readonly target: string;
  readonly port: number;
  readonly priority: number;
  readonly weight: number;
};

export type Lookup = {
  /** Every address of a name, both families. @throws Error with a `code` when it has none or nobody answers */
  addresses(host: string): Promise<readonly Address[]>;
  /** Every service record of a name. @throws Error with a `code` when it has none or nobody answers */
  services(name: string): Promise<readonly ServiceRecord[]>;
};

/** One try of one server; with two tries the caller knows within some seconds, as with the system's own resolver. */
const TIMEOUT_MS = 2_000;
const TRIES = 2;

/**
 * Addresses come from the system's resolver, so that /etc/hosts and Docker's names work; service records, which it does
 * not offer, from the name servers of resolv.conf, or from `servers` (`ADDRESS[:PORT]`).
 */
export function systemLookup(servers: readonly string[] | null = null): Lookup {
  return {
    async addresses(host) {
      const found = await lookup(host, { all: true });
      return found.flatMap(({ address }) => parseAddress(address) ?? []);
    },
    async services(name) {
      // A fresh one each time reads resolv.conf again: a laptop's changes with its network.
      const resolver = new Resolver({ timeout: TIMEOUT_MS, tries: TRIES });
      if (servers) resolver.setServers(servers);
      const records = await resolver.resolveSrv(name);
      return records.map(({ name: target, port, priority, weight }) => ({
        target: target.replace(/\.$/, ''),
        port,
        priority,
        weight,
      }));
    },
  };
}
