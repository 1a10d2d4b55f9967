/** The program as its users meet it: a process, its exit code, and what it prints where. No privileges. */
import { spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer } from 'node:http';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { Registry } from 'prom-client';
import { afterAll, describe, expect, it } from 'vitest';
import { createLog } from '../../appliance/log.ts';
import { type Address, formatAddress } from '../../appliance/protocol/address.ts';
import { loadClientSettings, loadRouterSettings } from '../../appliance/settings.ts';
import type { DaemonView } from '../../appliance/status/daemon.ts';
import { openStatus } from '../../appliance/status/server.ts';

const CLI = join(import.meta.dirname, '../../appliance/cli.ts');
const folder = mkdtempSync(join(tmpdir(), 'detour-cli-'));
afterAll(() => rmSync(folder, { recursive: true, force: true }));

type Result = { readonly code: number | null; readonly stdout: string; readonly stderr: string; readonly ms: number };

async function detour(args: readonly string[], env: Readonly<Record<string, string>> = {}): Promise<Result> {
  const started = performance.now();
  // A socket path of our own: whatever daemon runs on this machine is not our business.
  const child = spawn(process.execPath, [CLI, ...args], { env: { DETOUR_SOCKET: join(folder, 'none.sock'), ...env } });
  let stdout = '';
  let stderr = '';
  child.stdout.setEncoding('utf8').on('data', (part) => {
    stdout += part;
  });
  child.stderr.setEncoding('utf8').on('data', (part) => {
    stderr += part;
  });
  const code = await new Promise<number | null>((resolve) => child.on('close', resolve));
  return { code, stdout, stderr, ms: performance.now() - started };
}

const newKey = (): string => `${randomBytes(4).toString('hex')}:${randomBytes(32).toString('base64url')}`;
const sources = (env: Record<string, string>) => ({ env, file: () => null });

describe('usage', () => {
  it.each([[['help']], [['--help']], [['-h']], [['router', '--help']]])('%j prints it and exits 0', async (args) => {
    const { code, stdout } = await detour(args);
    expect(code).toBe(0);
    for (const command of [
      'router',
      'client',
      'load',
      'status',
      'explain',
      'doctor',
      'genkey',
      'invite',
      'config',
      'cleanup',
    ]) {
      expect(stdout).toContain(command);
    }
  });

  it.each([
    [[]],
    [['teleport']],
    [['constructor']],
    [['router', '--fast']],
    [['router', 'extra']],
    [['config']],
    [['config', 'destroy']],
    [['cleanup', 'sofa']],
    [['status', '--json=yes']],
    [['explain']],
    [['explain', 'a', 'b']],
    [['explain', 'fd00::1:x']],
    [['explain', '192.0.2.1:0']],
    [['explain', '192.0.2.1:65536']],
    [['explain', 'a&b']],
    [['invite', '--host', '$(reboot)']],
    [['invite', '--host', 'a', '--format', 'papyrus']],
    [['invite', '--host', 'a', '--new', '--key', '12345678']],
  ])('%j is bad usage: 64, and says where help is', async (args) => {
    const { code, stdout, stderr } = await detour(args, { DETOUR_KEYS: newKey() });
    expect(code).toBe(64);
    expect(stdout).toBe('');
    expect(stderr).toMatch(/^detour.*\nTry: detour help\n$/);
  });
});

