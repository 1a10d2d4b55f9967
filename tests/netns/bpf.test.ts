import { execFileSync, spawnSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmdirSync, rmSync, statfsSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { BpfError, loadProgram, objectPath } from '../../appliance/kernel/bpf.ts';
import { compile } from '../../images/bpf.ts';
import { type Host, Lab, requireRoot } from '../lab/netns.ts';

/** The port to BPF with a program of the kind that every kernel lets load: one of control groups. */

const CGROUP2_MAGIC = 0x63677270;
const MODULE = join(import.meta.dirname, '../../appliance/kernel/bpf.ts');
const LISTEN_AND_CONNECT =
  'from socket import *\ns = create_server(("127.0.0.1", 0))\nfor _ in range(3): create_connection(s.getsockname())';

describe.runIf(requireRoot('tests of BPF'))('a program of control groups', () => {
  const folder = mkdtempSync(join(tmpdir(), 'detour-bpf-'));
  const object = join(folder, 'sockops.bpf.o');
  let group: string;
  let lab: Lab;
  let host: Host;

  beforeAll(async () => {
    compile('tests/lab/sockops.bpf.c', object);
    const root = ['/sys/fs/cgroup', '/sys/fs/cgroup/unified'].find((path) => statfsSync(path).type === CGROUP2_MAGIC);
    if (root === undefined) throw new Error('no control groups of version 2 are mounted here');
    group = join(root, `detour-test-${process.pid}`);
    mkdirSync(group);
    lab = await Lab.create('bpf');
    host = await lab.host('host');
  });
  afterAll(async () => {
    await lab?.[Symbol.asyncDispose]();
    if (group) rmdirSync(group);
    rmSync(folder, { recursive: true, force: true });
  });

  const connect = (inside: boolean): Promise<string> =>
    host.exec([
      'sh',
      '-c',
      `${inside ? `echo $$ >'${group}/cgroup.procs' && ` : ''}exec python3 -c "$1"`,
      '-',
      LISTEN_AND_CONNECT,
    ]);

  it('counts what its processes do, and nothing else, for as long as it is attached', async () => {
    const program = loadProgram(object, 'count', ['BPF', 'NET_ADMIN']);
    const link = program.attach(group);
    const count = (): number => Number(program.map('connects').entries()[0]?.[1].readBigUInt64LE());
    await connect(false);
    expect(count()).toBe(0);
    await connect(true);
    expect(count()).toBe(3);
    link.close();
    await connect(true);
    expect(count()).toBe(3);
    program.close();
    // Closing again frees nothing twice.
    link.close();
    program.close();
    expect(count).toThrow('closed');
  });

  it.each([
    ['-all', 'CAP_BPF and CAP_NET_ADMIN'],
    ['-all,+bpf', 'CAP_NET_ADMIN'],
    ['-all,+net_admin', 'CAP_BPF'],
    ['-all,+bpf,+net_admin', null],
    ['-all,+sys_admin', null],
  ])('with the capabilities %s lacks %s', (capabilities, missing) => {
    const script = `import { loadProgram } from ${JSON.stringify(MODULE)};
      try { loadProgram(${JSON.stringify(object)}, 'count', ['BPF', 'NET_ADMIN']).close(); console.log('loaded'); }
      catch (error) { console.log(error.reason, error.message); }`;
    const { stdout } = spawnSync(
      'setpriv',
      [`--bounding-set=${capabilities}`, process.execPath, '--input-type=module', '-e', script],
      { encoding: 'utf8' },
    );
    if (missing === null) expect(stdout).toBe('loaded\n');
    else expect(stdout).toMatch(new RegExp(`^capability .*it needs ${missing}\\. docker: `));
  });

  it('wants a control group of version 2 to be attached to', () => {
    const program = loadProgram(object, 'count', ['BPF', 'NET_ADMIN']);
    expect(() => program.attach('/proc')).toThrow(/version 2: mount -t cgroup2/);
    expect(() => program.attach('/nowhere')).toThrow('no control group /nowhere');
    program.close();
  });

  it('wants to be there, and whole', () => {
    expect(() => loadProgram(join(folder, 'none.bpf.o'), 'count', [])).toThrow(/make build/);
    expect(() => loadProgram(object, 'other', ['BPF', 'NET_ADMIN'])).toThrow(/holds no program other/);
    const program = loadProgram(object, 'count', ['BPF', 'NET_ADMIN']);
    expect(() => program.map('none')).toThrow(/holds no map none/);
    const map = program.map('connects');
    // The kernel would write eight bytes to where there are four.
    expect(() => map.set(Buffer.alloc(4), Buffer.alloc(4))).toThrow(RangeError);
    program.close();
    expect(() => loadProgram(join(import.meta.dirname, 'bpf.test.ts'), 'count', ['BPF'])).toThrow(BpfError);
  });
});

describe('the object of make build', () => {
  const bytes = readFileSync(objectPath('mptcpify.bpf.o'));

  it('is BPF, little-endian, small, and the same for whoever builds it', () => {
    // elf.h: ELFCLASS64, ELFDATA2LSB; e_machine EM_BPF
    expect([...bytes.subarray(4, 6), bytes.readUInt16LE(18)]).toEqual([2, 1, 247]);
    expect(bytes.length).toBeLessThan(32_000);
    const tree = execFileSync('git', ['rev-parse', '--show-toplevel'], { encoding: 'utf8' }).trim();
    expect(bytes.includes(tree)).toBe(false);
    const again = `dist/again-${process.pid}.o`;
    try {
      compile('appliance/bpf/mptcpify.bpf.c', again);
      expect(readFileSync(join(tree, again)).equals(bytes)).toBe(true);
    } finally {
      rmSync(join(tree, again), { force: true });
    }
  });
});

it('says what is missing where there is no clang', () => {
  const script = `import { compileBpf } from ${JSON.stringify(join(import.meta.dirname, '../../images/bpf.ts'))}; compileBpf();`;
  const { status, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', script], {
    encoding: 'utf8',
    env: { PATH: '/nowhere' },
  });
  expect(status).not.toBe(0);
  expect(stderr).toMatch(/no clang, .*apt-get install clang libbpf-dev/);
});
