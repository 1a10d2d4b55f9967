import { Fatal } from '../exit.ts';
import type { Memory } from '../kernel/memory.ts';
import type { Sysctl } from '../kernel/sysctl.ts';
import type { Log } from '../log.ts';

/**
 * Selects the userspace path manager of this network namespace, and puts back what was there. What was there is kept
 * in the kernel beside it, so that an agent that was killed still restores the original the next time it stops.
 */

export type LoaderPorts = { readonly sysctl: Sysctl; readonly memory: Memory; readonly log: Log };

/** Who selected it: the daemon undoes only what a daemon did, so that `detour load` in an init container stays. */
export type LoaderOwner = 'daemon' | 'load';

/** Linux 6.15 and later by name, before that by number; both in Documentation/networking/mptcp-sysctl.rst. */
const PARAMETERS = [
  { name: 'net.mptcp.path_manager', word: 'path_manager', userspace: 'userspace' },
  { name: 'net.mptcp.pm_type', word: 'pm_type', userspace: '1' },
] as const;
type Parameter = (typeof PARAMETERS)[number];

const ENABLED = 'net.mptcp.enabled';
const OWNER = 'owner';

const NEEDS_WRITING =
  'Containers mount /proc/sys read-only. docker: -v /proc/sys/net:/host/proc/sys/net -e DETOUR_SYSCTL_ROOT=/host/proc/sys ' +
  '(with a network of its own instead: --sysctl net.mptcp.pm_type=1; docker refuses that with --network host). ' +
  'compose: volumes: ["/proc/sys/net:/host/proc/sys/net"], environment: {DETOUR_SYSCTL_ROOT: /host/proc/sys}. ' +
  'kubernetes: a hostPath volume of /proc/sys/net at /host/proc/sys/net and env DETOUR_SYSCTL_ROOT=/host/proc/sys. ' +
  'host, once and for all: echo net.mptcp.pm_type=1 > /etc/sysctl.d/90-detour.conf && sysctl --system';

/** @throws Fatal (69) unless this kernel has Multipath TCP, switched on */
export async function requireMptcp(sysctl: Sysctl): Promise<void> {
  const enabled = await sysctl.read(ENABLED);
  if (enabled === null) {
    throw new Fatal(
      69,
      `this kernel has no Multipath TCP (${ENABLED} does not exist): Linux 6.6 or later built with CONFIG_MPTCP=y is needed; ` +
        'if there is one, DETOUR_SYSCTL_ROOT points to the wrong place',
    );
  }
  if (enabled === '0') {
    throw new Fatal(
      69,
      `Multipath TCP is switched off (${ENABLED}=0). Switch it on: sysctl -w ${ENABLED}=1; ` +
        `docker, with a network of its own: --sysctl ${ENABLED}=1`,
    );
  }
}

/**
 * Selects the userspace path manager. Idempotent.
 * @throws Fatal (69) naming the kernel feature, the parameter and the line that helps.
 */
export async function load({ sysctl, memory, log }: LoaderPorts, owner: LoaderOwner): Promise<void> {
  await requireMptcp(sysctl);
  const { parameter, value } = await find(sysctl);
  if (value === parameter.userspace) return;
  await memory
    .remember(
      new Map([
        [parameter.word, value],
        [OWNER, owner],
      ]),
    )
    .catch((error: unknown) => {
      // Selecting it anyway would be the very thing that could not be undone after a crash.
      throw new Fatal(69, `cannot remember ${parameter.name}=${value} in nftables: ${said(error)}`);
    });
  try {
    await sysctl.write(parameter.name, parameter.userspace);
  } catch (error) {
    await memory.forget().catch(() => undefined);
    throw new Fatal(69, `${said(error)}. ${NEEDS_WRITING}`);
  }
  log.info(
    'path-manager',
    { parameter: parameter.name, before: value, now: parameter.userspace },
    'Selected the userspace path manager',
  );
}

/**
 * Puts back what `load` found, if `owner` or anybody (null) selected it, and if nobody has changed it since.
 * Idempotent. @throws Fatal (69) when the parameter cannot be written; it is still remembered then.
 */
export async function unload({ sysctl, memory, log }: LoaderPorts, owner: LoaderOwner | null): Promise<void> {
  const remembered = await memory.recall();
  if (remembered === null) return;
  if (owner !== null && remembered.get(OWNER) !== owner) return;
  for (const parameter of PARAMETERS) {
    const before = remembered.get(parameter.word);
    // Somebody else's choice since then is theirs.
    if (before === undefined || (await sysctl.read(parameter.name)) !== parameter.userspace) continue;
    try {
      await sysctl.write(parameter.name, before);
    } catch (error) {
      throw new Fatal(69, `${said(error)}. ${NEEDS_WRITING}`);
    }
    log.info(
      'path-manager',
      { parameter: parameter.name, now: before },
      'Restored the path manager that was there before',
    );
  }
  await memory.forget();
}

/** Whether the userspace path manager is selected now. */
export async function isLoaded(sysctl: Sysctl): Promise<boolean> {
  const { parameter, value } = await find(sysctl);
  return value === parameter.userspace;
}

async function find(sysctl: Sysctl): Promise<{ parameter: Parameter; value: string }> {
  for (const parameter of PARAMETERS) {
    const value = await sysctl.read(parameter.name);
    if (value !== null) return { parameter, value };
  }
  throw new Fatal(
    69,
    'this kernel has no userspace path manager (neither net.mptcp.path_manager nor net.mptcp.pm_type): Linux 6.6 or later is needed',
  );
}

const said = (error: unknown): string => (error instanceof Error ? error.message : String(error));
