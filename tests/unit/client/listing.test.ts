import { createHash } from 'node:crypto';
import { describe, expect, it, test } from 'vitest';
import {
  type DrawnRecord,
  formatOf,
  MOST_PER_SOURCE,
  readDocument,
  readLines,
  readServices,
  whyNoDetour,
} from '../../../appliance/client/listing.ts';
import { parseAddress } from '../../../appliance/protocol/address.ts';

/** Repeatable chance: numbers from 0 to below 1. */
function* draws(seed: string): Generator<number, never> {
  for (let turn = 0; ; turn++) {
    const block = createHash('sha256').update(`${seed} ${turn}`).digest();
    for (let offset = 0; offset < 32; offset += 4) yield block.readUInt32BE(offset) / 2 ** 32;
  }
}

const detour = (n: number) => ({ name: `d${n}`, address: `198.51.100.${n % 250}:${1000 + Math.floor(n / 250)}` });

function listing(document: unknown) {
  const found = readDocument(document);
  if ('unusable' in found) throw new Error(found.unusable);
  return found;
}

describe('the format', () => {
  it.each([
    ['', 'empty'],
    [' \n# only words\n\n', 'empty'],
    ['\uFEFF{"detours": []}', 'json'],
    ['# a comment\n[]', 'json'],
    ['a=b:1', 'lines'],
    ['nonsense=', 'lines'],
    ['detours:\n  - name: a=b', 'yaml'],
    ['- name: a', 'yaml'],
    ['<!DOCTYPE html>\n<html lang="en">', 'yaml'],
  ])('of %j is %s', (text, format) => {
    expect(formatOf(text)).toBe(format);
  });
});

describe('lines', () => {
  it('reads names, hosts and both families', () => {
    const text = '\uFEFF# mine\r\nfra=fra.example.org:1\r\n\r\n  ams=192.0.2.1:2  \n#old=x:1\nv6=[2001:db8::1]:3\n';
    expect(readLines(text)).toEqual({
      detours: [
        { name: 'fra', host: 'fra.example.org', port: 1 },
        { name: 'ams', host: '192.0.2.1', port: 2 },
        { name: 'v6', host: '2001:db8::1', port: 3 },
      ],
      leftOut: 0,
      complaints: [],
    });
  });

  it('names bad lines and uses the rest', () => {
    const { detours, complaints } = readLines('a=192.0.2.1:1\nb\n\nc=h:99999\nd=192.0.2.4:4');
    expect(detours.map(({ name }) => name)).toEqual(['a', 'd']);
    expect(complaints).toEqual(['line 2 is no name=host:port', 'line 4 is no name=host:port']);
  });

  it('takes the first of ten thousand and counts the others', () => {
    const text = Array.from({ length: 10_000 }, (_, n) => `d${n}=${detour(n).address}`).join('\n');
    const { detours, leftOut, complaints } = readLines(text);
    expect(detours).toHaveLength(MOST_PER_SOURCE);
    expect(leftOut).toBe(10_000 - MOST_PER_SOURCE);
    expect(complaints).toEqual([expect.stringMatching(/^9936 entries are left out/)]);
  });
});

