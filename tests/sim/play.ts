import type { Decision, Present, Situation } from '../../appliance/client/paths.ts';
import { type Experience, emptyExperience, type Reading } from '../../appliance/client/worth.ts';
import { Connection, dice, type Link, type Plan, steady } from './network.ts';
import type { Maker, Policy } from './policies.ts';

/** Drives a policy over a plan, in the place of the manager and the kernel. */

export const SAMPLE_MS = 500;
const STEP_MS = 100;
/** A detour that does not answer control messages for this long is no candidate. */
const DOWN_AFTER_MS = 3_000;

export type Run = {
  readonly policy: Policy;
  readonly connection: Connection;
  readonly decisions: readonly (Decision & { readonly at: number })[];
  /** Bytes delivered up to each second. */
  readonly seconds: readonly number[];
};

export type Options = {
  readonly seed: number;
  /** How long the connection lives at most. */
  readonly ms: number;
  /** It ends when this much is delivered. */
  readonly bytes?: number;
  /** What earlier connections taught. */
  readonly experience?: Experience;
  readonly sampleMs?: number;
  /** Seen from the receiving end, which knows neither what is in flight nor whether the sender would like to send more. */
  readonly download?: boolean;
  readonly watch?: (connection: Connection, policy: Policy) => void;
};

/** One connection from its beginning to its end. */
export function play(plan: Plan, make: Maker, options: Options): Run {
  const { seed, ms, bytes = Number.POSITIVE_INFINITY, sampleMs = SAMPLE_MS, watch } = options;
  const connection = new Connection(plan, seed);
  const policy = make(dice(seed ^ 0x5eed), options.experience ?? emptyExperience());
  const decisions: (Decision & { at: number })[] = [];
  const seconds: number[] = [];
  const detours = Object.keys(plan.routes).filter((path) => path !== 'direct');
  const downSince = new Map<string, number>();
  const stepMs = Math.min(STEP_MS, sampleMs);
  let sampled = 0;
  while (connection.now < ms && connection.delivered < bytes) {
    connection.step(stepMs);
    if (connection.now % 1000 === 0) seconds.push(connection.delivered);
    if (connection.now - sampled < sampleMs) continue;
    sampled = connection.now;
    for (const detour of detours) {
      if (!connection.isUp(detour)) downSince.set(detour, downSince.get(detour) ?? connection.now);
      else if (downSince.delete(detour)) policy.answered?.(detour);
    }
    const situation = situationOf(connection, detours, downSince);
    for (const decision of policy.decide(connection, situation, readings(connection, options.download ?? false))) {
      decisions.push({ ...decision, at: connection.now });
      carryOut(connection, decision);
    }
    watch?.(connection, policy);
  }
  return { policy, connection, decisions, seconds };
}

function situationOf(
  connection: Connection,
  detours: readonly string[],
  downSince: ReadonlyMap<string, number>,
): Situation {
  const present: Present[] = [];
  for (const { path, established, backup } of connection.subflows.values()) {
    if (path === 'direct') continue;
    present.push({ detour: path, name: path, state: !established ? 'pending' : backup ? 'backup' : 'active' });
  }
  return {
    prefix: '4/c63364',
    ageMs: connection.now,
    limit: 2,
    directAlive: connection.subflows.get('direct')?.deadSince === null,
    present,
    candidates: detours
      .filter((detour) => !connection.subflows.has(detour))
      .filter((detour) => connection.now - (downSince.get(detour) ?? connection.now) < DOWN_AFTER_MS)
      .map((detour) => ({
        key: detour,
        name: detour,
        address: { family: 4, value: 0n },
        rttMs: connection.baseRtt(detour) / 2,
      })),
  };
}

function readings(connection: Connection, download: boolean): Reading[] {
  const all: Reading[] = [];
  for (const subflow of connection.subflows.values()) {
    if (!subflow.established) continue;
    const dead = subflow.deadSince !== null;
    all.push({
      path: subflow.path,
      bytesAcked: download ? 0 : subflow.acked,
      bytesReceived: download ? subflow.acked : 0,
      rttMs: subflow.rttMs,
      busyMs: download ? 0 : subflow.busyMs,
      unacked: dead && !subflow.backup && !download ? 10 : 0,
      backoff: dead && !subflow.backup && !download ? 1 : 0,
      backup: subflow.backup,
    });
  }
  return all;
}

function carryOut(connection: Connection, decision: Decision): void {
  const subflow = connection.subflows.get(decision.detour);
  switch (decision.act) {
    case 'add':
      connection.join(decision.detour, decision.backup);
      break;
    case 'replace':
      connection.close(decision.detour);
      connection.join(decision.by, false);
      break;
    case 'retire':
      connection.close(decision.detour);
      break;
    case 'backup':
      if (subflow) subflow.backup = true;
      break;
    case 'restore':
      if (subflow) subflow.backup = false;
      break;
  }
}

/** What a chooser that knows the network carries: at every moment the best set of paths, with nothing lost in changing. */
export function oracle(plan: Plan, ms: number): number {
  const links = new Map<string, Link>(Object.entries(plan.links).map(([name, link]) => [name, { ...link }]));
  const detours = Object.keys(plan.routes).filter((path) => path !== 'direct');
  const sets: string[][] = [['direct']];
  for (const [index, a] of detours.entries()) {
    sets.push(['direct', a]);
    for (const b of detours.slice(index + 1)) sets.push(['direct', a, b]);
  }
  const best = (): number => Math.max(...sets.map((set) => steady(links, plan, set)));
  let bytes = 0;
  let at = 0;
  let rate = best();
  for (const change of plan.changes) {
    if (change.at >= ms) break;
    bytes += (rate * (change.at - at)) / 1000;
    at = change.at;
    const link = links.get(change.link);
    if (link) Object.assign(link, change.set);
    rate = best();
  }
  return bytes + (rate * (ms - at)) / 1000;
}
