import { execFile } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, readdirSync } from 'node:fs';
import { fileURLToPath } from 'node:url';
import { promisify } from 'node:util';
import { describe, expect, it } from 'vitest';
import { type Host, Lab, LabError, requireRoot, waitUntil } from '../lab/netns.ts';

const run = promisify(execFile);

describe.runIf(requireRoot('tests of the network laboratory'))('the network laboratory', () => {
  it('joins two hosts over both families', async () => {
    await using lab = await Lab.create('lab.join');
    const [left, right] = [await lab.host('left'), await lab.host('right')];
    const link = await lab.link(left, right, { v4: '10.77.1.0/30', v6: 'fd77:1::/64' });
    expect(link.at(left)).toMatchObject({ v4: '10.77.1.1', v6: 'fd77:1::1', dev: 'to-right' });
    await echo(right);
    expect(await ask(left, '10.77.1.2')).toBe('answered');
    expect(await ask(left, 'fd77:1::2')).toBe('answered');
  });

  it('routes through a host in the middle, which forwards only when told to', async () => {
    await using lab = await Lab.create('lab.route');
    const [left, middle, right] = [await lab.host('left'), await lab.host('middle'), await lab.host('right')];
    await lab.link(left, middle, { v4: '10.77.1.0/30', v6: 'fd77:1::/64' });
    await lab.link(middle, right, { v4: '10.77.2.0/30', v6: 'fd77:2::/64' });
    for (const hop of ['10.77.1.2', 'fd77:1::2']) await left.route(`default via ${hop}`);
    for (const hop of ['10.77.2.1', 'fd77:2::1']) await right.route(`default via ${hop}`);
    await echo(right);
    expect(await ask(left, '10.77.2.2')).toBe('silence');
    await middle.forward();
    expect(await ask(left, '10.77.2.2')).toBe('answered');
    expect(await ask(left, 'fd77:2::2')).toBe('answered');
  });

  it('limits the rate of a link', async () => {
    await using lab = await Lab.create('lab.rate');
    const [left, right] = [await lab.host('left'), await lab.host('right')];
    await lab.link(left, right, { v4: '10.77.1.0/30', rateMbit: 20 });
    const server = right.spawn(['iperf3', '-s', '-1', '--forceflush']);
    await server.waitFor('Server listening');
    const report = JSON.parse(await left.exec(['iperf3', '-c', '10.77.1.2', '-t', '2', '-J']));
    const mbps = report.end.sum_received.bits_per_second / 1e6;
    expect(mbps).toBeGreaterThan(16);
    expect(mbps).toBeLessThan(20.5);
  });

  it('delays, or says what that takes', async () => {
    await using lab = await Lab.create('lab.delay');
    const [left, right] = [await lab.host('left'), await lab.host('right')];
    const outcome = await lab.link(left, right, { v4: '10.77.1.0/30', delayMs: 10 }).then(
      (link) => left.exec(['tc', 'qdisc', 'show', 'dev', link.at(left).dev]),
      (error: unknown) => String(error),
    );
    expect(outcome).toMatch(/delay 10ms|this kernel has no netem .* run the test in the VM/);
  });

  it('swallows one direction or both without a word, counts it, and restores it', async () => {
    await using lab = await Lab.create('lab.hole');
    const [left, right] = [await lab.host('left'), await lab.host('right')];
    const link = await lab.link(left, right, { v4: '10.77.1.0/30', v6: 'fd77:1::/64' });
    await echo(right);
    const reach = (): Promise<string[]> => Promise.all([ask(left, '10.77.1.2'), ask(left, 'fd77:1::2')]);
    expect(await reach()).toEqual(['answered', 'answered']);
    await link.blackhole(left);
    expect(await reach()).toEqual(['silence', 'silence']);
    expect(await link.swallowed(left)).toBeGreaterThanOrEqual(2);
    await link.restore(left);
    expect(await reach()).toEqual(['answered', 'answered']);
    await link.blackhole();
    expect(await reach()).toEqual(['silence', 'silence']);
    await link.restore();
    expect(await reach()).toEqual(['answered', 'answered']);
    expect(await right.exec(['nft', 'list', 'ruleset'])).toBe('');
    await link.down(left);
    expect(await reach()).toEqual(['ENETUNREACH', 'ENETUNREACH']);
    await link.up(left);
    await waitUntil(async () => (await ask(left, '10.77.1.2')) === 'answered', {
      deadlineMs: 5_000,
      what: 'the link to come back',
    });
  });

  it('names the command and what it said when a command fails', async () => {
    await using lab = await Lab.create('lab.error');
    const host = await lab.host('only');
    const failure = await host.exec(['nft', 'list', 'table', 'inet', 'nowhere']).catch((error: unknown) => error);
    expect(failure).toBeInstanceOf(LabError);
    expect(String(failure)).toMatch(/only: `nft list table inet nowhere` ended with 1: .*No such file/s);
  });

  it('follows a program: its lines, its end, and a complaint that shows its output', async () => {
    await using lab = await Lab.create('lab.spawn');
    const host = await lab.host('only');
    const program = host.spawn(['sh', '-c', 'echo ready; read answer; echo "got $answer"; exit 3']);
    await program.waitFor('ready', 5_000);
    program.write('42\n');
    expect(await program.waitFor(/^got \d+$/, 5_000)).toBe('got 42');
    expect(await program.exited).toEqual({ code: 3, signal: null });
    await expect(program.waitFor('never', 5_000)).rejects.toThrow(/ended before it printed never.*got 42/s);
    const silent = host.spawn(['sleep', '60']);
    await expect(silent.waitFor('anything', 100)).rejects.toThrow(/did not print anything within 100 ms/);
  });

  it('keeps sysctls to the host', async () => {
    await using lab = await Lab.create('lab.sysctl');
    const [left, right] = [await lab.host('left'), await lab.host('right')];
    const before = await right.sysctl('net.ipv4.tcp_syn_retries');
    await left.sysctl('net.ipv4.tcp_syn_retries', 3);
    expect(await left.sysctl('net.ipv4.tcp_syn_retries')).toBe('3');
    expect(await right.sysctl('net.ipv4.tcp_syn_retries')).toBe(before);
  });

  it('leaves nothing behind, not even programs, when a test throws', async () => {
    let namespace = '';
    let pid = 0;
    const fails = async (): Promise<void> => {
      await using lab = await Lab.create('lab.gone');
      const host = await lab.host('only');
      namespace = host.namespace;
      const program = host.spawn(['sh', '-c', 'trap "" TERM; setsid sleep 60 & echo child $!; wait']);
      pid = Number((await program.waitFor(/^child \d+/)).split(' ')[1]);
      expect(existsSync(`/proc/${pid}`)).toBe(true);
      throw new Error('the test failed');
    };
    await expect(fails()).rejects.toThrow('the test failed');
    expect(existsSync(`/run/netns/${namespace}`)).toBe(false);
    await waitUntil(() => !isRunning(pid), { deadlineMs: 5_000, what: 'the escaped child to die' });
  });

  it('removes the remains of a killed run of the same name, and nothing of a live one', async () => {
    const module = fileURLToPath(new URL('../lab/netns.ts', import.meta.url));
    const text = `import { Lab } from ${JSON.stringify(module)};
      const lab = await Lab.create('lab.stale');
      const host = await lab.host('only');
      host.spawn(['sleep', '600']);
      console.log(host.namespace);
      setInterval(() => {}, 1000);`;
    const child = execFile(process.execPath, ['--input-type=module', '-e', text]);
    const [line] = await once(child.stdout ?? fail(), 'data');
    const namespace = String(line).trim();
    {
      await using live = await Lab.create('lab.stale');
      await live.host('only');
      expect(existsSync(`/run/netns/${namespace}`)).toBe(true);
    }
    const [pid] = (await run('ip', ['netns', 'pids', namespace])).stdout.split('\n');
    child.kill('SIGKILL');
    await once(child, 'exit');
    expect(existsSync(`/run/netns/${namespace}`)).toBe(true);
    await using next = await Lab.create('lab.stale');
    expect(readdirSync('/run/netns').filter((name) => name.includes('lab.stale'))).toEqual([]);
    expect((await next.host('only')).namespace).not.toBe(namespace);
    await waitUntil(() => !isRunning(Number(pid)), { deadlineMs: 5_000, what: 'the stale program to die' });
  });
});

/** Answers every datagram on port 7 of both families. */
async function echo(host: Host): Promise<void> {
  const program = host.spawn([
    process.execPath,
    '-e',
    `const s = require('dgram').createSocket('udp6');
     s.on('message', (m, from) => s.send(m, from.port, from.address));
     s.bind(7, '::', () => console.log('listening'));`,
  ]);
  await program.waitFor('listening');
}

/** Sends one datagram to the echo: 'answered', 'silence' after half a second, or the local error's code. */
async function ask(host: Host, address: string): Promise<string> {
  const said = await host.exec([
    process.execPath,
    '-e',
    `const s = require('dgram').createSocket('${address.includes(':') ? 'udp6' : 'udp4'}');
     const end = (said) => { console.log(said); process.exit(); };
     s.on('message', () => end('answered'));
     s.send('hello', 7, '${address}', (error) => { if (error) end(error.code); });
     setTimeout(() => end('silence'), 500);`,
  ]);
  return said.trim();
}

function isRunning(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch {
    return false;
  }
}

function fail(): never {
  throw new Error('the child has no standard output');
}