describe('documents', () => {
  it.each([{ detours: [detour(1)], more: 'fields' }, [{ ...detour(1), note: 'x' }]])('reads %j', (document) => {
    expect(listing(document)).toEqual({
      detours: [{ name: 'd1', host: '198.51.100.1', port: 1000 }],
      leftOut: 0,
      complaints: [],
    });
  });

  it('takes an empty list for a list', () => {
    expect(listing({ detours: [] })).toEqual({ detours: [], leftOut: 0, complaints: [] });
  });

  it.each<[unknown, RegExp]>([
    [null, /no list of detours/],
    ['<html>', /no list of detours/],
    [{}, /no list "detours"/],
    [{ detour: [] }, /no list "detours"/],
    [Object.create({ detours: [] }), /no list "detours"/],
    [{ detours: {} }, /"detours" is no list/],
    [{ detours: null }, /"detours" is no list/],
  ])('refuses %j as a whole', (document, why) => {
    expect(readDocument(document)).toEqual({ unusable: expect.stringMatching(why) });
  });

  it('names what is wrong by its place and uses the rest', () => {
    const { detours, complaints } = listing([
      detour(1),
      7,
      { address: 'h:1' },
      { name: 'a b', address: 'h:1' },
      { name: 'x', address: 'h' },
      { name: 'y', address: { host: 'h' } },
      { name: 'z', address: '2001:db8::1:5' },
      detour(2),
    ]);
    expect(detours.map(({ name }) => name)).toEqual(['d1', 'd2']);
    expect(complaints).toEqual([
      'detours[1] is no {name, address}',
      expect.stringMatching(/^detours\[2\]\.name is no text/),
      expect.stringMatching(/^detours\[3\]\.name is no text/),
      'detours[4].address is no host:port or [v6]:port',
      'detours[5].address is no host:port or [v6]:port',
      '1 more entry is wrong',
    ]);
  });

  it('counts an address once, whoever claims it', () => {
    const { detours, complaints } = listing([
      detour(1),
      { ...detour(1), name: 'twin' },
      { name: 'h', address: 'Host.example:1' },
      { name: 'i', address: 'host.example:1' },
      { name: 'h', address: '[2001:db8::1]:1' },
    ]);
    expect(detours.map(({ name, host }) => `${name} ${host}`)).toEqual([
      'd1 198.51.100.1',
      'h Host.example',
      'h 2001:db8::1',
    ]);
    expect(complaints).toEqual(['2 entries are there twice']);
  });

  it('bounds a hundred thousand entries, all of them wrong, in what it says and in time', () => {
    const { detours, complaints } = listing(Array.from({ length: 100_000 }, () => ({})));
    expect(detours).toEqual([]);
    expect(complaints.join().length).toBeLessThan(600);
  });

  test('no value whatsoever makes it throw, or lets through what is no detour', () => {
    const random = draws('documents');
    const pick = <T>(...choices: readonly [T, ...T[]]): T =>
      choices[Math.floor(random.next().value * choices.length)] ?? choices[0];
    const value = (depth: number): unknown =>
      pick<() => unknown>(
        () => null,
        () => random.next().value,
        () => pick('', 'a', 'h:1', '[::1]:1', '127.0.0.1:80', 'x'.repeat(300), '\u0000', '__proto__', '1.2.3.4:0'),
        () => (depth > 0 ? Array.from({ length: 4 }, () => value(depth - 1)) : []),
        () =>
          depth > 0
            ? {
                [pick('detours', 'name', '__proto__', 'constructor')]: value(depth - 1),
                name: value(depth - 1),
                address: value(depth - 1),
              }
            : {},
        () => ({ detours: Array.from({ length: 3 }, () => ({ name: 'ok', address: pick('h:1', 'a', 'b:70000') })) }),
      )();
    let good = 0;
    for (let turn = 0; turn < 20_000; turn++) {
      const found = readDocument(value(3));
      if ('unusable' in found) continue;
      for (const { name, host, port } of found.detours) {
        good++;
        expect(name).toMatch(/^[a-z0-9][\w.-]{0,62}$/i);
        expect(host).toMatch(/^[a-z0-9.:-]+$/i);
        expect(port).toBeGreaterThan(0);
      }
    }
    expect(good).toBeGreaterThan(100);
  });
});

