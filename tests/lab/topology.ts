/**
 * What a laboratory is made of, as a value that can be written in TypeScript or YAML: hosts, links, routers on them, what is sent,
 * the ways to send it, and what happens meanwhile. Pure; experiment.ts plays it.
 */

/** `about` and everything with a default is present in what `readScenario` returns. */
export type Scenario = {
  readonly name: string;
  readonly about: string;
  /** The host that opens connections, and the one that they go to. */
  readonly client: string;
  readonly server: string;
  /** Congestion control of both ends. */
  readonly congestion: string;
  /** Every host that a link names exists; only those with something to say need to be here. */
  readonly nodes: Readonly<Record<string, Node>>;
  readonly links: Readonly<Record<string, Wire>>;
  /** What is sent over and over again, once each way. The first one is what tables show. */
  readonly traffic: readonly Traffic[];
  readonly events: readonly Happening[];
  readonly ways: Readonly<Record<string, Way>>;
};

export type Node = {
  /** Runs our router: the node is a detour. */
  readonly router: boolean;
  /** Extra subflows that the node's kernel accepts for each connection, 0 to 8; what it accepts by itself when absent. */
  readonly subflows?: number;
  readonly sysctls: Readonly<Record<string, string>>;
};

/** What each direction of a link is like; see `Conditions` of netns.ts. */
export type Quality = {
  readonly rateMbit?: number;
  readonly queueMs?: number;
  readonly delayMs?: number;
  readonly lossPercent?: number;
};

export type Wire = Quality & { readonly between: readonly [string, string] };

export type Traffic =
  | {
      readonly kind: 'transfer';
      readonly direction: 'up' | 'down';
      /** It ends after this time at the receiver, or when these bytes have arrived; one of the two. */
      readonly seconds?: number;
      readonly bytes?: number;
      readonly atS: number;
    }
  | { readonly kind: 'messages'; readonly count: number; readonly everyMs: number; readonly atS: number }
  | { readonly kind: 'flows'; readonly count: number; readonly bytes: number; readonly atS: number };

/** Times count from when the first traffic is connected. What an event changes is put back after the run. */
export type Happening =
  | { readonly atS: number; readonly link: string; readonly does: 'blackhole' | 'restore' }
  | { readonly atS: number; readonly link: string; readonly does: 'shape'; readonly to: Quality }
  /** SIGKILL to the router of a node, or to the agent of the client. */
  | { readonly atS: number; readonly node: string; readonly does: 'kill' };

export type Way = {
  readonly transport: 'tcp' | 'mptcp';
  readonly family: 4 | 6;
  /** Runs our agent on the client. */
  readonly agent?: Agent;
  /** Everything goes through a lease of this detour's router, and nothing directly. */
  readonly via?: string;
};

export type Agent = { readonly strategy: string; readonly mode: string; readonly maxPaths: number };

export class ScenarioError extends Error {
  /** One for each thing that is wrong. */
  readonly problems: readonly string[];

  constructor(problems: readonly string[]) {
    super(problems.join('\n'));
    this.name = 'ScenarioError';
    this.problems = problems;
  }
}

/** Whether a link ever delays or loses, which kernels without netem cannot do by themselves. */
export function needsWire(scenario: Scenario, link: string): boolean {
  const qualities: readonly (Quality | undefined)[] = [
    scenario.links[link],
    ...scenario.events.map((event) => (event.does === 'shape' && event.link === link ? event.to : undefined)),
  ];
  return qualities.some((quality) => (quality?.delayMs ?? 0) > 0 || (quality?.lossPercent ?? 0) > 0);
}

export function nodesOf(scenario: Scenario): string[] {
  return [...new Set(Object.values(scenario.links).flatMap(({ between }) => between))];
}

export function detoursOf(scenario: Scenario): string[] {
  return Object.keys(scenario.nodes).filter((name) => scenario.nodes[name]?.router);
}

export type Addresses = { readonly v4: string; readonly v6: string };

export type Route = { readonly node: string; readonly to: string; readonly via: string };

/** Where everything is. */
export type Plan = {
  readonly networks: Readonly<Record<string, Addresses>>;
  /** All addresses of a node, that of its first link first. */
  readonly addresses: Readonly<Record<string, readonly Addresses[]>>;
  /** On nodes with one link a default route; on others one to each address of each node, by the fewest links to that node. */
  readonly routes: readonly Route[];
};