describe('bad configuration', () => {
  const bad = {
    DETOUR_RELAY: 'all',
    DETOUR_PORTS: '9-1',
    DETOUR_KEYZ: 'x',
    DETOUR_VPN: 'wireguard',
    DETOUR_SOCKET: 'rel',
  };

  it.each([[['router']], [['config', 'check', 'router']], [['config', 'print', 'router']]])(
    '%j: every error, a line each, 78',
    async (args) => {
      const { code, stdout, stderr, ms } = await detour(args, bad);
      expect(code).toBe(78);
      expect(stdout).toBe('');
      const lines = stderr.trimEnd().split('\n');
      expect(lines.map((line) => /^DETOUR_\w+/.exec(line)?.[0]).sort()).toEqual([
        'DETOUR_KEYS',
        'DETOUR_KEYZ',
        'DETOUR_PORTS',
        'DETOUR_RELAY',
        'DETOUR_SOCKET',
        'DETOUR_VPN',
      ]);
      // The contract says a second; a loaded machine that runs other tests beside is given some more.
      expect(ms).toBeLessThan(5_000);
    },
  );

  it('asks a client for its key and its detours', async () => {
    const { code, stderr } = await detour(['client']);
    expect(code).toBe(78);
    expect(stderr).toMatch(/^DETOUR_KEY: is required.*\nDETOUR_DETOURS: is required.*\n$/);
  });

  it('looks at both roles when nothing tells which', async () => {
    const { code, stderr } = await detour(['config', 'check'], { DETOUR_TYPO: '1' });
    expect(code).toBe(78);
    expect(stderr.match(/DETOUR_TYPO/g)).toHaveLength(1);
    expect(stderr).toMatch(/DETOUR_KEYS: is required/);
    expect(stderr).toMatch(/DETOUR_DETOURS: is required/);
  });

  it('names the unknown variable even where no setting is needed', async () => {
    const { code, stderr } = await detour(['unload'], { DETOUR_SYSCTLROOT: '/x' });
    expect(code).toBe(78);
    expect(stderr).toMatch(/did you mean DETOUR_SYSCTL_ROOT\?/);
  });
});

describe('config', () => {
  it('is fine for a router, and says so', async () => {
    expect(await detour(['config', 'check'], { DETOUR_KEYS: newKey() })).toMatchObject({
      code: 0,
      stdout: 'router: the configuration is fine\n',
      stderr: '',
    });
  });

  it('prints every effective value with its origin and no secret', async () => {
    const key = newKey();
    const file = join(folder, 'ports');
    writeFileSync(file, '21000-21999\n');
    const { code, stdout } = await detour(['config', 'print', '--json'], {
      DETOUR_KEYS: `${key}:anna`,
      DETOUR_PORTS_FILE: file,
    });
    expect(code).toBe(0);
    expect(stdout).not.toContain(key.slice(9));
    const rows: { name: string }[] = JSON.parse(stdout);
    expect(rows).toContainEqual({
      role: 'router',
      name: 'DETOUR_KEYS',
      value: `${key.slice(0, 8)}:***:anna`,
      origin: 'env',
      path: null,
    });
    expect(rows).toContainEqual({
      role: 'router',
      name: 'DETOUR_PORTS',
      value: '21000-21999',
      origin: 'file',
      path: file,
    });
    expect(rows).toContainEqual({ role: 'router', name: 'DETOUR_RELAY', value: 'join', origin: 'default', path: null });
    const plain = await detour(['config', 'print'], { DETOUR_KEYS: `${key}:anna` });
    expect(plain.stdout).toMatch(/^DETOUR_KEYS +env +[0-9a-f]{8}:\*\*\*:anna$/m);
  });

  it('warns of a secret file that everyone can read', async () => {
    const file = join(folder, 'keys');
    writeFileSync(file, `${newKey()}\n`, { mode: 0o644 });
    const { code, stderr } = await detour(['config', 'check'], { DETOUR_KEYS_FILE: file });
    expect(code).toBe(0);
    expect(stderr).toBe(`warning: ${file} holds a secret and every user can read it: chmod 600 ${file}\n`);
  });
});

