import { describe, it } from 'vitest';
import type { PathEvent } from '../../appliance/kernel/mptcp.ts';
import { type Endpoint, parseEndpoint } from '../../appliance/protocol/address.ts';
import { FakeClock } from '../fakes/clock.ts';
import { FakeKernel } from '../fakes/mptcp.ts';
import { type Bench, CASES } from '../lab/path-manager.ts';

const endpoint = (text: string): Endpoint => {
  const parsed = parseEndpoint(text);
  if (!parsed) throw new Error(text);
  return parsed;
};

async function fakeBench(): Promise<Bench> {
  const clock = new FakeClock();
  const kernel = new FakeKernel(clock);
  kernel.way = (_, remote) => remote;
  const events: PathEvent[] = [];
  const seen = new Set<PathEvent>();
  const server = endpoint('198.51.100.1:443');
  let token = 0;
  return {
    manager: await kernel.openPathManager((event) => events.push(event)),
    diag: kernel.diag,
    events,
    server,
    second: endpoint('192.0.2.9:1').address,
    connect: async () => {
      token = kernel.open(endpoint('192.0.2.1:40000'), server);
    },
    speak: async () => {
      if (events.some(({ kind }) => kind === 'established')) kernel.send(token);
      else kernel.establish(token);
    },
    close: async () => kernel.close(token),
    async next(kind) {
      for (let waited = 0; waited < 5_000; waited += 10) {
        const found = events.find((event) => event.kind === kind && !seen.has(event));
        if (found) {
          seen.add(found);
          // The kind was just compared; the compiler does not follow a comparison with a variable.
          return found as PathEvent & { readonly kind: typeof kind };
        }
        await clock.advance(10);
      }
      throw new Error(`no ${kind}; there were ${events.map((event) => event.kind).join(', ')}`);
    },
  };
}

describe('the fake path manager behaves as the kernel’s does', () => {
  for (const [name, run] of Object.entries(CASES)) it(name, async () => run(await fakeBench()));
});
