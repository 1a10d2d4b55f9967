import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { readFile, readlink } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
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

  it('has its own parameters behind a bind mount of all of net, and not of a folder in which each namespace has its own', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'detour-sysctl-'));
    scope.defer(() => rmSync(folder, { recursive: true, force: true }));
    const sysctl = new URL('../../appliance/kernel/sysctl.ts', import.meta.url).href;
    const namespaces = new URL('../../appliance/kernel/namespaces.ts', import.meta.url).href;
    const program = `
      import { openNamespace } from '${namespaces}';
      import { procSysctl } from '${sysctl}';
      const namespace = await openNamespace('${there.path}');
      for (const root of ['net', 'mptcp']) {
        const parameters = procSysctl('${folder}/' + root, namespace);
        const done = await parameters
          .read('net.mptcp.pm_type')
          .then(() => parameters.write('net.mptcp.pm_type', '1'))
          .then(() => parameters.read('net.mptcp.pm_type'), (error) => error.message);
        const truth = procSysctl('/proc/sys', namespace);
        console.log(done, await truth.read('net.mptcp.pm_type'), await procSysctl('/proc/sys').read('net.mptcp.pm_type'));
        await truth.write('net.mptcp.pm_type', '0');
      }`;
    // As engines mount it into containers; in a mount namespace of its own.
    const mounts = `mkdir -p ${folder}/net/net ${folder}/mptcp/net/mptcp &&
      mount --bind /proc/sys/net ${folder}/net/net &&
      mount --bind /proc/sys/net/mptcp ${folder}/mptcp/net/mptcp &&
      exec "$0" --input-type=module --eval "$1"`;
    const said = execFileSync('unshare', ['--mount', 'sh', '-c', mounts, process.execPath, program], {
      encoding: 'utf8',
    });
    const ours = await procSysctl('/proc/sys').read('net.mptcp.pm_type');
    expect(said.trim().split('\n')).toEqual([
      `1 1 ${ours}`,
      `${folder}/mptcp/net/mptcp is that of one network namespace, whoever looks: mount /proc/sys/net at ${folder}/mptcp/net, and not a folder of it 0 ${ours}`,
    ]);
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
    for (let tries = 0; tries < 20; tries++) await refusal('/etc/hostname');
    expect(files()).toBeLessThan(before + 5);
  });
});