/** Numbers the links in their order and finds the ways between them: of equally long ones the one over earlier links. */
export function planOf(scenario: Scenario): Plan {
  const links = Object.entries(scenario.links).map(([name, { between }], index) => ({
    name,
    between,
    network: { v4: `10.64.${index}.0/30`, v6: `fd64:${index.toString(16)}::/64` },
    ends: [1, 2].map((last) => ({ v4: `10.64.${index}.${last}`, v6: `fd64:${index.toString(16)}::${last}` })),
  }));
  const endAt = (link: (typeof links)[number], node: string): Addresses | undefined =>
    link.ends[link.between[0] === node ? 0 : 1];
  const addresses: Record<string, Addresses[]> = {};
  for (const link of links)
    for (const node of link.between) {
      const end = endAt(link, node);
      if (end) addresses[node] = [...(addresses[node] ?? []), end];
    }
  const neighbours = (node: string): { readonly node: string; readonly at: Addresses | undefined }[] =>
    links
      .filter(({ between }) => between.includes(node))
      .map((link) => {
        const other = link.between[0] === node ? link.between[1] : link.between[0];
        return { node: other, at: endAt(link, other) };
      });
  const routes: Route[] = [];
  const add = (node: string, to: Addresses, via: Addresses | undefined): void => {
    if (via) routes.push({ node, to: to.v4, via: via.v4 }, { node, to: to.v6, via: via.v6 });
  };
  for (const node of Object.keys(addresses)) {
    const [first, ...others] = neighbours(node);
    if (others.length === 0) {
      add(node, { v4: 'default', v6: '::/0' }, first?.at);
      continue;
    }
    // The first hop on the shortest way to each node.
    const hops = new Map<string, Addresses | undefined>([[node, undefined]]);
    const queue = [node];
    for (let at = queue.shift(); at !== undefined; at = queue.shift())
      for (const next of neighbours(at)) {
        if (hops.has(next.node)) continue;
        hops.set(next.node, at === node ? next.at : hops.get(at));
        queue.push(next.node);
      }
    const own = new Set(links.filter(({ between }) => between.includes(node)).map(({ network }) => network.v4));
    for (const [target, hop] of hops)
      for (const link of links) {
        const end = link.between.includes(target) && !own.has(link.network.v4) ? endAt(link, target) : undefined;
        // Also those of neighbours: what is behind another link must not be sought beyond that link.
        if (end && target !== node) add(node, { v4: `${end.v4}/32`, v6: `${end.v6}/128` }, hop);
      }
  }
  return { networks: Object.fromEntries(links.map(({ name, network }) => [name, network])), addresses, routes };
}

/**
 * A scenario from a value of unknown origin, such as a YAML file, with all defaults filled in.
 * Throws a ScenarioError with everything that is wrong at once, each with its place.
 */
export function readScenario(value: unknown): Scenario {
  const problems: string[] = [];
  const root = new Part(value, '', problems);
  root.allow('name', 'about', 'client', 'server', 'congestion', 'nodes', 'links', 'traffic', 'events', 'ways');
  const scenario: Scenario = {
    name: root.text('name', /^[a-z0-9_]{1,30}$/, 'must be 1 to 30 small letters, digits or _'),
    about: root.text('about', /./, 'must say what it is about', ''),
    client: root.text('client', NODE_NAME, NODE_RULE),
    server: root.text('server', NODE_NAME, NODE_RULE),
    congestion: root.text('congestion', /^[a-z]+$/, 'must be the name of a congestion control', 'cubic'),
    nodes: root.map('nodes', readNode),
    links: root.map('links', readWire),
    traffic: root.list('traffic', readTraffic),
    events: root.list('events', readEvent),
    ways: root.map('ways', readWay),
  };
  problems.push(...(problems.length === 0 ? contradictions(scenario) : []));
  if (problems.length > 0) throw new ScenarioError(problems);
  return scenario;
}

const NODE_NAME = /^[a-z][a-z0-9]{0,11}$/;
const NODE_RULE = 'must be the name of a node: a small letter, then up to 11 more or digits';
const QUALITY = ['rateMbit', 'queueMs', 'delayMs', 'lossPercent'] as const;

function readNode(part: Part): Node {
  part.allow('router', 'subflows', 'sysctls');
  const subflows = part.number('subflows', 0, 8);
  return {
    router: part.flag('router'),
    ...(subflows === undefined ? {} : { subflows }),
    sysctls: part.map('sysctls', (value) => value.word()),
  };
}

function readQuality(part: Part): Quality {
  const limits = {
    rateMbit: [0.1, 100_000],
    queueMs: [1, 10_000],
    delayMs: [0, 10_000],
    lossPercent: [0, 100],
  } as const;
  const found: Partial<Record<keyof Quality, number>> = {};
  for (const name of QUALITY) {
    const [least, most] = limits[name];
    const number = part.number(name, least, most);
    if (number !== undefined) found[name] = number;
  }
  if (found.queueMs !== undefined && found.rateMbit === undefined)
    part.complain('queueMs', 'needs rateMbit: without a rate nothing waits');
  return found;
}

