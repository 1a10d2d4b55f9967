/** A client of a router's tunnels without an agent: for tests of what the router lets through. */
import { udpDatagrams } from '../../appliance/kernel/datagrams.ts';
import { type Links, openLinks } from '../../appliance/kernel/links.ts';
import { type Namespace, openNamespace } from '../../appliance/kernel/namespaces.ts';
import { openWireguard, type Wireguard } from '../../appliance/kernel/wireguard.ts';
import { type Address, formatAddress, parseEndpoint, parsePrefix } from '../../appliance/protocol/address.ts';
import type { Host } from './netns.ts';
import { readKey, Speaker } from './speaker.ts';

const EVERYTHING = ['0.0.0.0/0', '::/0'].flatMap((text) => parsePrefix(text) ?? []);
const TABLE = 45_900;
/** Before the table of everything else. */
const PRIORITY = 4_590;

export type Inner = { readonly v4: string; readonly v6: string };

export class TunnelClient {
  readonly keys;
  readonly #name: string;
  readonly #namespace: Namespace;
  readonly #links: Links;
  readonly #wireguard: Wireguard;
  readonly #control: string;
  readonly speaker: Speaker;

  private constructor(name: string, namespace: Namespace, control: string, speaker: Speaker) {
    this.#name = name;
    this.#namespace = namespace;
    this.#control = control;
    this.speaker = speaker;
    this.#links = openLinks(namespace);
    this.#wireguard = openWireguard(this.#links, namespace);
    this.keys = this.#wireguard.newKeys();
  }

  /** `name` of the interface, `control` where the router is, `key` as in `DETOUR_KEY`. */
  static async open(host: Host, name: string, control: string, key: string): Promise<TunnelClient> {
    const namespace = await openNamespace(host.path);
    const router = parseEndpoint(control);
    if (!router) throw new Error(control);
    const speaker = await Speaker.open(udpDatagrams(namespace), router, readKey(key));
    await speaker.hello();
    return new TunnelClient(name, namespace, control, speaker);
  }

  /** Enrols and brings the tunnel up; whatever leaves from its addresses leaves by it. */
  async up(mtu = 1280): Promise<Inner> {
    const [router, granted] = [await this.speaker.router(), await this.speaker.enrol(this.keys.publicKey)];
    if (router.tunnel?.kind !== 'router' || granted.tunnel?.kind !== 'client')
      throw new Error(`no tunnel: ${router.result}, ${granted.result}`);
    const { v4, v6 } = granted.tunnel;
    const outer = parseEndpoint(this.#control);
    if (!outer || !v4 || !v6) throw new Error('one of the families is missing');
    await this.#wireguard.create(this.#name);
    await this.#wireguard.change(this.#name, {
      privateKey: this.keys.privateKey,
      port: 0,
      peers: [
        {
          publicKey: router.tunnel.publicKey,
          endpoint: { ...outer, port: router.tunnel.port },
          allowed: EVERYTHING,
        },
      ],
    });
    const index = (await this.#links.links()).find(({ name }) => name === this.#name)?.index ?? 0;
    await this.#links.raise(index, mtu);
    for (const { address } of [v4, v6]) await this.use(address, index);
    return { v4: formatAddress(v4.address), v6: formatAddress(v6.address) };
  }

  /** Sends what leaves from an address by the tunnel, whether the router granted it or not. */
  async use(address: Address, known?: number): Promise<void> {
    const index = known ?? (await this.#links.links()).find(({ name }) => name === this.#name)?.index ?? 0;
    await this.#links.assign(index, address, address.family === 4 ? 32 : 128, true);
    await this.#links.addRule({ from: address, table: TABLE, priority: PRIORITY });
    await this.#links.addDefault(TABLE, index, address.family).catch(() => undefined);
  }

  /** What WireGuard says of the router. */
  async peer() {
    return (await this.#wireguard.read(this.#name))?.peers[0] ?? null;
  }

  async close(): Promise<void> {
    this.speaker.close();
    await this.#wireguard.remove(this.#name).catch(() => undefined);
    this.#wireguard.close();
    this.#links.close();
    this.#namespace.close();
  }
}
