import { readFileSync } from 'node:fs';
import type { IncomingMessage } from 'node:http';
import { Agent, request } from 'node:https';
import { createInterface } from 'node:readline';

/**
 * The pods of one node, from the Kubernetes API (https://kubernetes.io/docs/reference/using-api/api-concepts/). List and watch only. The
 * official client would do, but its models take 71 MB of memory, more than the agent with 200 namespaces otherwise needs.
 */

/** As much of a pod as concerns whose network it has. */
export type Pod = {
  readonly uid: string;
  /** `namespace/name` */
  readonly name: string;
  readonly annotations: Readonly<Record<string, string>>;
  readonly hostNetwork: boolean;
  /** Ids of its containers that run now, as the runtime has them, without the runtime's name. */
  readonly containers: readonly string[];
};

export type PodEvent =
  | { readonly kind: 'changed'; readonly pod: Pod }
  | { readonly kind: 'deleted'; readonly uid: string };

/** Why a watch ended. `outdated`: what it would go on from is forgotten, and the list has to be read anew (410 Gone). */
export type WatchEnd = { readonly kind: 'closed' | 'outdated' } | { readonly kind: 'failed'; readonly why: string };

export type Pods = {
  /** Reads all of them, page by page; resolves with the version to watch from. @throws Error with the remedy */
  list(each: (pod: Pod) => void): Promise<string>;
  /** Hears of changes since `version`; `at` is told the version to go on from. */
  watch(
    version: string,
    each: (event: PodEvent) => void,
    at: (version: string) => void,
  ): { readonly ended: Promise<WatchEnd>; readonly close: () => void };
};

export type ApiServer = {
  /** `https://HOST:PORT` */
  readonly url: string;
  /** Files of the service account. The token is read again for each request, because it is replaced while we run. */
  readonly tokenPath: string;
  readonly caPath: string;
  readonly node: string;
};

/** Of one request; watches have their own. */
const DEADLINE_MS = 15_000;
/** The server ends a watch after this; it is asked with some seconds to spare. */
const WATCH_S = 300;
const PAGE = 500;
/** A page of 500 pods with large annotations; the API refuses objects above 1.5 MB. */
const LONGEST_ANSWER = 64 * 1024 * 1024;

type Json = { readonly [key: string]: unknown };

/** The API server of this cluster, as a pod is told of it. */
export function podsOf(server: ApiServer): Pods {
  const agent = new Agent({ keepAlive: true, maxSockets: 2 });
  const selector = `fieldSelector=${encodeURIComponent(`spec.nodeName=${server.node}`)}`;

  function open(query: string, timeout: number | null) {
    const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>();
    let token: string;
    let ca: Buffer;
    try {
      token = readFileSync(server.tokenPath, 'utf8').trim();
      ca = readFileSync(server.caPath);
    } catch (error) {
      throw new Error(
        `no service account is mounted here (${codeOf(error)}): set automountServiceAccountToken: true in the pod`,
      );
    }
    const ask = request(`${server.url}/api/v1/pods?${selector}&${query}`, {
      agent,
      ca,
      headers: { authorization: `Bearer ${token}`, accept: 'application/json' },
      ...(timeout === null ? {} : { timeout }),
    });
    ask.once('response', resolve);
    ask.on('timeout', () => ask.destroy(new Error('no answer in time')));
    ask.on('error', (error) => reject(new Error(`the API server does not answer: ${codeOf(error)}`, { cause: error })));
    ask.end();
    return { ask, answer: promise };
  }

  return {
    async list(each) {
      let next = '';
      for (;;) {
        const page = next === '' ? '' : `&continue=${encodeURIComponent(next)}`;
        const { answer } = open(`limit=${PAGE}${page}`, DEADLINE_MS);
        const response = await answer;
        const text = await textOf(response);
        // The rest of a list that took too long to read: it begins again.
        if (response.statusCode === 410 && next !== '') {
          next = '';
          continue;
        }
        if (response.statusCode !== 200) throw new Error(complaint(response.statusCode ?? 0, text, server.node));
        const { metadata, items } = JSON.parse(text) as { metadata?: Json; items?: readonly Json[] | null };
        for (const item of items ?? []) {
          const pod = readPod(item);
          if (pod) each(pod);
        }
        next = typeof metadata?.['continue'] === 'string' ? metadata['continue'] : '';
        if (next === '') return String(metadata?.['resourceVersion'] ?? '');
      }
    },
    watch(version, each, at) {
      let close: () => void = () => undefined;
      const ended = (async (): Promise<WatchEnd> => {
        const query = `watch=true&allowWatchBookmarks=true&timeoutSeconds=${WATCH_S}&resourceVersion=${encodeURIComponent(version)}`;
        // Silence is usual; a server that is gone without a word is noticed when its own time is over.
        const { ask, answer } = open(query, (WATCH_S + 30) * 1000);
        close = () => ask.destroy();
        const response = await answer;
        if (response.statusCode === 410) return { kind: 'outdated' };
        if (response.statusCode !== 200)
          return { kind: 'failed', why: complaint(response.statusCode ?? 0, await textOf(response), server.node) };
        let end: WatchEnd = { kind: 'closed' };
        response.on('error', () => undefined);
        for await (const line of createInterface({ input: response })) {
          const { type, object } = JSON.parse(line) as { type?: unknown; object?: Json };
          if (type === 'ERROR') {
            const code = object?.['code'];
            end = code === 410 ? { kind: 'outdated' } : { kind: 'failed', why: `the watch ended with status ${code}` };
            break;
          }
          const metadata = object?.['metadata'] as Json | undefined;
          if (typeof metadata?.['resourceVersion'] === 'string') at(metadata['resourceVersion']);
          const pod = type === 'BOOKMARK' || !object ? null : readPod(object);
          if (pod) each(type === 'DELETED' ? { kind: 'deleted', uid: pod.uid } : { kind: 'changed', pod });
        }
        ask.destroy();
        return end;
      })().catch((error: unknown): WatchEnd => ({ kind: 'failed', why: error instanceof Error ? error.message : '' }));
      return { ended, close: () => close() };
    },
  };
}

