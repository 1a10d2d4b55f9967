import { writeFileSync } from 'node:fs';
import { join } from 'node:path';
import type { ControlPlane } from './control.ts';
import { CLUSTER_DOMAIN, NAME_SERVERS } from './node.ts';
import type { Programs } from './programs.ts';

const START_DEADLINE_MS = 10_000;
/** How long a name is believed, in seconds: CoreDNS' default for a cluster. */
const LIFETIME_S = 5;

/** What of the API's object is looked at here. */
type Endpoints = {
  readonly metadata: { readonly namespace: string; readonly name: string };
  readonly subsets?: readonly {
    readonly addresses?: readonly { readonly ip: string; readonly hostname?: string }[];
    readonly ports?: readonly { readonly name?: string; readonly port: number; readonly protocol: string }[];
  }[];
};

/**
 * The name service of a cluster (Kubernetes DNS-based service discovery 1.1.0, section 2.4). It takes every Service for a headless
 * one: its name leads to the addresses of its ready pods, `_PORT._PROTOCOL.` before it to service records.
 *
 * dnsmasq reads service records only when it starts. So there are two, which start anew one after the other.
 */
export class Names implements AsyncDisposable {
  readonly #plane: ControlPlane;
  readonly #programs: Programs;
  readonly #file: string;
  readonly #stop = new AbortController();
  #following: Promise<void> = Promise.resolve();

  private constructor(plane: ControlPlane, programs: Programs, folder: string) {
    this.#plane = plane;
    this.#programs = programs;
    this.#file = join(folder, 'names.conf');
  }

  /** Starts it beside a control plane that answers. Its file is kept in `folder`. */
  static async start(plane: ControlPlane, programs: Programs, folder: string): Promise<Names> {
    const names = new Names(plane, programs, folder);
    for (const address of NAME_SERVERS) {
      await plane.host.exec(['ip', 'address', 'add', `${address}/32`, 'dev', 'lo']);
    }
    await names.#serve('');
    names.#following = names.#follow();
    return names;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#stop.abort();
    await this.#following;
  }

  async #follow(): Promise<void> {
    const { signal } = this.#stop;
    let served = '';
    while (!signal.aborted) {
      const known = new Map<string, Endpoints>();
      try {
        for await (const { type, object } of this.#plane.watch<Endpoints>('/api/v1/endpoints', signal)) {
          const { namespace, name } = object.metadata;
          if (type === 'DELETED') known.delete(`${name}.${namespace}`);
          else known.set(`${name}.${namespace}`, object);
          const records = [...known.values()].flatMap(recordsOf).sort().join('\n');
          if (records !== served) await this.#serve(records);
          served = records;
        }
      } catch {
        // It was told to stop, or a program of the cluster is gone, and `Programs` says so to whoever waits for anything.
        return;
      }
    }
  }

  async #serve(records: string): Promise<void> {
    writeFileSync(this.#file, records);
    for (const address of NAME_SERVERS) {
      const name = `name server ${address}`;
      await this.#programs.end(name);
      const server = this.#plane.host.spawn([
        'dnsmasq',
        `--conf-file=${this.#file}`,
        '--keep-in-foreground',
        '--log-facility=-',
        '--pid-file',
        '--no-resolv',
        '--no-hosts',
        `--listen-address=${address}`,
        '--bind-interfaces',
        `--local=/${CLUSTER_DOMAIN}/`,
        `--local-ttl=${LIFETIME_S}`,
      ]);
      this.#programs.add(name, server);
      await server.waitFor('started', START_DEADLINE_MS);
    }
  }
}

/** Lines of dnsmasq's configuration. */
function recordsOf({ metadata, subsets = [] }: Endpoints): string[] {
  const service = `${metadata.name}.${metadata.namespace}.svc.${CLUSTER_DOMAIN}`;
  return subsets.flatMap(({ addresses = [], ports = [] }) =>
    addresses.flatMap(({ ip, hostname = ip.replaceAll('.', '-') }) => [
      `host-record=${service},${ip}`,
      `host-record=${hostname}.${service},${ip}`,
      ...ports
        .filter(({ name = '' }) => name !== '')
        .map(({ name, port, protocol }) => {
          return `srv-host=_${name}._${protocol.toLowerCase()}.${service},${hostname}.${service},${port},0,1`;
        }),
    ]),
  );
}
