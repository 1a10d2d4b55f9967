import { describe, expect, it } from 'vitest';
import { Lab, requireRoot } from '../lab/netns.ts';
import { Programs } from './programs.ts';

describe.runIf(requireRoot('tests of clusters'))('the programs of a cluster', () => {
  it('are named, with their last words, when one ends while something is waited for', async () => {
    await using lab = await Lab.create('programs');
    const host = await lab.host('only');
    const programs = new Programs();
    programs.add('one', host.spawn(['sh', '-c', 'echo one is fine; exec sleep 60']));
    const two = host.spawn(['sh', '-c', 'echo two has a problem >&2; read order; exit 1']);
    programs.add('two', two);
    await two.waitFor('problem');
    await expect(programs.waitFor('rain', () => false, 100)).rejects.toThrow(
      /in vain for rain.*--- one:\none is fine\n--- two:\ntwo has a problem/s,
    );
    two.write('\n');
    const forever = 3_600_000;
    await expect(programs.waitFor('rain', () => false, forever)).rejects.toThrow(
      'two ended while waiting for rain:\n--- two:\ntwo has a problem',
    );
    await programs.end('two');
    expect(await programs.waitFor('sun', () => 'sun', forever)).toBe('sun');
    await programs.endAll();
  });
});