async function textOf(response: IncomingMessage): Promise<string> {
  const parts: Buffer[] = [];
  let length = 0;
  for await (const part of response as AsyncIterable<Buffer>) {
    length += part.length;
    if (length > LONGEST_ANSWER) throw new Error('the API server sends more than a list of pods can have');
    parts.push(part);
  }
  return Buffer.concat(parts).toString();
}

/** What is wrong, and who has to mend it. */
function complaint(status: number, text: string, node: string): string {
  let said = '';
  try {
    said = String((JSON.parse(text) as Json)['message'] ?? '').slice(0, 200);
  } catch {
    // Some proxy's page.
  }
  if (status === 401) return 'the API server does not accept the token of this service account';
  if (status === 403)
    return `the service account may not list and watch pods of node ${node} (apply k8s/overlays/pods/rbac.yaml): ${said}`;
  return `the API server answers with status ${status}${said === '' ? '' : `: ${said}`}`;
}

/** Reads what is needed; null for something that is no pod. Nothing in it is believed to have the type that it should. */
export function readPod(object: Json): Pod | null {
  const metadata = objectOf(object['metadata']);
  const spec = objectOf(object['spec']);
  const status = objectOf(object['status']);
  const { uid, name, namespace } = metadata;
  if (typeof uid !== 'string' || typeof name !== 'string' || typeof namespace !== 'string') return null;
  const annotations = Object.fromEntries(
    Object.entries(objectOf(metadata['annotations'])).filter((entry): entry is [string, string] => {
      return typeof entry[1] === 'string';
    }),
  );
  const containers = ['containerStatuses', 'initContainerStatuses'].flatMap((list) =>
    listOf(status[list]).flatMap((one) => {
      const running = objectOf(objectOf(one)['state'])['running'] !== undefined;
      const id = /^[a-z0-9.+-]+:\/\/([0-9a-f]{12,64})$/.exec(String(objectOf(one)['containerID'] ?? ''))?.[1];
      return running && id !== undefined ? [id] : [];
    }),
  );
  return { uid, name: `${namespace}/${name}`, annotations, hostNetwork: spec['hostNetwork'] === true, containers };
}

const objectOf = (value: unknown): Json =>
  typeof value === 'object' && value !== null && !Array.isArray(value) ? (value as Json) : {};
const listOf = (value: unknown): readonly unknown[] => (Array.isArray(value) ? value : []);

const codeOf = (error: unknown): string =>
  error instanceof Error && 'code' in error && typeof error.code === 'string'
    ? error.code
    : error instanceof Error
      ? error.message
      : 'unknown error';
