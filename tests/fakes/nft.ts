import type { Clock } from '../../appliance/kernel/clock.ts';
import type { MapElement } from '../../appliance/kernel/elements.ts';
import type { Nft, NftFailure, NftFailureKind } from '../../appliance/kernel/nft.ts';
import type { OptionTarget } from '../../appliance/kernel/rules.ts';
import { formatAddress, parseAddress, writeAddress } from '../../appliance/protocol/address.ts';

type Element = { readonly data: string; readonly comment: string; timeout: number; until: number };
type Set = { readonly spec: string; readonly elements: Map<string, Element> };
type Chain = { readonly hook: string; readonly rules: string[] };
type Table = {
  readonly chains: Map<string, Chain>;
  readonly sets: Map<string, Set>;
  readonly others: globalThis.Set<string>;
};

/** What goes wrong with the next run: before it, or (`after`) when the kernel has done it already. */
export type Fault = { readonly kind: NftFailureKind; readonly after?: boolean };

/** `10.0.0.1 . 443` as the kernel has it: each field filled up to 4 bytes. */
function bytesOf(text: string): Uint8Array {
  const [host = '', port = ''] = text.split(' . ');
  // The elements of a set have no data.
  if (text === '') return new Uint8Array(0);
  if (/^\d+$/.test(text)) return new Uint8Array([Number(text) >> 8, Number(text) & 255, 0, 0]);
  const address = parseAddress(host);
  if (!address) throw new Error(`no address: ${text}`);
  const bytes = new Uint8Array(20);
  writeAddress(address, bytes);
  bytes[16] = Number(port) >> 8;
  bytes[17] = Number(port) & 255;
  return host.includes(':') ? bytes : bytes.subarray(12);
}

/** A key as nft prints it, however the address in it was written; IPv4-mapped addresses stay IPv6. */
function canonical(key: string): string {
  const [first = '', ...rest] = key.split(' . ');
  const address = first.includes(':') ? parseAddress(first) : null;
  if (!address) return key;
  return [address.family === 4 ? `::ffff:${formatAddress(address)}` : formatAddress(address), ...rest].join(' . ');
}

/**
 * An nftables that knows what our texts use: one table, its chains, sets and maps with timeouts. It behaves like the
 * real one (tests/lab/nft-cases.ts runs the same cases against both): transactions are all or nothing, time runs out.
 */
export class FakeNft implements Nft {
  /** Asked before every run; null lets it pass. */
  fault: (commands: string) => Fault | null = () => null;
  /** While set, runs wait for it before they do anything: an nft that hangs. */
  gate: Promise<void> | null = null;
  /** Whether adding an element again gives it a new timeout: Linux 6.12 and newer. */
  refreshes = true;
  /** How many elements each dump hands over twice. */
  interrupted = 0;
  /** Every transaction tried, in order. */
  readonly runs: string[] = [];
  readonly #clock: Pick<Clock, 'now'>;
  #table: Table | null = null;
  #undo: (() => void)[] = [];
  #last: Promise<unknown> = Promise.resolve();

  constructor(clock: Pick<Clock, 'now'>) {
    this.#clock = clock;
  }

