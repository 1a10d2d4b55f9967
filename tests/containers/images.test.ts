import { randomBytes } from 'node:crypto';
import { createGzip } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Container, type Engine, engine, LEAST_PRIVILEGE } from './engine.ts';

/** Design, section 8: what a small VPS has to fetch. */
const LARGEST_COMPRESSED_BYTES = 80_000_000;
/** Docker waits 10 s before SIGKILL; the program promises 8 (conventions, section 10). */
const STOP_MS = 8000;

/** A key nobody uses, in the form of `DETOUR_KEY`. */
const KEY = `0badcafe:${randomBytes(32).toString('base64url')}`;
const ENVIRONMENT = {
  router: { DETOUR_KEYS: KEY },
  client: { DETOUR_KEY: KEY, DETOUR_DETOURS: 'nowhere=192.0.2.1:45672', DETOUR_SYSCTL_ROOT: '/host/proc/sys' },
} as const;
const SIDES = ['router', 'client'] as const;
type Side = (typeof SIDES)[number];

/** The flags of the README: each side in a network namespace of its own, as on a bridge. */
function hostConfig(side: Side) {
  return side === 'router'
    ? { ...LEAST_PRIVILEGE, Sysctls: { 'net.ipv4.ip_forward': '1' } }
    : { ...LEAST_PRIVILEGE, Binds: ['/proc/sys/net:/host/proc/sys/net'] };
}

/** Waits for a daemon, and returns what it says of itself. */
async function becomesHealthy(container: Container): Promise<string> {
  let health = await container.exec('detour', 'healthcheck');
  for (let tries = 0; health.code !== 0 && tries < 50; tries += 1)
    health = await container.exec('detour', 'healthcheck');
  expect(health, await container.logs()).toMatchObject({ code: 0 });
  const status = await container.exec('detour', 'status', '--json');
  expect(status, await container.logs()).toMatchObject({ code: 0 });
  return status.stdout;
}

describe.each(SIDES)('detour-%s:dev', (side) => {
  const image = `detour-${side}:dev`;
  let docker: Engine;

  beforeAll(async () => {
    docker = await engine();
  });
  afterAll(async () => {
    expect(await docker.leftovers()).toEqual([]);
  });

  it('prints its version with the least privileges', async () => {
    const { code, stdout, stderr } = await docker.run({ image, command: ['version'], host: hostConfig(side) });
    expect(stderr).toBe('');
    expect(stdout).toMatch(/^detour \d+\.\d+\.\d+ /);
    expect(code).toBe(0);
  });

  it('is named, dated and traceable', async () => {
    const { Config } = await docker.docker.getImage(image).inspect();
    const labels = new Map(Object.entries(Config.Labels ?? {}));
    const label = (name: string) => labels.get(`org.opencontainers.image.${name}`);
    expect(label('title')).toBe(`detour-${side}`);
    expect(label('licenses')).toBe('Apache-2.0');
    expect(label('version')).toMatch(/^\d+\.\d+\.\d+/);
    expect(label('revision')).toMatch(/^([0-9a-f]{40}|unknown)$/);
    expect(Date.parse(label('created') ?? '')).not.toBeNaN();
    expect(label('description')).not.toBe('');
    expect(label('base.name')).toMatch(/trixie/);
  });

  it('checks its own health, calmly', async () => {
    const { Config } = await docker.docker.getImage(image).inspect();
    expect(Config.Healthcheck).toEqual({
      Test: ['CMD', 'detour', 'healthcheck'],
      Interval: 30e9,
      Timeout: 5e9,
      StartPeriod: 10e9,
      Retries: 3,
    });
  });

  it('has the nft, iptables, conntrack and wireguard-go that it was written against', async () => {
    const nft = await docker.run({ image, entrypoint: ['nft', '--version'] });
    expect(nft.stdout).toMatch(/^nftables v1\.(1\.[3-9]|[2-9]|\d\d)/);
    for (const program of ['iptables-nft', 'iptables-legacy', 'conntrack', 'wireguard-go']) {
      expect((await docker.run({ image, entrypoint: [program, '--version'] })).code).toBe(0);
    }
  });

  it('refuses a misspelt variable at once, with exit 78', async () => {
    const { code, stdout, stderr } = await docker.run({
      image,
      env: { ...ENVIRONMENT[side], DETOUR_LISTN: '[::]:1' },
      host: hostConfig(side),
    });
    expect(code).toBe(78);
    expect(stdout + stderr).toContain('DETOUR_LISTN');
  });

  it('runs node as PID 1, becomes healthy, and ends at SIGTERM with exit 0', async () => {
    await using container = await docker.start({ image, env: ENVIRONMENT[side], host: hostConfig(side) });
    const command = await container.exec('cat', '/proc/1/cmdline');
    expect(command.stdout.split('\0').slice(0, 3)).toEqual(['node', '/usr/local/bin/detour', side]);

    expect(JSON.parse(await becomesHealthy(container))).toMatchObject({ version: expect.stringMatching(/^\d/) });

    const { code, ms } = await container.stop(10);
    expect(code, await container.logs()).toBe(0);
    expect(ms).toBeLessThan(STOP_MS);
  });

  it('holds no capability but NET_ADMIN, and nothing it can write to but /run', async () => {
    await using container = await docker.start({ image, env: ENVIRONMENT[side], host: hostConfig(side) });
    const status = await container.exec('cat', '/proc/1/status');
    // linux/capability.h: CAP_NET_ADMIN is 12.
    expect(/^CapEff:\s*([0-9a-f]+)$/m.exec(status.stdout)?.[1]).toBe((1n << 12n).toString(16).padStart(16, '0'));
    expect(/^NoNewPrivs:\s*(\d)$/m.exec(status.stdout)?.[1]).toBe('1');
    expect((await container.exec('touch', '/etc/x')).stderr).toContain('Read-only file system');
  });

  it('stays within its size', async () => {
    let bytes = 0;
    const compressed = (await docker.save(image)).pipe(createGzip());
    for await (const chunk of compressed) bytes += chunk.length;
    console.log(`${image}: ${(bytes / 1e6).toFixed(1)} MB compressed`);
    expect(bytes).toBeLessThanOrEqual(LARGEST_COMPRESSED_BYTES);
  });
});

