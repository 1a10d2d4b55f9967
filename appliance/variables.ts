/**
 * The table of environment variables: what each is for, what it may say and how it is read. Without effects;
 * `settings.ts` finds the texts and reports what is wrong with them.
 */
import { isCron } from './kernel/schedule.ts';
import {
  contains,
  type DestinationRule,
  type Endpoint,
  formatPrefix,
  type PortRange,
  type Prefix,
  parseAddress,
  parseEndpoint,
  parsePrefix,
} from './protocol/address.ts';
import { isHost, isServiceName, parseNamedDetour, parsePort as port } from './protocol/names.ts';
import type { DetourSource, Key, ProviderName, Role, Side, Strategy } from './settings.ts';

/** The default port of the control protocol, for detours whose address names none. */
export const CONTROL_PORT = 45672;

/** Longest path of a unix socket: `sun_path` of linux/un.h without the closing zero. */
const LONGEST_SOCKET_PATH = 107;

/** A text that breaks its variable's rule; the message completes "DETOUR_X=...: ". */
export class Refused extends Error {}

export const refuse = (rule: string): never => {
  throw new Refused(rule);
};

export type Variable<T> = {
  readonly name: `DETOUR_${string}`;
  readonly roles: readonly Role[];
  /** Null when a value must be given, by whoever takes that side. */
  readonly default: string | null | Readonly<Record<Role, string>>;
  readonly doc: string;
  readonly example: string;
  readonly secret?: true;
  /** Without a default: only that side needs it (`DETOUR_ROLE`). */
  readonly side?: Side;
  /** @throws Refused */
  readonly parse: (text: string) => T;
};

const variable = <T>(row: Variable<T>): Variable<T> => row;

export const BOTH: readonly Role[] = ['router', 'client'];

function oneOf<T extends string>(...choices: readonly T[]): (text: string) => T {
  return (text) =>
    choices.find((choice) => choice === text.toLowerCase()) ?? refuse(`must be one of ${choices.join(', ')}`);
}

/** Longest name of an interface: IFNAMSIZ of linux/if.h without the closing zero. */
const LONGEST_INTERFACE = 15;

function interfaceGlob(text: string): string {
  if (text === '*') return text;
  if (/[\s/:!]/.test(text) || text === '.' || text === '..')
    refuse('has a name that no interface can have: use names as `ip -br link` prints them, with * and ?');
  if (/[[\]{}]/.test(text)) refuse('knows only * (any text) and ? (one character)');
  if (text.replaceAll('*', '').length > LONGEST_INTERFACE)
    refuse(`has a name longer than ${LONGEST_INTERFACE} characters`);
  return text;
}

/** Kinds of path in order; `auto` takes the order back. */
function strategy(text: string): Strategy {
  const words = list(text.toLowerCase(), (word) => word);
  const known = ['auto', 'nat', 'inband', 'vpn', 'announced'] as const;
  const choose = 'use auto, nat, inband, vpn, announced or several of them';
  const kinds = new Set<Strategy['kinds'][number]>();
  for (const [index, word] of words.entries()) {
    const found = known.find((one) => one === word) ?? refuse(`has a kind that is not known: ${choose}`);
    if (words.indexOf(word) !== index) refuse(`has ${word} twice`);
    // In-band joins fall back on leases, so they are a way to have those.
    kinds.add(found === 'auto' || found === 'inband' ? 'nat' : found);
  }
  if (kinds.size === 0) refuse(`names no kind: ${choose}`);
  const auto = words.includes('auto');
  const fallback = auto && !kinds.has('vpn');
  const inband = words.includes('inband') ? { inband: true } : {};
  return { kinds: [...kinds, ...(fallback ? (['vpn'] as const) : [])], ordered: !auto, fallback, ...inband };
}

function providers(text: string): readonly ProviderName[] {
  const names = list(text, oneOf('host', 'docker', 'kubernetes'));
  if (names.length === 0) refuse('names no provider');
  return new Set(names).size === names.length ? names : refuse('names one of them twice');
}

function sides(text: string): readonly Side[] {
  const names = list(text.toLowerCase(), oneOf('client', 'server'));
  if (names.length === 0) refuse('names no role');
  return new Set(names).size === names.length ? names : refuse('names one of them twice');
}

