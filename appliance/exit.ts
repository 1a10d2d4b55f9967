/** What the process ends with (docs/configuration.md): 1 failed, 64 bad usage, 69 the machine lacks something, 78 bad configuration. */
export type ExitCode = 1 | 64 | 69 | 78;

/** An error the operator can do something about: its message names the cause and the remedy, and is shown without a stack. */
export class Fatal extends Error {
  override readonly name: string = 'Fatal';
  readonly exitCode: ExitCode;

  constructor(exitCode: ExitCode, message: string, options?: ErrorOptions) {
    super(message, options);
    this.exitCode = exitCode;
  }
}

/** How long a daemon may take to leave, ms. Docker kills after 10 s; the pods of k8s/ are given more. */
export const STOP_DEADLINE_MS = 8_000;
