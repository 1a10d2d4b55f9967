import { once } from 'node:events';
import type { IncomingMessage, ServerResponse } from 'node:http';
import { createServer, type Server } from 'node:https';
import type { AddressInfo } from 'node:net';
import { generate } from 'selfsigned';
import { type Namespace, ownNamespace } from '../../appliance/kernel/namespaces.ts';

type Labels = Readonly<Record<string, string>>;

/** A pod as the API tells of it, as far as anybody here looks. */
export type ApiPod = {
  readonly metadata: {
    readonly uid: string;
    readonly name: string;
    readonly namespace: string;
    readonly annotations?: Labels;
    readonly resourceVersion?: string;
  };
  readonly spec: { readonly nodeName: string; readonly hostNetwork?: boolean };
  readonly status: {
    readonly phase: string;
    readonly containerStatuses?: readonly { readonly containerID: string; readonly state: object }[];
  };
};

type Event = { readonly type: 'ADDED' | 'MODIFIED' | 'DELETED'; readonly object: ApiPod; readonly version: number };

/** What becomes of a question: an answer, half an answer, a status with this message, or nothing at all. */
export type Manners =
  | 'answers'
  | 'breaks off'
  | 'is silent'
  | { readonly status: number; readonly reason: string; readonly message: string };

const isOfNode = (pod: ApiPod, selector: string | null): boolean =>
  selector === null || selector === `spec.nodeName=${pod.spec.nodeName}`;

/**
 * As much of a Kubernetes API server as the agent uses: GET /api/v1/pods, listed in pages, and watched. What it says was recorded
 * from Kubernetes 1.20 and 1.32 and cut to what somebody could look at.
 */
export class FakeKubernetes implements AsyncDisposable {
  readonly pods = new Map<string, ApiPod>();
  /** Query and token of every question so far. */
  readonly asked: { readonly query: URLSearchParams; readonly token: string }[] = [];
  /** Who may ask. */
  token = 'first-token';
  manners: (query: URLSearchParams) => Manners = () => 'answers';
  /** Whether lists from its memory come in pages, too; before 1.31 they come whole, whatever the limit. */
  paged = false;
  /** Of the certificate; also the authority that signed it. */
  readonly certificate: string;
  readonly #key: string;
  #server: Server | null = null;
  #port = 0;
  #version = 100;
  #history: Event[] = [];
  /** Versions up to this one are forgotten. */
  #forgotten = 0;
  /** Lists under way are, too, but for their first page. */
  #listsForgotten = false;
  readonly #watches = new Set<{ readonly response: ServerResponse; readonly selector: string | null }>();

  private constructor(certificate: string, key: string) {
    this.certificate = certificate;
    this.#key = key;
  }

  /** With a certificate of its own for 127.0.0.1. */
  static async make(): Promise<FakeKubernetes> {
    const { cert, private: key } = await generate([{ name: 'commonName', value: 'kubernetes' }], {
      keyType: 'ec',
      algorithm: 'sha256',
      extensions: [{ name: 'subjectAltName', altNames: [{ type: 7, ip: '127.0.0.1' }] }],
    });
    return new FakeKubernetes(cert, key);
  }

  get url(): string {
    return `https://127.0.0.1:${this.#port}`;
  }

