import type { Groups } from '../kernel/cgroups.ts';
import type { Cancel, Clock } from '../kernel/clock.ts';
import type { Switches, Table } from '../kernel/mptcpify.ts';
import type { Log } from '../log.ts';
import type { Mptcpify as Mode } from '../settings.ts';
import { changes, choiceOf, choiceOfLoad } from './switches.ts';

/** Keeps the kernel told whose plain TCP sockets become Multipath TCP (`DETOUR_MPTCPIFY`). */

export type MptcpifyPorts = {
  readonly clock: Clock;
  readonly log: Log;
  readonly groups: Groups;
  /** @throws Error with cause and remedy */
  readonly openSwitches: () => Switches;
  /** Whether `detour load` attached it, be it that we may not look into it. */
  readonly isPinned: () => boolean;
};

/** A network namespace that is served. */
export type ServedNet = {
  readonly inode: number;
  /** Where Multipath TCP is off, a socket made so would fail. */
  mptcpEnabled(): Promise<boolean>;
};

/** A workload that may say something of it. */
export type MptcpWish = {
  readonly key: string;
  /** For people. */
  readonly name: string;
  /** As `Workload.groups`. */
  readonly groups: readonly string[];
  /** Null: nothing. */
  readonly mptcp: boolean | null;
};

export type MptcpifyStatus = {
  readonly mode: Mode;
  readonly state: 'on' | 'off' | 'unavailable';
  /** Who attached the program. */
  readonly by: Switches['by'] | null;
  /** Sockets made Multipath TCP since then; null when it cannot be read. */
  readonly sockets: number | null;
  readonly why: string | null;
};

export type Mptcpify = {
  /** What there is now, each time anew. Sockets that exist stay what they are. */
  update(nets: readonly ServedNet[], wishes: readonly MptcpWish[]): void;
  status(): MptcpifyStatus;
  /** Whether the sockets of a workload become Multipath TCP. */
  includes(key: string): boolean;
  /** From now on all sockets of whom we serve are plain again, unless `detour load` chose them. */
  stop(): void;
};

/** What else there is when the kernel does not let us. */
export const INSTEAD =
  'Instead: start programs by `mptcpize run`, Go programs with GODEBUG=multipathtcp=1, or switch Multipath TCP on in their own settings (docs/mptcpify.md)';

/** A container that just started has its control group by then, usually. */
const SEARCH_FIRST_MS = 50;
const SEARCH_LONGEST_MS = 10_000;
/** So often it is searched for before anybody is told. */
const SEARCHES_IN_SILENCE = 5;
/** How long a namespace whose Multipath TCP was switched off may have sockets that fail. */
const CHECK_MS = 5_000;

const messageOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

