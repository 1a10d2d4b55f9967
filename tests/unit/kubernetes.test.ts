import { globSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { STOP_DEADLINE_MS } from '../../appliance/exit.ts';
import { renderInvite } from '../../appliance/invite.ts';
import { describeVariables } from '../../appliance/variables.ts';
import { VERSION } from '../../appliance/version.ts';
import { RENDERED } from '../../k8s/render.ts';
import { complaintsAbout, type Manifest, readManifests } from '../lab/manifests.ts';

/** Files of k8s/ as they are in the repository. That the rendered ones are what kustomize makes is for tests/k8s/render.test.ts. */

const folder = join(import.meta.dirname, '../../k8s');
const read = (file: string): string => readFileSync(join(folder, file), 'utf8');

/** As much of a container and its pod as is looked at here. */
type Probe = {
  httpGet?: { host?: string; path: string };
  exec?: { command: string[] };
  periodSeconds: number;
  timeoutSeconds: number;
};
type Container = {
  name: string;
  image: string;
  args?: string[];
  env?: { name: string; value?: string }[];
  envFrom?: { configMapRef: { name: string; optional?: boolean } }[];
  securityContext: { capabilities: { add?: string[]; drop: string[] }; [field: string]: unknown };
  resources: { limits?: Record<string, string>; requests?: Record<string, string> };
  volumeMounts: { name: string; mountPath: string; readOnly?: boolean }[];
  startupProbe: Probe;
  livenessProbe: Probe;
  readinessProbe?: Probe;
};
type Volume = { name: string; hostPath?: { path: string }; secret?: { secretName: string; defaultMode?: number } };
type PodSpec = {
  containers: Container[];
  initContainers?: Container[];
  volumes: Volume[];
  terminationGracePeriodSeconds?: number;
  automountServiceAccountToken: boolean;
  [field: string]: unknown;
};
type Workload = {
  spec: { selector: { matchLabels: object }; template: { metadata: { labels: object }; spec: PodSpec } };
};

const rendered = Object.keys(RENDERED).map((file) => ({ file, manifests: readManifests(read(file)) }));
const sidecar = readManifests(read('overlays/sidecar-example/deployment.yaml'));
const examples = globSync('**/*.example.yaml', { cwd: folder }).map((file) => ({
  file,
  manifests: readManifests(read(file)),
}));

const workloadsOf = (manifests: readonly Manifest[]): Workload[] =>
  manifests.filter(({ kind }) => kind === 'DaemonSet' || kind === 'Deployment') as unknown as Workload[];

/** The pod that one of our manifests runs, and our container in it. */
function ours(manifests: readonly Manifest[]): { workload: Workload; pod: PodSpec; container: Container } {
  const [workload, ...others] = workloadsOf(manifests);
  const pod = workload?.spec.template.spec;
  const container = [...(pod?.initContainers ?? []), ...(pod?.containers ?? [])].find(({ image }) =>
    /^detour-/.test(image),
  );
  if (!workload || !pod || !container || others.length > 0) throw new Error('one workload with one agent was expected');
  return { workload, pod, container };
}

/** Every manifest that runs something of ours. */
const runs = [...rendered, { file: 'overlays/sidecar-example', manifests: sidecar }].map(({ file, manifests }) => ({
  file,
  ...ours(manifests),
}));
const run = (file: string): (typeof runs)[number] => {
  const found = runs.find((one) => one.file === file);
  if (!found) throw new Error(`${file} is not rendered`);
  return found;
};

describe('the schemas', () => {
  it.each([
    ...rendered,
    ...examples,
    { file: 'overlays/sidecar-example', manifests: sidecar },
    ...['podmonitor', 'prometheusrule'].map((name) => ({
      file: `components/monitoring/${name}.yaml`,
      manifests: readManifests(read(`components/monitoring/${name}.yaml`)),
    })),
  ])('take every object of $file', ({ manifests }) => {
    expect(manifests.length).toBeGreaterThan(0);
    for (const manifest of manifests) expect(complaintsAbout(manifest)).toEqual([]);
  });

  it.each([
    ['a field that does not exist', 'runAsUsr: 0', 'runAsUser: 0', /runAsUsr: is no field/],
    ['a value of another type', 'hostNetwork: sure', 'hostNetwork: true', /hostNetwork/],
    ['a kind that does not exist', 'kind: DaemonSett', 'kind: DaemonSet', /no schema for this kind/],
    ['something that is missing', '- named: client', '- name: client', /name/],
  ])('refuse %s', (_, wrong, right, complaint) => {
    const text = read('base/daemonset.yaml');
    expect(text).toContain(right);
    const [manifest] = readManifests(text.replace(right, wrong));
    expect(complaintsAbout(manifest as Manifest).join()).toMatch(complaint);
  });
});

describe('what runs', () => {
  /** In docs/kubernetes.md and docs/workloads.md, with the reasons. */
  const CAPABILITIES: Readonly<Record<string, readonly string[]>> = {
    'detour-client.yaml': ['NET_ADMIN', 'SYS_ADMIN', 'SYS_PTRACE'],
    'detour-client-host.yaml': ['NET_ADMIN'],
    'detour-router.yaml': ['NET_ADMIN'],
    'detour-server.yaml': ['NET_ADMIN', 'SYS_ADMIN', 'SYS_PTRACE'],
    'overlays/sidecar-example': ['NET_ADMIN'],
  };

  it.each(runs)('$file has the privileges that are documented and no more', ({ file, pod, container }) => {
    expect(container.securityContext).toEqual({
      runAsUser: 0,
      runAsGroup: 0,
      allowPrivilegeEscalation: false,
      readOnlyRootFilesystem: true,
      capabilities: { drop: ['ALL'], add: CAPABILITIES[file] },
      seccompProfile: { type: 'RuntimeDefault' },
    });
    expect(JSON.stringify(pod)).not.toContain('"privileged"');
    const enters = CAPABILITIES[file]?.includes('SYS_ADMIN') ?? false;
    expect(pod['hostPID'] ?? false).toBe(enters);
    expect(pod['hostIPC']).toBeUndefined();
    expect(pod['hostNetwork'] ?? false).toBe(!file.includes('sidecar'));
    // Only who watches pods gets a token.
    expect(pod.automountServiceAccountToken).toBe(enters);
  });

  it.each(runs)('$file mounts of the node at most one folder of /proc/sys', ({ file, pod }) => {
    const paths = pod.volumes.flatMap(({ hostPath }) => (hostPath ? [hostPath.path] : []));
    // The folder `mptcp` is that of the namespace it was mounted in: enough for a node alone (docs/kernel-notes.md).
    const expected: Readonly<Record<string, readonly string[]>> = {
      'detour-client-host.yaml': ['/proc/sys/net/mptcp'],
      'detour-router.yaml': [],
    };
    expect(paths).toEqual(expected[file] ?? ['/proc/sys/net']);
  });

  it.each(runs)(
    '$file gets secrets as files that root alone reads, and not in its environment',
    ({ pod, container }) => {
      for (const { secret } of pod.volumes) if (secret) expect(secret.defaultMode).toBe(0o400);
      expect(JSON.stringify(container.env)).not.toContain('secretKeyRef');
      expect(JSON.stringify(container.envFrom)).not.toContain('secretRef');
      const files = (container.env ?? []).filter(({ name }) => name.endsWith('_FILE'));
      const mounted = ({ value = '' }: { value?: string }): boolean =>
        container.volumeMounts.some(
          ({ mountPath, readOnly }) => value.startsWith(`${mountPath}/`) && readOnly === true,
        );
      expect(files.filter((one) => !mounted(one))).toEqual([]);
    },
  );

  it.each(runs)('$file names only variables that there are', ({ container }) => {
    const known = describeVariables().flatMap(({ name }) => [name, `${name}_FILE`]);
    const named = (container.env ?? []).map(({ name }) => name).filter((name) => name.startsWith('DETOUR_'));
    expect(named.filter((name) => !known.includes(name))).toEqual([]);
  });

  it.each(runs)('$file pins its images by a tag', ({ pod }) => {
    for (const { image } of [...pod.containers, ...(pod.initContainers ?? [])]) {
      // The sidecar's are set by its kustomization, as are all tags.
      if (/^(app|detour-client)$/.test(image))
        expect(read('overlays/sidecar-example/kustomization.yaml')).toContain(image);
      else expect(image).toMatch(/^detour-(client|router):(?!latest$)[\w.-]+$/);
    }
  });

  it.each(runs)('$file leaves a daemon the time to leave', ({ pod }) => {
    // Kubernetes gives 30 s to whoever does not say.
    expect((pod.terminationGracePeriodSeconds ?? 30) * 1000).toBeGreaterThan(STOP_DEADLINE_MS + 5_000);
  });

  it.each(runs)('$file is watched from the node, and restarted for its own faults alone', ({ container }) => {
    const { startupProbe, livenessProbe, readinessProbe } = container;
    for (const probe of [startupProbe, livenessProbe]) {
      if (probe.httpGet) expect(probe.httpGet).toMatchObject({ path: '/healthz', host: '127.0.0.1' });
      else expect(probe.exec?.command).toEqual(['detour', 'healthcheck']);
    }
    // In the sidecar readiness is the application's own affair.
    if (readinessProbe) expect(readinessProbe.httpGet).toMatchObject({ path: '/readyz', host: '127.0.0.1' });
  });

  it.each(runs)('$file asks for memory within its limit, and has none for the CPU', ({ container }) => {
    const { requests = {}, limits = {} } = container.resources;
    expect(Object.keys(requests).sort()).toEqual(['cpu', 'memory']);
    expect(Object.keys(limits)).toEqual(['memory']);
    expect(Number.parseInt(requests['memory'] ?? '', 10)).toBeLessThan(Number.parseInt(limits['memory'] ?? '', 10));
  });

  it.each(rendered)(
    '$file selects by labels that an upgrade does not change, and says the version',
    ({ manifests }) => {
      const { workload } = ours(manifests);
      const { matchLabels } = workload.spec.selector;
      expect(Object.keys(matchLabels).sort()).toEqual(
        ['component', 'instance', 'name'].map((label) => `app.kubernetes.io/${label}`),
      );
      expect(workload.spec.template.metadata.labels).toMatchObject({
        ...matchLabels,
        'app.kubernetes.io/version': VERSION.replace(/-.*/, ''),
        'app.kubernetes.io/part-of': 'detour',
      });
    },
  );

  it.each(rendered)('$file brings no secret, and no settings that an upgrade would reset', ({ manifests }) => {
    expect(manifests.map(({ kind }) => kind)).not.toContain('Secret');
    expect(manifests.map(({ kind }) => kind)).not.toContain('ConfigMap');
  });
});

describe('what it may ask the API', () => {
  it('is to list and watch pods, where pods are served, and nothing elsewhere', () => {
    const roles = rendered.flatMap(({ file, manifests }) =>
      manifests
        .filter(({ apiVersion }) => apiVersion.startsWith('rbac.authorization.k8s.io/'))
        .map(({ kind, metadata: { name }, rules, subjects }) => ({ file, kind, name, rules, subjects })),
    );
    const of = (file: string): object[] => [
      {
        file,
        kind: 'ClusterRole',
        name: 'detour-client',
        rules: [{ apiGroups: [''], resources: ['pods'], verbs: ['list', 'watch'] }],
      },
      {
        file,
        kind: 'ClusterRoleBinding',
        name: 'detour-client',
        subjects: [{ kind: 'ServiceAccount', name: 'detour-client', namespace: 'detour-system' }],
      },
    ];
    expect(roles).toEqual([...of('detour-client.yaml'), ...of('detour-server.yaml')]);
  });
});

describe('an invitation for Kubernetes', () => {
  const invitation = {
    name: 'fra',
    host: '192.0.2.1',
    port: 45672,
    key: '00c0ffee:c2VjcmV0',
    image: 'detour-client:dev',
  };
  const manifests = readManifests(renderInvite(invitation, 'kubernetes'));

  it('is what the DaemonSet takes its key and its settings from', () => {
    for (const manifest of manifests) expect(complaintsAbout(manifest)).toEqual([]);
    const [namespace, secret, settings] = manifests;
    expect(namespace).toEqual(readManifests(read('base/namespace.yaml'))[0]);
    expect(readManifests(read('overlays/router/namespace.yaml'))[0]).toEqual(namespace);
    for (const { pod, container } of ['detour-client.yaml', 'detour-client-host.yaml', 'overlays/sidecar-example'].map(
      run,
    )) {
      const volume = pod.volumes.find((one) => one.secret)?.name;
      expect(pod.volumes.find((one) => one.secret)?.secret?.secretName).toBe(secret?.metadata.name);
      const mount = container.volumeMounts.find(({ name }) => name === volume)?.mountPath;
      const [key = ''] = Object.keys(secret?.['stringData'] as object);
      expect(container.env).toContainEqual({ name: 'DETOUR_KEY_FILE', value: `${mount}/${key}` });
      expect(container.envFrom).toEqual([{ configMapRef: { name: settings?.metadata.name } }]);
    }
    expect(secret).toMatchObject({ metadata: { namespace: 'detour-system' }, stringData: { key: invitation.key } });
    expect(settings).toMatchObject({
      metadata: { namespace: 'detour-system' },
      data: { DETOUR_DETOURS: 'fra=192.0.2.1:45672' },
    });
  });

  it('has the form of the examples', () => {
    const shape = ({ kind, metadata, type, stringData, data }: Manifest): object => ({
      kind,
      metadata,
      type,
      fields: Object.keys((stringData ?? data) as object),
    });
    const written = ['secret', 'configmap'].flatMap((name) => readManifests(read(`base/${name}.example.yaml`)));
    expect(manifests.slice(1).map(shape)).toEqual(written.map(shape));
  });
});

describe('the alerts', () => {
  it('ask for metrics that there are', () => {
    const sources = globSync('../appliance/**/*.ts', { cwd: folder })
      .map((file) => read(file))
      .join('\n');
    const text = read('components/monitoring/prometheusrule.yaml');
    const named = [...new Set(text.match(/detour_[a-z_]+(?=\{)/g))];
    expect(named.length).toBeGreaterThan(3);
    expect(named.filter((name) => !sources.includes(`name: '${name}'`))).toEqual([]);
    expect(sources).toContain("count('rules_restored')");
  });
});