  /** At the same port each time; in that network namespace, if one is given. */
  async open(namespace: Namespace = ownNamespace): Promise<void> {
    const server = createServer({ key: this.#key, cert: this.certificate }, (request, response) =>
      this.#answer(request, response),
    );
    // With the name of a host it would be looked up first, and the socket made later and here.
    namespace.within(() => server.listen(this.#port));
    await once(server, 'listening');
    this.#server = server;
    this.#port = (server.address() as AddressInfo).port;
  }

  /** As when it is stopped: connections are cut. What it knows it still knows when it is opened again. */
  async shut(): Promise<void> {
    const server = this.#server;
    this.#server = null;
    this.#watches.clear();
    server?.closeAllConnections();
    await new Promise<void>((resolve) => (server ? server.close(() => resolve()) : resolve()));
  }

  /** Adds a pod, or changes it. */
  set(pod: ApiPod): void {
    const type = this.pods.has(pod.metadata.uid) ? 'MODIFIED' : 'ADDED';
    const object = this.#stamp(pod);
    this.pods.set(pod.metadata.uid, object);
    this.#happened({ type, object, version: this.#version });
  }

  delete(uid: string): void {
    const pod = this.pods.get(uid);
    if (!pod) return;
    this.pods.delete(uid);
    this.#happened({ type: 'DELETED', object: this.#stamp(pod), version: this.#version });
  }

  /** Something else of the cluster changed: the version goes on. */
  passTime(): void {
    this.#version++;
  }

  /** Tells every watch how far it has come. */
  bookmark(): void {
    const metadata = { resourceVersion: `${this.#version}`, creationTimestamp: null };
    this.say({ type: 'BOOKMARK', object: { kind: 'Pod', apiVersion: 'v1', metadata } });
  }

  /** etcd is compacted: who comes with an older version than this has to begin anew. */
  forget({ lists = false } = {}): void {
    this.#forgotten = this.#version;
    this.#listsForgotten = lists;
    this.#history = [];
  }

  /** A line in every watch. */
  say(line: object | string): void {
    const text = typeof line === 'string' ? line : JSON.stringify(line);
    for (const { response } of this.#watches) response.write(`${text}\n`);
  }

  /** Ends every watch: in order, as after its time, or by cutting the connection. */
  endWatches(how: 'in order' | 'cut' = 'in order'): void {
    for (const { response } of this.#watches) {
      if (how === 'cut') response.destroy();
      else response.end();
    }
    this.#watches.clear();
  }

  get watches(): number {
    return this.#watches.size;
  }

  /** Questions for lists so far. */
  get lists(): URLSearchParams[] {
    return this.asked.flatMap(({ query }) => (query.has('watch') ? [] : [query]));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.shut();
  }

  #stamp(pod: ApiPod): ApiPod {
    return { ...pod, metadata: { ...pod.metadata, resourceVersion: `${++this.#version}` } };
  }

  #happened(event: Event): void {
    this.#history.push(event);
    for (const { response, selector } of this.#watches) {
      if (isOfNode(event.object, selector))
        response.write(`${JSON.stringify({ type: event.type, object: event.object })}\n`);
    }
  }

  #answer(request: IncomingMessage, response: ServerResponse): void {
    const { pathname, searchParams: query } = new URL(request.url ?? '', this.url);
    const token = (request.headers.authorization ?? '').replace(/^Bearer /, '');
    this.asked.push({ query, token });
    const manners = this.manners(query);
    if (manners === 'is silent') return;
    if (manners === 'breaks off') {
      response.writeHead(200, { 'content-type': 'application/json' });
      response.write('{"kind":"PodList","items":[', () => response.destroy());
      return;
    }
    if (manners !== 'answers') refuse(response, manners.status, manners.reason, manners.message);
    else if (pathname !== '/api/v1/pods') refuse(response, 404, 'NotFound', 'the server could not find the resource');
    else if (token !== this.token) refuse(response, 401, 'Unauthorized', 'Unauthorized');
    else if (query.get('watch') === 'true') this.#watch(response, query);
    else this.#list(response, query);
  }

  #list(response: ServerResponse, query: URLSearchParams): void {
    const all = [...this.pods.values()].filter((pod) => isOfNode(pod, query.get('fieldSelector')));
    const [from = 0, version = this.#version] = (query.get('continue') ?? '').split('.').filter(Boolean).map(Number);
    if (from > 0 && this.#listsForgotten) {
      this.#listsForgotten = false;
      refuse(
        response,
        410,
        'Expired',
        'The provided continue parameter is too old to display a consistent list result.',
      );
      return;
    }
    const whole = !this.paged && query.get('resourceVersion') === '0';
    const limit = whole ? all.length : Number(query.get('limit') ?? all.length);
    const items = all.slice(from, from + limit);
    const next = from + limit < all.length ? `${from + limit}.${version}` : '';
    json(response, 200, {
      kind: 'PodList',
      apiVersion: 'v1',
      metadata: { resourceVersion: `${version}`, ...(next === '' ? {} : { continue: next }) },
      items,
    });
  }

  #watch(response: ServerResponse, query: URLSearchParams): void {
    const since = Number(query.get('resourceVersion'));
    const selector = query.get('fieldSelector');
    if (since < this.#forgotten) {
      refuse(response, 410, 'Expired', `too old resource version: ${since} (${this.#forgotten})`);
      return;
    }
    response.writeHead(200, { 'content-type': 'application/json' });
    response.flushHeaders();
    for (const { type, object, version } of this.#history) {
      if (version > since && isOfNode(object, selector)) response.write(`${JSON.stringify({ type, object })}\n`);
    }
    const watch = { response, selector };
    this.#watches.add(watch);
    response.once('close', () => this.#watches.delete(watch));
  }
}

/** What an API server says when it says no. */
export const statusOf = (code: number, reason: string, message: string) => ({
  kind: 'Status',
  apiVersion: 'v1',
  metadata: {},
  status: 'Failure',
  message,
  reason,
  code,
});

function refuse(response: ServerResponse, code: number, reason: string, message: string): void {
  json(response, code, statusOf(code, reason, message));
}

function json(response: ServerResponse, status: number, body: object): void {
  response.writeHead(status, { 'content-type': 'application/json' });
  response.end(JSON.stringify(body));
}
