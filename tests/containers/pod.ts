import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import type Docker from 'dockerode';
import { waitUntil } from '../lab/netns.ts';
import type { Container } from './engine.ts';
import type { Machine } from './machines.ts';

/**
 * A pod of a manifest on a plain engine, field by field, as a kubelet of 1.29 or later would run it: containers that share a network, the
 * sidecars (init containers that are always restarted) first, each waited for until its startup probe succeeds. A field that is not
 * translated here is an error: what runs is what is written.
 */

export type PodSpec = { readonly [field: string]: unknown };
/** What Secrets and ConfigMaps the cluster has, by their names. */
export type Objects = { readonly [name: string]: Readonly<Record<string, string>> };

type Fields = Readonly<Record<string, unknown>>;
type Probe = {
  readonly exec: { readonly command: string[] };
  readonly periodSeconds: number;
  readonly failureThreshold: number;
};
type Started = { readonly name: string; readonly container: Container };

export class Pod implements AsyncDisposable {
  readonly #containers = new Map<string, Container>();
  readonly #scope: AsyncDisposableStack;

  private constructor(scope: AsyncDisposableStack) {
    this.#scope = scope;
  }

  /** Starts it; on return all of its containers run. `pause` is an image that can sleep. */
  static async start(machine: Machine, spec: PodSpec, objects: Objects, pause: string): Promise<Pod> {
    const scope = new AsyncDisposableStack();
    try {
      const folder = mkdtempSync(join(tmpdir(), 'detour-pod-'));
      scope.defer(() => rmSync(folder, { recursive: true }));
      const pod = new Pod(scope);
      const { initContainers, containers, volumes } = only(spec, {
        initContainers: [],
        containers: [],
        volumes: [],
        // Nothing is there that they would be about.
        automountServiceAccountToken: false,
        enableServiceLinks: false,
      });
      const network = scope.use(await machine.launch({ Image: pause, Entrypoint: ['sleep'], Cmd: ['infinity'] }));
      const mounts = mountsOf(volumes as Fields[], objects, folder);
      for (const one of initContainers as Fields[]) {
        if (one['restartPolicy'] !== 'Always') throw new Error('only sidecars are known here');
        const { name, container } = await launch(machine, one, network, mounts, objects);
        pod.#containers.set(name, scope.use(container));
        await succeeds(container, one['startupProbe'] as Probe);
      }
      for (const one of containers as Fields[]) {
        const { name, container } = await launch(machine, one, network, mounts, objects);
        pod.#containers.set(name, scope.use(container));
      }
      return pod;
    } catch (error) {
      await scope.disposeAsync();
      throw error;
    }
  }

  /** The container of that name. */
  container(name: string): Container {
    const found = this.#containers.get(name);
    if (!found) throw new Error(`the pod has no container ${name}`);
    return found;
  }

  [Symbol.asyncDispose](): Promise<void> {
    return this.#scope.disposeAsync();
  }
}

/** The fields of `from`, or what stands for those that are not there. Throws when it has others than `known`. */
function only<T extends Fields>(from: Fields, known: T): Record<keyof T, unknown> {
  const strange = Object.keys(from).filter((field) => !Object.hasOwn(known, field));
  if (strange.length > 0) throw new Error(`not translated for an engine: ${strange.join(', ')}`);
  return { ...known, ...from };
}

type Mounts = ReadonlyMap<string, (path: string, readOnly: boolean) => Docker.HostConfig>;

function mountsOf(volumes: readonly Fields[], objects: Objects, folder: string): Mounts {
  const bind =
    (source: string) =>
    (path: string, readOnly: boolean): Docker.HostConfig => ({ Binds: [`${source}:${path}${readOnly ? ':ro' : ''}`] });
  return new Map(
    volumes.map((volume) => {
      const { name, emptyDir, secret, hostPath } = only(volume, {
        name: '',
        emptyDir: null,
        secret: null,
        hostPath: null,
      });
      if (emptyDir) {
        only(emptyDir as Fields, { medium: 'Memory', sizeLimit: '1Mi' });
        return [String(name), (path) => ({ Tmpfs: { [path]: 'size=1m' } })];
      }
      if (hostPath) return [String(name), bind(String(only(hostPath as Fields, { path: '', type: '' }).path))];
      const { secretName, defaultMode } = only(secret as Fields, { secretName: '', defaultMode: 0o644 });
      const source = join(folder, String(name));
      mkdirSync(source);
      for (const [file, text] of Object.entries(objects[String(secretName)] ?? {})) {
        writeFileSync(join(source, file), text, { mode: Number(defaultMode) });
      }
      return [String(name), bind(source)];
    }),
  );
}

