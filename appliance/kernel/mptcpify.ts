import { existsSync } from 'node:fs';
import { BpfError, type BpfMap, isBpfFileSystem, loadProgram, objectPath, openPinnedMap, unpin } from './bpf.ts';

/** The program of bpf/mptcpify.bpf.c in the kernel, and the maps that say whose sockets it is for. */
export type Switches = {
  /** Who attached it: `load` for good, `agent` for as long as this process lives. */
  readonly by: 'load' | 'agent';
  /** Network namespaces, by inode. */
  readonly nets: Table<number>;
  /** Control groups, by id. */
  readonly groups: Table<bigint>;
  /** Sockets that became Multipath TCP since it was attached. @throws BpfError */
  made(): number;
  close(): void;
};

/** What the values mean: client/switches.ts. */
export type Table<K> = {
  /** @throws BpfError */
  entries(): ReadonlyMap<K, number>;
  /** @throws BpfError when it is full, or may not be written */
  set(key: K, value: number): void;
  /** @throws BpfError */
  delete(key: K): void;
};

const PROGRAM = 'mptcpify';
/** It reads structures of the kernel. */
const NEEDS = ['BPF', 'PERFMON'] as const;
const FILE_SYSTEM = '/sys/fs/bpf';
const FOLDER = `${FILE_SYSTEM}/detour`;
/** Pinned last and removed first: with it, all is there. */
const LINK = `${FOLDER}/mptcpify`;
const MAPS = ['mptcp_nets', 'mptcp_groups', 'mptcp_made'] as const;
const pinOf = (map: (typeof MAPS)[number]): string => `${FOLDER}/${map}`;

/** Whether `detour load` attached it. */
export const isPinned = (): boolean => existsSync(LINK);

/** Finds what `detour load` attached, or attaches it for this process. @throws BpfError */
export function openSwitches(): Switches {
  const pinned = openPinned();
  if (pinned) return pinned;
  const program = loadProgram(objectPath(`${PROGRAM}.bpf.o`), PROGRAM, NEEDS);
  const link = program.attach();
  return switchesOf('agent', program.map, () => {
    link.close();
    program.close();
  });
}

/**
 * Readies what is to stay. Whatever can fail has been tried when this returns, and nothing has changed; `keep` attaches it.
 * Finds what is there already.
 * @throws BpfError
 */
export function prepareSwitches(): { keep(): Switches } {
  const pinned = openPinned();
  if (pinned) return { keep: () => pinned };
  const program = loadProgram(objectPath(`${PROGRAM}.bpf.o`), PROGRAM, NEEDS);
  if (!isBpfFileSystem(FILE_SYSTEM)) {
    program.close();
    throw new BpfError(
      'bpffs',
      `there is no BPF file system at ${FILE_SYSTEM}, where it would stay: mount -t bpf bpf ${FILE_SYSTEM} (on the host); docker: -v ${FILE_SYSTEM}:${FILE_SYSTEM}; ` +
        'kubernetes: a hostPath volume of it',
    );
  }
  return {
    keep() {
      removeSwitches();
      for (const map of MAPS) program.map(map).pin(pinOf(map));
      program.attach().pin(LINK);
      return switchesOf('load', program.map, program.close);
    },
  };
}

/** Detaches what was to stay. Harmless when there is nothing. */
export function removeSwitches(): void {
  unpin(LINK);
  for (const map of MAPS) unpin(pinOf(map));
}

function openPinned(): Switches | null {
  if (!isPinned()) return null;
  const maps = new Map<string, BpfMap | null>(MAPS.map((name) => [name, openPinnedMap(pinOf(name))]));
  const mapOf = (name: string): BpfMap => {
    const map = maps.get(name);
    if (!map) throw new BpfError('object', `${LINK} is there without ${name}: detour unload && detour load`);
    return map;
  };
  return switchesOf('load', mapOf, () => {
    for (const map of maps.values()) map?.close();
  });
}

function switchesOf(by: Switches['by'], mapOf: (name: string) => BpfMap, close: () => void): Switches {
  const made = mapOf('mptcp_made');
  return {
    by,
    nets: tableOf(mapOf('mptcp_nets'), u32, (key) => key.readUInt32LE()),
    groups: tableOf(mapOf('mptcp_groups'), u64, (key) => key.readBigUInt64LE()),
    made: () => Number(made.entries()[0]?.[1].readBigUInt64LE() ?? 0n),
    close,
  };
}

function tableOf<K>(map: BpfMap, encode: (key: K) => Buffer, decode: (key: Buffer) => K): Table<K> {
  return {
    entries: () => new Map(map.entries().map(([key, value]) => [decode(key), value.readUInt32LE()])),
    set: (key, value) => map.set(encode(key), u32(value)),
    delete: (key) => map.delete(encode(key)),
  };
}

function u32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

function u64(value: bigint): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(value);
  return bytes;
}
