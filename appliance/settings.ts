/**
 * The one place where the environment becomes settings. Everything that is wrong is found in one go; what comes out is
 * typed, checked and frozen. The variables themselves are rows of `variables.ts`.
 */
import { readFileSync, statSync } from 'node:fs';
import convict from 'convict';
import { Fatal } from './exit.ts';
import {
  type DestinationRule,
  type Endpoint,
  formatEndpoint,
  formatPrefix,
  type PortRange,
  type Prefix,
} from './protocol/address.ts';
import { BOTH, maskUrl, Refused, ROWS, refuse, TABLE, type Variable } from './variables.ts';

export type Role = 'router' | 'client';

/** What both daemons share. Durations are milliseconds everywhere in the program. */
export type CommonSettings = {
  /** Null when the HTTP listener is off. */
  readonly http: Endpoint | null;
  /** Path of the CLI's unix socket. */
  readonly socket: string;
  readonly fwmark: { readonly mark: number; readonly mask: number };
  readonly logLevel: 'trace' | 'debug' | 'info' | 'warn' | 'error' | 'fatal';
  readonly logFormat: 'json' | 'pretty';
};

/** A shared key; `secret` has 32 bytes and never leaves the process. */
export type Key = { readonly id: number; readonly secret: Uint8Array; readonly label: string | null };

export type RouterSettings = CommonSettings & {
  readonly keys: readonly Key[];
  readonly listen: Endpoint;
  readonly ports: PortRange;
  readonly allow: readonly DestinationRule[];
  readonly deny: readonly DestinationRule[];
  readonly relay: 'join' | 'mptcp' | 'tcp';
  /** Milliseconds. */
  readonly leaseTime: number;
  readonly legacyV1: boolean;
  readonly onExit: 'keep' | 'cleanup';
  /** Null while it offers no tunnels. */
  readonly vpn: VpnSettings | null;
  /** Whether joins may bring their server's address with them. */
  readonly inband: boolean;
  /** Ports that servers may ask to be reached at by anybody's joins; empty for none. */
  readonly announce: readonly PortRange[];
};

/** What a router says of its tunnels. At least one family is carried. */
export type VpnSettings = {
  /** UDP port. */
  readonly port: number;
  readonly v4: Prefix | null;
  readonly v6: Prefix | null;
};

/** Where detours come from. */
export type DetourSource =
  | { readonly kind: 'static'; readonly name: string; readonly host: string; readonly port: number }
  /** Every address of a name. */
  | { readonly kind: 'dns'; readonly host: string; readonly port: number }
  /** Service records (RFC 2782). */
  | { readonly kind: 'srv'; readonly name: string }
  /** A list in a file; the path is absolute. */
  | { readonly kind: 'file'; readonly path: string }
  /** A list on a web server. The URL may hold a password; `at` is a cron expression, null for every minute. */
  | { readonly kind: 'web'; readonly url: string; readonly at: string | null };

/** Sources that need nobody to be read but a resolver. */
export type FixedSource = Extract<DetourSource, { kind: 'static' | 'dns' }>;

/** Kinds of further paths. */
export type Strategy = {
  readonly kinds: readonly ('nat' | 'vpn' | 'announced')[];
  /** Free places go to those named first. */
  readonly ordered: boolean;
  /** `vpn` is not asked for, but may be used through detours whose leases are of no use. */
  readonly fallback?: boolean;
  /** Joins name their server themselves where detours take that and there is no lease yet. */
  readonly inband?: boolean;
};

/** `host` is the network namespace that the agent runs in. */
export type ProviderName = 'host' | 'docker' | 'kubernetes';

/** Which end of connections an agent acts for. */
export type Side = 'client' | 'server';

/** Whose plain TCP sockets become Multipath TCP. */
export type Mptcpify = 'off' | 'all' | 'labelled';

/** What a server needs to have detours announced. */
export type Announcing = {
  readonly key: Key;
  readonly detours: readonly DetourSource[];
  /** The server's own TCP ports. */
  readonly ports: readonly number[];
};

