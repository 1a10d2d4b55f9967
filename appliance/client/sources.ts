import type { Cancel, Clock } from '../kernel/clock.ts';
import type { Files } from '../kernel/files.ts';
import type { Lookup } from '../kernel/lookup.ts';
import type { Schedule } from '../kernel/schedule.ts';
import type { Validators, Web } from '../kernel/web.ts';
import type { Log } from '../log.ts';
import { type Address, formatAddress, formatEndpoint, parseAddress } from '../protocol/address.ts';
import type { DetourSource, FixedSource } from '../settings.ts';
import type { DetourAddress } from './detours.ts';
import {
  formatOf,
  type Listing,
  MOST_PER_SOURCE,
  readDocument,
  readLines,
  readServices,
  type Unusable,
  whyNoDetour,
} from './listing.ts';
import { codeOf, createNames, type KnownName, roughly } from './names.ts';

/** What one source gives, for people and for metrics. */
export type SourceStatus = {
  /** `static`, `dns:NAME:PORT`, `srv:NAME`, `file:PATH` or a URL without its secrets. */
  readonly source: string;
  readonly state: 'starting' | 'ok' | 'failing';
  /** Addresses in use that it gave. */
  readonly detours: number;
  /** What it gave beyond the bounds. */
  readonly leftOut: number;
  /** When it last answered, on the clock's monotonic scale; null before. */
  readonly answeredAt: number | null;
  /** Questions that failed since the start. */
  readonly failures: number;
  /** What is wrong; null when nothing is. */
  readonly why: string | null;
};

export type Sources = {
  status(): readonly SourceStatus[];
  /** Asks at once whatever failed: the network changed. */
  retry(): void;
  /** Stops watching and asking. */
  stop(): void;
};

export type SourcePorts = {
  readonly clock: Clock;
  readonly lookup: Lookup;
  readonly files: Files;
  readonly web: Web;
  readonly schedule: Schedule;
};

export type SourcesOptions = SourcePorts & {
  readonly sources: readonly DetourSource[];
  readonly log: Log;
  /** The whole list, whenever it changed. */
  readonly onChange: (addresses: readonly DetourAddress[]) => void;
};

/** In all; the sources named first come first. Each costs a socket and a datagram every 25 s. */
export const MOST_DETOURS = 256;
/** Lists on the web and service records; one question a minute, of a few hundred bytes when nothing changed. */
const AGAIN_MS = 60_000;
const RETRY_FIRST_MS = 5_000;
/** Where a user chose rare times, an unreachable server is still asked this often. */
const RETRY_LONGEST_MS = 600_000;
/** Ten thousand entries fit: enough to say how many were left out. */
const LONGEST_LIST = 1024 * 1024;
/** Reading YAML takes about 1.3 ms per kilobyte, during which the agent does nothing else. */
const LONGEST_YAML = { file: 512 * 1024, web: 64 * 1024 } as const;

/** A detour as a source gave it: by name or by literal address. */
type Given = {
  /** Null when every address of the host is a machine of its own (`dns:`), which is then named after it. */
  readonly name: string | null;
  readonly host: string;
  readonly port: number;
  readonly preference: number;
  readonly order: number;
};

type Found = Pick<Listing, 'leftOut' | 'complaints'> & { readonly given: readonly Given[] };

/** One source and what it said last. */
type Feed = {
  readonly label: string;
  /** Whether the operator of this host wrote it: addresses in it are meant, and its names go first. */
  readonly own: boolean;
  /** Most addresses of it in use. */
  readonly most: number;
  found: Found;
  answeredAt: number | null;
  failing: string | null;
  failures: number;
  /** What the log said last of the list and of its addresses; empty when all was well. */
  said: string;
  saidAddresses: string;
  /** As of the last look at its names: whether one of them was never answered, and what came of the rest. */
  pending: boolean;
  used: number;
  over: number;
  troubles: readonly string[];
};

const NOTHING: Found = { given: [], leftOut: 0, complaints: [] };

/**
 * Turns sources into addresses, now and whenever they change. A source that fails keeps what it gave last; what is wrong
 * with a part of it costs that part alone. Never throws.
 */
