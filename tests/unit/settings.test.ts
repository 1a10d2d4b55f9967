import { randomBytes } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { formatEndpoint, formatPrefix } from '../../appliance/protocol/address.ts';
import { NEVER } from '../../appliance/router/policy.ts';
import {
  daemonSockets,
  loadClientHostSettings,
  loadClientSettings,
  loadRouterSettings,
  rolesOf,
  SettingsError,
  type Sources,
} from '../../appliance/settings.ts';
import { NEVER_OPEN } from '../../appliance/variables.ts';

const secret = (): string => randomBytes(32).toString('base64url');
const KEY = `1a2b3c4d:${secret()}`;

type Files = Readonly<Record<string, string | { text: string; worldReadable: boolean } | Error>>;

function sources(env: Record<string, string>, files: Files = {}): Sources {
  return {
    env: { PATH: '/bin', ...env },
    file(path) {
      const file = files[path];
      if (file instanceof Error) throw file;
      if (file === undefined) return null;
      return typeof file === 'string' ? { text: file, worldReadable: false } : file;
    },
  };
}

const router = (env: Record<string, string> = {}, files?: Files) =>
  loadRouterSettings(sources({ DETOUR_KEYS: KEY, ...env }, files));
const client = (env: Record<string, string> = {}, files?: Files) =>
  loadClientSettings(sources({ DETOUR_KEY: KEY, DETOUR_DETOURS: 'a=192.0.2.1:45672', ...env }, files));

/** The lines of the error that `load` ends with; none when it does not. */
function lines(load: () => unknown): readonly string[] {
  try {
    load();
    return [];
  } catch (error) {
    if (!(error instanceof SettingsError)) throw error;
    expect(error.exitCode).toBe(78);
    return error.message.split('\n');
  }
}

describe('defaults of the contract', () => {
  it('makes a router of nothing but keys', () => {
    const { settings } = router();
    expect({ ...settings, keys: settings.keys.length, listen: formatEndpoint(settings.listen) }).toEqual({
      keys: 1,
      listen: '[::]:45672',
      ports: { first: 20000, last: 29999 },
      allow: [],
      deny: [],
      relay: 'join',
      leaseTime: 600_000,
      legacyV1: false,
      inband: false,
      announce: [],
      onExit: 'keep',
      vpn: null,
      http: { address: { family: 4, value: 0x7f000001n }, port: 9467 },
      socket: '/run/detour/router.sock',
      fwmark: { mark: 0xd7000000, mask: 0xff000000 },
      logLevel: 'info',
      logFormat: 'json',
    });
  });

  it('makes a client of a key and a detour', () => {
    const { settings } = client();
    expect(settings.key?.id).toBe(0x1a2b3c4d);
    expect({ ...settings, key: null }).toEqual({
      key: null,
      detours: [{ kind: 'static', name: 'a', host: '192.0.2.1', port: 45672 }],
      targets: [],
      exclude: [],
      maxPaths: 2,
      strategy: { kinds: ['nat', 'vpn'], ordered: false, fallback: true },
      interfaces: null,
      mode: 'aggregate',
      minAgeMs: null,
      rescue: false,
      providers: ['host'],
      sides: ['client'],
      mptcpify: 'off',
      announcing: null,
      sysctlRoot: '/proc/sys',
      http: { address: { family: 4, value: 0x7f000001n }, port: 9468 },
      socket: '/run/detour/client.sock',
      fwmark: { mark: 0xd7000000, mask: 0xff000000 },
      logLevel: 'info',
      logFormat: 'json',
    });
  });

  it('freezes what it hands out, all the way down', () => {
    const { settings } = router({ DETOUR_ALLOW: '10.0.0.0/8' });
    expect(Object.isFrozen(settings)).toBe(true);
    expect(Object.isFrozen(settings.allow)).toBe(true);
    expect(Object.isFrozen(settings.allow[0]?.prefix.address)).toBe(true);
  });

  it('offers tunnels in the networks and at the port of the contract', () => {
    const { vpn } = router({ DETOUR_VPN: 'wireguard' }).settings;
    expect(vpn?.port).toBe(51820);
    expect([vpn?.v4, vpn?.v6].map((network) => network && formatPrefix(network))).toEqual([
      '10.215.0.0/16',
      'fd0d:e70::/48',
    ]);
    const only = router({
      DETOUR_VPN: 'wireguard',
      DETOUR_VPN_NETWORK: 'fd00:1::/64',
      DETOUR_VPN_PORT: '443',
    }).settings;
    expect(only.vpn).toMatchObject({ port: 443, v4: null, v6: { length: 64 } });
  });

  it('takes an empty variable for one that is not set', () => {
    expect(router({ DETOUR_PORTS: '', DETOUR_HTTP_FILE: '' }).settings.ports).toEqual({ first: 20000, last: 29999 });
  });
});

