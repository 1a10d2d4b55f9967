#!/usr/bin/env node
/**
 * `detour`: argv and environment become one sub-command, its result an exit code. Nothing is decided here; this file
 * knows who to call, in which order, and how to leave.
 */
import { randomBytes } from 'node:crypto';
import { hostname, networkInterfaces } from 'node:os';
import { parseArgs } from 'node:util';
import { examine, presentChecks, type Subject } from './doctor.ts';
import { type ExitCode, Fatal, STOP_DEADLINE_MS } from './exit.ts';
import { INVITE_FORMATS, renderInvite } from './invite.ts';
import { systemClock } from './kernel/clock.ts';
import { udpDatagrams } from './kernel/datagrams.ts';
import { systemFiles } from './kernel/files.ts';
import { systemLookup } from './kernel/lookup.ts';
import { systemMachine } from './kernel/machine.ts';
import { systemWeb } from './kernel/web.ts';
import { createLog, type Log } from './log.ts';
import { contains, formatAddress, parseAddress, parsePrefix } from './protocol/address.ts';
import {
  type ClientSettings,
  type CommonSettings,
  daemonSockets,
  type Loaded,
  loadClientHostSettings,
  loadClientSettings,
  loadRouterSettings,
  machineSources,
  type Role,
  rolesOf,
  type Shown,
  type Sources,
} from './settings.ts';
import { askDaemon, isRunning, NoDaemon } from './status/client.ts';
import type { Json, RunningDaemon } from './status/daemon.ts';
import { presentExplanation, presentStatus } from './status/present.ts';
import { openStatus, type StatusServer } from './status/server.ts';
import { REVISION, VERSION } from './version.ts';

const USAGE = `detour ${VERSION}: more paths for Multipath TCP connections

usage: detour COMMAND [options]

  router                     run the router daemon in the foreground (on a detour)
  client                     run the client agent in the foreground (on a client)
  load, unload               select the userspace path manager, and put back what was there
  status [--json]            what the running daemon sees
  explain HOST[:PORT] [--json]   the client's ways to a server: what each detour adds, and why it is used or not
  doctor [--json]            check this machine; every failure prints the line that fixes it
  healthcheck [--ready]      exit 0 when the daemon is alive (with --ready: when it can do its work), else 1
  genkey                     print a new keyid:secret
  invite                     print a client's configuration, ready to paste (detour invite --help)
  config check [ROLE]        validate the environment
  config print [ROLE] [--json]   print the effective settings, masked, with their origin
  cleanup [ROLE]             remove every kernel object of this instance
  version [--json]           name, version, revision

ROLE is router or client; without it, the environment's variables tell.
Settings are environment variables, DETOUR_*; each also as DETOUR_*_FILE. The list: docs/configuration.md
Exit codes: 0 fine, 1 failed, 64 bad usage, 69 the machine lacks something, 78 bad configuration.
`;

const CRASH_DEADLINE_MS = 3_000;

class Usage extends Fatal {
  override readonly name = 'Usage';

  constructor(message: string) {
    super(64, `${message}\nTry: detour help`);
  }
}

type Flags = Readonly<Record<string, string | boolean | undefined>>;
type Invocation = { readonly flags: Flags; readonly words: readonly string[]; readonly sources: Sources };
type Command = {
  readonly options: Readonly<Record<string, { readonly type: 'boolean' | 'string' }>>;
  /** Most words after the command. */
  readonly words: number;
  /** Where the general usage does not say enough. */
  readonly usage?: string;
  readonly run: (invocation: Invocation) => Promise<ExitCode | 0>;
};

function print(text: string): void {
  process.stdout.write(text.endsWith('\n') ? text : `${text}\n`);
}

function roleOf(word: string | undefined): Role | null {
  if (word === undefined) return null;
  if (word === 'router' || word === 'client') return word;
  throw new Usage(`detour: "${word}" is no role; there are router and client`);
}