export function watchSources(options: SourcesOptions): Sources {
  const { clock, log, files, schedule, onChange } = options;
  const fixed = feedOf('static', true, MOST_DETOURS);
  const feeds: Feed[] = [];
  const stops: Cancel[] = [];
  const retries: (() => void)[] = [];
  let last = '[]';
  let stopped = false;

  const names = createNames({ clock, lookup: options.lookup, onChange: publish });

  function publish(): void {
    if (stopped) return;
    const all = new Map<string, DetourAddress>();
    for (const feed of feeds) {
      collect(feed, all, (host) => names.of(host));
      sayAddresses(feed);
    }
    const text = JSON.stringify([...all.values()].map(({ key, name, rank }) => [key, name, rank]));
    if (text === last) return;
    last = text;
    onChange([...all.values()]);
  }

  function update(): void {
    const wanted = new Map<string, boolean>();
    for (const { found, own } of feeds) {
      for (const { host } of found.given) {
        if (!parseAddress(host)) wanted.set(host, own || wanted.get(host) === true);
      }
    }
    names.want(wanted);
    publish();
  }

  function accept(feed: Feed, found: Found | null): void {
    feed.answeredAt = clock.now();
    feed.failing = null;
    if (found) feed.found = found;
    sayList(feed);
    if (found) update();
  }

  function refuse(feed: Feed, why: string): void {
    feed.failing = why;
    feed.failures++;
    sayList(feed);
  }

  /** Says it once: when it begins, when a file has new mistakes, and when all is well again. */
  function sayList(feed: Feed): void {
    const { label: source, failing } = feed;
    const why = failing ?? feed.found.complaints.join('; ');
    const key = failing !== null && !source.startsWith('file:') ? 'failing' : why;
    if (key === feed.said) return;
    const before = feed.said;
    feed.said = key;
    if (failing !== null) {
      const still = feed.answeredAt === null ? '' : '; what it said last still counts';
      log.warn('source-failed', { source, why }, `No detours can be had from ${source}: ${why}${still}`);
    } else if (why !== '') {
      log.warn('source-flawed', { source, why }, `Parts of ${source} cannot be used: ${why}`);
    } else if (before !== '') {
      log.info('source-recovered', { source }, `${source} is fine again`);
    }
  }

  function sayAddresses(feed: Feed): void {
    const { label: source, own } = feed;
    const why = feed.troubles.join('; ');
    // Somebody else's list may change its mistakes every minute; one line tells of them all.
    const key = own || why === '' ? why : 'flawed';
    if (key === feed.saidAddresses) return;
    feed.saidAddresses = key;
    if (why !== '') log.warn('source-flawed', { source, why }, `Parts of ${source} cannot be used: ${why}`);
    else log.info('source-recovered', { source }, `${source} is fine again`);
  }

  /** Reads a source at once, then `everyMs` after each answer (null: only when told), and sooner after a failure. */
  function keepReading(feed: Feed, read: () => Promise<Found | null>, everyMs: number | null, retryMs: number | null) {
    let running = false;
    let again = false;
    let retry = RETRY_FIRST_MS;
    let timer: Cancel | null = null;
    const go = async (): Promise<void> => {
      if (stopped) return;
      again = running;
      if (running) return;
      timer?.();
      timer = null;
      running = true;
      let wait = everyMs;
      try {
        const found = await read();
        if (stopped) return;
        retry = RETRY_FIRST_MS;
        accept(feed, found);
      } catch (error) {
        if (stopped) return;
        refuse(feed, error instanceof Error ? error.message : 'unknown error');
        if (retryMs !== null) {
          wait = retry;
          retry = Math.min(retry * 2, retryMs);
        }
      } finally {
        running = false;
      }
      if (again) await go();
      else if (wait !== null) timer = clock.after(roughly(wait, clock), () => void go());
    };
    stops.push(() => timer?.());
    retries.push(() => {
      if (feed.failing !== null) void go();
    });
    void go();
    return () => void go();
  }

  const labels = new Map<string, number>();
  const unique = (label: string): string => {
    // Two URLs may differ in what a label must not show.
    const times = (labels.get(label) ?? 0) + 1;
    labels.set(label, times);
    return times === 1 ? label : `${label} (${times})`;
  };
  const given: Given[] = [];
  for (const source of options.sources) {
    if (source.kind === 'static') {
      if (given.length === 0) feeds.push(fixed);
      given.push({ name: source.name, host: source.host, port: source.port, preference: 0, order: 0 });
      continue;
    }
    // Of a name in DETOUR_DETOURS itself only the answers are somebody else's.
    const own = source.kind === 'file' || source.kind === 'dns';
    const feed = feedOf(unique(labelOf(source)), own, MOST_PER_SOURCE);
    feeds.push(feed);
    if (source.kind === 'dns') {
      feed.answeredAt = clock.now();
      const { host, port } = source;
      feed.found = { ...NOTHING, given: [{ name: null, host, port, preference: 0, order: 0 }] };
      continue;
    }
    const read = readerOf(source, options);
    if (source.kind === 'file') {
      stops.push(files.watch(source.path, keepReading(feed, read, null, null)));
    } else if (source.kind === 'web' && source.at !== null) {
      stops.push(schedule(source.at, keepReading(feed, read, null, RETRY_LONGEST_MS)));
    } else {
      keepReading(feed, read, AGAIN_MS, AGAIN_MS);
    }
  }
  fixed.found = { ...NOTHING, given };
  fixed.answeredAt = clock.now();
  update();

  return {
    status: () => feeds.map(statusOf),
    retry() {
      names.retry();
      for (const retry of retries) retry();
    },
    stop() {
      stopped = true;
      for (const stop of stops) stop();
      names.stop();
    },
  };
}

