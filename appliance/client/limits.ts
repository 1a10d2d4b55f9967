import { Fatal } from '../exit.ts';
import type { Memory } from '../kernel/memory.ts';
import type { SubflowLimit } from '../kernel/mptcp.ts';
import type { Log } from '../log.ts';
import type { LoaderOwner } from './loader.ts';

/**
 * The server's side: lets connections that are accepted here have more extra subflows than the two of a stock kernel, and puts back
 * what was there. Remembered like the path manager (loader.ts), in a table of its own, for either may be ours without the other.
 */

export type LimitPorts = { readonly limit: SubflowLimit; readonly memory: Memory; readonly log: Log };

/** The most that kernels before 7.2 take (MPTCP_SUBFLOWS_MAX in net/mptcp/pm_kernel.c). */
export const ACCEPTED_SUBFLOWS = 8;

const SUBFLOWS = 'subflows';
const OWNER = 'owner';

/** Raises the limit; a higher one stays. Idempotent. @throws Fatal (69) */
export async function raise({ limit, memory, log }: LimitPorts, owner: LoaderOwner): Promise<void> {
  const before = await limit.read();
  if (before >= ACCEPTED_SUBFLOWS) return;
  await memory
    .remember(
      new Map([
        [SUBFLOWS, String(before)],
        [OWNER, owner],
      ]),
    )
    .catch((error: unknown) => {
      throw new Fatal(69, `cannot remember the limit of ${before} extra subflows in nftables: ${said(error)}`);
    });
  try {
    await limit.write(ACCEPTED_SUBFLOWS);
  } catch (error) {
    await memory.forget().catch(() => undefined);
    throw new Fatal(69, `cannot let connections have ${ACCEPTED_SUBFLOWS} extra subflows: ${said(error)}`);
  }
  log.info('subflow-limit', { before, now: ACCEPTED_SUBFLOWS }, 'Accepted connections may have more extra subflows');
}

/** Puts back what `raise` found, as `unload` of loader.ts does. Idempotent. @throws Fatal (69) */
export async function lower({ limit, memory, log }: LimitPorts, owner: LoaderOwner | null): Promise<void> {
  const remembered = await memory.recall();
  if (remembered === null || (owner !== null && remembered.get(OWNER) !== owner)) return;
  const before = Number(remembered.get(SUBFLOWS));
  // Somebody else's choice since then is theirs.
  if (Number.isInteger(before) && (await limit.read()) === ACCEPTED_SUBFLOWS) {
    try {
      await limit.write(before);
    } catch (error) {
      throw new Fatal(69, `cannot put back the limit of ${before} extra subflows: ${said(error)}`);
    }
    log.info('subflow-limit', { now: before }, 'Restored the limit of extra subflows that was there before');
  }
  await memory.forget();
}

const said = (error: unknown): string => (error instanceof Error ? error.message : String(error));
