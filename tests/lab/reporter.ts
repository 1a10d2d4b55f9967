import { mkdirSync, writeFileSync } from 'node:fs';
import { dirname, join } from 'node:path';
import type { Reporter, SerializedError, TestCase, TestModule } from 'vitest/node';

/** What suite.ts needs to know of one file of tests. */
export type FileReport = {
  passed: number;
  failed: number;
  skipped: number;
  /** What failed, with the first lines of the message. */
  failures: { name: string; why: string }[];
  /** What passed at the second attempt only. */
  flaky: { name: string; why: string }[];
};

/** Of one ring, by file; `''` stands for what belongs to none. */
export type Report = Record<string, FileReport>;

export const emptyReport = (): FileReport => ({ passed: 0, failed: 0, skipped: 0, failures: [], flaky: [] });

/** Writes `out/tests/RING.json` for suite.ts. The ring is $TEST_RING, for a reporter is told of projects only as they run. */
export default class RingReporter implements Reporter {
  readonly #report: Report = {};

  onTestCaseResult(test: TestCase): void {
    const { state, errors } = test.result();
    const file = test.module.relativeModuleId;
    const counts = this.#of(file);
    const seen = { name: `${file} > ${test.fullName}`, why: firstLines(errors ?? []) };
    if (state === 'passed') {
      counts.passed += 1;
      if (test.diagnostic()?.flaky) counts.flaky.push(seen);
    } else if (state === 'failed') {
      counts.failed += 1;
      counts.failures.push(seen);
    } else counts.skipped += 1;
  }

  /** Failures outside of any test: files that cannot be loaded, hooks, rejections that nobody handles. */
  onTestRunEnd(modules: readonly TestModule[], unhandled: readonly SerializedError[]): void {
    for (const module of modules) {
      const errors = [...module.errors(), ...[...module.children.allSuites()].flatMap((suite) => suite.errors())];
      if (errors.length > 0) this.#add(module.relativeModuleId, module.relativeModuleId, errors);
    }
    for (const error of unhandled) {
      // Vitest notes in which file something went wrong that no test waited for.
      const path = typeof error['VITEST_TEST_PATH'] === 'string' ? error['VITEST_TEST_PATH'] : '';
      const file = modules.find(({ moduleId }) => moduleId === path)?.relativeModuleId ?? '';
      this.#add(file, `${file === '' ? '' : `${file} > `}outside of any test`, [error]);
    }
    const file = join(import.meta.dirname, '../../out/tests', `${process.env['TEST_RING'] ?? 'tests'}.json`);
    mkdirSync(dirname(file), { recursive: true });
    writeFileSync(file, JSON.stringify(this.#report, null, 2));
  }

  #of(file: string): FileReport {
    const counts = this.#report[file] ?? emptyReport();
    this.#report[file] = counts;
    return counts;
  }

  #add(file: string, name: string, errors: readonly { message?: string | undefined }[]): void {
    const counts = this.#of(file);
    counts.failed += 1;
    counts.failures.push({ name, why: firstLines(errors) });
  }
}

const firstLines = (errors: readonly { message?: string | undefined }[]): string =>
  errors.map(({ message }) => (message ?? '').split('\n').slice(0, 12).join('\n')).join('\n');
