import { setFlagsFromString } from 'node:v8';
import { Fatal } from '../exit.ts';
import { returnFreedMemory } from '../kernel/allocator.ts';
import { systemClock } from '../kernel/clock.ts';
import { udpDatagrams } from '../kernel/datagrams.ts';
import { openDiag } from '../kernel/diag.ts';
import { systemFiles } from '../kernel/files.ts';
import { systemHandshake } from '../kernel/handshake.ts';
import { systemLookup } from '../kernel/lookup.ts';
import { nftMemory } from '../kernel/memory.ts';
import { openPathManager } from '../kernel/mptcp.ts';
import { openNetwork } from '../kernel/network.ts';
import { remedyOf, systemNft } from '../kernel/nft.ts';
import { systemSchedule } from '../kernel/schedule.ts';
import { procSysctl } from '../kernel/sysctl.ts';
import { openTranslations } from '../kernel/translations.ts';
import { systemWeb } from '../kernel/web.ts';
import type { Log } from '../log.ts';
import type { ClientHostSettings, ClientSettings } from '../settings.ts';
import type { DaemonView } from '../status/daemon.ts';
import { VERSION } from '../version.ts';
import { type Daemon, startDaemon } from './daemon.ts';
import { type LoaderPorts, unload as restore, load as select } from './loader.ts';
import { REMOVE_REDIRECTIONS, RESCUE_TABLE } from './redirect.ts';

/** The nftables table in which the client remembers what it changed. It holds no chain and touches no packet. */
export const CLIENT_TABLE = 'detour_client';

export type RunningClient = {
  readonly view: DaemonView;
  /** Puts the path manager back and ends. Paths that exist go on without the agent. */
  stop(): Promise<void>;
};

/** A burst of connections leaves freed memory behind; as for the router. */
const TRIM_MS = 10_000;

/**
 * Runs the client agent of this network namespace.
 * @throws Fatal (69) when the kernel or the container lacks something; nothing has changed then.
 */
export async function startClient(settings: ClientSettings, log: Log): Promise<RunningClient> {
  // Left to itself, V8 takes 35 MB for the passing garbage of a thousand connections.
  setFlagsFromString('--optimize-for-size');
  setFlagsFromString('--semi-space-growth-factor=1');
  const ports = loaderPorts(settings, log);
  await select(ports, 'daemon');
  let daemon: Daemon;
  try {
    // What a predecessor with DETOUR_RESCUE=on left when it was killed.
    if (!settings.rescue) await removeRedirections();
    daemon = await startDaemon(settings, {
      clock: systemClock,
      datagrams: udpDatagrams(),
      diag: openDiag(),
      log,
      lookup: systemLookup(),
      files: systemFiles(),
      web: systemWeb(),
      schedule: systemSchedule,
      openNetwork,
      openPathManager,
      openRescue: () => ({
        nft: systemNft(),
        translations: openTranslations(),
        handshake: systemHandshake(settings.fwmark.mark),
      }),
      version: VERSION,
    });
  } catch (error) {
    // What went wrong first is what the user has to mend; a failure of this may well have the same cause.
    await restore(ports, 'daemon').catch(() => undefined);
    throw error;
  }
  const trimming = setInterval(returnFreedMemory, TRIM_MS).unref();
  return {
    view: daemon.view,
    async stop() {
      clearInterval(trimming);
      // The path manager first: with the userspace one selected and nobody listening, this host refuses joins.
      await restore(ports, 'daemon');
      await daemon.stop();
    },
  };
}

/** `detour load`: selects the userspace path manager until `detour unload`. @throws Fatal (69) */
export async function load(settings: ClientHostSettings, log: Log): Promise<void> {
  await select(loaderPorts(settings, log), 'load');
}

/** `detour unload`: puts back what was there, whoever changed it. @throws Fatal (69) */
export async function unload(settings: ClientHostSettings, log: Log): Promise<void> {
  await restore(loaderPorts(settings, log), null);
}

/** Removes everything of the client from this network namespace. Works without a running agent. @throws Fatal (69) */
export async function cleanupClient(settings: ClientHostSettings, log: Log): Promise<void> {
  await restore(loaderPorts(settings, log), null);
  await removeRedirections();
}

/** @throws Fatal (69) */
async function removeRedirections(): Promise<void> {
  const failure = await systemNft().run(REMOVE_REDIRECTIONS);
  if (failure) throw new Fatal(69, `cannot remove table ${RESCUE_TABLE}: ${remedyOf(failure)}`);
}

function loaderPorts(settings: ClientHostSettings, log: Log): LoaderPorts {
  return { sysctl: procSysctl(settings.sysctlRoot), memory: nftMemory(systemNft(), CLIENT_TABLE), log };
}
