import { expect, test } from 'vitest';
import { readPod } from '../../../appliance/kernel/pods.ts';

const ID = 'ab'.repeat(32);
const OTHER = 'cd'.repeat(32);

const pod = (changes: { metadata?: object; spec?: object; status?: object } = {}) => ({
  metadata: {
    uid: '0f5c2a6e-8f0a-4f0e-9d8e-3c8a2b1d4e5f',
    name: 'web-0',
    namespace: 'shop',
    annotations: { 'detour.dev/enable': 'true' },
    ...changes.metadata,
  },
  spec: { nodeName: 'node-1', ...changes.spec },
  status: { phase: 'Running', ...changes.status },
});

test('reads what concerns whose network a pod has', () => {
  const containerStatuses = [
    { name: 'app', containerID: `containerd://${ID}`, state: { running: { startedAt: '2026-01-01T00:00:00Z' } } },
    { name: 'done', containerID: `containerd://${'ef'.repeat(32)}`, state: { terminated: { exitCode: 0 } } },
    { name: 'waiting', state: { waiting: { reason: 'ContainerCreating' } } },
  ];
  const initContainerStatuses = [{ name: 'proxy', containerID: `cri-o://${OTHER}`, state: { running: {} } }];
  expect(readPod(pod({ status: { containerStatuses, initContainerStatuses } }))).toEqual({
    uid: '0f5c2a6e-8f0a-4f0e-9d8e-3c8a2b1d4e5f',
    name: 'shop/web-0',
    annotations: { 'detour.dev/enable': 'true' },
    hostNetwork: false,
    ended: false,
    containers: [ID, OTHER],
  });
});

test.each([
  ['Pending', false],
  ['Running', false],
  ['Succeeded', true],
  ['Failed', true],
  [undefined, false],
])('a pod in phase %s has ended: %s', (phase, ended) => {
  expect(readPod(pod({ status: { phase } }))?.ended).toBe(ended);
});

test('knows a pod on the host’s network', () => {
  expect(readPod(pod({ spec: { hostNetwork: true } }))?.hostNetwork).toBe(true);
  expect(readPod(pod({ spec: { hostNetwork: 'yes' } }))?.hostNetwork).toBe(false);
});

test.each([
  ['nothing', {}],
  ['no uid', pod({ metadata: { uid: undefined } })],
  ['a uid that is no text', pod({ metadata: { uid: 7 } })],
  ['no name', pod({ metadata: { name: null } })],
  ['metadata of another kind', { metadata: [], spec: 1, status: 'x' }],
])('%s is no pod', (_, object) => {
  expect(readPod(object)).toBeNull();
});

test('what has another type than it should counts as absent', () => {
  const odd = pod({
    metadata: { annotations: { 'detour.dev/enable': true, good: 'text', deep: {} } },
    spec: { hostNetwork: 1 },
    status: {
      containerStatuses: [null, 'x', { containerID: 7 }, { containerID: `docker://../${ID}`, state: { running: {} } }],
    },
  });
  expect(readPod(odd)).toMatchObject({ annotations: { good: 'text' }, hostNetwork: false, containers: [] });
  expect(readPod(pod({ metadata: { annotations: null }, status: { containerStatuses: {} } }))).toMatchObject({
    annotations: {},
    containers: [],
  });
});