describe('keys and invitations', () => {
  it('genkey prints keys that both roles accept, each another', async () => {
    const printed = await Promise.all([detour(['genkey']), detour(['genkey'])]);
    const keys = printed.map(({ stdout }) => stdout.trimEnd());
    for (const key of keys) {
      expect(key).toMatch(/^[0-9a-f]{8}:[A-Za-z0-9_-]{43}$/);
      expect(loadRouterSettings(sources({ DETOUR_KEYS: key })).settings.keys).toHaveLength(1);
    }
    expect(keys[0]).not.toBe(keys[1]);
  });

  it('invites with settings that a client accepts', async () => {
    const key = newKey();
    const args = ['invite', '--host', '2001:db8::7', '--name', 'fra-1', '--format', 'env'];
    const { code, stdout } = await detour(args, { DETOUR_KEYS: `${key}:anna`, DETOUR_LISTEN: ':4000' });
    expect(code).toBe(0);
    const env = Object.fromEntries(
      stdout
        .trimEnd()
        .split('\n')
        .map((line) => [line.slice(0, line.indexOf('=')), line.slice(line.indexOf('=') + 1)]),
    );
    const { settings } = loadClientSettings(sources(env));
    expect(settings.detours).toEqual([{ kind: 'static', name: 'fra-1', host: '2001:db8::7', port: 4000 }]);
    const { id, secret } = settings.key ?? { id: 0, secret: new Uint8Array() };
    expect(`${id.toString(16).padStart(8, '0')}:${Buffer.from(secret).toString('base64url')}`).toBe(key);
  });

  it.each(['docker', 'compose', 'kubernetes'])('prints %s with the key and the detour', async (format) => {
    const key = newKey();
    const { code, stdout } = await detour(['invite', '--host', 'vps.example.org', '--name', 'a', '--format', format], {
      DETOUR_KEYS: key,
    });
    expect(code).toBe(0);
    expect(stdout).toContain(key);
    expect(stdout).toContain('a=vps.example.org:45672');
    if (format !== 'kubernetes')
      for (const word of ['NET_ADMIN', 'no-new-privileges', '/proc/sys/net']) expect(stdout).toContain(word);
    expect(stdout).not.toContain('privileged: true');
  });

  it('asks which key when there are several, without showing them', async () => {
    const keys = [newKey(), newKey()];
    const both = await detour(['invite', '--host', 'a'], { DETOUR_KEYS: keys.join() });
    expect(both.code).toBe(64);
    for (const key of keys) {
      expect(both.stderr).toContain(key.slice(0, 8));
      expect(both.stderr).not.toContain(key.slice(9));
    }
    const one = await detour(['invite', '--host', 'a', '--key', keys[1]?.slice(0, 8) ?? ''], {
      DETOUR_KEYS: keys.join(),
    });
    expect(one.stdout).toContain(keys[1]);
    expect(one.stdout).not.toContain(keys[0]?.slice(9));
  });

  it('makes a new key for an invitation, and says what the router needs', async () => {
    const { code, stdout, stderr } = await detour(['invite', '--host', 'a', '--name', 'b', '--new', '--format', 'env']);
    expect(code).toBe(0);
    const key = /^DETOUR_KEY=(.*)$/m.exec(stdout)?.[1] ?? 'none';
    expect(stderr).toContain(`${key}:b`);
  });
});

