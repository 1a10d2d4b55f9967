import type { Place } from '../../appliance/client/daemon.ts';
import { load, unload } from '../../appliance/client/loader.ts';
import type { Log } from '../../appliance/log.ts';
import type { Address } from '../../appliance/protocol/address.ts';
import type { FakeClock } from './clock.ts';
import { FakeMemory, FakeSysctl } from './host.ts';
import { FakeKernel } from './mptcp.ts';
import type { FakeNetwork } from './network.ts';
import { FakeNft } from './nft.ts';
import { FakeRouting } from './routing.ts';
import { FakeTunnels } from './wireguard.ts';

/** One step of serving a namespace that may fail or take its time. */
export type Step = 'open' | 'load' | 'subscribe' | 'unload';

/** linux/proc_ns.h: those of the first namespaces are below. */
let nextInode = 0xf0000000;

/**
 * A network namespace: a kernel with its path manager, parameters, and whoever holds it open. The loader is the real one. What the
 * kernel would do to who uses it wrongly is an error here: a place that is used after it was closed, or closed twice.
 */
export class FakeNamespace {
  readonly id: string;
  readonly inode = nextInode++;
  readonly kernel: FakeKernel;
  readonly sysctl = new FakeSysctl({ 'net.mptcp.enabled': '1', 'net.mptcp.path_manager': 'kernel' });
  readonly memory = new FakeMemory();
  /** Everything that was done here, in order. */
  readonly done: string[] = [];
  /** Runs before a step; throws to make it fail, waits to make it last. */
  before: (step: Step) => Promise<void> | void = () => undefined;
  /** How many hold it open. */
  open = 0;
  /** Sockets in it that are not closed. */
  sockets = 0;
  readonly #clock: FakeClock;
  readonly #network: FakeNetwork;
  readonly #addresses: readonly Address[];

  constructor(id: string, addresses: readonly Address[], clock: FakeClock, network: FakeNetwork) {
    this.id = id;
    this.kernel = new FakeKernel(clock);
    this.#addresses = addresses;
    this.#clock = clock;
    this.#network = network;
  }

  get pathManager(): string {
    return this.sysctl.values.get('net.mptcp.path_manager') ?? '';
  }

  /** As it was before anybody came: nobody holds it, and its path manager is the kernel's. */
  get untouched(): boolean {
    return this.open === 0 && this.sockets === 0 && this.pathManager === 'kernel' && this.memory.values === null;
  }

  async enter(log: Log): Promise<Place> {
    await this.before('open');
    this.open++;
    let closed = false;
    const inside = (what: string): void => {
      if (closed) throw new Error(`${this.id}: ${what} after it was closed`);
      this.done.push(what);
    };
    /** A socket, that keeps the namespace until it is closed. */
    const socket = <T extends { close(): void }>(made: T): T => {
      inside('socket');
      this.sockets++;
      let isOpen = true;
      const close = (): void => {
        if (isOpen) this.sockets--;
        isOpen = false;
        made.close();
      };
      return Object.assign(Object.create(made) as T, { close });
    };
    const loader = { sysctl: this.sysctl, memory: this.memory, log };
    return {
      id: this.id,
      net: { inode: this.inode, mptcpEnabled: async () => this.sysctl.values.get('net.mptcp.enabled') !== '0' },
      ports: {
        clock: this.#clock,
        datagrams: this.#network.host(this.#addresses),
        openDiag: () => socket(this.kernel.diag),
        log,
        openNetwork: (onNews) => socket(new FakeRouting(this.#addresses).open(onNews)),
        openRescue: () => {
          throw new Error('no rescue here');
        },
        openTunnels: () => {
          const { links, wireguard } = new FakeTunnels([...this.#addresses], this.id);
          return { links: socket(links), wireguard: socket(wireguard), nft: new FakeNft(this.#clock), place: this.id };
        },
        openPathManager: async (onEvent) => {
          await this.before('subscribe');
          return socket(await this.kernel.openPathManager(onEvent));
        },
      },
      load: async () => {
        inside('load');
        await this.before('load');
        await load(loader, 'daemon');
      },
      unload: async () => {
        inside('unload');
        await this.before('unload');
        await unload(loader, 'daemon');
      },
      close: () => {
        inside('close');
        closed = true;
        this.open--;
      },
    };
  }
}
