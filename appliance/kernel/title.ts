import koffi from 'koffi';

/** linux/prctl.h */
const PR_SET_NAME = 15;

/**
 * Gives this process's main thread, and so its sockets' maker, a name that top and BPF programs see (`comm`, at most 15 bytes). The
 * command line stays as it was.
 */
export function nameProcess(name: string): void {
  koffi.load(null).func('int prctl(int option, const char *name)')(PR_SET_NAME, name);
}
