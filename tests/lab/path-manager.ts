/**
 * What a path manager answers and reports: the same cases for the real kernel and for the fake one, so that the fake can
 * be believed. As a program it runs them against the kernel of its network namespace and prints a JSON line per case:
 *   node path-manager.ts <server address> <port> <second local address>
 */
import assert from 'node:assert/strict';
import { spawn } from 'node:child_process';
import { createInterface } from 'node:readline';
import type { ConnectionSample, Diag } from '../../appliance/kernel/diag.ts';
import { openDiag } from '../../appliance/kernel/diag.ts';
import { openPathManager, type PathEvent, type PathManager } from '../../appliance/kernel/mptcp.ts';
import { ownNamespace } from '../../appliance/kernel/namespaces.ts';
import { type Address, type Endpoint, formatEndpoint, parseAddress } from '../../appliance/protocol/address.ts';
import { waitUntil } from './netns.ts';

/** A client host with one server that accepts two extra subflows. */
export type Bench = {
  readonly manager: PathManager;
  readonly diag: Diag;
  readonly events: readonly PathEvent[];
  readonly server: Endpoint;
  /** A local address besides the one connections use. */
  readonly second: Address;
  /** An application connects and says nothing yet. */
  connect(): Promise<void>;
  /** It sends its first bytes. */
  speak(): Promise<void>;
  /** It closes. */
  close(): Promise<void>;
  /** Lets time pass until there is such an event that no case has seen yet. */
  next<K extends PathEvent['kind']>(kind: K): Promise<PathEvent & { readonly kind: K }>;
};

const rejects = async (task: Promise<void>, code: string): Promise<void> => {
  const thrown: unknown = await task.then(
    () => 'nothing',
    (error: unknown) => error,
  );
  assert.equal(thrown instanceof Error && 'code' in thrown ? thrown.code : thrown, code);
};

async function established(bench: Bench) {
  await bench.connect();
  await bench.next('created');
  await bench.speak();
  const { token, local, remote } = await bench.next('established');
  const join = (localId: number, from: Address) =>
    bench.manager.subflowCreate({ token, localId, local: from, remote, backup: false });
  return { token, local, remote, join };
}

const sampleOf = async (bench: Bench, token: number): Promise<ConnectionSample | undefined> =>
  (await bench.diag.connections()).find((one) => one.token === token);

export const CASES: Readonly<Record<string, (bench: Bench) => Promise<void>>> = {
  'an address is announced under an id of its own other than 0, again with it, and taken back once': async (bench) => {
    const { token, remote } = await established(bench);
    const { manager } = bench;
    await rejects(manager.announce(token, 0, remote.address), 'EINVAL');
    await rejects(manager.withdraw(token, 7), 'EINVAL');
    await manager.announce(token, 7, bench.second);
    await manager.announce(token, 7, bench.second);
    await rejects(manager.announce(token, 6, bench.second), 'EINVAL');
    await manager.withdraw(token, 7);
    await rejects(manager.withdraw(token, 7), 'EINVAL');
    await rejects(manager.announce(token + 1, 7, bench.second), 'EINVAL');
  },
  'a connection is created, then established with its first data, and closed without a word about its subflows': async (
    bench,
  ) => {
    const { token, local, remote, join } = await established(bench);
    assert.equal(formatEndpoint(remote), formatEndpoint(bench.server));
    await join(0, local.address);
    await bench.next('subflow-established');
    await bench.close();
    assert.equal((await bench.next('closed')).token, token);
    assert.deepEqual(
      bench.events.filter((event) => event.kind === 'subflow-closed' && event.token === token),
      [],
    );
  },
  'before ESTABLISHED no subflow can be created, and the diagnosis tells whether it was': async (bench) => {
    const isFully = async (token: number): Promise<boolean | undefined> =>
      (await sampleOf(bench, token))?.subflows[0]?.fullyEstablished;
    await bench.connect();
    const { token, local, remote } = await bench.next('created');
    await rejects(
      bench.manager.subflowCreate({ token, localId: 0, local: local.address, remote, backup: false }),
      'ENOTCONN',
    );
    assert.equal(await isFully(token), false);
    await bench.speak();
    await bench.next('established');
    assert.equal(await isFully(token), true);
    await bench.close();
  },
  'an unknown token is EINVAL': async (bench) => {
    const { local, remote, token } = await established(bench);
    const unknown = (token ^ 1) >>> 0;
    await rejects(
      bench.manager.subflowCreate({ token: unknown, localId: 0, local: local.address, remote, backup: false }),
      'EINVAL',
    );
    await rejects(bench.manager.subflowDestroy(unknown, { local, remote }), 'EINVAL');
    await bench.close();
  },
  'a join is reported with its ends and its id, and can be destroyed': async (bench) => {
    const { token, remote, join } = await established(bench);
    await join(7, bench.second);
    const joined = await bench.next('subflow-established');
    assert.equal(joined.token, token);
    assert.equal(joined.localId, 7);
    assert.deepEqual(joined.local.address, bench.second);
    assert.equal(joined.error, 0);
    await bench.manager.subflowDestroy(token, joined);
    const closed = await bench.next('subflow-closed');
    assert.equal(formatEndpoint(closed.local), formatEndpoint(joined.local));
    await rejects(bench.manager.subflowDestroy(token, { local: { address: bench.second, port: 9 }, remote }), 'ESRCH');
    await bench.close();
  },
  'a subflow ended from outside is reported, and its connection lives on': async (bench) => {
    const { token, join } = await established(bench);
    await join(7, bench.second);
    const joined = await bench.next('subflow-established');
    await bench.diag.abort(joined);
    const closed = await bench.next('subflow-closed');
    assert.equal(formatEndpoint(closed.local), formatEndpoint(joined.local));
    assert.equal((await sampleOf(bench, token))?.subflows.length, 1);
    await rejects(bench.diag.abort(joined), 'ENOENT');
    await bench.close();
  },
  'one local address has one id': async (bench) => {
    const { join } = await established(bench);
    await join(7, bench.second);
    await bench.next('subflow-established');
    await rejects(join(8, bench.second), 'EINVAL');
    await bench.close();
  },
  'above its limit the server closes a join right after it was established, without an error': async (bench) => {
    const { local, join } = await established(bench);
    for (let i = 0; i < 3; i++) {
      await join(0, local.address);
      await bench.next('subflow-established');
    }
    const closed = await bench.next('subflow-closed');
    assert.equal(closed.error, 0);
    await bench.close();
  },
  'a reading shares what did not change since the last one': async (bench) => {
    const { token } = await established(bench);
    const quiet = await waitUntil(
      async () => {
        const [first, second] = [await sampleOf(bench, token), await sampleOf(bench, token)];
        return first !== undefined && first === second && second;
      },
      { deadlineMs: 5_000, what: 'two readings to be one object' },
    );
    await bench.speak();
    await waitUntil(
      async () => {
        const now = await sampleOf(bench, token);
        // The segment may be on its way yet, which is a change, too.
        return now !== quiet && now?.subflows[0]?.bytesAcked !== quiet.subflows[0]?.bytesAcked;
      },
      { deadlineMs: 5_000, what: 'a reading to show what was sent' },
    );
    await bench.close();
  },
  'the diagnosis shows the same': async (bench) => {
    const { token, local, remote, join } = await established(bench);
    await join(7, bench.second);
    const joined = await bench.next('subflow-established');
    const sample = await sampleOf(bench, token);
    assert.ok(sample);
    assert.equal(sample.initiated, true);
    assert.equal(formatEndpoint(sample.local), formatEndpoint(local));
    assert.equal(formatEndpoint(sample.remote), formatEndpoint(remote));
    const flows = sample.subflows.map(
      (one) => `${formatEndpoint(one.local)} ${one.joined} ${one.localId} ${one.established}`,
    );
    assert.deepEqual(
      flows.sort(),
      [`${formatEndpoint(local)} false 0 true`, `${formatEndpoint(joined.local)} true 7 true`].sort(),
    );
    await bench.close();
    await bench.next('closed');
    // The kernel tells before the last subflow is out of its table.
    await waitUntil(async () => (await sampleOf(bench, token)) === undefined, {
      deadlineMs: 5_000,
      what: 'a closed connection to be gone from the diagnosis',
    });
  },
};