/** The role asked for, else those the environment is made for, else both. */
function rolesFor(word: string | undefined, sources: Sources): readonly Role[] {
  const role = roleOf(word);
  if (role) return [role];
  const roles = rolesOf(sources);
  return roles.length > 0 ? roles : ['router', 'client'];
}

/** Loads the role's settings for looking at; with both roles in one environment each ignores the other's variables. */
function loadFor(role: Role, sources: Sources, others: boolean): Loaded<unknown> {
  return role === 'router' ? loadRouterSettings(sources, { others }) : loadClientSettings(sources, { others });
}

/** Loads and checks the settings of `role`; `run` starts the daemon they describe. */
function prepare(
  role: Role,
  sources: Sources,
): { loaded: Loaded<CommonSettings>; run: (log: Log) => Promise<RunningDaemon> } {
  if (role === 'router') {
    const loaded = loadRouterSettings(sources);
    return { loaded, run: async (log) => (await import('./router/main.ts')).startRouter(loaded.settings, log) };
  }
  const loaded = loadClientSettings(sources);
  return { loaded, run: async (log) => (await import('./client/main.ts')).startClient(loaded.settings, log) };
}

async function start(role: Role, sources: Sources): Promise<{ log: Log; status: StatusServer; daemon: RunningDaemon }> {
  const { loaded, run } = prepare(role, sources);
  const { settings, shown, warnings } = loaded;
  const log = createLog({ ...settings, component: role });
  log.info('starting', { version: VERSION, revision: REVISION, node: process.version }, `detour ${role} is starting`);
  log.info('settings', effective(shown), 'Effective settings, secrets masked');
  for (const warning of warnings) log.warn('settings-warning', {}, warning);

  // The socket comes first: whoever holds it may touch the kernel.
  const status = await openStatus({ role, settings, log });
  try {
    const daemon = await run(log);
    status.attach(daemon.view);
    return { log, status, daemon };
  } catch (error) {
    await status.close();
    throw error;
  }
}

/** As log fields: what was set says from where, the rest is the default. */
function effective(shown: readonly Shown[]): Readonly<Record<string, string>> {
  return Object.fromEntries(
    shown.map(({ name, value, origin }) => [name, origin === 'default' ? value : `${value} (${origin})`]),
  );
}

/** Rejects after `ms`, and keeps no process alive. */
function deadline(ms: number, what: string): Promise<never> {
  const { promise, reject } = Promise.withResolvers<never>();
  setTimeout(() => reject(new Error(`${what} took longer than ${ms / 1000} s`)), ms).unref();
  return promise;
}

const reasonOf = (error: unknown): string => (error instanceof Error ? error.message : String(error));

/** Runs a daemon until a signal ends it. */
async function runDaemon(role: Role, sources: Sources): Promise<ExitCode | 0> {
  const { promise: asked, resolve: ask } = Promise.withResolvers<NodeJS.Signals>();
  let signals = 0;
  const onSignal = (signal: NodeJS.Signals): void => {
    signals++;
    if (signals > 1) {
      process.stderr.write(
        `detour ${role}: ${signal} again, leaving at once; \`detour cleanup ${role}\` removes what is left\n`,
      );
      process.exit(1);
    }
    ask(signal);
    // Wherever it hangs, also in the middle of its start: it leaves by itself before Docker kills it.
    setTimeout(() => {
      process.stderr.write(
        `detour ${role}: could not leave in order; \`detour cleanup ${role}\` removes what is left\n`,
      );
      process.exit(1);
    }, STOP_DEADLINE_MS).unref();
  };
  process.on('SIGTERM', onSignal);
  process.on('SIGINT', onSignal);
  // A detached terminal must not end a daemon; for a router, SIGHUP means "read the keys again" once it runs.
  process.on('SIGHUP', () => {});

  const { log, status, daemon } = await start(role, sources);

  let crashing = false;
  const crash = (error: unknown): void => {
    if (crashing) return;
    crashing = true;
    const stack = error instanceof Error ? (error.stack ?? '') : '';
    try {
      log.error(
        'crashed',
        { reason: reasonOf(error), stack },
        'An error that nobody expected; leaving, please report it',
      );
    } catch {
      // Nobody reads our output any more. That is no reason to leave the host as it is.
    }
    void Promise.race([daemon.stop(), deadline(CRASH_DEADLINE_MS, 'stopping')])
      .catch(() => {})
      .finally(() => process.exit(1));
  };
  process.on('uncaughtException', crash);
  process.on('unhandledRejection', crash);
  if (role === 'router') process.on('SIGHUP', () => void reloadKeys(daemon, sources, log));

  log.info('started', {}, `detour ${role} is running`);
  const signal = await asked;
  log.info('stopping', { signal }, `detour ${role} is stopping`);
  status.drain();
  try {
    await daemon.stop();
    await status.close();
  } catch (error) {
    log.error('stop-failed', { reason: reasonOf(error) }, `Could not leave in order; run \`detour cleanup ${role}\``);
    return 1;
  }
  log.info('stopped', {}, `detour ${role} has stopped`);
  return 0;
}