function readWire(part: Part): Wire {
  part.allow('between', ...QUALITY);
  const [a = '', b = '', ...more] = part.list('between', (end) => end.word(NODE_NAME, NODE_RULE));
  if (a === '' || b === '' || more.length > 0 || a === b) part.complain('between', 'must be two different nodes');
  return { between: [a, b], ...readQuality(part) };
}

function readTraffic(part: Part): Traffic {
  const atS = part.number('atS', 0, 3600) ?? 0;
  switch (part.choice('kind', ['transfer', 'messages', 'flows'])) {
    case 'messages':
      part.allow('kind', 'atS', 'count', 'everyMs');
      return {
        kind: 'messages',
        atS,
        count: part.number('count', 1, 100_000) ?? 100,
        everyMs: part.number('everyMs', 1, 60_000) ?? 100,
      };
    case 'flows':
      part.allow('kind', 'atS', 'count', 'bytes');
      return {
        kind: 'flows',
        atS,
        count: part.number('count', 1, 100_000) ?? 20,
        bytes: part.number('bytes', 1, 1e12) ?? 100_000,
      };
    default: {
      part.allow('kind', 'atS', 'direction', 'seconds', 'bytes');
      const [seconds, bytes] = [part.number('seconds', 0.1, 3600), part.number('bytes', 1, 1e12)];
      if ((seconds === undefined) === (bytes === undefined)) part.complain('', 'needs either seconds or bytes');
      return {
        kind: 'transfer',
        atS,
        direction: part.choice('direction', ['up', 'down']),
        ...(seconds === undefined ? {} : { seconds }),
        ...(bytes === undefined ? {} : { bytes }),
      };
    }
  }
}

function readEvent(part: Part): Happening {
  const atS = part.number('atS', 0, 3600) ?? 0;
  const does = part.choice('does', ['blackhole', 'restore', 'shape', 'kill']);
  if (does === 'kill') {
    part.allow('atS', 'does', 'node');
    return { atS, does, node: part.text('node', NODE_NAME, NODE_RULE) };
  }
  const link = part.text('link', /./, 'must be the name of a link');
  if (does !== 'shape') {
    part.allow('atS', 'does', 'link');
    return { atS, does, link };
  }
  part.allow('atS', 'does', 'link', 'to');
  return { atS, does, link, to: readQuality(part.inner('to', QUALITY)) };
}

function readWay(part: Part): Way {
  part.allow('transport', 'family', 'agent', 'via');
  const agent = part.has('agent') ? part.inner('agent', ['strategy', 'mode', 'maxPaths']) : undefined;
  return {
    transport: part.choice('transport', ['mptcp', 'tcp']),
    family: part.choice('family', [4, 6]),
    ...(agent === undefined
      ? {}
      : {
          agent: {
            strategy: agent.text('strategy', /^[a-z,]+$/, 'must be as DETOUR_STRATEGY has it', 'auto'),
            mode: agent.text('mode', /^[a-z]+$/, 'must be as DETOUR_MODE has it', 'aggregate'),
            maxPaths: agent.number('maxPaths', 1, 8) ?? 2,
          },
        }),
    ...(part.has('via') ? { via: part.text('via', NODE_NAME, NODE_RULE) } : {}),
  };
}

/** What only shows when all parts are looked at together. */
function contradictions(scenario: Scenario): string[] {
  const nodes = new Set(nodesOf(scenario));
  const found: string[] = [];
  const known = (name: string, place: string): void => {
    if (!nodes.has(name)) found.push(`${place}: no link names '${name}'; there are ${[...nodes].join(', ')}`);
  };
  known(scenario.client, 'client');
  known(scenario.server, 'server');
  if (scenario.client === scenario.server) found.push('server: is the client itself');
  for (const name of Object.keys(scenario.nodes)) known(name, `nodes.${name}`);
  if (Object.keys(scenario.ways).length === 0) found.push('ways: needs at least one');
  if (scenario.traffic.length === 0) found.push('traffic: needs at least one');
  const reached = new Set([scenario.client]);
  for (let before = 0; before < reached.size; ) {
    before = reached.size;
    for (const { between } of Object.values(scenario.links))
      if (between.some((name) => reached.has(name))) for (const name of between) reached.add(name);
  }
  for (const name of nodes) if (!reached.has(name)) found.push(`links: none leads from ${scenario.client} to ${name}`);
  const detours = detoursOf(scenario);
  for (const [name, way] of Object.entries(scenario.ways)) {
    if (way.via !== undefined && !detours.includes(way.via))
      found.push(`ways.${name}.via: '${way.via}' runs no router; those that do: ${detours.join(', ') || 'none'}`);
    if (way.agent && way.transport === 'tcp')
      found.push(`ways.${name}.agent: has nothing to do for plain TCP; let transport be mptcp`);
    if (way.agent && detours.length === 0) found.push(`ways.${name}.agent: there is no detour; let a node be a router`);
  }
  for (const [index, event] of scenario.events.entries()) {
    const place = `events[${index}]`;
    if (event.does !== 'kill' && !(event.link in scenario.links))
      found.push(`${place}.link: no '${event.link}'; there are ${Object.keys(scenario.links).join(', ')}`);
    if (event.does === 'kill' && ![scenario.client, ...detours].includes(event.node))
      found.push(`${place}.node: nothing of ours runs on '${event.node}'`);
  }
  return found;
}

