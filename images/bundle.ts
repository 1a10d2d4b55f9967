/**
 * `npm run build`: bundles the program into `dist/detour.js`, compiles its BPF programs beside it, and assembles what the images copy in.
 *
 *     node images/bundle.ts [amd64] [arm64]      without arguments: this machine's architecture
 *
 * `dist/image/<arch>/runtime` holds Node, `dist/image/<arch>/app` the program; two folders, so that a new version of the
 * program shares the image layer of the big one.
 */
import { execFileSync } from 'node:child_process';
import {
  chmodSync,
  copyFileSync,
  cpSync,
  existsSync,
  lutimesSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from 'node:fs';
import { dirname, join } from 'node:path';
import { build } from 'esbuild';
import { compileBpf } from './bpf.ts';

/** Docker's names of the architectures and npm's. */
const NPM_CPU = { amd64: 'x64', arm64: 'arm64' } as const;
type Arch = keyof typeof NPM_CPU;

const root = join(import.meta.dirname, '..');

/** See absent.cjs. */
const ABSENT = ['@grpc/grpc-js', '@grpc/proto-loader', 'ssh2'] as const;

/** Output of a git command in this tree, or null: a source archive has no git. */
function git(...args: string[]): string | null {
  try {
    return execFileSync('git', args, { cwd: root, encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] }).trim();
  } catch {
    return null;
  }
}

/** The commit the program is built from, `-dirty` when its sources differ from it, `unknown` outside git. */
function revision(): string {
  const commit = git('rev-parse', '--short=12', 'HEAD');
  if (commit === null) return 'unknown';
  const changed = git('status', '--porcelain', '--', 'appliance', 'package-lock.json');
  return changed === '' ? commit : `${commit}-dirty`;
}

/** Seconds since 1970 that every file in the image carries, so that building twice gives the same layers. */
function sourceDate(): number {
  return Number(process.env['SOURCE_DATE_EPOCH'] ?? git('log', '-1', '--format=%ct') ?? '0');
}

function packageJson(folder: string): { version: string } {
  return JSON.parse(readFileSync(join(folder, 'package.json'), 'utf8')) as { version: string };
}

async function bundle(): Promise<void> {
  await build({
    entryPoints: [join(root, 'appliance/cli.ts')],
    outfile: join(root, 'dist/detour.js'),
    bundle: true,
    platform: 'node',
    target: 'node24',
    format: 'esm',
    sourcemap: 'linked',
    // Names and lines in a user's stack trace are worth more than the few kilobytes.
    minify: false,
    // They find their native parts relative to their own folders, so they stay packages beside the bundle.
    external: ['netlink', 'koffi'],
    alias: Object.fromEntries(ABSENT.map((name) => [name, join(root, 'images/absent.cjs')])),
    define: {
      DETOUR_BUILD_VERSION: JSON.stringify(packageJson(root).version),
      DETOUR_BUILD_REVISION: JSON.stringify(revision()),
    },
    banner: {
      // CommonJS packages inside an ES module still call require() for node's own modules.
      js: `import { createRequire as detourCreateRequire } from 'node:module';\nconst require = detourCreateRequire(import.meta.url);\n${readFileSync(join(root, 'images/handover.js'), 'utf8')}`,
    },
    logLevel: 'warning',
  });
  chmodSync(join(root, 'dist/detour.js'), 0o755);
}

/**
 * The folder of the npm package that holds Node for `arch`. npm installs only this machine's; another one is fetched into
 * the cache by `npm ci`, which holds it to the lock file's integrity hash.
 */
function nodePackage(arch: Arch): string {
  const cpu = NPM_CPU[arch];
  const installed = join(root, 'node_modules', `node-linux-${cpu}`);
  if (existsSync(join(installed, 'bin/node'))) return installed;
  const cache = join(root, '.cache', `npm-${cpu}`);
  mkdirSync(cache, { recursive: true });
  const lock = readFileSync(join(root, 'package-lock.json'), 'utf8');
  const fetched = join(cache, 'node_modules', `node-linux-${cpu}`);
  const stamp = join(cache, '.fetched');
  const fresh = existsSync(stamp) && readFileSync(stamp, 'utf8') === lock;
  if (!fresh || !existsSync(join(fetched, 'bin/node'))) {
    console.error(`build: fetching Node for ${arch} through npm`);
    copyFileSync(join(root, 'package.json'), join(cache, 'package.json'));
    writeFileSync(join(cache, 'package-lock.json'), lock);
    execFileSync('npm', ['ci', '--omit=dev', '--ignore-scripts', '--loglevel=error', '--os=linux', `--cpu=${cpu}`], {
      cwd: cache,
      stdio: ['ignore', 'ignore', 'inherit'],
    });
    writeFileSync(stamp, lock);
  }
  return fetched;
}

