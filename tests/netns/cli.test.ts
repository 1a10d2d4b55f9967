/**
 * The command line beside real daemons and a real kernel.
 *
 *     client 10.88.0.1 ---- 10.88.0.2 router
 */
import { randomBytes } from 'node:crypto';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { type ExecResult, type Host, Lab, type Link, type Running, requireRoot, waitUntil } from '../lab/netns.ts';
import { holdConnections, startServer } from '../lab/traffic.ts';
import { pathBy, World } from './world.ts';

const CLI = join(import.meta.dirname, '../../appliance/cli.ts');
const BUNDLE = join(import.meta.dirname, '../../dist/detour.js');
const ROUTER = '10.88.0.2';

const newKey = (): string => `${randomBytes(4).toString('hex')}:${randomBytes(32).toString('base64url')}`;

describe.runIf(requireRoot('the command line tests'))('detour', () => {
  let lab: Lab;
  let client: Host;
  let router: Host;
  let link: Link;
  let folder: string;
  let key: string;
  let env: Record<string, string>;
  let running: Running[];

  beforeAll(async () => {
    lab = await Lab.create('cli');
    client = await lab.host('client');
    router = await lab.host('router');
    link = await lab.link(client, router, { v4: '10.88.0.0/30', v6: 'fd88::/64' });
  });
  afterAll(() => lab?.[Symbol.asyncDispose]());

  beforeEach(() => {
    folder = mkdtempSync(join(tmpdir(), 'detour-cli-'));
    key = newKey();
    running = [];
    writeFileSync(join(folder, 'keys'), `${key}\n`, { mode: 0o600 });
    env = { DETOUR_KEYS_FILE: join(folder, 'keys'), DETOUR_SOCKET: join(folder, 'router.sock') };
  });
  afterEach(async () => {
    for (const program of running) await program.stop('SIGKILL');
    // Each test starts on clean hosts; what this removes was put there by the router of the test.
    await detour(router, ['cleanup', 'router']);
    rmSync(folder, { recursive: true, force: true });
  });

  const detour = (host: Host, args: readonly string[], more: Record<string, string> = {}): Promise<ExecResult> =>
    host.try([process.execPath, CLI, ...args], { env: { ...env, ...more } });

  function spawn(host: Host, args: readonly string[], more: Record<string, string> = {}): Running {
    const program = host.spawn([process.execPath, CLI, ...args], { env: { ...env, ...more } });
    running.push(program);
    return program;
  }

  async function startRouter(more: Record<string, string> = {}): Promise<Running> {
    const program = spawn(router, ['router'], more);
    await program.waitFor('"event":"started"');
    return program;
  }

  /** A PATH with an nft that hangs once it is told to: an end that cleans up then takes longer than anyone waits. */
  function hangingNft(): { path: string; begin: () => void } {
    const bin = join(folder, 'bin');
    const flag = join(folder, 'hang');
    mkdirSync(bin);
    const script = `#!/bin/sh\n[ -e '${flag}' ] && exec sleep 60\nPATH='${process.env.PATH}' exec nft "$@"\n`;
    writeFileSync(join(bin, 'nft'), script, { mode: 0o755 });
    return { path: `${bin}:${process.env.PATH}`, begin: () => writeFileSync(flag, '') };
  }

  /** What `doctor` on the client says about the way to the router. */
  async function way(clientKey = key): Promise<{ state: string; detail: string }> {
    const { stdout } = await client.try([process.execPath, CLI, 'doctor', 'client', '--json'], {
      env: { DETOUR_KEY: clientKey, DETOUR_DETOURS: `fra=${ROUTER}:45672`, DETOUR_SOCKET: join(folder, 'client.sock') },
    });
    const { checks }: { checks: { name: string; state: string; detail: string }[] } = JSON.parse(stdout);
    return checks.find(({ name }) => name === 'detour fra') ?? { state: 'absent', detail: stdout };
  }

  describe('dist/detour.js under a Node that is too old', () => {
    // The same Node with another name: what it calls itself is all that the bundle asks.
    const OLD = 'data:text/javascript,Object.defineProperty(process.versions,"node",{value:"20.20.2"})';
    const old = (...args: string[]): string[] => [process.execPath, `--import=${OLD}`, BUNDLE, ...args];

    it('hands over to the one that make build brought, exit code and all', async () => {
      expect((await router.exec(old('version'))).trim()).toMatch(/^detour \S+ \S+$/);
      expect((await router.try(old('router'), { env: { ...env, DETOUR_LISTN: ':1' } })).code).toBe(78);
    });

    it('passes signals on, and takes the program along when it is killed', async () => {
      const first = router.spawn(old('router'), { env });
      running.push(first);
      await first.waitFor('"event":"started"');
      process.kill(first.pid, 'SIGTERM');
      expect(await first.exited).toMatchObject({ code: 0 });

      const second = router.spawn(old('router'), { env });
      running.push(second);
      await second.waitFor('"event":"started"');
      process.kill(second.pid, 'SIGKILL');
      await waitUntil(async () => (await detour(router, ['healthcheck'])).code === 1, {
        deadlineMs: 10_000,
        what: 'the end of the router whose launcher was killed',
      });
    });
  });

  it('runs a router, shows it, and leaves the host as it was found', async () => {
    const before = {
      rules: await router.exec(['nft', 'list', 'ruleset']),
      forward: await router.sysctl('net.ipv4.ip_forward'),
    };
    expect(before.rules).toBe('');
    expect(before.forward).toBe('0');

    const program = await startRouter();
    expect((await detour(router, ['healthcheck'])).code).toBe(0);
    expect((await detour(router, ['healthcheck', '--ready'])).code).toBe(0);
    const status = JSON.parse((await detour(router, ['status', '--json'])).stdout);
    expect(status).toMatchObject({ role: 'router', ready: true, version: expect.any(String), leases: [], clients: [] });
    expect((await detour(router, ['status'])).stdout).toMatch(/^detour router \S+: ready$/m);
    expect(await detour(router, ['doctor'])).toMatchObject({ code: 0 });
    const metrics = await router.exec([
      process.execPath,
      '-e',
      "fetch('http://127.0.0.1:9467/metrics').then(async (r) => console.log(await r.text()))",
    ]);
    expect(metrics).toMatch(/^detour_build_info\{.*\} 1$/m);
    expect(metrics).toMatch(/^detour_router_leases 0$/m);

    // What was printed and logged holds no secret.
    const said = [...program.lines, ...program.errors, JSON.stringify(status), metrics].join('\n');
    expect(said).not.toContain(key.slice(9));

    expect(await program.stop('SIGTERM', 8_000)).toEqual({ code: 0, signal: null });
    expect((await detour(router, ['healthcheck'])).code).toBe(1);
    expect((await detour(router, ['cleanup', 'router'])).code).toBe(0);
    expect(await router.exec(['nft', 'list', 'ruleset'])).toBe('');
    expect(await router.sysctl('net.ipv4.ip_forward')).toBe('0');
    expect((await detour(router, ['cleanup', 'router'])).code).toBe(0);
  });

  it('cleans up without any key, and not under a running daemon', async () => {
    const program = await startRouter();
    const { code, stderr } = await detour(router, ['cleanup', 'router']);
    expect(code).toBe(1);
    expect(stderr).toMatch(/the router is running .*stop it first/);
    expect(await router.exec(['nft', 'list', 'tables'])).toContain('detour');
    await program.stop('SIGKILL');
    expect(await router.exec(['nft', 'list', 'tables'])).toContain('detour');
    const { DETOUR_KEYS_FILE: _, ...keyless } = env;
    const cleaned = await router.try([process.execPath, CLI, 'cleanup', 'router'], { env: keyless });
    expect(cleaned).toMatchObject({ code: 0 });
    expect(await router.exec(['nft', 'list', 'tables'])).toBe('');
  });

  it('is alone: a second router is refused and harms nobody', async () => {
    await startRouter();
    const rules = await router.exec(['nft', '-s', 'list', 'chains']);
    const second = await detour(router, ['router']);
    expect(second.code).toBe(1);
    expect(second.stderr).toMatch(/another detour router is running here/);
    expect(await router.exec(['nft', '-s', 'list', 'chains'])).toBe(rules);
    const third = await detour(router, ['router'], { DETOUR_SOCKET: join(folder, 'other.sock') });
    expect(third.code).toBe(78);
    expect(third.stderr).toMatch(/^DETOUR_HTTP=127\.0\.0\.1:9467: another program/);
    expect((await detour(router, ['healthcheck', '--ready'])).code).toBe(0);
  });

  it('takes over the socket and the rules of a router that was killed', async () => {
    const first = await startRouter();
    await first.stop('SIGKILL');
    const second = await startRouter();
    expect((await detour(router, ['healthcheck', '--ready'])).code).toBe(0);
    expect(await second.stop()).toEqual({ code: 0, signal: null });
  });

  it('sees from the client whether the router answers, refuses or keeps silent', async () => {
    expect(await way()).toMatchObject({ state: 'fail', detail: expect.stringContaining('refuses') });
    await startRouter();
    expect(await way()).toMatchObject({
      state: 'ok',
      detail: expect.stringMatching(/answers in .* sees this client as 10\.88\.0\.1/),
    });
    expect(await way(newKey())).toMatchObject({
      state: 'fail',
      detail: expect.stringMatching(/silent.*does not know key/),
    });
    await link.blackhole();
    try {
      expect(await way()).toMatchObject({ state: 'fail', detail: expect.stringContaining('silent') });
    } finally {
      await link.restore();
    }
  });

  it('reads its keys again on SIGHUP, all or none', async () => {
    const program = await startRouter();
    const other = newKey();
    expect((await way(other)).state).toBe('fail');
    writeFileSync(join(folder, 'keys'), `${key}\n${other}\n`);
    program.kill('SIGHUP');
    await waitUntil(async () => (await way(other)).state === 'ok', { deadlineMs: 10_000, what: 'the new key' });

    writeFileSync(join(folder, 'keys'), `${key}\nnonsense\n`);
    program.kill('SIGHUP');
    const line = await program.waitFor('"event":"reload-failed"');
    expect(line).toContain('DETOUR_KEYS');
    expect((await way(other)).state).toBe('ok');

    writeFileSync(join(folder, 'keys'), `${key}\n`);
    program.kill('SIGHUP');
    await waitUntil(async () => (await way(other)).state === 'fail', {
      deadlineMs: 15_000,
      what: 'the key to be gone',
    });
    expect((await way()).state).toBe('ok');
  });

  it('leaves at once when it is asked twice', async () => {
    const hang = hangingNft();
    const program = await startRouter({ PATH: hang.path, DETOUR_ON_EXIT: 'cleanup' });
    hang.begin();
    program.kill('SIGTERM');
    await program.waitFor('"event":"stopping"');
    program.kill('SIGTERM');
    expect(await program.exited).toEqual({ code: 1, signal: null });
    expect(program.errors.join('\n')).toContain('detour cleanup router');
  });

  it('leaves by itself when its end takes too long', async () => {
    const hang = hangingNft();
    const program = await startRouter({ PATH: hang.path, DETOUR_ON_EXIT: 'cleanup' });
    hang.begin();
    const asked = performance.now();
    program.kill('SIGTERM');
    expect(await program.exited).toEqual({ code: 1, signal: null });
    expect(performance.now() - asked).toBeLessThan(10_000);
    expect(program.errors.join('\n')).toContain('detour cleanup router');
  });

  it.each(['| head -n 1', '> /dev/full'])('lives on when its log goes %s', async (where) => {
    const command = [process.execPath, CLI, 'router'].join(' ');
    const program = router.spawn(['sh', '-c', `${command} ${where}`], { env });
    running.push(program);
    const ready = async () => (await detour(router, ['healthcheck', '--ready'])).code === 0;
    await waitUntil(ready, { deadlineMs: 10_000, what: 'the router to be ready without a reader' });
    await waitUntil(async () => (await way()).state === 'ok', { deadlineMs: 10_000, what: 'an answer' });
    expect(await ready()).toBe(true);
    program.killGroup();
  });

  it('names the capability that is missing: 69, and the flag for each platform', async () => {
    const without = ['setpriv', '--bounding-set=-net_admin', process.execPath, CLI];
    const started = await router.try([...without, 'router'], { env });
    expect(started.code).toBe(69);
    expect(started.stderr).toMatch(/--cap-add NET_ADMIN.*compose.*Kubernetes/s);
    const examined = await router.try([...without, 'doctor', 'router'], { env });
    expect(examined.code).toBe(1);
    expect(examined.stdout).toMatch(/^FAIL {2}net-admin/m);
    expect(examined.stdout).toMatch(/^FAIL {2}nft +nft \S+ may not read the rules/m);
  });

  it('names a listener among its ports: 78, in doctor and at the start', async () => {
    const listener = router.spawn([
      process.execPath,
      '-e',
      "require('net').createServer().listen(20500, () => console.log('up'))",
    ]);
    running.push(listener);
    await listener.waitFor('up');
    const examined = await detour(router, ['doctor']);
    expect(examined.code).toBe(1);
    expect(examined.stdout).toMatch(
      /^FAIL {2}lease-ports +DETOUR_PORTS=20000-29999: a local program listens at TCP 20500\n +fix: DETOUR_PORTS=\d+-\d+$/m,
    );
    const started = await detour(router, ['router']);
    expect(started.code).toBe(78);
    expect(started.stderr).toMatch(/^DETOUR_PORTS=20000-29999: .*20500/);
  });

  it('loads and unloads the path manager, and says which it is', async () => {
    const parameter = 'net.mptcp.pm_type';
    const clientEnv = { DETOUR_SOCKET: join(folder, 'client.sock') };
    const run = (...args: string[]) => client.try([process.execPath, CLI, ...args], { env: clientEnv });
    const found = await client.sysctl(parameter);
    expect(await run('load')).toMatchObject({ code: 0, stdout: 'the userspace path manager is selected\n' });
    expect(await client.sysctl(parameter)).toBe('1');
    expect((await run('doctor', 'client')).stdout).toMatch(/^WARN {2}path-manager .*no agent runs/m);
    expect(await run('unload')).toMatchObject({ code: 0 });
    expect(await client.sysctl(parameter)).toBe(found);
    expect(await run('cleanup', 'client')).toMatchObject({ code: 0 });
    expect(await client.exec(['nft', 'list', 'ruleset'])).toBe('');
  });

  it('runs a client, shows it, and leaves the host as it was found', async () => {
    await startRouter();
    const clientEnv = {
      DETOUR_KEY: key,
      DETOUR_DETOURS: `fra=${ROUTER}:45672`,
      DETOUR_SOCKET: join(folder, 'client.sock'),
    };
    const found = await client.sysctl('net.mptcp.pm_type');
    const program = client.spawn([process.execPath, CLI, 'client'], { env: clientEnv });
    running.push(program);
    const run = (...args: string[]) => client.try([process.execPath, CLI, ...args], { env: clientEnv });
    await waitUntil(async () => (await run('healthcheck', '--ready')).code === 0, {
      deadlineMs: 10_000,
      what: 'a ready client',
    });
    const status = JSON.parse((await run('status', '--json')).stdout);
    expect(status).toMatchObject({
      role: 'client',
      ready: true,
      detours: [{ name: 'fra', address: `${ROUTER}:45672` }],
      connections: [],
    });
    expect(await client.sysctl('net.mptcp.pm_type')).toBe('1');
    expect((await run('doctor', 'client')).code).toBe(0);
    expect(await program.stop('SIGTERM', 8_000)).toEqual({ code: 0, signal: null });
    expect(await client.sysctl('net.mptcp.pm_type')).toBe(found);
    expect(await client.exec(['nft', 'list', 'ruleset'])).toBe('');
  });

  it('explains every way to a server, by connection and, without one, by what is known', async () => {
    await using world = await World.create('cli.explain', { detours: 2 });
    await startServer(world.server);
    const [first] = world.detours;
    if (!first) throw new Error('the world has two detours');
    await world.startRouter(first);
    const lists = world.detours.map(({ name, v4 }) => `${name}=${v4}:45672`);
    const agent = await world.startAgent({ DETOUR_DETOURS: lists.join(',') });
    await waitUntil(async () => (await agent.status()).detours.find(({ name }) => name === 'detour1')?.state === 'up', {
      deadlineMs: 20_000,
      what: 'the first detour to answer',
    });
    const held = await holdConnections(world.client, { to: '10.81.0.2:5000', count: 2 });
    await waitUntil(
      async () => (await agent.status()).connections.filter((one) => pathBy(one, 'detour1')).length === 2,
      {
        deadlineMs: 20_000,
        what: 'paths on both',
      },
    );
    type Row = { detour: string; state: string; why: string | null };
    type Answer = { connections: { remote: string; paths: Row[] }[]; detours: Row[] };
    const ask = async (target: string): Promise<Answer> => {
      const answers: Answer[] = JSON.parse(await world.command(['explain', target, '--json']));
      const [answer] = answers;
      if (!answer || answers.length > 1) throw new Error(`${answers.length} answers`);
      return answer;
    };
    const { connections } = await ask('10.81.0.2:5000');
    expect(connections.length).toBe(2);
    for (const { remote, paths } of connections) {
      expect(remote).toBe('10.81.0.2:5000');
      expect(paths.map(({ detour, state }) => `${detour} ${state}`)).toEqual([
        'direct active',
        'detour1 active',
        'detour2 not used',
      ]);
      expect(paths[2]?.why).toMatch(/answer/);
    }
    expect((await ask('10.81.0.2:5001')).connections).toEqual([]);
    expect(await world.command(['explain', '10.81.0.2'])).toMatch(/^ {2}detour2 +\S+ +not used .*answer/m);
    await held.stop();
    await waitUntil(async () => (await ask('10.81.0.2')).connections.length === 0, {
      deadlineMs: 10_000,
      what: 'the connections to be forgotten',
    });
    expect((await ask('10.81.0.2')).detours.map(({ detour, state }) => `${detour} ${state}`)).toContain('detour1 up');
    expect(await world.command(['explain', '10.81.0.2'])).toMatch(
      /^no connection to it; what is known of 10\.81\.0\.0\/24/m,
    );
  });

  it('leaves the host as it was found even when a bug brings it down', async () => {
    await startRouter();
    const found = await client.sysctl('net.mptcp.pm_type');
    const bug = "process.on('SIGUSR2', () => { throw new Error('the bug'); });";
    const program = client.spawn([process.execPath, '--import', `data:text/javascript,${bug}`, CLI, 'client'], {
      env: {
        DETOUR_KEY: key,
        DETOUR_DETOURS: `fra=${ROUTER}:45672`,
        DETOUR_SOCKET: join(folder, 'client.sock'),
      },
    });
    running.push(program);
    await program.waitFor('"event":"started"');
    expect(await client.sysctl('net.mptcp.pm_type')).toBe('1');
    program.kill('SIGUSR2');
    expect(await program.exited).toEqual({ code: 1, signal: null });
    const crashes = program.lines.filter((line) => line.includes('"event":"crashed"'));
    expect(crashes).toHaveLength(1);
    expect(JSON.parse(crashes[0] ?? '')).toMatchObject({ level: 'error', reason: 'the bug' });
    expect(await client.sysctl('net.mptcp.pm_type')).toBe(found);
    expect(await client.exec(['nft', 'list', 'ruleset'])).toBe('');
  });
});