/** Keys from files and secrets can change while we run; the environment cannot. */
async function reloadKeys(daemon: RunningDaemon, sources: Sources, log: Log): Promise<void> {
  try {
    const { settings } = loadRouterSettings(sources);
    await daemon.reload?.(settings.keys);
  } catch (error) {
    log.error('reload-failed', { reason: reasonOf(error) }, 'The keys stay as they are');
  }
}

/** A log for commands that end by themselves: lines for people, on stderr, warnings and worse. */
function commandLog(command: string): Log {
  return createLog(
    { component: command, logLevel: 'warn', logFormat: 'pretty' },
    { write: (line) => void process.stderr.write(line) },
  );
}

async function cleanup({ words, sources }: Invocation): Promise<ExitCode | 0> {
  const roles = rolesFor(words[0], sources);
  const others = roles.length > 1;
  const log = commandLog('cleanup');
  // Both are read before anything is removed: half a cleanup for a typing error would be worse than none.
  const router = roles.includes('router') ? loadRouterSettings(sources, { partial: true, others }).settings : null;
  const client = roles.includes('client') ? loadClientHostSettings(sources, { others }).settings : null;
  for (const [role, settings] of [
    ['router', router],
    ['client', client],
  ] as const) {
    if (settings && (await isRunning(settings.socket, role))) {
      throw new Fatal(
        1,
        `the ${role} is running (it answers at ${settings.socket}) and would put everything back: stop it first`,
      );
    }
  }
  const failures: { readonly line: string; readonly exitCode: ExitCode }[] = [];
  const remove = async (role: Role, act: () => Promise<void>): Promise<void> => {
    try {
      await act();
      print(`${role}: nothing of it is left`);
    } catch (error) {
      // What one role cannot remove must not keep the other's things here.
      failures.push({ line: `${role}: ${reasonOf(error)}`, exitCode: error instanceof Fatal ? error.exitCode : 1 });
    }
  };
  if (router) await remove('router', async () => (await import('./router/main.ts')).cleanupRouter(router, log));
  if (client) await remove('client', async () => (await import('./client/main.ts')).cleanupClient(client, log));
  const [first] = failures;
  if (first) throw new Fatal(first.exitCode, failures.map(({ line }) => line).join('\n'));
  return 0;
}

async function loader(action: 'load' | 'unload', sources: Sources): Promise<ExitCode | 0> {
  const { settings } = loadClientHostSettings(sources);
  const { load, unload } = await import('./client/main.ts');
  if (action === 'load') for (const line of await load(settings, commandLog(action))) print(line);
  else {
    await unload(settings, commandLog(action));
    print('net.mptcp is as it was found');
  }
  return 0;
}

async function status({ flags, words, sources }: Invocation): Promise<ExitCode | 0> {
  const answers = await askDaemons('/v1/status', words[0], sources);
  const values: Json[] = answers.map(({ code, body }) => {
    // 503 is a daemon that is starting: it says so in the same form.
    if (code !== 200 && code !== 503) throw new Fatal(1, `the daemon could not say how it is: ${body.trim()}`);
    return JSON.parse(body);
  });
  if (flags.json) print(JSON.stringify(values.length === 1 ? values[0] : values, null, 2));
  else print(values.map(presentStatus).join('\n\n'));
  return answers.every(({ code }) => code === 200) ? 0 : 1;
}

