import { execFileSync } from 'node:child_process';
import { readFileSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { openLinks } from '../../appliance/kernel/links.ts';
import { type Namespace, openNamespace } from '../../appliance/kernel/namespaces.ts';
import { openWireguard } from '../../appliance/kernel/wireguard.ts';
import { parseAddress } from '../../appliance/protocol/address.ts';
import { type Host, Lab, requireRoot } from '../lab/netns.ts';
import { tunnelCases } from '../lab/tunnel-cases.ts';

const VECTORS = new URL('../vectors/', import.meta.url);

describe.runIf(requireRoot('tests of tunnels in the kernel'))('interfaces, rules and WireGuard, the real ones', () => {
  let lab: Lab;
  let host: Host;
  let namespace: Namespace;
  beforeAll(async () => {
    lab = await Lab.create('tunnel.kernel');
    host = await lab.host('one');
    namespace = await openNamespace(host.path);
  });
  afterAll(async () => {
    namespace.close();
    await lab[Symbol.asyncDispose]();
  });
  const open = async () => {
    const links = openLinks(namespace);
    return { links, wireguard: openWireguard(links, namespace) };
  };

  tunnelCases('dtv-case', open);

  it('leaves no process and no socket behind, nor a secret in a process that stays', async () => {
    const { links, wireguard } = await open();
    const carrier = await wireguard.create('dtv-gone');
    if (carrier === 'wireguard-go') {
      const pid = execFileSync('pgrep', ['-f', 'wireguard-go dtv-gone'], { encoding: 'utf8' }).trim();
      expect(readFileSync(`/proc/${pid}/environ`, 'utf8')).not.toContain('HOME=');
    }
    await wireguard.remove('dtv-gone');
    expect(await host.exec(['sh', '-c', 'ls /var/run/wireguard 2>/dev/null || true'])).not.toContain('dtv-gone');
    wireguard.close();
    links.close();
  });

  it('a quiet address is no source for what has another', async () => {
    const { links, wireguard } = await open();
    const other = await lab.host('two');
    await lab.link(host, other, { v4: '10.97.0.0/30', v6: 'fd97::/64' });
    await host.route('default via 10.97.0.2');
    await host.route('default via fd97::2');
    await wireguard.create('dtv-quiet');
    const index = (await links.links()).find(({ name }) => name === 'dtv-quiet')?.index ?? 0;
    await links.raise(index, 1280);
    for (const [text, length] of [
      ['10.215.7.1', 32],
      ['fd0d:e70::7:1', 128],
    ] as const) {
      const address = parseAddress(text);
      if (address) await links.assign(index, address, length, true);
    }
    for (const [to, source] of [
      ['192.0.2.1', '10.97.0.1'],
      ['2001:db8::1', 'fd97::1'],
      ['fd0d:e70::9', 'fd97::1'],
    ] as const)
      expect(await host.exec(['ip', 'route', 'get', to])).toContain(`src ${source}`);
    expect(await host.exec(['ip', '-6', 'addr', 'show', 'dev', 'dtv-quiet', 'scope', 'link'])).toBe('');
    await wireguard.remove('dtv-quiet');
    wireguard.close();
    links.close();
  });

  it('says what is missing where nothing can carry a tunnel', async () => {
    // A mount namespace in which there is no TUN device; this kernel may still have WireGuard.
    const script = `
      import { openLinks } from './appliance/kernel/links.ts';
      import { openWireguard } from './appliance/kernel/wireguard.ts';
      const links = openLinks();
      await openWireguard(links).create('dtv-none').then(
        (carrier) => console.log(carrier), (error) => console.log(error.kind, error.message));
      process.exit();`;
    const command = `mount -t tmpfs none /dev/net && exec "$0" --input-type=module -e "$1"`;
    const said = await host.exec(['unshare', '-m', 'sh', '-c', command, process.execPath, script]);
    expect(said).toMatch(
      /^kernel$|^missing this kernel has no WireGuard, and wireguard-go cannot run: .*--device \/dev\/net\/tun/m,
    );
  });
});

describe.runIf(requireRoot('a comparison with Python'))('the vectors of the control protocol', () => {
  it.each(['tunnel-v2', 'announce-v2'])(
    '%s are those that a program made that shares nothing with this one',
    (name) => {
      const made = execFileSync('python3', [new URL(`${name}.py`, VECTORS).pathname], { encoding: 'utf8' });
      expect(JSON.parse(made)).toEqual(JSON.parse(readFileSync(new URL(`${name}.json`, VECTORS), 'utf8')));
    },
  );
});
