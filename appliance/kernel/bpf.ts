import {
  closeSync,
  constants,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  rmdirSync,
  rmSync,
  statfsSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import koffi, { type LibraryHandle } from 'koffi';

/**
 * BPF programs: loaded into the kernel by libbpf, which also fits them to it (CO-RE), attached, and left there when they are pinned. Programs of the
 * kernel's own functions (fmod_ret) and of control groups (sockops) look alike from here.
 */

/** A program in the kernel, with the maps that it shares with us. */
export type BpfProgram = {
  /** A map of the object. Good until the program is closed. */
  map(name: string): BpfMap;
  /**
   * Makes it run: where its section says, or for the processes of a control group, the directory of one (v2). Until the link is
   * closed and, if it was pinned, unpinned.
   * @throws BpfError
   */
  attach(group?: string): BpfLink;
  /** Lets go of program and maps. What is attached or pinned keeps them. */
  close(): void;
};

export type BpfLink = {
  /** Keeps it running without this process, until the file at `path` is removed. @throws BpfError */
  pin(path: string): void;
  close(): void;
};

/** Keys and values have the lengths that the object gave them, in the byte order of the machine. */
export type BpfMap = {
  entries(): readonly (readonly [key: Buffer, value: Buffer])[];
  /** @throws BpfError (`E2BIG` when it is full) */
  set(key: Buffer, value: Buffer): void;
  /** Harmless when it is not there. @throws BpfError */
  delete(key: Buffer): void;
  /** Keeps it without this process, until the file at `path` is removed. @throws BpfError */
  pin(path: string): void;
  close(): void;
};

/**
 * Why there is no BPF. What an operator may mend in place: `library`, `object`, `capability`, `bpffs`, `group`. What takes another
 * kernel, or another place to run: `btf`, `hook`, `refused`. `failed`: whatever else, with libbpf's own words.
 */
export type BpfReason = 'library' | 'object' | 'capability' | 'bpffs' | 'group' | 'btf' | 'hook' | 'refused' | 'failed';

export class BpfError extends Error {
  override readonly name = 'BpfError';
  readonly reason: BpfReason;

  constructor(reason: BpfReason, message: string) {
    super(message);
    this.reason = reason;
  }
}

/** linux/capability.h. CAP_SYS_ADMIN stands for the others (kernel/bpf/token.c, bpf_ns_capable). */
const CAPABILITY = { NET_ADMIN: 12n, SYS_ADMIN: 21n, PERFMON: 38n, BPF: 39n } as const;
export type BpfCapability = 'BPF' | 'PERFMON' | 'NET_ADMIN';

/** Where the kernel describes its types. */
const KERNEL_BTF = '/sys/kernel/btf/vmlinux';
/** linux/magic.h */
const BPF_FS_MAGIC = 0xcafe4a11;
/** linux/errno.h, and one that user space knows no name of; the same on amd64 and arm64. */
const ERRNO = { EPERM: 1, ENOENT: 2, ESRCH: 3, E2BIG: 7, EBADF: 9, EACCES: 13, EOPNOTSUPP: 95, ENOTSUPP: 524 } as const;
/** What libbpf says of a program that the verifier refused goes on for pages; the end of it is what matters. */
const LOG_LINES = 8;
const LONGEST_LINE = 400;
/** `enum libbpf_print_level` */
const PRINT_WARN = 0;
/** struct bpf_map_info of linux/bpf.h: type, id, then the two. */
const INFO = { BYTES: 88, KEY_SIZE: 8, VALUE_SIZE: 12 } as const;

/** An address, as koffi hands one over. */
type Pointer = bigint | null;
type Libbpf = ReturnType<typeof bind>;

const said: string[] = [];
let library: Libbpf | null = null;

/** @throws BpfError */
function libbpf(): Libbpf {
  library ??= bind(find());
  return library;
}

function find(): LibraryHandle {
  try {
    return koffi.load('libbpf.so.1');
  } catch {
    throw new BpfError('library', 'libbpf.so.1 is not here: apt-get install libbpf1 (the images have it)');
  }
}

function bind(so: LibraryHandle) {
  const print = koffi.proto('int DetourBpfPrint(int level, const void *format, void *args)');
  // A va_list is passed on as it came: by reference, on amd64 and arm64 alike.
  const format = koffi
    .load(null)
    .func('int vsnprintf(_Out_ uint8_t *text, size_t size, const void *format, void *args)');
  const listener = koffi.register((level: number, text: Pointer, args: Pointer) => {
    const line = Buffer.alloc(LONGEST_LINE);
    if (level === PRINT_WARN && format(line, line.length, text, args) >= 0)
      said.push(line.toString('latin1', 0, line.indexOf(0)).trim());
    return 0;
  }, koffi.pointer(print));
  so.func('void *libbpf_set_print(DetourBpfPrint *listener)')(listener);
  return {
    open: so.func('void *bpf_object__open_file(const char *path, const void *options)'),
    load: so.func('int bpf_object__load(void *object)'),
    closeObject: so.func('void bpf_object__close(void *object)'),
    findProgram: so.func('void *bpf_object__find_program_by_name(void *object, const char *name)'),
    findMap: so.func('void *bpf_object__find_map_by_name(void *object, const char *name)'),
    attach: so.func('void *bpf_program__attach(void *program)'),
    attachGroup: so.func('void *bpf_program__attach_cgroup(void *program, int group)'),
    pinLink: so.func('int bpf_link__pin(void *link, const char *path)'),
    destroyLink: so.func('int bpf_link__destroy(void *link)'),
    mapFd: so.func('int bpf_map__fd(void *map)'),
    pin: so.func('int bpf_obj_pin(int fd, const char *path)'),
    get: so.func('int bpf_obj_get(const char *path)'),
    info: so.func('int bpf_obj_get_info_by_fd(int fd, _Out_ uint8_t *info, _Inout_ uint32_t *length)'),
    update: so.func('int bpf_map_update_elem(int fd, const uint8_t *key, const uint8_t *value, uint64_t flags)'),
    lookup: so.func('int bpf_map_lookup_elem(int fd, const uint8_t *key, _Out_ uint8_t *value)'),
    delete: so.func('int bpf_map_delete_elem(int fd, const uint8_t *key)'),
    nextKey: so.func('int bpf_map_get_next_key(int fd, const uint8_t *key, _Out_ uint8_t *next)'),
  };
}

/** Where the build put an object: beside the bundle, or in dist/ of this tree. */
export function objectPath(name: string): string {
  const beside = join(import.meta.dirname, name);
  return existsSync(beside) ? beside : join(import.meta.dirname, '../../dist', name);
}

/**
 * Loads an object with one program. `needs` are the capabilities that its kind takes: BPF, besides PERFMON for one that reads the kernel's
 * memory, and NET_ADMIN for one that handles packets. Takes some 20 ms, because libbpf reads the types of the whole kernel.
 * @throws BpfError
 */
export function loadProgram(path: string, name: string, needs: readonly BpfCapability[]): BpfProgram {
  const lib = libbpf();
  if (!existsSync(path)) throw new BpfError('object', `there is no ${path}: make build compiles it`);
  if (!existsSync(KERNEL_BTF)) {
    throw new BpfError(
      'btf',
      `this kernel does not describe its types (there is no ${KERNEL_BTF}): one built with CONFIG_DEBUG_INFO_BTF=y is needed, as those of Debian, Ubuntu and Fedora are`,
    );
  }
  const failed = (what: string, code: number): BpfError => explain(`${what} ${name}`, code, needs);
  said.length = 0;
  const object: Pointer = lib.open(path, null);
  if (object === null) throw failed('reading', koffi.errno());
  try {
    const code: number = lib.load(object);
    if (code !== 0) throw failed('loading', -code);
    const program: Pointer = lib.findProgram(object, name);
    if (program === null) throw new BpfError('object', `${path} holds no program ${name}: make build again`);
    // libbpf frees what it is told to, as often as it is told.
    let open = true;
    const mustBeOpen = (): void => {
      if (!open) throw new RangeError(`${name} is closed`);
    };
    return {
      map(map) {
        mustBeOpen();
        const found: Pointer = lib.findMap(object, map);
        if (found === null) throw new BpfError('object', `${path} holds no map ${map}: make build again`);
        const fd: number = lib.mapFd(found);
        return mapOf(
          () => {
            mustBeOpen();
            return fd;
          },
          map,
          () => undefined,
        );
      },
      attach(group) {
        mustBeOpen();
        said.length = 0;
        const link: Pointer = group === undefined ? lib.attach(program) : attachTo(group, program);
        if (link === null) throw failed('attaching', koffi.errno());
        let attached = true;
        return {
          pin(at) {
            if (!attached) throw new RangeError(`the link of ${name} is closed`);
            pin(at, () => lib.pinLink(link, at));
          },
          close() {
            if (attached) lib.destroyLink(link);
            attached = false;
          },
        };
      },
      close() {
        if (open) lib.closeObject(object);
        open = false;
      },
    };
  } catch (error) {
    lib.closeObject(object);
    throw error;
  }
}

function attachTo(group: string, program: Pointer): Pointer {
  let directory: number;
  try {
    directory = openSync(group, constants.O_RDONLY | constants.O_DIRECTORY);
  } catch {
    throw new BpfError('group', `there is no control group ${group}`);
  }
  try {
    const link: Pointer = libbpf().attachGroup(program, directory);
    if (link === null && koffi.errno() === ERRNO.EBADF)
      throw new BpfError('group', `${group} is no control group of version 2: mount -t cgroup2 none /sys/fs/cgroup`);
    return link;
  } finally {
    closeSync(directory);
  }
}

/**
 * A map that was pinned; null when there is none. Needs permission for its file, and no capability (Linux 5.19 and later).
 * @throws BpfError
 */
export function openPinnedMap(path: string): BpfMap | null {
  // The library is not needed to see that there is nothing.
  if (!existsSync(path)) return null;
  const fd: number = libbpf().get(path);
  if (fd === -ERRNO.ENOENT) return null;
  if (fd === -ERRNO.EPERM || fd === -ERRNO.EACCES) {
    throw new BpfError(
      'refused',
      `${path} may not be opened (EPERM): run as root; in a container, its seccomp filter must let bpf(2) pass, which docker's does with --cap-add BPF`,
    );
  }
  if (fd < 0) throw explain(`opening ${path}`, -fd, []);
  let open = true;
  return mapOf(
    () => {
      if (!open) throw new RangeError(`${path} is closed`);
      return fd;
    },
    path,
    () => {
      if (open) closeSync(fd);
      open = false;
    },
  );
}

/** Removes a pin, and its folder with the last one in it. Harmless when it is not there. @throws BpfError */
export function unpin(path: string): void {
  try {
    rmSync(path, { force: true });
  } catch {
    throw new BpfError('refused', `${path} may not be removed: run as root`);
  }
  try {
    rmdirSync(dirname(path));
  } catch {
    // Others are in there, or it was never made.
  }
}

/** Whether pins can be made below a folder. */
export function isBpfFileSystem(folder: string): boolean {
  try {
    return statfsSync(folder).type === BPF_FS_MAGIC;
  } catch {
    return false;
  }
}

function mapOf(fd: () => number, name: string, close: () => void): BpfMap {
  const lib = libbpf();
  const check = (what: string, code: number): void => {
    if (code < 0) throw explain(`${what} ${name}`, -code, []);
  };
  const info = Buffer.alloc(INFO.BYTES);
  check('asking for', lib.info(fd(), info, [info.length]));
  // The kernel writes so much into what it is handed, whatever its length.
  const [keyBytes, valueBytes] = [info.readUInt32LE(INFO.KEY_SIZE), info.readUInt32LE(INFO.VALUE_SIZE)];
  const fits = (bytes: Buffer, length: number): Buffer => {
    if (bytes.length !== length) throw new RangeError(`${name}: ${bytes.length} bytes instead of ${length}`);
    return bytes;
  };
  return {
    entries() {
      const found: [Buffer, Buffer][] = [];
      for (let last: Buffer | null = null; ; ) {
        const key = Buffer.alloc(keyBytes);
        const value = Buffer.alloc(valueBytes);
        const next: number = lib.nextKey(fd(), last, key);
        if (next === -ERRNO.ENOENT) return found;
        check('reading', next);
        check('reading', lib.lookup(fd(), key, value));
        found.push([key, value]);
        last = key;
      }
    },
    set: (key, value) => check('writing', lib.update(fd(), fits(key, keyBytes), fits(value, valueBytes), 0)),
    delete(key) {
      const code: number = lib.delete(fd(), fits(key, keyBytes));
      if (code !== -ERRNO.ENOENT) check('writing', code);
    },
    pin: (path) => pin(path, () => lib.pin(fd(), path)),
    close,
  };
}

function pin(path: string, make: () => number): void {
  const folder = dirname(path);
  try {
    mkdirSync(folder, { recursive: true, mode: 0o700 });
  } catch {
    // What is wrong with it shows next.
  }
  if (!isBpfFileSystem(folder)) {
    throw new BpfError(
      'bpffs',
      `${folder} is in no BPF file system: mount -t bpf bpf /sys/fs/bpf (on the host); docker: -v /sys/fs/bpf:/sys/fs/bpf; ` +
        'kubernetes: a hostPath volume of /sys/fs/bpf at /sys/fs/bpf',
    );
  }
  const code = make();
  if (code < 0) throw explain(`pinning at ${path}`, -code, []);
}

/** The one place where an errno and what libbpf said become a cause and a remedy. */
function explain(what: string, code: number, needs: readonly BpfCapability[]): BpfError {
  const words = said.slice(-LOG_LINES).join('; ');
  said.length = 0;
  if (code === ERRNO.EPERM && needs.length > 0) {
    const status = readFileSync('/proc/self/status', 'latin1');
    const missing = missingOf(/^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1] ?? '0', needs);
    if (missing.length > 0) {
      return new BpfError(
        'capability',
        `the kernel refuses ${what} to this process: it needs ${missing.map((one) => `CAP_${one}`).join(' and ')}. ` +
          `docker: ${missing.map((one) => `--cap-add ${one}`).join(' ')}; kubernetes: securityContext.capabilities.add: [${missing.join(', ')}]`,
      );
    }
    const filtered = /^Seccomp:\s*2$/m.test(status)
      ? '; a seccomp filter is on, and that of Docker before 23 refuses BPF whatever the capabilities: --security-opt seccomp=unconfined'
      : '';
    return new BpfError(
      'refused',
      `this kernel, or the sandbox around it, refuses ${what} although the capabilities are there${filtered}`,
    );
  }
  const unknown = code === ERRNO.ESRCH || code === ERRNO.EOPNOTSUPP || code === ERRNO.ENOTSUPP;
  if (needs.length > 0 && unknown)
    return new BpfError('hook', `this kernel has no place for ${what.replace(/^\w+ /, 'the program ')}`);
  const number = Object.entries(ERRNO).find(([, value]) => value === code)?.[0] ?? `errno ${code}`;
  return new BpfError('failed', `${what}: ${number}${words === '' ? '' : ` (${words})`}`);
}

/** Which of `needs` are not in an effective set, as /proc/PID/status writes one. */
export function missingOf(effective: string, needs: readonly BpfCapability[]): readonly BpfCapability[] {
  const held = BigInt(`0x${effective}`);
  const has = (name: keyof typeof CAPABILITY): boolean => ((held >> CAPABILITY[name]) & 1n) === 1n;
  return has('SYS_ADMIN') ? [] : needs.filter((name) => !has(name));
}