async function launch(
  machine: Machine,
  spec: Fields,
  network: Container,
  mounts: Mounts,
  objects: Objects,
): Promise<Started> {
  const { name, image, command, env, envFrom, securityContext, resources, volumeMounts } = only(spec, {
    name: '',
    image: '',
    command: null,
    env: [],
    envFrom: [],
    securityContext: {},
    resources: {},
    volumeMounts: [],
    // Of the kubelet's doing; the startup probe is awaited by whoever called.
    imagePullPolicy: '',
    restartPolicy: '',
    startupProbe: null,
    livenessProbe: null,
    terminationMessagePolicy: '',
  });
  const { limits } = only(resources as Fields, { requests: {}, limits: {} });
  const host = (volumeMounts as Fields[]).map((mount) => {
    const { name: volume, mountPath, readOnly } = only(mount, { name: '', mountPath: '', readOnly: false });
    const made = mounts.get(String(volume));
    if (!made) throw new Error(`there is no volume ${volume}`);
    return made(String(mountPath), readOnly === true);
  });
  const variables = [
    ...(envFrom as { configMapRef: { name: string } }[]).flatMap(({ configMapRef }) =>
      Object.entries(objects[configMapRef.name] ?? {}),
    ),
    ...(env as { name: string; value: string }[]).map((one) => [one.name, one.value] as const),
  ];
  const container = await machine.launch({
    Image: String(image),
    ...(command ? { Entrypoint: command as string[], Cmd: [] } : {}),
    Env: variables.map(([variable, value]) => `${variable}=${value}`),
    ...identityOf(securityContext as Fields),
    HostConfig: {
      NetworkMode: `container:${network.docker.id}`,
      Binds: host.flatMap(({ Binds }) => Binds ?? []),
      Tmpfs: Object.assign({}, ...host.map(({ Tmpfs }) => Tmpfs ?? {})),
      Memory: bytesOf((limits as { memory?: string }).memory),
      ...privilegesOf(securityContext as Fields),
    },
  });
  return { name: String(name), container };
}

const SECURITY = {
  runAsUser: null,
  runAsGroup: null,
  allowPrivilegeEscalation: true,
  readOnlyRootFilesystem: false,
  capabilities: {},
  seccompProfile: null,
} as const;

function identityOf(context: Fields): { User?: string } {
  const { runAsUser, runAsGroup } = only(context, SECURITY);
  return runAsUser === null ? {} : { User: `${runAsUser}:${runAsGroup}` };
}

function privilegesOf(context: Fields): Docker.HostConfig {
  const { allowPrivilegeEscalation, readOnlyRootFilesystem, capabilities, seccompProfile } = only(context, SECURITY);
  const { add, drop } = only(capabilities as Fields, { add: [], drop: [] });
  // The engine's own profile, which it uses unless told otherwise.
  if (seccompProfile && (seccompProfile as Fields)['type'] !== 'RuntimeDefault')
    throw new Error('another seccomp profile');
  return {
    CapDrop: drop as string[],
    CapAdd: add as string[],
    ReadonlyRootfs: readOnlyRootFilesystem === true,
    SecurityOpt: allowPrivilegeEscalation === false ? ['no-new-privileges'] : [],
  };
}

function bytesOf(quantity: string | undefined): number {
  if (quantity === undefined) return 0;
  const mebibytes = /^(\d+)Mi$/.exec(quantity)?.[1];
  if (mebibytes === undefined) throw new Error(`${quantity} of memory`);
  return Number(mebibytes) * 1024 * 1024;
}

/** Waits as a kubelet does, that long and no longer. */
async function succeeds(container: Container, { exec, periodSeconds, failureThreshold }: Probe): Promise<void> {
  try {
    await waitUntil(async () => (await container.exec(...exec.command)).code === 0, {
      deadlineMs: periodSeconds * failureThreshold * 1000,
      everyMs: periodSeconds * 1000,
      what: 'the startup probe',
    });
  } catch (error) {
    throw new Error(`${error instanceof Error ? error.message : error}; its log:\n${await container.logs()}`);
  }
}