function feedOf(label: string, own: boolean, most: number): Feed {
  return {
    label,
    own,
    most,
    found: NOTHING,
    answeredAt: null,
    failing: null,
    failures: 0,
    said: '',
    saidAddresses: '',
    pending: false,
    used: 0,
    over: 0,
    troubles: [],
  };
}

/** Adds the addresses of a source to `all`, as far as there is room, and notes what stood in the way. */
function collect(feed: Feed, all: Map<string, DetourAddress>, known: (host: string) => KnownName | null): void {
  const unresolved: string[] = [];
  const refused = new Map<string, number>();
  const ranked = feed.found.given.some(({ preference, order }) => preference > 0 || order > 0);
  let pending = false;
  let used = 0;
  let over = 0;
  for (const { name, host, port, preference, order } of feed.found.given) {
    const literal = parseAddress(host);
    const answer = literal ? null : known(host);
    if (!literal && answer === null) pending = true;
    if (answer?.why) unresolved.push(`${host} (${answer.why})`);
    for (const address of literal ? [literal] : (answer?.addresses ?? [])) {
      // What the operator of this host wrote in figures is meant; what a resolver or a server says may be a lie.
      const why = literal && feed.own ? null : whyNoDetour(address);
      if (why !== null) {
        refused.set(why, (refused.get(why) ?? 0) + 1);
        continue;
      }
      const endpoint = { address, port };
      const key = formatEndpoint(endpoint);
      // One address found twice is one detour; the source named first gives it its name.
      if (all.has(key)) continue;
      if (used >= feed.most || all.size >= MOST_DETOURS) {
        over++;
        continue;
      }
      used++;
      const rank = ranked ? { source: feed.label, preference, order } : undefined;
      all.set(key, { key, name: name ?? nameOf(host, address), endpoint, rank });
    }
  }
  const troubles: string[] = [];
  if (unresolved.length > 0) {
    const untold = unresolved.length - 3;
    const told = unresolved.slice(0, 3).join(', ');
    troubles.push(`does not resolve: ${told}${untold > 0 ? ` and ${untold} more` : ''}`);
  }
  for (const [why, times] of refused) {
    const hint = feed.own ? ' (write the address itself if you mean it)' : '';
    troubles.push(`${times} ${times === 1 ? 'address is' : 'addresses are'} ${why}, which no detour may have${hint}`);
  }
  if (over > 0) {
    troubles.push(
      `${over} ${over === 1 ? 'address is' : 'addresses are'} left out: at most ${feed.most} of one source, ${MOST_DETOURS} in all`,
    );
  }
  feed.pending = pending;
  feed.used = used;
  feed.over = over;
  feed.troubles = troubles;
}

