import type { Machine, Ran } from '../../appliance/kernel/machine.ts';

/** A machine made of files and of commands' answers; what is not given does not exist. */
export type MachineParts = {
  readonly files?: Readonly<Record<string, string>>;
  /** Files that may be written. */
  readonly writable?: readonly string[];
  /** By the whole command line. */
  readonly commands?: Readonly<Record<string, string | Partial<Ran>>>;
};

export function fakeMachine({ files = {}, writable = [], commands = {} }: MachineParts): Machine {
  const installed = new Set(Object.keys(commands).map((line) => line.split(' ', 1)[0]));
  return {
    read: async (path) => files[path] ?? null,
    writable: async (path) => writable.includes(path),
    list: async (path) => [
      ...new Set(
        Object.keys(files)
          .filter((file) => file.startsWith(`${path}/`))
          .map((file) => file.slice(path.length + 1).split('/')[0] ?? ''),
      ),
    ],
    async run(command, args) {
      const answer = commands[[command, ...args].join(' ')];
      // As a real program that is asked for something it does not have.
      if (answer === undefined) return installed.has(command) ? { code: 1, stdout: '', stderr: 'no such thing' } : null;
      return typeof answer === 'string'
        ? { code: 0, stdout: answer, stderr: '' }
        : { code: 0, stdout: '', stderr: '', ...answer };
    },
  };
}
