import type { Clock } from '../kernel/clock.ts';
import type { Diag } from '../kernel/diag.ts';
import type { Handshake } from '../kernel/handshake.ts';
import type { Nft } from '../kernel/nft.ts';
import type { Translations } from '../kernel/translations.ts';
import type { Log } from '../log.ts';
import { type Endpoint, formatEndpoint } from '../protocol/address.ts';
import { REMOVE_REDIRECTIONS, RESCUE_TABLE, renderRedirections } from './redirect.ts';
import type { RescueCommand, RescueEvent } from './state.ts';

/** Does what rescue.ts decides: watches SYNs, asks servers, writes the redirections. */

export type RescuePorts = {
  readonly nft: Nft;
  readonly translations: Translations;
  readonly handshake: Handshake;
};

export type Rescuer = {
  /** Sees to a command; answers come as events. */
  execute(command: RescueCommand): void;
  /** Ends the watch. New connections are led nowhere else from now on; the table goes, unless `keep` says that some need it. */
  stop(keep: boolean): Promise<void>;
};

/**
 * SYNs that wait are looked for this often, and more often while there are some. A look is a walk over the MPTCP connections in
 * the kernel; what it costs is mostly that the process wakes up.
 */
const LOOK_MS = 250;
const LOOK_BUSY_MS = 50;

const NOTES = {
  began: 'A server does not answer directly; new connections reach it through a detour',
  moved: 'New connections to a server that does not answer directly go through another detour',
  ended: 'New connections to a server go to it directly again',
  impossible: 'A server does not answer directly, and no detour reaches it either',
} as const;

export type RescuerOptions = {
  readonly clock: Clock;
  readonly diag: Diag;
  readonly log: Log;
  readonly ports: RescuePorts;
  readonly fwmark: { readonly mark: number; readonly mask: number };
  readonly onEvent: (event: RescueEvent) => void;
  readonly nameOf: (detour: string | null) => string | null;
};

/** Starts the watch. What a predecessor left is found first. */
export async function startRescuer(options: RescuerOptions): Promise<Rescuer> {
  const { clock, diag, log, ports, fwmark, onEvent, nameOf } = options;
  const { nft, translations, handshake } = ports;
  let stopped = false;

  const look = (): void => {
    const askedAt = clock.now();
    const again = (ms: number): void => {
      if (!stopped) clock.after(Math.max(0, ms - (clock.now() - askedAt)), look);
    };
    // A reading that failed says nothing; the next one may.
    diag.connecting().then(
      (waiting) => {
        if (!stopped) onEvent({ kind: 'connecting', waiting });
        again(waiting.length > 0 ? LOOK_BUSY_MS : LOOK_MS);
      },
      () => again(LOOK_MS),
    );
  };

  async function ask(server: Endpoint, remote: Endpoint, protocol: 'tcp' | 'mptcp', waitMs: number) {
    const askedAt = clock.now();
    const result = await handshake.try(remote, protocol, waitMs);
    const tookMs = clock.now() - askedAt;
    const shown = { server: formatEndpoint(server), at: formatEndpoint(remote), result, tookMs: Math.round(tookMs) };
    log.debug('rescue-asked', shown, 'Asked a server whether it answers');
    return { result, tookMs };
  }

  async function redirect(command: Extract<RescueCommand, { kind: 'redirect' }>): Promise<void> {
    const { servers, stuck, keep } = command;
    const text = servers.length > 0 || keep ? renderRedirections(servers, fwmark) : REMOVE_REDIRECTIONS;
    const failure = await nft.run(text);
    if (stopped) return;
    if (failure) {
      log.error(
        'rescue-failed',
        { reason: failure.message },
        `nft cannot lead connections through a detour (${failure.kind})`,
      );
      onEvent({ kind: 'redirect-failed', why: `nft failed: ${failure.message}` });
      return;
    }
    // Their first SYN may have an entry that says "as it is"; without it the next one meets the new rules.
    await Promise.all(stuck.map((tuple) => translations.forget(tuple).catch(() => undefined)));
  }

  const found = await nft.list(['list', 'table', ...RESCUE_TABLE.split(' ')], () => undefined);
  // After the caller has what this returns, which it needs for the answer.
  clock.after(0, () => {
    if (stopped) return;
    if (!found) onEvent({ kind: 'redirections-found' });
    look();
  });

  return {
    execute(command) {
      switch (command.kind) {
        case 'try-direct': {
          const { server, waitMs } = command;
          void ask(server, server, 'tcp', waitMs).then(({ result, tookMs }) => {
            onEvent({ kind: 'direct-tried', server, answered: result !== 'silent', tookMs });
          });
          break;
        }
        case 'try-relay': {
          const { server, detour, remote, waitMs } = command;
          void ask(server, remote, 'mptcp', waitMs).then(({ result }) => {
            onEvent({ kind: 'relay-tried', server, detour, reached: result === 'answered' });
          });
          break;
        }
        case 'redirect':
          void redirect(command);
          break;
        case 'ask-translation': {
          const { token } = command;
          translations.of(command).then(
            (via) => onEvent({ kind: 'translated', token, via }),
            // Nothing is tracked here, so nothing is translated.
            () => onEvent({ kind: 'translated', token, via: null }),
          );
          break;
        }
        case 'rescue': {
          const { what, server, detour, why } = command;
          const level = what === 'ended' || what === 'moved' ? 'info' : 'warn';
          log[level](`rescue-${what}`, { server: formatEndpoint(server), detour: nameOf(detour), why }, NOTES[what]);
          break;
        }
      }
    },
    async stop(keep) {
      stopped = true;
      if (keep)
        log.info(
          'rescue-kept',
          { table: RESCUE_TABLE },
          'Connections that a detour rescued live on, and with them the table that translates them',
        );
      await nft.run(keep ? renderRedirections([], fwmark) : REMOVE_REDIRECTIONS);
      translations.close();
    },
  };
}
