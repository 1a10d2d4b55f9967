import { execFile } from 'node:child_process';
import { readdirSync, readFileSync, readlinkSync } from 'node:fs';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { engine, vps } from './engine.ts';

const run = promisify(execFile);

/** What an engine is known to leave behind on a host that runs it directly. */
async function hostState(): Promise<string> {
  const links = readdirSync('/sys/class/net').filter((name) => /^(docker|br-|veth)/.test(name));
  const rules = (await run('nft', ['-s', 'list', 'ruleset'])).stdout;
  const mounts = readFileSync('/proc/self/mounts', 'utf8').match(/^.*(docker|detour-vps|overlay).*$/gm) ?? [];
  const forward = readFileSync('/proc/sys/net/ipv4/ip_forward', 'utf8');
  return JSON.stringify({ links, rules, mounts, forward }, null, 1);
}

async function namespace(name: string): Promise<AsyncDisposable> {
  await run('ip', ['netns', 'add', name]);
  return { [Symbol.asyncDispose]: async () => void (await run('ip', ['netns', 'del', name])) };
}

describe('an engine in a namespace', () => {
  it.each(['nft', 'legacy'] as const)('is a VPS with FORWARD DROP, by iptables-%s', async (flavour) => {
    const name = `engine-test-${process.pid}`;
    const before = await hostState();
    {
      await using _namespace = await namespace(name);
      await using machine = await vps(name, flavour);
      const inside = (...command: string[]) => run('ip', ['netns', 'exec', name, ...command]);

      await machine.load('detour-router:dev', await engine());
      const { stdout, code } = await machine.run({
        image: 'detour-router:dev',
        entrypoint: ['cat', '/proc/net/dev'],
        host: { NetworkMode: 'host' },
      });
      expect(code).toBe(0);
      // `--network host` there is our namespace, which has Docker's bridge and none of the real machine's links.
      expect(stdout).toContain('docker0');
      expect((await inside('cat', '/proc/net/dev')).stdout.match(/^ *\w+:/gm)).toEqual(stdout.match(/^ *\w+:/gm));
      expect((await inside(`iptables-${flavour}`, '-S', 'FORWARD')).stdout).toContain('-P FORWARD DROP');
      const other = flavour === 'nft' ? 'iptables-legacy' : 'iptables-nft';
      expect((await inside(other, '-S', 'FORWARD')).stdout).toContain('-P FORWARD ACCEPT');
    }
    expect(await hostState()).toBe(before);
  });

  it('takes everything with it when it is killed, and starts again on the same store', async () => {
    const name = `engine-kill-${process.pid}`;
    const before = await hostState();
    {
      await using _namespace = await namespace(name);
      await using machine = await vps(name);
      await machine.load('detour-router:dev', await engine());
      await using container = await machine.start({ image: 'detour-router:dev', entrypoint: ['sleep', '3600'] });
      const init = Number(/^\/proc\/(\d+)\//.exec(await container.networkNamespace())?.[1]);
      const theirs = readlinkSync(`/proc/${init}/ns/pid`);
      expect(within(theirs)).toBeGreaterThan(3);

      await machine.kill();
      expect(within(theirs)).toBe(0);
      await machine.restart();
      const { State } = await container.docker.inspect();
      expect(State.Running).toBe(false);
    }
    expect(await hostState()).toBe(before);
  });

  it('runs containers that ask for what this machine may refuse', async () => {
    const name = `engine-ask-${process.pid}`;
    await using _namespace = await namespace(name);
    await using machine = await vps(name);
    await machine.load('detour-router:dev', await engine());
    const spec = { image: 'detour-router:dev', entrypoint: ['true'] };
    // As the kubelet does for a pod of its best class.
    expect((await machine.run({ ...spec, host: { OomScoreAdj: -998 } })).code).toBe(0);
    expect((await machine.run({ ...spec, host: { Privileged: true } })).code).toBe(0);
  });
});

/** How many processes live in that pid namespace. */
function within(pidNamespace: string): number {
  return readdirSync('/proc').filter((entry) => {
    try {
      return /^\d+$/.test(entry) && readlinkSync(`/proc/${entry}/ns/pid`) === pidNamespace;
    } catch {
      // It ended while we looked.
      return false;
    }
  }).length;
}
