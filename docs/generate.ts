/** Writes what is generated: docs/configuration.md and the table in README.md. `node docs/generate.ts`; a unit test compares. */
import { readFileSync, writeFileSync } from 'node:fs';
import { describeVariables, type VariableDoc } from '../appliance/variables.ts';

export const README = new URL('../README.md', import.meta.url);
export const CONFIGURATION = new URL('./configuration.md', import.meta.url);

const BEGIN = '<!-- begin: settings, made by `node docs/generate.ts` -->';
const END = '<!-- end: settings -->';

const cell = (text: string): string => text.replaceAll('|', '\\|');
const code = (text: string): string => (text === '' ? '' : `\`${text}\``);

const defaultCell = ({ default: value }: VariableDoc): string =>
  value === 'required'
    ? '**required**'
    : value === ''
      ? '(none)'
      : value.includes(' (')
        ? value.replace(/(\S+) \(/g, '`$1` (')
        : code(value);

function rows(header: readonly string[], body: readonly (readonly string[])[]): string {
  const line = (cells: readonly string[]): string => `| ${cells.map(cell).join(' | ')} |`;
  return [line(header), line(header.map(() => '---')), ...body.map(line)].join('\n');
}

const SOURCES = `## Sources of detours

\`DETOUR_DETOURS\` takes several sources at once, by comma:

| Source | Gives | Asked again |
| --- | --- | --- |
| \`name=host:port\`, \`name=[v6]:port\` | one detour; all addresses of the host are ways to the same machine | names every minute |
| \`dns:NAME[:port]\` | every A and AAAA address of the name is a detour of its own; port 45672 unless said | every minute |
| \`srv:NAME\` | service records (RFC 2782), for example \`srv:_detour._udp.example.org\` | every minute |
| \`file:PATH\` | a list in a file, with an absolute path | when it changes, and every 15 s in case nobody tells |
| \`https://...\`, \`http://...\` | a list on a web server | every minute, with ETag and Last-Modified |

A list is YAML or JSON, or a text with one \`name=host:port\` a line (\`#\` begins a comment line):

\`\`\`yaml
detours:
  - name: fra
    address: 192.0.2.10:45672
  - name: fra                       # the same machine, by IPv6
    address: "[2001:db8::10]:45672" # YAML needs the quotes here
\`\`\`

- **Changes count at once, without a restart.** New detours are tried. Detours that vanished get no new paths, and paths that run through
  them live on until they end.
- **A source that fails keeps what it gave last** and is tried again after 5 s, then less and less often, up to every minute (names out of
  lists, and lists with times of their own: every ten minutes). The log says so once;
  \`detour status\` shows every source with what is wrong with it, and so does the metric \`detour_client_source_up\`.
- **One bad entry costs that entry only**, and is named by its line or place. A text that is neither JSON nor YAML, or empty, changes nothing; a
  list that really has no detours is written \`detours: []\`.
- **Bounds.** 64 detours of one source and 256 in all; the first ones count, and \`detour status\` says how many were left out. A list may have 1 MB, as YAML 512 kB
  in a file and 64 kB on the web.
- **What a source may not say.** An address that is loopback, link-local, multicast or otherwise no unicast address of another machine is refused, unless you
  wrote the address itself in \`DETOUR_DETOURS\` or in a file. Private addresses are accepted from everywhere: that is where detours of a cluster or a company are, and a
  lying source gains nothing by them but a few datagrams of 96 bytes, which mean nothing to any other service. Nor can a lying source give you a
  detour that works: a detour has to know your key.
- **Service records.** A record with a higher priority number is used only while no detour of the same source with a lower one is up; paths
  that exist stay when one comes back. Different weights
  within one priority decide in which order detours are tried, in proportion, per client; equal weights leave it to measurement.
- **Files.** Mount the folder, not the single file: editors and ConfigMaps replace a file by another one, which a mount of the old one never shows.
- **URLs.** User and password (\`https://user:password@...\`) are sent to that server only, and neither they nor what follows a \`?\` appear in the log. At most three redirects, to https or to the same host.
  A server needs to answer within 10 s. To ask at times of your choice instead of every minute (a metered link, a server that counts), put them behind the URL in the
  five fields of cron, joined by underscores: \`https://example.org/detours.json#at=0_3_*_*_*\` asks at 3 o'clock, local time, and once at the start. A comma is written \`%2C\`.
`;

/** The whole of docs/configuration.md. */
export function configuration(): string {
  const table = (variables: readonly VariableDoc[]): string =>
    rows(
      ['Variable', 'Router', 'Client', 'Default', 'Meaning', 'Example'],
      variables.map((variable) => [
        code(variable.name),
        variable.roles.includes('router') ? 'x' : '',
        variable.roles.includes('client') ? 'x' : '',
        defaultCell(variable),
        variable.meaning,
        code(variable.example),
      ]),
    );
  const variables = describeVariables();
  return `# Configuration

<!-- Made by \`node docs/generate.ts\` out of appliance/variables.ts: change it there. -->

Everything is set by environment variables. The same rules hold for all of them:

- **Files.** Each variable \`DETOUR_X\` can be given as \`DETOUR_X_FILE\`, the path of a file that holds the value; one newline at its end
  is ignored. Setting both is an error. A file \`/run/secrets/detour_x\` (the name in small letters), as Docker mounts secrets, is found
  without any variable; the variable or its \`_FILE\` wins over it.
- **Empty** means not set.
- **Lists** are separated by commas; keys also by newlines, and a file of keys may have empty lines and lines that begin with \`#\`.
- **Durations** are a number and a unit: \`500ms\`, \`30s\`, \`10m\`, \`1h\`. **Switches** are \`on\` or \`off\` (also \`true\`, \`false\`, \`yes\`, \`no\`, \`1\`, \`0\`).
- **Destinations** are \`CIDR[:ports]\`: \`10.0.0.0/8\`, \`192.0.2.1:443\`, \`198.51.100.0/24:8000-8999\`, \`[2001:db8::]/32:443\`.
- **Mistakes** are all reported at once, one line each, with exit code 78; \`detour config check\` does the same without starting anything.
  A \`DETOUR_\` variable that does not exist is a mistake too, and so is one of the other role.
- **Secrets** are never shown: \`detour config print\`, the log and error messages show a key's id and label only. \`detour config print\`
  also says where each value came from.

${SOURCES}
A router reads its keys again on SIGHUP, from files and secrets, all or none of them, and puts back rules that somebody removed;
everything else needs a restart.

## Variables

${table(variables)}

## Exit codes

| Code | Meaning |
| --- | --- |
| 0 | fine |
| 1 | failed |
| 64 | bad usage of the command line |
| 69 | the machine lacks something: a capability, a kernel feature, a program |
| 78 | bad configuration |
`;
}

/** README.md with its table replaced. @throws Error when the markers are gone. */
export function readme(text: string): string {
  const begin = text.indexOf(BEGIN);
  const end = text.indexOf(END);
  if (begin < 0 || end < begin) throw new Error('README.md has lost the markers of its settings table');
  const table = rows(
    ['Variable', 'For', 'Default', 'Meaning'],
    describeVariables().map((variable) => [
      code(variable.name),
      variable.roles.join(', '),
      defaultCell(variable),
      variable.meaning,
    ]),
  );
  return `${text.slice(0, begin)}${BEGIN}\n\n${table}\n\n${text.slice(end)}`;
}

if (import.meta.main) {
  writeFileSync(CONFIGURATION, configuration());
  writeFileSync(README, readme(readFileSync(README, 'utf8')));
}