/** Addresses behind a `dns:` name are machines of their own; those of a named detour are ways to one machine. */
const nameOf = (host: string, address: Address): string => `${host}/${formatAddress(address)}`;

function statusOf(feed: Feed): SourceStatus {
  const why = [feed.failing, ...feed.found.complaints, ...feed.troubles].filter((text) => text !== null).join('; ');
  const broken = feed.failing !== null || (feed.used === 0 && feed.troubles.length > 0);
  const waiting = feed.answeredAt === null || (feed.used === 0 && feed.pending);
  return {
    source: feed.label,
    state: broken ? 'failing' : waiting ? 'starting' : 'ok',
    detours: feed.used,
    leftOut: feed.found.leftOut + feed.over,
    answeredAt: feed.answeredAt,
    failures: feed.failures,
    why: why === '' ? null : why,
  };
}

/** A source as the log, metrics and `status` call it. */
export function labelOf(source: DetourSource): string {
  switch (source.kind) {
    case 'static':
      return 'static';
    case 'dns':
      return `dns:${source.host}:${source.port}`;
    case 'srv':
      return `srv:${source.name}`;
    case 'file':
      return `file:${source.path}`;
    case 'web': {
      const { origin, pathname } = new URL(source.url);
      return `${origin}${pathname}`;
    }
  }
}

type ListedSource = Extract<DetourSource, { kind: 'srv' | 'file' | 'web' }>;

/**
 * How to read a source, again and again; null is an answer that says that nothing changed.
 * Reading throws an Error whose message is made for people and holds nothing secret.
 */
function readerOf(source: ListedSource, ports: Omit<SourcePorts, 'schedule'>): () => Promise<Found | null> {
  switch (source.kind) {
    case 'srv':
      return serviceReader(source.name, ports);
    case 'file':
      return fileReader(source.path, ports);
    case 'web':
      return webReader(source.url, ports);
  }
}

function serviceReader(name: string, { clock, lookup }: Pick<SourcePorts, 'clock' | 'lookup'>) {
  /** A record keeps its draw as long as it is there, so that the order does not change with every question. */
  let draws = new Map<string, number>();
  return async (): Promise<Found> => {
    let records: Awaited<ReturnType<Lookup['services']>>;
    try {
      records = await lookup.services(name);
    } catch (error) {
      throw new Error(`the name has no service records, or nobody answers (${codeOf(error)})`);
    }
    const before = draws;
    draws = new Map();
    const drawn = records.slice(0, MOST_RECORDS).map((record) => {
      const key = `${record.target} ${record.port}`;
      const draw = before.get(key) ?? chance(clock);
      draws.set(key, draw);
      return { ...record, draw };
    });
    const { detours, ...rest } = readServices(drawn);
    return { ...rest, given: detours };
  };
}

/** More do not fit into an answer over TCP. */
const MOST_RECORDS = 4_096;

function chance(clock: Clock): number {
  const bytes = new Uint8Array(clock.random(4));
  return new DataView(bytes.buffer).getUint32(0) / 2 ** 32;
}

const FILE_TROUBLES: Readonly<Record<string, string>> = {
  ENOENT: 'there is no such file',
  ENOTDIR: 'there is no such file',
  EACCES: 'it may not be read',
  'not a file': 'it is no regular file',
  'too big': `it has more than ${LONGEST_LIST / 1024} kB`,
};

function fileReader(path: string, { files }: Pick<SourcePorts, 'files'>) {
  let before: string | null = null;
  let failed: Error | null = null;
  return async (): Promise<Found | null> => {
    let text: string;
    try {
      text = await files.read(path, LONGEST_LIST);
    } catch (error) {
      before = null;
      const code = codeOf(error);
      throw new Error(FILE_TROUBLES[code] ?? `it cannot be read (${code})`);
    }
    if (text === before) {
      if (failed) throw failed;
      return null;
    }
    before = text;
    failed = null;
    try {
      return await parse(text, LONGEST_YAML.file);
    } catch (error) {
      failed = error instanceof Error ? error : new Error('it cannot be read');
      throw failed;
    }
  };
}

