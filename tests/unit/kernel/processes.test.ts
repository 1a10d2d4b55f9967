import { mkdirSync, mkdtempSync, rmSync, statSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { expect, onTestFinished, test } from 'vitest';
import { ownNamespace } from '../../../appliance/kernel/namespaces.ts';
import { systemProcesses } from '../../../appliance/kernel/processes.ts';

const [A, B, C] = ['a', 'b', 'c'].map((letter) => `${letter}1`.repeat(32)) as [string, string, string];
const UID = '0f5c2a6e-8f0a-4f0e-9d8e-3c8a2b1d4e5f';

/** A /proc of our own, in which a namespace is a file. */
function makeTree() {
  const root = mkdtempSync(join(tmpdir(), 'detour-proc-'));
  onTestFinished(() => rmSync(root, { recursive: true, force: true }));
  mkdirSync(join(root, 'namespaces'));
  // What else there is in /proc.
  mkdirSync(join(root, 'sys'));
  writeFileSync(join(root, 'uptime'), '1 1\n');
  const namespaceOf = (name: string): string => {
    const { dev, ino } = statSync(join(root, 'namespaces', name), { bigint: true });
    return `${dev}:${ino}`;
  };
  return {
    root,
    processes: systemProcesses(root),
    namespaceOf,
    pathOf: (pid: number) => join(root, String(pid), 'ns/net'),
    run(pid: number, namespace: string | null, cgroup: string): void {
      mkdirSync(join(root, String(pid), 'ns'), { recursive: true });
      writeFileSync(join(root, String(pid), 'cgroup'), cgroup);
      if (namespace === null) return;
      writeFileSync(join(root, 'namespaces', namespace), '', { flag: 'a' });
      symlinkSync(join(root, 'namespaces', namespace), join(root, String(pid), 'ns/net'));
    },
    end(pid: number): void {
      rmSync(join(root, String(pid)), { recursive: true });
    },
  };
}

const POD = UID.replaceAll('-', '_');

test.each([
  ['Docker, version 1', A, `12:pids:/docker/${A}\n11:memory:/docker/${A}\n`],
  ['Docker, version 2', A, `0::/system.slice/docker-${A}.scope\n`],
  ['another container in a cgroup namespace of its own', A, `0::/../docker-${A}.scope\n`],
  ['containerd, cgroupfs', A, `0::/kubepods/besteffort/pod${UID}/${A}\n`],
  ['containerd, systemd', A, `0::/kubepods.slice/kubepods-pod${POD}.slice/cri-containerd-${A}.scope\n`],
  ['CRI-O', A, `0::/kubepods.slice/kubepods-burstable-pod${POD}.slice/crio-${A}.scope/container\n`],
  ['a pod by its uid, cgroupfs', UID, `0::/kubepods/burstable/pod${UID}/${B}\n`],
  ['a pod by its uid, systemd', UID, `0::/kubepods.slice/kubepods-pod${POD}.slice/cri-containerd-${B}.scope\n`],
])('finds a process by its control group: %s', async (_, word, cgroup) => {
  const tree = makeTree();
  tree.run(1, 'host', '0::/init.scope\n');
  tree.run(7, 'pod', cgroup);
  const { processes, refused } = await tree.processes.find(new Set([word, C]));
  expect([...processes]).toEqual([[word, { path: tree.pathOf(7), namespace: tree.namespaceOf('pod') }]]);
  expect(refused).toBeNull();
  expect(await tree.processes.pathOf(7, word)).toBe(tree.pathOf(7));
});

test('finds one for each among very many', async () => {
  const tree = makeTree();
  const ids = Array.from({ length: 40 }, (_, index) => index.toString(16).padStart(64, 'e'));
  for (let pid = 1; pid <= 800; pid++) tree.run(pid, `n${pid % 40}`, `0::/docker/${ids[pid % 40]}\n`);
  const { processes } = await tree.processes.find(new Set(ids));
  expect(processes.size).toBe(40);
  for (const [index, id] of ids.entries()) expect(processes.get(id)?.namespace).toBe(tree.namespaceOf(`n${index}`));
});

test('passes over what ends while it looks, threads of the kernel, and what only looks alike', async () => {
  const tree = makeTree();
  tree.run(2, null, '');
  // Its control group can still be read, its namespace is gone.
  tree.run(3, null, `0::/docker/${A}\n`);
  tree.run(4, 'other', `0::/docker/${A.slice(0, 63)}\n`);
  tree.run(5, 'right', `0::/docker/${A}\n`);
  const { processes } = await tree.processes.find(new Set([A, B]));
  expect([...processes.keys()]).toEqual([A]);
  expect(processes.get(A)?.path).toBe(tree.pathOf(5));
});

test('a process holds its namespace until it ends, or its number is another’s', async () => {
  const tree = makeTree();
  tree.run(5, 'first', `0::/docker/${A}\n`);
  const found = (await tree.processes.find(new Set([A]))).processes.get(A);
  if (!found) throw new Error('not found');
  expect(tree.processes.holds(found)).toBe(true);
  tree.end(5);
  expect(tree.processes.holds(found)).toBe(false);
  tree.run(5, 'second', `0::/docker/${B}\n`);
  expect(tree.processes.holds(found)).toBe(false);
});

test('a number that means another process in this pid namespace leads nowhere', async () => {
  const tree = makeTree();
  tree.run(5, 'own', `0::/docker/${B}\n`);
  expect(await tree.processes.pathOf(5, A)).toBeNull();
  expect(await tree.processes.pathOf(6, A)).toBeNull();
  expect(await tree.processes.pathOf(0, A)).toBeNull();
});

test('the real /proc says of this process what the kernel says', () => {
  const own = { path: `/proc/${process.pid}/ns/net`, namespace: ownNamespace.id };
  expect(systemProcesses().holds(own)).toBe(true);
  expect(systemProcesses().holds({ ...own, namespace: '0:0' })).toBe(false);
});
