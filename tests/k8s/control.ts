import { generateKeyPairSync, randomBytes } from 'node:crypto';
import { existsSync, mkdirSync, writeFileSync } from 'node:fs';
import { type IncomingMessage, request } from 'node:http';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import type { ExecResult, Host } from '../lab/netns.ts';
import { binary, type Programs } from './programs.ts';

/** Where the API answers: the address that Kubernetes gives to the Service `kubernetes`, the first of SERVICES, and its port. */
const API = { address: '10.96.0.1', port: 443 } as const;
const SERVICES = '10.96.0.0/24';

const START_DEADLINE_MS = 60_000;
const KUBECTL_DEADLINE_MS = 120_000;
/** How long a node may be silent before it counts as lost. Kubernetes' default of 40 s is long for a test. */
const NODE_GRACE_S = 10;

/** One line of a watch (Kubernetes API concepts, "Efficient detection of changes"). */
export type Change<T> = { readonly type: 'ADDED' | 'MODIFIED' | 'DELETED'; readonly object: T };

/**
 * The control plane of a cluster on a host of a lab: etcd, the API server with RBAC, the controllers and the scheduler. The test
 * talks to the API as its administrator, over a unix socket; everybody else over TLS and with a token.
 */
export class ControlPlane {
  readonly host: Host;
  readonly #folder: string;
  readonly #programs: Programs;

  /** Its files are kept in `folder`, which exists; `nodes` are the names that kubelets may report by. */
  constructor(host: Host, folder: string, programs: Programs, nodes: readonly string[]) {
    this.host = host;
    this.#folder = folder;
    this.#programs = programs;
    this.#admit(nodes);
  }

  /** Starts it; on return the API answers. */
  async start(): Promise<void> {
    // With that address, the Service needs no kube-proxy on the nodes: a route is enough.
    await this.host.exec(['ip', 'address', 'add', `${API.address}/32`, 'dev', 'lo']);
    await this.#launch();
  }