describe('values', () => {
  const rules = (text: string): string[] =>
    router({ DETOUR_DENY: text }).settings.deny.map(
      ({ prefix, ports }) => `${formatPrefix(prefix)} ${ports.map(({ first, last }) => `${first}-${last}`).join()}`,
    );

  it.each([
    ['192.0.2.0/24', ['192.0.2.0/24 ']],
    ['192.0.2.1', ['192.0.2.1/32 ']],
    ['192.0.2.1:443', ['192.0.2.1/32 443-443']],
    ['192.0.2.0/24:8000-8010 , 10.0.0.0/8', ['192.0.2.0/24 8000-8010', '10.0.0.0/8 ']],
    ['2001:db8::/32', ['2001:db8::/32 ']],
    ['2001:db8::1', ['2001:db8::1/128 ']],
    ['2001:db8::/32:443', ['2001:db8::/32 443-443']],
    ['[2001:db8::]/32:443', ['2001:db8::/32 443-443']],
    ['[2001:db8::1]:443', ['2001:db8::1/128 443-443']],
    ['[2001:db8::1]', ['2001:db8::1/128 ']],
  ])('reads the destination %s', (text, expected) => {
    expect(rules(text)).toEqual(expected);
  });

  it.each([
    ['DETOUR_LISTEN', '0.0.0.0:1000', '0.0.0.0:1000'],
    ['DETOUR_LISTEN', ':1000', '[::]:1000'],
    ['DETOUR_LISTEN', '[2001:db8::1]:5', '[2001:db8::1]:5'],
    ['DETOUR_LISTEN', 'localhost:5', '127.0.0.1:5'],
    ['DETOUR_LISTEN', '[192.0.2.1]:5', '192.0.2.1:5'],
  ])('%s=%s means %s', (name, text, expected) => {
    expect(formatEndpoint(router({ [name]: text }).settings.listen)).toBe(expected);
  });

  it.each([
    ['1m', 60_000],
    ['90s', 90_000],
    ['60000ms', 60_000],
    ['1h', 3_600_000],
  ])('reads the duration %s', (text, expected) => {
    expect(router({ DETOUR_LEASE_TIME: text }).settings.leaseTime).toBe(expected);
  });

  it.each(['on', 'true', '1', 'YES'])('reads %s as on', (text) => {
    expect(router({ DETOUR_LEGACY_V1: text }).settings.legacyV1).toBe(true);
  });

  it('turns HTTP off', () => {
    expect(router({ DETOUR_HTTP: 'off' }).settings.http).toBeNull();
  });

  it('reads keys by comma and by line, with labels and comments', () => {
    const text = `# laptops\n0000000a:${secret()}:anna\n\n0000000b:${secret()},0000000c:${secret()}:c.3@x-y\n`;
    const { keys } = router({ DETOUR_KEYS: text }).settings;
    expect(keys.map(({ id, label, secret: bytes }) => [id, label, bytes.length])).toEqual([
      [10, 'anna', 32],
      [11, null, 32],
      [12, 'c.3@x-y', 32],
    ]);
  });

  it('reads every kind of detour of this version', () => {
    const text = 'fra=fra.example.org:45672, v6=[2001:db8::1]:7,dns:pool.example.org,dns:Other.example.org:99';
    expect(client({ DETOUR_DETOURS: text }).settings.detours).toEqual([
      { kind: 'static', name: 'fra', host: 'fra.example.org', port: 45672 },
      { kind: 'static', name: 'v6', host: '2001:db8::1', port: 7 },
      { kind: 'dns', host: 'pool.example.org', port: 45672 },
      { kind: 'dns', host: 'Other.example.org', port: 99 },
    ]);
  });

  it('reads every kind of list of detours', () => {
    const text = [
      'srv:_detour._udp.example.org.',
      'file:/etc/detour/detours.yaml',
      'file:///run/list',
      'HTTPS://user:pa%40ss@Example.org/list.json?x=1#at=0_3_*_*_1%2c2',
      'http://[2001:db8::1]:8080/',
    ].join();
    expect(client({ DETOUR_DETOURS: text }).settings.detours).toEqual([
      { kind: 'srv', name: '_detour._udp.example.org' },
      { kind: 'file', path: '/etc/detour/detours.yaml' },
      { kind: 'file', path: '/run/list' },
      { kind: 'web', url: 'https://user:pa%40ss@example.org/list.json?x=1', at: '0 3 * * 1,2' },
      { kind: 'web', url: 'http://[2001:db8::1]:8080/', at: null },
    ]);
  });

  it.each(['all', '', 'ALL'])('takes DETOUR_TARGETS=%s for every server', (text) => {
    expect(client({ DETOUR_TARGETS: text }).settings.targets).toEqual([]);
  });

  it.each([
    ['auto', ['nat', 'vpn'], false, true],
    ['nat', ['nat'], true, false],
    ['vpn', ['vpn'], true, false],
    ['vpn, nat', ['vpn', 'nat'], true, false],
    ['auto,vpn', ['nat', 'vpn'], false, false],
    ['auto,announced', ['nat', 'announced', 'vpn'], false, true],
    ['nat, announced', ['nat', 'announced'], true, false],
    ['announced', ['announced'], true, false],
  ])('takes the strategy %s for %j, ordered %j, tunnels as the last resort %j', (text, kinds, ordered, fallback) => {
    expect(client({ DETOUR_STRATEGY: text }).settings.strategy).toEqual({ kinds, ordered, fallback });
  });

  it.each([
    ['inband', ['nat'], true],
    ['inband,nat', ['nat'], true],
    ['vpn,inband', ['vpn', 'nat'], true],
    ['auto,inband', ['nat', 'vpn'], false],
  ])('takes the strategy %s for leases, %j, whose joins need not wait for them', (text, kinds, ordered) => {
    const { strategy } = client({ DETOUR_STRATEGY: text }).settings;
    expect(strategy).toMatchObject({ kinds, ordered, inband: true });
  });
});

