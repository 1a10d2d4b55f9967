import { fileURLToPath } from 'node:url';
import { Daemon, newKey } from '../lab/daemons.ts';
import { type Host, Lab, waitUntil } from '../lab/netns.ts';
import { type Figure, note } from './figures.ts';

const CLIENTS = 10;
/** Of one client at once. A router lets it have 1,024 flows. */
const AT_ONCE = 1_000;
const BATCHES = 10;
const JOINS = CLIENTS * AT_ONCE * BATCHES;
/** 100 servers: this many ports of each of these. */
const PORTS = 25;
const ADDRESSES = ['10.89.100.1', '10.89.100.2', '10.89.100.3', '10.89.100.4'];
const SERVERS = ADDRESSES.flatMap((address) =>
  Array.from({ length: PORTS }, (_, index) => `${address}:${7_000 + index}`),
);
/** Sent on each once it has its second path. */
const BYTES = 4_096;
/** A router takes 50 SYNs a second from a client. */
const BATCH_DEADLINE_MS = 120_000;
const lab = (name: string): string => fileURLToPath(new URL(`../lab/${name}`, import.meta.url));

/**
 * 100,000 in-band joins of ten clients to a hundred servers through one router. Every join is looked up at the servers, whose kernel says which
 * connection it belongs to: it must have arrived at the address and port of that connection. And what each connection carries is told back by
 * its server, with the SHA-256.
 */
export async function measureJoins(): Promise<Figure[]> {
  await using network = await Lab.create('bench.joins');
  const [router, server] = [await network.host('router'), await network.host('server')];
  await network.link(router, server, { v4: '10.89.200.0/30' });
  await router.forward();
  const lines = ADDRESSES.map((address) => `addr add ${address}/32 dev lo\n`);
  await server.exec(['ip', '-batch', '-'], { input: lines.join('') });
  await server.route('default via 10.89.200.1');
  await router.route('10.89.100.0/24 via 10.89.200.2');
  const clients: { readonly host: Host; readonly router: string; readonly key: string }[] = [];
  for (let index = 0; index < CLIENTS; index += 1) {
    const host = await network.host(`client${index}`);
    await network.link(host, router, { v4: `10.89.${index}.0/30` });
    await host.route(`default via 10.89.${index}.2`);
    // The path manager of userspace, which joins where it is told to.
    await host.configure({ 'net.mptcp.pm_type': '1' });
    clients.push({ host, router: `10.89.${index}.2:45672`, key: newKey() });
  }
  await using daemon = await Daemon.start(router, 'router', {
    keys: clients.map(({ key }) => key).join('\n'),
    env: { DETOUR_INBAND: 'on', DETOUR_ALLOW: '10.89.100.0/24' },
  });
  const serving = server.spawn(['python3', lab('crowd.py'), 'serve', ...SERVERS]);
  await serving.waitFor('listening', 20_000);
  const empty = await elementsOf(router);
  const resident = await daemon.residentBytes();
  const found = { right: 0, astray: 0, good: 0 };
  for (let batch = 1; batch <= BATCHES; batch += 1) {
    const crowds = await Promise.all(clients.map((client) => startBatch(client)));
    await waitUntil(async () => (await joinsAt(server)).joins >= CLIENTS * AT_ONCE, {
      deadlineMs: BATCH_DEADLINE_MS,
      what: `${CLIENTS * AT_ONCE} joins`,
      everyMs: 1_000,
    });
    const { joins, astray } = await joinsAt(server);
    found.right += joins - astray;
    found.astray += astray;
    for (const { crowd } of crowds) crowd.write('\n');
    for (const { crowd, joiner } of crowds) {
      found.good += Number(/good (\d+)/.exec(await crowd.waitFor(/^good \d+$/, BATCH_DEADLINE_MS))?.[1]);
      await joiner.stop('SIGKILL');
    }
    // What is over would count against the 1,024 flows of a client for two minutes more.
    await router.exec(['conntrack', '--flush']);
    note(`joins: batch ${batch} of ${BATCHES}: ${found.right} right, ${found.astray} astray, ${found.good} told so`);
  }
  const left = (await elementsOf(router)) - empty;
  return [
    {
      name: `${JOINS} in-band joins to ${SERVERS.length} servers: astray`,
      value: found.astray,
      unit: '',
      target: { atMost: 0 },
    },
    { name: '... at the right server', value: found.right, unit: '', target: { atLeast: JOINS } },
    { name: '... whose connection carried all that was sent', value: found.good, unit: '', target: { atLeast: JOINS } },
    {
      name: "... elements of the router's sets afterwards",
      value: left,
      unit: '',
      target: { atMost: SERVERS.length },
      detail: `a few for each of ${CLIENTS} clients, fewer than servers; the daemon grew by ${(((await daemon.residentBytes()) - resident) / 2 ** 20).toFixed(1)} MB`,
    },
  ];
}

/** Opens a batch's connections, and has one join made for each. */
async function startBatch({
  host,
  router,
  key,
}: {
  readonly host: Host;
  readonly router: string;
  readonly key: string;
}) {
  const joiner = host.spawn([process.execPath, lab('inband-joiner.ts'), router, key]);
  await joiner.waitFor('ready', 20_000);
  const crowd = host.spawn(['python3', lab('crowd.py'), 'connect', String(AT_ONCE), String(BYTES), ...SERVERS]);
  await crowd.waitFor('connected', BATCH_DEADLINE_MS);
  return { joiner, crowd };
}

/** Joins that are established at the servers, and those of them that are not where the rest of their connection is. */
async function joinsAt(server: Host): Promise<{ readonly joins: number; readonly astray: number }> {
  const text = await server.exec(['ss', '-tniOH', 'state', 'established']);
  const homes = new Map<string, string>();
  const joins: { readonly token: string; readonly at: string }[] = [];
  for (const line of text.split('\n')) {
    const match = /^\d+\s+\d+\s+(\S+)\s+\S+.* tcp-ulp-mptcp flags:(\S*) token:\w+\(id:\d+\)\/(\w+)\(/.exec(line);
    const [, at, flags = '', token] = match ?? [];
    if (at === undefined || token === undefined) continue;
    // J, j: this subflow joined; linux/mptcp.h, MPTCP_SUBFLOW_FLAG_JOIN_REM and _LOC.
    if (/j/i.test(flags)) joins.push({ token, at });
    else homes.set(token, at);
  }
  return { joins: joins.length, astray: joins.filter(({ token, at }) => homes.get(token) !== at).length };
}

/** Elements of all sets and maps of a host's ruleset. */
export async function elementsOf(router: Host): Promise<number> {
  const ruleset: { nftables: { set?: { elem?: unknown[] }; map?: { elem?: unknown[] } }[] } = JSON.parse(
    await router.exec(['nft', '--json', 'list', 'ruleset']),
  );
  return ruleset.nftables.reduce((sum, { set, map }) => sum + ((set ?? map)?.elem?.length ?? 0), 0);
}