/** Reads a name or an address, an IPv6 one in brackets when a port follows. @throws Usage */
function targetOf(text: string): { host: string; port: number | null } {
  const bare = parseAddress(text);
  if (bare) return { host: formatAddress(bare), port: null };
  const match = /^(?:\[([0-9a-f:.]+)\]|([a-z0-9._-]{1,253}))(?::(\d{1,5}))?$/i.exec(text);
  const host = match?.[1] ?? match?.[2];
  const port = match?.[3] === undefined ? null : Number(match[3]);
  if (host === undefined || (match?.[1] !== undefined && !parseAddress(host)) || port === 0 || (port ?? 0) > 65535)
    throw new Usage(`detour explain: "${text}" is no HOST or HOST:PORT; an IPv6 address with a port is [ADDRESS]:PORT`);
  return { host, port };
}

async function explain({ flags, words: [word], sources }: Invocation): Promise<ExitCode | 0> {
  if (word === undefined) throw new Usage('detour explain: say which server, HOST or HOST:PORT');
  const { host, port } = targetOf(word);
  const literal = parseAddress(host);
  const addresses = literal
    ? [literal]
    : await systemLookup()
        .addresses(host)
        .catch((error: NodeJS.ErrnoException) => {
          throw new Fatal(
            1,
            `${host} does not resolve (${error.code ?? reasonOf(error)}): check with \`getent ahosts ${host}\``,
          );
        });
  const explanations: Json[] = [];
  for (const address of addresses) {
    const query = `address=${formatAddress(address)}${port === null ? '' : `&port=${port}`}`;
    for (const { code, body } of await askDaemons(`/v1/explain?${query}`, 'client', sources)) {
      if (code === 404) throw new Fatal(1, 'this daemon is a router: explain asks a client, see DETOUR_SOCKET');
      if (code === 503) throw new Fatal(1, 'the client is still starting: ask again');
      if (code !== 200) throw new Fatal(1, `the client could not explain: ${body.trim()}`);
      explanations.push(JSON.parse(body));
    }
  }
  if (flags.json) print(JSON.stringify(explanations, null, 2));
  else print(explanations.map((one) => presentExplanation(host, one)).join('\n\n'));
  return 0;
}

/** Asks each daemon of this environment. @throws Fatal when there is none, or one that is there does not answer. */
async function askDaemons(
  path: string,
  word: string | undefined,
  sources: Sources,
): Promise<{ code: number; body: string }[]> {
  const role = roleOf(word);
  const sockets = daemonSockets(sources).filter(
    (socket, _, all) => all.length === 1 || !role || socket.endsWith(`/${role}.sock`),
  );
  const answers: { code: number; body: string }[] = [];
  for (const socket of sockets) {
    try {
      answers.push(await askDaemon(socket, path));
    } catch (error) {
      if (!(error instanceof NoDaemon)) throw error;
      // A host usually has one of the two; the other's socket is missing, or was left by a daemon that was killed.
      if (error.reason !== 'absent') throw new Fatal(1, error.message);
    }
  }
  if (answers.length > 0) return answers;
  throw new Fatal(
    1,
    `no detour daemon answers at ${sockets.join(' or ')}: start one with \`detour router\` or \`detour client\`, or set DETOUR_SOCKET to where it is`,
  );
}

async function healthcheck({ flags, words, sources }: Invocation): Promise<ExitCode | 0> {
  const answers = await askDaemons(flags.ready ? '/readyz' : '/healthz', words[0], sources);
  for (const { body } of answers) print(body);
  return answers.every(({ code }) => code === 200) ? 0 : 1;
}

/** 32 random bits name a key, 256 keep it. */
function newKey(): string {
  return `${randomBytes(4).toString('hex')}:${randomBytes(32).toString('base64url')}`;
}

