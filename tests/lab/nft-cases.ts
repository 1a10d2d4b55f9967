/** What our texts rely on in nftables: the same cases for the real one and for tests/fakes/nft.ts. */
import { expect, it } from 'vitest';
import type { Nft, NftFailure } from '../../appliance/kernel/nft.ts';
import { type Address, formatAddress, parseAddress, parsePrefix } from '../../appliance/protocol/address.ts';
import { type Lease, MAP_SIZE, type Write } from '../../appliance/router/leases.ts';
import {
  AddressBook,
  CAPABILITY_SET,
  chainNames,
  type Element,
  FLUSH_TUNNELS,
  type Foreign,
  LIST_CHAINS,
  LIST_MEMORY,
  LIST_RULES,
  leaseMap,
  REMOVE_TABLE,
  type RulesetConfig,
  readElement,
  readFacts,
  readNames,
  readTunnelElement,
  renderCreation,
  renderForeignRemoval,
  renderMemory,
  renderStatic,
  renderTunnel,
  renderTunnelRemoval,
  renderWrite,
  TO_OPTION,
  tunnelSet,
} from '../../appliance/router/ruleset.ts';
import type { Tunnel } from '../../appliance/router/tunnels.ts';

function address(text: string): Address {
  const parsed = parseAddress(text);
  if (!parsed) throw new Error(`no address: ${text}`);
  return parsed;
}

export function config(over: Partial<RulesetConfig> = {}): RulesetConfig {
  const open = parsePrefix('10.0.0.0/8');
  if (!open) throw new Error('no prefix');
  return {
    listen: { address: address('::'), port: 45672 },
    ports: { first: 20000, last: 29999 },
    keyIds: [0x1a2b3c4d, 0x00000001],
    relay: 'join',
    legacyV1: false,
    fwmark: { mark: 0xd7000000, mask: 0xff000000 },
    rules: {
      allow: [
        {
          prefix: open,
          ports: [
            { first: 443, last: 443 },
            { first: 8000, last: 8999 },
          ],
        },
      ],
      deny: [],
      own: [
        { address: address('10.1.2.3'), length: 24 },
        { address: address('10.1.2.4'), length: 24 },
        { address: address('fd00::3'), length: 64 },
      ],
    },
    timeouts: true,
    vpn: null,
    inband: false,
    announce: [],
    ...over,
  };
}

const lease = (client: string, port: number, server: string, over: Partial<Lease> = {}): Lease => ({
  owner: 0x1a2b3c4d,
  client: address(client),
  port,
  destination: { address: address(server), port: 443 },
  expires: 0,
  ...over,
});

/**
 * Declares the cases. `open` hands over an nftables without our table; `elapse` lets that much time pass for it, ms.
 */
