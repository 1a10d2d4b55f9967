import { readdirSync, readFileSync } from 'node:fs';
import { dirname, join, normalize } from 'node:path';
import { describe, expect, it } from 'vitest';

/**
 * The direction of imports, and who may touch the world (design, section 4): main -> shell -> pure -> protocol, types of
 * kernel/ for shells, ports built by entries alone. A new file needs a role here before it may exist.
 */
type Role = 'entry' | 'edge' | 'kernel' | 'shell' | 'pure' | 'protocol';

const ROLES: readonly (readonly [RegExp, Role])[] = [
  [/^cli\.ts$/, 'entry'],
  [/^(router|client)\/main\.ts$/, 'entry'],
  [/^protocol\//, 'protocol'],
  [/^router\/(policy|leases|capabilities|announcements|ruleset|tunnels)\.ts$/, 'pure'],
  [
    /^client\/(manager|explain|state|joins|slots|repair|revival|roaming|spares|interfaces|adoption|fleet|listing|paths|worth)\.ts$/,
    'pure',
  ],
  [/^client\/(rescue|redirect|workloads|switches|enrolment|numbering|guard)\.ts$/, 'pure'],
  [/^router\/(server|keeper|gateway|table|notices)\.ts$/, 'shell'],
  [
    /^client\/(daemon|agent|announcements|announcer|report|metrics|detours|tunnels|sources|names|loader|limits|mptcpify|rescuer|provider|docker|kubernetes)\.ts$/,
    'shell',
  ],
  [/^kernel\//, 'kernel'],
  [/^status\//, 'edge'],
  // Whatever stands beside cli.ts serves it: settings, log, doctor.
  [/^\w+\.ts$/, 'edge'],
];

/** Whose values a role may import; of the others it may at most see types, and those only where TYPES says so. */
const VALUES: Readonly<Record<Role, readonly Role[]>> = {
  entry: ['entry', 'edge', 'kernel', 'shell', 'pure', 'protocol'],
  shell: ['shell', 'pure', 'protocol'],
  pure: ['pure', 'protocol'],
  protocol: ['protocol'],
  kernel: ['kernel', 'protocol'],
  edge: ['edge', 'protocol', 'kernel'],
};
const TYPES: Readonly<Record<Role, readonly Role[]>> = {
  entry: [],
  shell: ['kernel', 'edge'],
  pure: [],
  protocol: [],
  kernel: ['edge'],
  edge: [],
};
/** Files without state or effects, which everybody but pure modules may use: an error with its exit code. */
const PLAIN = 'exit.ts';

/** What reads a clock, randomness or the process behind a function's back. */
const IMPURE: readonly (readonly [RegExp, string, readonly Role[]])[] = [
  [/\bprocess\.env\b/, 'process.env', ['edge', 'kernel', 'shell', 'pure', 'protocol']],
  [/\bDate\.now\b|\bnew Date\(\s*\)/, 'the clock', ['shell', 'pure', 'protocol']],
  [/\bperformance\.\w/, 'the clock', ['shell', 'pure', 'protocol']],
  [/\bMath\.random\b|\brandom(Bytes|UUID|Int)\b|\bgetRandomValues\b/, 'randomness', ['shell', 'pure', 'protocol']],
  [/\bset(Timeout|Interval|Immediate)\b/, 'a timer', ['shell', 'pure', 'protocol']],
  [/\b(console|globalThis|process)\./, 'the process', ['pure', 'protocol']],
  [/\bfetch\(/, 'the network', ['shell', 'pure', 'protocol']],
];

type Import = { readonly from: string; readonly typeOnly: boolean };

function roleOf(file: string): Role | null {
  return ROLES.find(([pattern]) => pattern.test(file))?.[1] ?? null;
}

function withoutComments(source: string): string {
  // A string is kept whole, so that the slashes of 'https://' begin no comment.
  return source.replace(
    /('(?:\\.|[^'\\\n])*'|"(?:\\.|[^"\\\n])*")|\/\*[\s\S]*?\*\/|\/\/[^\n]*/g,
    (_, text) => text ?? '',
  );
}

/** Every import and re-export of a source text, static or dynamic. */
function importsOf(source: string): Import[] {
  const found: Import[] = [];
  for (const match of source.matchAll(/^\s*(?:import|export)\s+(type\s+)?([^'";]*?)\s*from\s*['"]([^'"]+)['"]/gm)) {
    const [, keyword, names = '', from = ''] = match;
    const inline = /^\{([\s\S]*)\}$/.exec(names.trim())?.[1];
    const allTypes = inline
      ?.split(',')
      .map((name) => name.trim())
      .filter((name) => name !== '')
      .every((name) => name.startsWith('type '));
    found.push({ from, typeOnly: keyword !== undefined || allTypes === true });
  }
  for (const match of source.matchAll(/^\s*import\s*['"]([^'"]+)['"]/gm))
    found.push({ from: match[1] ?? '', typeOnly: false });
  for (const match of source.matchAll(/\bimport\(\s*['"]([^'"]+)['"]\s*\)(?!\s*\.\w+\s*[;,)>|])/g)) {
    found.push({ from: match[1] ?? '', typeOnly: false });
  }
  return found;
}

/** What is wrong with one file; `file` is its path under appliance/. */
function violations(file: string, text: string): string[] {
  const role = roleOf(file);
  if (role === null) return [`${file} has no role: name it in this test`];
  const source = withoutComments(text);
  const found: string[] = [];
  for (const { from, typeOnly } of importsOf(source)) {
    const complaint = importComplaint(file, role, from, typeOnly);
    if (complaint !== null) found.push(`${file} (${role}) imports ${from}: ${complaint}`);
  }
  for (const [pattern, what, roles] of IMPURE) {
    if (roles.includes(role) && pattern.test(source)) found.push(`${file} (${role}) reaches for ${what}`);
  }
  return found;
}

function importComplaint(file: string, role: Role, from: string, typeOnly: boolean): string | null {
  if (from.startsWith('node:')) {
    if (role === 'protocol') return from === 'node:crypto' ? null : 'only its MAC and HKDF are pure';
    return role === 'pure' || role === 'shell' ? 'it gets a port instead' : null;
  }
  if (!from.startsWith('.')) return role === 'pure' || role === 'protocol' ? 'a pure module imports no package' : null;
  const target = normalize(join(dirname(file), from));
  if (target.startsWith('..')) return 'it leaves appliance/';
  const [ownSide, otherSide] = [file.split('/')[0], target.split('/')[0]];
  if ((ownSide === 'router' && otherSide === 'client') || (ownSide === 'client' && otherSide === 'router')) {
    return 'router and client never import each other';
  }
  const targetRole = roleOf(target);
  if (targetRole === null) return 'that file has no role';
  if (VALUES[role].includes(targetRole)) return null;
  if (target === PLAIN && role !== 'pure' && role !== 'protocol') return null;
  if (TYPES[role].includes(targetRole)) return typeOnly ? null : 'only its types may be imported';
  return `a ${role} file does not know ${targetRole} files`;
}

describe('architecture', () => {
  const root = join(import.meta.dirname, '../../appliance');
  const files = readdirSync(root, { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.ts'));

  it('looks at the whole program', () => {
    expect(files).toEqual(
      expect.arrayContaining(['cli.ts', 'router/main.ts', 'client/main.ts', 'protocol/control.ts']),
    );
  });

  it.each(files)('%s keeps to its role', (file) => {
    expect(violations(file, readFileSync(join(root, file), 'utf8'))).toEqual([]);
  });

  // An agent without that provider must not pay for it: what is only imported dynamically is bundled, and run when it is needed.
  it('loads the client of the Docker engine only where it is wanted', () => {
    const importers = (pattern: RegExp) =>
      files.filter((file) => pattern.test(withoutComments(readFileSync(join(root, file), 'utf8')))).sort();
    expect(importers(/from 'dockerode'/)).toEqual(['kernel/engine.ts']);
    expect(importers(/^import (?!type\b)[^;]*?from '[^']*\/engine\.ts'/m)).toEqual([]);
    expect(importers(/await import\('\.\.\/kernel\/engine\.ts'\)/)).toEqual(['client/main.ts']);
  });

  // The rules themselves: each of these must be refused, or the test above proves nothing.
  it.each([
    ['router/policy.ts', `import { x } from 'node:fs';`],
    ['router/policy.ts', `import ipaddr from 'ipaddr.js';`],
    ['router/policy.ts', `import type { Clock } from '../kernel/clock.ts';`],
    ['router/policy.ts', `const now = Date.now();`],
    ['router/policy.ts', `import { serve } from './server.ts';`],
    ['router/server.ts', `import { openClock } from '../kernel/clock.ts';`],
    ['router/server.ts', `import {\n  type Clock,\n  openClock,\n} from '../kernel/clock.ts';`],
    ['router/server.ts', `import type { Manager } from '../client/manager.ts';`],
    ['router/server.ts', `import './main.ts';`],
    ['router/server.ts', `const late = await import('../kernel/nft.ts');`],
    ['router/server.ts', `setTimeout(() => {}, 1);`],
    ['client/sources.ts', `import { lookup } from 'node:dns/promises';`],
    ['client/paths.ts', `const roll = Math.random();`],
    ['client/surprise.ts', ``],
    ['protocol/control.ts', `import { request } from 'node:http';`],
    ['protocol/control.ts', `export { grant } from '../router/leases.ts';`],
    ['protocol/control.ts', `import { randomBytes } from 'node:crypto';`],
    ['settings.ts', `const all = process.env;`],
    ['settings.ts', `import { step } from './client/manager.ts';`],
    ['kernel/nft.ts', `import { readSettings } from '../settings.ts';`],
  ])('%s may not contain %s', (file, text) => {
    expect(violations(file, text)).not.toEqual([]);
  });

  it.each([
    ['router/server.ts', `import type { Clock } from '../kernel/clock.ts';\nimport { grant } from './leases.ts';`],
    ['router/server.ts', `import { type Clock } from '../kernel/clock.ts';`],
    ['router/policy.ts', `/** Unlike Date.now(), see node:fs. */\nimport { parse } from '../protocol/address.ts';`],
    ['protocol/control.ts', `import { createHmac } from 'node:crypto';`],
    ['router/main.ts', `import { openNft } from '../kernel/nft.ts';\nconst env = process.env;`],
  ])('%s may contain %s', (file, text) => {
    expect(violations(file, text)).toEqual([]);
  });
});