  run(commands: string): Promise<NftFailure | null> {
    return this.#serialised(async () => {
      await this.gate;
      this.runs.push(commands);
      const fault = this.fault(commands);
      if (fault && !fault.after) return { kind: fault.kind, message: `fault: ${fault.kind}` };
      const failure = this.#transaction(commands);
      if (fault) return { kind: fault.kind, message: `fault: ${fault.kind}` };
      return failure;
    });
  }

  list(args: readonly string[], line: (text: string) => void): Promise<NftFailure | null> {
    return this.#serialised(async () => {
      await this.gate;
      const fault = this.fault(args.join(' '));
      if (fault) return { kind: fault.kind, message: `fault: ${fault.kind}` };
      this.#expire();
      const lines = this.#print(args);
      if (lines === null) return { kind: 'absent', message: 'Error: No such file or directory' };
      for (const text of lines) line(text);
      return null;
    });
  }

  dump(table: string, map: string, each: (element: MapElement) => void): Promise<NftFailure | null> {
    return this.#serialised(async () => {
      await this.gate;
      const fault = this.fault(`dump ${table} ${map}`);
      if (fault) return { kind: fault.kind, message: `fault: ${fault.kind}` };
      this.#expire();
      const set = table === 'detour' ? this.#table?.sets.get(map) : undefined;
      if (!set) return { kind: 'absent', message: `reading map ${map}: ENOENT` };
      const now = this.#clock.now();
      const found = [...set.elements].map(([key, { data, until, comment }]) => ({
        key: bytesOf(key),
        data: bytesOf(data),
        remaining: Number.isFinite(until) ? (until - now) / 1000 : null,
        comment: comment === '' ? null : comment,
      }));
      // What an interrupted dump hands over before it begins again.
      for (const element of [...found.slice(0, this.interrupted), ...found]) each(element);
      return null;
    });
  }

  translateToOption(table: string, chain: string, { kind }: OptionTarget): Promise<NftFailure | null> {
    return this.#serialised(async () => {
      const fault = this.fault(`translate ${table} ${chain}`);
      if (fault) return { kind: fault.kind, message: `fault: ${fault.kind}` };
      const rules = table === 'detour' ? this.#table?.chains.get(chain)?.rules : undefined;
      if (!rules) return { kind: 'absent', message: `the rule of chain ${chain}: ENOENT` };
      rules.splice(0, rules.length, `dnat ip to tcp option @${kind}`);
      return null;
    });
  }

  /** As `nft flush ruleset` by somebody else. */
  flushRuleset(): void {
    this.#table = null;
  }

  /** As `nft flush map` by somebody else. */
  emptyMap(name: string): void {
    this.#table?.sets.get(name)?.elements.clear();
  }

  /** As `nft add rule` by somebody else. */
  addRule(chain: string, rule: string): void {
    this.#table?.chains.get(chain)?.rules.push(rule);
  }

  /** Keys and data of a map now: `10.0.0.1 . 20000` to `192.0.2.1 . 443`. */
  elements(name: string): ReadonlyMap<string, string> {
    this.#expire();
    return new Map([...(this.#table?.sets.get(name)?.elements ?? [])].map(([key, { data }]) => [key, data]));
  }

  /** Seconds until an element goes; null when it is not there. */
  remaining(name: string, key: string): number | null {
    this.#expire();
    const element = this.#table?.sets.get(name)?.elements.get(key);
    return element ? (element.until - this.#clock.now()) / 1000 : null;
  }

  rules(chain: string): readonly string[] {
    return this.#table?.chains.get(chain)?.rules ?? [];
  }

  get exists(): boolean {
    return this.#table !== null;
  }

  #serialised<T>(task: () => Promise<T>): Promise<T> {
    const run = this.#last.then(task);
    this.#last = run.catch(() => undefined);
    return run;
  }

  #expire(): void {
    const now = this.#clock.now();
    for (const { elements } of this.#table?.sets.values() ?? []) {
      for (const [key, { until }] of elements) if (until <= now) elements.delete(key);
    }
  }

  #transaction(commands: string): NftFailure | null {
    this.#expire();
    this.#undo = [];
    for (const line of commands.split('\n').filter((text) => text !== '')) {
      const kind = this.#command(line);
      if (kind === null) continue;
      for (const step of this.#undo.toReversed()) step();
      return { kind, message: `Error: ${kind}: ${line}` };
    }
    return null;
  }

  /** Sets a map's key, or deletes it with undefined, so that it can be undone. */
  #put<K, V>(map: Map<K, V>, key: K, value: V | undefined): void {
    const before = map.get(key);
    this.#undo.push(() => (before === undefined ? map.delete(key) : map.set(key, before)));
    if (value === undefined) map.delete(key);
    else map.set(key, value);
  }

  #command(line: string): NftFailureKind | null {
    const match =
      /^(add|create|delete|flush) (table|map|set|counter|ct timeout|chain|rule|element) inet detour ?(\S*) ?(.*)$/.exec(
        line,
      );
    if (!match) return 'rejected';
    const [, verb = '', object = '', name = '', rest = ''] = match;
    if (object === 'table') return this.#tableCommand(verb);
    const table = this.#table;
    if (!table) return 'absent';
    if (object === 'counter' || object === 'ct timeout') {
      table.others.add(name);
      return null;
    }
    if (object === 'chain') return this.#chainCommand(table, verb, name, rest);
    if (object === 'rule') {
      const chain = table.chains.get(name);
      if (!chain) return 'absent';
      chain.rules.push(rest);
      this.#undo.push(() => chain.rules.pop());
      return null;
    }
    if (object === 'element') return this.#elementCommand(table, verb, name, rest);
    return this.#setCommand(table, verb, name, rest);
  }

  #tableCommand(verb: string): NftFailureKind | null {
    const before = this.#table;
    this.#undo.push(() => {
      this.#table = before;
    });
    if (verb === 'add') this.#table ??= { chains: new Map(), sets: new Map(), others: new Set() };
    else if (!before) return 'absent';
    else if (verb === 'delete') this.#table = null;
    else for (const [name, { hook }] of before.chains) this.#put(before.chains, name, { hook, rules: [] });
    return null;
  }

  #chainCommand(table: Table, verb: string, name: string, hook: string): NftFailureKind | null {
    const held = table.chains.get(name);
    if (verb === 'flush') {
      if (!held) return 'absent';
      this.#put(table.chains, name, { hook: held.hook, rules: [] });
      return null;
    }
    if (verb === 'delete') {
      if (!held) return 'absent';
      // A chain that is jumped to, or has rules, is in use.
      const used = [...table.chains.values()].some(({ rules }) => rules.some((rule) => rule.endsWith(`goto ${name}`)));
      if (used || held.rules.length > 0) return 'rejected';
      this.#put(table.chains, name, undefined);
      return null;
    }
    if (held && held.hook !== hook) return 'exists';
    if (!held) this.#put(table.chains, name, { hook, rules: [] });
    return null;
  }

  #setCommand(table: Table, verb: string, name: string, spec: string): NftFailureKind | null {
    const held = table.sets.get(name);
    if (verb === 'add') {
      if (held) return held.spec === spec ? null : 'exists';
      this.#put(table.sets, name, { spec, elements: new Map() });
      return null;
    }
    if (!held) return 'absent';
    this.#put(table.sets, name, verb === 'delete' ? undefined : { spec: held.spec, elements: new Map() });
    return null;
  }

  #elementCommand(table: Table, verb: string, name: string, text: string): NftFailureKind | null {
    const set = table.sets.get(name);
    if (!set) return 'absent';
    const body = /^\{ (.*) \}$/.exec(text)?.[1];
    if (body === undefined) return 'rejected';
    for (const one of body.split(', ')) {
      const parts =
        /^([\w.:]+(?: \. \d+)?)(?: timeout (\d+)s)?(?: expires (\d+)s)?(?: comment "([^"]*)")?(?: : (\S+ \. \d+))?$/.exec(
          one,
        );
      if (!parts) return 'rejected';
      const [, written = '', timeout, expires, comment = '', data = ''] = parts;
      const key = canonical(written);
      const held = set.elements.get(key);
      if (verb === 'delete') {
        if (!held) return 'absent';
        this.#put(set.elements, key, undefined);
        continue;
      }
      const seconds = timeout === undefined ? Number.POSITIVE_INFINITY : Number(timeout);
      const until = this.#clock.now() + (expires === undefined ? seconds : Number(expires)) * 1000;
      if (held) {
        if (held.data !== data || verb === 'create') return 'exists';
        if (this.refreshes && expires !== undefined) this.#put(set.elements, key, { ...held, timeout: seconds, until });
        continue;
      }
      const size = Number(/size (\d+);/.exec(set.spec)?.[1] ?? Number.POSITIVE_INFINITY);
      if (set.elements.size >= size) return 'full';
      this.#put(set.elements, key, { data, comment, timeout: seconds, until });
    }
    return null;
  }

  #print(args: readonly string[]): string[] | null {
    const table = this.#table;
    if (args.join(' ') === 'list chains inet') {
      return table
        ? ['table inet detour {', ...[...table.chains.keys()].flatMap((chain) => [`\tchain ${chain} {`, '\t}']), '}']
        : [];
    }
    if (!table) return null;
    const words = args.filter((arg) => !arg.startsWith('-'));
    const [verb, object, , , name = ''] = words;
    if (verb === 'list' && object === 'table') {
      return [
        'table inet detour {',
        ...[...table.sets].flatMap(([set, { spec }]) => [
          `\t${spec.includes(' : ') ? 'map' : 'set'} ${set} {`,
          `\t\t${spec}`,
          '\t}',
        ]),
        ...[...table.chains].flatMap(([chain, { hook, rules }]) => [
          `\tchain ${chain} {`,
          `\t\t${hook}`,
          ...rules.map((rule) => `\t\t${rule}`),
          '\t}',
        ]),
        '}',
      ];
    }
    if (verb === 'list' && object === 'counters') {
      return [...table.others].flatMap((counter) => [`\tcounter ${counter} {`, '\t\tpackets 0 bytes 0', '\t}']);
    }
    const set = table.sets.get(name);
    if (!set) return null;
    return [...set.elements].map(([key, element]) => `\t\telements = { ${key}${this.#options(element)} }`);
  }

  #options({ timeout, until, comment, data }: Element): string {
    const left = Math.max(0, Math.round(until - this.#clock.now()));
    const time = Number.isFinite(timeout)
      ? ` timeout ${timeout}s expires ${Math.floor(left / 1000)}s${left % 1000}ms`
      : '';
    return `${time}${comment === '' ? '' : ` comment "${comment}"`}${data === '' ? '' : ` : ${data}`}`;
  }
}
