import { readFile } from 'node:fs/promises';
import { execa } from 'execa';
import type { Log } from '../log.ts';
import type { Nft } from './nft.ts';

/**
 * Other people's firewalls on a host that we share. An accept in our table does not override a drop in theirs, so where
 * iptables drops what is forwarded, one commented rule of ours is put there, with the iptables that owns the chain:
 * native nft rules in its tables break `iptables -S` (conventions, E13). It matches flows with our connection mark only.
 */

type Fwmark = { readonly mark: number; readonly mask: number };

export type Firewall = {
  /** Puts the rule where it is needed and missing. Answers with lines for people about what is left to them. */
  ensure(fwmark: Fwmark): Promise<readonly string[]>;
  /** Takes every such rule away again. */
  remove(fwmark: Fwmark): Promise<void>;
};

type Flavour = 'nft' | 'legacy';
type Family = { readonly table: 'ip' | 'ip6'; readonly program: 'iptables' | 'ip6tables'; readonly names: string };

const FAMILIES: readonly Family[] = [
  { table: 'ip', program: 'iptables', names: '/proc/net/ip_tables_names' },
  { table: 'ip6', program: 'ip6tables', names: '/proc/net/ip6_tables_names' },
];

const DEADLINE_MS = 5_000;
const hex = (value: number): string => `0x${(value >>> 0).toString(16)}`;

function rule({ mark, mask }: Fwmark): string[] {
  return [
    '-m',
    'connmark',
    '--mark',
    `${hex(mark)}/${hex(mask)}`,
    '-m',
    'comment',
    '--comment',
    'detour',
    '-j',
    'ACCEPT',
  ];
}

type Ran = { readonly ok: boolean; readonly stdout: string; readonly said: string };

async function run(program: string, args: readonly string[]): Promise<Ran> {
  const result = await execa(program, ['-w', '2', ...args], {
    reject: false,
    timeout: DEADLINE_MS,
    stdin: 'ignore',
    env: { LC_ALL: 'C' },
  });
  const said = (result.stderr || (result.code === 'ENOENT' ? 'no such program' : (result.code ?? ''))).trim();
  return { ok: !result.failed, stdout: result.stdout ?? '', said };
}

/** Which iptables owns a filter table in this namespace: both may. Looking creates nothing. */
async function flavours(family: Family, nft: Nft): Promise<Flavour[]> {
  const found: Flavour[] = [];
  if (!(await nft.list(['-t', 'list', 'chain', family.table, 'filter', 'FORWARD'], () => undefined))) found.push('nft');
  const legacy = await readFile(family.names, 'utf8').catch(() => '');
  if (legacy.split('\n').includes('filter')) found.push('legacy');
  return found;
}

/** The chain our rule belongs in, out of `iptables -S FORWARD`; null when nothing there drops. */
export function chainFor(listing: string): 'DOCKER-USER' | 'FORWARD' | null {
  const lines = listing.split('\n').filter((line) => line !== '' && !line.includes('--comment detour'));
  if (lines.length === 1 && lines[0] === '-P FORWARD ACCEPT') return null;
  return lines.includes('-A FORWARD -j DOCKER-USER') ? 'DOCKER-USER' : 'FORWARD';
}

/** Base chains in the forward hook that drop by policy and belong to neither us nor iptables, out of `nft list chains`. */
export function foreignDrops(lines: readonly string[]): readonly string[] {
  const found: string[] = [];
  let table = '';
  let chain = '';
  for (const line of lines) {
    table = /^table (\S+ \S+) \{/.exec(line)?.[1] ?? table;
    chain = /^\tchain (\S+) \{/.exec(line)?.[1] ?? chain;
    if (!/hook forward .*policy drop/.test(line)) continue;
    if (table === 'inet detour' || /^ip6? filter$/.test(table)) continue;
    found.push(`${table} ${chain}`);
  }
  return found;
}

export function systemFirewall(nft: Nft, log: Log): Firewall {
  const each = async (visit: (program: string) => Promise<void>): Promise<void> => {
    for (const family of FAMILIES) {
      for (const flavour of await flavours(family, nft)) await visit(`${family.program}-${flavour}`);
    }
  };
  return {
    async ensure(fwmark) {
      const advice: string[] = [];
      await each(async (program) => {
        const listing = await run(program, ['-S', 'FORWARD']);
        const chain = listing.ok ? chainFor(listing.stdout) : 'FORWARD';
        if (chain === null) return;
        const spec = rule(fwmark);
        if (listing.ok && (await run(program, ['-C', chain, ...spec])).ok) return;
        const inserted = listing.ok ? await run(program, ['-I', chain, '1', ...spec]) : listing;
        if (inserted.ok) {
          log.info(
            'firewall-rule-added',
            { program, chain },
            'added our one rule, comment "detour", to the host\'s firewall',
          );
        } else {
          // The old iptables talks to the kernel through a raw socket, which NET_ADMIN alone does not allow.
          const capability = program.endsWith('-legacy')
            ? 'docker run: --cap-add NET_RAW; compose: cap_add: [NET_ADMIN, NET_RAW]; or on the host'
            : 'On the host';
          advice.push(
            `the host's firewall may drop what is relayed, and the rule against it cannot be added (${inserted.said}). ` +
              `${capability}: ${program} -I ${chain} 1 ${spec.join(' ')}`,
          );
        }
      });
      const chains: string[] = [];
      if (await nft.list(['list', 'chains'], (line) => chains.push(line))) return advice;
      if (chains.some((line) => line.startsWith('table inet firewalld '))) {
        advice.push(
          'firewalld is active, and what it drops no other table can accept. On the host: ' +
            'firewall-cmd --permanent --zone=$(firewall-cmd --get-default-zone) --add-forward && firewall-cmd --reload',
        );
      }
      for (const chain of foreignDrops(chains)) {
        if (chain.startsWith('inet firewalld ')) continue;
        advice.push(
          `the nftables chain "${chain}" drops what is forwarded. On the host: ` +
            `nft insert rule ${chain} ct mark and ${hex(fwmark.mask)} == ${hex(fwmark.mark)} ct status dnat accept`,
        );
      }
      return advice;
    },
    async remove(fwmark) {
      await each(async (program) => {
        for (const chain of ['DOCKER-USER', 'FORWARD']) {
          // Bounded: an earlier crash between check and insert may have left more than one.
          for (let copies = 0; copies < 8; copies++) {
            if (!(await run(program, ['-D', chain, ...rule(fwmark)])).ok) break;
          }
        }
      });
    },
  };
}
