import { fileURLToPath } from 'node:url';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parseAddress } from '../../appliance/protocol/address.ts';
import { type Host, Lab, type Running, requireRoot, waitUntil } from '../lab/netns.ts';
import { type Inner, TunnelClient } from '../lab/tunnel-client.ts';
import { hostState, makeKey } from './world.ts';

const root = (path: string): string => fileURLToPath(new URL(`../../${path}`, import.meta.url));
const KEYS = [makeKey('0a0b0c0d'), makeKey('1a1b1c1d')] as const;
const CONTROL = '10.87.1.2:45672';
const SERVER = { ip: '10.87.2.2', ip6: 'fd87:2::2' } as const;
const INSIDE = { ip: '10.215.0.1', ip6: 'fd0d:e70::1' } as const;
const FAMILIES = ['ip', 'ip6'] as const;

/** Two clients --- router --- server, and neither end has a route to the other. */
async function stage() {
  const lab = await Lab.create('tunnels.router');
  const [client, other] = [await lab.host('client'), await lab.host('other')];
  const [router, server] = [await lab.host('router'), await lab.host('server')];
  await lab.link(client, router, { v4: '10.87.1.0/30', v6: 'fd87:1::/64', devA: 'c0', devB: 'r0' });
  await lab.link(other, router, { v4: '10.87.3.0/30', v6: 'fd87:3::/64', devA: 'o0', devB: 'r2' });
  await lab.link(router, server, { v4: '10.87.2.0/30', v6: 'fd87:2::/64', devA: 'r1', devB: 's0' });
  await other.route('default via 10.87.3.2');
  await router.isolate('/run/wireguard');
  return { lab, client, other, router, server };
}