const INVITE_USAGE = `usage: detour invite [--host HOST] [--name NAME] [--key KEYID | --new] [--format ${INVITE_FORMATS.join('|')}] [--image IMAGE]

Prints what a client needs to use this router: where it is and one of its keys. The output holds a secret.

  --host HOST      where clients find this router: a name or an address (default: this machine's public address)
  --name NAME      what the client calls this detour (default: this machine's name)
  --key KEYID      which key of DETOUR_KEYS (default: the only one)
  --new            make a key; the line to add to DETOUR_KEYS is printed on stderr
  --format FORMAT  ${INVITE_FORMATS.join(', ')} (default: docker)
  --image IMAGE    image of the client (default: detour-client:dev)
`;

/** The address that others would use: a global unicast one of this machine, if there is exactly one to choose. */
function publicAddress(): string | null {
  const private4 = ['10.0.0.0/8', '100.64.0.0/10', '127.0.0.0/8', '169.254.0.0/16', '172.16.0.0/12', '192.168.0.0/16'];
  const local = private4.flatMap((text) => parsePrefix(text) ?? []);
  const found = Object.values(networkInterfaces())
    .flatMap((addresses) => addresses ?? [])
    .flatMap(({ address }) => parseAddress(address) ?? [])
    .filter((address) => address.family === 4 && !local.some((prefix) => contains(prefix, address)));
  const [only] = found;
  return only && found.length === 1 ? formatAddress(only) : null;
}

async function invite({ flags, sources }: Invocation): Promise<ExitCode | 0> {
  const text = (name: string): string | undefined => (typeof flags[name] === 'string' ? flags[name] : undefined);
  const format = INVITE_FORMATS.find((known) => known === (text('format') ?? 'docker'));
  if (!format) throw new Usage(`detour invite: --format is one of ${INVITE_FORMATS.join(', ')}`);
  if (flags.new && text('key') !== undefined)
    throw new Usage('detour invite: --new makes a key, --key picks one; not both');
  const host = text('host') ?? publicAddress();
  if (host === null) {
    throw new Usage(
      'detour invite: this machine has not exactly one public IPv4 address; say where clients find it: --host HOST',
    );
  }
  const name = text('name') ?? hostname().split('.')[0] ?? 'detour';
  // What is printed gets pasted into a shell: nothing in it may mean anything to one.
  if (!/^[a-z0-9.:-]{1,253}$/i.test(host))
    throw new Usage('detour invite: --host is a name or an address, without port and brackets');
  if (!/^[a-z0-9][a-z0-9._-]{0,62}$/i.test(name))
    throw new Usage('detour invite: --name is made of letters, digits and . _ -');
  const image = text('image') ?? 'detour-client:dev';
  if (!/^[\w./:@-]{1,255}$/.test(image)) throw new Usage('detour invite: --image is no name of an image');

  const { settings } = loadRouterSettings(sources, { partial: flags.new === true, others: true });
  let key: string;
  if (flags.new) {
    key = newKey();
    process.stderr.write(
      `Add this to DETOUR_KEYS of the router and send it SIGHUP (or restart it):\n${key}:${name}\n\n`,
    );
  } else {
    const id = text('key')?.toLowerCase();
    const hex = (candidate: { readonly id: number }): string => candidate.id.toString(16).padStart(8, '0');
    const chosen = settings.keys.filter((candidate) => id === undefined || hex(candidate) === id);
    const [only] = chosen;
    if (!only || chosen.length > 1) {
      const list = settings.keys
        .map((candidate) => `${hex(candidate)}${candidate.label ? ` (${candidate.label})` : ''}`)
        .join(', ');
      throw new Usage(`detour invite: say which key with --key; there are ${list}`);
    }
    key = `${hex(only)}:${Buffer.from(only.secret).toString('base64url')}`;
  }
  print(renderInvite({ name, host, port: settings.listen.port, key, image }, format));
  return 0;
}