  /** The file with which a user reaches the API: `admin`, or `system:node:NAME`. */
  kubeconfig(user: string): string {
    return join(this.#folder, `${user.replaceAll(':', '-')}.kubeconfig`);
  }

  /** What the API answers to a GET, such as `/api/v1/nodes`. Throws when that is not 200. */
  async get<T>(path: string): Promise<T> {
    return JSON.parse(await this.#read(path));
  }

  /** The objects at a path, and from then on every change of one. Ends when the API ends it, which it does now and then. */
  async *watch<T>(path: string, signal: AbortSignal): AsyncGenerator<Change<T>> {
    const answer = await this.#ask(`${path}?watch=true`, signal);
    for await (const line of createInterface({ input: answer, signal })) yield JSON.parse(line);
  }

  /** Runs kubectl as administrator, at most two minutes. Its exit status is a result. */
  kubectl(args: readonly string[], input?: string): Promise<ExecResult> {
    // What it caches of the API belongs to this cluster and into nobody's home.
    const env = { HOME: this.#folder, KUBECONFIG: this.kubeconfig('admin') };
    const options = { env, timeoutMs: KUBECTL_DEADLINE_MS, ...(input === undefined ? {} : { input }) };
    return this.host.try([binary('kubectl'), ...args], options);
  }

  get #socket(): string {
    return join(this.#folder, 'api.sock');
  }

  get #certificates(): string {
    return join(this.#folder, 'certificates');
  }

  /** The API server makes it at its start: its certificate, and after that the one of the authority that signed it. */
  get #authority(): string {
    return join(this.#certificates, 'apiserver.crt');
  }

  get #tokens(): string {
    return join(this.#folder, 'tokens.csv');
  }

  get #accountsKey(): string {
    return join(this.#folder, 'accounts.key');
  }

  #admit(nodes: readonly string[]): void {
    mkdirSync(this.#certificates);
    const users = [
      { name: 'admin', group: 'system:masters' },
      ...nodes.map((node) => ({ name: `system:node:${node}`, group: 'system:nodes' })),
    ];
    const rows = users.map(({ name, group }) => {
      const token = randomBytes(24).toString('base64url');
      writeFileSync(this.kubeconfig(name), kubeconfig(token, this.#authority), { mode: 0o600 });
      return `${token},${name},${name},${group}\n`;
    });
    writeFileSync(this.#tokens, rows.join(''), { mode: 0o600 });
    const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'P-256' });
    writeFileSync(this.#accountsKey, privateKey.export({ type: 'sec1', format: 'pem' }), { mode: 0o600 });
  }

  async #launch(): Promise<void> {
    this.#spawn('etcd', [
      `--data-dir=${join(this.#folder, 'etcd')}`,
      '--listen-peer-urls=http://127.0.0.1:2380',
      '--log-level=error',
    ]);
    this.#spawn('kube-apiserver', [
      '--etcd-servers=http://127.0.0.1:2379',
      `--advertise-address=${API.address}`,
      `--secure-port=${API.port}`,
      '--insecure-port=0',
      `--cert-dir=${this.#certificates}`,
      `--token-auth-file=${this.#tokens}`,
      '--anonymous-auth=false',
      '--authorization-mode=Node,RBAC',
      '--enable-admission-plugins=NodeRestriction',
      '--allow-privileged=true',
      '--kubelet-preferred-address-types=InternalIP',
      `--service-cluster-ip-range=${SERVICES}`,
      '--service-account-issuer=https://kubernetes.default.svc',
      `--service-account-key-file=${this.#accountsKey}`,
      `--service-account-signing-key-file=${this.#accountsKey}`,
    ]);
    const asAdmin = `--kubeconfig=${this.kubeconfig('admin')}`;
    await this.#programs.waitFor('a certificate', () => existsSync(this.#authority), START_DEADLINE_MS);
    this.#spawn('kubectl', [asAdmin, 'proxy', `--unix-socket=${this.#socket}`]);
    await this.#programs.waitFor('the API', async () => (await this.#read('/readyz')) === 'ok', START_DEADLINE_MS);
    this.#spawn('kube-controller-manager', [
      asAdmin,
      '--leader-elect=false',
      `--root-ca-file=${this.#authority}`,
      `--service-account-private-key-file=${this.#accountsKey}`,
      // Its default is a folder of this machine, which it would make.
      `--flex-volume-plugin-dir=${join(this.#folder, 'volume-plugins')}`,
      '--node-monitor-period=1s',
      `--node-monitor-grace-period=${NODE_GRACE_S}s`,
    ]);
    this.#spawn('kube-scheduler', [asAdmin, '--leader-elect=false']);
  }

  #spawn(name: string, flags: readonly string[]): void {
    this.#programs.add(name, this.host.spawn([binary(name), ...flags]));
  }

  async #read(path: string): Promise<string> {
    const answer = await this.#ask(path);
    const pieces: string[] = await answer.toArray();
    const body = pieces.join('');
    if (answer.statusCode === 200) return body;
    throw new Error(`GET ${path} was answered ${answer.statusCode}: ${body.slice(0, 1000)}`);
  }

  #ask(path: string, signal?: AbortSignal): Promise<IncomingMessage> {
    const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>();
    request({ socketPath: this.#socket, path, ...(signal === undefined ? {} : { signal }) }, (answer) =>
      resolve(answer.setEncoding('utf8')),
    )
      .on('error', reject)
      .end();
    return promise;
  }
}

function kubeconfig(token: string, authority: string): string {
  // JSON is YAML.
  return JSON.stringify({
    apiVersion: 'v1',
    kind: 'Config',
    clusters: [
      {
        name: 'lab',
        cluster: { server: `https://${API.address}:${API.port}`, 'certificate-authority': authority },
      },
    ],
    users: [{ name: 'user', user: { token } }],
    contexts: [{ name: 'lab', context: { cluster: 'lab', user: 'user' } }],
    'current-context': 'lab',
  });
}
