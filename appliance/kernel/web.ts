/** What a server says about a version of a page, to be shown to it when asking again (RFC 9110 8.8). */
export type Validators = { readonly etag: string | null; readonly lastModified: string | null };

export type Fetched =
  | ({ readonly kind: 'fresh'; readonly text: string } & Validators)
  /** The server says that it is as it was. */
  | { readonly kind: 'unchanged' };

export type Web = {
  /**
   * Fetches a text of at most `longest` bytes. User and password of the URL become basic authentication, for its own
   * origin only.
   * @throws Error whose message says what is wrong and holds nothing secret
   */
  get(url: string, known: Validators, longest: number): Promise<Fetched>;
};

/** A server that trickles is as good as one that is silent. */
const DEADLINE_MS = 10_000;
const MOST_REDIRECTS = 3;
const REDIRECTS = [301, 302, 303, 307, 308];
/** A validator is sent back as it came; longer ones are not worth it. */
const LONGEST_VALIDATOR = 256;

/** The name of an operating system's or undici's error, which is what the cause chain ends in. */
function reasonOf(error: unknown): string {
  if (error instanceof DOMException && error.name === 'TimeoutError') return 'no whole answer in time';
  let last: unknown = error;
  for (let depth = 0; depth < 5 && last instanceof Error && last.cause !== undefined; depth++) last = last.cause;
  if (last instanceof AggregateError) last = last.errors[0];
  if (last instanceof Error && 'code' in last && typeof last.code === 'string') return last.code;
  // https://fetch.spec.whatwg.org/#port-blocking
  if (last instanceof Error && last.message === 'bad port') return 'that port belongs to another protocol';
  return 'the connection failed';
}

/** Where an answer points to; null when it is no place we go. */
function redirectOf(from: URL, location: string | null): URL | null {
  let to: URL;
  try {
    to = new URL(location ?? '', from);
  } catch {
    return null;
  }
  // Who can send us anywhere without encryption could use this host to knock at its neighbours' doors.
  const safe =
    to.protocol === 'https:' || (to.protocol === 'http:' && from.protocol === 'http:' && to.host === from.host);
  to.username = '';
  to.password = '';
  to.hash = '';
  return safe && location !== null ? to : null;
}

async function readText(response: Response, longest: number): Promise<string> {
  const parts: Uint8Array[] = [];
  let length = 0;
  // Counted after decompression, so a small body that unpacks to a huge one ends here too.
  for await (const part of response.body ?? []) {
    length += part.length;
    if (length > longest) throw new Refusal(`the answer has more than ${longest / 1024} kB`);
    parts.push(part);
  }
  return Buffer.concat(parts).toString('utf8');
}

async function follow(start: URL, headers: Headers, signal: AbortSignal): Promise<Response> {
  let url = start;
  for (let hop = 0; hop <= MOST_REDIRECTS; hop++) {
    const response = await fetch(url, { headers, redirect: 'manual', signal });
    if (!REDIRECTS.includes(response.status)) return response;
    await response.body?.cancel();
    const next = redirectOf(url, response.headers.get('location'));
    if (!next) throw new Refusal('it redirects to a place that is neither https nor its own host');
    if (next.origin !== start.origin) headers.delete('authorization');
    url = next;
  }
  throw new Refusal(`it redirects more than ${MOST_REDIRECTS} times`);
}

/** A message of our own, safe to show. */
class Refusal extends Error {}

/** The machine's own. `deadlineMs` is from the question to the last byte of the answer. */
export const systemWeb = (deadlineMs = DEADLINE_MS): Web => ({
  async get(address, { etag, lastModified }, longest) {
    const url = new URL(address);
    const headers = new Headers({ accept: 'application/json, application/yaml;q=0.9, text/plain;q=0.8' });
    headers.set('user-agent', 'detour-client');
    if (etag !== null) headers.set('if-none-match', etag);
    if (lastModified !== null) headers.set('if-modified-since', lastModified);
    if (url.username !== '' || url.password !== '') {
      const pair = `${decodeURIComponent(url.username)}:${decodeURIComponent(url.password)}`;
      headers.set('authorization', `Basic ${Buffer.from(pair).toString('base64')}`);
    }
    url.username = '';
    url.password = '';
    const end = new AbortController();
    const signal = AbortSignal.any([AbortSignal.timeout(deadlineMs), end.signal]);
    try {
      const response = await follow(url, headers, signal);
      if (response.status === 304 && (etag !== null || lastModified !== null)) return { kind: 'unchanged' };
      if (response.status !== 200) throw new Refusal(`it answers with status ${response.status}`);
      const announced = Number(response.headers.get('content-length') ?? 0);
      if (announced > longest) throw new Refusal(`the answer has more than ${longest / 1024} kB`);
      const validator = (name: string): string | null => {
        const value = response.headers.get(name);
        return value !== null && value.length <= LONGEST_VALIDATOR ? value : null;
      };
      const text = await readText(response, longest);
      return { kind: 'fresh', text, etag: validator('etag'), lastModified: validator('last-modified') };
    } catch (error) {
      throw error instanceof Refusal ? error : new Error(reasonOf(error));
    } finally {
      // Lets go of a body that nobody read, and of its connection.
      end.abort();
    }
  },
});
