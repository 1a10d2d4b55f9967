import {
  type Book,
  type Candidate,
  type Decision,
  decide,
  openBook,
  type Score,
  type Situation,
  type Terms,
} from '../../appliance/client/paths.ts';
import { type Experience, fold, forgive, moments, type Reading } from '../../appliance/client/worth.ts';
import type { Connection } from './network.ts';

/** What chooses paths for one simulated connection; called with every sample. */
export type Policy = {
  readonly name: string;
  decide(connection: Connection, situation: Situation, readings: readonly Reading[]): Decision[];
  /** A detour answers again. */
  answered?(detour: string): void;
  /** For tests: what it has in mind. */
  readonly book?: Book;
};

export type Maker = (draw: () => number, experience: Experience) => Policy;

/** The program's own chooser. */
export const ours =
  (name: string, terms: Partial<Terms> & { score: Score }): Maker =>
  (draw, experience) => {
    const book = openBook(0);
    const all: Terms = { mode: 'aggregate', minAgeMs: 1_000, ...terms };
    return {
      name,
      book,
      answered: (detour) => forgive(experience, detour),
      decide(connection, situation, readings) {
        fold(book.observation, readings, connection.now);
        return decide(all, experience, book, situation, connection.now, draw);
      },
    };
  };

/** Only what is measured of each path itself counts. */
function ownRates(readings: readonly Reading[], last: Map<string, number>, rates: Map<string, number>): void {
  for (const { path, bytesAcked } of readings) {
    const rate = (bytesAcked - (last.get(path) ?? 0)) / 0.5;
    last.set(path, bytesAcked);
    rates.set(path, (rates.get(path) ?? rate) * 0.8 + rate * 0.2);
  }
}

const add = (detour: string): Decision => ({ act: 'add', detour, backup: false, why: '' });

const free = ({ limit, present }: Situation): number => limit - present.length;

/** No detours. */
export const alone: Maker = () => ({ name: 'direct alone', decide: () => [] });

/** The thesis: the first of its list, for ever. */
export const firstN: Maker = () => ({
  name: 'first N of the list',
  decide: (_, situation) => situation.candidates.slice(0, Math.max(0, free(situation))).map(({ key }) => add(key)),
});

/** The first version of this program: those that answer quickest. */
export const quickest: Maker = () => ({
  name: 'lowest control round trip',
  decide: (_, situation) =>
    [...situation.candidates]
      .sort((a, b) => (a.rttMs ?? 0) - (b.rttMs ?? 0))
      .slice(0, Math.max(0, free(situation)))
      .map(({ key }) => add(key)),
});

/** One place after the other goes to the next in the list. */
export const roundRobin: Maker = () => {
  let at = 0;
  return {
    name: 'round robin every 20 s',
    decide(connection, situation) {
      const slots = free(situation);
      if (slots > 0) return situation.candidates.slice(0, slots).map(({ key }) => add(key));
      const [oldest] = situation.present;
      const [next] = situation.candidates;
      if (connection.now - at < 20_000 || !oldest || !next) return [];
      at = connection.now;
      return [{ act: 'replace', detour: oldest.detour, by: next.key, why: '' }];
    },
  };
};

/** Own rates; one time in ten a candidate at random. */
export const epsilonGreedy: Maker = (draw) => {
  const last = new Map<string, number>();
  const rates = new Map<string, number>();
  let at = 0;
  const pick = (candidates: readonly Candidate[]): Candidate | undefined => {
    if (draw() < 0.1) return candidates[Math.floor(draw() * candidates.length)];
    const known = (one: Candidate): number => rates.get(one.key) ?? Number.POSITIVE_INFINITY;
    return [...candidates].sort((a, b) => known(b) - known(a))[0];
  };
  return {
    name: 'epsilon-greedy (0.1) by own rate',
    decide(connection, situation, readings) {
      const before = new Set(last.keys());
      const here = new Set(readings.map(({ path }) => path));
      for (const path of before) if (!here.has(path)) last.delete(path);
      ownRates(readings, last, rates);
      if (free(situation) > 0) {
        const next = pick(situation.candidates);
        return next ? [add(next.key)] : [];
      }
      if (connection.now - at < 5_000) return [];
      at = connection.now;
      const [weakest] = [...situation.present].sort((a, b) => (rates.get(a.detour) ?? 0) - (rates.get(b.detour) ?? 0));
      const next = pick(situation.candidates);
      if (!weakest || !next) return [];
      const explore = draw() < 0.1;
      if (!explore && (rates.get(next.key) ?? Number.POSITIVE_INFINITY) <= (rates.get(weakest.detour) ?? 0)) return [];
      return [{ act: 'replace', detour: weakest.detour, by: next.key, why: '' }];
    },
  };
};

/** Upper confidence bound: so many deviations of optimism instead of a draw. */
export const upperBound =
  (deviations: number): Score =>
  (belief) => {
    const { mean, deviation } = moments(belief);
    return mean + deviations * deviation;
  };

/** No exploration: whatever is believed best. */
export const meanOnly: Score = (belief) => moments(belief).mean;
