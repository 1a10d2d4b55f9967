import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { Lab, requireRoot } from '../lab/netns.ts';
import { CASES } from '../lab/path-manager.ts';
import { startServer } from '../lab/traffic.ts';

const PROGRAM = fileURLToPath(new URL('../lab/path-manager.ts', import.meta.url));

describe.runIf(requireRoot('tests of the path manager'))('the kernel’s path manager', () => {
  it.each([
    ['IPv4', '10.91.0.2', '10.91.9.9', '32'],
    ['IPv6', 'fd91::2', 'fd91:9::9', '128'],
  ])('behaves as the fake one does: %s', async (_, server, second, length) => {
    await using lab = await Lab.create('client.kernel');
    const [left, right] = [await lab.host('left'), await lab.host('right')];
    const link = await lab.link(left, right, { v4: '10.91.0.0/30', v6: 'fd91::/64' });
    const end = link.at(left);
    const nodad = length === '128' ? ['nodad'] : [];
    await left.exec(['ip', 'addr', 'add', `${second}/${length}`, 'dev', end.dev, ...nodad]);
    await right.route(`${second} via ${length === '32' ? end.v4 : end.v6}`);
    await left.sysctl('net.mptcp.path_manager', 'userspace');
    await startServer(right);
    const said = await left.exec([process.execPath, PROGRAM, server, '5000', second], { timeoutMs: 60_000 });
    const results = said
      .split('\n')
      .filter((line) => line.startsWith('{'))
      .map((line) => JSON.parse(line));
    expect(results, said).toEqual(Object.keys(CASES).map((name) => ({ name, failure: null })));
  });
});
