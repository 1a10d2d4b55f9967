import { describe, expect, test } from 'vitest';
import { ACCEPTED_SUBFLOWS, lower, raise } from '../../../appliance/client/limits.ts';
import { Fatal } from '../../../appliance/exit.ts';
import type { SubflowLimit } from '../../../appliance/kernel/mptcp.ts';
import { NetlinkError } from '../../../appliance/kernel/netlink.ts';
import type { Log } from '../../../appliance/log.ts';
import { FakeMemory } from '../../fakes/host.ts';

const log: Log = { debug() {}, info() {}, warn() {}, error() {} };

/** As the kernel: at most 8. */
class FakeLimit implements SubflowLimit {
  value = 2;
  refused = false;

  async read(): Promise<number> {
    return this.value;
  }

  async write(subflows: number): Promise<void> {
    if (this.refused) throw new NetlinkError('changing the limit of subflows', 'EPERM');
    if (subflows > 8) throw new NetlinkError('changing the limit of subflows', 'EINVAL');
    this.value = subflows;
  }
}

const host = () => ({ limit: new FakeLimit(), memory: new FakeMemory(), log });

describe('the limit of extra subflows', () => {
  test('is raised and put back, both as often as you like', async () => {
    const ports = host();
    await raise(ports, 'daemon');
    await raise(ports, 'daemon');
    expect(ports.limit.value).toBe(ACCEPTED_SUBFLOWS);
    await lower(ports, 'daemon');
    await lower(ports, 'daemon');
    expect(ports.limit.value).toBe(2);
    expect(ports.memory.values).toBeNull();
  });

  test('a higher one stays, and is not ours to undo', async () => {
    const ports = host();
    ports.limit.value = 64;
    await raise(ports, 'daemon');
    await lower(ports, null);
    expect(ports.limit.value).toBe(64);
  });

  test('after a crash the first one’s memory counts', async () => {
    const ports = host();
    await raise(ports, 'daemon');
    await raise({ ...ports }, 'daemon');
    await lower(ports, 'daemon');
    expect(ports.limit.value).toBe(2);
  });

  test('a daemon leaves alone what `detour load` did; `detour unload` undoes either', async () => {
    const ports = host();
    await raise(ports, 'load');
    await lower(ports, 'daemon');
    expect(ports.limit.value).toBe(ACCEPTED_SUBFLOWS);
    await lower(ports, null);
    expect(ports.limit.value).toBe(2);
  });

  test('somebody else’s choice since then is theirs', async () => {
    const ports = host();
    await raise(ports, 'daemon');
    ports.limit.value = 4;
    await lower(ports, 'daemon');
    expect(ports.limit.value).toBe(4);
    expect(ports.memory.values).toBeNull();
  });

  test('what cannot be remembered or changed is an error, and nothing has changed', async () => {
    const forgetful = host();
    forgetful.memory.broken = true;
    await expect(raise(forgetful, 'daemon')).rejects.toBeInstanceOf(Fatal);
    expect(forgetful.limit.value).toBe(2);
    const denied = host();
    denied.limit.refused = true;
    await expect(raise(denied, 'daemon')).rejects.toThrow('8 extra subflows');
    expect(denied.memory.values).toBeNull();
  });

  test('what cannot be put back stays remembered', async () => {
    const ports = host();
    await raise(ports, 'daemon');
    ports.limit.refused = true;
    await expect(lower(ports, 'daemon')).rejects.toBeInstanceOf(Fatal);
    ports.limit.refused = false;
    await lower(ports, 'daemon');
    expect(ports.limit.value).toBe(2);
  });
});
