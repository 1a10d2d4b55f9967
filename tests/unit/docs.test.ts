import { existsSync, readdirSync, readFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { describeVariables } from '../../appliance/variables.ts';
import { CONFIGURATION, configuration, README, readme } from '../../docs/generate.ts';

const root = join(import.meta.dirname, '../..');
const documents = [
  'README.md',
  'CHANGELOG.md',
  ...readdirSync(join(root, 'docs'))
    .filter((name) => name.endsWith('.md'))
    .map((name) => `docs/${name}`),
];

describe('generated documents (node docs/generate.ts)', () => {
  it('docs/configuration.md is what the table of variables says', () => {
    expect(readFileSync(CONFIGURATION, 'utf8')).toBe(configuration());
  });

  it('README.md has the table of variables', () => {
    const text = readFileSync(README, 'utf8');
    expect(text).toBe(readme(text));
  });
});

describe.each(documents)('%s', (name) => {
  const text = readFileSync(join(root, name), 'utf8');

  it('names no variable that does not exist', () => {
    const known = new Set(describeVariables().flatMap(({ name }) => [name, `${name}_FILE`]));
    // DETOUR_X stands for any variable, DETOUR_BUILD_* and DETOUR_*_IMAGE belong to the build and to compose.
    const named = [...text.matchAll(/\bDETOUR_[A-Z0-9_]*[A-Z0-9]/g)].map(([variable]) => variable);
    const strange = named.filter(
      (variable) => !known.has(variable) && !/^DETOUR_(X|X_FILE|BUILD_\w+|\w+_IMAGE)$/.test(variable),
    );
    expect(strange).toEqual([]);
  });

  it('links to files that exist', () => {
    const links = [...text.matchAll(/\]\((?!https?:|#|mailto:)([^)#\s]+)/g)].map(([, target]) => target ?? '');
    expect(links.filter((target) => !existsSync(join(root, dirname(name), target)))).toEqual([]);
  });
});
