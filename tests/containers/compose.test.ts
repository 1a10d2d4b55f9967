import { execFile } from 'node:child_process';
import { copyFileSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { Lab, waitUntil } from '../lab/netns.ts';
import { expectedSha256, startServer, startTransfer } from '../lab/traffic.ts';
import { detourWorld } from '../lab/world.ts';
import { engine, vps } from './engine.ts';

const run = promisify(execFile);
const folder = join(import.meta.dirname, '../../compose');
const BYTES = 8_000_000;

/** A folder as a user has it after copying one of our files: the file, and what its first lines say to put beside it. */
class Copy implements AsyncDisposable {
  readonly #folder = mkdtempSync(join(tmpdir(), 'detour-compose-'));
  readonly #files: string[];
  readonly #env: Record<string, string>;

  constructor(
    file: string,
    beside: Readonly<Record<string, string>>,
    env: Readonly<Record<string, string>>,
    host?: string,
  ) {
    copyFileSync(join(folder, file), join(this.#folder, file));
    for (const [name, text] of Object.entries(beside)) writeFileSync(join(this.#folder, name), text, { mode: 0o600 });
    this.#files = ['--file', file];
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

describe('the compose files', () => {
  it.each([
    ['router-vps.yaml', { 'detour-keys': '' }, {}],
    ['client-host.yaml', { 'detour-key': '' }, { DETOUR_DETOURS: 'vps=192.0.2.1:45672' }],
  ])('%s is valid and asks for the least privilege', async (file, beside, env) => {
    await using copy = new Copy(file, beside, env);
    const { services } = JSON.parse(await copy.compose('config', '--format', 'json'));
    for (const service of Object.values<Record<string, unknown>>(services)) {
      expect(service).toMatchObject({
        network_mode: 'host',
        cap_drop: ['ALL'],
        cap_add: ['NET_ADMIN'],
        read_only: true,
        security_opt: ['no-new-privileges:true'],
      });
      expect(service).not.toHaveProperty('privileged');
    }
  });

  it('client-host.yaml says what is missing when no detours are named', async () => {
    await using copy = new Copy('client-host.yaml', { 'detour-key': '' }, { DETOUR_DETOURS: '' });
    await expect(copy.compose('config')).rejects.toThrow(/set it to your detours, for instance/);
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