/** Starts; attaches the program when there is none. Where that fails, says why, once. */
export function startMptcpify(mode: Mode, ports: MptcpifyPorts): Mptcpify {
  const { clock, log, groups } = ports;
  let nets: readonly ServedNet[] = [];
  /** Inodes of those of them that have Multipath TCP switched off. */
  let disabled: ReadonlySet<number> = new Set();
  let wishes: readonly MptcpWish[] = [];
  /** Control groups of workloads, by their keys: ids, and the names by which they were found. */
  const found = new Map<string, { readonly ids: readonly bigint[]; readonly by: readonly string[] }>();
  /** Workloads that were complained of. */
  const told = new Set<string>();
  let why: string | null = null;
  /** Null while off, and where there is none. */
  const switches = mode === 'off' ? null : open();
  let searching = false;
  let searches = 0;
  let timer: Cancel | null = null;
  let stopped = false;

  function open(): Switches | null {
    try {
      const opened = ports.openSwitches();
      log.info('mptcpify', { mode, by: opened.by }, 'Plain TCP sockets become Multipath TCP');
      return opened;
    } catch (error) {
      why = messageOf(error);
      if (mode === 'all' && ports.isPinned()) {
        log.info(
          'mptcpify',
          { mode, by: 'load', why },
          'Plain TCP sockets become Multipath TCP as `detour load` chose',
        );
        return null;
      }
      log.warn('mptcpify-unavailable', { mode, why }, `Plain TCP sockets stay what they are. ${INSTEAD}`);
      return null;
    }
  }

  /** Brings the maps up to date. */
  function write(): void {
    if (!switches) return;
    const asking = wishes.flatMap(({ key, mptcp }) => {
      const its = found.get(key);
      return mptcp !== null && its ? [{ mptcp, groups: its.ids }] : [];
    });
    const served = stopped ? [] : nets.map(({ inode }) => inode).filter((inode) => !disabled.has(inode));
    const choice = stopped ? choiceOf(false, [], []) : choiceOf(mode === 'all', served, asking);
    try {
      // Groups first: who says no is not to be taken for one that says nothing.
      apply(switches.groups, choice.groups);
      apply(switches.nets, choice.nets);
      why = null;
    } catch (error) {
      const reason = messageOf(error);
      if (reason !== why)
        log.warn('mptcpify-failing', { reason }, 'Whose sockets become Multipath TCP cannot be changed');
      why = reason;
    }
  }

  /** Looks for the control groups of workloads that have none yet. */
  function search(ms: number): void {
    if (searching || stopped || !switches) return;
    timer?.();
    timer = clock.after(ms, () => {
      timer = null;
      void find();
    });
  }

  /** Those to be looked for: new ones, and pods that have other containers now. */
  const missing = (): MptcpWish[] =>
    wishes.filter(({ key, mptcp, groups: names }) => mptcp !== null && found.get(key)?.by.join() !== names.join());

  async function find(): Promise<void> {
    const sought = missing();
    searching = true;
    searches++;
    let reason = 'none of its control groups is below /sys/fs/cgroup here: docker: -v /sys/fs/cgroup:/sys/fs/cgroup:ro';
    try {
      const ids = await groups.find(new Set(sought.flatMap((one) => one.groups)));
      for (const one of sought) {
        const its = new Set(one.groups.flatMap((name) => ids.get(name) ?? []));
        const still = wishes.some(({ key, groups: names }) => key === one.key && names.join() === one.groups.join());
        if (its.size > 0 && still) found.set(one.key, { ids: [...its], by: one.groups });
      }
    } catch (error) {
      reason = messageOf(error);
    }
    searching = false;
    if (stopped) return;
    write();
    const left = missing();
    for (const { key, name } of searches >= SEARCHES_IN_SILENCE ? left : []) {
      if (told.has(key)) continue;
      told.add(key);
      log.warn('workload-not-found', { workload: name, reason }, 'The sockets of a workload stay what they are');
    }
    if (left.length > 0) search(Math.min(SEARCH_FIRST_MS * 2 ** Math.min(searches, 10), SEARCH_LONGEST_MS));
  }

  async function check(): Promise<void> {
    const off = new Set<number>();
    for (const { inode, mptcpEnabled } of nets) if (!(await mptcpEnabled().catch(() => true))) off.add(inode);
    if (stopped) return;
    const before = disabled;
    disabled = off;
    if ([...off].some((inode) => !before.has(inode)))
      log.warn(
        'mptcp-off',
        {},
        'Multipath TCP was switched off in a namespace: its plain TCP sockets stay what they are',
      );
    if (off.size !== before.size || [...off].some((inode) => !before.has(inode))) write();
    again();
  }

  function again(): void {
    if (switches) clock.after(CHECK_MS, () => void (stopped ? undefined : check()));
  }

  again();

  return {
    update(servedNets, all) {
      if (stopped) return;
      nets = servedNets;
      wishes = all;
      const keys = new Set(all.map(({ key }) => key));
      for (const key of found.keys()) if (!keys.has(key)) found.delete(key);
      for (const key of told) if (!keys.has(key)) told.delete(key);
      write();
      if (mode === 'off') {
        for (const { key, name } of all.filter(({ key, mptcp }) => mptcp && !told.has(key))) {
          told.add(key);
          log.warn(
            'workload-mptcp-off',
            { workload: name },
            'A workload asks for Multipath TCP, and DETOUR_MPTCPIFY is off: set it to labelled',
          );
        }
      } else if (missing().length > 0) {
        searches = 0;
        search(0);
      }
    },
    status() {
      if (mode === 'off') return { mode, state: 'off', by: null, sockets: null, why: null };
      if (!switches) {
        const pinned = mode === 'all' && ports.isPinned();
        return { mode, state: pinned ? 'on' : 'unavailable', by: pinned ? 'load' : null, sockets: null, why };
      }
      return { mode, state: 'on', by: switches.by, sockets: made(), why };
    },
    includes(key) {
      const wish = wishes.find((one) => one.key === key)?.mptcp ?? mode === 'all';
      return switches !== null && wish && (mode === 'all' || found.has(key));
    },
    stop() {
      stopped = true;
      timer?.();
      write();
      switches?.close();
    },
  };

  function made(): number | null {
    try {
      return switches?.made() ?? null;
    } catch {
      return null;
    }
  }
}

/** What `detour load` chooses, in the namespace that it runs in. @throws Error */
export function fillByLoad(switches: Switches, mode: Mode, net: number): void {
  const { nets, groups } = choiceOfLoad(mode === 'all', net);
  apply(switches.groups, groups, true);
  apply(switches.nets, nets, true);
}

function apply<K>(table: Table<K>, wanted: ReadonlyMap<K, boolean>, loading = false): void {
  for (const { key, value } of changes(table.entries(), wanted, loading)) {
    if (value === null) table.delete(key);
    else table.set(key, value);
  }
}
