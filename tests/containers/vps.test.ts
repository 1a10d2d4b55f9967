import type Docker from 'dockerode';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Host, requireRoot, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { detoursAre, World } from '../netns/world.ts';
import type { Container } from './engine.ts';
import { asFound, ContainedDaemon, DOCUMENTED, IMAGE, Machine, ourRules } from './machines.ts';

const BYTES = 8_000_000;
const DIGEST = expectedSha256('detour', BYTES);
/** The router looks after the firewall every 30 s, give or take a fifth. */
const UPKEEP_MS = 36_000;
const LEASE_PORT = 25_000;
const OTHER_PORT = 8_080;

/** A web server of one word, in the image that the engine has already. */
const HELLO = `require('node:net').createServer((socket) => socket.end('hello')).listen(80, '0.0.0.0')`;

/** What docs/troubleshooting.md says: iptables-legacy needs a raw socket. */
const FLAGS = {
  nft: DOCUMENTED.router,
  legacy: { ...DOCUMENTED.router, CapAdd: ['NET_ADMIN', 'NET_RAW'] },
} satisfies Record<string, Docker.HostConfig>;

/** Flushes the chain that holds our rule; answers with what else was in it, as `iptables-save` prints it. */
async function flushOurChain(host: Host, program: string): Promise<{ program: string; others: readonly string[] }> {
  const [ours] = await ourRules(host, program);
  const chain = ours?.split(' ')[1] ?? 'no rule of ours';
  const all = (await host.exec([`${program}-save`, '-t', 'filter'])).split('\n');
  await host.exec([program, '-F', chain]);
  return { program, others: all.filter((line) => line.startsWith(`-A ${chain} `) && line !== ours) };
}

/**
 * A VPS as providers rent it out, with Docker on it and a firewall that drops what is forwarded, in both families. The router
 * runs there in a container; client and server are other machines.
 */
