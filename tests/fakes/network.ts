import type { Datagram, DatagramClient, DatagramServer, Datagrams } from '../../appliance/kernel/datagrams.ts';
import { type Address, type Endpoint, formatEndpoint, sameAddress } from '../../appliance/protocol/address.ts';
import type { FakeClock } from './clock.ts';

/** Decides the fate of one datagram: milliseconds of delay for each copy delivered; none is a loss. */
export type Fate = (from: Endpoint, to: Endpoint, bytes: Uint8Array) => readonly number[];

/** A host is known by the list of its addresses. */
type Host = readonly Address[];

type Bound = { readonly host: Host; readonly receive: (bytes: Uint8Array, from: Endpoint) => void };

/** An in-memory UDP network. Every host sees it through `Datagrams` made for its own addresses. */
export class FakeNetwork {
  fate: Fate = () => [0];
  /** Which of the hosts that have an address what is sent there reaches; `sender` is null for what a test forged. */
  reaches: (sender: Host | null, from: Endpoint, receiver: Host, to: Endpoint) => boolean = () => true;
  /** Every datagram sent, lost ones too, in order. */
  readonly sent: { from: Endpoint; to: Endpoint; bytes: Uint8Array }[] = [];
  readonly #clock: FakeClock;
  readonly #sockets = new Map<string, Set<Bound>>();
  #ephemeral = 40000;

  constructor(clock: FakeClock) {
    this.#clock = clock;
  }

  /** Puts a datagram on the wire; a test may forge `from`. */
  send(from: Endpoint, to: Endpoint, bytes: Uint8Array, sender: Host | null = null): void {
    const copy = bytes.slice();
    this.sent.push({ from, to, bytes: copy });
    for (const delay of this.fate(from, to, copy)) {
      this.#clock.after(delay, () => {
        for (const { host, receive } of this.#sockets.get(formatEndpoint(to)) ?? [])
          if (this.reaches(sender, from, host, to)) receive(copy.slice(), from);
      });
    }
  }

  /** What one host, with these addresses, can do. */
  host(addresses: readonly Address[]): Datagrams {
    const bind = (local: Endpoint, receive: (bytes: Uint8Array, from: Endpoint) => void): (() => void) => {
      const key = formatEndpoint(local);
      const there = this.#sockets.get(key) ?? new Set();
      if ([...there].some(({ host }) => host === addresses)) throw new Error(`${key} is in use`);
      const bound: Bound = { host: addresses, receive };
      this.#sockets.set(key, there.add(bound));
      return () => there.delete(bound);
    };
    return {
      serve: async (listen, receive): Promise<DatagramServer> => {
        const wildcard = listen.address.value === 0n;
        const local = addresses
          .filter((address) => wildcard || sameAddress(address, listen.address))
          .map((address) => ({ address, port: listen.port }));
        if (local.length === 0) throw new Error(`cannot bind ${formatEndpoint(listen)}`);
        const closers = local.map((to) => bind(to, (bytes, from) => receive({ bytes, from, to })));
        return {
          local: () => local,
          reply: (datagram: Datagram, bytes) => {
            if (local.some((own) => sameAddress(own.address, datagram.to.address)))
              this.send(datagram.to, datagram.from, bytes, addresses);
          },
          close: async () => {
            for (const close of closers) close();
          },
        };
      },
      connect: async (peer, receive, _unreachable, from): Promise<DatagramClient> => {
        const address = addresses.find((own) => (from ? sameAddress(own, from) : own.family === peer.address.family));
        if (!address) throw new Error(`no route to ${formatEndpoint(peer)}`);
        const local = { address, port: this.#ephemeral++ };
        const close = bind(local, (bytes, from) => {
          if (formatEndpoint(from) === formatEndpoint(peer)) receive(bytes);
        });
        return { local: () => local, send: (bytes) => this.send(local, peer, bytes, addresses), close };
      },
    };
  }
}
