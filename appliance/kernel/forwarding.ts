import { readdir } from 'node:fs/promises';
import type { Log } from '../log.ts';
import type { Addresses } from './addresses.ts';
import { type Sysctl, SysctlError } from './sysctl.ts';

/**
 * Whether this host forwards packets, and what it takes. Values are remembered before they are changed, because some
 * of these parameters change others: `ip_forward` resets `accept_redirects` and every interface's `forwarding`
 * (Documentation/networking/ip-sysctl.rst), `all.forwarding` of IPv6 every interface's.
 */

/** Values as they were, by parameter, kept where the next daemon finds them. */
export type Remembered = {
  get(name: string): string | undefined;
  /** False when it could not be stored. */
  remember(values: ReadonlyMap<string, string>): Promise<boolean>;
};

const MASTER = { 4: 'net.ipv4.ip_forward', 6: 'net.ipv6.conf.all.forwarding' } as const;

/** Dots of an interface name are written as slashes (sysctl.d(5)); other names are rare enough to be left alone. */
async function interfaces(root: string, family: 4 | 6): Promise<string[]> {
  const names = await readdir(`${root}/net/ipv${family}/conf`).catch((): string[] => []);
  return names.filter((name) => name !== 'all' && /^[\w.@:-]+$/.test(name)).map((name) => name.replaceAll('.', '/'));
}

/** What switching on `family` will change besides the switch itself, with the values of now. */
async function bystanders(sysctl: Sysctl, root: string, family: 4 | 6): Promise<Map<string, string>> {
  const values = new Map<string, string>();
  const note = async (name: string, notable: (value: string) => boolean): Promise<void> => {
    const value = await sysctl.read(name).catch(() => null);
    if (value !== null && notable(value)) values.set(name, value);
  };
  if (family === 4) await note('net.ipv4.conf.all.accept_redirects', () => true);
  for (const name of await interfaces(root, family)) {
    await note(`net.ipv${family}.conf.${name}.forwarding`, (value) => value !== '0');
    // A forwarding host ignores router advertisements, and with them its own default route, unless this is 2.
    if (family === 6) await note(`net.ipv6.conf.${name}.accept_ra`, (value) => value === '1');
  }
  return values;
}

function remedy(parameter: string, code: string): string {
  return (
    `${parameter} is 0 and cannot be set from here (${code}). ` +
    `docker run: --sysctl ${parameter}=1; compose: sysctls: {${parameter}: 1}; ` +
    `Kubernetes: hostNetwork: true and the line for the host; ` +
    `host, also with network_mode: host: sysctl -w ${parameter}=1`
  );
}

/**
 * Makes sure that packets of `family` are forwarded. Null when they are; otherwise what is wrong and the line that
 * mends it, for people.
 */
export async function ensureForwarding(
  family: 4 | 6,
  ports: {
    readonly sysctl: Sysctl;
    readonly root: string;
    readonly addresses: Addresses;
    readonly log: Log;
    readonly memory: Remembered;
  },
): Promise<string | null> {
  const { sysctl, root, addresses, log, memory } = ports;
  const usable = addresses.local().some(({ address, interface: name }) => {
    const linkLocal = address.family === 6 && address.value >> 118n === 0x3fan;
    return address.family === family && name !== 'lo' && !linkLocal;
  });
  if (!usable) return `this host has no IPv${family} address`;
  const parameter = MASTER[family];
  const now = await sysctl.read(parameter);
  if (now === null) return `this kernel has no ${parameter}`;
  if (now !== '0') return null;
  if (!(await sysctl.writable(parameter))) return remedy(parameter, 'read-only');
  const before = await bystanders(sysctl, root, family);
  const facts = new Map(
    [[parameter, now], ...before].filter(([name]) => memory.get(name ?? '') === undefined) as [string, string][],
  );
  if (!(await memory.remember(facts))) return `${parameter} is 0, and its old value could not be remembered`;
  try {
    for (const [name] of before) if (name.endsWith('.accept_ra')) await sysctl.write(name, '2');
    await sysctl.write(parameter, '1');
  } catch (error) {
    if (error instanceof SysctlError) return remedy(parameter, error.code);
    throw error;
  }
  log.info('forwarding-set', { parameter }, 'switched forwarding on; `detour cleanup` puts the old value back');
  return null;
}

/** Puts back what `ensureForwarding` changed, from what was remembered. Answers with what could not be put back. */
export async function restoreForwarding(sysctl: Sysctl, remembered: ReadonlyMap<string, string>): Promise<string[]> {
  const failures: string[] = [];
  const ours = [...remembered].filter(([name]) => name.startsWith('net.'));
  const masters: readonly string[] = Object.values(MASTER);
  // The switches first: they overwrite the others.
  ours.sort(([a], [b]) => Number(masters.includes(b)) - Number(masters.includes(a)));
  for (const [name, value] of ours) {
    try {
      // An interface that is gone needs nothing.
      if ((await sysctl.read(name)) !== null) await sysctl.write(name, value);
    } catch (error) {
      failures.push(error instanceof Error ? error.message : String(error));
    }
  }
  return failures;
}
