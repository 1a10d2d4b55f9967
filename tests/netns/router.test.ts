import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { type Running, requireRoot, waitUntil } from '../lab/netns.ts';
import { CLIENT, connect, type Family, listen, ROUTER, root, SERVER, Stage } from './stage.ts';

const FAMILIES: readonly Family[] = ['ip', 'ip6'];

describe.runIf(requireRoot('tests of the router in network namespaces'))('the router in a real kernel', () => {
  let stage: Stage;
  let program: Running;
  beforeAll(async () => {
    stage = await Stage.create('router.rules');
    program = await stage.start();
    for (const family of FAMILIES) await listen(stage.server, SERVER[family], 5000);
  });
  afterAll(async () => stage?.[Symbol.asyncDispose]());

  describe.each(FAMILIES)('over %s', (family) => {
    const client = CLIENT[family];
    const router = ROUTER[family];
    const at = (port: number): string => (family === 'ip' ? `${SERVER.ip}:${port}` : `[${SERVER.ip6}]:${port}`);

    it('relays a SYN with MP_JOIN to the leased server, from its own address', async () => {
      const port = await stage.lease(at(5001), family);
      const source = family === 'ip' ? '10.87.2.1' : 'fd87:2::1';
      const seen = await stage.watch(
        stage.server,
        `${family} saddr ${source} tcp dport 5001 tcp flags & (syn|ack) == syn tcp option mptcp subtype 1`,
      );
      await stage.packets('tcp', client, router, 30001, port, 'S', 'join');
      await waitUntil(async () => (await seen()) === 1, { deadlineMs: 3_000, what: 'the join to arrive' });
    });

    it.each(['none', 'capable', 'other', 'joinlast'])('drops a SYN with option %s before conntrack', async (option) => {
      const port = await stage.lease(at(5002), family);
      const seen = await stage.watch(stage.server, 'tcp dport 5002');
      const entries = await stage.conntrack();
      await stage.grows('syn_not_relayed', 3, () => stage.packets('tcp', client, router, 30100, port, 'S', option, 3));
      expect(await seen()).toBe(0);
      expect(await stage.conntrack()).toBeLessThanOrEqual(entries);
    });

    it('drops a SYN to a port without a lease before conntrack, and one from another address', async () => {
      const port = await stage.lease(at(5003), family);
      const entries = await stage.conntrack();
      await stage.grows('syn_without_lease', 20, () =>
        stage.packets('tcp', client, router, 30200, port === 20000 ? 20001 : port - 1, 'S', 'join', 20),
      );
      expect(await stage.conntrack()).toBeLessThanOrEqual(entries);
      const other = family === 'ip' ? '10.87.1.9' : 'fd87:1::9';
      await stage.client.exec([
        'ip',
        'addr',
        'replace',
        `${other}/${family === 'ip' ? 32 : 128}`,
        'dev',
        'c0',
        'preferred_lft',
        '0',
      ]);
      await stage.grows('syn_without_lease', 1, () => stage.packets('tcp', other, router, 30300, port, 'S', 'join'));
    });

    it('resets a server that answers a join with plain TCP, and tells the client nothing', async () => {
      const port = await stage.lease(at(5000), family);
      const heard = await stage.watch(stage.client, `tcp sport ${port}`);
      const reset = await stage.watch(stage.server, 'tcp dport 5000 tcp flags & rst == rst');
      await stage.grows('answer_refused', 1, () => stage.packets('tcp', client, router, 30400, port, 'S', 'join'));
      await waitUntil(async () => (await reset()) >= 1, { deadlineMs: 3_000, what: 'the reset to reach the server' });
      expect(await heard()).toBe(0);
    });

    it('does not let plain TCP through, in no way', async () => {
      const port = await stage.lease(at(5000), family);
      expect(await connect(stage.client, router, port)).toBe('timeout');
    });

    it('does not pass segments of connections that began without it', async () => {
      const port = await stage.lease(at(5004), family);
      const seen = await stage.watch(stage.server, 'tcp dport 5004');
      for (const flags of ['A', 'PA', 'F', 'R', 'SA', 'SF', 'SR']) {
        await stage.packets('tcp', client, router, 30500, port, flags, 'join');
      }
      await stage.settled();
      expect(await seen()).toBe(0);
    });

    it('leaves traffic that passes through alone, whatever its ports', async () => {
      const port = await stage.lease(at(5000), family);
      await listen(stage.server, SERVER[family], port, port + 1, 45672);
      // The client's own traffic to the very port it has a lease for, and to the control port, on another host.
      for (const transit of [port, port + 1, 45672]) {
        expect(await connect(stage.client, SERVER[family], transit)).toBe(`port ${transit}`);
      }
      const junk = await stage.watch(stage.server, 'udp dport 45672');
      await stage.packets('udp', client, SERVER[family], 30600, 45672, '00', 5);
      await waitUntil(async () => (await junk()) === 5, { deadlineMs: 3_000, what: 'foreign UDP to pass' });
    });

    it('refuses itself as a destination, in the daemon and in the kernel', async () => {
      const own = family === 'ip' ? ['10.87.2.1', ROUTER.ip, '127.0.0.1'] : ['fd87:2::1', ROUTER.ip6, '::1'];
      const where = own.map((text) => (family === 'ip' ? `lease=${text}:5000` : `lease=[${text}]:5000`));
      for (const answer of await stage.speak(where, family)) expect(answer?.result).toBe('DENIED_DESTINATION');
      await listen(stage.router, own[0] ?? '', 6000);
      // Somebody who could write into the map would still not get in.
      const map = family === 'ip' ? 'leases4' : 'leases6';
      const port = 29990;
      await stage.router.nft(
        `add element inet detour ${map} { ${client} . ${port} timeout 60s comment "k0a0b0c0d" : ${own[0]} . 6000 }\n`,
      );
      await stage.grows('input_guarded', 1, () => stage.packets('tcp', client, router, 30700, port, 'S', 'join'));
    });

    it('denies destinations in the kernel as well', async () => {
      const map = family === 'ip' ? 'leases4' : 'leases6';
      const bad =
        family === 'ip'
          ? ['192.168.77.1', '169.254.169.254', '224.0.0.5', '10.87.1.1', '100.64.0.1']
          : ['fd00:ec2::254', 'ff02::5', '64:ff9b::a00:1', '2002:a00:1::1', '2a00::5efe:a00:1', '2001:db8::1'];
      const seen = await stage.watch(stage.server, 'tcp flags syn tcp option mptcp subtype 1 tcp dport 80');
      for (const [index, address] of bad.entries()) {
        const port = 29900 + index;
        await stage.router.nft(
          `add element inet detour ${map} { ${client} . ${port} timeout 60s comment "k0a0b0c0d" : ${address} . 80 }\n`,
        );
        await stage.packets('tcp', client, router, 30800 + index, port, 'S', 'join');
      }
      await stage.settled();
      expect(await seen()).toBe(0);
      expect(await stage.counter('destination_denied')).toBeGreaterThan(0);
      const mail = family === 'ip' ? SERVER.ip : SERVER.ip6;
      await stage.router.nft(
        `add element inet detour ${map} { ${client} . 29950 timeout 60s comment "k0a0b0c0d" : ${mail} . 25 }\n`,
      );
      await stage.grows('destination_denied', 1, () => stage.packets('tcp', client, router, 30900, 29950, 'S', 'join'));
    });

    it('limits how fast one client opens flows', async () => {
      const port = await stage.lease(at(5005), family);
      const before = await stage.counter('syn_rate');
      await stage.packets('tcp', client, router, 31000, port, 'S', 'join', 400);
      await waitUntil(async () => (await stage.counter('syn_rate')) > before + 100, {
        deadlineMs: 3_000,
        what: 'SYNs over the limit to be dropped',
      });
      // The burst is 100 and 50 more come with every second.
      expect((await stage.counter('syn_rate')) - before).toBeLessThanOrEqual(300);
    });

    it('drops control junk in the kernel and keeps it out of conntrack', async () => {
      const good = `d702${'0000'}0a0b0c0d${'00'.repeat(88)}`;
      const entries = await stage.conntrack();
      await stage.grows('control_malformed', 3, async () => {
        await stage.packets('udp', client, router, 31500, 45672, '00');
        await stage.packets('udp', client, router, 31501, 45672, good.replace('d702', 'd701'));
        await stage.packets('udp', client, router, 31502, 45672, `${good}00`);
      });
      await stage.grows('control_unknown_key', 1, () =>
        stage.packets('udp', client, router, 31503, 45672, good.replace('0a0b0c0d', '0a0b0c0e')),
      );
      const limited = await stage.counter('control_rate');
      await stage.packets('udp', client, router, 32000, 45672, good, 2000);
      await waitUntil(async () => (await stage.counter('control_rate')) > limited + 1_000, {
        deadlineMs: 5_000,
        what: 'the flood to be limited',
      });
      expect(await stage.conntrack()).toBeLessThanOrEqual(entries + 2);
    });
  });

  it('keeps the half-open flows of its clients for 20 s only, whatever the host says', async () => {
    const port = await stage.lease(`${SERVER.ip}:5006`);
    await stage.server.nft(
      'add table inet hole\nadd chain inet hole in { type filter hook input priority 0; }\nadd rule inet hole in tcp dport 5006 drop\n',
    );
    await waitUntil(
      async () => {
        await stage.packets('tcp', CLIENT.ip, ROUTER.ip, 40000, port, 'S', 'join');
        return (
          (await stage.router.exec(['cat', '/proc/net/nf_conntrack'])).includes('dport=5006') ||
          (await stage.router.exec(['cat', '/proc/net/nf_conntrack'])).includes(`dport=${port}`)
        );
      },
      { deadlineMs: 5_000, everyMs: 100, what: 'the flow to be tracked' },
    );
    const line = (await stage.router.exec(['cat', '/proc/net/nf_conntrack']))
      .split('\n')
      .find((text) => text.includes(`dport=${port} `));
    expect(Number(line?.split(/\s+/)[4])).toBeLessThanOrEqual(20);
    expect(line).toContain('mark=3607101440');
  });

  it('says nothing at all to a stranger', async () => {
    const [hello] = await Promise.all([
      stage.client
        .exec([
          process.execPath,
          root('tests/lab/speaker.ts'),
          `${ROUTER.ip}:45672`,
          `0a0b0c0d:${'A'.repeat(43)}`,
          'hello',
        ])
        .then((said) => JSON.parse(said)),
    ]);
    expect(hello).toBeNull();
    expect(program.running).toBe(true);
  });
});