export type ClientSettings = CommonSettings & {
  /** At least one, none twice. */
  readonly sides: readonly Side[];
  /** Null without the client's side, which alone talks to detours. */
  readonly key: Key | null;
  /** None without the client's side. */
  readonly detours: readonly DetourSource[];
  /** Empty means every server. */
  readonly targets: readonly DestinationRule[];
  readonly exclude: readonly DestinationRule[];
  readonly maxPaths: number;
  readonly strategy: Strategy;
  /** Globs of names; null: routing decides. Nothing to include means the default routes' interfaces. */
  readonly interfaces: { readonly include: readonly string[]; readonly exclude: readonly string[] } | null;
  readonly mode: 'aggregate' | 'backup' | 'failover';
  /** Null: measured per destination. */
  readonly minAgeMs: number | null;
  readonly rescue: boolean;
  /** Whose namespaces are served; at least one, none twice. */
  readonly providers: readonly ProviderName[];
  readonly mptcpify: Mptcpify;
  /** Null: no detours are announced. */
  readonly announcing: Announcing | null;
  readonly sysctlRoot: string;
};

/** The part of a client's settings that concerns its host, and that exists without any key. */
export type ClientHostSettings = CommonSettings &
  Pick<ClientSettings, 'sides' | 'mptcpify' | 'sysctlRoot' | 'rescue' | 'interfaces' | 'providers' | 'strategy'>;

/** Where a value came from: the default, the variable itself, the file its `_FILE` names, or `/run/secrets`. */
export type Origin = 'default' | 'env' | 'file' | 'secret';

/** One effective value as it may be shown: secrets are masked. */
export type Shown = {
  readonly name: string;
  readonly value: string;
  readonly origin: Origin;
  /** The file it was read from. */
  readonly path: string | null;
};

export type Loaded<S> = {
  readonly settings: S;
  readonly shown: readonly Shown[];
  readonly warnings: readonly string[];
};

/** One thing wrong with the environment; `line` is made for people and shows no secret. */
export type Problem = { readonly variable: string; readonly line: string };

/** Everything that is wrong with the environment, one line each. */
export class SettingsError extends Fatal {
  override readonly name = 'SettingsError';
  readonly problems: readonly Problem[];

  constructor(problems: readonly Problem[]) {
    super(78, problems.map(({ line }) => line).join('\n'));
    this.problems = problems;
  }
}

/** What settings are read from. */
export type Sources = {
  readonly env: Readonly<Record<string, string | undefined>>;
  /** Null when there is no such file. @throws Error when it cannot be read. */
  readonly file: (path: string) => { readonly text: string; readonly worldReadable: boolean } | null;
};

const SECRETS_FOLDER = '/run/secrets';
const PREFIX = 'DETOUR_';
/** Keys for a thousand clients fit; a device file or a log named by mistake does not. */
const LONGEST_FILE_BYTES = 256 * 1024;

const defaultOf = (row: Variable<unknown>, role: Role): string | null =>
  row.default === null || typeof row.default === 'string' ? row.default : row.default[role];

/** Whatever a text holds, one line of it, short enough for a log. */
function quote(text: string): string {
  const line = JSON.stringify(maskUrl(text));
  return line.length <= 82 ? line : `${line.slice(0, 80)}..."`;
}