describe('detour-client:dev', () => {
  it('has all that plain TCP sockets take, but what it may do, which it names', async () => {
    const env = { ...ENVIRONMENT.client, DETOUR_MPTCPIFY: 'all' };
    const docker = await engine();
    await using container = await docker.start({ image: 'detour-client:dev', env, host: hostConfig('client') });
    const status = await becomesHealthy(container);
    // Neither the library nor the program is missing: those would be named first.
    expect(JSON.parse(status).mptcpify).toMatchObject({
      state: 'unavailable',
      why: expect.stringMatching(/needs CAP_BPF and CAP_PERFMON.*--cap-add BPF --cap-add PERFMON/),
    });
  });

  it('does the privileged part as a step of its own, with the flags of docs/mptcpify.md', async () => {
    const docker = await engine();
    const step = (command: string, ...CapAdd: readonly string[]) => ({
      image: 'detour-client:dev',
      command: [command],
      env: { DETOUR_SYSCTL_ROOT: '/host/proc/sys', DETOUR_MPTCPIFY: 'all' },
      host: {
        ...hostConfig('client'),
        CapAdd: ['NET_ADMIN', ...CapAdd],
        Binds: ['/proc/sys/net:/host/proc/sys/net', '/sys/fs/bpf:/sys/fs/bpf'],
      },
    });
    const { code, stdout, stderr } = await docker.run(step('load', 'BPF', 'PERFMON')).catch((error: unknown) => {
      // The engine of Debian 12.
      if (/unknown capability/.test(String(error))) return docker.run(step('load', 'SYS_ADMIN'));
      throw error;
    });
    // Some kernels refuse it: then that is said, and the rest is done.
    if (/refuses/.test(stderr)) expect(stderr).toMatch(/mptcpize run.*GODEBUG=multipathtcp=1/);
    else expect(stdout).toContain('plain TCP sockets of this network become Multipath TCP');
    expect(stdout).toContain('the userspace path manager is selected');
    expect(code).toBe(0);
    expect(await docker.run(step('unload'))).toMatchObject({ code: 0 });
  });
});