describe('a daemon that is not there, or not well', () => {
  it.each([[['status']], [['healthcheck']], [['healthcheck', '--ready']], [['explain', '192.0.2.1']]])(
    '%j: 1, and how to mend it',
    async (args) => {
      const { code, stderr } = await detour(args);
      expect(code).toBe(1);
      expect(stderr).toMatch(/no detour daemon answers at .*none\.sock.*DETOUR_SOCKET/);
    },
  );

  it('healthcheck follows the daemon: 0 while it is well, 1 when it is not', async () => {
    const path = join(folder, 'fake.sock');
    let code = 200;
    const server = createServer((_, response) => void response.writeHead(code).end('{}\n'));
    await new Promise<void>((resolve) => server.listen(path, resolve));
    try {
      expect((await detour(['healthcheck'], { DETOUR_SOCKET: path })).code).toBe(0);
      code = 503;
      expect((await detour(['healthcheck'], { DETOUR_SOCKET: path })).code).toBe(1);
    } finally {
      server.close();
    }
  });

  it('status says when the daemon cannot make its page', async () => {
    const path = join(folder, 'broken.sock');
    const server = createServer((_, response) => void response.writeHead(500).end('failed; the log says why\n'));
    await new Promise<void>((resolve) => server.listen(path, resolve));
    try {
      const { code, stderr } = await detour(['status'], { DETOUR_SOCKET: path });
      expect({ code, stderr }).toEqual({
        code: 1,
        stderr: 'the daemon could not say how it is: failed; the log says why\n',
      });
    } finally {
      server.close();
    }
  });

  it('status prints tables for people and JSON for programs', async () => {
    const path = join(folder, 'status.sock');
    const status = {
      version: '9.9.9',
      role: 'client',
      ready: true,
      reasons: [],
      detours: [{ name: 'fra', address: '192.0.2.1:45672', state: 'up', rttMs: 12.34, epoch: null, strategy: 'nat' }],
      connections: [
        {
          token: '0a0b0c0d',
          remote: '198.51.100.7:443',
          paths: [{ kind: 'nat', detour: 'fra', deliveredBytes: 1_234_567, rttMs: 20 }],
        },
      ],
    };
    const server = createServer((_, response) => void response.end(JSON.stringify(status)));
    await new Promise<void>((resolve) => server.listen(path, resolve));
    try {
      const text = await detour(['status'], { DETOUR_SOCKET: path });
      expect(text.code).toBe(0);
      expect(text.stdout).toMatch(/^detour client 9\.9\.9: ready$/m);
      expect(text.stdout).toMatch(/^ {2}NAME +ADDRESS +STATE +RTT +STRATEGY$/m);
      expect(text.stdout).toMatch(/^ {2}fra +192\.0\.2\.1:45672 +up +12\.3 ms +nat$/m);
      expect(text.stdout).toMatch(/^ {6}nat +fra +1\.2 MB +20 ms$/m);
      const json = await detour(['status', '--json'], { DETOUR_SOCKET: path });
      expect(JSON.parse(json.stdout)).toEqual(status);
    } finally {
      server.close();
    }
  });

  it('prints all of a long answer before it ends', async () => {
    const path = join(mkdtempSync(join(folder, 'long-')), 'client.sock');
    // More than a pipe or a socket takes at once.
    const connections = Array.from({ length: 20_000 }, (_, i) => ({ token: `${i}`, remote: '198.51.100.7:443' }));
    const status = { version: '9.9.9', ready: true, reasons: [], connections };
    const server = createServer((_, response) => void response.end(JSON.stringify(status)));
    await new Promise<void>((resolve) => server.listen(path, resolve));
    try {
      const { code, stdout } = await detour(['status', '--json'], { DETOUR_SOCKET: path });
      expect(code).toBe(0);
      expect(JSON.parse(stdout).connections.length).toBe(connections.length);
    } finally {
      server.close();
    }
  });
});