/**
 * An ELF64 little-endian executable without what only debuggers read: everything behind the last loadable segment, and
 * the section headers that point there. `strip` would need binutils for each foreign architecture.
 * Offsets: elf.h, Elf64_Ehdr and Elf64_Phdr.
 */
function stripped(elf: Buffer): Buffer {
  const elf64LittleEndian = Buffer.from([0x7f, 0x45, 0x4c, 0x46, 2, 1]);
  if (!elf.subarray(0, 6).equals(elf64LittleEndian)) throw new Error('build: the Node binary is no ELF64 file');
  const programHeaders = Number(elf.readBigUInt64LE(32));
  const entrySize = elf.readUInt16LE(54);
  const entries = elf.readUInt16LE(56);
  let end = 0;
  for (let index = 0; index < entries; index += 1) {
    const at = programHeaders + index * entrySize;
    end = Math.max(end, Number(elf.readBigUInt64LE(at + 8) + elf.readBigUInt64LE(at + 32)));
  }
  const result = Buffer.from(elf.subarray(0, end));
  result.writeBigUInt64LE(0n, 40);
  result.writeUInt16LE(0, 60);
  result.writeUInt16LE(0, 62);
  return result;
}

function place(file: string, content: Buffer | string, mode: number): void {
  mkdirSync(dirname(file), { recursive: true });
  writeFileSync(file, content);
  chmodSync(file, mode);
}

/** Gives every file, folder and link under `folder` the same date. */
function date(folder: string, seconds: number): void {
  for (const entry of readdirSync(folder, { recursive: true, withFileTypes: true })) {
    lutimesSync(join(entry.parentPath, entry.name), seconds, seconds);
  }
}

function assemble(arch: Arch): void {
  const image = join(root, 'dist/image', arch);
  rmSync(image, { recursive: true, force: true });

  const node = nodePackage(arch);
  const runtime = join(image, 'runtime');
  place(join(runtime, 'usr/local/bin/node'), stripped(readFileSync(join(node, 'bin/node'))), 0o755);
  place(join(runtime, 'usr/share/doc/node/LICENSE'), readFileSync(join(node, 'LICENSE')), 0o644);

  const app = join(image, 'app');
  place(join(app, 'opt/detour/detour.js'), readFileSync(join(root, 'dist/detour.js')), 0o755);
  for (const object of readdirSync(join(root, 'dist')).filter((name) => name.endsWith('.bpf.o')))
    place(join(app, 'opt/detour', object), readFileSync(join(root, 'dist', object)), 0o644);
  place(join(app, 'opt/detour/package.json'), '{"name":"detour","type":"module","private":true}\n', 0o644);
  mkdirSync(join(app, 'usr/local/bin'), { recursive: true });
  symlinkSync('/opt/detour/detour.js', join(app, 'usr/local/bin/detour'));
  const prebuilt = `prebuilds/linux-${NPM_CPU[arch]}`;
  copyPackage('netlink', app, ['package.json', 'LICENSE', 'dist', prebuilt]);
  copyPackage('node-gyp-build', app, ['package.json', 'LICENSE', 'index.js', 'node-gyp-build.js']);
  if (!existsSync(join(app, 'opt/detour/node_modules/netlink', prebuilt))) {
    throw new Error(`build: the netlink package brings no native part for ${arch}`);
  }
  copyPackage('koffi', app, ['package.json', 'LICENSE.txt', 'index.js', 'src/koffi']);
  // npm puts the native part of each architecture into a package of its own, beside Node's in the same folder.
  const koffi = `@koromix/koffi-linux-${NPM_CPU[arch]}`;
  copyPackage(koffi, app, ['package.json', 'index.js', `linux_${NPM_CPU[arch]}`], dirname(node));

  for (const folder of [runtime, app]) date(folder, sourceDate());
}

function copyPackage(
  name: string,
  app: string,
  parts: readonly string[],
  from: string = join(root, 'node_modules'),
): void {
  for (const part of parts) {
    cpSync(join(from, name, part), join(app, 'opt/detour/node_modules', name, part), {
      recursive: true,
      filter: (path) => !path.endsWith('.d.ts') && !path.endsWith('.map'),
    });
  }
}

function isArch(name: string): name is Arch {
  return name in NPM_CPU;
}

function requested(): Arch[] {
  const names = process.argv.slice(2);
  if (names.length === 0) names.push(process.arch === 'arm64' ? 'arm64' : 'amd64');
  return names.map((name) => {
    if (isArch(name)) return name;
    throw new Error(`build: no image for architecture '${name}'; there are ${Object.keys(NPM_CPU).join(' and ')}`);
  });
}

compileBpf();
await bundle();
for (const arch of requested()) assemble(arch);
