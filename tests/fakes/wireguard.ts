import { createHash } from 'node:crypto';
import type { LinkInfo, Links, RouteInfo, Rule, RuleInfo } from '../../appliance/kernel/links.ts';
import { NetlinkError } from '../../appliance/kernel/netlink.ts';
import {
  type DeviceState,
  type KeyPair,
  type PeerState,
  type Wireguard,
  WireguardError,
} from '../../appliance/kernel/wireguard.ts';
import { type Address, contains, type Prefix, prefixOf, sameAddress } from '../../appliance/protocol/address.ts';

type Device = {
  readonly index: number;
  readonly kind: string;
  mtu: number;
  up: boolean;
  keys: KeyPair | null;
  port: number;
  peers: Map<string, PeerState>;
  readonly held: { readonly address: Address; readonly length: number }[];
};

const text = (key: Uint8Array): string => Buffer.from(key).toString('hex');
const widthOf = ({ family }: Address): number => (family === 4 ? 32 : 128);

/**
 * Interfaces, rules and WireGuard of one host. What nobody could tell from outside is missing: no packet is made, and the
 * public key is a hash of the private one. tests/lab/tunnel-cases.ts runs the same cases against it and the real kernel.
 */
export class FakeTunnels {
  /** As `WireguardError`s of `create`: this machine has neither WireGuard nor TUN. */
  missing: string | null = null;
  /** Why changes of peers fail; null while they do not. */
  refuses: string | null = null;
  /** Routes of others. */
  readonly foreign: RouteInfo[] = [];
  readonly foreignRules: RuleInfo[] = [];
  readonly devices = new Map<string, Device>();
  readonly #rules: Rule[] = [];
  readonly #routes: RouteInfo[] = [];
  readonly addresses: Address[];
  #serial = 0;
  #keys = 0;
  readonly #seed: string;

  /** `addresses` are those of the host, to which those of its tunnels are added. */
  constructor(addresses: Address[], seed: string) {
    this.addresses = addresses;
    this.#seed = seed;
  }

  get rules(): readonly Rule[] {
    return this.#rules;
  }

  /** All that is ours is gone, as after a reboot. */
  reboot(): void {
    for (const name of [...this.devices.keys()]) this.#drop(name);
    this.#rules.length = 0;
  }

  #drop(name: string): void {
    const device = this.devices.get(name);
    if (!device) return;
    this.devices.delete(name);
    for (const { address } of device.held) this.#forget(address);
    for (const route of this.#routes.filter(({ index }) => index === device.index))
      this.#routes.splice(this.#routes.indexOf(route), 1);
  }

