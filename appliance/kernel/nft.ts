import { randomUUID } from 'node:crypto';
import { execa } from 'execa';
import pLimit from 'p-limit';
import { type MapElement, openElements, readMap } from './elements.ts';
import { type Namespace, ownNamespace } from './namespaces.ts';
import { NetlinkError } from './netlink.ts';
import { type OptionTarget, translateToOption } from './rules.ts';

/**
 * Why a run of nft did not do what it was told. `missing` no such program; `denied` no CAP_NET_ADMIN; `absent` and
 * `exists` an object is not there, or there already; `full` a map is at its size; `rejected` anything else it said no
 * to. In all of these nothing has changed. `unknown`: killed or timed out, and the kernel may or may not have done it.
 */
export type NftFailureKind = 'missing' | 'denied' | 'absent' | 'exists' | 'full' | 'rejected' | 'unknown';

export type NftFailure = { readonly kind: NftFailureKind; readonly message: string };

/** What is wrong, and what to do about it where that is known. nft itself says some of it over several lines and helps nobody. */
export function remedyOf({ kind, message }: NftFailure): string {
  if (kind === 'missing') return `${message}: install the package nftables (1.0.6 or newer)`;
  if (kind !== 'denied') return message;
  return (
    'it needs CAP_NET_ADMIN. docker run: --cap-add NET_ADMIN; compose: cap_add: [NET_ADMIN]; ' +
    'Kubernetes: securityContext.capabilities.add: [NET_ADMIN]; on a host: run it as root'
  );
}

/** nftables of one namespace. Runs are serialised, and none throws. */
export type Nft = {
  /** Runs `commands`, one a line, as one transaction: all of it or nothing. Null when it is committed. */
  run(commands: string): Promise<NftFailure | null>;
  /** Runs `nft <args>`, which only reads, and hands over its output line by line, so that no dump is held whole. */
  list(args: readonly string[], line: (text: string) => void): Promise<NftFailure | null>;
  /**
   * Hands over the elements of a map of table `inet <table>`, in no order. An element may come more than once: reading begins
   * again when something changes meanwhile.
   */
  dump(table: string, map: string, each: (element: MapElement) => void): Promise<NftFailure | null>;
  /** Makes the only rule of a chain of table `inet <table>` one that translates to the address and port in a TCP option (`rules.ts`). */
  translateToOption(table: string, chain: string, target: OptionTarget): Promise<NftFailure | null>;
};

/** Longest a run may take. 60,000 elements in one transaction take 0.6 s (docs/kernel-notes.md). */
const DEADLINE_MS = 10_000;
const MESSAGE_LENGTH = 400;

const CAUSES: readonly (readonly [RegExp, NftFailureKind])[] = [
  [/Operation not permitted|Permission denied|must be root/i, 'denied'],
  [/No such file or directory/i, 'absent'],
  [/File exists/i, 'exists'],
  // Over the size of a set: ENFILE; some set back ends say ENOSPC.
  [/Too many open files in system|No space left on device/i, 'full'],
];

/** Says what nft's error text means; exported because the text is all there is to go by. */
export function classifyNftError(stderr: string): NftFailureKind {
  for (const [pattern, kind] of CAUSES) if (pattern.test(stderr)) return kind;
  return 'rejected';
}

/** Of whatever runs nft for us (a shell, stdbuf): no such program, not executable; of a shell above 128: killed by a signal. */
const NOT_RUN = { missing: 127, unusable: 126, signals: 128 } as const;

type Outcome = {
  readonly failed: boolean;
  readonly timedOut: boolean;
  readonly isTerminated: boolean;
  readonly exitCode?: number | undefined;
  readonly code?: string | undefined;
  readonly stderr?: string | undefined;
  readonly signal?: string | undefined;
};