describe.runIf(requireRoot('tests of tunnels through a router'))('the router’s tunnels in a real kernel', () => {
  let set: Awaited<ReturnType<typeof stage>>;
  let program: Running;
  let first: TunnelClient;
  let second: TunnelClient;
  let inner: Inner;
  let innerSecond: Inner;
  let untouched: Record<string, string>;

  const start = async (over: Readonly<Record<string, string>> = {}): Promise<Running> => {
    const started = set.router.spawn([process.execPath, root('appliance/cli.ts'), 'router'], {
      env: environment(over),
    });
    await started.waitFor('"event":"started"', 20_000);
    return started;
  };
  const environment = (over: Readonly<Record<string, string>> = {}): Record<string, string> => ({
    DETOUR_KEYS: KEYS.join(','),
    DETOUR_ALLOW: '10.87.2.0/30,fd87:2::/64',
    DETOUR_HTTP: 'off',
    DETOUR_SOCKET: `/run/${set.router.namespace}.sock`,
    DETOUR_VPN: 'wireguard',
    ...over,
  });
  const packets = (...args: (string | number)[]): Promise<string> =>
    set.client.exec(['python3', root('tests/lab/packets.py'), ...args.map(String)]);
  const counter = async (name: string): Promise<number> => {
    const text = await set.router.exec(['nft', 'list', 'counter', 'inet', 'detour', name]);
    return Number(/packets (\d+)/.exec(text)?.[1]);
  };
  const grows = async (name: string, by: number, task: () => Promise<unknown>): Promise<void> => {
    const before = await counter(name);
    await task();
    await waitUntil(async () => (await counter(name)) === before + by, {
      deadlineMs: 5_000,
      what: `${name} to grow by ${by} from ${before}`,
    });
  };
  const watch = async (host: Host, match: string): Promise<() => Promise<number>> => {
    await host.nft(
      `add table inet watch\nflush table inet watch\nadd chain inet watch in { type filter hook prerouting priority -400; }\nadd rule inet watch in ${match} counter\n`,
    );
    return async () =>
      Number(/counter packets (\d+)/.exec(await host.exec(['nft', 'list', 'chain', 'inet', 'watch', 'in']))?.[1]);
  };
  /** Sends a datagram out of the tunnel. */
  const datagram = (from: string, to: string): Promise<string> => {
    const family = from.includes(':') ? 'AF_INET6' : 'AF_INET';
    const program = `import socket\ns=socket.socket(socket.${family}, socket.SOCK_DGRAM)\ns.bind(("${from}", 0))\ns.sendto(b"x", ("${to}", 53))`;
    return set.client.exec(['python3', '-c', program]);
  };
  /** Returns when what was sent through the tunnel before has been handled. */
  const settled = (): Promise<void> => grows('tunnel_not_relayed', 1, () => datagram(inner.v4, SERVER.ip));

  beforeAll(async () => {
    set = await stage();
    await set.router.forward();
    untouched = await hostState(set.router);
    program = await start();
    first = await TunnelClient.open(set.client, 'dtv-one', CONTROL, KEYS[0]);
    second = await TunnelClient.open(set.other, 'dtv-two', '10.87.3.2:45672', KEYS[1]);
    inner = await first.up();
    innerSecond = await second.up();
  });
  afterAll(async () => {
    await first?.close();
    await second?.close();
    await set?.lab[Symbol.asyncDispose]();
  });

  describe.each(FAMILIES)('over %s', (family) => {
    const source = (): string => (family === 'ip' ? inner.v4 : inner.v6);
    const outside = family === 'ip' ? '10.87.2.1' : 'fd87:2::1';

    it('pass a SYN with MP_JOIN to the server, from the router’s own address', async () => {
      const match = `${family} saddr ${outside} tcp dport 5001 tcp flags & (syn|ack) == syn tcp option mptcp subtype 1`;
      const seen = await watch(set.server, match);
      await packets('tcp', source(), SERVER[family], 30001, 5001, 'S', 'join');
      await waitUntil(async () => (await seen()) === 1, { deadlineMs: 10_000, what: 'the join to arrive' });
    });

    it.each(['none', 'capable', 'other', 'joinlast'])('drop a SYN with option %s', async (option) => {
      const seen = await watch(set.server, 'tcp dport 5002');
      await grows('syn_not_relayed', 3, () => packets('tcp', source(), SERVER[family], 30100, 5002, 'S', option, 3));
      expect(await seen()).toBe(0);
    });

    it('pass nothing that did not begin with a join', async () => {
      const seen = await watch(
        set.server,
        'ip daddr 10.87.2.2 counter; ip6 daddr fd87:2::2'.split(';')[0]?.replace(' counter', '') ?? '',
      );
      for (const flags of ['A', 'PA', 'F', 'R', 'SA', 'SF', 'SR'])
        await packets('tcp', source(), SERVER[family], 30500, 5004, flags, 'join');
      await grows('tunnel_not_relayed', 1, () => datagram(source(), SERVER[family]));
      await settled();
      expect(await seen()).toBe(0);
    });

    it('answer only by joins: a server that speaks plain TCP is reset, and the client hears nothing', async () => {
      const listener = set.server.spawn([
        'python3',
        '-c',
        `import socket\ns=socket.create_server(("${SERVER[family]}", 5003), family=socket.AF_INET${family === 'ip' ? '' : '6'})\nprint("up", flush=True)\ns.accept()`,
      ]);
      await listener.waitFor('up');
      const heard = await watch(set.client, 'tcp sport 5003');
      await grows('answer_refused', 1, () => packets('tcp', source(), SERVER[family], 30400, 5003, 'S', 'join'));
      expect(await heard()).toBe(0);
    });

    it('reach nothing of the detour but the control port', async () => {
      for (const own of [INSIDE[family], outside, family === 'ip' ? '10.87.1.2' : 'fd87:1::2'])
        await grows('input_guarded', 1, () => packets('tcp', source(), own, 30700, 22, 'S', 'join'));
      await grows('tunnel_not_relayed', 1, () => datagram(source(), outside));
    });

    it('reach no private network, no metadata, and no other client', async () => {
      const denied =
        family === 'ip'
          ? ['192.168.77.1', '169.254.169.254', '100.64.0.1', innerSecond.v4]
          : ['fd00:ec2::254', '64:ff9b::a00:1', '2001:db8::1', innerSecond.v6];
      // The router has no route to most of them: it would need one to get as far as the rules.
      await set.router.route(family === 'ip' ? 'default via 10.87.2.2' : 'default via fd87:2::2');
      for (const address of denied)
        await grows('destination_denied', 1, () => packets('tcp', source(), address, 30800, 80, 'S', 'join'));
      await grows('destination_denied', 1, () => packets('tcp', source(), SERVER[family], 30900, 25, 'S', 'join'));
      await set.router.exec(['ip', family === 'ip' ? '-4' : '-6', 'route', 'del', 'default']);
    });

    it('carry nothing with another client’s address, nor with one that was not granted', async () => {
      const seen = await watch(set.router, `iifname "detour-vpn" tcp dport 5005`);
      const other = parseAddress(family === 'ip' ? innerSecond.v4 : innerSecond.v6);
      const stray = parseAddress(family === 'ip' ? '10.215.99.99' : 'fd0d:e70::9999');
      if (!other || !stray) throw new Error('no address');
      for (const address of [other, stray]) {
        await first.use(address);
        const from = family === 'ip' ? [innerSecond.v4, '10.215.99.99'] : [innerSecond.v6, 'fd0d:e70::9999'];
        await packets('tcp', from[address === other ? 0 : 1] ?? '', SERVER[family], 30850, 5005, 'S', 'join');
      }
      await packets('tcp', source(), SERVER[family], 30851, 5005, 'S', 'join');
      // WireGuard drops them before any rule sees them: of the three the honest one alone.
      await waitUntil(async () => (await seen()) === 1, { deadlineMs: 5_000, what: 'the honest one to arrive' });
    });

    it('are limited in how fast one client opens flows', async () => {
      const before = await counter('syn_rate');
      await packets('tcp', source(), SERVER[family], 31000, 5006, 'S', 'join', 400);
      await waitUntil(async () => (await counter('syn_rate')) > before + 100, {
        deadlineMs: 5_000,
        what: 'SYNs over the limit to be dropped',
      });
      expect((await counter('syn_rate')) - before).toBeLessThanOrEqual(300);
    });

    it('let nobody open a connection into them', async () => {
      const heard = await watch(set.client, `iifname "dtv-one" tcp dport 80`);
      await set.server.route(family === 'ip' ? '10.215.0.0/16 via 10.87.2.1' : 'fd0d:e70::/48 via fd87:2::1');
      const send = (): Promise<string> =>
        set.server.exec([
          'python3',
          root('tests/lab/packets.py'),
          'tcp',
          SERVER[family],
          source(),
          '40000',
          '80',
          'S',
          'join',
        ]);
      await grows('tunnel_stray', 1, send);
      expect(await heard()).toBe(0);
    });
  });

  it('clamp the segments of both ends to what fits', async () => {
    // These SYNs say 1460; 1420 bytes go through the tunnel.
    for (const [from, to, size] of [
      [inner.v4, SERVER.ip, 1380],
      [inner.v6, SERVER.ip6, 1360],
    ] as const) {
      const seen = await watch(set.server, `tcp dport 5010 tcp option maxseg size ${size}`);
      await packets('tcp', from, to, 32000, 5010, 'S', 'join');
      await waitUntil(async () => (await seen()) === 1, { deadlineMs: 3_000, what: `a segment size of ${size}` });
    }
  });

  it('outlive the router: what was granted goes on, and the next one takes it over', async () => {
    const before = await first.peer();
    await program.stop('SIGKILL');
    const seen = await watch(set.server, 'tcp dport 5020');
    await packets('tcp', inner.v4, SERVER.ip, 33000, 5020, 'S', 'join');
    await waitUntil(async () => (await seen()) === 1, { deadlineMs: 5_000, what: 'a join without a router' });
    program = await start();
    await first.speaker.hello();
    const router = await first.speaker.router();
    expect(router.tunnel).toMatchObject({ kind: 'router', publicKey: before?.publicKey });
    const again = await first.speaker.enrol(first.keys.publicKey);
    if (again.tunnel?.kind !== 'client') throw new Error(again.result);
    expect(again.tunnel.v4?.address).toEqual(parseAddress(inner.v4));
    expect(
      (await set.router.exec(['nft', 'list', 'set', 'inet', 'detour', 'tunnels4'])).match(/k0a0b0c0d/g),
    ).toHaveLength(1);
  });

  it('come back after a flush, and with the interface when that was deleted', async () => {
    await set.router.exec(['ip', 'link', 'del', 'detour-vpn']);
    await set.router.exec(['nft', 'flush', 'ruleset']);
    await first.speaker.hello();
    expect((await first.speaker.enrol(first.keys.publicKey)).result).toBe('OK');
    const seen = await watch(set.server, 'tcp dport 5030');
    // The other end lost its session: WireGuard notices after 15 s without an answer.
    await waitUntil(
      async () => {
        await packets('tcp', inner.v4, SERVER.ip, 34000, 5030, 'S', 'join');
        return (await seen()) > 0;
      },
      { deadlineMs: 40_000, everyMs: 500, what: 'a join after the restoration' },
    );
  });

  it('are eight for a client that asks for a thousand, and the others do not notice', async () => {
    await first.speaker.hello();
    const results = new Map<string, number>();
    // As fast as it can; the kernel lets 50 questions a second through.
    for (let at = 0; at < 1_000; at += 100) {
      const asked = Array.from({ length: 100 }, (_, n) => {
        const key = new Uint8Array(32).fill(7);
        key.set([(at + n) & 255, (at + n) >> 8]);
        return first.speaker.enrol(key);
      });
      for (const { result } of await Promise.all(asked)) results.set(result, (results.get(result) ?? 0) + 1);
    }
    console.info(`1,000 questions for tunnels: ${JSON.stringify([...results])}`);
    // One of its eight is the tunnel that it has.
    expect(results.get('OK')).toBe(7);
    expect(results.get('QUOTA')).toBeGreaterThan(0);
    expect(
      (await set.router.exec(['nft', 'list', 'set', 'inet', 'detour', 'tunnels4'])).match(/k0a0b0c0d/g),
    ).toHaveLength(8);
    await second.speaker.hello();
    expect((await second.speaker.enrol(second.keys.publicKey)).result).toBe('OK');
  });

  it('leave nothing behind', async () => {
    await program.stop();
    await set.router.exec([process.execPath, root('appliance/cli.ts'), 'cleanup', 'router'], { env: environment() });
    expect(await hostState(set.router)).toEqual(untouched);
    expect(await set.router.exec(['sh', '-c', 'ls /run/wireguard'])).toBe('');
  });

  it('are refused by a machine that cannot carry them, and by one whose own networks they are', async () => {
    const run = (env: Record<string, string>, ...before: string[]) =>
      set.router.try([...before, process.execPath, root('appliance/cli.ts'), 'router'], { env });
    const lost = await run(environment(), 'unshare', '-m', 'sh', '-c', 'mount -t tmpfs none /dev/net; exec "$@"', 'sh');
    // A kernel with WireGuard needs no TUN.
    if (lost.code !== 124) {
      expect(lost.code).toBe(69);
      expect(lost.stdout + lost.stderr).toMatch(/--device \/dev\/net\/tun/);
    }
    const clash = await run(environment({ DETOUR_VPN_NETWORK: '10.87.0.0/16' }));
    expect(clash.code).toBe(78);
    expect(clash.stdout + clash.stderr).toMatch(/10\.87\.0\.0\/16 overlaps with 10\.87\.\d\.\d\/30/);
    expect(await hostState(set.router)).toEqual(untouched);
  });
});
