import { readFileSync } from 'node:fs';
import type { IncomingMessage } from 'node:http';
import { Agent, request } from 'node:https';
import { linesOf } from './lines.ts';

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
  /** It has run to its end, and none of its containers will be started again. */
  readonly ended: boolean;
  /** Ids of its containers that run now, as the runtime has them, without the runtime's name. */
  readonly containers: readonly string[];
};

/** `version` is where a later watch can go on. */
export type PodEvent = { readonly version: string } & (
  | { readonly kind: 'changed'; readonly pod: Pod }
  | { readonly kind: 'deleted'; readonly uid: string }
  | { readonly kind: 'bookmark' }
);

/**
 * How a watch ended. `closed`: the next one may go on from the last version; `outdated`: that is forgotten, and the list has to be
 * read anew (410 Gone); `failed`: the API server refuses, and the list will say more.
 */
export type WatchEnd = { readonly kind: 'closed' | 'outdated' } | { readonly kind: 'failed'; readonly why: string };

export type Watching = {
  /** The API server has agreed. */
  readonly open: () => void;
  readonly each: (event: PodEvent) => void;
};

export type Pods = {
  /**
   * Reads all of them; resolves with the version to watch from. `latest` asks for what is true now, which costs the cluster's
   * store a reading; otherwise what the API server remembers will do. May hand over a pod twice. @throws Error with the remedy
   */
  list(each: (pod: Pod) => void, signal: AbortSignal, latest: boolean): Promise<string>;
  /** Hears of changes since `version`, until this resolves. @throws Error when the API server is out of reach */
  watch(version: string, watching: Watching, signal: AbortSignal): Promise<WatchEnd>;
};

export type ApiServer = {
  /** `https://HOST:PORT` */
  readonly url: string;
  /** Files of the service account. The token is read again for each request, because it is replaced while we run. */
  readonly tokenPath: string;
  readonly caPath: string;
  readonly node: string;
};

/** Of one request's answer; watches have their own. */
const DEADLINE_MS = 15_000;
/** The server ends a watch after this; silence is usual, but not for longer. */
const WATCH_S = 300;
/** How long after that it may still say so. */
const WATCH_GRACE_S = 30;
/** Pods with all their status are some 10 kB each. */
const PAGE = 100;
/** Far more than the pods of a node have. */
const LONGEST_ANSWER = 64 * 1024 * 1024;
const GONE = 410;

type Json = { readonly [key: string]: unknown };

/** The API server of this cluster, as a pod is told of it. */
export function podsOf(server: ApiServer, deadlineMs = DEADLINE_MS): Pods {
  const agent = new Agent({ keepAlive: true, maxSockets: 2 });
  const selector = `fieldSelector=${encodeURIComponent(`spec.nodeName=${server.node}`)}`;

  /** Sends a question, and resolves with the head of its answer. */
  async function open(query: string, silenceMs: number, signal: AbortSignal): Promise<IncomingMessage> {
    const { promise, resolve, reject } = Promise.withResolvers<IncomingMessage>();
    const ask = request(`${server.url}/api/v1/pods?${selector}&${query}`, {
      agent,
      ca: readAccount(server.caPath),
      headers: { authorization: `Bearer ${readAccount(server.tokenPath).trim()}`, accept: 'application/json' },
      signal,
    });
    const late = setTimeout(() => ask.destroy(new Error('no answer in time')), deadlineMs).unref();
    ask.setTimeout(silenceMs, () => ask.destroy(new Error('silence')));
    ask.once('response', resolve);
    ask.on('error', (error) => reject(new Error(`the API server does not answer: ${codeOf(error)}`, { cause: error })));
    ask.end();
    try {
      return await promise;
    } finally {
      clearTimeout(late);
    }
  }

  return {
    async list(each, signal, latest) {
      const begin = (latest: boolean): string => `limit=${PAGE}${latest ? '' : '&resourceVersion=0'}`;
      let query = begin(latest);
      for (;;) {
        const response = await open(query, deadlineMs, signal);
        const text = await textOf(response);
        // The rest of a list that took too long to read: it begins again.
        if (response.statusCode === GONE && query !== begin(true)) {
          query = begin(true);
          continue;
        }
        if (response.statusCode !== 200) throw new Error(complaint(response.statusCode ?? 0, text, server.node));
        const { metadata, items } = JSON.parse(text) as { metadata?: Json; items?: readonly Json[] | null };
        for (const item of items ?? []) {
          const pod = readPod(item);
          if (pod) each(pod);
        }
        const next = metadata?.['continue'];
        if (typeof next !== 'string' || next === '') return String(metadata?.['resourceVersion'] ?? '');
        query = `limit=${PAGE}&continue=${encodeURIComponent(next)}`;
      }
    },
    async watch(version, { open: opened, each }, signal) {
      const query = `watch=true&allowWatchBookmarks=true&timeoutSeconds=${WATCH_S}&resourceVersion=${encodeURIComponent(version)}`;
      const response = await open(query, (WATCH_S + WATCH_GRACE_S) * 1000, signal);
      if (response.statusCode !== 200) {
        const text = await textOf(response);
        if (response.statusCode === GONE) return { kind: 'outdated' };
        return { kind: 'failed', why: complaint(response.statusCode ?? 0, text, server.node) };
      }
      opened();
      return follow(response, each);
    },
  };
}

/** Reads a watch to its end. */
async function follow(response: IncomingMessage, each: (event: PodEvent) => void): Promise<WatchEnd> {
  try {
    for await (const line of linesOf(response)) {
      const { type, object } = JSON.parse(line) as { type?: unknown; object?: Json };
      if (type === 'ERROR') {
        const code = object?.['code'];
        return code === GONE
          ? { kind: 'outdated' }
          : { kind: 'failed', why: `the API server ended the watch with status ${code}` };
      }
      const version = objectOf(object?.['metadata'])['resourceVersion'];
      if (typeof version !== 'string') continue;
      const pod = type === 'BOOKMARK' || !object ? null : readPod(object);
      if (pod === null) each({ kind: 'bookmark', version });
      else if (type === 'DELETED') each({ kind: 'deleted', uid: pod.uid, version });
      else each({ kind: 'changed', pod, version });
    }
    return { kind: 'closed' };
  } catch (error) {
    if (error instanceof SyntaxError) return { kind: 'failed', why: 'the API server sends what is no JSON' };
    // A connection that was cut, as by an API server that is restarted: what is missing comes with the next watch.
    return { kind: 'closed' };
  } finally {
    response.destroy();
  }
}

async function textOf(response: IncomingMessage): Promise<string> {
  const parts: Buffer[] = [];
  let length = 0;
  try {
    for await (const part of response as AsyncIterable<Buffer>) {
      length += part.length;
      if (length > LONGEST_ANSWER) break;
      parts.push(part);
    }
  } catch (error) {
    throw new Error(`the API server broke off in the middle of its answer: ${codeOf(error)}`, { cause: error });
  }
  if (length > LONGEST_ANSWER) throw new Error('the API server sends more than a list of pods can have');
  return Buffer.concat(parts).toString();
}

function readAccount(path: string): string {
  try {
    return readFileSync(path, 'utf8');
  } catch (error) {
    throw new Error(
      `no service account is mounted here (${codeOf(error)}): set automountServiceAccountToken: true in the pod`,
    );
  }
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
  return {
    uid,
    name: `${namespace}/${name}`,
    annotations,
    hostNetwork: spec['hostNetwork'] === true,
    ended: status['phase'] === 'Succeeded' || status['phase'] === 'Failed',
    containers,
  };
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
