import type { Nft, NftFailure } from '../kernel/nft.ts';
import type { Capability } from './capabilities.ts';
import type { Lease, Write } from './leases.ts';
import {
  AddressBook,
  type AnnouncementElement,
  announcedMap,
  CAPABILITY_SET,
  type CapabilityElement,
  chainNames,
  type Element,
  type Foreign,
  isSame,
  LIST_CHAINS,
  LIST_COUNTERS,
  LIST_MEMORY,
  LIST_PROBE,
  LIST_RULES,
  leaseMap,
  PROBE,
  REMOVE_TABLE,
  type RulesetConfig,
  readAnnouncement,
  readCapability,
  readCounters,
  readElement,
  readFacts,
  readNames,
  readProbe,
  readTunnelElement,
  renderCapability,
  renderCapabilityRemoval,
  renderCreation,
  renderForeignRemoval,
  renderMemory,
  renderRemoval,
  renderStatic,
  renderWrite,
  type TableNames,
  TO_OPTION,
  type TunnelElement,
  tunnelSet,
} from './ruleset.ts';

/** Elements in one transaction where there are many: some milliseconds of work, and a short text. */
const CHUNK = 1_000;

/** Our table in the kernel: puts it there, reads it, and says of every write whether the kernel has it. */
export class Table {
  readonly #nft: Nft;
  #config: RulesetConfig | null = null;
  /** What nft printed right after we installed the rules. */
  #installed: string | null = null;
  /** Whether this kernel gives an element that is added again a new timeout. */
  #refreshes = false;

  constructor(nft: Nft) {
    this.#nft = nft;
  }

  /**
   * Makes the rules what `config` says and leaves leases and memory alone. A kernel without conntrack timeout objects
   * gets rules without them; `timeouts` of the answer says which it was.
   */
  async install(config: RulesetConfig): Promise<NftFailure | { readonly timeouts: boolean }> {
    // Listing chains is cheap; listing sets reads every element of every map, whatever one asks for (nft 1.0.6).
    let names = await this.#names(LIST_CHAINS);
    if (names && 'kind' in names) return names;
    let used = config;
    let failure = await this.#nft.run(renderStatic(used, names));
    if (failure?.kind === 'exists') {
      // An older version's set of another kind stands in the way.
      names = await this.#names(LIST_RULES);
      if (names && 'kind' in names) return names;
      failure = await this.#nft.run(renderStatic(used, names));
    }
    if (failure && used.timeouts && failure.kind !== 'unknown' && failure.kind !== 'denied') {
      used = { ...config, timeouts: false };
      failure = await this.#nft.run(renderStatic(used, names));
    }
    if (failure === null && used.inband) {
      const { table } = CAPABILITY_SET;
      failure = await this.#nft.translateToOption(table, TO_OPTION.chain, TO_OPTION.target);
    }
    if (failure) return failure;
    this.#config = used;
    this.#installed = null;
    return { timeouts: used.timeouts };
  }

