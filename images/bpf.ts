/**
 * Compiles `appliance/bpf/*.bpf.c` into `dist/*.bpf.o`: one object for every kernel and for both architectures, which are little-endian.
 *
 *     node images/bpf.ts
 */
import { spawnSync } from 'node:child_process';
import { mkdirSync, readdirSync } from 'node:fs';
import { basename, join } from 'node:path';

const root = join(import.meta.dirname, '..');
const SOURCES = 'appliance/bpf';
const INSTALL = 'tests/lab/host.sh packages build   (or: apt-get install clang libbpf-dev)';

/**
 * `-g` for BTF, the description of types that CO-RE works with; the folder that debuggers would look in stays out, so that
 * two trees give the same bytes. `v3` of the instruction set (Linux 5.1) is what those types are compiled to best.
 */
const FLAGS = ['-target', 'bpfel', '-mcpu=v3', '-O2', '-g', '-fdebug-compilation-dir=.', '-Wall', '-Werror'];

/** @throws Error that says what is missing, or what clang said */
export function compileBpf(): void {
  mkdirSync(join(root, 'dist'), { recursive: true });
  for (const source of readdirSync(join(root, SOURCES)).filter((name) => name.endsWith('.bpf.c'))) {
    const object = `dist/${basename(source, '.c')}.o`;
    const clang = spawnSync('clang', [...FLAGS, '-c', `${SOURCES}/${source}`, '-o', object], {
      cwd: root,
      encoding: 'utf8',
    });
    if (clang.error) throw new Error(`build: there is no clang, which compiles ${SOURCES}: ${INSTALL}`);
    if (/bpf\/\w+\.h' file not found/.test(clang.stderr))
      throw new Error(`build: libbpf's headers are missing, which ${SOURCES} includes: ${INSTALL}`);
    if (clang.status !== 0) throw new Error(`build: clang could not compile ${SOURCES}/${source}\n${clang.stderr}`);
  }
}

if (import.meta.main) compileBpf();