/** A part of a value under examination, with its place for messages. */
class Part {
  readonly #value: unknown;
  readonly #place: string;
  readonly #problems: string[];

  constructor(value: unknown, place: string, problems: string[]) {
    this.#value = value;
    this.#place = place;
    this.#problems = problems;
  }

  complain(key: string, rule: string): void {
    const place = key === '' ? this.#place : this.#place === '' ? key : `${this.#place}.${key}`;
    this.#problems.push(`${place || 'the scenario'}: ${rule}`);
  }

  has(key: string): boolean {
    return this.#get(key) !== undefined;
  }

  /** Anything but these keys is a mistake, of which the nearest key may be what was meant. */
  allow(...keys: readonly string[]): void {
    if (!isRecord(this.#value)) this.complain('', 'must be a map');
    else
      for (const key of Object.keys(this.#value))
        if (!keys.includes(key)) this.complain(key, `is not known; there are ${keys.join(', ')}`);
  }

  inner(key: string, keys: readonly string[]): Part {
    const part = new Part(this.#get(key), this.#place === '' ? key : `${this.#place}.${key}`, this.#problems);
    part.allow(...keys);
    return part;
  }

  /** The value itself, as text. */
  word(pattern = /./, rule = 'must be a text or a number'): string {
    const text = typeof this.#value === 'number' ? String(this.#value) : this.#value;
    if (typeof text === 'string' && pattern.test(text)) return text;
    this.complain('', rule);
    return '';
  }

  text(key: string, pattern: RegExp, rule: string, fallback?: string): string {
    const value = this.#get(key) ?? fallback;
    if (typeof value === 'string' && (pattern.test(value) || value === fallback)) return value;
    this.complain(key, value === undefined ? `is missing; it ${rule}` : rule);
    return '';
  }

  number(key: string, least: number, most: number): number | undefined {
    const value = this.#get(key);
    if (value === undefined || (typeof value === 'number' && value >= least && value <= most)) return value;
    this.complain(key, `must be a number from ${least} to ${most}`);
    return undefined;
  }

  flag(key: string): boolean {
    const value = this.#get(key) ?? false;
    if (typeof value !== 'boolean') this.complain(key, 'must be true or false');
    return value === true;
  }

  /** One of the words; the first when there is none. */
  choice<T extends string | number>(key: string, words: readonly [T, ...T[]]): T {
    const value = this.#get(key) ?? words[0];
    const found = words.find((word) => word === value);
    if (found === undefined) this.complain(key, `must be one of ${words.join(', ')}`);
    return found ?? words[0];
  }

  map<T>(key: string, read: (part: Part) => T): Record<string, T> {
    const value = this.#get(key) ?? {};
    if (!isRecord(value)) {
      this.complain(key, 'must be a map');
      return {};
    }
    const place = this.#place === '' ? key : `${this.#place}.${key}`;
    return Object.fromEntries(
      Object.entries(value).map(([name, inner]) => [name, read(new Part(inner, `${place}.${name}`, this.#problems))]),
    );
  }

  list<T>(key: string, read: (part: Part) => T): T[] {
    const value = this.#get(key) ?? [];
    if (!Array.isArray(value)) {
      this.complain(key, 'must be a list');
      return [];
    }
    const place = this.#place === '' ? key : `${this.#place}.${key}`;
    return value.map((inner: unknown, index) => read(new Part(inner, `${place}[${index}]`, this.#problems)));
  }

  #get(key: string): unknown {
    return isRecord(this.#value) ? this.#value[key] : undefined;
  }
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}
