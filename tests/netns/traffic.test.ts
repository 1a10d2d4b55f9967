import { describe, expect, it } from 'vitest';
import { type Host, Lab, type Link, requireRoot, waitUntil } from '../lab/netns.ts';
import {
  expectedSha256,
  holdConnections,
  startFlows,
  startMessages,
  startServer,
  startTransfer,
} from '../lab/traffic.ts';

const BYTES = 4_000_000;

describe.runIf(requireRoot('tests of the traffic programs'))('the traffic programs', () => {
  it('transfers over MPTCP and says so, over both families and in both directions', async () => {
    await using lab = await Lab.create('traffic.mptcp');
    const { client, server } = await pair(lab);
    await startServer(server);
    for (const to of ['10.78.1.2:5000', '[fd78:1::2]:5000']) {
      for (const direction of ['up', 'down'] as const) {
        const result = await startTransfer(client, { to, bytes: BYTES, seed: to, direction }).result;
        expect(result).toMatchObject({ direction, bytes: BYTES, sha256: expectedSha256(to, BYTES), mptcp: true });
        // More than the payload by the header of an upload, and by what MPTCP sent twice to be safe.
        expect(result.paths).toHaveLength(1);
        expect(result.paths[0]?.bytes).toBeGreaterThanOrEqual(BYTES);
        expect(result.paths[0]?.bytes).toBeLessThan(BYTES * 1.2);
        expect(result.slots.reduce((sum, slot) => sum + slot, 0)).toBe(BYTES);
      }
    }
  });

  it('tells plain TCP and a fallback from MPTCP', async () => {
    await using lab = await Lab.create('traffic.tcp');
    const { client, server } = await pair(lab);
    await startServer(server, { port: 5000 });
    await startServer(server, { port: 5001, transport: 'tcp' });
    const plain = startTransfer(client, { to: '10.78.1.2:5000', bytes: BYTES, transport: 'tcp' });
    const fallback = startTransfer(client, { to: '10.78.1.2:5001', bytes: BYTES, direction: 'down' });
    for (const result of [await plain.result, await fallback.result]) {
      expect(result).toMatchObject({ mptcp: false, sha256: expectedSha256('detour', BYTES) });
      expect(result.paths).toHaveLength(1);
    }
  });

  it('attributes bytes to the subflow they came over, and sees a stall', async () => {
    await using lab = await Lab.create('traffic.paths');
    const { client, server, link } = await pair(lab, 20);
    await lab.link(client, server, { v4: '10.78.2.0/30', rateMbit: 20, devA: 'second', devB: 'second' });
    await client.exec(['ip', 'mptcp', 'endpoint', 'add', '10.78.2.1', 'dev', 'second', 'subflow']);
    await client.exec(['ip', 'rule', 'add', 'from', '10.78.2.1', 'lookup', '77']);
    await client.exec(['ip', 'route', 'add', 'default', 'via', '10.78.2.2', 'dev', 'second', 'table', '77']);
    await startServer(server);
    const transfer = startTransfer(client, { to: '10.78.1.2:5000', bytes: 10_000_000 });
    const result = await transfer.result;
    expect(result.sha256).toBe(expectedSha256('detour', 10_000_000));
    // More than one of them can carry.
    expect(result.mbps).toBeGreaterThan(20);
    expect(result.paths.map((path) => path.remote).toSorted()).toEqual(['10.78.1.1', '10.78.2.1']);
    const total = result.paths.reduce((sum, path) => sum + path.bytes, 0);
    expect(total).toBeGreaterThanOrEqual(10_000_000);
    for (const path of result.paths) expect(path.bytes / total).toBeGreaterThan(0.3);
    expect(result.series.length).toBeGreaterThan(10);

    const download = { to: '10.78.1.2:5000', bytes: 6_000_000, direction: 'down', transport: 'tcp' } as const;
    const stalled = startTransfer(client, download);
    await stalled.program.waitFor(/"progress","ms":[\d.]+,"bytes":[1-4]\d{6},/);
    await link.blackhole();
    const since = performance.now();
    await waitUntil(() => performance.now() - since > 600, { deadlineMs: 2_000, what: 'the outage to be long enough' });
    await link.restore();
    const outcome = await stalled.result;
    expect(outcome.longestStallMs).toBeGreaterThan(500);
    expect(outcome.sha256).toBe(expectedSha256('detour', 6_000_000));
  }, 30_000);

  it('ends a transfer by time, and still knows that what arrived was sent', async () => {
    await using lab = await Lab.create('traffic.timed');
    const { client, server } = await pair(lab, 20);
    await startServer(server);
    for (const direction of ['up', 'down'] as const) {
      const result = await startTransfer(client, { to: '10.78.1.2:5000', bytes: 1e12, seconds: 1, direction }).result;
      expect(result.ms).toBeCloseTo(1000);
      expect(result.slots).toHaveLength(20);
      expect(result.bytes).toBeGreaterThan(0);
      expect(result.slots.reduce((sum, slot) => sum + slot, 0)).toBe(result.bytes);
      expect(result.sha256).toBe(expectedSha256('detour', result.bytes));
    }
    // Nothing is left of them that would disturb the next.
    const { completions } = await startFlows(client, { to: '10.78.1.2:5000', count: 3, bytes: 10_000 }).result;
    expect(completions).toHaveLength(3);
  });

  it('fails with a reason when nobody listens', async () => {
    await using lab = await Lab.create('traffic.nobody');
    const { client } = await pair(lab);
    await expect(startTransfer(client, { to: '10.78.1.2:5000', bytes: 1 }).result).rejects.toThrow(/ECONNREFUSED/);
  });

  it('measures the round trip of messages', async () => {
    await using lab = await Lab.create('traffic.messages');
    const { client, server } = await pair(lab);
    await startServer(server);
    const { latencies, longestMs } = await startMessages(client, { to: '10.78.1.2:5000', count: 20, everyMs: 10 })
      .result;
    expect(latencies).toHaveLength(20);
    expect(longestMs).toBe(Math.max(...latencies));
    expect(longestMs).toBeGreaterThan(0);
  });

  it('holds a thousand established MPTCP connections', async () => {
    await using lab = await Lab.create('traffic.hold');
    const { client, server } = await pair(lab);
    const listener = await startServer(server);
    const holder = await holdConnections(client, { to: '10.78.1.2:5000', count: 1000 });
    expect((await client.exec(['ss', '-MnH', 'state', 'established'])).trim().split('\n')).toHaveLength(1000);
    holder.write('check\n');
    expect(await holder.waitFor('"alive"', 20_000)).toBe('{"event":"alive","count":1000}');
    await listener.stop('SIGKILL');
    holder.write('check\n');
    await waitUntil(() => holder.lines.includes('{"event":"alive","count":0}'), {
      deadlineMs: 20_000,
      what: 'the connections to be found dead',
    });
  }, 60_000);
});

async function pair(lab: Lab, rateMbit?: number): Promise<{ client: Host; server: Host; link: Link }> {
  const [client, server] = [await lab.host('client'), await lab.host('server')];
  const rate = rateMbit === undefined ? {} : { rateMbit };
  const link = await lab.link(client, server, { v4: '10.78.1.0/30', v6: 'fd78:1::/64', ...rate });
  return { client, server, link };
}