describe('service records (RFC 2782)', () => {
  const record = (target: string, priority: number, weight: number, draw = 0.5, port = 45672): DrawnRecord => ({
    target,
    port,
    priority,
    weight,
    draw,
  });
  const ranks = (records: readonly DrawnRecord[]): string[] =>
    readServices(records).detours.map(({ name, preference, order }) => `${name} ${preference}/${order}`);

  it('makes priorities preferences, the lowest first, whatever their numbers', () => {
    expect(ranks([record('c', 70, 0), record('a', 5, 0), record('b', 20, 0), record('a2', 5, 0)])).toEqual([
      'a 0/0',
      'a2 0/0',
      'b 1/0',
      'c 2/0',
    ]);
  });

  it('leaves equals to measurement', () => {
    expect(ranks([record('a', 0, 10, 0.9), record('b', 0, 10, 0.1)])).toEqual(['a 0/0', 'b 0/0']);
  });

  it('puts a record first as often as its weight says', () => {
    const random = draws('weights');
    const first = new Map<string, number>();
    for (let turn = 0; turn < 4_000; turn++) {
      const drawn = [
        ['a', 60],
        ['b', 30],
        ['c', 10],
        ['z', 0],
      ].map(([target, weight]) => record(String(target), 0, Number(weight), random.next().value));
      const [leader] = readServices(drawn).detours;
      if (leader) first.set(leader.name, (first.get(leader.name) ?? 0) + 1);
    }
    expect((first.get('a') ?? 0) / 4_000).toBeCloseTo(0.6, 1);
    expect((first.get('b') ?? 0) / 4_000).toBeCloseTo(0.3, 1);
    expect((first.get('c') ?? 0) / 4_000).toBeCloseTo(0.1, 1);
    expect((first.get('z') ?? 0) / 4_000).toBeLessThan(0.01);
  });

  it('keeps the order of those that stay when others come and go', () => {
    const random = draws('stable');
    const all = Array.from({ length: 12 }, (_, n) => record(`d${n}`, 0, n + 1, random.next().value));
    const without = (skip: number): string[] =>
      readServices(all.filter((_, n) => n !== skip)).detours.map(({ name }) => name);
    const whole = without(-1);
    for (let skip = 0; skip < 12; skip++) expect(without(skip)).toEqual(whole.filter((name) => name !== `d${skip}`));
  });

  it('takes the best priorities when there are too many', () => {
    const records = Array.from({ length: 200 }, (_, n) => record(`d${n}`, 200 - n, 0));
    const { detours, leftOut } = readServices(records);
    expect(detours.map(({ name }) => name)).toEqual(Array.from({ length: MOST_PER_SOURCE }, (_, n) => `d${199 - n}`));
    expect(leftOut).toBe(200 - MOST_PER_SOURCE);
  });

  it('takes "." for an answer that says: none', () => {
    expect(readServices([record('', 0, 0)])).toEqual({ detours: [], leftOut: 0, complaints: [] });
  });

  it('refuses targets that are no hosts', () => {
    const { detours, complaints } = readServices([record('a b', 0, 0), record('ok', 0, 0), record('x', 0, 0, 0.5, 0)]);
    expect(detours.map(({ name }) => name)).toEqual(['ok']);
    expect(complaints).toHaveLength(2);
  });
});

describe('addresses that others name', () => {
  it.each([
    ['0.0.0.0', 'unspecified'],
    ['127.0.0.53', 'loopback'],
    ['169.254.169.254', 'link-local'],
    ['224.0.0.1', 'multicast'],
    ['255.255.255.255', 'reserved'],
    ['::', 'unspecified'],
    ['::1', 'loopback'],
    ['fe80::1', 'link-local'],
    ['ff02::1', 'multicast'],
    ['::ffff:127.0.0.1', 'loopback'],
    ['::127.0.0.1', 'an IPv4 address in disguise'],
    ['2002:7f00:1::', 'an IPv4 address in disguise'],
    ['64:ff9b::169.254.169.254', 'link-local'],
  ])('refuses %s: %s', (text, why) => {
    const address = parseAddress(text);
    expect(address && whyNoDetour(address)).toBe(why);
  });

  it.each([
    '192.0.2.1',
    '10.1.2.3',
    '172.18.0.5',
    '192.168.1.1',
    '100.64.0.1',
    'fd00::1',
    '2001:db8::1',
    '64:ff9b::c000:201',
  ])('accepts %s', (text) => {
    const address = parseAddress(text);
    expect(address).not.toBeNull();
    expect(address && whyNoDetour(address)).toBeNull();
  });
});