/** Reads the lists that a client's detours come from, once. */
async function look({ key, detours }: ClientSettings): Promise<Subject['detours']> {
  if (key === null) return null;
  const { labelOf, lookAtSource } = await import('./client/sources.ts');
  const ports = { clock: systemClock, lookup: systemLookup(), files: systemFiles(), web: systemWeb() };
  const found = await Promise.all(detours.map(async (source) => ({ source, ...(await lookAtSource(source, ports)) })));
  return {
    key,
    detours: found.flatMap((one) => one.detours),
    lists: found
      .filter(({ source }) => source.kind !== 'static' && source.kind !== 'dns')
      .map((one) => ({ source: labelOf(one.source), found: one.detours.length, complaints: one.complaints })),
  };
}

async function doctor({ flags, words, sources }: Invocation): Promise<ExitCode | 0> {
  const roles = rolesFor(words[0], sources);
  const others = roles.length > 1;
  const problems = new Set<string>();
  const attempt = <T>(load: () => Loaded<T>): T | null => {
    try {
      return load().settings;
    } catch (error) {
      if (!(error instanceof Fatal)) throw error;
      for (const line of error.message.split('\n')) problems.add(line);
      return null;
    }
  };
  // Nothing configured is no mistake of a doctor's patient; half configured is.
  const configured = rolesOf(sources);
  const empty: Sources = { ...sources, env: {} };
  const client = roles.includes('client');
  const full = client && configured.includes('client') ? attempt(() => loadClientSettings(sources, { others })) : null;
  const partial = !configured.includes('router');
  const subject: Subject = {
    // A configuration that is wrong is reported, and what the defaults would need is still looked at.
    router: roles.includes('router')
      ? (attempt(() => loadRouterSettings(sources, { partial, others })) ??
        loadRouterSettings(empty, { partial: true }).settings)
      : null,
    client: client
      ? (full ?? attempt(() => loadClientHostSettings(sources, { others })) ?? loadClientHostSettings(empty).settings)
      : null,
    detours: full && (await look(full)),
    problems: [...problems],
    running: { router: false, client: false },
  };
  const running = async (role: Role, settings: CommonSettings | null): Promise<boolean> =>
    settings !== null && (await isRunning(settings.socket, role));
  const checks = await examine(
    {
      ...subject,
      problems: [...problems],
      running: { router: await running('router', subject.router), client: await running('client', subject.client) },
    },
    {
      machine: systemMachine,
      clock: systemClock,
      datagrams: udpDatagrams(),
      resolve: systemLookup().addresses,
      kubernetes: sources.env.KUBERNETES_SERVICE_HOST !== undefined,
    },
  );
  const failed = checks.some(({ state }) => state === 'fail');
  print(flags.json ? JSON.stringify({ ok: !failed, checks }, null, 2) : presentChecks(checks));
  return failed ? 1 : 0;
}

async function config({ flags, words: [verb, word], sources }: Invocation): Promise<ExitCode | 0> {
  if (verb !== 'check' && verb !== 'print') throw new Usage('detour: config needs check or print');
  const roles = rolesFor(word, sources);
  const results = roles.map((role) => {
    try {
      return { role, loaded: loadFor(role, sources, roles.length > 1), error: null };
    } catch (error) {
      if (!(error instanceof Fatal)) throw error;
      return { role, loaded: null, error };
    }
  });
  const unique = new Set(results.flatMap(({ error }) => error?.message.split('\n') ?? []));
  for (const line of unique) process.stderr.write(`${line}\n`);
  for (const { loaded } of results) {
    for (const warning of loaded?.warnings ?? []) process.stderr.write(`warning: ${warning}\n`);
  }
  if (verb === 'print') {
    const rows = results.flatMap(({ role, loaded }) => (loaded?.shown ?? []).map((row) => ({ role, ...row })));
    if (flags.json) print(JSON.stringify(rows, null, 2));
    else {
      const width = Math.max(0, ...rows.map(({ name }) => name.length));
      for (const { name, value, origin, path } of rows) {
        print(`${name.padEnd(width)}  ${(path === null ? origin : `${origin} ${path}`).padEnd(8)}  ${value}`);
      }
    }
  } else if (unique.size === 0) {
    print(flags.json ? JSON.stringify({ ok: true, roles }) : `${roles.join(' and ')}: the configuration is fine`);
  }
  return unique.size === 0 ? 0 : 78;
}