/** What `on` stands for: HTTPS. */
const ANNOUNCED_BY_DEFAULT = 443;
/** A detour grants a key so many (docs/protocol.md, Announcements). */
const MOST_ANNOUNCED = 8;

function announcedPorts(text: string): readonly number[] {
  if (/^(off|false|no)$/i.test(text)) return [];
  if (/^(on|true|yes)$/i.test(text)) return [ANNOUNCED_BY_DEFAULT];
  const ports = list(text, (item) => port(item) ?? refuse(`has "${item}": must be off, on, or ports from 1 to 65535`));
  if (ports.length === 0) refuse('must be off, on, or ports from 1 to 65535');
  if (ports.length > MOST_ANNOUNCED) refuse(`has ${ports.length} ports; at most ${MOST_ANNOUNCED} are possible`);
  return new Set(ports).size === ports.length ? ports : refuse('names a port twice');
}

/** A switch, as people write one. @throws Refused */
export function flag(text: string): boolean {
  if (/^(on|true|yes|1)$/i.test(text)) return true;
  if (/^(off|false|no|0)$/i.test(text)) return false;
  return refuse('must be on or off');
}

/** Items of a list; empty ones are an error, because a stray comma is usually a lost value. */
function list<T>(text: string, parse: (item: string) => T): readonly T[] {
  if (text.trim() === '') return [];
  return text.split(',').map((item) => {
    const trimmed = item.trim();
    if (trimmed === '') refuse('has an empty item: is there a comma too many?');
    return parse(trimmed);
  });
}

const DURATION_UNITS: Readonly<Record<string, number>> = { ms: 1, s: 1000, m: 60_000, h: 3_600_000 };

function duration(least: string, most: string): (text: string) => number {
  const read = (text: string): number | null => {
    const match = /^(\d{1,9})(ms|s|m|h)$/.exec(text);
    return match ? Number(match[1]) * (DURATION_UNITS[match[2] ?? ''] ?? Number.NaN) : null;
  };
  const lowest = read(least) ?? 0;
  const highest = read(most) ?? Number.POSITIVE_INFINITY;
  return (text) => {
    const value = read(text) ?? refuse('must be a number with a unit: ms, s, m or h');
    return value < lowest || value > highest ? refuse(`must be from ${least} to ${most}`) : value;
  };
}

function portRange(text: string): PortRange | null {
  const match = /^(\d+)(?:-(\d+))?$/.exec(text);
  const first = port(match?.[1] ?? '');
  const last = match?.[2] === undefined ? first : port(match[2]);
  return first === null || last === null || first > last ? null : { first, last };
}

/** `1.2.3.4:5`, `[v6]:5`, `:5` (every address), `localhost:5`. */
function listenAddress(text: string): Endpoint {
  // In brackets whichever family it has: that is how Kubernetes can be told to fill it in, as [$(POD_IP)]:PORT.
  const bare = text.replace(/^\[([\d.]+)\]/, '$1');
  const spelled = bare.startsWith(':') ? `[::]${bare}` : bare.replace(/^localhost:/i, '127.0.0.1:');
  return parseEndpoint(spelled) ?? refuse('must be ADDRESS:PORT with a literal address, or :PORT for every address');
}

/** `CIDR` or `CIDR:ports`; a bare address is a host. An IPv6 one with ports needs its /length or brackets. */
function destination(item: string): DestinationRule {
  const match =
    /^\[(?<v6>[^\]]+)\](?<v6length>\/\d+)?(?::(?<v6ports>[\d-]+))?$/.exec(item) ??
    /^(?<cidr>[^/]*:[^/]*\/\d+)(?::(?<cidrports>[\d-]+))?$/.exec(item) ??
    /^(?<v4>[\d./]+)(?::(?<v4ports>[\d-]+))?$/.exec(item);
  const { v6, v6length, v6ports, cidr, cidrports, v4, v4ports } = match?.groups ?? {};
  const text = v6 === undefined ? (cidr ?? v4 ?? item) : `${v6}${v6length ?? ''}`;
  const prefix =
    parsePrefix(text) ??
    refuse(
      /\/\d+$/.test(text) && parseAddress(text.split('/')[0] ?? '')
        ? `has "${item}", whose address has bits beyond its length, or whose length is too great`
        : `has "${item}", which is no CIDR[:ports]`,
    );
  const ports = v6ports ?? cidrports ?? v4ports;
  if (ports === undefined) return { prefix, ports: [] };
  return { prefix, ports: [portRange(ports) ?? refuse(`has "${item}", whose ports are no PORT or FIRST-LAST`)] };
}

