import { Fatal } from '../exit.ts';
import { type Nft, type NftFailure, remedyOf } from './nft.ts';

/**
 * A few words that outlive this process: a container's file system may be read-only and /run may be a tmpfs, but the
 * kernel of the network namespace whose parameters we changed is there for exactly as long as those parameters are.
 */
export type Memory = {
  /** What is remembered; null when nothing is. @throws Fatal (69) when it cannot be read */
  recall(): Promise<ReadonlyMap<string, string> | null>;
  /** Remembers `values` unless something is remembered already: the first writer wins. @throws Fatal (69) */
  remember(values: ReadonlyMap<string, string>): Promise<void>;
  /** Forgets all. Harmless when there is nothing. @throws Fatal (69) */
  forget(): Promise<void>;
};

const SET = 'remembered';
/** Names are elements of a set of interface names (IFNAMSIZ is 16 with the closing zero), values their comments. */
const NAME = /^[a-z_]{1,15}$/;
const VALUE = /^[\w .=-]{1,120}$/;

/** Keeps words in table `inet <table>` of nftables, in a set that no rule looks at. */
export function nftMemory(nft: Nft, table: string): Memory {
  const failed = (what: string, failure: NftFailure): Fatal =>
    new Fatal(69, `cannot ${what} table inet ${table}: ${remedyOf(failure)}`);
  return {
    async recall() {
      const values = new Map<string, string>();
      // Not by a run of nft, which takes 20 times as long: an agent with many namespaces leaves all of them at once.
      const failure = await nft.dump(table, SET, ({ key, comment }) => {
        const name = Buffer.from(key).toString('latin1').replace(/\0.*$/s, '');
        if (comment !== null) values.set(name, comment);
      });
      if (failure?.kind === 'absent') return null;
      if (failure) throw failed('read', failure);
      return values;
    },
    async remember(values) {
      const elements = [...values].map(([name, value]) => {
        if (!NAME.test(name) || !VALUE.test(value)) throw new RangeError(`cannot remember ${name}=${value}`);
        return `"${name}" comment "${value}"`;
      });
      // `create` fails when the table exists, and the transaction with it: that is the first writer's protection.
      const failure = await nft.run(
        `create table inet ${table}\n` +
          // `typeof`: see router/ruleset.ts, an older nft on the host crashes over `type`.
          `create set inet ${table} ${SET} { typeof iifname; }\n` +
          `create element inet ${table} ${SET} { ${elements.join(', ')} }\n`,
      );
      if (failure && failure.kind !== 'exists') throw failed('write', failure);
    },
    async forget() {
      const failure = await nft.run(`delete table inet ${table}\n`);
      if (failure && failure.kind !== 'absent') throw failed('delete', failure);
    },
  };
}
