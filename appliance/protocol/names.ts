/** Hosts and detours as people write them: in settings, in files, in lists on the web. */
import { parseAddress } from './address.ts';

/** A host, by name or by literal address without brackets, and a port from 1 to 65535. */
export type HostPort = { readonly host: string; readonly port: number };

/** A detour that somebody named. */
export type NamedDetour = HostPort & { readonly name: string };

/** A port from 1 to 65535, or null. */
export function parsePort(text: string): number | null {
  const value = /^[1-9]\d{0,4}$/.test(text) ? Number(text) : 0;
  return value >= 1 && value <= 65535 ? value : null;
}

/** A host name (RFC 1123 2.1) or a literal address without brackets. */
export function isHost(text: string): boolean {
  if (parseAddress(text)) return true;
  // All digits and dots, and still no address: a mistyped one, not a name.
  if (/^[\d.]+$/.test(text) || text.length > 253) return false;
  return text.split('.').every((part) => /^(?!-)[a-z0-9-]{1,63}(?<!-)$/i.test(part));
}

/** The name of a DNS service record: `_service._udp.example.org` (RFC 2782), where labels may begin with an underscore. */
export function isServiceName(text: string): boolean {
  if (text.length > 253 || /^[\d.]+$/.test(text)) return false;
  const labels = text.split('.');
  return labels.length > 1 && labels.every((part) => /^_?(?!-)[a-z0-9-]{1,62}(?<!-)$/i.test(part));
}

/** What a detour may be called: 1 to 63 letters, digits and `. _ -`. */
export const isDetourName = (text: string): boolean => /^[a-z0-9][a-z0-9._-]{0,62}$/i.test(text);

/** Reads `host:port` or `[v6]:port`; null when it is not one. */
export function parseHostPort(text: string): HostPort | null {
  const [, v6, plain, digits = ''] = /^(?:\[([^\]]+)\]|([^:[\]]+)):(\d{1,5})$/.exec(text) ?? [];
  const host = v6 ?? plain;
  const port = parsePort(digits);
  if (host === undefined || port === null || !isHost(host) || (v6 !== undefined && !v6.includes(':'))) return null;
  return { host, port };
}

/** Reads `name=host:port`; null when it is not one. */
export function parseNamedDetour(text: string): NamedDetour | null {
  const at = text.indexOf('=');
  const name = text.slice(0, Math.max(0, at));
  const address = isDetourName(name) ? parseHostPort(text.slice(at + 1)) : null;
  return address && { name, ...address };
}

/** Whether a name is one that a glob means: `*` is any text, `?` any one character. Both are short, as names of interfaces are. */
export function matchesGlob(glob: string, name: string): boolean {
  const pieces = [...glob.replace(/\*+/g, '*')].map((letter) => {
    if (letter === '*') return '.*';
    return letter === '?' ? '.' : letter.replace(/[\^$.*+?()[\]{}|/-]/, '\\$&');
  });
  return new RegExp(`^${pieces.join('')}$`, 's').test(name);
}