  #forget(address: Address): void {
    const at = this.addresses.findIndex((one) => sameAddress(one, address));
    if (at >= 0) this.addresses.splice(at, 1);
  }

  #byIndex(index: number, what: string): Device {
    for (const device of this.devices.values()) if (device.index === index) return device;
    throw new NetlinkError(what, 'ENODEV');
  }

  #add(name: string, kind: string): void {
    if (this.devices.has(name)) throw new NetlinkError('making an interface', 'EEXIST');
    const index = 100 + this.#serial++;
    const fresh: Device = { index, kind, mtu: 1420, up: false, keys: null, port: 0, peers: new Map(), held: [] };
    this.devices.set(name, fresh);
  }

  readonly links: Links = {
    links: async () => [...this.devices].map(([name, { index, kind, mtu }]): LinkInfo => ({ name, index, kind, mtu })),
    routes: async (each) => {
      for (const route of [...this.foreign, ...this.#routes]) each(route);
      for (const { index, held } of this.devices.values()) {
        for (const { address } of held) each({ to: prefixOf(address, widthOf(address)), table: 255, index });
      }
    },
    rules: async () => [
      ...this.foreignRules,
      ...this.#rules.map((rule) => ({
        family: rule.from.family,
        priority: rule.priority,
        table: rule.table,
        own: rule,
      })),
    ],
    add: async (name, kind) => this.#add(name, kind),
    remove: async (name) => this.#drop(name),
    raise: async (index, mtu) => {
      const device = this.#byIndex(index, 'putting an interface up');
      device.mtu = mtu;
      device.up = true;
    },
    assign: async (index, address, length) => {
      const device = this.#byIndex(index, 'adding an address');
      if (device.held.some((one) => sameAddress(one.address, address)))
        throw new NetlinkError('adding an address', 'EEXIST');
      device.held.push({ address, length });
      this.addresses.push(address);
    },
    withdraw: async (index, address) => {
      const device = this.#byIndex(index, 'removing an address');
      const at = device.held.findIndex((one) => sameAddress(one.address, address));
      if (at < 0) return;
      device.held.splice(at, 1);
      this.#forget(address);
      if (address.family === 6 || device.held.some((one) => one.address.family === 4)) return;
      for (const route of this.#routes.filter(({ index: by, to }) => by === index && to.address.family === 4))
        this.#routes.splice(this.#routes.indexOf(route), 1);
    },
    addDefault: async (table, index, family) => {
      this.#byIndex(index, 'adding a route');
      const to: Prefix = { address: { family, value: 0n }, length: 0 };
      if (this.#routes.some((one) => one.table === table && one.to.address.family === family))
        throw new NetlinkError('adding a route', 'EEXIST');
      this.#routes.push({ to, table, index });
    },
    addRule: async (rule) => {
      if (this.#find(rule) >= 0) throw new NetlinkError('adding a rule', 'EEXIST');
      this.#rules.push(rule);
    },
    removeRule: async (rule) => {
      const at = this.#find(rule);
      if (at >= 0) this.#rules.splice(at, 1);
    },
    close: () => undefined,
  };

  #find({ from, table, priority }: Rule): number {
    return this.#rules.findIndex(
      (one) => sameAddress(one.from, from) && one.table === table && one.priority === priority,
    );
  }

  readonly wireguard: Wireguard = {
    newKeys: () =>
      pairOf(
        createHash('sha256')
          .update(`${this.#seed} ${this.#keys++}`)
          .digest(),
      ),
    create: async (name) => {
      if (this.missing !== null) throw new WireguardError('missing', this.missing);
      if (this.devices.has(name)) throw new WireguardError('exists', `${name} exists`);
      this.#add(name, 'wireguard');
      return 'kernel';
    },
    read: async (name): Promise<DeviceState | null> => {
      const device = this.devices.get(name);
      if (device?.kind !== 'wireguard') return null;
      return { keys: device.keys, port: device.port, peers: [...device.peers.values()] };
    },
    change: async (name, { privateKey, port, peers = [] }) => {
      const device = this.devices.get(name);
      if (!device) throw new WireguardError('failed', `there is no WireGuard interface ${name}`);
      if (this.refuses !== null && peers.length > 0) throw new WireguardError('failed', this.refuses);
      if (privateKey) device.keys = pairOf(privateKey);
      if (port !== undefined) device.port = port;
      for (const peer of peers) {
        const key = text(peer.publicKey);
        if (peer.remove) {
          device.peers.delete(key);
          continue;
        }
        // A prefix belongs to one peer: whoever names it last.
        for (const [other, state] of device.peers) {
          const allowed = state.allowed.filter((one) => !peer.allowed.some((mine) => samePrefix(one, mine)));
          device.peers.set(other, { ...state, allowed });
        }
        const known = device.peers.get(key);
        device.peers.set(key, {
          publicKey: peer.publicKey,
          endpoint: peer.endpoint ?? known?.endpoint ?? null,
          allowed: peer.allowed,
          handshakeAt: known?.handshakeAt ?? null,
          received: 0,
          sent: 0,
        });
      }
    },
    remove: async (name) => this.#drop(name),
    close: () => undefined,
  };
}

const pairOf = (privateKey: Uint8Array): KeyPair => ({
  privateKey,
  publicKey: new Uint8Array(createHash('sha256').update(privateKey).digest()),
});

const samePrefix = (a: Prefix, b: Prefix): boolean => a.length === b.length && sameAddress(a.address, b.address);

/** The hosts of a test, and whether a packet gets from an address inside a tunnel to the one at its other end. */
export class FakeWire {
  readonly hosts: FakeTunnels[] = [];
  /** Keys whose datagrams get through to nobody, as with a firewall on the way. */
  readonly blocked = new Set<string>();

  /** Both hosts by the lists of their addresses: two may have one address inside tunnels. */
  carries(sender: readonly Address[], from: Address, receiver: readonly Address[], to: Address): boolean {
    const [here, there] = [this.#deviceOf(sender, from), this.#deviceOf(receiver, to)];
    if (!here?.keys || !there?.keys || !here.up || !there.up) return false;
    const peer = here.peers.get(text(there.keys.publicKey));
    const back = there.peers.get(text(here.keys.publicKey));
    if (!peer || !back || [here, there].some(({ keys }) => keys && this.blocked.has(text(keys.publicKey))))
      return false;
    // The one that began says where the other is.
    const known = peer.endpoint ? peer.endpoint.port === there.port : back.endpoint?.port === here.port;
    const may = (list: readonly Prefix[], address: Address): boolean => list.some((one) => contains(one, address));
    return known && may(peer.allowed, to) && may(back.allowed, from);
  }

  /** Whose tunnel an address of that host is inside of; null for what is in none. */
  #deviceOf(host: readonly Address[], address: Address): Device | undefined {
    const owner = this.hosts.find(({ addresses }) => addresses === host);
    return [...(owner?.devices.values() ?? [])].find(({ held }) =>
      held.some((one) => sameAddress(one.address, address)),
    );
  }

  /** Whether the address is one inside a tunnel. */
  isInside(address: Address): boolean {
    return this.hosts.some(({ devices }) =>
      [...devices.values()].some(({ held }) => held.some((one) => sameAddress(one.address, address))),
    );
  }

  /** The host at the other end of the tunnel that an address of `host` is inside of. */
  beyond(host: readonly Address[], address: Address): FakeTunnels | undefined {
    const device = this.#deviceOf(host, address);
    return this.hosts.find(({ devices }) =>
      [...devices.values()].some(({ keys }) => keys !== null && device?.peers.has(text(keys.publicKey))),
    );
  }
}