describe('one rule, one line', () => {
  it.each<[string, string, RegExp]>([
    ['DETOUR_KEYS', 'nonsense', /keyid:secret/],
    ['DETOUR_KEYS', `xyz:${secret()}`, /8 hex digits/],
    ['DETOUR_KEYS', `1a2b3c4d:${Buffer.alloc(16, 1).toString('base64url')}`, /16 bytes instead of 32/],
    ['DETOUR_KEYS', `1a2b3c4d:${randomBytes(33).toString('base64url')}`, /33 bytes instead of 32/],
    ['DETOUR_KEYS', `1a2b3c4d:${'a/'.repeat(21)}a`, /base64url/],
    ['DETOUR_KEYS', `1a2b3c4d:${Buffer.alloc(32, 7).toString('base64url')}`, /anyone could guess/],
    ['DETOUR_KEYS', `1a2b3c4d:${secret()},1A2B3C4D:${secret()}`, /1a2b3c4d twice/],
    ['DETOUR_KEYS', `1a2b3c4d:${secret()},`, /empty item/],
    ['DETOUR_KEYS', `1a2b3c4d:${secret()},77`, /key 2 must be/],
    ['DETOUR_KEYS', `1a2b3c4d:${secret()}:a b`, /label/],
    ['DETOUR_LISTEN', 'example.org:45672', /literal address/],
    ['DETOUR_LISTEN', '0.0.0.0', /ADDRESS:PORT/],
    ['DETOUR_LISTEN', '0.0.0.0:0', /ADDRESS:PORT/],
    ['DETOUR_PORTS', '0-5', /FIRST-LAST/],
    ['DETOUR_PORTS', '5-4', /FIRST-LAST/],
    ['DETOUR_PORTS', '20000-70000', /FIRST-LAST/],
    ['DETOUR_PORTS', '40000-50000', /contains 45672, the control port/],
    ['DETOUR_PORTS', '9000-9999', /contains 9467.*DETOUR_HTTP/],
    ['DETOUR_ALLOW', '10.0.0.1/8', /bits beyond its length/],
    ['DETOUR_ALLOW', '10.0.0.0/8:x', /no CIDR/],
    ['DETOUR_ALLOW', '10.0.0.0/8:99999', /ports/],
    ['DETOUR_ALLOW', 'example.org', /no CIDR/],
    ['DETOUR_ALLOW', '127.0.0.1', /127\.0\.0\.0\/8 can never be opened/],
    ['DETOUR_ALLOW', '169.254.169.254:80', /can never be opened/],
    ['DETOUR_ALLOW', '::1', /can never be opened/],
    ['DETOUR_ALLOW', '::ffff:127.0.0.1', /can never be opened/],
    ['DETOUR_ALLOW', 'fe80::/64', /can never be opened/],
    ['DETOUR_ALLOW', '224.0.0.1', /can never be opened/],
    ['DETOUR_DENY', '10.0.0.0/8,,', /empty item/],
    ['DETOUR_RELAY', 'udp', /one of join, mptcp, tcp/],
    ['DETOUR_LEASE_TIME', '59s', /from 1m to 1h/],
    ['DETOUR_LEASE_TIME', '61m', /from 1m to 1h/],
    ['DETOUR_LEASE_TIME', '600', /with a unit/],
    ['DETOUR_LEGACY_V1', 'maybe', /on or off/],
    ['DETOUR_HTTP', '9467', /ADDRESS:PORT/],
    ['DETOUR_SOCKET', 'run/detour.sock', /absolute path/],
    ['DETOUR_SOCKET', `/${'x'.repeat(107)}`, /at most 107 bytes/],
    ['DETOUR_FWMARK', '0x100', /MARK\/MASK/],
    ['DETOUR_FWMARK', '0x0/0xff', /MARK\/MASK/],
    ['DETOUR_FWMARK', '0x100000000/0xff', /MARK\/MASK/],
    ['DETOUR_FWMARK', '0x3/0x1', /not in the mask/],
    ['DETOUR_LOG_LEVEL', 'loud', /one of trace/],
    ['DETOUR_LOG_FORMAT', 'xml', /one of json/],
    ['DETOUR_ON_EXIT', 'burn', /one of keep/],
    ['DETOUR_INBAND', 'maybe', /on or off/],
    ['DETOUR_ANNOUNCE_PORTS', '443,x', /no PORT or FIRST-LAST/],
    ['DETOUR_ANNOUNCE_PORTS', '443,25000', /overlaps with DETOUR_PORTS/],
    ['DETOUR_VPN', 'openvpn', /must be one of off, wireguard/],
    ['DETOUR_VPN_NETWORK', '10.0.0.0/7', /not from 8 to 30/],
    ['DETOUR_VPN_NETWORK', '10.215.0.0/31', /not from 8 to 30/],
    ['DETOUR_VPN_NETWORK', '10.215.1.0/16', /bits beyond its length/],
    ['DETOUR_VPN_NETWORK', '10.215.0.0/16,10.216.0.0/16', /more than one IPv4 network/],
    ['DETOUR_VPN_NETWORK', '169.254.7.0/24', /overlaps with 169.254.0.0\/16/],
    ['DETOUR_VPN_NETWORK', 'fe80::/64', /overlaps with fe80::\/10/],
    ['DETOUR_VPN_NETWORK', 'home', /no CIDR/],
    ['DETOUR_VPN_PORT', '0', /must be a port/],
  ])('router: %s=%s', (name, value, rule) => {
    const found = lines(() => router({ [name]: value }));
    expect(found).toHaveLength(1);
    expect(found[0]).toMatch(rule);
    expect(found[0]).toMatch(new RegExp(`^${name}[=:]`));
  });

  it.each<[string, string, RegExp]>([
    ['DETOUR_KEY', 'short', /keyid:secret/],
    ['DETOUR_DETOURS', 'a', /name=host:port/],
    ['DETOUR_DETOURS', 'a=192.0.2.1', /name=host:port/],
    ['DETOUR_DETOURS', 'a=192.0.2:5', /name=host:port/],
    ['DETOUR_DETOURS', 'a=2001:db8::1:5', /name=host:port/],
    ['DETOUR_DETOURS', 'a=h:5,a=i:5', /name "a" twice/],
    ['DETOUR_DETOURS', 'a=h:5,b=h:5', /h:5 twice/],
    ['DETOUR_DETOURS', 'dns:192.0.2.1', /dns:NAME/],
    ['DETOUR_DETOURS', 'dns:h:0', /dns:NAME/],
    ['DETOUR_DETOURS', 'srv:', /srv:NAME/],
    ['DETOUR_DETOURS', 'srv:192.0.2.1', /srv:NAME/],
    ['DETOUR_DETOURS', 'srv:a..b', /srv:NAME/],
    ['DETOUR_DETOURS', 'srv:a.example,SRV:A.example', /srv:a\.example twice/],
    ['DETOUR_DETOURS', 'file:detours', /file:\/ABSOLUTE/],
    ['DETOUR_DETOURS', 'file://host/detours', /file:\/ABSOLUTE/],
    ['DETOUR_DETOURS', 'file:/etc/', /file:\/ABSOLUTE/],
    ['DETOUR_DETOURS', 'file:/a,file:///a', /file:\/a twice/],
    ['DETOUR_DETOURS', 'https://', /no URL/],
    ['DETOUR_DETOURS', `https://example.org/${'x'.repeat(2048)}`, /longer than 2048/],
    ['DETOUR_DETOURS', 'https://example.org/x#top', /#at=/],
    ['DETOUR_DETOURS', 'https://example.org/x#at=often', /five fields of cron/],
    ['DETOUR_DETOURS', 'https://example.org/x#at=*_*_*_*_*_*', /five fields of cron/],
    ['DETOUR_DETOURS', 'https://example.org/x#at=99_*_*_*_*', /five fields of cron/],
    ['DETOUR_DETOURS', 'https://example.org/x,https://example.org/x', /twice/],
    ['DETOUR_DETOURS', Array.from({ length: 257 }, (_, i) => `n${i}=h:${i + 1}`).join(), /257 sources/],
    ['DETOUR_DETOURS', ' ', /names no detour/],
    ['DETOUR_MAX_PATHS', '0', /from 1 to 8/],
    ['DETOUR_MAX_PATHS', '9', /from 1 to 8/],
    ['DETOUR_MAX_PATHS', '2.5', /whole number/],
    ['DETOUR_SYSCTL_ROOT', 'proc', /absolute path/],
    ['DETOUR_STRATEGY', 'inband,inband', /inband twice/],
    ['DETOUR_STRATEGY', 'vpn,vpn', /vpn twice/],
    ['DETOUR_STRATEGY', 'magic', /not known/],
    ['DETOUR_MODE', 'fastest', /aggregate, backup/],
    ['DETOUR_MIN_AGE', '5', /unit/],
    ['DETOUR_MIN_AGE', '2h', /from 0ms to 1h/],
    ['DETOUR_INTERFACES', 'eth*,,wlan0', /empty item/],
    ['DETOUR_INTERFACES', 'eth 0', /no interface can have/],
    ['DETOUR_INTERFACES', 'a/b', /no interface can have/],
    ['DETOUR_INTERFACES', 'eth[01]', /knows only/],
    ['DETOUR_INTERFACES_EXCLUDE', 'a-very-long-interface-name*', /longer than 15/],
    ['DETOUR_INTERFACES_EXCLUDE', 'eth0:1', /no interface can have/],
    ['DETOUR_PROVIDERS', 'host,podman', /must be one of host, docker, kubernetes/],
    ['DETOUR_PROVIDERS', 'docker,docker', /one of them twice/],
    ['DETOUR_MPTCPIFY', 'on', /must be one of off, all, labelled/],
    ['DETOUR_ROLE', 'servers', /must be one of client, server/],
    ['DETOUR_ROLE', 'client,client', /one of them twice/],
    ['DETOUR_ROLE', ' ', /names no role/],
    ['DETOUR_ANNOUNCE', 'on', /needs DETOUR_ROLE=server/],
    ['DETOUR_ANNOUNCE', 'maybe', /off, on, or ports/],
    ['DETOUR_ANNOUNCE', '443,443', /a port twice/],
    ['DETOUR_ANNOUNCE', '0', /off, on, or ports/],
    ['DETOUR_ANNOUNCE', '1,2,3,4,5,6,7,8,9', /at most 8/],
  ])('client: %s=%s', (name, value, rule) => {
    const found = lines(() => client({ [name]: value }));
    expect(found).toHaveLength(1);
    expect(found[0]).toMatch(rule);
    expect(found[0]).toMatch(new RegExp(`^${name}[=:]`));
  });

  it('refuses the secret of the published test vectors', () => {
    const { psk } = JSON.parse(readFileSync(new URL('../vectors/control-v2.json', import.meta.url), 'utf8'));
    const published = Buffer.from(psk, 'hex').toString('base64url');
    expect(lines(() => router({ DETOUR_KEYS: `1a2b3c4d:${published}` }))[0]).toMatch(/anyone could guess/);
  });

  it('refuses one UDP port for two things', () => {
    const found = lines(() => router({ DETOUR_VPN: 'wireguard', DETOUR_VPN_PORT: '45672' }));
    expect(found).toEqual([expect.stringMatching(/^DETOUR_VPN_PORT="45672": is the control port/)]);
    expect(lines(() => router({ DETOUR_VPN: 'off', DETOUR_VPN_PORT: '45672' }))).toEqual([]);
  });

  it('refuses a destination that is both allowed and denied', () => {
    const found = lines(() => router({ DETOUR_ALLOW: '10.0.0.0/8:443', DETOUR_DENY: '10.0.0.0/8:443' }));
    expect(found).toEqual([expect.stringMatching(/^DETOUR_ALLOW: has 10\.0\.0\.0\/8:443-443, and so has DETOUR_DENY/)]);
  });
});

describe("the server's side", () => {
  it('needs no key and no detours, and uses none', () => {
    const { settings } = loadClientSettings(sources({ DETOUR_ROLE: 'server' }));
    expect(settings).toMatchObject({ sides: ['server'], key: null, detours: [] });
    expect(client({ DETOUR_ROLE: 'server' }).settings).toMatchObject({ key: null, detours: [] });
  });

  it("beside the client's needs what that needs", () => {
    expect(client({ DETOUR_ROLE: 'client,server' }).settings).toMatchObject({ sides: ['client', 'server'] });
    const found = lines(() => loadClientSettings(sources({ DETOUR_ROLE: 'Server,Client' })));
    expect(found).toEqual([
      expect.stringMatching(/^DETOUR_KEY: is required/),
      expect.stringMatching(/^DETOUR_DETOURS: /),
    ]);
  });

  it('is checked like everything else', () => {
    const found = lines(() => loadClientSettings(sources({ DETOUR_ROLE: 'sever', DETOUR_KEY: 'x' })));
    expect(found.map((line) => line.split(/[=:]/)[0])).toEqual(['DETOUR_KEY', 'DETOUR_DETOURS', 'DETOUR_ROLE']);
  });
});

describe('DETOUR_MPTCPIFY', () => {
  it.each([
    ['off', 'off'],
    ['no', 'off'],
    ['All', 'all'],
    ['labelled', 'labelled'],
  ])('%s is %s', (text, mode) => {
    expect(client({ DETOUR_MPTCPIFY: text }).settings.mptcpify).toBe(mode);
    expect(loadClientHostSettings(sources({ DETOUR_MPTCPIFY: text })).settings.mptcpify).toBe(mode);
  });

  it('warns when labels decide and nobody has any', () => {
    const warned = expect.arrayContaining([expect.stringMatching(/^DETOUR_MPTCPIFY=labelled/)]);
    expect(client({ DETOUR_MPTCPIFY: 'labelled' }).warnings).toEqual(warned);
    expect(client({ DETOUR_MPTCPIFY: 'labelled', DETOUR_PROVIDERS: 'host,docker' }).warnings).not.toEqual(warned);
    expect(client({ DETOUR_MPTCPIFY: 'all' }).warnings).not.toEqual(warned);
  });
});

it('closes what the router closes', () => {
  expect(NEVER_OPEN.map(formatPrefix)).toEqual(NEVER.map(formatPrefix));
});

describe('all at once', () => {
  it('names every problem, one line each, with variable, value, rule and example', () => {
    const found = lines(() =>
      router({
        DETOUR_PORTS: '1-99999',
        DETOUR_RELAY: 'everything',
        DETOUR_LEASE_TIME: 'soon',
        DETOUR_VPN: 'openvpn',
        DETOUR_LISTNE: ':1',
        DETOUR_MAX_PATHS: '2',
        DETOUR_SOCKET_FILE: '/nowhere',
      }),
    );
    expect(found).toHaveLength(7);
    for (const name of ['PORTS', 'RELAY', 'LEASE_TIME', 'VPN', 'LISTNE', 'MAX_PATHS', 'SOCKET_FILE']) {
      expect(found.filter((line) => new RegExp(`^DETOUR_${name}[=:]`).test(line))).toHaveLength(1);
    }
    expect(found).toContain(
      'DETOUR_RELAY="everything": must be one of join, mptcp, tcp; for example DETOUR_RELAY=join',
    );
  });

  it('asks for everything that is required', () => {
    expect(lines(() => loadRouterSettings(sources({}))).join()).toMatch(/^DETOUR_KEYS: is required.*genkey/);
    expect(lines(() => loadClientSettings(sources({})))).toEqual([
      expect.stringMatching(/^DETOUR_KEY: is required/),
      expect.stringMatching(/^DETOUR_DETOURS: is required/),
    ]);
  });

  it('keeps every message on its line, whatever the value', () => {
    const found = lines(() => router({ DETOUR_RELAY: 'a\nb\u001b[31m', DETOUR_PORTS: 'x'.repeat(5000) }));
    expect(found).toHaveLength(2);
    expect(found.join('')).not.toContain('\u001b');
    for (const line of found) expect(line.length).toBeLessThan(300);
  });
});

describe('secrets', () => {
  it('shows no secret in an error', () => {
    const text = secret();
    const broken = [
      `1a2b3c4d:${text}x`,
      `${text}:1a2b3c4d`,
      `${text}`,
      `1a2b3c4d:${text}:bad label`,
      `1a2b3c4d:${text},x`,
    ];
    for (const value of broken) {
      const found = lines(() => router({ DETOUR_KEYS: value }));
      expect(found).toHaveLength(1);
      expect(found.join()).not.toContain(text);
    }
    expect(lines(() => router({ DETOUR_KEYZ: `1a2b3c4d:${text}` })).join()).not.toContain(text);
  });

  it('shows key id and label, never the secret, with the origin', () => {
    const { shown } = router({ DETOUR_KEYS: `${KEY}:anna` });
    expect(shown.find(({ name }) => name === 'DETOUR_KEYS')).toEqual({
      name: 'DETOUR_KEYS',
      value: '1a2b3c4d:***:anna',
      origin: 'env',
      path: null,
    });
  });

  it('hides the password of a URL', () => {
    const urls = [
      'https://user:hunter2@example.org/x',
      'https://example.org/x?token=hunter2',
      'https://user:p@hunter2@example.org/x?hunter2',
    ];
    for (const url of urls) {
      const { shown } = client({ DETOUR_DETOURS: `a=h:1,${url}` });
      expect(JSON.stringify(shown)).toMatch(/a=h:1,https.*example\.org\/x/);
      expect(JSON.stringify(shown)).not.toContain('hunter2');
      expect(lines(() => client({ DETOUR_DETOURS: `${url}#top` })).join()).toMatch(/#at=/);
      expect(lines(() => client({ DETOUR_DETOURS: `${url}#top` })).join()).not.toContain('hunter2');
      expect(lines(() => client({ DETOUR_DETOURS: `${url},${url}` })).join()).not.toContain('hunter2');
    }
  });
});

describe('files', () => {
  it.each(['', '\n', '\r\n'])('trims one newline (%j) of a _FILE', (end) => {
    const { settings, shown } = router({ DETOUR_RELAY_FILE: '/etc/relay' }, { '/etc/relay': `mptcp${end}` });
    expect(settings.relay).toBe('mptcp');
    expect(shown.find(({ name }) => name === 'DETOUR_RELAY')).toMatchObject({ origin: 'file', path: '/etc/relay' });
  });

  it('trims no more than one', () => {
    expect(lines(() => router({ DETOUR_RELAY_FILE: '/r' }, { '/r': 'mptcp\n\n' }))).toHaveLength(1);
  });

  it('takes what is mounted below /run/secrets', () => {
    const { settings, shown } = loadRouterSettings(sources({}, { '/run/secrets/detour_keys': `${KEY}\n` }));
    expect(settings.keys).toHaveLength(1);
    expect(shown[0]).toMatchObject({ origin: 'secret', path: '/run/secrets/detour_keys' });
  });

  it('prefers what was said to what was mounted', () => {
    const { settings } = router({ DETOUR_PORTS: '1000-2000' }, { '/run/secrets/detour_ports': '3000-4000' });
    expect(settings.ports.first).toBe(1000);
  });

  it('refuses both the variable and its file', () => {
    expect(lines(() => router({ DETOUR_KEYS_FILE: '/k' }, { '/k': KEY }))).toEqual([
      'DETOUR_KEYS: is set twice, as DETOUR_KEYS and as DETOUR_KEYS_FILE; remove one of them',
    ]);
  });

  it('says when a file is missing or cannot be read, once', () => {
    const denied = Object.assign(new Error('no'), { code: 'EACCES' });
    expect(lines(() => loadRouterSettings(sources({ DETOUR_KEYS_FILE: '/k' })))).toEqual([
      expect.stringMatching(/^DETOUR_KEYS_FILE="\/k": there is no such file/),
    ]);
    expect(lines(() => loadRouterSettings(sources({ DETOUR_KEYS_FILE: '/k' }, { '/k': denied })))).toEqual([
      expect.stringMatching(/^DETOUR_KEYS_FILE="\/k".*EACCES/),
    ]);
  });

  it('warns of a secret that every user can read, but not where Docker decides the mode', () => {
    const open = { text: KEY, worldReadable: true };
    const warnings = (path: string) =>
      loadRouterSettings(sources({ DETOUR_KEYS_FILE: path }, { [path]: open })).warnings.join();
    expect(warnings('/etc/keys')).toMatch(/chmod 600 \/etc\/keys/);
    expect(warnings('/run/secrets/keys')).toBe('');
    expect(router({ DETOUR_RELAY_FILE: '/r' }, { '/r': { text: 'join', worldReadable: true } }).warnings).toEqual([]);
  });
});

describe('names', () => {
  it.each([
    ['DETOUR_PORT', 'DETOUR_PORTS'],
    ['DETOUR_PORT_RANGE', 'DETOUR_PORTS'],
    ['DETOUR_LISTNE', 'DETOUR_LISTEN'],
    ['DETOUR_LOGLEVEL', 'DETOUR_LOG_LEVEL'],
    ['DETOUR_KEYS_FIEL', 'DETOUR_KEYS_FILE'],
    ['DETOUR_KEY_FLIE', 'DETOUR_KEY'],
    ['DETOUR_RELAYS_FILE', 'DETOUR_RELAY_FILE'],
    ['DETOUR_ONEXIT', 'DETOUR_ON_EXIT'],
  ])('%s was meant to be %s', (typed, meant) => {
    const [line = ''] = lines(() => router({ [typed]: '1' }));
    expect(line).toMatch(new RegExp(`^${typed}: is not known; did you mean ${meant}`));
  });

  it('offers nothing for what resembles nothing', () => {
    expect(lines(() => router({ DETOUR_XYZZY_QUUX: '1' })).join()).not.toContain('did you mean');
  });

  it("says whose a variable is when it is the other role's", () => {
    expect(lines(() => router({ DETOUR_KEY: KEY }))).toEqual([
      expect.stringMatching(/^DETOUR_KEY: belongs to the client, and this is the router; the router has DETOUR_KEYS/),
    ]);
    expect(lines(() => client({ DETOUR_ON_EXIT_FILE: '/x' }))).toEqual([
      expect.stringMatching(/^DETOUR_ON_EXIT_FILE: belongs to the router/),
    ]);
  });

  it('lets both roles share an environment where a command looks at both', () => {
    const both = sources({ DETOUR_KEYS: KEY, DETOUR_KEY: KEY, DETOUR_DETOURS: 'a=h:1' });
    expect(loadRouterSettings(both, { others: true }).settings.keys).toHaveLength(1);
    expect(loadClientSettings(both, { others: true }).settings.detours).toHaveLength(1);
    expect(rolesOf(both)).toEqual(['router', 'client']);
  });

  it('ignores what Kubernetes makes of a Service named detour-router', () => {
    const links = {
      KUBERNETES_SERVICE_HOST: '10.96.0.1',
      DETOUR_ROUTER_SERVICE_HOST: '10.96.0.2',
      DETOUR_ROUTER_SERVICE_PORT: '45672',
      DETOUR_ROUTER_SERVICE_PORT_CONTROL: '45672',
      DETOUR_ROUTER_PORT: 'udp://10.96.0.2:45672',
      DETOUR_ROUTER_PORT_45672_UDP: 'udp://10.96.0.2:45672',
      DETOUR_ROUTER_PORT_45672_UDP_ADDR: '10.96.0.2',
    };
    expect(lines(() => router(links))).toEqual([]);
    const { KUBERNETES_SERVICE_HOST: _, ...elsewhere } = links;
    expect(lines(() => router(elsewhere))).toHaveLength(6);
  });

  it('leaves variables without the prefix alone', () => {
    expect(lines(() => router({ PORT: 'x', DETOURS: 'y' }))).toEqual([]);
  });
});

describe('commands that need no key', () => {
  it('load what there is', () => {
    expect(loadRouterSettings(sources({ DETOUR_SOCKET: '/x' }), { partial: true }).settings).toMatchObject({
      keys: [],
      socket: '/x',
    });
    expect(loadClientHostSettings(sources({ DETOUR_SYSCTL_ROOT: '/host/proc/sys' })).settings.sysctlRoot).toBe(
      '/host/proc/sys',
    );
  });

  it('still refuse what is wrong', () => {
    expect(lines(() => loadClientHostSettings(sources({ DETOUR_SYSCTL_ROOT: 'x' })))).toHaveLength(1);
  });

  it('tell roles by their own variables and secrets', () => {
    expect(rolesOf(sources({}))).toEqual([]);
    expect(rolesOf(sources({ DETOUR_LOG_LEVEL: 'debug' }))).toEqual([]);
    expect(rolesOf(sources({ DETOUR_PORTS: '1-2' }))).toEqual(['router']);
    expect(rolesOf(sources({ DETOUR_DETOURS_FILE: '/d' }))).toEqual(['client']);
    expect(rolesOf(sources({}, { '/run/secrets/detour_key': KEY }))).toEqual(['client']);
  });

  it('find the sockets of the daemons', () => {
    expect(daemonSockets(sources({}))).toEqual(['/run/detour/router.sock', '/run/detour/client.sock']);
    expect(daemonSockets(sources({ DETOUR_SOCKET: '/a' }))).toEqual(['/a']);
    expect(daemonSockets(sources({ DETOUR_SOCKET_FILE: '/f' }, { '/f': '/b\n' }))).toEqual(['/b']);
  });
});