describe('explain', () => {
  const answer = {
    port: 443,
    prefix: '198.51.100.0/24',
    directBytesPerSecond: 2_500_000,
    connections: [] as object[],
    connectionsLeftOut: 0,
    detours: [
      { detour: 'fra', address: '192.0.2.1:45672', state: 'up', addsBytesPerSecond: 1_250_000, why: 'measured' },
    ],
  };

  /** The real status server with a daemon behind it that answers so. */
  async function serving<T>(explain: DaemonView['explain'], task: (socket: string) => Promise<T>): Promise<T> {
    const socket = join(mkdtempSync(join(folder, 'explain-')), 'client.sock');
    const log = createLog({ component: 'client', logLevel: 'error', logFormat: 'json' }, { write: () => undefined });
    const server = await openStatus({ role: 'client', settings: { http: null, socket }, log });
    server.attach({
      readiness: () => ({ ready: true, reasons: [] }),
      status: async () => ({}),
      metrics: new Registry(),
      ...(explain ? { explain } : {}),
    });
    try {
      return await task(socket);
    } finally {
      await server.close();
    }
  }

  it('asks for the address and port, and shows connections or, without one, what is known of the destination', async () => {
    const asked: string[] = [];
    const connections = [
      {
        token: '0a0b0c0d',
        local: '10.0.0.1:40000',
        remote: '198.51.100.7:443',
        since: '2026-11-23T12:00:00.000Z',
        why: null,
        paths: [
          {
            detour: 'direct',
            address: null,
            state: 'active',
            bytesPerSecond: 2_000_000,
            addsBytesPerSecond: null,
            why: null,
          },
          {
            detour: 'fra',
            address: '192.0.2.1:45672',
            state: 'not used',
            bytesPerSecond: null,
            addsBytesPerSecond: 250_000,
            why: 'others add more',
          },
        ],
      },
    ];
    const explain = async (address: Address, port: number | null) => {
      asked.push(`${formatAddress(address)} ${port}`);
      return { ...answer, address: formatAddress(address), port, connections: port === 443 ? connections : [] };
    };
    await serving(explain, async (socket) => {
      const env = { DETOUR_SOCKET: socket };
      const open = await detour(['explain', '198.51.100.7:443'], env);
      expect(open).toMatchObject({ code: 0, stderr: '' });
      expect(open.stdout).toMatch(/^198\.51\.100\.7, port 443$/m);
      expect(open.stdout).toMatch(/^connection 0a0b0c0d, 10\.0\.0\.1:40000 to 198\.51\.100\.7:443, since \S+$/m);
      expect(open.stdout).toMatch(/^ {2}DETOUR +ADDRESS +STATE +RATE +ADDS +WHY$/m);
      expect(open.stdout).toMatch(/^ {2}direct +- +active +16\.0 Mbit\/s +- +-$/m);
      expect(open.stdout).toMatch(/^ {2}fra +\S+ +not used +- +2\.0 Mbit\/s +others add more$/m);
      const none = await detour(['explain', '198.51.100.7'], env);
      expect(none.stdout).toMatch(
        /^no connection to it; what is known of \S+; the direct path carried 20\.0 Mbit\/s$/m,
      );
      expect(none.stdout).toMatch(/^ {2}fra +\S+ +up +10\.0 Mbit\/s +measured$/m);
      const json = await detour(['explain', '[2001:db8::7]:8443', '--json'], env);
      expect(JSON.parse(json.stdout)).toEqual([{ ...answer, address: '2001:db8::7', port: 8443 }]);
      const name = await detour(['explain', 'localhost'], env);
      expect(name.code).toBe(0);
      expect(name.stdout).toMatch(/^localhost: (127\.0\.0\.1|::1)$/m);
    });
    expect(asked.slice(0, 3)).toEqual(['198.51.100.7 443', '198.51.100.7 null', '2001:db8::7 8443']);
  });

  it('says so when the name does not resolve, and when the daemon is a router', async () => {
    const unknown = await detour(['explain', 'no-such-host.invalid']);
    expect(unknown.code).toBe(1);
    expect(unknown.stderr).toMatch(/^no-such-host\.invalid does not resolve \(\w+\): check with `getent ahosts/);
    await serving(undefined, async (socket) => {
      const { code, stderr } = await detour(['explain', '192.0.2.1'], { DETOUR_SOCKET: socket });
      expect({ code, stderr }).toEqual({
        code: 1,
        stderr: 'this daemon is a router: explain asks a client, see DETOUR_SOCKET\n',
      });
    });
  });
});

it('version prints name, version and revision', async () => {
  const { code, stdout } = await detour(['version']);
  expect(code).toBe(0);
  expect(stdout).toMatch(/^detour \d+\.\d+\.\d+\S* \S+\n$/);
});

it('doctor needs no configuration, and its answer agrees with its exit code', async () => {
  const { code, stdout } = await detour(['doctor', '--json']);
  const { ok, checks }: { ok: boolean; checks: { name: string; state: string; fix: string[] }[] } = JSON.parse(stdout);
  expect(code).toBe(ok ? 0 : 1);
  expect(ok).toBe(checks.every(({ state }) => state !== 'fail'));
  expect(checks.map(({ name }) => name)).toEqual(
    expect.arrayContaining(['kernel', 'net-admin', 'nft', 'mptcp', 'conntrack', 'lease-ports']),
  );
  for (const { state, fix } of checks) if (state !== 'ok') expect(fix.length).toBeGreaterThan(0);
});
