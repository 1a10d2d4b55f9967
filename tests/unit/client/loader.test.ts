import { describe, expect, test } from 'vitest';
import { isLoaded, load, unload } from '../../../appliance/client/loader.ts';
import { Fatal } from '../../../appliance/exit.ts';
import type { Log } from '../../../appliance/log.ts';
import { FakeMemory, FakeSysctl } from '../../fakes/host.ts';

const log: Log = { debug() {}, info() {}, warn() {}, error() {} };

const KERNELS = {
  'Linux 6.15 and later': {
    parameter: 'net.mptcp.path_manager',
    before: 'kernel',
    userspace: 'userspace',
    values: { 'net.mptcp.enabled': '1', 'net.mptcp.path_manager': 'kernel', 'net.mptcp.pm_type': '0' },
  },
  'Linux 6.6 to 6.14': {
    parameter: 'net.mptcp.pm_type',
    before: '0',
    userspace: '1',
    values: { 'net.mptcp.enabled': '1', 'net.mptcp.pm_type': '0' },
  },
} as const;

const failure = async (task: Promise<unknown>): Promise<Fatal> => {
  const error = await task.then(
    () => null,
    (thrown: unknown) => thrown,
  );
  if (!(error instanceof Fatal)) throw new Error(`not Fatal: ${error}`);
  return error;
};

describe.each(Object.entries(KERNELS))('%s', (_, { parameter, before, userspace, values }) => {
  const host = () => ({ sysctl: new FakeSysctl(values), memory: new FakeMemory(), log });

  test('selects the userspace path manager and puts back what was there, both as often as you like', async () => {
    const ports = host();
    await load(ports, 'daemon');
    await load(ports, 'daemon');
    expect(ports.sysctl.values.get(parameter)).toBe(userspace);
    expect(await isLoaded(ports.sysctl)).toBe(true);
    await unload(ports, 'daemon');
    expect(ports.sysctl.values.get(parameter)).toBe(before);
    expect(ports.memory.values).toBeNull();
    await unload(ports, 'daemon');
    expect(ports.sysctl.values.get(parameter)).toBe(before);
  });

  test('after a crash the first one’s memory counts', async () => {
    const ports = host();
    await load(ports, 'daemon');
    await load({ ...ports }, 'daemon');
    await unload(ports, 'daemon');
    expect(ports.sysctl.values.get(parameter)).toBe(before);
  });

  test('what was there already is not ours to undo', async () => {
    const ports = host();
    ports.sysctl.values.set(parameter, userspace);
    await load(ports, 'daemon');
    await unload(ports, null);
    expect(ports.sysctl.values.get(parameter)).toBe(userspace);
  });

  test('a daemon leaves alone what `detour load` did; `detour unload` undoes either', async () => {
    const ports = host();
    await load(ports, 'load');
    await load(ports, 'daemon');
    await unload(ports, 'daemon');
    expect(ports.sysctl.values.get(parameter)).toBe(userspace);
    await unload(ports, null);
    expect(ports.sysctl.values.get(parameter)).toBe(before);
    await load(ports, 'daemon');
    await unload(ports, null);
    expect(ports.sysctl.values.get(parameter)).toBe(before);
  });

  test('a read-only /proc/sys is an error that names the mount', async () => {
    const ports = host();
    ports.sysctl.readOnly.add(parameter);
    const { exitCode, message } = await failure(load(ports, 'daemon'));
    expect(exitCode).toBe(69);
    expect(message).toContain(`${parameter}=${userspace}: EROFS`);
    expect(message).toContain('-v /proc/sys/net:/host/proc/sys/net');
    expect(message).toContain('DETOUR_SYSCTL_ROOT=/host/proc/sys');
    expect(ports.memory.values).toBeNull();
  });

  test('what cannot be remembered is not changed', async () => {
    const ports = host();
    ports.memory.broken = true;
    expect((await failure(load(ports, 'daemon'))).exitCode).toBe(69);
    expect(ports.sysctl.values.get(parameter)).toBe(before);
  });

  test('what cannot be put back stays remembered', async () => {
    const ports = host();
    await load(ports, 'daemon');
    ports.sysctl.readOnly.add(parameter);
    expect((await failure(unload(ports, 'daemon'))).exitCode).toBe(69);
    ports.sysctl.readOnly.clear();
    await unload(ports, 'daemon');
    expect(ports.sysctl.values.get(parameter)).toBe(before);
  });

  test('somebody else’s choice since then is theirs', async () => {
    const ports = host();
    await load(ports, 'daemon');
    ports.sysctl.values.set(parameter, 'theirs');
    await unload(ports, 'daemon');
    expect(ports.sysctl.values.get(parameter)).toBe('theirs');
    expect(ports.memory.values).toBeNull();
  });
});

test.each([
  ['a kernel without MPTCP', {}, 'CONFIG_MPTCP'],
  ['MPTCP switched off', { 'net.mptcp.enabled': '0' }, 'sysctl -w net.mptcp.enabled=1'],
  ['a kernel before 5.19', { 'net.mptcp.enabled': '1' }, 'Linux 6.6'],
])('%s is an error that says what helps', async (_, values, remedy) => {
  const { exitCode, message } = await failure(
    load({ sysctl: new FakeSysctl(values), memory: new FakeMemory(), log }, 'daemon'),
  );
  expect(exitCode).toBe(69);
  expect(message).toContain(remedy);
});
