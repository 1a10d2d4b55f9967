import { createReadStream } from 'node:fs';
import { createInterface } from 'node:readline';
import { execa } from 'execa';
import { type Address, type Endpoint, formatAddress, parseAddress } from '../protocol/address.ts';
import type { Sysctl } from './sysctl.ts';

type Fwmark = { readonly mark: number; readonly mask: number };

/** A relayed connection: `client` reached `destination` by way of our `port`. `state` as conntrack names TCP's. */
export type Flow = {
  readonly client: Endpoint;
  readonly port: number;
  readonly destination: Endpoint;
  readonly state: string;
};

/** The connection tracking table of this namespace; its size limit is the whole host's. */
export type Conntrack = {
  /** Entries in use and their limit; null when the kernel does not say. */
  usage(): Promise<{ readonly used: number; readonly max: number } | null>;
  /** Flows that carry our mark: how many, and the first `most` of them. Null when they cannot be listed. */
  flows(fwmark: Fwmark, most: number): Promise<{ readonly count: number; readonly first: readonly Flow[] } | null>;
  /** Ends the flows from `client` to our `port`, null: to anywhere; answers with how many. 0 as well when it cannot be done. */
  cut(client: Address, port: number | null, fwmark: Fwmark): Promise<number>;
};

const LIST = '/proc/net/nf_conntrack';

export function systemConntrack(sysctl: Sysctl): Conntrack {
  return {
    async usage() {
      const [used, max] = await Promise.all([
        sysctl.read('net.netfilter.nf_conntrack_count'),
        sysctl.read('net.netfilter.nf_conntrack_max'),
      ]);
      return used === null || max === null ? null : { used: Number(used), max: Number(max) };
    },
    async flows({ mark, mask }, most) {
      let count = 0;
      const first: Flow[] = [];
      const take = (line: string): void => {
        const found = / mark=(\d+)/.exec(line)?.[1];
        if (found === undefined || (Number(found) & mask) >>> 0 !== mark >>> 0) return;
        count += 1;
        const flow = first.length < most ? readFlow(line) : null;
        if (flow) first.push(flow);
      };
      try {
        for await (const line of createInterface({ input: createReadStream(LIST) })) take(line);
      } catch {
        // Debian builds its kernels without this file (CONFIG_NF_CONNTRACK_PROCFS); then the program asks by netlink.
        for (const family of ['ipv4', 'ipv6']) {
          const listing = await run(['-L', '-f', family, '-p', 'tcp', '-m', `${mark}/${mask}`]);
          if (listing.failed) return null;
          for (const line of listing.stdout.split('\n')) take(line);
        }
      }
      return { count, first };
    },
    async cut(client, port, { mark, mask }) {
      const family = client.family === 4 ? 'ipv4' : 'ipv6';
      const to = port === null ? [] : ['--orig-port-dst', `${port}`];
      const args = ['-D', '-f', family, '-p', 'tcp', '-s', formatAddress(client), ...to, '-m', `${mark}/${mask}`];
      const result = await run(args);
      return Number(/(\d+) flow entries have been deleted/.exec(result.stderr)?.[1] ?? 0);
    },
  };
}

async function run(args: readonly string[]): Promise<{ failed: boolean; stdout: string; stderr: string }> {
  const { failed, stdout, stderr } = await execa('conntrack', [...args], {
    reject: false,
    timeout: 5_000,
    env: { LC_ALL: 'C' },
  });
  return { failed, stdout: stdout ?? '', stderr: stderr ?? '' };
}

/** Both directions of an entry: the client's, then the server's answer, whose source is where the flow really goes. */
const ENTRY = / (\w+) src=(\S+) dst=\S+ sport=(\d+) dport=(\d+) .*?src=(\S+) dst=\S+ sport=(\d+) dport=\d+ .*mark=/;

/** Reads a line of `/proc/net/nf_conntrack` or of `conntrack -L`; null when it is about something else than TCP. */
export function readFlow(line: string): Flow | null {
  const [, state = '', source = '', sourcePort, port, target = '', targetPort] = ENTRY.exec(line) ?? [];
  const client = parseAddress(source);
  const destination = parseAddress(target);
  if (!client || !destination) return null;
  return {
    client: { address: client, port: Number(sourcePort) },
    port: Number(port),
    destination: { address: destination, port: Number(targetPort) },
    state,
  };
}
