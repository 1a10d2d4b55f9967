import { defineConfig } from 'vitest/config';

/** The rings of tests, from the cheapest to the most real. What each may need is in CONTRIBUTING.md. */
export default defineConfig({
  test: {
    projects: [
      ring('unit', { testTimeout: 60_000 }),
      ring('loop', { testTimeout: 60_000 }),
      // Namespaces and containers share one kernel and two cores: files one after the other, so that timings mean something.
      // A machine that others use too may still stall one of them: it gets a second attempt, then its file one more run (suite.ts).
      ring('netns', { testTimeout: 120_000, hookTimeout: 60_000, fileParallelism: false, retry: 1 }),
      // The VM's processor is emulated. A transfer that takes a second elsewhere takes ten there, so deadlines are long.
      ring('vm', { testTimeout: 600_000, hookTimeout: 300_000, fileParallelism: false, retry: 1 }),
      ring('containers', { testTimeout: 300_000, hookTimeout: 180_000, fileParallelism: false, retry: 1 }),
      ring('k8s', { testTimeout: 300_000, hookTimeout: 300_000, fileParallelism: false, retry: 1 }),
    ],
  },
});

function ring(
  name: string,
  limits: { testTimeout: number; hookTimeout?: number; fileParallelism?: boolean; retry?: number },
): { test: { name: string; include: string[]; testTimeout: number; passWithNoTests: boolean } } {
  return {
    // A ring without a test is a mistake in its pattern, not a success.
    test: { name, include: [`tests/${name}/**/*.test.ts`], passWithNoTests: false, ...limits },
  };
}
