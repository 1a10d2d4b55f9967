import { randomBytes } from 'node:crypto';
import { fileURLToPath } from 'node:url';
import { describe, expect, it } from 'vitest';
import { type Host, Lab, type Running, requireRoot, waitUntil } from '../lab/netns.ts';

const root = (path: string): string => fileURLToPath(new URL(`../../${path}`, import.meta.url));
const makeKey = (id: string): string => `${id}:${randomBytes(32).toString('base64url')}`;
const KEY = makeKey('0a0b0c0d');
const OTHER_KEY = makeKey('1a1b1c1d');

type Answer = { result: string; port: number; lifetime: number; epoch: string } | null;

/** client --- router --- server, without forwarding until the router sets it. */
async function stage(lab: Lab): Promise<{ client: Host; router: Host; server: Host }> {
  const [client, router, server] = [await lab.host('client'), await lab.host('router'), await lab.host('server')];
  await lab.link(client, router, { v4: '10.88.1.0/30', v6: 'fd88:1::/64', devA: 'c0', devB: 'r0' });
  await lab.link(router, server, { v4: '10.88.2.0/30', v6: 'fd88:2::/64', devA: 'r1', devB: 's0' });
  return { client, router, server };
}

const environment = (host: Host, over: Readonly<Record<string, string>>): Record<string, string> => ({
  DETOUR_KEYS: KEY,
  DETOUR_ALLOW: '10.88.2.0/30,fd88:2::/64',
  DETOUR_HTTP: 'off',
  DETOUR_SOCKET: `/run/${host.namespace}.sock`,
  ...over,
});

async function start(host: Host, over: Readonly<Record<string, string>> = {}): Promise<Running> {
  const program = host.spawn([process.execPath, root('appliance/cli.ts'), 'router'], { env: environment(host, over) });
  await program.waitFor('"event":"started"', 20_000);
  return program;
}

async function speak(client: Host, commands: readonly string[], key = KEY): Promise<Answer[]> {
  const said = await client.exec([
    process.execPath,
    root('tests/lab/speaker.ts'),
    '10.88.1.2:45672',
    key,
    'hello',
    ...commands,
  ]);
  return said
    .trim()
    .split('\n')
    .slice(1)
    .map((line) => JSON.parse(line));
}

/** All that a router may touch on its host. */
async function state(host: Host): Promise<Record<string, string>> {
  const sysctls = await host.exec([
    'sh',
    '-c',
    'sysctl -a 2>/dev/null | grep -E "forward|redirects|accept_ra( |=)|accept_ra =" | sort',
  ]);
  const firewall = async (program: string): Promise<string> =>
    host.exec([program, '-S']).catch((error: unknown) => String(error).slice(0, 20));
  const nft = await host.exec(['nft', '-s', 'list', 'ruleset']);
  return { sysctls, nft, iptables: nft.includes('table ip filter') ? await firewall('iptables-nft') : '' };
}

/** Somebody else who listens where the router would. */
async function takeControlPort(host: Host): Promise<Running> {
  const holder = host.spawn([
    process.execPath,
    '-e',
    "require('dgram').createSocket('udp6').bind(45672, () => console.log('up'))",
  ]);
  await holder.waitFor('up');
  return holder;
}

const joins = async (client: Host, port: number, sport: number): Promise<void> => {
  await client.exec([
    'python3',
    root('tests/lab/packets.py'),
    'tcp',
    '10.88.1.1',
    '10.88.1.2',
    `${sport}`,
    `${port}`,
    'S',
    'join',
  ]);
};

