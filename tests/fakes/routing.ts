import type { InterfaceAddress, Network, NetworkNews } from '../../appliance/kernel/network.ts';
import { type Address, sameAddress } from '../../appliance/protocol/address.ts';

/** A host's interfaces, each the way to everywhere for its family; the first listed is the default. */
export class FakeRouting {
  readonly held: InterfaceAddress[];
  readonly #listeners = new Set<(news: NetworkNews) => void>();

  constructor(addresses: readonly Address[], name = 'eth0') {
    this.held = addresses.map((address) => ({ address, interface: name, index: 2, deprecated: false }));
  }

  /** Changes the interfaces and tells whoever listens. */
  change(held: readonly InterfaceAddress[]): void {
    this.held.splice(0, this.held.length, ...held);
    for (const tell of this.#listeners) tell('link');
  }

  readonly open = (onNews: (news: NetworkNews) => void): Network => {
    this.#listeners.add(onNews);
    return {
      addresses: async () => [...this.held],
      defaults: async () => this.held.map(({ address, index }, metric) => ({ family: address.family, index, metric })),
      route: async (to, from) => {
        const way = this.held.find(
          ({ address }) => address.family === to.family && (from === undefined || sameAddress(from, address)),
        );
        return way ? { source: way.address, index: way.index } : null;
      },
      close: () => this.#listeners.delete(onNews),
    };
  };
}
