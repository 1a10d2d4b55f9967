import type { DestinationRule } from '../protocol/address.ts';
import type { PathKind } from './state.ts';

/** What else runs on this host and asks to be served: containers by their labels, pods by their annotations. Pure. */

export type Workload = {
  /** Names it for good: a container's id, a pod's uid. */
  readonly key: string;
  /** For people: a container's name, a pod's `namespace/name`. */
  readonly name: string;
  /** Files through which its network namespace can be entered, the best first. */
  readonly paths: readonly string[];
  /** What the names of its control groups have in them: ids of its containers, of a pod its uid. */
  readonly groups: readonly string[];
  readonly wishes: Wishes;
};

/** What a workload says of itself; null: as the agent's own settings say. */
export type Wishes = {
  readonly targets: readonly DestinationRule[] | null;
  readonly strategy: { readonly kinds: readonly PathKind[]; readonly ordered: boolean } | null;
  /** Whether its plain TCP sockets are to become Multipath TCP, where `DETOUR_MPTCPIFY` leaves that to workloads. */
  readonly mptcp: boolean | null;
};

/** Reads the text of one option; throws an Error whose message says what it must be. */
export type WishReaders = {
  readonly targets: (text: string) => DestinationRule[] | readonly DestinationRule[];
  readonly strategy: (text: string) => NonNullable<Wishes['strategy']>;
  readonly mptcp: (text: string) => boolean;
};

export type Reading = {
  readonly enabled: boolean;
  readonly wishes: Wishes;
  /** One line each, naming the label, for people. What is complained of counts as not said. */
  readonly complaints: readonly string[];
};

const OPTIONS = ['enable', 'targets', 'strategy', 'mptcp'] as const;

/** A label is somebody else's text: enough of it to be recognised. */
const LONGEST_QUOTE = 60;

/** Whether a workload asked to be served at all, whatever else is wrong with its labels. */
export const isEnabled = (labels: Readonly<Record<string, string>>, prefix: string): boolean =>
  /^(true|on|yes|1)$/i.test(labels[`${prefix}enable`]?.trim() ?? '');

/** Reads the labels (or annotations) that begin with `prefix`: `detour.` or `detour.dev/`. */
export function readLabels(labels: Readonly<Record<string, string>>, prefix: string, readers: WishReaders): Reading {
  const complaints: string[] = [];
  const read = <T>(option: (typeof OPTIONS)[number], reader: (text: string) => T): T | null => {
    const name = `${prefix}${option}`;
    const text = labels[name]?.trim();
    if (text === undefined || text === '') return null;
    try {
      return reader(text);
    } catch (error) {
      const quoted = JSON.stringify(text.length > LONGEST_QUOTE ? `${text.slice(0, LONGEST_QUOTE)}...` : text);
      complaints.push(`${name}=${quoted}: ${error instanceof Error ? error.message : 'cannot be read'}`);
      return null;
    }
  };
  const enabled =
    read('enable', (text) => {
      if (isEnabled({ [`${prefix}enable`]: text }, prefix)) return true;
      if (/^(false|off|no|0)$/i.test(text)) return false;
      throw new Error('must be "true" or "false"');
    }) ?? false;
  const wishes = {
    targets: read('targets', readers.targets),
    strategy: read('strategy', readers.strategy),
    mptcp: read('mptcp', readers.mptcp),
  };
  for (const name of Object.keys(labels)) {
    if (!name.startsWith(prefix) || OPTIONS.some((option) => name === `${prefix}${option}`)) continue;
    complaints.push(`${name}: is not known; there are ${OPTIONS.map((option) => prefix + option).join(', ')}`);
  }
  return { enabled, wishes, complaints };
}

/** Whether two workloads would be served alike. */
export const sameWishes = (a: Wishes, b: Wishes): boolean => describe(a) === describe(b);

/** Whether they would have the same agent: of Multipath TCP, each container has its own way. */
export const sameService = (a: Wishes, b: Wishes): boolean => sameWishes({ ...a, mptcp: null }, { ...b, mptcp: null });

const describe = (wishes: Wishes): string =>
  JSON.stringify(wishes, (_, value: unknown) => (typeof value === 'bigint' ? `${value}` : value));
