import type { Diag } from '../kernel/diag.ts';
import type { PathEvent, PathManager, SignalEndpoints } from '../kernel/mptcp.ts';
import type { Log } from '../log.ts';
import { type Address, type Endpoint, hexOfAddress } from '../protocol/address.ts';

/**
 * Announces addresses where the userspace path manager is in charge, with which the kernel announces nothing by itself: on each connection that is
 * accepted at one of `ports`, one by one, those that are there already included.
 */

export type AnnouncementPorts = {
  readonly openPathManager: (onEvent: (event: PathEvent) => void) => Promise<PathManager>;
  readonly openDiag: () => Diag;
  readonly log: Log;
};

/** Their ids, from 1, for 0 is the address that connections were made to; the kernel's most (MPTCP_PM_ADDR_MAX in net/mptcp/protocol.h). */
const MOST_IDS = 8;

/** @throws Fatal (69) when the kernel does not let us */
export async function announceEach(ports: readonly number[], with_: AnnouncementPorts): Promise<SignalEndpoints> {
  const { openPathManager, openDiag, log } = with_;
  /** By their hex. */
  const announced = new Map<string, { readonly address: Address; readonly id: number }>();
  /** By their tokens: the family of each. */
  const connections = new Map<number, Address['family']>();
  let manager: PathManager | null = null;

  function onEvent(event: PathEvent): void {
    if (event.kind === 'established' && event.serverSide) void accept(event.token, event.local);
    else if (event.kind === 'closed') connections.delete(event.token);
    else if (event.kind === 'events-lost') void lookAround();
  }

  async function accept(token: number, { address: { family }, port }: Endpoint): Promise<void> {
    if (!ports.includes(port) || connections.has(token)) return;
    connections.set(token, family);
    for (const { address, id } of announced.values()) await tell(token, family, address, id);
  }

  async function tell(token: number, family: Address['family'], address: Address, id: number): Promise<void> {
    if (address.family === family) await attempt(token, () => manager?.announce(token, id, address));
  }

  /** A connection may be over by now, or belong to the kernel's own path manager because it is older than ours. */
  async function attempt(token: number, task: () => Promise<void> | undefined): Promise<void> {
    try {
      await task();
    } catch (error) {
      log.debug(
        'not-told',
        { token: token.toString(16), reason: messageOf(error) },
        'A connection was not told of a detour',
      );
    }
  }

  /** Finds those that no event told of. */
  async function lookAround(): Promise<void> {
    const diag = openDiag();
    try {
      const found = (await diag.connections()).filter(({ initiated }) => !initiated);
      const tokens = new Set(found.map(({ token }) => token));
      for (const token of connections.keys()) if (!tokens.has(token)) connections.delete(token);
      for (const { token, local } of found) await accept(token, local);
    } catch (error) {
      log.warn('announcing-failed', { reason: messageOf(error) }, 'Connections of before are not told of detours');
    } finally {
      diag.close();
    }
  }

  manager = await openPathManager(onEvent);
  await lookAround();
  return {
    async add(address) {
      const key = hexOfAddress(address);
      if (announced.has(key)) return;
      const taken = new Set([...announced.values()].map(({ id }) => id));
      const id = Array.from({ length: MOST_IDS }, (_, index) => index + 1).find((one) => !taken.has(one));
      if (id === undefined) throw new RangeError(`more than ${MOST_IDS} addresses are announced`);
      announced.set(key, { address, id });
      for (const [token, family] of [...connections]) await tell(token, family, address, id);
    },
    async remove(address) {
      const found = announced.get(hexOfAddress(address));
      if (!found) return;
      announced.delete(hexOfAddress(address));
      for (const [token, family] of [...connections])
        if (family === address.family) await attempt(token, () => manager?.withdraw(token, found.id));
    },
    close: () => manager?.close(),
  };
}

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));
