/** What interfaces, rules and WireGuard do: the same cases for real ones and for the fake, so that the fake can be believed. */
import { afterEach, beforeEach, expect, it } from 'vitest';
import type { Links, RouteInfo } from '../../appliance/kernel/links.ts';
import type { Wireguard } from '../../appliance/kernel/wireguard.ts';
import {
  type Address,
  formatAddress,
  formatPrefix,
  parseAddress,
  parseEndpoint,
  parsePrefix,
} from '../../appliance/protocol/address.ts';

export type TunnelBench = { readonly links: Links; readonly wireguard: Wireguard };

const must = <T>(value: T | null | undefined): T => {
  if (value === null || value === undefined) throw new Error('nothing there');
  return value;
};
const address = (text: string): Address => must(parseAddress(text));
const prefixes = (...texts: string[]) => texts.map((text) => must(parsePrefix(text)));

/** `name` is free, on the whole host. */
export function tunnelCases(name: string, open: () => Promise<TunnelBench>): void {
  let bench: TunnelBench;
  beforeEach(async () => {
    bench = await open();
  });
  afterEach(async () => {
    await bench.wireguard.remove(name);
    for (const { own } of await bench.links.rules()) if (own) await bench.links.removeRule(own);
    bench.wireguard.close();
    bench.links.close();
  });
  const index = async (): Promise<number> => must((await bench.links.links()).find((link) => link.name === name)).index;
  const state = async () => must(await bench.wireguard.read(name));

  it('a new interface has neither key nor peers, and there is one of a name', async () => {
    expect(await bench.wireguard.read(name)).toBeNull();
    await bench.wireguard.create(name);
    expect(await state()).toMatchObject({ keys: null, peers: [] });
    await expect(bench.wireguard.create(name)).rejects.toMatchObject({ kind: 'exists' });
  });

  it('keeps its keys, its port and its peers', async () => {
    const { wireguard } = bench;
    const [own, other] = [wireguard.newKeys(), wireguard.newKeys()];
    expect(Buffer.from(own.publicKey).equals(other.publicKey)).toBe(false);
    await wireguard.create(name);
    const allowed = prefixes('10.215.7.1/32', 'fd0d:e70::7:1/128');
    const endpoint = must(parseEndpoint('192.0.2.1:51820'));
    await wireguard.change(name, {
      privateKey: own.privateKey,
      port: 45_821,
      peers: [{ publicKey: other.publicKey, allowed, endpoint }],
    });
    const { keys, port, peers } = await state();
    expect({ keys, port }).toEqual({ keys: own, port: 45_821 });
    expect(peers).toHaveLength(1);
    expect(peers[0]).toMatchObject({ publicKey: other.publicKey, endpoint, handshakeAt: null });
    expect(peers[0]?.allowed.map(formatPrefix).toSorted()).toEqual(allowed.map(formatPrefix).toSorted());
  });

  it('replaces what may come from a peer, and keeps its endpoint when none is said', async () => {
    const { wireguard } = bench;
    const { publicKey } = wireguard.newKeys();
    const endpoint = must(parseEndpoint('[2001:db8::1]:51820'));
    await wireguard.create(name);
    await wireguard.change(name, { peers: [{ publicKey, allowed: prefixes('10.215.7.1/32'), endpoint }] });
    await wireguard.change(name, { peers: [{ publicKey, allowed: prefixes('0.0.0.0/0', '::/0') }] });
    const [peer] = (await state()).peers;
    expect(peer?.allowed.map(formatPrefix).toSorted()).toEqual(['0.0.0.0/0', '::/0']);
    expect(peer?.endpoint).toEqual(endpoint);
  });

  it('a prefix belongs to the peer that named it last', async () => {
    const { wireguard } = bench;
    const [one, two] = [wireguard.newKeys().publicKey, wireguard.newKeys().publicKey];
    await wireguard.create(name);
    for (const publicKey of [one, two])
      await wireguard.change(name, { peers: [{ publicKey, allowed: prefixes('10.215.7.1/32') }] });
    const { peers } = await state();
    const held = peers.map(({ publicKey, allowed }) => [Buffer.from(publicKey).equals(two), allowed.length]);
    expect(held.toSorted()).toEqual([
      [false, 0],
      [true, 1],
    ]);
  });

  it('holds many peers and lets go of them, also of one that it never had', async () => {
    const { wireguard } = bench;
    await wireguard.create(name);
    const keys = Array.from({ length: 300 }, () => wireguard.newKeys().publicKey);
    const peers = keys.map((publicKey, n) => ({
      publicKey,
      allowed: prefixes(`10.215.${n >> 8}.${n & 255}/32`, `fd0d:e70::${n.toString(16)}/128`),
    }));
    await wireguard.change(name, { peers });
    const found = await state();
    expect(found.peers).toHaveLength(300);
    expect(found.peers.every(({ allowed }) => allowed.length === 2)).toBe(true);
    await wireguard.change(name, {
      peers: [...keys.slice(1), wireguard.newKeys().publicKey].map((publicKey) => ({ publicKey, remove: true })),
    });
    expect((await state()).peers.map(({ publicKey }) => publicKey)).toEqual(keys.slice(0, 1));
  });

  it('goes with its addresses and routes; what is not there is no failure', async () => {
    const { links, wireguard } = bench;
    await wireguard.create(name);
    const at = await index();
    await links.raise(at, 1280);
    const [v4, v6] = [address('10.215.7.1'), address('fd0d:e70::7:1')];
    await links.assign(at, v4, 32, true);
    await links.assign(at, v6, 128, true);
    await expect(links.assign(at, v4, 32, true)).rejects.toMatchObject({ code: 'EEXIST' });
    await links.addDefault(45_700, at, 4);
    await links.addDefault(45_700, at, 6);
    expect((await links.links()).find((link) => link.name === name)).toMatchObject({ mtu: 1280 });
    const ours = async (): Promise<string[]> => {
      const found: string[] = [];
      await links.routes(({ to, table, index: by }: RouteInfo) => {
        // Multicast of IPv6 is the kernel's own affair.
        if (by === at && !formatPrefix(to).startsWith('ff')) found.push(`${formatPrefix(to)} in ${table}`);
      });
      return found.toSorted();
    };
    // IPv6 takes an address into use from a work queue of its own.
    await expect
      .poll(ours)
      .toEqual(['0.0.0.0/0 in 45700', '10.215.7.1/32 in 255', '::/0 in 45700', 'fd0d:e70::7:1/128 in 255']);
    await links.withdraw(at, v4, 32);
    await links.withdraw(at, v4, 32);
    // With an interface's last address of IPv4 go all its routes, of IPv6 none.
    expect(await ours()).toEqual(['::/0 in 45700', 'fd0d:e70::7:1/128 in 255']);
    await wireguard.remove(name);
    await wireguard.remove(name);
    expect(await ours()).toEqual([]);
    await expect(wireguard.change(name, { port: 1 })).rejects.toMatchObject({ kind: 'failed' });
  });

  it('is ready when it has been made: what is set at once stays', async () => {
    const { links, wireguard } = bench;
    for (let round = 0; round < 10; round++) {
      await wireguard.create(name);
      await links.raise(await index(), 1280);
      // Whatever was still to be set up is done when keys are in place.
      await wireguard.change(name, { port: 45_701 });
      expect((await links.links()).find((link) => link.name === name)).toMatchObject({ mtu: 1280 });
      await wireguard.remove(name);
    }
  });

  it('knows its rules from those of others', async () => {
    const { links } = bench;
    const before = await links.rules();
    expect(before.filter(({ own }) => own !== null)).toEqual([]);
    const rules = ['10.215.7.1', 'fd0d:e70::7:1'].map((from) => ({
      from: address(from),
      table: 45_700,
      priority: 4_570,
    }));
    for (const rule of rules) await links.addRule(rule);
    await expect(links.addRule(must(rules[0]))).rejects.toMatchObject({ code: 'EEXIST' });
    const found = (await links.rules()).flatMap(({ own }) => (own ? [own] : []));
    const texts = found.map(({ from, table, priority }) => `${formatAddress(from)} ${table} ${priority}`);
    expect(texts.toSorted()).toEqual(['10.215.7.1 45700 4570', 'fd0d:e70::7:1 45700 4570']);
    for (const rule of [...rules, ...rules]) await links.removeRule(rule);
    expect(await links.rules()).toEqual(before);
  });
}
