import type { Daemon } from './daemons.ts';
import { type Conditions, type Host, type Lab, waitUntil } from './netns.ts';

/**
 * A client with one network card, a gateway, one detour and a server:
 *
 *     client --- gateway --- server       the direct way
 *                   \--- detour ---/      the other, over a link of its own to the server
 */
export type DetourWorld = {
  readonly client: Host;
  readonly gateway: Host;
  readonly detour: Host;
  readonly server: Host;
  readonly serverAddress: string;
  readonly detourAddress: string;
  readonly routerEnv: Readonly<Record<string, string>>;
  readonly clientEnv: Readonly<Record<string, string>>;
};

/**
 * Builds it. The gateway's two uplinks have these conditions, each direction, the one to the detour those of `aside` where they are given; for a `wire`
 * see `LinkOptions`.
 */
export async function detourWorld(
  lab: Lab,
  limits: Conditions & { readonly wire?: boolean } = {},
  aside: typeof limits = limits,
): Promise<DetourWorld> {
  const [client, gateway] = [await lab.host('client'), await lab.host('gateway')];
  const [detour, server] = [await lab.host('detour'), await lab.host('server')];
  await lab.link(client, gateway, { v4: '10.86.0.0/30' });
  await lab.link(gateway, server, { v4: '10.86.1.0/30', ...limits });
  await lab.link(gateway, detour, { v4: '10.86.2.0/30', ...aside });
  await lab.link(detour, server, { v4: '10.86.3.0/30' });
  await client.route('default via 10.86.0.2');
  await server.route('default via 10.86.1.1');
  await detour.route('10.86.0.0/30 via 10.86.2.1');
  // The server is known by one address; the detour reaches it over the link that they share.
  await detour.route('10.86.1.2/32 via 10.86.3.2');
  await gateway.forward();
  await detour.forward();
  return {
    client,
    gateway,
    detour,
    server,
    serverAddress: '10.86.1.2',
    detourAddress: '10.86.2.2',
    routerEnv: { DETOUR_ALLOW: '10.86.1.2/32' },
    clientEnv: { DETOUR_DETOURS: 'one=10.86.2.2:45672' },
  };
}

/**
 * Namespaces on a bridge of `host`, as an engine makes them for containers: 10.90.x.y, and nothing between them and the world but
 * that host, which forwards. Others need a route to 10.90.0.0/16 by it.
 */
export async function bridged(lab: Lab, host: Host, count: number): Promise<Host[]> {
  const hosts: Host[] = [];
  const commands = ['link add bridge0 type bridge', 'addr add 10.90.0.1/16 dev bridge0', 'link set bridge0 up'];
  for (let index = 0; index < count; index++) {
    const one = await lab.host(`c${index}`);
    hosts.push(one);
    commands.push(
      `link add v${index} type veth peer name eth0 netns ${one.namespace}`,
      `link set v${index} master bridge0 up`,
    );
  }
  await host.exec(['ip', '-batch', '-'], { input: `${commands.join('\n')}\n` });
  await host.forward();
  for (const [index, one] of hosts.entries()) {
    const address = `10.90.${1 + Math.floor(index / 200)}.${1 + (index % 200)}`;
    const own = [`addr add ${address}/16 dev eth0`, 'link set eth0 up', 'route add default via 10.90.0.1'];
    await one.exec(['ip', '-batch', '-'], { input: `${own.join('\n')}\n` });
  }
  return hosts;
}

/** Waits until the agent has had an answer from that many detours. */
export async function waitForDetours(agent: Daemon, count: number): Promise<void> {
  await waitUntil(
    async () => {
      const status = await agent.status<{ detours: { rttMs: number | null }[] }>();
      return status.detours.filter((detour) => typeof detour.rttMs === 'number').length >= count;
    },
    { deadlineMs: 10_000, what: `the agent to reach ${count} detours` },
  );
}
