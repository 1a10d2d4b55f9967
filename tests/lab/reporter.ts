import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Reporter, SerializedError, TestCase, TestModule } from 'vitest/node';

/** What suite.ts needs to know of one ring. */
export type Report = {
  passed: number;
  failed: number;
  skipped: number;
  /** What failed, with the first lines of the message. */
  failures: { name: string; why: string }[];
  /** What passed at the second attempt only. */
  flaky: { name: string; why: string }[];
};

/** Writes `out/tests/RING.json` for suite.ts. The ring is $TEST_RING, for a reporter is told of projects only as they run. */
export default class RingReporter implements Reporter {
  readonly #report: Report = { passed: 0, failed: 0, skipped: 0, failures: [], flaky: [] };

  onTestCaseResult(test: TestCase): void {
    const { state, errors } = test.result();
    const seen = { name: `${test.module.relativeModuleId} > ${test.fullName}`, why: firstLines(errors ?? []) };
    if (state === 'passed') {
      this.#report.passed += 1;
      if (test.diagnostic()?.flaky) this.#report.flaky.push(seen);
    } else if (state === 'failed') {
      this.#report.failed += 1;
      this.#report.failures.push(seen);
    } else this.#report.skipped += 1;
  }

  /** Failures outside of any test: files that cannot be loaded, hooks, rejections that nobody handles. */
  onTestRunEnd(modules: readonly TestModule[], unhandled: readonly SerializedError[]): void {
    for (const module of modules) {
      const errors = [...module.errors(), ...[...module.children.allSuites()].flatMap((suite) => suite.errors())];
      if (errors.length > 0) this.#add(module.relativeModuleId, errors);
    }
    if (unhandled.length > 0) this.#add('outside of any test', unhandled);
    const file = join(import.meta.dirname, '../../out/tests', `${process.env['TEST_RING'] ?? 'tests'}.json`);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, JSON.stringify(this.#report, null, 2));
  }

  #add(name: string, errors: readonly { message?: string | undefined }[]): void {
    this.#report.failed += 1;
    this.#report.failures.push({ name, why: firstLines(errors) });
  }
}

const firstLines = (errors: readonly { message?: string | undefined }[]): string =>
  errors.map(({ message }) => (message ?? '').split('\n').slice(0, 12).join('\n')).join('\n');
