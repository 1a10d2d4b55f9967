import { mkdtempSync, rmSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { FakeDocker } from '../fakes/docker.ts';
import { Daemon, newKey } from '../lab/daemons.ts';
import { type Host, Lab, waitUntil } from '../lab/netns.ts';
import { startServer } from '../lab/traffic.ts';
import { bridged, detourWorld } from '../lab/world.ts';
import { type Figure, median, note, quantile } from './figures.ts';

const CONTAINERS = 200;
const IDLE_MS = 60_000;
/** Connections of each round: without the agent, with it, and so on by turns. */
const CONNECTS = 200;
const ROUNDS = 25;
const SERVER_PORT = 5000;
/** `USER_HZ` of proc(5): the unit of utime and stime. */
const TICKS_PER_SECOND = 100;

type Status = { readonly workloads: readonly { readonly name: string; readonly state: string }[] };

/**
 * What an agent with many containers costs: namespaces with a card on one bridge, told of by an engine that speaks the API and runs
 * nothing, so that what is measured is the agent.
 */
export async function measureWorkloads(): Promise<Figure[]> {
  await using lab = await Lab.create('bench.workloads');
  const { client, gateway, detour, server, serverAddress, routerEnv, clientEnv } = await detourWorld(lab);
  await startServer(server);
  const containers = await bridged(lab, client, CONTAINERS + 1);
  await gateway.route('10.90.0.0/16 via 10.86.0.1');
  await detour.route('10.90.0.0/16 via 10.86.2.1');
  const [unlabelled, ...labelled] = containers;
  if (!unlabelled) throw new Error('no containers');
  const folder = mkdtempSync(join(tmpdir(), 'detour-bench-'));
  try {
    await using engine = new FakeDocker(join(folder, 'docker.sock'));
    await engine.open();
    const keys = newKey();
    await using _router = await Daemon.start(detour, 'router', { keys, env: routerEnv });
    const env = {
      ...clientEnv,
      DETOUR_PROVIDERS: 'docker',
      DOCKER_HOST: `unix://${engine.path}`,
      MALLOC_ARENA_MAX: '1',
    };
    await using agent = await Daemon.start(client, 'client', { keys, env });
    const entered = await enter(engine, agent, labelled);
    const { cpuPercent, residentMb } = await idle(agent);
    const served = (await agent.status<Status>()).workloads.filter(({ state }) => state === 'served').length;
    if (served !== labelled.length) throw new Error(`${served} of ${labelled.length} containers are served`);
    const { beside, without } = await disturbance(agent, unlabelled, serverAddress);
    const before = performance.now();
    await agent.stop();
    note(`workloads: all ${CONTAINERS} namespaces put back in ${(performance.now() - before).toFixed(0)} ms`);
    return [
      {
        name: `container started to served, p50 of ${CONTAINERS}`,
        value: median(entered),
        unit: 'ms',
        target: { atMost: 50 },
        detail: `p99 ${quantile(entered, 0.99).toFixed(1)} ms; the last 20: ${median(entered.slice(-20)).toFixed(1)} ms`,
      },
      {
        name: `agent: resident memory, ${CONTAINERS} namespaces`,
        value: residentMb,
        unit: 'MB',
        target: { atMost: 160 },
      },
      {
        name: `agent: CPU, ${CONTAINERS} idle namespaces`,
        value: cpuPercent,
        unit: '% of a core',
        target: { atMost: 2 },
      },
      {
        name: 'unlabelled container: time to connect, with the agent to without',
        value: median(beside) / median(without),
        unit: '',
        target: { atMost: 1.05 },
        detail: `${median(beside).toFixed(0)} to ${median(without).toFixed(0)} us, ${ROUNDS} rounds of each`,
      },
    ];
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}

/** Starts one container after the other; how long each took to be served, ms. */
async function enter(engine: FakeDocker, agent: Daemon, hosts: readonly Host[]): Promise<number[]> {
  const times: number[] = [];
  for (const { name, path } of hosts) {
    const started = performance.now();
    engine.run({ name, sandbox: path });
    await agent.program.waitFor(new RegExp(`"workload-served".*"${name}"`), 10_000);
    times.push(performance.now() - started);
  }
  return times;
}

/** What it costs when nothing happens. */
async function idle(agent: Daemon): Promise<{ cpuPercent: number; residentMb: number }> {
  // The first answers of the detour, and what came with the start, are over by then.
  await delay(10_000);
  const before = await cpuSeconds(agent.program.pid);
  const start = performance.now();
  await delay(IDLE_MS);
  const seconds = (performance.now() - start) / 1000;
  const cpuPercent = (((await cpuSeconds(agent.program.pid)) - before) / seconds) * 100;
  return { cpuPercent, residentMb: (await agent.residentBytes()) / 2 ** 20 };
}

/**
 * Times to connect from a container that nobody serves, medians of rounds in us: with the agent at work, and with the agent stopped
 * (SIGSTOP), by turns, so that whatever else this machine does is in both.
 */
async function disturbance(
  agent: Daemon,
  host: Host,
  address: string,
): Promise<{ readonly beside: number[]; readonly without: number[] }> {
  const program = `
import socket, sys, time
host, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for line in sys.stdin:
  times = []
  for _ in range(count):
    s = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)
    start = time.perf_counter()
    s.connect((host, port))
    times.append(time.perf_counter() - start)
    s.close()
  print('median', sorted(times)[len(times) // 2] * 1e6, flush=True)
`;
  const caller = host.spawn(['python3', '-c', program, address, String(SERVER_PORT), String(CONNECTS)]);
  const round = async (): Promise<number> => {
    const known = caller.lines.length;
    caller.write('go\n');
    const line = await waitUntil(() => caller.lines[known], { deadlineMs: 30_000, what: 'the connections' });
    return Number(line.split(' ')[1]);
  };
  await round();
  const beside: number[] = [];
  const without: number[] = [];
  for (let turn = 0; turn < ROUNDS; turn++) {
    beside.push(await round());
    process.kill(agent.program.pid, 'SIGSTOP');
    without.push(await round());
    process.kill(agent.program.pid, 'SIGCONT');
  }
  await caller.stop();
  return { beside, without };
}

/** User and system time of a process so far, seconds (proc(5), stat). */
async function cpuSeconds(pid: number): Promise<number> {
  const stat = await readFile(`/proc/${pid}/stat`, 'latin1');
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  return (Number(fields[11]) + Number(fields[12])) / TICKS_PER_SECOND;
}
