import { type Address, contains, parsePrefix, sameAddress } from '../protocol/address.ts';
import { matchesGlob } from '../protocol/names.ts';
import type { Link } from './state.ts';

/** Which of this host's interfaces to use (DETOUR_INTERFACES, DETOUR_INTERFACES_EXCLUDE). Pure. */

/** Globs of names. Without any to include, the interfaces of the default routes are meant. */
export type InterfaceChoice = { readonly include: readonly string[]; readonly exclude: readonly string[] };

/** An address of an interface, as the kernel port gives it. */
export type Held = {
  readonly address: Address;
  readonly interface: string;
  readonly index: number;
  /** RFC 4862: still good for what runs, not to be used for anything new. */
  readonly deprecated: boolean;
};

/** Where packets go that no other route is for; the lowest metric wins. */
export type DefaultRoute = { readonly family: 4 | 6; readonly index: number; readonly metric: number };

/** Every detour is asked over each of them, every 25 s: more interfaces than a host has ways out are a mistake of the globs. */
const MOST_LINKS = 8;

const UNIQUE_LOCAL = parsePrefix('fc00::/7');

/**
 * The chosen interfaces, each with one address a family: the one it had, while it still has it. One that lost its
 * addresses stays, with those it had, so that what is known of it is not forgotten each time it flaps.
 */
export function chooseLinks(
  { include, exclude }: InterfaceChoice,
  held: readonly Held[],
  defaults: readonly DefaultRoute[],
  before: readonly Link[],
): Link[] {
  const wanted = (name: string, index: number): boolean =>
    (include.length === 0
      ? defaults.some((route) => route.index === index)
      : include.some((glob) => matchesGlob(glob, name))) && !exclude.some((glob) => matchesGlob(glob, name));
  const natural = (family: 4 | 6): number | undefined =>
    defaults.filter((route) => route.family === family).sort((a, b) => a.metric - b.metric)[0]?.index;
  const first = { 4: natural(4), 6: natural(6) };
  const links = new Map(before.map((link) => [link.name, { ...link, natural4: false, natural6: false }]));
  for (const { interface: name, index } of held) {
    if (!wanted(name, index) || (!links.has(name) && links.size >= MOST_LINKS)) continue;
    const known = links.get(name);
    const own = held.filter((one) => one.index === index);
    links.set(name, {
      name,
      index,
      v4: best(own, 4, known?.v4 ?? null),
      v6: best(own, 6, known?.v6 ?? null),
      natural4: first[4] === index,
      natural6: first[6] === index,
    });
  }
  return [...links.values()];
}

function best(held: readonly Held[], family: 4 | 6, before: Address | null): Address | null {
  const own = held.filter(({ address }) => address.family === family);
  const fresh = own.filter(({ deprecated }) => !deprecated);
  if (before && own.some(({ address }) => sameAddress(address, before))) return before;
  const wide = fresh.find(({ address }) => UNIQUE_LOCAL === null || !contains(UNIQUE_LOCAL, address));
  return (wide ?? fresh[0] ?? own[0])?.address ?? before;
}