/** A value as it may be shown to anyone. Of a key its id and label stay, because they are how people tell keys apart. */
function mask(row: Variable<unknown>, text: string): string {
  if (row.secret !== true) return maskUrl(text);
  if (text === '') return '';
  const items = text.split(/[\n,]/).filter((item) => !/^\s*(#|$)/.test(item));
  return items
    .map((item) => {
      const [id, secret, label] = item.trim().split(':');
      const known = /^[0-9a-f]{8}$/i.test(id ?? '') && secret !== undefined && secret.length > 8;
      return known ? `${id}:***${label === undefined ? '' : `:${label.slice(0, 64)}`}` : '***';
    })
    .join(',');
}

/** Optimal string alignment: how many letters to add, drop, change or swap. */
function editDistance(a: string, b: string): number {
  let before: number[] = [];
  let row = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const next = [i];
    for (let j = 1; j <= b.length; j++) {
      const same = a[i - 1] === b[j - 1];
      let best = Math.min((row[j] ?? 0) + 1, (next[j - 1] ?? 0) + 1, (row[j - 1] ?? 0) + (same ? 0 : 1));
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) {
        best = Math.min(best, (before[j - 2] ?? 0) + 1);
      }
      next.push(best);
    }
    before = row;
    row = next;
  }
  return row[b.length] ?? 0;
}

/** The name among `rows` nearest to `typed`, if it is near enough to have been meant. */
function suggestion(typed: string, rows: readonly Variable<unknown>[]): string | null {
  const limit = Math.max(2, Math.floor((typed.length - PREFIX.length) / 3));
  let best: { name: string; cost: number } | null = null;
  for (const name of rows.flatMap((row) => [row.name, `${row.name}_FILE`])) {
    // Half a name, or one with something behind it (DETOUR_LOG, DETOUR_PORT_RANGE), is a slip that costs many letters.
    const related = typed.startsWith(`${name.replace(/S$/, '')}_`) || name.startsWith(`${typed}_`);
    const distance = editDistance(typed.slice(PREFIX.length), name.slice(PREFIX.length));
    const cost = related ? Math.min(distance, 1.5) : distance;
    if (cost <= limit && (!best || cost < best.cost)) best = { name, cost };
  }
  return best?.name ?? null;
}

/**
 * Kubernetes sets variables for every Service of a pod's namespace (`enableServiceLinks`): one named `detour` or
 * `detour-router` gives names with our prefix that nobody wrote.
 */
