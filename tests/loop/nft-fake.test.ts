import { describe } from 'vitest';
import { FakeClock } from '../fakes/clock.ts';
import { FakeNft } from '../fakes/nft.ts';
import { nftCases } from '../lab/nft-cases.ts';

describe('nftables, the fake', () => {
  nftCases(async () => {
    const clock = new FakeClock();
    return { nft: new FakeNft(clock), elapse: (ms) => clock.advance(ms) };
  });
});