export function nftCases(open: () => Promise<{ nft: Nft; elapse: (ms: number) => Promise<void> }>): void {
  const lines = async (nft: Nft, args: readonly string[]): Promise<string[] | NftFailure> => {
    const found: string[] = [];
    return (await nft.list(args, (line) => found.push(line))) ?? found;
  };
  const dumped = async (nft: Nft, family: 4 | 6): Promise<(Element | Foreign)[]> => {
    const { table, map } = leaseMap(family);
    const found: (Element | Foreign)[] = [];
    const known = new AddressBook();
    const failure = await nft.dump(table, map, (element) => found.push(readElement(family, element, known)));
    if (failure) throw new Error(failure.message);
    return found;
  };
  const elements = async (nft: Nft, family: 4 | 6): Promise<Element[]> =>
    (await dumped(nft, family)).filter((one) => 'owner' in one);
  const write = (
    nft: Nft,
    kind: Write['kind'],
    one: Lease,
    lifetime: number,
    refreshes = false,
  ): Promise<NftFailure | null> => nft.run(renderWrite({ kind, lease: one, lifetime }, refreshes));
  const installed = async (): Promise<{ nft: Nft; elapse: (ms: number) => Promise<void> }> => {
    const opened = await open();
    expect(await opened.nft.run(renderStatic(config(), null))).toBeNull();
    return opened;
  };

  it.each(['join', 'mptcp', 'tcp'] as const)(
    'installs the rules for %s, and again, to the same effect',
    async (relay) => {
      const { nft } = await open();
      expect(await lines(nft, LIST_RULES)).toMatchObject({ kind: 'absent' });
      const wanted = config({
        relay,
        legacyV1: relay === 'join',
        vpn: relay === 'mptcp' ? null : 'detour-vpn',
        inband: relay !== 'tcp',
        announce: relay === 'mptcp' ? [] : [443, 8443].map((port) => ({ first: port, last: port + 1 })),
      });
      expect(await nft.run(renderStatic(wanted, null))).toBeNull();
      const first = await lines(nft, LIST_RULES);
      if ('kind' in first) throw new Error(first.message);
      const names = readNames(first);
      const chains = await lines(nft, LIST_CHAINS);
      if ('kind' in chains) throw new Error(chains.message);
      expect(readNames(chains).chains.toSorted()).toEqual(chainNames(wanted).toSorted());
      expect(names.chains.toSorted()).toEqual(chainNames(wanted).toSorted());
      expect(names.sets).toEqual(expect.arrayContaining(['memory', 'control4', 'syn6']));
      expect(await nft.run(renderStatic(wanted, names))).toBeNull();
      expect(((await lines(nft, LIST_RULES)) as string[]).toSorted()).toEqual(first.toSorted());
    },
  );

  it('translates to what a TCP option says, and goes on doing so while the rules are replaced', async () => {
    const { nft } = await open();
    const { table } = CAPABILITY_SET;
    const translate = (): Promise<NftFailure | null> => nft.translateToOption(table, TO_OPTION.chain, TO_OPTION.target);
    expect(await translate()).toMatchObject({ kind: 'absent' });
    const wanted = config({ inband: true });
    expect(await nft.run(renderStatic(wanted, null))).toBeNull();
    expect(await translate()).toBeNull();
    expect(await translate()).toBeNull();
    const rule = /dnat ip to tcp option @253/g;
    const first = await lines(nft, LIST_RULES);
    if ('kind' in first) throw new Error(first.message);
    expect(first.join('\n').match(rule)).toHaveLength(1);
    expect(await nft.run(renderStatic(wanted, readNames(first)))).toBeNull();
    const second = await lines(nft, LIST_RULES);
    if ('kind' in second) throw new Error(second.message);
    expect(second.join('\n').match(rule)).toHaveLength(1);
    // Without in-band transit it goes like the other rules.
    expect(await nft.run(renderStatic(config(), readNames(second)))).toBeNull();
    expect(((await lines(nft, LIST_RULES)) as string[]).join('\n')).not.toMatch(rule);
  });

  it('replaces the rules of an older version and keeps leases and memory', async () => {
    const { nft } = await open();
    const older = config({
      relay: 'tcp',
      ports: { first: 30000, last: 30009 },
      listen: { address: address('10.1.2.3'), port: 999 },
    });
    expect(await nft.run(renderStatic(older, null))).toBeNull();
    expect(
      await nft.run(
        'add chain inet detour forgotten\nadd rule inet detour forgotten accept\nadd set inet detour old { type inet_service; }\n',
      ),
    ).toBeNull();
    expect(await nft.run(renderMemory(['epoch=00112233']))).toBeNull();
    expect(await write(nft, 'add', lease('10.0.0.1', 20000, '192.0.2.1'), 600)).toBeNull();
    const present = await lines(nft, LIST_RULES);
    if ('kind' in present) throw new Error(present.message);
    expect(await nft.run(renderStatic(config(), readNames(present)))).toBeNull();
    const text = ((await lines(nft, LIST_RULES)) as string[]).join('\n');
    expect(text).not.toMatch(/forgotten|set old|30000|udp dport 999/);
    expect(await elements(nft, 4)).toHaveLength(1);
    expect(((await lines(nft, LIST_MEMORY)) as string[]).flatMap(readFacts)).toEqual(['epoch=00112233']);
  });

  it('holds leases of both families, and tells owner, place and time', async () => {
    const { nft } = await installed();
    const all = [
      lease('10.0.0.1', 20000, '192.0.2.1'),
      lease('10.0.0.1', 29999, '255.255.255.255', { owner: 'v1' }),
      lease('2001:db8::1', 20000, '2001:db8::', { owner: 0 }),
      lease('2001:db8:1:2:3:4:5:6', 20001, 'fd00::ffff', { owner: 0xffffffff }),
    ];
    for (const one of all) expect(await write(nft, 'add', one, 600)).toBeNull();
    const found = [...(await elements(nft, 4)), ...(await elements(nft, 6))];
    const bare = ({ owner, client, port, destination }: Lease | Element) => ({ owner, client, port, destination });
    const order = (a: { port: number; owner: unknown }, b: { port: number; owner: unknown }): number =>
      a.port - b.port || String(a.owner).localeCompare(String(b.owner));
    expect(found.map(bare).sort(order)).toEqual(all.map(bare).sort(order));
    for (const { remaining } of found) {
      expect(remaining).toBeGreaterThan(595);
      expect(remaining).toBeLessThanOrEqual(605);
    }
    for (const one of all) expect(await nft.run(renderCreation(one, 60))).toMatchObject({ kind: 'exists' });
    expect(await nft.run(renderCreation(lease('10.0.0.2', 20000, '192.0.2.1'), 60))).toBeNull();
    expect(await elements(nft, 4)).toHaveLength(3);
  });

  it('hands over each of many elements once, over several messages', async () => {
    const { nft } = await installed();
    const at = (n: number): string => `10.0.${n >> 8}.${n & 255}`;
    const texts = Array.from({ length: 5_000 }, (_, n) =>
      renderWrite({ kind: 'add', lease: lease(at(n), 20000, '192.0.2.1'), lifetime: 600 }, false),
    );
    expect(await nft.run(texts.join(''))).toBeNull();
    const found = (await elements(nft, 4)).map(({ client }) => Number(client.value & 0xffffn));
    expect(found.sort((a, b) => a - b)).toEqual(texts.map((_, n) => n));
  });

  it('tells what nobody of ours put there, in words that remove it', async () => {
    const { nft } = await installed();
    expect(
      await nft.run(
        'add element inet detour leases4 { 10.0.0.1 . 20000 : 192.0.2.1 . 443 }\n' +
          'add element inet detour leases4 { 10.0.0.2 . 20001 timeout 600s comment "hello" : 192.0.2.1 . 443 }\n' +
          'add element inet detour leases6 { 2001:db8::1 . 29999 timeout 600s : 2001:db8:: . 443 }\n' +
          // IPv4 in disguise: for us it would be a client of the other map.
          'add element inet detour leases6 { ::ffff:10.0.0.1 . 20000 timeout 600s comment "k1a2b3c4d" : 2001:db8:: . 443 }\n',
      ),
    ).toBeNull();
    expect(await write(nft, 'add', lease('10.0.0.3', 20000, '192.0.2.1'), 600)).toBeNull();
    const foreign = [...(await dumped(nft, 4)), ...(await dumped(nft, 6))].filter((one) => 'key' in one);
    expect(foreign).toHaveLength(4);
    expect(await nft.run(renderForeignRemoval(foreign))).toBeNull();
    expect(await dumped(nft, 4)).toHaveLength(1);
    expect(await dumped(nft, 6)).toEqual([]);
  });

  it('lets a lease go when its time is over', async () => {
    const { nft, elapse } = await installed();
    expect(
      await nft.run(
        'add element inet detour leases4 { 10.0.0.1 . 20000 timeout 1s comment "k1a2b3c4d" : 192.0.2.1 . 443 }\n',
      ),
    ).toBeNull();
    expect(await elements(nft, 4)).toHaveLength(1);
    await elapse(1_100);
    expect(await elements(nft, 4)).toEqual([]);
  });

  it.each([false, true])('renews a lease, also one that has just expired (by adding again: %s)', async (refreshes) => {
    const { nft } = await installed();
    const one = lease('10.0.0.1', 20000, '192.0.2.1');
    expect(await write(nft, 'add', one, 60)).toBeNull();
    expect(await write(nft, 'renew', one, 3600, refreshes)).toBeNull();
    expect((await elements(nft, 4))[0]?.remaining).toBeGreaterThan(3600);
    expect(await write(nft, 'remove', one, 0)).toBeNull();
    expect(await write(nft, 'renew', one, 600, refreshes)).toBeNull();
    expect((await elements(nft, 4))[0]?.remaining).toBeGreaterThan(600);
  });

  it('removes a lease, and does not mind one that is gone', async () => {
    const { nft } = await installed();
    const one = lease('10.0.0.1', 20000, '192.0.2.1');
    expect(await write(nft, 'add', one, 60)).toBeNull();
    expect(await write(nft, 'remove', one, 0)).toBeNull();
    expect(await write(nft, 'remove', one, 0)).toBeNull();
    expect(await elements(nft, 4)).toEqual([]);
  });

  it('does all of a transaction or nothing', async () => {
    const { nft } = await installed();
    const held = lease('10.0.0.1', 20000, '192.0.2.1');
    const other = lease('10.0.0.1', 20000, '192.0.2.2');
    const fine = lease('10.0.0.1', 20001, '192.0.2.2');
    expect(await write(nft, 'add', held, 60)).toBeNull();
    const text = (...all: Lease[]): string =>
      all.map((one) => renderWrite({ kind: 'add', lease: one, lifetime: 60 }, false)).join('');
    expect(await nft.run(text(fine, other))).toMatchObject({ kind: 'exists' });
    expect((await elements(nft, 4)).map(({ port }) => port)).toEqual([20000]);
    expect(await nft.run(`${text(fine)}delete element inet detour leases4 { 10.9.9.9 . 20000 }\n`)).toMatchObject({
      kind: 'absent',
    });
    expect(await nft.run(`${text(fine)}this is no command\n`)).toMatchObject({ kind: 'rejected' });
    expect(await elements(nft, 4)).toHaveLength(1);
  });

  it('lets the addresses of tunnels through for as long as it is told, and tells whose they are', async () => {
    const { nft, elapse } = await open();
    expect(await nft.run(renderStatic(config({ vpn: 'detour-vpn' }), null))).toBeNull();
    const tunnel = (v4: string | null, v6: string | null, over: Partial<Tunnel> = {}): Tunnel => ({
      owner: 0x1a2b3c4d,
      publicKey: new Uint8Array(32).fill(7),
      v4: v4 === null ? null : address(v4),
      v6: v6 === null ? null : address(v6),
      choice: 0,
      since: 0,
      expires: 0,
      ...over,
    });
    const held = async (): Promise<string[]> => {
      const found: string[] = [];
      for (const family of [4, 6] as const) {
        const { table, map } = tunnelSet(family);
        const failure = await nft.dump(table, map, (element) => {
          const one = readTunnelElement(family, element);
          const seconds = one && (one.remaining > 600 ? 'long' : one.remaining > 60 ? 'middle' : 'short');
          found.push(
            one ? `${formatAddress(one.address)} ${one.owner.toString(16)} ${one.choice} ${seconds}` : 'foreign',
          );
        });
        if (failure) throw new Error(failure.message);
      }
      return found.toSorted();
    };
    const first = tunnel('10.215.7.1', 'fd0d:e70::7:1');
    const only = tunnel(null, 'fd0d:e70::7:2', { owner: 0, choice: 7 });
    expect(await nft.run(renderTunnel(first, 600, null))).toBeNull();
    expect(await nft.run(renderTunnel(only, 60, null))).toBeNull();
    expect(await held()).toEqual([
      '10.215.7.1 1a2b3c4d 0 long',
      'fd0d:e70::7:1 1a2b3c4d 0 long',
      'fd0d:e70::7:2 0 7 middle',
    ]);
    const moved = tunnel('198.19.7.1', 'fd0d:e70::7:3', { choice: 1 });
    expect(await nft.run(renderTunnel(moved, 600, first))).toBeNull();
    expect(await nft.run(renderTunnel(only, 600, null))).toBeNull();
    expect(await nft.run('add element inet detour tunnels4 { 10.215.0.9 timeout 60s }\n')).toBeNull();
    expect(await held()).toEqual([
      '198.19.7.1 1a2b3c4d 1 long',
      'fd0d:e70::7:2 0 7 long',
      'fd0d:e70::7:3 1a2b3c4d 1 long',
      'foreign',
    ]);
    expect(await nft.run(renderTunnelRemoval(moved))).toBeNull();
    expect(await nft.run(renderTunnelRemoval(moved))).toBeNull();
    expect(await nft.run(renderTunnel(only, 1, null))).toBeNull();
    await elapse(7_000);
    expect(await held()).toEqual(['foreign']);
    expect(await nft.run(FLUSH_TUNNELS)).toBeNull();
    expect(await held()).toEqual([]);
  });

  it('says that a map is full, and that a table is not there', async () => {
    const { nft } = await installed();
    const at = (n: number): string => `10.${n >> 16}.${(n >> 8) & 255}.${n & 255}`;
    for (let from = 0; from < MAP_SIZE; from += 16_384) {
      const chunk = Array.from({ length: 16_384 }, (_, n) =>
        renderWrite({ kind: 'add', lease: lease(at(from + n), 20000, '192.0.2.1'), lifetime: 600 }, false),
      );
      expect(await nft.run(chunk.join(''))).toBeNull();
    }
    expect(await write(nft, 'add', lease('11.0.0.1', 20000, '192.0.2.1'), 600)).toMatchObject({ kind: 'full' });
    expect(await nft.run(REMOVE_TABLE)).toBeNull();
    expect(await nft.run(REMOVE_TABLE)).toBeNull();
    expect(await write(nft, 'add', lease('11.0.0.1', 20000, '192.0.2.1'), 600)).toMatchObject({ kind: 'absent' });
    expect(await nft.dump('detour', 'leases4', () => undefined)).toMatchObject({ kind: 'absent' });
  });

  it('remembers facts in their order, and replaces them', async () => {
    const { nft } = await open();
    const facts = ['epoch=0123456789abcdef', 'net.ipv4.ip_forward=0', 'net.ipv6.conf.eth0/100.accept_ra=1'];
    expect(await nft.run(renderMemory(facts))).toBeNull();
    expect(((await lines(nft, LIST_MEMORY)) as string[]).flatMap(readFacts).toSorted()).toEqual(facts.toSorted());
    expect(await nft.run(renderMemory(['epoch=1']))).toBeNull();
    expect(((await lines(nft, LIST_MEMORY)) as string[]).flatMap(readFacts)).toEqual(['epoch=1']);
    expect(() => renderMemory(['a=" }; flush ruleset'])).toThrow(/cannot be remembered/);
  });
}
