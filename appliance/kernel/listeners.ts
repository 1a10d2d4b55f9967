import { readFile } from 'node:fs/promises';

/** TCP_LISTEN of include/net/tcp_states.h, as /proc/net/tcp prints it. */
const LISTEN = '0A';

/** Ports of the listening sockets in the text of /proc/net/tcp or tcp6. */
export function listeningPorts(text: string): readonly number[] {
  return text.split('\n').flatMap((line) => {
    const [, local, , state] = line.trim().split(/\s+/);
    return state === LISTEN && local ? [Number.parseInt(local.split(':')[1] ?? '', 16)] : [];
  });
}

/** TCP ports that something in this namespace listens on, sorted. */
export async function tcpListeners(): Promise<readonly number[]> {
  // A kernel without IPv6 has no tcp6.
  const read = (path: string): Promise<string> => readFile(path, 'utf8').catch(() => '');
  const texts = await Promise.all([read('/proc/net/tcp'), read('/proc/net/tcp6')]);
  return [...new Set(texts.flatMap(listeningPorts))].sort((a, b) => a - b);
}
