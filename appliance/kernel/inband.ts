import { existsSync, statfsSync } from 'node:fs';
import { type Endpoint, formatEndpoint } from '../protocol/address.ts';
import { BpfError, type BpfMap, isBpfFileSystem, loadProgram, objectPath, openPinnedMap, unpin } from './bpf.ts';

/** The program of bpf/inband.bpf.c in the kernel, and its map of the detours' ports to which joins name their server. */
export type InbandPorts = {
  /** Who attached it: `load` for good, `agent` for as long as this process lives. */
  readonly by: 'load' | 'agent';
  /** From now on joins to an IPv4 address and port name their server. @throws BpfError when the map is full */
  add(port: Endpoint): void;
  /** ... no longer. Harmless when they did not. @throws BpfError */
  remove(port: Endpoint): void;
  close(): void;
};

const PROGRAM = 'inband';
const MAP = 'inband_ports';
/** It reads structures of the kernel, and writes into packets. */
const NEEDS = ['BPF', 'PERFMON', 'NET_ADMIN'] as const;
const FILE_SYSTEM = '/sys/fs/bpf';
/** Pinned last and removed first: with it, all is there. */
const LINK = `${FILE_SYSTEM}/detour/${PROGRAM}`;
const MAP_PIN = `${FILE_SYSTEM}/detour/${MAP}`;
/** linux/magic.h */
const CGROUP2_MAGIC = 0x63677270;
/** Where systemd mounts control groups of version 2, alone or beside those of version 1. */
const ROOTS = ['/sys/fs/cgroup', '/sys/fs/cgroup/unified'];

/** Whether `detour load` attached it. */
export const isInbandLoaded = (): boolean => existsSync(LINK);

/** Finds what `detour load` attached, or attaches it for this process. @throws BpfError */
export function openInband(): InbandPorts {
  if (isInbandLoaded()) {
    const map = openPinnedMap(MAP_PIN);
    if (!map) throw new BpfError('object', `${LINK} is there without ${MAP}: detour unload && detour load`);
    return portsOf('load', map, map.close);
  }
  const group = root();
  const program = loadProgram(objectPath(`${PROGRAM}.bpf.o`), PROGRAM, NEEDS);
  try {
    const link = program.attach(group);
    return portsOf('agent', program.map(MAP), () => {
      link.close();
      program.close();
    });
  } catch (error) {
    program.close();
    throw error;
  }
}

/**
 * Readies what is to stay. Whatever can fail has been tried when this returns, and nothing has changed; `keep` attaches it. Does nothing when it
 * is there already.
 * @throws BpfError
 */
export function prepareInband(): { keep(): void } {
  if (isInbandLoaded()) return { keep: () => undefined };
  const group = root();
  const program = loadProgram(objectPath(`${PROGRAM}.bpf.o`), PROGRAM, NEEDS);
  if (!isBpfFileSystem(FILE_SYSTEM)) {
    program.close();
    throw new BpfError(
      'bpffs',
      `there is no BPF file system at ${FILE_SYSTEM}, where it would stay: mount -t bpf bpf ${FILE_SYSTEM} (on the host); docker: -v ${FILE_SYSTEM}:${FILE_SYSTEM}`,
    );
  }
  return {
    keep() {
      try {
        removeInband();
        program.map(MAP).pin(MAP_PIN);
        program.attach(group).pin(LINK);
      } catch (error) {
        removeInband();
        throw error;
      } finally {
        program.close();
      }
    },
  };
}

/** Detaches what was to stay. Harmless when there is nothing. @throws BpfError */
export function removeInband(): void {
  unpin(LINK);
  unpin(MAP_PIN);
}

/** The control group that all others are in, as this process sees it. @throws BpfError */
function root(): string {
  const found = ROOTS.find((path) => {
    try {
      return statfsSync(path).type === CGROUP2_MAGIC;
    } catch {
      return false;
    }
  });
  if (found) return found;
  throw new BpfError('group', 'there are no control groups of version 2 here: mount -t cgroup2 none /sys/fs/cgroup');
}

function portsOf(by: InbandPorts['by'], map: BpfMap, close: () => void): InbandPorts {
  const on = Buffer.alloc(4);
  on.writeUInt32LE(1);
  return {
    by,
    add: (port) => map.set(keyOf(port), on),
    remove: (port) => map.delete(keyOf(port)),
    close,
  };
}

/** struct place of bpf/inband.bpf.c: address and port in network order, and padding. */
function keyOf(port: Endpoint): Buffer {
  if (port.address.family !== 4) throw new RangeError(`${formatEndpoint(port)}: only IPv4 has in-band transit`);
  const key = Buffer.alloc(8);
  key.writeUInt32BE(Number(port.address.value), 0);
  key.writeUInt16BE(port.port, 4);
  return key;
}
