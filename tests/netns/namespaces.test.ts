import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { readFile, readlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { udpDatagrams } from '../../appliance/kernel/datagrams.ts';
import { nftMemory } from '../../appliance/kernel/memory.ts';
import { type Namespace, NamespaceError, openNamespace, ownNamespace } from '../../appliance/kernel/namespaces.ts';
import { openNetwork } from '../../appliance/kernel/network.ts';
import { systemNft } from '../../appliance/kernel/nft.ts';
import { procSysctl } from '../../appliance/kernel/sysctl.ts';
import { formatAddress, parseEndpoint } from '../../appliance/protocol/address.ts';
import { type Host, Lab, requireRoot } from '../lab/netns.ts';

const KOFFI = new URL('../../node_modules/koffi/index.js', import.meta.url).href;

describe.runIf(requireRoot('tests of entering network namespaces'))('another network namespace', () => {
  const scope = new AsyncDisposableStack();
  let lab: Lab;
  let there: Host;
  let peer: Host;
  let namespace: Namespace;

  beforeAll(async () => {
    lab = scope.use(await Lab.create('namespaces'));
    [there, peer] = [await lab.host('there'), await lab.host('peer')];
    await lab.link(there, peer, { v4: '10.77.9.0/30' });
    namespace = await openNamespace(there.path);
    scope.defer(() => namespace.close());
  });
  afterAll(() => scope.disposeAsync());

  it('has the same id for everybody in it, and another than ours', async () => {
    const again = await openNamespace(there.path);
    expect(again.id).toBe(namespace.id);
    again.close();
    expect(namespace.id).not.toBe(ownNamespace.id);
    const own = await openNamespace('/proc/self/ns/net');
    expect(own.id).toBe(ownNamespace.id);
    own.close();
  });

  it('is left again, also when what is done there fails', async () => {
    const here = await readlink('/proc/thread-self/ns/net');
    expect(() =>
      namespace.within(() => {
        throw new Error('from there');
      }),
    ).toThrow('from there');
    expect(await readlink('/proc/thread-self/ns/net')).toBe(here);
    expect(readFileSync('/proc/thread-self/net/dev', 'latin1')).not.toContain('to-peer');
  });

  it('is where parameters are read and written, whatever happens in ours', async () => {
    const parameter = 'net.ipv4.ip_default_ttl';
    const [inside, ours] = [procSysctl('/proc/sys', namespace), procSysctl('/proc/sys')];
    const before = await ours.read(parameter);
    await inside.write(parameter, '77');
    expect(await inside.read(parameter)).toBe('77');
    expect((await there.sysctl(parameter)).trim()).toBe('77');
    expect(await ours.read(parameter)).toBe(before);
  });

  describe('has its own parameters behind a bind mount of all of net, and not of a folder that each namespace has for itself', () => {
    /** What a program prints that has `net` and `net/mptcp` mounted in `folder`, as engines do it for containers. */
    const run = (folder: string, program: string, ...enter: string[]): string[] => {
      const imports = ['namespaces', 'sysctl']
        .map((name) => new URL(`../../appliance/kernel/${name}.ts`, import.meta.url).href)
        .map((url) => `import * as ${/(\w+)\.ts$/.exec(url)?.[1]} from '${url}';`)
        .join('\n');
      const mounts = `mkdir -p ${folder}/net/net ${folder}/mptcp/net/mptcp &&
        mount --bind /proc/sys/net ${folder}/net/net &&
        mount --bind /proc/sys/net/mptcp ${folder}/mptcp/net/mptcp &&
        exec "$@"`;
      const node = [process.execPath, '--input-type=module', '--eval', `${imports}\n${program}`];
      const said = execFileSync('unshare', ['--mount', 'sh', '-c', mounts, 'sh', ...enter, ...node], {
        encoding: 'utf8',
      });
      return said.trim().split('\n');
    };
    /** Selects the userspace path manager below `root`, and prints what came of it and what is true. */
    const attempt = `
      const attempt = async (root, namespace) => {
        const parameters = sysctl.procSysctl(root, namespace);
        const done = await parameters
          .read('net.mptcp.pm_type')
          .then(() => parameters.write('net.mptcp.pm_type', '1'))
          .then(() => parameters.read('net.mptcp.pm_type'), (error) => error.message);
        const truth = sysctl.procSysctl('/proc/sys', namespace);
        console.log(done, '|', await truth.read('net.mptcp.pm_type'));
        await truth.write('net.mptcp.pm_type', '0');
      };`;
    const refusal = (folder: string): string =>
      `${folder}/mptcp/net/mptcp shows another network namespace than the one that is meant: ` +
      `mount /proc/sys/net at ${folder}/mptcp/net, and not a folder of it`;
    let folder: string;
    let ours: string;

    beforeEach(async () => {
      folder = mkdtempSync(join(tmpdir(), 'detour-sysctl-'));
      ours = execFileSync('sysctl', ['-n', 'net.mptcp.pm_type'], { encoding: 'utf8' });
    });
    afterEach(() => {
      rmSync(folder, { recursive: true });
      // Whoever mounted it is the one who would have been changed.
      expect(execFileSync('sysctl', ['-n', 'net.mptcp.pm_type'], { encoding: 'utf8' })).toBe(ours);
    });

    it('when it is entered', () => {
      const program = `${attempt}
        const there = await namespaces.openNamespace('${there.path}');
        for (const root of ['net', 'mptcp']) await attempt('${folder}/' + root, there);
        await sysctl.procSysctl('/proc/sys', there).write('net.mptcp.pm_type', '1');
        await attempt('${folder}/mptcp', there);`;
      const refused = refusal(folder);
      // What it shows is not believed either: it would seem that there is something, or nothing, to do.
      expect(run(folder, program)).toEqual(['1 | 1', `${refused} | 0`, `${refused} | 1`]);
    });

    it('when it is our own', () => {
      const program = `${attempt}
        for (const root of ['net', 'mptcp']) await attempt('${folder}/' + root);`;
      expect(run(folder, program, 'nsenter', `--net=${there.path}`)).toEqual(['1 | 1', `${refusal(folder)} | 0`]);
    });
  });

  it('is where programs run that are started there', async () => {
    const program = () => execFileSync('ip', ['-brief', 'link'], { encoding: 'utf8' });
    expect(namespace.within(program)).toContain('to-peer');
    expect(program()).not.toContain('to-peer');
    const memory = nftMemory(systemNft({ namespace }), 'namespaces_test');
    await memory.remember(new Map([['word', 'kept there']]));
    expect(await memory.recall()).toEqual(new Map([['word', 'kept there']]));
    expect(await there.exec(['nft', 'list', 'tables'])).toContain('table inet namespaces_test');
    expect(execFileSync('nft', ['list', 'tables'], { encoding: 'utf8' })).not.toContain('namespaces_test');
    // The first writer wins.
    await memory.remember(new Map([['word', 'something else']]));
    expect(await memory.recall()).toEqual(new Map([['word', 'kept there']]));
    await memory.forget();
    expect(await memory.recall()).toBeNull();
  });

  it('is where sockets stay that were made there', async () => {
    const network = openNetwork(namespace, () => undefined);
    expect((await network.addresses()).map((one) => [one.interface, formatAddress(one.address)])).toEqual([
      ['to-peer', '10.77.9.1'],
    ]);
    network.close();
    const heard = Promise.withResolvers<string>();
    const to = parseEndpoint('10.77.9.2:7777');
    if (!to) throw new Error('no endpoint');
    const program = `
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(('10.77.9.2', 7777))
print('bound', flush=True)
data, sender = s.recvfrom(100)
s.sendto(sender[0].encode(), sender)
`;
    await peer.spawn(['python3', '-c', program]).waitFor('bound');
    const client = await udpDatagrams(namespace).connect(
      to,
      (bytes) => heard.resolve(Buffer.from(bytes).toString()),
      () => undefined,
    );
    client.send(Buffer.from('hello'));
    expect(await heard.promise).toBe('10.77.9.1');
    client.close();
  });

  it('is not where asynchronous file functions look: they run on threads that stayed behind', async () => {
    const inside = await namespace.within(() => readFile('/proc/thread-self/net/dev', 'latin1'));
    expect(inside).not.toContain('to-peer');
    expect(namespace.within(() => readFileSync('/proc/thread-self/net/dev', 'latin1'))).toContain('to-peer');
  });

  it('would keep the threads that are born while somebody is there: hence they exist before', () => {
    // As openNamespace would be without its first line: nothing has used libuv's pool, which makes its threads at its first use.
    const program = (before: string) => `
      import { openSync } from 'node:fs';
      import { readFile, stat } from 'node:fs/promises';
      import koffi from '${KOFFI}';
      const setns = koffi.load(null).func('int setns(int fd, int type)');
      const [here, there] = [openSync('/proc/thread-self/ns/net', 'r'), openSync('${there.path}', 'r')];
      ${before}
      setns(there, 0x40000000);
      const first = stat('/');
      setns(here, 0x40000000);
      await first;
      console.log((await readFile('/proc/thread-self/net/dev', 'latin1')).includes('to-peer'));`;
    const run = (before: string) =>
      execFileSync(process.execPath, ['--input-type=module', '--eval', program(before)], { encoding: 'utf8' }).trim();
    expect(run('')).toBe('true');
    expect(run("await stat('/');")).toBe('false');
  });

  it('lives for as long as it is held open, and no longer', async () => {
    const gone = await lab.host('gone');
    await lab.link(gone, peer, { v4: '10.77.8.0/30' });
    const held = await openNamespace(gone.path);
    const network = openNetwork(held, () => undefined);
    const links = () => peer.exec(['ip', '-brief', 'link']);
    // Its owner can take it away while we hold it, and it can still be used.
    execFileSync('umount', [gone.path]);
    rmSync(gone.path);
    expect(await links()).toContain('to-gone');
    expect(await procSysctl('/proc/sys', held).read('net.ipv4.ip_forward')).toBe('0');
    held.close();
    // A socket holds it as well as a file does.
    expect(await links()).toContain('to-gone');
    network.close();
    // The kernel takes namespaces apart in the background.
    await expect.poll(links, { timeout: 10_000 }).not.toContain('to-gone');
  });

  it('that is none says so', async () => {
    const refusal = (path: string) =>
      openNamespace(path).then(
        () => 'opened',
        (error: unknown) => (error instanceof NamespaceError ? error.message : error),
      );
    expect(await refusal('/run/netns/nobody')).toBe('opening /run/netns/nobody: ENOENT');
    expect(await refusal('/etc/hostname')).toBe('entering /etc/hostname: EINVAL');
    expect(await refusal('/proc/self/ns/mnt')).toBe('entering /proc/self/ns/mnt: EINVAL');
    const files = () => execFileSync('ls', [`/proc/${process.pid}/fd`], { encoding: 'utf8' }).split('\n').length;
    const before = files();
    for (let tries = 0; tries < 200; tries++) await refusal('/etc/hostname');
    expect(files()).toBeLessThan(before + 100);
  });
});
