import koffi from 'koffi';

/**
 * Memory that native code has freed: OpenSSL's, libuv's, that behind buffers. glibc keeps it for later, in pieces among
 * what is in use, and a process that was busy once looks big for ever.
 */

let trim: (() => void) | null = null;

/** Gives such memory back to the system; some milliseconds. Does nothing where the C library has no malloc_trim(3). */
export function returnFreedMemory(): void {
  trim ??= prepare();
  trim();
}

function prepare(): () => void {
  try {
    const call = koffi.load(null).func('int malloc_trim(size_t pad)');
    return () => call(0);
  } catch {
    return () => undefined;
  }
}