/** One that is played by a small program for the application and by this kernel. */
async function kernelBench(server: Endpoint, second: Address): Promise<Bench & { end(): void }> {
  const events: PathEvent[] = [];
  const seen = new Set<PathEvent>();
  const manager = await openPathManager(ownNamespace, (event) => events.push(event));
  const text = server.address.family === 4 ? 'AF_INET' : 'AF_INET6';
  const [host, port] = [formatEndpoint(server).replace(/:\d+$/, '').replace(/[[\]]/g, ''), server.port];
  const program = spawn('python3', [
    '-uc',
    `
import socket, sys
s = None
for line in sys.stdin:
    word = line.strip()
    if word == 'connect':
        s = socket.socket(socket.${text}, socket.SOCK_STREAM, 262)
        s.connect(('${host}', ${port}))
    elif word == 'speak':
        s.sendall(b'x')
    elif word == 'close':
        s.close()
    print(word)
`,
  ]);
  const answers = createInterface({ input: program.stdout })[Symbol.asyncIterator]();
  const say = async (word: string): Promise<void> => {
    program.stdin.write(`${word}\n`);
    const { value } = await answers.next();
    assert.equal(value, word);
  };
  return {
    manager,
    diag: openDiag(ownNamespace),
    events,
    server,
    second,
    connect: () => say('connect'),
    speak: () => say('speak'),
    close: () => say('close'),
    async next(kind) {
      const found = await waitUntil(() => events.find((event) => event.kind === kind && !seen.has(event)), {
        deadlineMs: 5_000,
        what: `${kind}; there were ${events.map((event) => event.kind).join(', ')}`,
      });
      seen.add(found);
      // The kind was just compared; the compiler does not follow a comparison with a variable.
      return found as PathEvent & { readonly kind: typeof kind };
    },
    end() {
      manager.close();
      program.kill();
    },
  };
}

if (import.meta.main) {
  const [host = '', port = '', local = ''] = process.argv.slice(2);
  const [address, second] = [parseAddress(host), parseAddress(local)];
  if (!address || !second) throw new Error('usage: path-manager.ts <server address> <port> <second local address>');
  for (const [name, run] of Object.entries(CASES)) {
    const bench = await kernelBench({ address, port: Number(port) }, second);
    const failure = await run(bench).then(
      () => null,
      (error: unknown) => (error instanceof Error ? error.message : String(error)),
    );
    bench.end();
    console.info(JSON.stringify({ name, failure }));
  }
  process.exit(0);
}