function isServiceLink(name: string, value: string, env: Sources['env']): boolean {
  if (env.KUBERNETES_SERVICE_HOST === undefined) return false;
  if (/_SERVICE_(HOST|PORT)(_\w+)?$/.test(name)) return true;
  return (
    /_PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?$/.test(name) &&
    (/^(tcp|udp|sctp):\/\//.test(value) || /_PORT_\d+_/.test(name))
  );
}

type Found = { readonly text: string; readonly origin: Origin; readonly path: string | null };

const trimNewline = (text: string): string => text.replace(/\r?\n$/, '');

/** Reads one role's rows from `sources`. Everything wrong goes to `problems`, as one line each. */
function collect(
  role: Role,
  others: boolean,
  sources: Sources,
  problems: Problem[],
  warnings: string[],
): Map<string, Found> {
  const found = new Map<string, Found>();
  const report = (name: string, line: string): void => {
    problems.push({ variable: name, line });
  };
  const given = (name: string): string | null => {
    const value = sources.env[name];
    // Compose files pass `${X:-}` on: an empty variable is one that is not set.
    return value === undefined || value === '' ? null : value;
  };
  const read = (name: string, path: string): Found['text'] | null => {
    try {
      const file = sources.file(path);
      if (!file) {
        report(name, `${name}=${quote(path)}: there is no such file; create it, or mount it into the container`);
        return null;
      }
      if (file.text.length > LONGEST_FILE_BYTES || file.text.includes('\0')) {
        report(name, `${name}=${quote(path)}: is no text file of at most ${LONGEST_FILE_BYTES / 1024} kB`);
        return null;
      }
      // Docker shows secrets with mode 0444 whatever is asked for; the container is the boundary there.
      if (file.worldReadable && !path.startsWith(`${SECRETS_FOLDER}/`) && isSecretName(name)) {
        warnings.push(`${path} holds a secret and every user can read it: chmod 600 ${path}`);
      }
      return trimNewline(file.text);
    } catch (error) {
      const reason = error instanceof Error && 'code' in error ? String(error.code) : 'unknown error';
      report(name, `${name}=${quote(path)}: the file cannot be read (${reason})`);
      return null;
    }
  };

  for (const row of ROWS.filter(({ roles }) => roles.includes(role))) {
    const text = given(row.name);
    const path = given(`${row.name}_FILE`);
    const secretPath = `${SECRETS_FOLDER}/${row.name.toLowerCase()}`;
    if (text !== null && path !== null) {
      report(row.name, `${row.name}: is set twice, as ${row.name} and as ${row.name}_FILE; remove one of them`);
      continue;
    }
    if (text !== null) {
      found.set(row.name, { text, origin: 'env', path: null });
    } else if (path !== null) {
      const content = read(`${row.name}_FILE`, path);
      if (content !== null) found.set(row.name, { text: content, origin: 'file', path });
    } else if (exists(sources, secretPath)) {
      const content = read(row.name, secretPath);
      if (content !== null) found.set(row.name, { text: content, origin: 'secret', path: secretPath });
    }
  }

  const known = new Map(ROWS.flatMap((row) => [row.name, `${row.name}_FILE`].map((name) => [name, row] as const)));
  for (const [name, value] of Object.entries(sources.env)) {
    if (!name.startsWith(PREFIX) || value === undefined) continue;
    const row = known.get(name);
    if (row?.roles.includes(role)) {
      if (/^(tcp|udp|sctp):\/\//.test(value) && isServiceLink(name, value, sources.env)) {
        warnings.push(
          `${name} looks like Kubernetes made it out of a Service: set enableServiceLinks: false in the pod`,
        );
      }
      continue;
    }
    if (isServiceLink(name, value, sources.env)) continue;
    if (row) {
      const owner = row.roles[0] ?? 'router';
      const meant = suggestion(
        name,
        ROWS.filter(({ roles }) => roles.includes(role)),
      );
      const twin = meant ? `; the ${role} has ${meant}` : '';
      if (!others) report(name, `${name}: belongs to the ${owner}, and this is the ${role}${twin}; remove it here`);
      continue;
    }
    const meant = suggestion(name, ROWS);
    report(
      name,
      `${name}: is not known${meant ? `; did you mean ${meant}?` : '; `detour help` says where the list is'} (its value is not shown)`,
    );
  }
  return found;
}

function exists(sources: Sources, path: string): boolean {
  try {
    return sources.file(path) !== null;
  } catch {
    return true;
  }
}

const isSecretName = (name: string): boolean =>
  ROWS.some((row) => row.secret === true && (row.name === name || `${row.name}_FILE` === name));

type Options = {
  /** Whether required variables may be missing: for `cleanup`, `load` and `doctor`, which need no key. */
  readonly partial: boolean;
  /** Whether the other role's variables may stand beside this one's: for commands that look at both. */
  readonly others: boolean;
};

type Reader = {
  readonly get: <T>(row: Variable<T>) => T;
  /** Whether there is a value at all: false only for a required one that was allowed to be missing. */
  readonly has: (row: Variable<unknown>) => boolean;
  readonly shown: readonly Shown[];
  readonly warnings: readonly string[];
};

/** Before anything is checked: what is wrong with it is told with the rest. */
function sidesIn(found: ReadonlyMap<string, Found>): readonly Side[] {
  try {
    return TABLE.role.parse(found.get(TABLE.role.name)?.text ?? 'client');
  } catch {
    return ['client'];
  }
}

/** Finds, checks and reads every variable of `role`. @throws SettingsError with everything that is wrong. */
function readAll(role: Role, sources: Sources, options: Options): Reader {
  const problems: Problem[] = [];
  const warnings: string[] = [];
  const found = collect(role, options.others, sources, problems, warnings);
  const rows = ROWS.filter(({ roles }) => roles.includes(role));
  const needed = sidesIn(found);
  const reported = new Set(problems.map((problem) => problem.variable.replace(/_FILE$/, '')));

  // Convict names its own keys and knows no files, so it is handed texts, and problems are worded here.
  const schema = Object.fromEntries(
    rows.map((row) => [
      row.name,
      {
        default: defaultOf(row, role),
        doc: row.doc,
        env: row.name,
        sensitive: row.secret === true,
        format: (text: string | null) => {
          if (reported.has(row.name)) return;
          try {
            if (text !== null) row.parse(text);
            else if (!options.partial && (row.side === undefined || needed.includes(row.side)))
              refuse(row.secret === true ? 'is required; `detour genkey` makes a key' : 'is required');
          } catch (error) {
            if (!(error instanceof Refused)) throw error;
            const value = text === null ? '' : `=${quote(mask(row, text))}`;
            problems.push({
              variable: row.name,
              line: `${row.name}${value}: ${error.message}; for example ${row.name}=${row.example}`,
            });
            throw error;
          }
        },
      },
    ]),
  );
  const env = Object.fromEntries([...found].map(([name, { text }]) => [name, text]));
  const config = convict<Record<string, string | null>>(schema, { env, args: [] });
  try {
    config.validate({ allowed: 'strict' });
  } catch (error) {
    if (problems.length === 0) throw error;
  }

  const textOf = (row: Variable<unknown>): string | null => found.get(row.name)?.text ?? defaultOf(row, role);
  const get = <T>(row: Variable<T>): T => row.parse(textOf(row) ?? '');
  if (problems.length === 0) {
    for (const problem of crossCheck(role, get, (row) => textOf(row) !== null)) problems.push(problem);
  }
  if (problems.length > 0) {
    const order = (problem: Problem): number => {
      const index = ROWS.findIndex(({ name }) => name === problem.variable.replace(/_FILE$/, ''));
      return index < 0 ? ROWS.length : index;
    };
    throw new SettingsError(problems.sort((a, b) => order(a) - order(b)));
  }
  const shown = rows.map((row): Shown => {
    const { origin, path } = found.get(row.name) ?? { origin: 'default', path: null };
    return { name: row.name, value: mask(row, textOf(row) ?? ''), origin, path };
  });
  return { get, has: (row) => textOf(row) !== null, shown, warnings };
}

/** Rules between variables; only asked when each of them is right by itself. */
function crossCheck(
  role: Role,
  get: <T>(row: Variable<T>) => T,
  has: (row: Variable<unknown>) => boolean,
): readonly Problem[] {
  if (role === 'client') return crossCheckClient(get, has);
  const problems: Problem[] = [];
  const ports = get(TABLE.ports);
  const inRange = (port: number): boolean => ports.first <= port && port <= ports.last;
  const listen = get(TABLE.listen);
  const http = get(TABLE.http);
  if (inRange(listen.port)) {
    problems.push({
      variable: TABLE.ports.name,
      line: `DETOUR_PORTS="${ports.first}-${ports.last}": contains ${listen.port}, the control port of DETOUR_LISTEN; for example DETOUR_PORTS=${TABLE.ports.default}`,
    });
  }
  if (http && inRange(http.port)) {
    problems.push({
      variable: TABLE.ports.name,
      line: `DETOUR_PORTS="${ports.first}-${ports.last}": contains ${http.port}, the port of DETOUR_HTTP=${formatEndpoint(http)}; move one of them`,
    });
  }
  if (get(TABLE.vpn) && get(TABLE.vpnPort) === listen.port) {
    problems.push({
      variable: TABLE.vpnPort.name,
      line: `DETOUR_VPN_PORT="${listen.port}": is the control port of DETOUR_LISTEN, and both are UDP; for example DETOUR_VPN_PORT=${TABLE.vpnPort.default}`,
    });
  }
  const clash = get(TABLE.announcePorts).find(({ first, last }) => first <= ports.last && ports.first <= last);
  if (clash) {
    problems.push({
      variable: TABLE.announcePorts.name,
      line: `DETOUR_ANNOUNCE_PORTS="${clash.first}-${clash.last}": overlaps with DETOUR_PORTS=${ports.first}-${ports.last}, whose ports are leases'; for example DETOUR_ANNOUNCE_PORTS=443`,
    });
  }
  const spell = (rule: DestinationRule): string =>
    `${formatPrefix(rule.prefix)}${rule.ports.map(({ first, last }) => `:${first}-${last}`).join('')}`;
  const denied = new Set(get(TABLE.deny).map(spell));
  for (const rule of get(TABLE.allow).filter((rule) => denied.has(spell(rule)))) {
    problems.push({
      variable: TABLE.allow.name,
      line: `DETOUR_ALLOW: has ${spell(rule)}, and so has DETOUR_DENY; remove it from one of them`,
    });
  }
  return problems;
}

function crossCheckClient(
  get: <T>(row: Variable<T>) => T,
  has: (row: Variable<unknown>) => boolean,
): readonly Problem[] {
  const ports = get(TABLE.announce);
  if (ports.length === 0) return [];
  const problem = (rule: string): Problem => ({
    variable: TABLE.announce.name,
    line: `DETOUR_ANNOUNCE="${ports.join(',')}": ${rule}`,
  });
  const problems: Problem[] = [];
  if (!get(TABLE.role).includes('server'))
    problems.push(problem('needs DETOUR_ROLE=server, or client,server: it is servers that have detours announced'));
  if (get(TABLE.providers).join() !== 'host')
    problems.push(problem("needs DETOUR_PROVIDERS=host: only this host's own network is announced"));
  for (const row of [TABLE.key, TABLE.detours])
    if (!has(row)) problems.push(problem(`needs ${row.name}, for the detours that are to be announced`));
  return problems;
}

function common(get: Reader['get']): CommonSettings {
  return {
    http: get(TABLE.http),
    socket: get(TABLE.socket),
    fwmark: get(TABLE.fwmark),
    logLevel: get(TABLE.logLevel),
    logFormat: get(TABLE.logFormat),
  };
}

function freeze<T>(value: T): T {
  if (typeof value === 'object' && value !== null && !ArrayBuffer.isView(value) && !Object.isFrozen(value)) {
    Object.freeze(value);
    for (const part of Object.values(value)) freeze(part);
  }
  return value;
}

/** The machine's environment and files. */
export function machineSources(env: Sources['env']): Sources {
  return {
    env,
    file(path) {
      try {
        const stat = statSync(path);
        if (!stat.isFile()) throw Object.assign(new Error('not a file'), { code: 'not a file' });
        if (stat.size > LONGEST_FILE_BYTES) throw Object.assign(new Error('too big'), { code: 'too big' });
        return { text: readFileSync(path, 'utf8'), worldReadable: (stat.mode & 0o004) !== 0 };
      } catch (error) {
        if (error instanceof Error && 'code' in error && (error.code === 'ENOENT' || error.code === 'ENOTDIR'))
          return null;
        throw error;
      }
    },
  };
}

/**
 * Settings of a router. `partial` lets keys be missing, for commands that need none; `others` lets a client's variables
 * stand beside.
 * @throws SettingsError with every problem at once.
 */
export function loadRouterSettings(sources: Sources, options: Partial<Options> = {}): Loaded<RouterSettings> {
  const { get, has, shown, warnings } = readAll('router', sources, { partial: false, others: false, ...options });
  const settings: RouterSettings = {
    ...common(get),
    keys: has(TABLE.keys) ? get(TABLE.keys) : [],
    listen: get(TABLE.listen),
    ports: get(TABLE.ports),
    allow: get(TABLE.allow),
    deny: get(TABLE.deny),
    relay: get(TABLE.relay),
    leaseTime: get(TABLE.leaseTime),
    legacyV1: get(TABLE.legacyV1),
    onExit: get(TABLE.onExit),
    vpn: get(TABLE.vpn) ? { port: get(TABLE.vpnPort), ...get(TABLE.vpnNetwork) } : null,
    inband: get(TABLE.inband),
    announce: get(TABLE.announcePorts),
  };
  return freeze({ settings, shown, warnings });
}

const interfaceChoice = (include: readonly string[], exclude: readonly string[]): ClientSettings['interfaces'] =>
  include.length + exclude.length === 0 ? null : { include, exclude };

/** Settings of a client agent. @throws SettingsError with every problem at once. */
export function loadClientSettings(sources: Sources, options: { others?: boolean } = {}): Loaded<ClientSettings> {
  const { get, shown, warnings } = readAll('client', sources, { partial: false, others: false, ...options });
  const sides = get(TABLE.role);
  const client = sides.includes('client');
  const announced = get(TABLE.announce);
  const settings: ClientSettings = {
    ...common(get),
    sides,
    key: client ? get(TABLE.key) : null,
    detours: client ? get(TABLE.detours) : [],
    targets: get(TABLE.targets),
    exclude: get(TABLE.exclude),
    maxPaths: get(TABLE.maxPaths),
    strategy: get(TABLE.strategy),
    interfaces: interfaceChoice(get(TABLE.interfaces), get(TABLE.interfacesExclude)),
    mode: get(TABLE.mode),
    minAgeMs: get(TABLE.minAge),
    rescue: get(TABLE.rescue),
    providers: get(TABLE.providers),
    mptcpify: get(TABLE.mptcpify),
    announcing: announced.length === 0 ? null : { key: get(TABLE.key), detours: get(TABLE.detours), ports: announced },
    sysctlRoot: get(TABLE.sysctlRoot),
  };
  const nobody = settings.mptcpify === 'labelled' && settings.providers.every((name) => name === 'host');
  const more = nobody
    ? ['DETOUR_MPTCPIFY=labelled: without docker or kubernetes in DETOUR_PROVIDERS nobody has labels']
    : [];
  return freeze({ settings, shown, warnings: [...warnings, ...more] });
}

/** What `load`, `unload` and `cleanup` need of a client's settings: no key, no detours. @throws SettingsError */
export function loadClientHostSettings(
  sources: Sources,
  options: { others?: boolean } = {},
): Loaded<ClientHostSettings> {
  const { get, shown, warnings } = readAll('client', sources, { others: false, ...options, partial: true });
  return freeze({
    settings: {
      ...common(get),
      sides: get(TABLE.role),
      mptcpify: get(TABLE.mptcpify),
      sysctlRoot: get(TABLE.sysctlRoot),
      rescue: get(TABLE.rescue),
      interfaces: interfaceChoice(get(TABLE.interfaces), get(TABLE.interfacesExclude)),
      providers: get(TABLE.providers),
      strategy: get(TABLE.strategy),
    },
    shown,
    warnings,
  });
}

/**
 * Which roles this environment is meant for: those whose own variables it sets (or mounts as secrets). Empty when
 * nothing tells.
 */
export function rolesOf(sources: Sources): readonly Role[] {
  return BOTH.filter((role) =>
    ROWS.some((row) => {
      if (row.roles.length > 1 || row.roles[0] !== role) return false;
      const set = [row.name, `${row.name}_FILE`].some((name) => (sources.env[name] ?? '') !== '');
      return set || (row.default === null && exists(sources, `${SECRETS_FOLDER}/${row.name.toLowerCase()}`));
    }),
  );
}

/**
 * Unix sockets at which this environment's daemons would be found: the one that `DETOUR_SOCKET` names, or the default
 * ones. For commands that ask a daemon, which holds settings that were checked when it started.
 */
export function daemonSockets(sources: Sources): readonly string[] {
  const { name } = TABLE.socket;
  const path = sources.env[`${name}_FILE`] ?? '';
  const named = sources.env[name] || (path === '' ? '' : trimNewline(sources.file(path)?.text ?? ''));
  return named === '' ? BOTH.flatMap((role) => defaultOf(TABLE.socket, role) ?? []) : [named];
}