describe.runIf(requireRoot('tests of the router in network namespaces'))('the life of a router', () => {
  it('killed and started again it knows its leases, ports and epoch; cleaned up it was never there', async () => {
    await using lab = await Lab.create('router.life');
    const { client, router } = await stage(lab);
    const before = await state(router);
    const first = await start(router);
    const [granted] = await speak(client, ['lease=10.88.2.2:5000,20007']);
    expect(granted).toMatchObject({ result: 'OK', port: 20_007 });
    first.kill('SIGKILL');
    await first.exited;
    const second = await start(router);
    const [again] = await speak(client, ['lease=10.88.2.2:5000,0,60']);
    expect(again).toMatchObject({ result: 'OK', port: 20_007, epoch: granted?.epoch });
    expect(again?.lifetime).toBeGreaterThan(500);
    expect(await second.stop()).toEqual({ code: 0, signal: null });
    // `keep`: leases and rules stay for the flows that use them.
    expect(await router.exec(['nft', 'list', 'map', 'inet', 'detour', 'leases4'])).toContain('20007');
    await router.exec([process.execPath, root('appliance/cli.ts'), 'cleanup', 'router'], {
      env: environment(router, {}),
    });
    expect(await state(router)).toEqual(before);
    const third = await start(router, { DETOUR_ON_EXIT: 'cleanup' });
    const [fresh] = await speak(client, ['lease=10.88.2.2:5000']);
    expect(fresh?.epoch).not.toBe(granted?.epoch);
    await third.stop();
    expect(await state(router)).toEqual(before);
  });

  it('puts back what others flush, leases included', async () => {
    await using lab = await Lab.create('router.flush');
    const { client, router } = await stage(lab);
    const program = await start(router);
    const [granted] = await speak(client, ['lease=10.88.2.2:5000']);
    await router.exec(['nft', 'flush', 'ruleset']);
    // The next lease finds the table gone; without one, the half-minute look does.
    const [other] = await speak(client, ['lease=10.88.2.2:5001']);
    expect(other).toMatchObject({ result: 'OK', epoch: granted?.epoch });
    await program.waitFor('rules-restored', 5_000);
    const map = await router.exec(['nft', 'list', 'map', 'inet', 'detour', 'leases4']);
    expect(map).toContain(`. ${granted?.port} `);
    expect(map).toContain(`. ${other?.port} `);
  });

  it('takes the leases and flows of a revoked key away, and nobody else’s', async () => {
    await using lab = await Lab.create('router.revoke');
    const { client, router, server } = await stage(lab);
    // A server that says nothing, so that the flows stay half-open.
    await server.nft(
      'add table inet mute\nadd chain inet mute in { type filter hook input priority 0; }\nadd rule inet mute in tcp dport 5000 drop\n',
    );
    const first = await start(router, { DETOUR_KEYS: `${KEY},${OTHER_KEY}` });
    const [mine] = await speak(client, ['lease=10.88.2.2:5000']);
    const [theirs] = await speak(client, ['lease=10.88.2.2:5000'], OTHER_KEY);
    if (!mine || !theirs) throw new Error('no leases');
    await joins(client, mine.port, 33_001);
    await joins(client, theirs.port, 33_002);
    const flows = (): Promise<string> => router.exec(['cat', '/proc/net/nf_conntrack']);
    await waitUntil(async () => (await flows()).includes('sport=33001') && (await flows()).includes('sport=33002'), {
      deadlineMs: 3_000,
      what: 'both flows to be tracked',
    });
    const status = JSON.parse(
      await router.exec([process.execPath, root('appliance/cli.ts'), 'status', '--json'], {
        env: environment(router, { DETOUR_KEYS: `${KEY},${OTHER_KEY}` }),
      }),
    );
    expect(status).toMatchObject({ flowCount: 2 });
    expect(status.flows).toContainEqual({
      client: '10.88.1.1:33001',
      port: mine.port,
      destination: '10.88.2.2:5000',
      state: 'SYN_SENT',
    });
    await first.stop();
    await start(router, { DETOUR_KEYS: KEY });
    const map = await router.exec(['nft', 'list', 'map', 'inet', 'detour', 'leases4']);
    expect(map).toContain(`. ${mine.port} `);
    expect(map).not.toContain(`. ${theirs.port} `);
    expect(await flows()).toContain('sport=33001');
    expect(await flows()).not.toContain('sport=33002');
  });

  it.each(['iptables-nft', 'iptables-legacy'])(
    'opens its own flows a way through a FORWARD that drops (%s), and closes it again',
    async (iptables) => {
      await using lab = await Lab.create('router.forward');
      const { client, router, server } = await stage(lab);
      // As Docker leaves a host.
      for (const args of [
        '-N DOCKER-USER',
        '-A DOCKER-USER -j RETURN',
        '-A FORWARD -j DOCKER-USER',
        '-P FORWARD DROP',
      ]) {
        await router.exec([iptables, ...args.split(' ')]);
      }
      const listing = (): Promise<string> => router.exec([iptables, '-S']);
      const before = await listing();
      const program = await start(router, { DETOUR_ON_EXIT: 'cleanup' });
      expect(await listing()).toContain(
        '-A DOCKER-USER -m connmark --mark 0xd7000000/0xff000000 -m comment --comment detour -j ACCEPT',
      );
      const [granted] = await speak(client, ['lease=10.88.2.2:5000']);
      await server.nft(
        'add table inet watch\nadd chain inet watch in { type filter hook prerouting priority -400; }\nadd rule inet watch in tcp dport 5000 counter\n',
      );
      await joins(client, granted?.port ?? 0, 34_000);
      await waitUntil(async () => /packets [1-9]/.test(await server.exec(['nft', 'list', 'table', 'inet', 'watch'])), {
        deadlineMs: 3_000,
        what: 'the join to pass',
      });
      // Somebody reloads the firewall: the rule comes back with the next look, and only once.
      await router.exec([iptables, '-F', 'DOCKER-USER']);
      await waitUntil(async () => (await listing()).includes('--comment detour'), {
        deadlineMs: 45_000,
        everyMs: 500,
        what: 'the rule to come back',
      });
      expect((await listing()).split('--comment detour')).toHaveLength(2);
      await router.exec([iptables, '-A', 'DOCKER-USER', '-j', 'RETURN']);
      await program.stop();
      expect(await listing()).toBe(before);
    },
  );

  it.each([
    ['mptcp', 'capable', true],
    ['mptcp', 'join', true],
    ['mptcp', 'none', false],
    ['tcp', 'none', true],
    ['join', 'capable', false],
  ])('with DETOUR_RELAY=%s a SYN with %s passes: %s', async (relay, option, passes) => {
    await using lab = await Lab.create('router.relay');
    const { client, router, server } = await stage(lab);
    await start(router, { DETOUR_RELAY: relay });
    const [granted] = await speak(client, ['lease=10.88.2.2:5000']);
    await server.nft(
      'add table inet watch\nadd chain inet watch in { type filter hook prerouting priority -400; }\nadd rule inet watch in tcp dport 5000 tcp flags syn counter\n',
    );
    const packet = ['tcp', '10.88.1.1', '10.88.1.2', '35000', `${granted?.port}`, 'S', option];
    await client.exec(['python3', root('tests/lab/packets.py'), ...packet]);
    const counter = async (name: string): Promise<number> =>
      Number(/packets (\d+)/.exec(await router.exec(['nft', 'list', 'counter', 'inet', 'detour', name]))?.[1]);
    await waitUntil(async () => (await counter(passes ? 'relayed_syn' : 'syn_not_relayed')) === 1, {
      deadlineMs: 3_000,
      what: 'the SYN to be counted',
    });
    const arrived = await server.exec(['nft', 'list', 'table', 'inet', 'watch']);
    expect(/packets 1/.test(arrived)).toBe(passes);
  });

  it.each([
    ['has no address', 69, { alone: true, taken: false }],
    ['finds its control port taken', 78, { alone: false, taken: true }],
  ])('that %s at its first start was never there', async (_, code, { alone, taken }) => {
    await using lab = await Lab.create('router.stillborn');
    const router = alone ? await lab.host('router') : (await stage(lab)).router;
    for (const args of ['-N DOCKER-USER', '-A FORWARD -j DOCKER-USER', '-P FORWARD DROP'])
      await router.exec(['iptables-nft', ...args.split(' ')]);
    if (taken) await takeControlPort(router);
    const before = await state(router);
    const ended = await router.try([process.execPath, root('appliance/cli.ts'), 'router'], {
      env: environment(router, {}),
    });
    expect({ code: ended.code, said: ended.stderr }).toMatchObject({ code });
    // It got far enough to have something to take back.
    expect(ended.stdout).toContain('firewall-rule-added');
    expect(await state(router)).toEqual(before);
  });

  it('that cannot start leaves what an earlier one put there', async () => {
    await using lab = await Lab.create('router.heir');
    const { client, router } = await stage(lab);
    const first = await start(router);
    const [granted] = await speak(client, ['lease=10.88.2.2:5000']);
    first.kill('SIGKILL');
    await first.exited;
    const port = await takeControlPort(router);
    const second = await router.try([process.execPath, root('appliance/cli.ts'), 'router'], {
      env: environment(router, {}),
    });
    expect(second.code).toBe(78);
    await port.stop();
    await start(router);
    expect(await speak(client, ['lease=10.88.2.2:5000'])).toMatchObject([
      { result: 'OK', port: granted?.port, epoch: granted?.epoch },
    ]);
  });

  it('refuses ports that are somebody else’s, and names free ones', async () => {
    await using lab = await Lab.create('router.ports');
    const { router } = await stage(lab);
    const run = (ports: string) =>
      router.try([process.execPath, root('appliance/cli.ts'), 'router'], {
        env: environment(router, { DETOUR_PORTS: ports }),
      });
    const ephemeral = await run('32000-33000');
    expect(ephemeral.code).toBe(78);
    expect(ephemeral.stderr + ephemeral.stdout).toMatch(/32768-60999.*DETOUR_PORTS=\d+-\d+/);
    const listener = router.spawn([
      process.execPath,
      '-e',
      "require('net').createServer().listen(25000, () => console.log('up'))",
    ]);
    await listener.waitFor('up');
    const taken = await run('20000-29999');
    expect(taken.code).toBe(78);
    expect(taken.stderr + taken.stdout).toMatch(/TCP port 25000.*DETOUR_PORTS=/);
  });
});
