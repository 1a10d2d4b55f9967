import { execFile } from 'node:child_process';
import { copyFileSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { Lab, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { detourWorld } from '../lab/world.ts';
import { World } from '../netns/world.ts';
import { Application, resultOf, sending } from './application.ts';
import { engine, vps } from './engine.ts';
import { IMAGE, Machine } from './machines.ts';

const run = promisify(execFile);
const folder = join(import.meta.dirname, '../../compose');
const BYTES = 8_000_000;
/** Of the worlds with more than one detour, or with containers. */
const SERVER = '10.81.0.2:5000';
const DETOURS = { DETOUR_DETOURS: 'vps=192.0.2.1:45672' };

/** A folder as a user has it after copying one of our files: the file, and what its first lines say to put beside it. */
class Copy implements AsyncDisposable {
  readonly #folder = mkdtempSync(join(tmpdir(), 'detour-compose-'));
  readonly #files: string[] = [];
  readonly #env: Record<string, string>;

  constructor(
    file: string,
    beside: Readonly<Record<string, string>>,
    env: Readonly<Record<string, string>>,
    host?: string,
  ) {
    copyFileSync(join(folder, file), join(this.#folder, file));
    for (const [name, text] of Object.entries(beside)) writeFileSync(join(this.#folder, name), text, { mode: 0o600 });
    // The file of variables that its first lines tell people to make.
    if ('fleet.env' in beside) this.#files.push('--env-file', 'fleet.env');
    this.#files.push('--file', file);
    if ('override.yaml' in beside) this.#files.push('--file', 'override.yaml');
    this.#env = { ...env, ...(host === undefined ? {} : { DOCKER_HOST: host }) };
  }

  async compose(...args: string[]): Promise<string> {
    const env = { ...process.env, ...this.#env };
    return (await run('docker', ['compose', ...this.#files, ...args], { cwd: this.#folder, env })).stdout;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.compose('down', '--volumes', '--timeout', '5').catch(() => undefined);
    rmSync(this.#folder, { recursive: true, force: true });
  }
}

/** What every service of ours has. */
const LEAST = { cap_drop: ['ALL'], read_only: true, security_opt: ['no-new-privileges:true'] };

describe('the compose files', () => {
  it.each([
    ['router-vps.yaml', 'router', ['NET_ADMIN'], { 'detour-keys': '' }, {}],
    ['router-fleet.yaml', 'router', ['NET_ADMIN'], {}, { DETOUR_KEYS: 'x' }],
    ['client-host.yaml', 'client', ['NET_ADMIN'], { 'detour-key': '' }, DETOURS],
    ['client-docker.yaml', 'client', ['NET_ADMIN', 'SYS_ADMIN'], { 'detour-key': '' }, DETOURS],
    ['client-sidecar.yaml', 'detour', ['NET_ADMIN'], { 'detour-key': '' }, { ...DETOURS, APP_IMAGE: 'app' }],
  ])('%s is valid and asks for the least privilege', async (file, name, capabilities, beside, env) => {
    await using copy = new Copy(file, beside, env);
    const { services } = JSON.parse(await copy.compose('config', '--format', 'json'));
    const { [name]: ours, ...others } = services;
    expect(ours).toMatchObject({
      ...LEAST,
      network_mode: name === 'detour' ? 'service:app' : 'host',
      cap_add: capabilities,
    });
    expect(ours).not.toHaveProperty('privileged');
    // Applications are left as they are, but for the one line.
    for (const other of Object.values<object>(others))
      expect(Object.keys(other).sort()).toEqual(['command', 'entrypoint', 'image', 'networks', 'sysctls']);
  });

  it('client-host.yaml says what is missing when no detours are named', async () => {
    await using copy = new Copy('client-host.yaml', { 'detour-key': '' }, { DETOUR_DETOURS: '' });
    await expect(copy.compose('config')).rejects.toThrow(/set it to your detours, for instance/);
  });

  it.each([
    ['router-fleet.yaml', /put it into fleet\.env/],
    ['client-docker.yaml', /set it to your detours, for instance/],
    ['client-sidecar.yaml', /set it to the image of your application|set it to your detours/],
  ])('%s says what is missing when nothing is set', async (file, says) => {
    await using copy = new Copy(file, { 'detour-key': '' }, {});
    await expect(copy.compose('config')).rejects.toThrow(says);
  });

  it('give a connection a path through the VPS, and leave both hosts with the sysctls they had', async () => {
    await using lab = await Lab.create('compose');
    const world = await detourWorld(lab, { rateMbit: 20 });
    await startServer(world.server);
    const images = await engine();
    await using far = await vps(world.detour.namespace);
    await using near = await vps(world.client.namespace);
    await far.load('detour-router:dev', images);
    await near.load('detour-client:dev', images);
    const before = await mptcpSysctls();

    const key = await far.run({ image: 'detour-router:dev', command: ['genkey'] });
    expect(key.stdout).toMatch(/^[0-9a-f]{8}:[\w-]{43}\n$/);
    // A server with a private address is the test's need alone; the file is used as it is but for that.
    const override = 'services:\n  router:\n    environment:\n      DETOUR_ALLOW: 10.86.1.2/32\n';
    await using router = new Copy(
      'router-vps.yaml',
      { 'detour-keys': key.stdout, 'override.yaml': override },
      {},
      far.host,
    );
    await using client = new Copy('client-host.yaml', { 'detour-key': key.stdout }, world.clientEnv, near.host);
    await router.compose('up', '--detach');
    await client.compose('up', '--detach');
    await ready(router, 'router');
    await ready(client, 'client');
    expect(await world.client.sysctl('net.mptcp.path_manager')).toBe('userspace');

    const result = await startTransfer(world.client, { to: `${world.serverAddress}:5000`, bytes: BYTES }).result;
    // Seen once to have fallen back to plain TCP, on a machine that others used too: the counters say at what.
    const counters = result.mptcp ? '' : await world.client.exec(['nstat', '-as', 'MPTcpExt*', 'TcpExt*Syn*']);
    expect(result, counters).toMatchObject({ mptcp: true, sha256: expectedSha256('detour', BYTES) });
    const relayed = result.paths
      .filter((path) => path.remote === '10.86.3.1')
      .reduce((sum, path) => sum + path.bytes, 0);
    expect(relayed).toBeGreaterThan(BYTES / 4);

    await client.compose('down', '--timeout', '10');
    await router.compose('down', '--timeout', '10');
    expect(await mptcpSysctls()).toEqual(before);

    async function mptcpSysctls(): Promise<string[]> {
      return Promise.all([world.client, world.detour].map((host) => host.exec(['sysctl', 'net.mptcp'])));
    }
  });

  it('give labelled containers of a Docker host paths, and an application its sidecar', async () => {
    await using world = await World.create('compose.docker', { rateMbit: 20 });
    await startServer(world.server);
    await world.startRouters();
    await using machine = await Machine.bring(world.client, [IMAGE.client]);
    const beside = { 'detour-key': world.key };
    const env = { DETOUR_DETOURS: 'vps=10.82.1.2:45672' };

    await using client = new Copy('client-docker.yaml', beside, env, machine.engine.host);
    await client.compose('up', '--detach');
    await ready(client, 'client');
    const labels = { 'detour.enable': 'true' };
    await using app = await Application.start(machine, { name: 'app', to: SERVER, bytes: BYTES, labels });
    const served = async () =>
      (await client.compose('exec', '--no-TTY', 'client', 'detour', 'status')).includes('served');
    await waitUntil(served, { deadlineMs: 20_000, what: 'the container to be served', everyMs: 200 });
    await app.go();
    expect((await app.result()).paths).toHaveLength(2);
    await client.compose('down', '--timeout', '10');

    const { entrypoint, command, mounts } = sending(SERVER, BYTES);
    const application = { entrypoint, command, volumes: mounts, tmpfs: ['/run'], init: true };
    await using sidecar = new Copy(
      'client-sidecar.yaml',
      { ...beside, 'override.yaml': JSON.stringify({ services: { app: application } }).replaceAll('$', '$$$$') },
      { ...env, APP_IMAGE: IMAGE.client },
      machine.engine.host,
    );
    await sidecar.compose('up', '--detach');
    for (const start of ['first', 'again']) {
      // Compose takes the sidecar along: the application has another network now.
      if (start === 'again') await sidecar.compose('restart', '--timeout', '1', 'app');
      await ready(sidecar, 'detour');
      await sidecar.compose('exec', '--no-TTY', 'app', 'touch', '/run/go');
      await sidecar.compose('wait', 'app');
      const said = await sidecar.compose('logs', '--no-log-prefix', '--tail', '1', 'app');
      expect(resultOf(said, BYTES).paths).toHaveLength(2);
    }
  });

  it('run a fleet of routers from one place, and a client uses all of it', async () => {
    await using world = await World.create('compose.fleet', { rateMbit: 20, detours: 2 });
    await startServer(world.server);
    await using near = await Machine.bring(world.client, [IMAGE.client]);
    await using scope = new AsyncDisposableStack();
    // A server with a private address is the test's need alone; the file is used as it is but for that.
    const beside = {
      'fleet.env': `DETOUR_KEYS=${world.key}\n`,
      'override.yaml': 'services:\n  router:\n    environment:\n      DETOUR_ALLOW: 10.81.0.0/30\n',
    };
    const fleet: Copy[] = [];
    for (const { host } of world.detours) {
      const machine = scope.use(await Machine.bring(host, [IMAGE.router]));
      const copy = scope.use(new Copy('router-fleet.yaml', beside, {}, machine.engine.host));
      await copy.compose('up', '--detach');
      fleet.push(copy);
    }
    for (const copy of fleet) await ready(copy, 'router');
    const env = { DETOUR_DETOURS: 'fra=10.82.1.2:45672,nyc=10.82.2.2:45672' };
    await using client = new Copy('client-host.yaml', { 'detour-key': world.key }, env, near.engine.host);
    await client.compose('up', '--detach');
    await ready(client, 'client');
    const detours = async () => (await client.compose('exec', '--no-TTY', 'client', 'detour', 'status')).match(/ up /g);
    await waitUntil(async () => (await detours())?.length === 2, { deadlineMs: 20_000, what: 'both detours' });
    const transfer = startTransfer(world.client, { to: SERVER, bytes: BYTES });
    const result = await transfer.result;
    expect(result).toMatchObject({ mptcp: true, sha256: expectedSha256('detour', BYTES) });
    expect(result.paths).toHaveLength(3);
    for (const copy of fleet) await copy.compose('down', '--timeout', '10');
  });
});

async function ready(copy: Copy, service: string): Promise<void> {
  await waitUntil(() => copy.compose('exec', '--no-TTY', service, 'detour', 'healthcheck', '--ready'), {
    deadlineMs: 20_000,
    what: `the ${service} to be ready`,
    everyMs: 200,
  }).catch(async (error: unknown) => {
    throw new Error(`${error}\n${await copy.compose('logs', '--no-color')}`);
  });
}