const COMMANDS: Readonly<Record<string, Command>> = {
  router: { options: {}, words: 0, run: ({ sources }) => runDaemon('router', sources) },
  client: { options: {}, words: 0, run: ({ sources }) => runDaemon('client', sources) },
  load: { options: {}, words: 0, run: ({ sources }) => loader('load', sources) },
  unload: { options: {}, words: 0, run: ({ sources }) => loader('unload', sources) },
  status: { options: { json: { type: 'boolean' } }, words: 1, run: status },
  explain: { options: { json: { type: 'boolean' } }, words: 1, run: explain },
  healthcheck: { options: { ready: { type: 'boolean' } }, words: 1, run: healthcheck },
  genkey: {
    options: {},
    words: 0,
    run: async () => {
      print(newKey());
      return 0;
    },
  },
  invite: {
    options: {
      host: { type: 'string' },
      name: { type: 'string' },
      key: { type: 'string' },
      new: { type: 'boolean' },
      format: { type: 'string' },
      image: { type: 'string' },
    },
    words: 0,
    usage: INVITE_USAGE,
    run: invite,
  },
  doctor: { options: { json: { type: 'boolean' } }, words: 1, run: doctor },
  config: { options: { json: { type: 'boolean' } }, words: 2, run: config },
  cleanup: { options: {}, words: 1, run: cleanup },
  version: {
    options: { json: { type: 'boolean' } },
    words: 0,
    run: async ({ flags }) => {
      const facts = { name: 'detour', version: VERSION, revision: REVISION };
      print(flags.json ? JSON.stringify(facts) : Object.values(facts).join(' '));
      return 0;
    },
  },
};

async function main(argv: readonly string[], sources: Sources): Promise<ExitCode | 0> {
  const [name = '', ...rest] = argv;
  if (name === 'help' || name === '--help' || name === '-h') {
    print(USAGE);
    return 0;
  }
  if (name === '--version') return main(['version'], sources);
  const command = Object.hasOwn(COMMANDS, name) ? COMMANDS[name] : undefined;
  if (!command) throw new Usage(name === '' ? 'detour: a command is needed' : `detour: there is no command "${name}"`);
  let parsed: { values: Flags; positionals: string[] };
  try {
    const options = { ...command.options, help: { type: 'boolean', short: 'h' } } as const;
    parsed = parseArgs({ args: rest, options, allowPositionals: true, strict: true });
  } catch (error) {
    throw new Usage(`detour ${name}: ${reasonOf(error)}`);
  }
  if (parsed.values.help) {
    print(command.usage ?? USAGE);
    return 0;
  }
  if (parsed.positionals.length > command.words) {
    throw new Usage(`detour ${name}: "${parsed.positionals[command.words]}" is too much`);
  }
  return command.run({ flags: parsed.values, words: parsed.positionals, sources });
}

// `detour status | head` closes our output early; that is an end, not an error.
process.stdout.on('error', (error: NodeJS.ErrnoException) => process.exit(error.code === 'EPIPE' ? 0 : 1));

try {
  process.exitCode = await main(process.argv.slice(2), machineSources(process.env));
} catch (error) {
  const stack = error instanceof Error && !(error instanceof Fatal) ? error.stack : undefined;
  process.stderr.write(`${stack ?? reasonOf(error)}\n`);
  process.exitCode = error instanceof Fatal ? error.exitCode : 1;
}
// A pipe takes some 200 kB at once; the end of the process would cut off what is still to be written.
await new Promise<void>((resolve) => process.stdout.write('', () => resolve()));
// A timer or socket that someone forgot must not keep a finished command, or a stopped daemon, alive.
process.exit();