  /** Finds out what this kernel can do. Only before the rules are installed. */
  async probe(): Promise<NftFailure | null> {
    const [first, second, last] = PROBE;
    const failure = (await this.#nft.run(first)) ?? (await this.#nft.run(second));
    if (failure) return failure;
    const found = await this.#lines(LIST_PROBE);
    this.#refreshes = !('kind' in found) && readProbe(found.join('\n'));
    return this.#nft.run(last);
  }

  /**
   * Whether the table is as we installed it: `changed` and `absent` are the work of somebody else. Only a `thorough`
   * look sees every rule, and it reads all leases as well: a second of CPU for 60,000.
   */
  async check(thorough: boolean): Promise<'intact' | 'changed' | 'absent' | NftFailure> {
    if (!thorough) {
      const names = await this.#names(LIST_CHAINS);
      if (names && 'kind' in names) return names;
      if (!names || names.chains.length === 0) return 'absent';
      const wanted = this.#config ? chainNames(this.#config) : [];
      return names.chains.toSorted().join() === wanted.toSorted().join() ? 'intact' : 'changed';
    }
    const present = await this.#lines(LIST_RULES);
    if ('kind' in present) return present.kind === 'absent' ? 'absent' : present;
    const text = present.join('\n');
    // The first look after an installation is the measure for all that follow.
    this.#installed ??= text;
    return text === this.#installed ? 'intact' : 'changed';
  }

  /** Puts the rules back as they were installed last. */
  async reinstall(): Promise<NftFailure | null> {
    if (!this.#config) return null;
    const outcome = await this.install(this.#config);
    return 'kind' in outcome ? outcome : null;
  }

  /** What earlier daemons wanted remembered; null when there is no table. */
  async facts(): Promise<readonly string[] | null | NftFailure> {
    const found = await this.#lines(LIST_MEMORY);
    if ('kind' in found) return found.kind === 'absent' ? null : found;
    return found.flatMap(readFacts);
  }

  remember(facts: readonly string[]): Promise<NftFailure | null> {
    return this.#nft.run(renderMemory(facts));
  }

  /** Reads all leases, each at least once, and removes elements that nobody of ours put there. */
  async read(visit: (element: Element) => void): Promise<NftFailure | null> {
    const foreign = new Map<string, Foreign>();
    const known = new AddressBook();
    for (const family of [4, 6] as const) {
      const { table, map } = leaseMap(family);
      const failure = await this.#nft.dump(table, map, (found) => {
        const element = readElement(family, found, known);
        if ('owner' in element) visit(element);
        else foreign.set(element.key, element);
      });
      if (failure) return failure;
    }
    return foreign.size === 0 ? null : this.#nft.run(renderForeignRemoval([...foreign.values()]));
  }

  /** Does what a text of the ruleset's says, in one transaction. */
  change(text: string): Promise<NftFailure | null> {
    return this.#nft.run(text);
  }

  /** The addresses inside tunnels that are let through, each at least once. Null stands for one that nobody of ours put there. */
  async tunnels(): Promise<readonly (TunnelElement | null)[] | NftFailure> {
    const found: (TunnelElement | null)[] = [];
    for (const family of [4, 6] as const) {
      const { table, map } = tunnelSet(family);
      const failure = await this.#nft.dump(table, map, (element) => found.push(readTunnelElement(family, element)));
      if (failure) return failure;
    }
    return found;
  }

  /** The capabilities that are let through, each at least once. Null stands for one that nobody of ours put there. */
  async capabilities(): Promise<readonly (CapabilityElement | null)[] | NftFailure> {
    const found: (CapabilityElement | null)[] = [];
    const { table, map } = CAPABILITY_SET;
    const failure = await this.#nft.dump(table, map, (element) => found.push(readCapability(element)));
    return failure ?? found;
  }

  /** The announcements that joins are led by, each at least once. Null stands for one that nobody of ours put there. */
  async announcements(): Promise<readonly (AnnouncementElement | null)[] | NftFailure> {
    const found: (AnnouncementElement | null)[] = [];
    for (const family of [4, 6] as const) {
      const { table, map } = announcedMap(family);
      const failure = await this.#nft.dump(table, map, (element) => found.push(readAnnouncement(family, element)));
      if (failure) return failure;
    }
    return found;
  }

  /** Lets these clients name their servers, in one transaction; `instead` lose it. */
  authorise(added: readonly Capability[], instead: readonly Capability[]): Promise<NftFailure | null> {
    const texts = added.map((capability) => renderCapability(capability, this.#refreshes));
    return this.#nft.run([...instead.map(renderCapabilityRemoval), ...texts].join(''));
  }

  /** Removes elements that are nobody's lease. What has expired meanwhile is no failure. */
  async discard(elements: readonly Element[]): Promise<void> {
    for (let at = 0; at < elements.length; at += CHUNK) {
      await this.#nft.run(
        elements
          .slice(at, at + CHUNK)
          .map(renderRemoval)
          .join(''),
      );
    }
  }

  /**
   * Whether the kernel holds the element of a lease, `lifetime` seconds from its end. Asked by creating it, which costs
   * nothing and fails when it is there: reading one element reads them all (nft 1.0.6).
   */
  async holds(lease: Lease, lifetime: number): Promise<boolean | NftFailure> {
    const failure = await this.#nft.run(renderCreation(lease, lifetime));
    if (!failure) return false;
    return failure.kind === 'exists' ? true : failure;
  }

  /**
   * Does `writes` in one transaction. The answer has one entry for each: null when the kernel has done it. If some
   * cannot be done, the others are done without them; if nft died over them, the kernel is asked what it has.
   */
  async commit(writes: readonly Write[]): Promise<readonly (NftFailure | null)[]> {
    if (writes.length === 0) return [];
    const failure = await this.#nft.run(writes.map((write) => renderWrite(write, this.#refreshes)).join(''));
    if (!failure) return writes.map(() => null);
    if (failure.kind === 'unknown') return this.#ask(writes, failure);
    const splittable = failure.kind === 'exists' || failure.kind === 'full' || failure.kind === 'rejected';
    if (writes.length === 1 || !splittable) return writes.map(() => failure);
    const middle = writes.length >> 1;
    return [...(await this.commit(writes.slice(0, middle))), ...(await this.commit(writes.slice(middle)))];
  }

  /** Like `commit` for any number of writes. */
  async commitMany(writes: readonly Write[]): Promise<readonly (NftFailure | null)[]> {
    const outcomes: (NftFailure | null)[] = [];
    for (let at = 0; at < writes.length; at += CHUNK)
      outcomes.push(...(await this.commit(writes.slice(at, at + CHUNK))));
    return outcomes;
  }

  async counters(): Promise<ReadonlyMap<string, number>> {
    const found = await this.#lines(LIST_COUNTERS);
    return 'kind' in found ? new Map() : readCounters(found.join('\n'));
  }

  /** Leaves nothing of ours in nftables. */
  remove(): Promise<NftFailure | null> {
    this.#installed = null;
    return this.#nft.run(REMOVE_TABLE);
  }

  /** After a run without an outcome: the maps say what was done. */
  async #ask(writes: readonly Write[], failure: NftFailure): Promise<readonly (NftFailure | null)[]> {
    const done = new Set<Write>(writes.filter(({ kind }) => kind === 'remove'));
    const unread = await this.read((element) => {
      for (const write of writes) {
        if (!isSame(element, write.lease)) continue;
        if (write.kind === 'remove') done.delete(write);
        // Only the new element lasts longer than what is granted; the one before the renewal ran out sooner.
        else if (element.remaining >= write.lifetime) done.add(write);
      }
    });
    return writes.map((write) => (unread || !done.has(write) ? (unread ?? failure) : null));
  }

  async #names(args: readonly string[]): Promise<TableNames | null | NftFailure> {
    const found = await this.#lines(args);
    if (!('kind' in found)) return readNames(found);
    return found.kind === 'absent' ? null : found;
  }

  async #lines(args: readonly string[]): Promise<string[] | NftFailure> {
    const collected: string[] = [];
    const failure = await this.#nft.list(args, (line) => collected.push(line));
    return failure ?? collected;
  }
}