function failureOf(outcome: Outcome, program: string): NftFailure | null {
  if (!outcome.failed) return null;
  const said = (outcome.stderr ?? '').trim().slice(0, MESSAGE_LENGTH);
  if (outcome.code === 'ENOENT') return { kind: 'missing', message: `${program}: no such program` };
  if (outcome.code === 'EACCES') return { kind: 'missing', message: `${program}: may not be run` };
  if (outcome.exitCode === NOT_RUN.missing) return { kind: 'missing', message: `${program}: no such program` };
  if (outcome.exitCode === NOT_RUN.unusable) return { kind: 'missing', message: `${program}: may not be run` };
  if (outcome.timedOut) return { kind: 'unknown', message: `${program} did not end in time and was killed` };
  if (outcome.isTerminated) return { kind: 'unknown', message: `${program} was killed by ${outcome.signal}` };
  // Without an exit status nothing is known about what it got done.
  if (outcome.exitCode === undefined) return { kind: 'unknown', message: said || `${program} ended strangely` };
  return { kind: classifyNftError(said), message: said || `${program} ended with ${outcome.exitCode}` };
}

/**
 * A child of ours that starts nft for us, for as long as we run. A process that starts another copies its page tables:
 * from Node that takes 2 ms at 70 MB and 17 ms at 270 MB, all of it in the event loop; from a shell of 1 MB, nothing
 * to speak of. The script is constant, and what is run reaches nft as data: one line is one transaction, and half a line
 * (we died while writing) is none. $0 is the program's name, $1 the word that marks the
 * end of a run; nobody else can know it.
 */
const STARTER = `while IFS= read -r line; do printf '%s\\n' "$line" | "$0" -f - 2>&1; printf '\\n%s %s\\n' "$1" $?; done`;
/** The shell reads byte by byte, so long texts go to an nft of their own. */
const LONGEST_LINE = 16_384;

type Starter = {
  /** Runs one line; undefined when the starter died or was killed over it. */
  run(line: string): Promise<{ readonly exitCode: number; readonly said: string } | undefined>;
};

function starter(program: string, deadline: number, gone: () => void): Starter {
  const mark = randomUUID();
  const end = new RegExp(`\\n${mark} (\\d+)\\n$`);
  const process = execa('sh', ['-c', STARTER, program, mark], {
    reject: false,
    buffer: false,
    stderr: 'ignore',
    env: { LC_ALL: 'C' },
    // A group of its own, so that nft can be killed together with it.
    detached: true,
    cleanup: true,
  });
  let text = '';
  let waiting: ((outcome: { exitCode: number; said: string } | undefined) => void) | null = null;
  process.stdout.setEncoding('utf8').on('data', (chunk: string) => {
    text += chunk;
    const status = end.exec(text);
    if (!status) return;
    waiting?.({ exitCode: Number(status[1]), said: text.slice(0, status.index).trim() });
    text = '';
  });
  process.stdin.on('error', () => undefined);
  void process.then(() => {
    gone();
    waiting?.(undefined);
  });
  return {
    async run(line) {
      const { promise, resolve } = Promise.withResolvers<{ exitCode: number; said: string } | undefined>();
      waiting = resolve;
      process.stdin.write(`${line}\n`);
      const timer = setTimeout(() => killGroup(process.pid), deadline);
      const outcome = await promise;
      clearTimeout(timer);
      waiting = null;
      return outcome;
    },
  };
}

function killGroup(pid: number | undefined): void {
  try {
    if (pid !== undefined) process.kill(-pid, 'SIGKILL');
  } catch {
    // It ended by itself meanwhile.
  }
}

function netlinkFailure(error: unknown): NftFailure {
  if (!(error instanceof NetlinkError)) throw error;
  const { code, message } = error;
  if (code === 'ENOENT') return { kind: 'absent', message };
  if (code === 'EPERM') return { kind: 'denied', message };
  if (code === 'EINTR')
    return { kind: 'rejected', message: `${message}: other programs change the ruleset all the time` };
  return { kind: 'rejected', message };
}

