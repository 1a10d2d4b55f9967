import { fileURLToPath } from 'node:url';
import { type Host, Lab, type Running, waitUntil } from '../lab/netns.ts';

export const root = (path: string): string => fileURLToPath(new URL(`../../${path}`, import.meta.url));
export const KEYS = [
  '0a0b0c0d:tLw2yqkV3f1Zc8m0JrXo5hD7aKQnE9sUuYbGgWvRi4M',
  '1a1b1c1d:Qd5tVxk2n8JmYh0LrWzE7sPaGcBfUoKi3qRyTvX9e6I',
] as const;
export const CLIENT = { ip: '10.87.1.1', ip6: 'fd87:1::1' } as const;
export const ROUTER = { ip: '10.87.1.2', ip6: 'fd87:1::2' } as const;
export const SERVER = { ip: '10.87.2.2', ip6: 'fd87:2::2' } as const;
export type Family = 'ip' | 'ip6';

/** What the speaker prints of an answer; null is silence. */
export type Answer = {
  result: string;
  port: number;
  capabilityPort: number;
  lifetime: number;
  epoch: string;
  observed: string;
} | null;

/** client --- router --- server, and the client can only reach the server's network through the router. */
export class Stage implements AsyncDisposable {
  readonly lab: Lab;
  readonly client: Host;
  readonly router: Host;
  readonly server: Host;

  private constructor(lab: Lab, client: Host, router: Host, server: Host) {
    this.lab = lab;
    this.client = client;
    this.router = router;
    this.server = server;
  }

  static async create(name: string): Promise<Stage> {
    const lab = await Lab.create(name);
    const [client, router, server] = [await lab.host('client'), await lab.host('router'), await lab.host('server')];
    await lab.link(client, router, { v4: '10.87.1.0/30', v6: 'fd87:1::/64', devA: 'c0', devB: 'r0' });
    await lab.link(router, server, { v4: '10.87.2.0/30', v6: 'fd87:2::/64', devA: 'r1', devB: 's0' });
    for (const hop of [ROUTER.ip, ROUTER.ip6]) await client.route(`default via ${hop}`);
    for (const hop of ['10.87.2.1', 'fd87:2::1']) await server.route(`default via ${hop}`);
    return new Stage(lab, client, router, server);
  }

  async start(over: Readonly<Record<string, string>> = {}): Promise<Running> {
    const program = this.router.spawn([process.execPath, root('appliance/cli.ts'), 'router'], {
      env: {
        DETOUR_KEYS: KEYS.join(','),
        DETOUR_ALLOW: '10.87.2.0/30,fd87:2::/64',
        DETOUR_HTTP: 'off',
        DETOUR_SOCKET: `/run/${this.router.namespace}.sock`,
        ...over,
      },
    });
    await program.waitFor('"event":"started"', 20_000);
    return program;
  }

  /** What the router answers to these commands of tests/lab/speaker.ts. */
  async speak(commands: readonly string[], family: Family = 'ip', key: string = KEYS[0]): Promise<Answer[]> {
    const control = family === 'ip' ? `${ROUTER.ip}:45672` : `[${ROUTER.ip6}]:45672`;
    const said = await this.client.exec([
      process.execPath,
      root('tests/lab/speaker.ts'),
      control,
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

  async lease(destination: string, family: Family = 'ip', port = 0): Promise<number> {
    const [answer] = await this.speak([`lease=${destination},${port}`], family);
    if (answer?.result !== 'OK') throw new Error(`no lease for ${destination}: ${answer?.result ?? 'silence'}`);
    return answer.port;
  }

  async packets(...args: (string | number)[]): Promise<void> {
    await this.client.exec(['python3', root('tests/lab/packets.py'), ...args.map(String)]);
  }

  /** The table's counter, by its name. */
  async counter(name: string): Promise<number> {
    const text = await this.router.exec(['nft', 'list', 'counter', 'inet', 'detour', name]);
    return Number(/packets (\d+)/.exec(text)?.[1]);
  }

  /** By how much `name` grows while `task` runs, once it has grown by `expected`. */
  async grows(name: string, expected: number, task: () => Promise<void>): Promise<void> {
    const before = await this.counter(name);
    await task();
    await waitUntil(async () => (await this.counter(name)) === before + expected, {
      deadlineMs: 3_000,
      what: `${name} to grow by ${expected} from ${before}`,
    });
  }

  /** Counts what reaches a host, and where from: in a table of the test's own. */
  async watch(host: Host, match: string): Promise<() => Promise<number>> {
    await host.nft(
      `add table inet watch\nflush table inet watch\nadd chain inet watch in { type filter hook prerouting priority -400; }\nadd rule inet watch in ${match} counter\n`,
    );
    return async () =>
      Number(/counter packets (\d+)/.exec(await host.exec(['nft', 'list', 'chain', 'inet', 'watch', 'in']))?.[1]);
  }

  async conntrack(): Promise<number> {
    return Number(await this.router.sysctl('net.netfilter.nf_conntrack_count'));
  }

  /** Returns when everything sent before has been handled: a ping follows it through the same queues. */
  async settled(): Promise<void> {
    await this.client.exec(['ping', '-c', '1', '-W', '2', SERVER.ip]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.lab[Symbol.asyncDispose]();
  }
}

/** Listens on plain TCP ports and answers every connection with its number. */
export async function listen(host: Host, address: string, ...ports: number[]): Promise<void> {
  const program = host.spawn([
    process.execPath,
    '-e',
    `const net = require('net');
     Promise.all([${ports}].map((port) => new Promise((up) => net.createServer((s) => { s.on('error', () => {}); s.end('port ' + port); }).listen(port, '${address}', up))))
       .then(() => console.log('listening'));`,
  ]);
  await program.waitFor('listening');
}

/** Connects with plain TCP and reports what it read, or the error's code. */
export async function connect(host: Host, address: string, port: number): Promise<string> {
  const said = await host.exec([
    process.execPath,
    '-e',
    `let text = '';
     const s = require('net').connect(${port}, '${address}');
     s.setTimeout(1500, () => { console.log('timeout'); process.exit(); });
     s.on('data', (d) => text += d).on('end', () => { console.log(text); process.exit(); });
     s.on('error', (e) => { console.log(e.code); process.exit(); });`,
  ]);
  return said.trim();
}
