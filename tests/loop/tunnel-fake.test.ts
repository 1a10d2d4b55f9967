import { describe } from 'vitest';
import { FakeTunnels } from '../fakes/wireguard.ts';
import { tunnelCases } from '../lab/tunnel-cases.ts';

describe('interfaces, rules and WireGuard, the fake', () => {
  tunnelCases('dtv-case', async () => new FakeTunnels([], 'cases'));
});
