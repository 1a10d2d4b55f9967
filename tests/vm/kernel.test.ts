import { existsSync, mkdirSync, readFileSync, rmdirSync, writeFileSync } from 'node:fs';
import { release } from 'node:os';
import { describe, expect, it } from 'vitest';
import { type Host, Lab, requireVm } from '../lab/netns.ts';
import { loadModules, MODULES } from './modules.ts';

/** The best of ten round trips in ms, so that a stall of the machine does not count; null when nothing came back. */
async function roundTrip(from: Host, to: string): Promise<number | null> {
  const { stdout } = await from.try(['ping', '-q', '-c', '10', '-i', '0.1', '-W', '2', to]);
  const best = /= ([\d.]+)\//.exec(stdout)?.[1];
  return best === undefined ? null : Number(best);
}

describe.runIf(requireVm('tests of what the VM is for'))('the kernel of the VM', () => {
  it('is that of a distribution, whose MPTCP chooses the path manager by number alone', () => {
    const [major = 0, minor = 0] = release().split('.').map(Number);
    expect(major * 1000 + minor).toBeGreaterThanOrEqual(6012);
    expect(existsSync('/proc/sys/net/mptcp/pm_type')).toBe(true);
    expect(existsSync('/proc/sys/net/mptcp/path_manager')).toBe(false);
  });

  it('delays what a link carries, in both directions or in one', async () => {
    await using lab = await Lab.create('vm.delay');
    const [left, right] = [await lab.host('left'), await lab.host('right')];
    const link = await lab.link(left, right, { v4: '10.77.1.0/30', delayMs: 150 });
    expect(await roundTrip(left, '10.77.1.2')).toBeGreaterThanOrEqual(300);
    await link.shape({}, right);
    const oneWay = await roundTrip(left, '10.77.1.2');
    expect(oneWay).toBeGreaterThanOrEqual(150);
    expect(oneWay).toBeLessThan(300);
    await link.shape({});
    expect(await roundTrip(left, '10.77.1.2')).toBeLessThan(150);
  });

  it('delays behind a limited rate, and keeps both when numbers change', async () => {
    await using lab = await Lab.create('vm.rate');
    const [left, right] = [await lab.host('left'), await lab.host('right')];
    const link = await lab.link(left, right, { v4: '10.77.1.0/30', rateMbit: 10, queueMs: 100, delayMs: 50 });
    for (const conditions of [
      { rateMbit: 2, delayMs: 100 },
      { rateMbit: 1 },
      { rateMbit: 4, delayMs: 150, lossPercent: 1 },
    ]) {
      await link.shape(conditions);
      const shown = await left.exec(['tc', 'qdisc', 'show', 'dev', link.at(left).dev]);
      expect(shown).toContain(`rate ${conditions.rateMbit}Mbit`);
      if (conditions.delayMs === undefined) expect(shown).not.toContain('netem');
      else expect(shown).toContain(`delay ${conditions.delayMs}ms`);
    }
    expect(await roundTrip(left, '10.77.1.2')).toBeGreaterThanOrEqual(300);
  });

  it('loses what a link carries', async () => {
    await using lab = await Lab.create('vm.loss');
    const [left, right] = [await lab.host('left'), await lab.host('right')];
    const link = await lab.link(left, right, { v4: '10.77.1.0/30', lossPercent: 100 });
    expect(await roundTrip(left, '10.77.1.2')).toBeNull();
    await link.shape({});
    expect(await roundTrip(left, '10.77.1.2')).not.toBeNull();
  });

  it('has WireGuard', async () => {
    await using lab = await Lab.create('vm.wg');
    const host = await lab.host('only');
    await host.exec(['ip', 'link', 'add', 'wg0', 'type', 'wireguard']);
    await host.exec(['ip', 'link', 'set', 'wg0', 'up']);
    expect(await host.exec(['ip', '-details', 'link', 'show', 'wg0'])).toContain('wireguard');
  });

  it('has one tree of control groups, of version 2', () => {
    const group = '/sys/fs/cgroup/kernel-test';
    mkdirSync(group);
    try {
      writeFileSync(`${group}/cgroup.procs`, String(process.pid));
      expect(readFileSync('/proc/self/cgroup', 'utf8')).toBe('0::/kernel-test\n');
    } finally {
      writeFileSync('/sys/fs/cgroup/cgroup.procs', String(process.pid));
      rmdirSync(group);
    }
  });

  it('has what programs for the kernel need: its types, and file systems to keep and to trace them', () => {
    expect(existsSync('/sys/kernel/btf/vmlinux')).toBe(true);
    const mounted = readFileSync('/proc/mounts', 'utf8');
    for (const place of ['/sys/fs/bpf bpf', '/sys/kernel/debug debugfs', '/sys/kernel/tracing tracefs']) {
      expect(mounted).toContain(` ${place} `);
    }
  });

  it('loads the modules of laboratories', async () => {
    await loadModules();
    const loaded = readFileSync('/proc/modules', 'utf8');
    for (const name of MODULES) expect(loaded).toMatch(new RegExp(`^${name} `, 'm'));
  });
});