function webReader(url: string, { web }: Pick<SourcePorts, 'web'>) {
  let known: Validators = { etag: null, lastModified: null };
  let before: string | null = null;
  return async (): Promise<Found | null> => {
    const answer = await web.get(url, known, LONGEST_LIST);
    if (answer.kind === 'unchanged') return null;
    if (answer.text !== before) {
      const found = await parse(answer.text, LONGEST_YAML.web);
      before = answer.text;
      known = answer;
      return found;
    }
    known = answer;
    return null;
  };
}

/** Reads a list in whichever format it is. @throws Error that says why it is none */
async function parse(text: string, longestYaml: number): Promise<Found> {
  const listing = await read(text, longestYaml);
  if ('unusable' in listing) throw new Error(listing.unusable);
  const { detours, ...rest } = listing;
  return { ...rest, given: detours.map((one) => ({ ...one, preference: 0, order: 0 })) };
}

async function read(text: string, longestYaml: number): Promise<Listing | Unusable> {
  switch (formatOf(text)) {
    case 'empty':
      // A file that somebody is about to write looks like this; a list that has none says so.
      return { unusable: 'it is empty; a list without detours is written detours: []' };
    case 'lines':
      return readLines(text);
    case 'json':
      try {
        return readDocument(JSON.parse(text.replace(/^\uFEFF/, '')));
      } catch {
        // YAML may begin with a bracket too, and its parser knows in which line the mistake is.
        return readYaml(text, longestYaml);
      }
    case 'yaml':
      return readYaml(text, longestYaml);
  }
}

async function readYaml(text: string, longest: number): Promise<Listing | Unusable> {
  if (text.length > longest) {
    return { unusable: `it is no JSON and has more than ${longest / 1024} kB, too much for YAML; write it as JSON` };
  }
  // The parser takes 8 MB, which an agent without such a list need not carry.
  const { isMap, isScalar, LineCounter, parseDocument } = await import('yaml');
  const lines = new LineCounter();
  try {
    const document = parseDocument(text, {
      schema: 'core',
      lineCounter: lines,
      // Each of these costs the square of what a hostile text holds; a doubled `detours` is looked for below.
      uniqueKeys: false,
      prettyErrors: false,
    });
    const problem = document.errors[0] ?? document.warnings[0];
    if (problem) {
      const { line, col } = lines.linePos(problem.pos[0]);
      const rule = problem.code.toLowerCase().replaceAll('_', ' ');
      return { unusable: `it is neither JSON nor YAML: ${rule}, line ${line}, column ${col}` };
    }
    const { contents } = document;
    if (isMap(contents)) {
      const lists = contents.items.filter(({ key }) => isScalar(key) && key.value === 'detours');
      if (lists.length > 1) return { unusable: 'it has "detours" twice' };
    }
    // No aliases: a few lines of them can stand for gigabytes.
    return readDocument(document.toJS({ maxAliasCount: 0 }));
  } catch (error) {
    return {
      unusable:
        error instanceof ReferenceError ? 'it uses YAML aliases (*name), which are not supported' : 'it is no YAML',
    };
  }
}

/** One look at a source, for `doctor`: sources whose hosts can be looked up, and what is wrong with the rest. */
export async function lookAtSource(
  source: DetourSource,
  ports: Omit<SourcePorts, 'schedule'>,
): Promise<{ readonly detours: readonly FixedSource[]; readonly complaints: readonly string[] }> {
  if (source.kind === 'static' || source.kind === 'dns') return { detours: [source], complaints: [] };
  try {
    const found = await readerOf(source, ports)();
    const detours = (found?.given ?? []).map(({ name, host, port }): FixedSource => {
      return { kind: 'static', name: name ?? host, host, port };
    });
    return { detours, complaints: found?.complaints ?? [] };
  } catch (error) {
    return { detours: [], complaints: [error instanceof Error ? error.message : 'unknown error'] };
  }
}