/** Networks for tunnels, by the room that they leave: at least one client beside the router, at most a /8 of the IPv4 Internet. */
const VPN_LENGTHS = { 4: { least: 8, most: 30 }, 6: { least: 16, most: 126 } } as const;

function vpnNetworks(text: string): { readonly v4: Prefix | null; readonly v6: Prefix | null } {
  const found = list(text, (item) => {
    const prefix = parsePrefix(item) ?? refuse(`has "${item}", which is no CIDR, or has bits beyond its length`);
    const { least, most } = VPN_LENGTHS[prefix.address.family];
    if (prefix.length < least || prefix.length > most)
      refuse(`has "${item}", whose length is not from ${least} to ${most}`);
    const closed = NEVER_OPEN.find((never) => contains(never, prefix.address) || contains(prefix, never.address));
    return closed ? refuse(`has "${item}", which overlaps with ${formatPrefix(closed)}`) : prefix;
  });
  const of = (family: 4 | 6): Prefix | null => {
    const all = found.filter(({ address }) => address.family === family);
    if (all.length > 1) refuse(`has more than one IPv${family} network`);
    return all[0] ?? null;
  };
  const networks = { v4: of(4), v6: of(6) };
  return found.length === 0 ? refuse('names no network') : networks;
}

/** What no `DETOUR_ALLOW` can open; the same list as `NEVER` of router/policy.ts, which enforces it (a unit test compares). */
export const NEVER_OPEN = [
  '0.0.0.0/8',
  '127.0.0.0/8',
  '168.63.129.16/32',
  '169.254.0.0/16',
  '224.0.0.0/3',
  '::/8',
  '2001::/32',
  '2002::/16',
  'fe80::/10',
  'ff00::/8',
].map((text) => parsePrefix(text) ?? refuse(text));

function allowed(item: string): DestinationRule {
  const rule = destination(item);
  const closed = NEVER_OPEN.find((never) => never.length <= rule.prefix.length && contains(never, rule.prefix.address));
  return closed ? refuse(`has "${item}", but ${formatPrefix(closed)} can never be opened`) : rule;
}

const SECRET_BYTES = 32;

/** A secret that stands in a document or a test, or that no random source would give. */
function isGuessable(secret: Uint8Array): boolean {
  const steps = new Set(secret.map((byte, i) => (byte - (secret[i - 1] ?? byte) + 256) & 255).slice(1));
  return new Set(secret).size < 8 || steps.size === 1;
}

function key(text: string): Key {
  const [id = '', encoded = '', label, ...rest] = text.split(':');
  if (encoded === '' || rest.length > 0) refuse('must be keyid:secret, as `detour genkey` prints it');
  if (!/^[0-9a-f]{8}$/i.test(id)) refuse('has a key id that is not 8 hex digits');
  if (!/^[A-Za-z0-9_-]+$/.test(encoded)) refuse('has a secret that is not base64url (A-Z a-z 0-9 - _, no padding)');
  const secret = new Uint8Array(Buffer.from(encoded, 'base64url'));
  if (secret.length !== SECRET_BYTES) {
    refuse(`has a secret of ${secret.length} bytes instead of ${SECRET_BYTES} (43 base64url characters)`);
  }
  if (isGuessable(secret)) refuse('has a secret that anyone could guess: make one with `detour genkey`');
  if (label !== undefined && !/^[\w.@-]{1,64}$/.test(label)) {
    refuse('has a label with other characters than letters, digits and . _ @ - (at most 64)');
  }
  return { id: Number.parseInt(id, 16), secret, label: label ?? null };
}

