import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { requireRoot, waitUntil } from '../lab/netns.ts';
import { World } from '../netns/world.ts';
import { asFound, ContainedDaemon, DOCUMENTED, IMAGE, Machine, type Role } from './machines.ts';

/** linux/capability.h: CAP_NET_ADMIN is 12. */
const NET_ADMIN_ALONE = (1n << 12n).toString(16).padStart(16, '0');
const NO_CAPABILITY = '0'.repeat(16);
/** seccomp(2), SECCOMP_MODE_FILTER: Docker's default profile is in force. */
const SECCOMP_FILTER = '2';

/** A wrong value for each of several variables, and what the line about it must name. */
const WRONG: Readonly<Record<Role, Readonly<Record<string, string>>>> = {
  router: { DETOUR_LISTEN: 'nowhere', DETOUR_PORTS: '99999', DETOUR_LOG_LEVEL: 'loud', DETOUR_PROTS: '1-2' },
  client: { DETOUR_DETOURS: 'nowhere', DETOUR_MAX_PATHS: 'many', DETOUR_LOG_LEVEL: 'loud', DETOUR_MAX_PATH: '2' },
};

describe.runIf(requireRoot('tests of containers on a host network'))('the flags of the documentation', () => {
  const scope = new AsyncDisposableStack();
  let world: World;
  let machine: Machine;
  let before: string;

  beforeAll(async () => {
    world = scope.use(await World.create('hardening'));
    const [detour] = world.detours;
    if (!detour) throw new Error('no detour');
    machine = scope.use(await Machine.bring(detour.host, Object.values(IMAGE)));
    await machine.host.sysctl('net.ipv6.conf.all.forwarding', 1);
    before = await asFound(machine.host);
  });
  afterAll(() => scope.disposeAsync());

  const settings = (role: Role): Readonly<Record<string, string>> =>
    role === 'router'
      ? { DETOUR_KEYS: world.key, DETOUR_ON_EXIT: 'cleanup' }
      : { DETOUR_KEY: world.key, DETOUR_DETOURS: 'self=10.82.1.2:45672', DETOUR_SYSCTL_ROOT: '/host/proc/sys' };

  /** An agent is ready when a detour of its answers, so it gets one. */
  const peerOf = async (role: Role): Promise<AsyncDisposable> => {
    if (role === 'router') return { [Symbol.asyncDispose]: async () => undefined };
    const peer = await ContainedDaemon.start(machine, 'router', settings('router'));
    return {
      async [Symbol.asyncDispose]() {
        // In order, so that it takes its rules with it.
        await peer.stop();
        await peer[Symbol.asyncDispose]();
      },
    };
  };

  describe.each(['router', 'client'] as const)('of the %s', (role) => {
    it('let it become healthy and ready, and its doctor finds nothing wrong', async () => {
      await using _peer = await peerOf(role);
      await using container = await machine.launch({
        Image: IMAGE[role],
        Env: Object.entries(settings(role)).map(([name, value]) => `${name}=${value}`),
        HostConfig: DOCUMENTED[role],
        // The image's own test, asked more often than its 30 s.
        Healthcheck: { Interval: 1e9 },
      });
      const daemon = new ContainedDaemon(machine, role, container);
      await daemon.ready();
      const health = await waitUntil(
        async () => {
          const { Health } = (await container.docker.inspect()).State;
          return Health?.Status !== 'starting' && Health;
        },
        { deadlineMs: 30_000, what: 'a first health check', everyMs: 100 },
      );
      expect(health).toMatchObject({ Status: 'healthy', FailingStreak: 0 });

      const status = await daemon.cli('status', '--json');
      expect(status, status.stderr).toMatchObject({ code: 0 });
      expect(JSON.parse(status.stdout)).toMatchObject({
        ready: true,
        version: expect.stringMatching(/^\d+\.\d+\.\d+/),
      });
      expect((await daemon.get('/healthz')).code).toBe(200);
      expect((await daemon.get('/readyz')).code).toBe(200);
      const doctor = await daemon.cli('doctor', '--json');
      const { ok, checks } = JSON.parse(doctor.stdout);
      expect(checks.filter(({ state }: { state: string }) => state !== 'ok')).toEqual([]);
      expect(ok).toBe(true);
      expect(doctor.code).toBe(0);
      expect(await daemon.stop(), await container.logs()).toBe(0);
    });

    it('leave it one capability and no way to more', async () => {
      await using _peer = await peerOf(role);
      await using daemon = await ContainedDaemon.start(machine, role, settings(role));
      const { stdout } = await daemon.container.exec('cat', '/proc/1/status');
      const field = (name: string) => new RegExp(`^${name}:\\s*(\\S+)$`, 'm').exec(stdout)?.[1];
      expect(field('CapEff')).toBe(NET_ADMIN_ALONE);
      expect(field('CapPrm')).toBe(NET_ADMIN_ALONE);
      expect(field('CapBnd')).toBe(NET_ADMIN_ALONE);
      expect(field('CapAmb')).toBe(NO_CAPABILITY);
      expect(field('NoNewPrivs')).toBe('1');
      expect(field('Seccomp')).toBe(SECCOMP_FILTER);
      expect(await daemon.stop()).toBe(0);
    });

    it('leave it nothing to write to but /run', async () => {
      await using _peer = await peerOf(role);
      await using daemon = await ContainedDaemon.start(machine, role, settings(role));
      for (const folder of ['', '/etc', '/tmp', '/root', '/usr/local/bin', '/usr/share/detour', '/var/tmp']) {
        const touch = await daemon.container.exec('touch', `${folder}/written`);
        expect(touch.stderr, folder).toContain('Read-only file system');
      }
      expect(await daemon.container.exec('touch', '/run/written')).toMatchObject({ code: 0 });
      const { stdout: mounts } = await daemon.container.exec('cat', '/proc/self/mounts');
      const writable = mounts
        .split('\n')
        .map((line) => line.split(' '))
        .filter(([, , , options]) => options?.split(',').includes('rw'))
        .map(([, path = '']) => path);
      const own = role === 'client' ? ['/host/proc/sys/net/mptcp', '/run'] : ['/run'];
      // The kernel's own file systems are there for every container alike.
      expect(writable.filter((path) => !/^\/(proc|dev|sys)(\/|$)/.test(path)).sort()).toEqual(own);
      expect(await daemon.stop()).toBe(0);
    });

    it('are missed by name: without NET_ADMIN it exits 69 with the line that mends it, and changes nothing', async () => {
      const attempt = () =>
        machine.engine.run({ image: IMAGE[role], env: settings(role), host: { ...DOCUMENTED[role], CapAdd: [] } });
      const outcomes = [await attempt()];
      expect(await asFound(machine.host)).toBe(before);
      // Where the path manager is selected already, the kernel refuses an agent at another place.
      const found = await machine.host.sysctl('net.mptcp.pm_type');
      await machine.host.sysctl('net.mptcp.pm_type', 1);
      outcomes.push(await attempt());
      await machine.host.sysctl('net.mptcp.pm_type', found);
      expect(await asFound(machine.host)).toBe(before);
      for (const { code, stdout, stderr } of outcomes) {
        expect(stdout + stderr).toMatch(/docker( run)?: --cap-add NET_ADMIN/);
        expect(stderr).not.toMatch(/^ +at /m);
        expect(code).toBe(69);
      }
    });

    it('do not hide a wrong configuration: exit 78, every mistake at once, no secret', async () => {
      const secret = world.key.split(':')[1] ?? '';
      const { code, stdout, stderr } = await machine.engine.run({
        image: IMAGE[role],
        // One digit short of a key id: wrong, and still nobody's business.
        env: {
          ...settings(role),
          ...WRONG[role],
          [role === 'router' ? 'DETOUR_KEYS' : 'DETOUR_KEY']: `0a0b0c0:${secret}`,
        },
        host: DOCUMENTED[role],
      });
      const said = stdout + stderr;
      const named = Object.keys(WRONG[role]).concat(role === 'router' ? 'DETOUR_KEYS' : 'DETOUR_KEY');
      for (const name of named) expect(said).toMatch(new RegExp(`^${name}(=\\S*)?: `, 'm'));
      expect(said).not.toContain(secret);
      expect(code).toBe(78);
      expect(await asFound(machine.host)).toBe(before);
    });
  });

  it('left the host as found', async () => {
    expect(await asFound(machine.host)).toBe(before);
  });
});
