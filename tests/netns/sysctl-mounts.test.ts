import { mkdirSync, mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Host, Lab, requireRoot } from '../lab/netns.ts';
import { makeKey } from './world.ts';

const CLI = fileURLToPath(new URL('../../appliance/cli.ts', import.meta.url));

/** What containers are given of /proc/sys, which is read-only in them, and whose net.mptcp that is. */
describe.runIf(requireRoot('tests of mounts'))('a mount of', () => {
  const scope = new AsyncDisposableStack();
  const folder = mkdtempSync(join(tmpdir(), 'detour-sysctl-'));
  let here: Host;
  let there: Host;

  beforeAll(async () => {
    scope.defer(() => rmSync(folder, { recursive: true }));
    const lab = scope.use(await Lab.create('mounts'));
    here = await lab.host('here');
    there = await lab.host('there');
    for (const name of ['wide/net', 'narrow/net/mptcp']) mkdirSync(join(folder, name), { recursive: true });
  });
  afterAll(() => scope.disposeAsync());

  /** A command that runs here, with mounts that nobody else sees. */
  const mounted = (script: string): string[] => [
    'unshare',
    '--mount',
    'sh',
    '-ec',
    `mount --bind /proc/sys/net ${folder}/wide/net; mount --bind /proc/sys/net/mptcp ${folder}/narrow/net/mptcp; ${script}`,
  ];

  it('/proc/sys/net is that of whoever looks, and of its folder mptcp that of whoever mounted it', async () => {
    const write = `echo 1 >${folder}/wide/net/mptcp/pm_type; cat ${folder}/wide/net/mptcp/pm_type ${folder}/narrow/net/mptcp/pm_type`;
    expect(await here.exec(mounted(`nsenter --net=${there.path} sh -ec '${write}'`))).toBe('1\n0\n');
    expect([await here.sysctl('net.mptcp.pm_type'), await there.sysctl('net.mptcp.pm_type')]).toEqual(['0', '1']);
  });

  it('that folder alone is refused by an agent that is to serve others', async () => {
    const env = {
      DETOUR_KEY: makeKey('0a0b0c0d'),
      DETOUR_DETOURS: 'vps=192.0.2.1:45672',
      DETOUR_PROVIDERS: 'docker',
      DETOUR_SYSCTL_ROOT: `${folder}/narrow`,
      DETOUR_HTTP: 'off',
      DETOUR_SOCKET: `${folder}/client.sock`,
    };
    const refused = await here.try(mounted(`exec ${process.execPath} ${CLI} client`), { env });
    expect(refused).toMatchObject({
      code: 78,
      stderr: expect.stringContaining(`-v /proc/sys/net:${folder}/narrow/net`),
    });
    expect(await here.sysctl('net.mptcp.pm_type')).toBe('0');
  });
});