/** Keys by comma or newline. In a file, empty lines and lines that begin with # do not count. */
function keys(text: string): readonly Key[] {
  const items = text
    .split('\n')
    .filter((line) => !/^\s*(#|$)/.test(line))
    .flatMap((line) => list(line, (item) => item));
  if (items.length === 0) refuse('holds no key');
  const parsed = items.map((item, i) => {
    try {
      return key(item);
    } catch (error) {
      return error instanceof Refused && items.length > 1 ? refuse(`key ${i + 1} ${error.message}`) : raise(error);
    }
  });
  const seen = new Set<number>();
  for (const { id } of parsed) {
    if (seen.has(id)) refuse(`has key id ${hex(id)} twice`);
    seen.add(id);
  }
  return parsed;
}

const raise = (error: unknown): never => {
  throw error;
};

const hex = (id: number): string => id.toString(16).padStart(8, '0');

const SOURCES = 'name=host:port (or name=[v6]:port), dns:NAME[:port], srv:NAME, file:PATH and http(s):URL';
/** Each costs a watch, a timer or a lookup of its own. */
const MOST_SOURCES = 256;
const LONGEST_URL = 2048;

function webSource(item: string): DetourSource {
  const bad = (rule: string): never => refuse(`has "${maskUrl(item)}", ${rule}`);
  let url: URL;
  try {
    url = new URL(item);
  } catch {
    return bad('which is no URL');
  }
  if (item.length > LONGEST_URL) bad(`which is longer than ${LONGEST_URL} characters`);
  const times = /^#at=(.+)$/.exec(url.hash)?.[1] ?? null;
  if (url.hash !== '' && times === null) bad('whose #... is not #at=MINUTE_HOUR_DAY_MONTH_WEEKDAY');
  // Blanks are awkward in a URL and in many files of variables, so cron's five fields are joined by underscores.
  const at = times === null ? null : times.replaceAll('_', ' ').replaceAll(/%2c/gi, ',');
  if (at !== null && !isCron(at)) bad('whose #at= is not five fields of cron joined by underscores');
  url.hash = '';
  return { kind: 'web', url: url.href, at };
}

function detourSource(item: string): DetourSource {
  if (/^https?:/i.test(item)) return webSource(item);
  const srv = /^srv:(.*)$/i.exec(item)?.[1]?.replace(/\.$/, '');
  if (srv !== undefined) {
    return isServiceName(srv)
      ? { kind: 'srv', name: srv }
      : refuse(`has "${item}", which is no srv:NAME such as srv:_detour._udp.example.org`);
  }
  const path = /^file:(?:\/\/(?=\/))?(.*)$/is.exec(item)?.[1];
  if (path !== undefined) {
    const absolute = /^\/(?!\/)/.test(path) && !path.endsWith('/') && !path.includes('\0');
    return absolute ? { kind: 'file', path } : refuse(`has "${item}", which is no file:/ABSOLUTE/PATH`);
  }
  const dns = /^dns:([^:]+)(?::(\d+))?$/i.exec(item);
  if (dns) {
    const [, host = '', portText] = dns;
    const number = portText === undefined ? CONTROL_PORT : port(portText);
    if (!isHost(host) || parseAddress(host) || number === null) refuse(`has "${item}", which is no dns:NAME[:port]`);
    return { kind: 'dns', host, port: number ?? CONTROL_PORT };
  }
  const fixed = parseNamedDetour(item);
  if (!fixed) return refuse(`has "${maskUrl(item)}", which is none of ${SOURCES}`);
  return { kind: 'static', ...fixed };
}

/** What makes two sources the same. */
function identity(source: DetourSource): string {
  switch (source.kind) {
    case 'static':
      return `${source.host}:${source.port}`.toLowerCase();
    case 'dns':
      return `dns:${source.host}:${source.port}`.toLowerCase();
    case 'srv':
      return `srv:${source.name}`.toLowerCase();
    case 'file':
      return `file:${source.path}`;
    case 'web':
      return source.url;
  }
}

function detourSources(text: string): readonly DetourSource[] {
  const sources = list(text, detourSource);
  if (sources.length === 0) refuse('names no detour');
  if (sources.length > MOST_SOURCES) refuse(`has ${sources.length} sources; at most ${MOST_SOURCES} are possible`);
  const names = new Set<string>();
  const identities = new Set<string>();
  for (const source of sources) {
    const same = identity(source);
    if (identities.has(same)) refuse(`has ${maskUrl(same)} twice`);
    identities.add(same);
    if (source.kind !== 'static') continue;
    if (names.has(source.name)) refuse(`has the name "${source.name}" twice`);
    names.add(source.name);
  }
  return sources;
}

function whole(least: number, most: number): (text: string) => number {
  return (text) => {
    const value = /^\d{1,9}$/.test(text) ? Number(text) : Number.NaN;
    return value >= least && value <= most ? value : refuse(`must be a whole number from ${least} to ${most}`);
  };
}

function absolutePath(longest: number): (text: string) => string {
  return (text) => {
    if (!text.startsWith('/') || text.includes('\0')) refuse('must be an absolute path');
    return Buffer.byteLength(text) <= longest ? text : refuse(`must have at most ${longest} bytes`);
  };
}

function fwmark(text: string): { readonly mark: number; readonly mask: number } {
  const [mark = Number.NaN, mask = Number.NaN, ...rest] = text
    .split('/')
    .map((part) => (/^(0x[0-9a-f]{1,8}|\d{1,10})$/i.test(part) ? Number(part) : Number.NaN));
  const fits = (value: number): boolean => value > 0 && value <= 0xffffffff;
  if (rest.length > 0 || !fits(mark) || !fits(mask)) refuse('must be MARK/MASK, both from 1 to 0xffffffff');
  if ((mark & ~mask) !== 0) refuse('has bits in the mark that are not in the mask');
  return { mark, mask };
}

/** Every variable there is, in the order of the documentation. */
export const TABLE = {
  keys: variable({
    name: 'DETOUR_KEYS',
    roles: ['router'],
    default: null,
    secret: true,
    doc: 'Accepted keys, `keyid:secret[:label]` by comma or newline; key id 8 hex digits, secret 32 bytes base64url. Make one with `detour genkey`.',
    example: '<keyid>:<secret>:laptop',
    parse: keys,
  }),
  key: variable({
    name: 'DETOUR_KEY',
    roles: ['client'],
    default: null,
    side: 'client',
    secret: true,
    doc: "This client's `keyid:secret`, one of the keys its detours accept. `DETOUR_ROLE=server` alone needs none.",
    example: '<keyid>:<secret>',
    parse: key,
  }),
  listen: variable({
    name: 'DETOUR_LISTEN',
    roles: ['router'],
    default: '[::]:45672',
    doc: 'UDP address of the control protocol; `:PORT` means every address.',
    example: '0.0.0.0:45672',
    parse: listenAddress,
  }),
  ports: variable({
    name: 'DETOUR_PORTS',
    roles: ['router'],
    default: '20000-29999',
    doc: 'TCP ports that leases may use. Open them in the firewall of the VPS.',
    example: '20000-20999',
    parse: (text) => portRange(text) ?? refuse('must be FIRST-LAST, both from 1 to 65535'),
  }),
  allow: variable({
    name: 'DETOUR_ALLOW',
    roles: ['router'],
    default: '',
    doc: 'Destinations `CIDR[:ports]` re-opened out of the default deny list (which holds everything that is not global unicast).',
    example: '10.20.0.0/16:443,[fd00:1::]/64:8000-8999',
    parse: (text) => list(text, allowed),
  }),
  deny: variable({
    name: 'DETOUR_DENY',
    roles: ['router'],
    default: '',
    doc: 'Destinations `CIDR[:ports]` denied besides the default list.',
    example: '198.41.0.0/24,2001:500::/30:443',
    parse: (text) => list(text, destination),
  }),
  relay: variable({
    name: 'DETOUR_RELAY',
    roles: ['router'],
    default: 'join',
    doc: 'What may be translated: `join` (MPTCP joins only), `mptcp` (also new MPTCP connections, which `DETOUR_RESCUE` of clients needs), `tcp` (any TCP: an open relay for its clients).',
    example: 'join',
    parse: oneOf('join', 'mptcp', 'tcp'),
  }),
  leaseTime: variable({
    name: 'DETOUR_LEASE_TIME',
    roles: ['router'],
    default: '10m',
    doc: 'Longest lease granted, 1m to 1h.',
    example: '10m',
    parse: duration('1m', '1h'),
  }),
  legacyV1: variable({
    name: 'DETOUR_LEGACY_V1',
    roles: ['router'],
    default: 'off',
    doc: "Also answer the thesis's MProxy v1 on the same port. It has no authentication: whoever reaches the port may relay joins.",
    example: 'off',
    parse: flag,
  }),
  detours: variable({
    name: 'DETOUR_DETOURS',
    roles: ['client'],
    default: null,
    side: 'client',
    doc: 'Where detours are, several sources by comma: `name=host:port`, `dns:NAME[:port]` (every address of the name), `srv:NAME`, `file:PATH`, `http(s):URL`; see "Sources of detours". `DETOUR_ROLE=server` alone needs none.',
    example: 'fra=192.0.2.10:45672,dns:detours.example.org,file:/etc/detour/detours.yaml',
    parse: detourSources,
  }),
  targets: variable({
    name: 'DETOUR_TARGETS',
    roles: ['client'],
    default: 'all',
    doc: 'Servers to act on, `CIDR[:ports]` by comma; `all` means every server.',
    example: '198.51.100.0/24:443',
    parse: (text) => (text.toLowerCase() === 'all' ? [] : list(text, destination)),
  }),
  exclude: variable({
    name: 'DETOUR_EXCLUDE',
    roles: ['client'],
    default: '',
    doc: 'Servers to leave alone, `CIDR[:ports]` by comma.',
    example: '10.0.0.0/8,[fd00::]/8:22',
    parse: (text) => list(text, destination),
  }),
  maxPaths: variable({
    name: 'DETOUR_MAX_PATHS',
    roles: ['client'],
    default: '2',
    doc: 'Extra subflows per connection, 1 to 8. A stock server accepts 2 (`ip mptcp limits` raises it there).',
    example: '2',
    // 8 is the kernel's own bound, MPTCP_SUBFLOWS_MAX in net/mptcp/pm_kernel.c up to 7.1.
    parse: whole(1, 8),
  }),
  strategy: variable({
    name: 'DETOUR_STRATEGY',
    roles: ['client'],
    default: 'auto',
    doc:
      'Kinds of path to use, in order: `nat` (leased from detours), `vpn` (through WireGuard tunnels to those that offer them; see docs/vpn.md) and `announced` (to further ' +
      'addresses that the server itself announces, ADD_ADDR of RFC 8684; see docs/path-selection.md). `auto` stands for `nat`, falls back to `vpn` with detours whose leases ' +
      'are of no use on this network, and leaves the order to measurement: `auto,vpn` has both from the start. `inband` is `nat` whose joins need not wait for a lease, with detours that take ' +
      'them (`DETOUR_INBAND`); `auto,inband` has it beside the rest. It takes BPF; see docs/inband.md.',
    example: 'auto,announced',
    parse: strategy,
  }),
  rescue: variable({
    name: 'DETOUR_RESCUE',
    roles: ['client'],
    default: 'off',
    doc: 'Reach a server through a detour while it does not answer new connections directly. Needs a detour with `DETOUR_RELAY=mptcp`.',
    example: 'on',
    parse: flag,
  }),
  sysctlRoot: variable({
    name: 'DETOUR_SYSCTL_ROOT',
    roles: ['client'],
    default: '/proc/sys',
    doc: "Where the loader finds `net/mptcp`. In a container /proc/sys is read-only: bind-mount the host's (all of `net` to serve containers and pods), and name it here.",
    example: '/host/proc/sys',
    parse: absolutePath(4095),
  }),
  http: variable({
    name: 'DETOUR_HTTP',
    roles: BOTH,
    default: { router: '127.0.0.1:9467', client: '127.0.0.1:9468' },
    doc: 'Address of `/healthz /readyz /metrics /v1/status`; read-only, without authentication. `off` disables it.',
    example: '127.0.0.1:9467',
    parse: (text) => (text.toLowerCase() === 'off' ? null : listenAddress(text)),
  }),
  socket: variable({
    name: 'DETOUR_SOCKET',
    roles: BOTH,
    default: { router: '/run/detour/router.sock', client: '/run/detour/client.sock' },
    doc: 'Unix socket of the CLI (`status`, `healthcheck`).',
    example: '/run/detour/router.sock',
    parse: absolutePath(LONGEST_SOCKET_PATH),
  }),
  fwmark: variable({
    name: 'DETOUR_FWMARK',
    roles: BOTH,
    default: '0xd7000000/0xff000000',
    doc: 'Mark and mask that our rules put on connections of ours, and only on those.',
    example: '0xd7000000/0xff000000',
    parse: fwmark,
  }),
  logLevel: variable({
    name: 'DETOUR_LOG_LEVEL',
    roles: BOTH,
    default: 'info',
    doc: '`trace`, `debug`, `info`, `warn`, `error` or `fatal`.',
    example: 'debug',
    parse: oneOf('trace', 'debug', 'info', 'warn', 'error', 'fatal'),
  }),
  logFormat: variable({
    name: 'DETOUR_LOG_FORMAT',
    roles: BOTH,
    default: 'json',
    doc: '`json` for machines, `pretty` for people.',
    example: 'pretty',
    parse: oneOf('json', 'pretty'),
  }),
  onExit: variable({
    name: 'DETOUR_ON_EXIT',
    roles: ['router'],
    default: 'keep',
    doc: '`keep` leaves running flows and leases alone, and the next start adopts them; `cleanup` removes table and leases.',
    example: 'cleanup',
    parse: oneOf('keep', 'cleanup'),
  }),
  inband: variable({
    name: 'DETOUR_INBAND',
    roles: ['router'],
    default: 'off',
    doc:
      'Accept in-band transit: joins over IPv4 that bring the address of their server with them, in a TCP option, to a port of `DETOUR_PORTS` of the ' +
      "client's own. No lease and no state for each server; see docs/inband.md.",
    example: 'on',
    parse: flag,
  }),
  announcePorts: variable({
    name: 'DETOUR_ANNOUNCE_PORTS',
    roles: ['router'],
    default: '',
    doc:
      'TCP ports at which servers that hold a key may be announced: joins of anybody to such a port are led to the server that asked for it first. ' +
      'Empty: none. Open them in the firewall of the VPS; nothing of its own may listen there. See docs/announce.md.',
    example: '443,8443',
    parse: (text) =>
      list(text, (item) => portRange(item) ?? refuse(`has "${item}", which is no PORT or FIRST-LAST from 1 to 65535`)),
  }),
  vpn: variable({
    name: 'DETOUR_VPN',
    roles: ['router'],
    default: 'off',
    doc: '`wireguard` also offers tunnels to clients: for networks where only UDP passes, and to hide destinations from them. Needs WireGuard in the kernel, or /dev/net/tun; see docs/vpn.md.',
    example: 'wireguard',
    parse: (text) => oneOf('off', 'wireguard')(text) === 'wireguard',
  }),
  vpnNetwork: variable({
    name: 'DETOUR_VPN_NETWORK',
    roles: ['router'],
    default: '10.215.0.0/16,fd0d:e70::/48',
    doc:
      'Addresses inside the tunnels, one IPv4 and/or one IPv6 network, whose first addresses are the router; no network of its own may overlap. ' +
      'Clients whose own networks do get an IPv4 address of 198.19.0.0/16 instead.',
    example: '10.215.0.0/16,fd0d:e70::/48',
    parse: vpnNetworks,
  }),
  vpnPort: variable({
    name: 'DETOUR_VPN_PORT',
    roles: ['router'],
    default: '51820',
    doc: 'UDP port of the tunnels. Open it in the firewall of the VPS.',
    example: '51820',
    parse: (text) => port(text) ?? refuse('must be a port from 1 to 65535'),
  }),
  mode: variable({
    name: 'DETOUR_MODE',
    roles: ['client'],
    default: 'aggregate',
    doc: '`aggregate` uses all paths at once; `backup` keeps detours in reserve, joined and silent; `failover` joins them only while the direct path is dead.',
    example: 'backup',
    parse: oneOf('aggregate', 'backup', 'failover'),
  }),
  minAge: variable({
    name: 'DETOUR_MIN_AGE',
    roles: ['client'],
    default: 'auto',
    doc: 'Leave connections alone until this long after they were established, `0ms` to `1h`. `auto` measures it: nothing, or 1 s for destinations whose connections are mostly over within a second.',
    example: '2s',
    parse: (text) => (text.toLowerCase() === 'auto' ? null : duration('0ms', '1h')(text)),
  }),
  interfaces: variable({
    name: 'DETOUR_INTERFACES',
    roles: ['client'],
    default: '',
    doc:
      'Globs (`*`, `?`) of local interfaces to use, all at once: direct paths and detours over each of them. Without it connections take the way that the ' +
      'routing table says. Every one needs a route of its own (`detour doctor` says what is missing).',
    example: 'eth*,wlan0',
    parse: (text) => list(text, interfaceGlob),
  }),
  interfacesExclude: variable({
    name: 'DETOUR_INTERFACES_EXCLUDE',
    roles: ['client'],
    default: '',
    doc: "Globs of local interfaces to leave alone. Alone it leaves the default routes' interfaces but these. What applications open is not moved.",
    example: 'docker*,wwan?',
    parse: (text) => list(text, interfaceGlob),
  }),
  providers: variable({
    name: 'DETOUR_PROVIDERS',
    roles: ['client'],
    default: 'host',
    doc:
      'Whose network namespaces to serve, any mix: `host` is the one that the agent runs in; `docker` those of containers with the label `detour.enable=true`; ' +
      '`kubernetes` those of pods of this node with the annotation `detour.dev/enable: "true"`. What else can be said there, and what each needs: docs/workloads.md.',
    example: 'host,docker',
    parse: providers,
  }),
  mptcpify: variable({
    name: 'DETOUR_MPTCPIFY',
    roles: ['client'],
    default: 'off',
    doc:
      'Make plain TCP sockets Multipath TCP, by BPF: `all` those of the namespaces that are served, `labelled` those of the containers and pods that ask for it ' +
      '(`detour.mptcp=true`). Takes Linux 6.6, and `CAP_BPF` and `CAP_PERFMON` or a `detour load` beforehand: docs/mptcpify.md.',
    example: 'labelled',
    parse: (text) => (/^(false|no|0)$/i.test(text) ? 'off' : oneOf('off', 'all', 'labelled')(text)),
  }),
  role: variable({
    name: 'DETOUR_ROLE',
    roles: ['client'],
    default: 'client',
    doc:
      'Which end of connections to act for: `client` gives those that are opened here more paths; `server` lets those that are accepted here have more than the two ' +
      'extra subflows of a stock kernel, and uses no detours; `client,server` does both: docs/mptcpify.md.',
    example: 'client,server',
    parse: sides,
  }),
  announce: variable({
    name: 'DETOUR_ANNOUNCE',
    roles: ['client'],
    default: 'off',
    doc:
      'With `DETOUR_ROLE=server`: TCP ports of this server that detours are asked to lead joins to, and at which its kernel announces them to all clients ' +
      '(ADD_ADDR); stock clients use them with no software of ours. `on` means 443. Needs `DETOUR_KEY`, `DETOUR_DETOURS` and detours with ' +
      '`DETOUR_ANNOUNCE_PORTS`; see docs/announce.md.',
    example: '443,8443',
    parse: announcedPorts,
  }),
};

export const ROWS: readonly Variable<unknown>[] = Object.values(TABLE);

/** One variable as the documentation shows it. */
export type VariableDoc = {
  readonly name: string;
  readonly roles: readonly Role[];
  readonly default: string;
  readonly meaning: string;
  readonly example: string;
  readonly secret: boolean;
};

/** The table of variables, for documents and for `doctor`. */
export function describeVariables(): readonly VariableDoc[] {
  return ROWS.map((row) => ({
    name: row.name,
    roles: row.roles,
    default:
      row.default === null
        ? 'required'
        : typeof row.default === 'string'
          ? row.default
          : `${row.default.router} (router), ${row.default.client} (client)`,
    meaning: row.doc,
    example: row.example,
    secret: row.secret === true,
  }));
}

/** Leaves out of URLs what may be a secret: user and password, and the values behind the question mark. */
export const maskUrl = (text: string): string =>
  text.replace(/\/\/[^/\s]*@/g, '//***@').replace(/(https?:[^\s,?#]*)\?[^\s,#]*/gi, '$1?***');