/**
 * So many runs at a time in this process. A run mostly waits for the kernel, and an agent that leaves 200 namespaces wants all of
 * them at once: as many processes would take a gigabyte.
 */
const abreast = pLimit(8);

export type NftOptions = {
  /** Whose tables; this process's own when absent. */
  readonly namespace?: Namespace;
  /** Looked up in PATH. */
  readonly program?: string;
  /** Longest a run may take, ms. */
  readonly deadline?: number;
  /** For many short runs: a process stays that starts nft at no cost to this one. It also keeps the namespace alive. */
  readonly resident?: boolean;
};

/** The real one. */
export function systemNft({
  namespace = ownNamespace,
  program = 'nft',
  deadline = DEADLINE_MS,
  resident = false,
}: NftOptions = {}): Nft {
  let last: Promise<unknown> = Promise.resolve();
  const serialised = <T>(task: () => Promise<T>): Promise<T> => {
    const run = last.then(task);
    last = run.catch(() => undefined);
    return run;
  };
  const options = {
    reject: false,
    timeout: deadline,
    killSignal: 'SIGKILL',
    // Messages are classified by their English text.
    env: { LC_ALL: 'C' },
  } as const;
  let helper: Starter | null = null;
  // Into a pipe, nft writes 4 kB at a time, and each piece wakes us: that doubled the time a listing of 60,000 takes.
  let buffered: readonly string[] = ['stdbuf', '-o64K'];
  const runLine = async (line: string): Promise<NftFailure | null> => {
    helper ??= namespace.within(() =>
      starter(program, deadline, () => {
        helper = null;
      }),
    );
    const outcome = await helper.run(line);
    if (!outcome) return { kind: 'unknown', message: `${program} did not end in time, or was killed` };
    const { exitCode, said } = outcome;
    if (exitCode === 0) return null;
    const message = said.slice(0, MESSAGE_LENGTH);
    if (exitCode === NOT_RUN.missing) return { kind: 'missing', message: `${program}: no such program` };
    if (exitCode === NOT_RUN.unusable) return { kind: 'missing', message: `${program}: may not be run` };
    if (exitCode > NOT_RUN.signals) {
      return { kind: 'unknown', message: `${program} was killed by signal ${exitCode - NOT_RUN.signals}` };
    }
    return { kind: classifyNftError(said), message: message || `${program} ended with ${exitCode}` };
  };
  const read = async (args: readonly string[], line: (text: string) => void): Promise<NftFailure | null> => {
    const [command = program, ...rest] = [...buffered, program, ...args];
    const process = namespace.within(() =>
      execa(command, rest, { ...options, stdin: 'ignore', buffer: { stdout: false } }),
    );
    let tail = '';
    process.stdout.setEncoding('utf8').on('data', (chunk: string) => {
      const parts = (tail + chunk).split('\n');
      tail = parts.pop() ?? '';
      for (const part of parts) line(part);
    });
    const outcome = await process;
    if (outcome.code === 'ENOENT' && buffered.length > 0) {
      buffered = [];
      return read(args, line);
    }
    return failureOf(outcome, program);
  };
  return {
    run: (commands) =>
      serialised(async () => {
        if (resident && commands.length <= LONGEST_LINE) return runLine(commands.trim().replaceAll('\n', '; '));
        return abreast(async () => {
          const process = namespace.within(() => execa(program, ['-f', '-'], { ...options, input: commands }));
          return failureOf(await process, program);
        });
      }),
    list: (args, line) => serialised(() => read(args, line)),
    dump: (table, map, each) =>
      serialised(async () => {
        try {
          const socket = openElements(namespace);
          try {
            await readMap(socket, table, map, each);
          } finally {
            socket.close();
          }
          return null;
        } catch (error) {
          return netlinkFailure(error);
        }
      }),
    translateToOption: (table, chain, target) =>
      serialised(() =>
        translateToOption(table, chain, target, namespace).then(
          () => null,
          (error: unknown) => netlinkFailure(error),
        ),
      ),
  };
}
