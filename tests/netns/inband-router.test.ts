import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { type Running, requireRoot, waitUntil } from '../lab/netns.ts';
import { CLIENT, KEYS, listen, ROUTER, SERVER, Stage } from './stage.ts';

/** The router's half of in-band transit, with packets that tests/lab/packets.py makes: J stands for MP_JOIN. */

/** The option of docs/protocol.md that names a server. */
function naming(address: string, port: number): string {
  const bytes = Buffer.from([253, 8, ...address.split('.').map(Number), port >> 8, port & 255]);
  return bytes.toString('hex');
}
const MSS = '020405b4';
const HERE = naming(SERVER.ip, 5001);
const OTHER_DETOUR = '10.99.0.5';

describe.runIf(requireRoot('tests of in-band transit'))('joins that name their server', () => {
  let stage: Stage;
  let program: Running;
  let port: number;
  let askedAt = Number.NEGATIVE_INFINITY;
  let source = 41_000;
  /** Joins that arrive at the server, from the router. */
  let joins: () => Promise<number>;
  /** How many packets with the option the server's host has seen. */
  let options: () => Promise<number>;

  beforeAll(async () => {
    stage = await Stage.create('router.inband');
    program = await stage.start({
      DETOUR_INBAND: 'on',
      DETOUR_ALLOW: '10.87.2.0/30,10.99.0.0/24',
      DETOUR_DENY: `${OTHER_DETOUR}/32`,
    });
    // What policy does not stop would get to the server's host.
    await stage.router.route('default via 10.87.2.2');
    await listen(stage.router, '10.87.2.1', 6000);
    await listen(stage.server, SERVER.ip, 5051, 5060);
    await stage.server.nft(
      'add table inet count\nadd counter inet count joins\nadd counter inet count options\n' +
        'add chain inet count in { type filter hook prerouting priority -400; }\n' +
        'add rule inet count in ip saddr 10.87.2.1 tcp option mptcp subtype 1 counter name joins\n' +
        'add rule inet count in tcp option @253,0,8 253 counter name options\n' +
        // A server that says nothing, not even no.
        'add chain inet count mute { type filter hook input priority 0; }\nadd rule inet count mute tcp dport 5050 drop\n',
    );
    const counted = (name: string) => async () =>
      Number(/packets (\d+)/.exec(await stage.server.exec(['nft', 'list', 'counter', 'inet', 'count', name]))?.[1]);
    joins = counted('joins');
    options = counted('options');
  });
  afterAll(async () => stage?.[Symbol.asyncDispose]());
  beforeEach(async () => {
    // It is good for two minutes.
    if (performance.now() - askedAt < 60_000) return;
    const [answer] = await stage.speak(['ping']);
    askedAt = performance.now();
    port = answer?.capabilityPort ?? 0;
    expect(port).toBeGreaterThanOrEqual(20_000);
  });
  afterEach(async () => {
    expect(await options()).toBe(0);
    expect(program.running).toBe(true);
  });

  const send = (what: string, to = port, from: string = CLIENT.ip): Promise<void> =>
    stage.packets('tcp', from, ROUTER.ip, source++, to, 'S', what);

  it('go where they say, from the address of the router, and the option does not', async () => {
    const before = await joins();
    const places = [
      [SERVER.ip, 5001],
      [SERVER.ip, 443],
      [SERVER.ip, 65_535],
    ] as const;
    for (const [address, at] of places) {
      const seen = await stage.watch(
        stage.server,
        `ip saddr 10.87.2.1 ip daddr ${address} tcp dport ${at} tcp flags & (syn|ack) == syn tcp option mptcp subtype 1 tcp option nop exists`,
      );
      await stage.grows('inband_syn', 1, () => send(`${MSS}J${naming(address, at)}`));
      await waitUntil(async () => (await seen()) === 1, { deadlineMs: 5_000, what: `the join at ${address}:${at}` });
    }
    // As a kernel writes it: 40 bytes of options, with ours before or behind the join.
    await stage.grows('inband_syn', 2, async () => {
      await send(`${MSS}0402080a0000000100000000010303${'07'}J${HERE}`);
      await send(`${HERE}J`);
    });
    await waitUntil(async () => (await joins()) === before + 5, { deadlineMs: 5_000, what: 'five joins' });
  });

  it.each([
    ['is cut off', `J0101${HERE.slice(0, 12)}`],
    ['has no room for a port', `${MSS}Jfd06${HERE.slice(4, 12)}`],
    ['is empty', `${MSS}Jfd02`],
    ['is a byte short', `${MSS}Jfd07${HERE.slice(4, 14)}`],
    ['is a byte longer', `${MSS}Jfd09${HERE.slice(4)}01`],
    ['has length 0', `${MSS}Jfd00${HERE.slice(4)}`],
    ['comes twice', `${MSS}J${HERE}${HERE}`],
    ['comes with another', `${MSS}J${HERE}${naming('10.87.2.9', 1)}`],
    ['is inside another option', `${MSS}J630a${HERE}`],
    ['is behind the end of options', `${MSS}J00${HERE}`],
    ['is missing', `${MSS}J`],
    ['comes without a join', `${MSS}${HERE}`],
    ['comes with MP_CAPABLE', `${MSS}1e040181${HERE}`],
    ['comes with MP_CAPABLE before the join', `1e040181J${HERE}`],
    ['comes with a join of another length', `1e101001${'00'.repeat(12)}${HERE}`],
    ['names port 0', `${MSS}J${naming(SERVER.ip, 0)}`],
    ['comes with data', `${MSS}J${HERE}/${'41'.repeat(100)}`],
    ['comes with one byte of data', `${MSS}J${HERE}/41`],
  ])('go nowhere when the option %s', async (_, what) => {
    const before = await joins();
    const entries = await stage.conntrack();
    await stage.grows('inband_malformed', 1, () => send(what));
    await stage.settled();
    expect(await joins()).toBe(before);
    expect(await stage.conntrack()).toBeLessThanOrEqual(entries + 1);
  });

  it('go nowhere from another address, or to a port that was guessed', async () => {
    const before = await joins();
    const entries = await stage.conntrack();
    await stage.client.exec(['ip', 'addr', 'replace', '10.87.1.9/32', 'dev', 'c0']);
    await stage.router.exec(['ip', 'route', 'replace', '10.87.1.9/32', 'dev', 'r0']);
    await stage.grows('syn_without_lease', 1, () => send(`${MSS}J${HERE}`, port, '10.87.1.9'));
    await stage.grows('syn_without_lease', 5, async () => {
      const first = port < 25_000 ? port + 1 : port - 5;
      for (let guess = first; guess < first + 5; guess++) await send(`${MSS}J${HERE}`, guess);
    });
    await stage.settled();
    expect(await joins()).toBe(before);
    expect(await stage.conntrack()).toBeLessThanOrEqual(entries + 2);
  });

  it('go nowhere through the port of a lease: what it was granted for counts', async () => {
    const leased = await stage.lease(`${SERVER.ip}:5009`);
    const seen = await stage.watch(stage.server, 'tcp dport 5009 tcp option mptcp subtype 1');
    await send(`${MSS}J${HERE}`, leased);
    await waitUntil(async () => (await seen()) === 1, { deadlineMs: 5_000, what: 'the join' });
  });

  it('cannot name what policy denies: the kernel asks after translation', async () => {
    const before = await joins();
    for (const own of ['10.87.2.1', ROUTER.ip]) {
      await stage.grows('input_guarded', 1, () => send(`${MSS}J${naming(own, 6000)}`));
    }
    const denied = ['192.168.77.1', '100.64.0.1', '10.87.1.1', '203.0.113.5', OTHER_DETOUR].map((to) =>
      naming(to, 443),
    );
    for (const what of [...denied, naming(SERVER.ip, 25)]) {
      await stage.grows('destination_denied', 1, () => send(`${MSS}J${what}`));
    }
    // Where routing already says no, or the address is nobody's: nothing arrives anywhere.
    const nowhere = ['127.0.0.1', '0.0.0.0', '169.254.169.254', '224.0.0.5', '255.255.255.255', '10.87.2.3'];
    for (const to of nowhere) await send(`${MSS}J${naming(to, 6000)}`);
    await stage.settled();
    expect(await joins()).toBe(before);
  });

  it('stay with the server that the first SYN named', async () => {
    const first = await stage.watch(stage.server, 'tcp dport 5050');
    const same = source++;
    await stage.packets('tcp', CLIENT.ip, ROUTER.ip, same, port, 'S', `${MSS}J${naming(SERVER.ip, 5050)}`);
    await waitUntil(async () => (await first()) === 1, { deadlineMs: 5_000, what: 'the join' });
    const second = await stage.watch(stage.server, 'tcp dport 5051');
    await stage.packets('tcp', CLIENT.ip, ROUTER.ip, same, port, 'S', `${MSS}J${naming(SERVER.ip, 5051)}`);
    await stage.settled();
    expect(await second()).toBe(0);
  });

  it('get no answer from a server that does not speak Multipath TCP', async () => {
    const heard = await stage.watch(stage.client, 'tcp sport >= 20000 tcp flags & (syn|ack) == (syn|ack)');
    await stage.grows('answer_refused', 1, () => send(`${MSS}J${naming(SERVER.ip, 5060)}`));
    expect(await heard()).toBe(0);
  });

  it('count against the same limit of SYNs as those to leases', async () => {
    const before = await stage.counter('syn_rate');
    await stage.packets('tcp', CLIENT.ip, ROUTER.ip, 45_000, port, 'S', `${MSS}J${naming(SERVER.ip, 5070)}`, 400);
    await waitUntil(async () => (await stage.counter('syn_rate')) > before + 50, {
      deadlineMs: 5_000,
      what: 'SYNs over the limit to be dropped',
    });
  });

  it('leaves the option of traffic alone that passes through', async () => {
    const passing = await stage.watch(stage.server, 'tcp dport 22222 tcp option @253,8,8 8');
    await stage.packets('tcp', CLIENT.ip, SERVER.ip, source++, 22_222, 'S', `${MSS}J${HERE}`);
    await waitUntil(async () => (await passing()) === 1, { deadlineMs: 5_000, what: 'the packet to pass' });
    await stage.server.exec(['nft', 'reset', 'counters', 'table', 'inet', 'count']);
  });

  it('go on after a restart of the router, and no longer when the key is gone', async () => {
    await program.stop('SIGTERM');
    program = await stage.start({ DETOUR_INBAND: 'on' });
    await stage.grows('inband_syn', 1, () => send(`${MSS}J${HERE}`));
    await program.stop('SIGTERM');
    program = await stage.start({ DETOUR_INBAND: 'on', DETOUR_KEYS: KEYS[1] });
    await stage.grows('syn_without_lease', 1, () => send(`${MSS}J${HERE}`));
  });
});
