import type { Registry } from 'prom-client';
import type { Address } from '../protocol/address.ts';
import type { Key } from '../settings.ts';

/** A JSON value, as `/v1/status` prints it. */
export type Json = string | number | boolean | null | readonly Json[] | { readonly [key: string]: Json };

/** Whether the daemon can do its work now; `reasons` says, for people, what keeps it from that. */
export type Readiness = { readonly ready: boolean; readonly reasons: readonly string[] };

/** What a daemon shows of itself to HTTP, the unix socket and the CLI. Reading it changes nothing. */
export type DaemonView = {
  readiness(): Readiness;
  /** The stable fields of `/v1/status` (docs/design, section 3), without secrets. */
  status(): Promise<Json>;
  /**
   * What is known of the ways to a server, by connection and by detour, and why each is used or not; `port` null: any.
   * Only a client has something to explain.
   */
  explain?(address: Address, port: number | null): Promise<Json>;
  readonly metrics: Registry;
};

/** A started daemon, as its `main.ts` hands it to the CLI. */
export type RunningDaemon = {
  readonly view: DaemonView;
  /** Leaves in order; running flows go on. Resolves when nothing of the daemon runs any more. */
  stop(): Promise<void>;
  /** Replaces the accepted keys, all or none. Only a router has any. */
  reload?(keys: readonly Key[]): Promise<void>;
};
