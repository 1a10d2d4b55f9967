import { type Address, contains, embedsIPv4, parsePrefix } from '../protocol/address.ts';
import { isDetourName, isHost, type NamedDetour, parseHostPort, parseNamedDetour } from '../protocol/names.ts';

/**
 * Lists of detours as others hand them to us: what of a list can be used, and what is wrong with the rest. Whoever writes
 * a list may be mistaken or lie, so everything is bounded, and what is said about it holds positions and rules, never
 * text out of the list.
 */

/** Detours of one source; a list of ten thousand is a mistake or an attack, and every detour costs pings. */
export const MOST_PER_SOURCE = 64;
/** Complaints spelled out; the rest is counted. */
const MOST_COMPLAINTS = 5;
/** Entries that are looked at before the rest is only counted. */
const MOST_LOOKED_AT = 16_384;

export type Listing = {
  readonly detours: readonly NamedDetour[];
  /** Good entries beyond the bound. */
  readonly leftOut: number;
  /** One sentence each, for people; at most a handful. Empty when all is well. */
  readonly complaints: readonly string[];
};

/** The whole text is no list; the reason is for people. */
export type Unusable = { readonly unusable: string };

/** How a text looks: JSON begins with a bracket, lines have a name and `=` before anything else, the rest is YAML. */
export function formatOf(text: string): 'empty' | 'json' | 'lines' | 'yaml' {
  for (const line of text.split('\n', 1_000)) {
    const start = line.replace(/^\uFEFF/, '').trim();
    if (start === '' || start.startsWith('#')) continue;
    if (/^[{[]/.test(start)) return 'json';
    return /^[^\s:=]+=/.test(start) ? 'lines' : 'yaml';
  }
  return 'empty';
}

/** Gathers entries one by one, and what is to be said about them. */
class Gatherer {
  readonly #detours: NamedDetour[] = [];
  readonly #seen = new Set<string>();
  readonly #complaints: string[] = [];
  #bad = 0;
  #duplicates = 0;
  #leftOut = 0;

  add(detour: NamedDetour): void {
    const address = `${detour.host.toLowerCase()} ${detour.port}`;
    if (this.#seen.has(address)) this.#duplicates++;
    else if (this.#detours.length >= MOST_PER_SOURCE) this.#leftOut++;
    else {
      this.#seen.add(address);
      this.#detours.push(detour);
    }
  }

  refuse(complaint: string): void {
    this.#bad++;
    if (this.#complaints.length < MOST_COMPLAINTS) this.#complaints.push(complaint);
  }

  skip(entries: number): void {
    this.#leftOut += entries;
  }

  listing(): Listing {
    const complaints = [...this.#complaints];
    const untold = this.#bad - complaints.length;
    if (untold > 0) complaints.push(`${count(untold, 'more entry is', 'more entries are')} wrong`);
    if (this.#duplicates > 0) complaints.push(`${count(this.#duplicates, 'entry is', 'entries are')} there twice`);
    if (this.#leftOut > 0) {
      complaints.push(
        `${count(this.#leftOut, 'entry is', 'entries are')} left out, because one source may have ${MOST_PER_SOURCE}`,
      );
    }
    return { detours: this.#detours, leftOut: this.#leftOut, complaints };
  }
}

const count = (n: number, one: string, many: string): string => `${n} ${n === 1 ? one : many}`;

/** Reads a text of lines `name=host:port`; empty ones and those that begin with `#` do not count. */
export function readLines(text: string): Listing {
  const found = new Gatherer();
  let looked = 0;
  for (const [index, line] of text.split('\n').entries()) {
    const entry = line.replace(/^\uFEFF/, '').trim();
    if (entry === '' || entry.startsWith('#')) continue;
    if (++looked > MOST_LOOKED_AT) {
      found.skip(1);
      continue;
    }
    const detour = parseNamedDetour(entry);
    if (detour) found.add(detour);
    else found.refuse(`line ${index + 1} is no name=host:port`);
  }
  return found.listing();
}

type Fields = { readonly [field: string]: unknown };

const isFields = (value: unknown): value is Fields =>
  typeof value === 'object' && value !== null && !Array.isArray(value);

const field = (fields: Fields, name: string): unknown => (Object.hasOwn(fields, name) ? fields[name] : undefined);

/** Reads what JSON or YAML made of a text: `detours:` with a list of `{name, address}`, or such a list alone. */
export function readDocument(document: unknown): Listing | Unusable {
  const list = isFields(document) ? field(document, 'detours') : document;
  if (!Array.isArray(list)) {
    return {
      unusable: isFields(document)
        ? Object.hasOwn(document, 'detours')
          ? '"detours" is no list'
          : 'it has no list "detours"'
        : 'it is no list of detours',
    };
  }
  const found = new Gatherer();
  for (const [index, entry] of list.slice(0, MOST_LOOKED_AT).entries()) {
    const at = `detours[${index}]`;
    const name = isFields(entry) ? field(entry, 'name') : undefined;
    const address = isFields(entry) ? field(entry, 'address') : undefined;
    if (!isFields(entry)) found.refuse(`${at} is no {name, address}`);
    else if (typeof name !== 'string' || !isDetourName(name)) {
      found.refuse(`${at}.name is no text of 1 to 63 letters, digits and . _ -`);
    } else {
      const parsed = typeof address === 'string' ? parseHostPort(address) : null;
      if (parsed) found.add({ name, ...parsed });
      else found.refuse(`${at}.address is no host:port or [v6]:port`);
    }
  }
  found.skip(Math.max(0, list.length - MOST_LOOKED_AT));
  return found.listing();
}

/** One record of a service (RFC 2782), with the draw that decides its place among its equals: from 0 to below 1. */
export type DrawnRecord = {
  readonly target: string;
  readonly port: number;
  readonly priority: number;
  readonly weight: number;
  readonly draw: number;
};

/** A detour that a service record names; see `Rank` of manager.ts. */
export type RankedDetour = NamedDetour & { readonly preference: number; readonly order: number };

export type ServiceListing = { readonly detours: readonly RankedDetour[] } & Omit<Listing, 'detours'>;

/**
 * Turns service records into detours. Priorities become preferences, lowest first. Different weights within one priority
 * become an order, in which a record comes before another as often as its share of their weights says (RFC 2782, which
 * draws from the running sum; an exponential race, A. Efraimidis and P. Spirakis 2006, has the same distribution and
 * keeps its order when records come and go). Equal weights say nothing, so measurement decides.
 */
export function readServices(records: readonly DrawnRecord[]): ServiceListing {
  const found = new Gatherer();
  const ranks = new Map<string, { preference: number; order: number }>();
  // A single record with the target "." says that there is no such service here: an answer, and an empty one.
  const real = records.filter(({ target }) => target !== '' && target !== '.');
  const priorities = [...new Set(real.map(({ priority }) => priority))].sort((a, b) => a - b);
  for (const [preference, priority] of priorities.entries()) {
    const equals = real.filter((record) => record.priority === priority);
    const weighted = equals.some(({ weight }) => weight !== equals[0]?.weight);
    const raced = weighted ? [...equals].sort((a, b) => race(a) - race(b)) : equals;
    for (const [place, { target, port }] of raced.entries()) {
      if (!isHost(target) || port < 1 || port > 65535) {
        found.refuse('a record has a target that is no host name, or no port');
        continue;
      }
      const address = `${target.toLowerCase()} ${port}`;
      if (!ranks.has(address)) ranks.set(address, { preference, order: weighted ? place : 0 });
      found.add({ name: target, host: target, port });
    }
  }
  const { detours, ...rest } = found.listing();
  return {
    ...rest,
    detours: detours.map((one) => ({
      ...one,
      ...(ranks.get(`${one.host.toLowerCase()} ${one.port}`) ?? { preference: 0, order: 0 }),
    })),
  };
}

/** Weight 0 has "a very small chance of being selected" beside others (RFC 2782). */
const SMALLEST_WEIGHT = 0.01;

const race = ({ weight, draw }: DrawnRecord): number => -Math.log(1 - draw) / Math.max(weight, SMALLEST_WEIGHT);

const prefix = (text: string, what: string) => {
  const parsed = parsePrefix(text);
  if (!parsed) throw new Error(`not a prefix: ${text}`);
  return { prefix: parsed, what };
};

const NEVER = [
  prefix('0.0.0.0/8', 'unspecified'),
  prefix('127.0.0.0/8', 'loopback'),
  prefix('169.254.0.0/16', 'link-local'),
  prefix('224.0.0.0/4', 'multicast'),
  prefix('240.0.0.0/4', 'reserved'),
  prefix('::/128', 'unspecified'),
  prefix('::1/128', 'loopback'),
  prefix('fe80::/10', 'link-local'),
  prefix('ff00::/8', 'multicast'),
];

/** NAT64 (RFC 6052 2.1): on networks with IPv6 alone, DNS64 spells IPv4 detours so. */
const NAT64 = prefix('64:ff9b::/96', 'NAT64').prefix;

/**
 * Why an address that somebody else named can be no detour, in a word; null when it can. Private addresses can: inside a
 * company or a cluster they are where detours are, and all that a lying list gains by them is a few datagrams of 96
 * bytes that no other service understands, and whose answers count for nothing without the key.
 */
export function whyNoDetour(address: Address): string | null {
  const hidden = contains(NAT64, address) ? ({ family: 4, value: address.value & 0xffffffffn } as const) : address;
  for (const { prefix: never, what } of NEVER) if (contains(never, hidden)) return what;
  return embedsIPv4(hidden) ? 'an IPv4 address in disguise' : null;
}