describe.runIf(requireRoot('tests on a VPS with a Docker engine')).each(['nft', 'legacy'] as const)(
  'a VPS with iptables-%s',
  (flavour) => {
    const scope = new AsyncDisposableStack();
    let world: World;
    let machine: Machine;
    let before: string;
    let forwardingBefore: string;

    beforeAll(async () => {
      world = scope.use(await World.create('vps', { rateMbit: 20 }));
      const [detour] = world.detours;
      if (!detour) throw new Error('no detour');
      const { host } = detour;
      await startServer(world.server);
      await startServer(world.server, { port: LEASE_PORT, transport: 'tcp' });
      // A way from client to server that merely passes through the VPS.
      await world.gateway.route('10.83.1.0/30 via 10.82.1.2');
      await host.sysctl('net.ipv4.ip_forward', 0);
      forwardingBefore = await host.sysctl('net.ipv4.ip_forward');
      machine = scope.use(await Machine.bring(host, [IMAGE.router], flavour));
      // What this engine does not do by itself for IPv6 (Docker before 27), and what ufw does.
      await host.sysctl('net.ipv6.conf.all.forwarding', 1);
      await host.exec([`ip6tables-${flavour}`, '-P', 'FORWARD', 'DROP']);
      {
        // Docker's bridge has its link-local address for good once a first container was on it.
        await using _first = await machine.publish(OTHER_PORT, ['node', '-e', HELLO]);
        await waitUntil(
          async () => (await host.exec(['ip', '-6', 'address', 'show', 'dev', 'docker0'])).includes('fe80'),
          {
            deadlineMs: 10_000,
            what: 'docker0 to be up',
          },
        );
      }
      before = await asFound(host);
    });
    afterAll(() => scope.disposeAsync());

    const startRouter = (
      env: Readonly<Record<string, string>> = {},
      flags: Docker.HostConfig = FLAGS[flavour],
    ): Promise<ContainedDaemon> =>
      ContainedDaemon.start(
        machine,
        'router',
        { DETOUR_KEYS: world.key, DETOUR_ALLOW: '10.81.0.0/30,fd81::/64', DETOUR_ON_EXIT: 'cleanup', ...env },
        flags,
      );

    /** Whether a plain TCP connection from a host comes about. */
    const connects = async (host: Host, address: string, port: number): Promise<boolean> => {
      const attempt = await host.try(['timeout', '1', 'bash', '-c', `exec 3<>/dev/tcp/${address}/${port}`]);
      return attempt.code === 0;
    };
    const droppedByPolicy = async (): Promise<number> => {
      const listing = await machine.host.exec([`iptables-${flavour}`, '-nvxL', 'FORWARD']);
      return Number(/policy DROP (\d+) packets/.exec(listing)?.[1] ?? Number.NaN);
    };

    it('drops what is forwarded, before a router runs', async () => {
      expect(forwardingBefore).toBe('0');
      expect(await machine.host.sysctl('net.ipv4.ip_forward')).toBe('1');
      const dropped = await droppedByPolicy();
      expect(await connects(world.client, '10.83.1.2', LEASE_PORT)).toBe(false);
      expect(await droppedByPolicy()).toBeGreaterThan(dropped);
    });

    it('relays both families with one rule in each, restores a flushed one, and is left as found', async () => {
      await using router = await startRouter();
      const programs = [`iptables-${flavour}`, `ip6tables-${flavour}`];
      const rules = () => Promise.all(programs.map((program) => ourRules(machine.host, program)));
      const rule = expect.stringMatching(/^-A (DOCKER-USER|FORWARD) -m connmark --mark 0xd7000000\/0xff000000 /);
      expect(await rules()).toEqual([[rule], [rule]]);
      expect((await rules())[0]?.[0]).toContain('-A DOCKER-USER ');

      // The host's own tools, maybe older than the image's, can still read everything.
      expect(await machine.host.exec(['nft', 'list', 'ruleset'])).toContain('table inet detour');

      const agent = await world.startAgent();
      await detoursAre(agent.status, 'up');
      for (const to of ['10.81.0.2:5000', '[fd81::2]:5000']) {
        const result = await startTransfer(world.client, { to, bytes: BYTES }).result;
        expect(result.sha256).toBe(DIGEST);
        expect(result.mptcp).toBe(true);
        expect(result.paths.length).toBe(2);
        for (const path of result.paths) expect(path.bytes).toBeGreaterThan(BYTES / 4);
      }
      // We opened the way for our own flows and for nobody else's.
      expect(await connects(world.client, '10.83.1.2', LEASE_PORT)).toBe(false);

      // Somebody publishes a port of the range while the router runs: its log says so at the same upkeep.
      const late = await machine.publish(LEASE_PORT, ['node', '-e', HELLO]);
      await using _late = late;
      const flushed = await Promise.all(programs.map((program) => flushOurChain(machine.host, program)));
      // By itself in half a minute, at once when it is asked to.
      if (flavour === 'legacy') await router.container.docker.kill({ signal: 'SIGHUP' });
      await waitUntil(async () => (await rules()).every((found) => found.length === 1), {
        deadlineMs: 5_000 + (flavour === 'legacy' ? 0 : UPKEEP_MS),
        what: 'the flushed rules to come back',
        everyMs: 250,
      });
      expect(await rules()).toEqual([[rule], [rule]]);
      await waitUntil(async () => /listens on TCP port 25000 by now/.test(await router.container.logs()), {
        deadlineMs: 5_000,
        what: 'the router to name the port that was taken',
        everyMs: 100,
      });
      await late[Symbol.asyncDispose]();
      // What else was in those chains is not ours to restore.
      for (const { program, others } of flushed) {
        for (const line of others) await machine.host.exec([program, ...line.split(' ')]);
      }
      const again = await startTransfer(world.client, { to: '10.81.0.2:5000', bytes: BYTES }).result;
      expect(again.sha256).toBe(DIGEST);
      expect(again.paths.length).toBe(2);

      await agent.program.stop();
      expect(await asFound(machine.host)).not.toBe(before);
      expect(await router.stop(), await router.container.logs()).toBe(0);
      expect(await asFound(machine.host)).toBe(before);
    });

    if (flavour === 'legacy') {
      it('says what it lacks for iptables-legacy, and the line it prints mends it', async () => {
        await using router = await startRouter({}, DOCUMENTED.router);
        const log = await router.container.logs();
        expect(log).toMatch(/cannot be added \(.*Permission denied.*--cap-add NET_RAW/);
        const lines = [...log.matchAll(/or on the host: (ip6?tables-legacy -I [^"]* -j ACCEPT)/g)].map(
          ([, line]) => line,
        );
        expect(lines.length).toBe(2);
        const doctor = await router.cli('doctor', '--json');
        expect(JSON.parse(doctor.stdout).checks).toContainEqual(
          expect.objectContaining({
            name: 'forward-v4',
            state: 'warn',
            fix: [expect.stringContaining('--cap-add NET_RAW'), expect.stringContaining('iptables-legacy -I FORWARD')],
          }),
        );

        for (const line of lines) await machine.host.exec((line ?? '').split(' '));
        const agent = await world.startAgent();
        await detoursAre(agent.status, 'up');
        const result = await startTransfer(world.client, { to: '10.81.0.2:5000', bytes: BYTES }).result;
        expect(result.sha256).toBe(DIGEST);
        expect(result.paths.length).toBe(2);
        await agent.program.stop();
        expect(await router.stop(), await router.container.logs()).toBe(0);
        // Who added them takes them away.
        for (const line of lines) {
          await machine.host.exec((line ?? '').replace(/-I FORWARD 1/, '-D FORWARD').split(' '));
        }
        expect(await asFound(machine.host)).toBe(before);
      });
    }

    it('keeps its published ports and its containers’ ways out while a router runs', async () => {
      const publish = (port: number) => machine.publish(port, ['node', '-e', HELLO]);
      const hello = async (port: number) => {
        const { stdout } = await world.client.try(['timeout', '5', 'bash', '-c', `cat </dev/tcp/10.82.1.2/${port}`]);
        return stdout;
      };
      const answers = (port: number) =>
        waitUntil(async () => (await hello(port)) === 'hello', { deadlineMs: 10_000, what: `port ${port} to answer` });
      /** From a container to a port of the server that is in the range of leases. */
      const out = (container: Container) =>
        container.exec(
          'node',
          '-e',
          `require('node:net').connect(${LEASE_PORT}, '10.83.1.2').on('connect', () => process.exit(0))`,
        );
      await using other = await publish(OTHER_PORT);
      await answers(OTHER_PORT);
      {
        // A port that is published already belongs to Docker: the router says so instead of cutting it off.
        await using inRange = await publish(LEASE_PORT);
        await answers(LEASE_PORT);
        const refused = await machine.engine.run({
          image: IMAGE.router,
          env: { DETOUR_KEYS: world.key },
          host: FLAGS[flavour],
        });
        expect(refused.code).toBe(78);
        expect(refused.stdout + refused.stderr).toMatch(
          /DETOUR_PORTS=20000-29999: .*\b25000\b.*free here: DETOUR_PORTS=/,
        );
        expect(await hello(LEASE_PORT)).toBe('hello');
        // Beside a router whose ports are others, it stays.
        await using router = await startRouter({ DETOUR_PORTS: '10000-19999' });
        expect(await hello(LEASE_PORT)).toBe('hello');
        expect(await hello(OTHER_PORT)).toBe('hello');
        expect(await out(inRange)).toMatchObject({ code: 0 });
        expect(await router.stop()).toBe(0);
      }
      await using router = await startRouter();
      expect(await hello(OTHER_PORT)).toBe('hello');
      expect(await out(other)).toMatchObject({ code: 0 });
      expect(await router.stop()).toBe(0);
      expect(await hello(OTHER_PORT)).toBe('hello');
    });

    it('is as it was before all of this', async () => {
      expect(await asFound(machine.host)).toBe(before);
    });
  },
);
