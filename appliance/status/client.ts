import { request } from 'node:http';
import type { Role } from '../settings.ts';

/** Why a daemon could not be asked. `absent`: nobody listens at the socket. */
export class NoDaemon extends Error {
  override readonly name = 'NoDaemon';
  readonly reason: 'absent' | 'forbidden' | 'silent';

  constructor(reason: NoDaemon['reason'], message: string) {
    super(message);
    this.reason = reason;
  }
}

/** Larger answers than any honest daemon gives are cut off: 4,096 connections come to about 4 MB. */
const LARGEST_ANSWER_BYTES = 64 * 1024 * 1024;

/**
 * Asks the daemon at a unix socket for one of its pages.
 * @throws NoDaemon when there is none, it may not be asked, or it does not answer within `deadlineMs`.
 */
export function askDaemon(
  socketPath: string,
  path: string,
  deadlineMs = 6_000,
): Promise<{ readonly code: number; readonly body: string }> {
  const { promise, resolve, reject } = Promise.withResolvers<{ code: number; body: string }>();
  const ask = request({ socketPath, path, headers: { host: 'detour' }, agent: false }, (response) => {
    const parts: Buffer[] = [];
    let bytes = 0;
    response.on('data', (part: Buffer) => {
      bytes += part.length;
      if (bytes > LARGEST_ANSWER_BYTES) response.destroy(new Error('the answer is too long'));
      parts.push(part);
    });
    response.on('end', () => resolve({ code: response.statusCode ?? 0, body: Buffer.concat(parts).toString('utf8') }));
    response.on('error', reject);
  });
  const timer = setTimeout(() => {
    ask.destroy(new NoDaemon('silent', `the daemon at ${socketPath} does not answer`));
  }, deadlineMs);
  ask.on('error', (error) => {
    const code = 'code' in error ? error.code : '';
    if (code === 'ENOENT' || code === 'ECONNREFUSED') {
      reject(new NoDaemon('absent', `no daemon answers at ${socketPath}`));
    } else if (code === 'EACCES' || code === 'EPERM') {
      reject(new NoDaemon('forbidden', `only the daemon's own user (usually root) may ask at ${socketPath}`));
    } else {
      reject(error);
    }
  });
  ask.end();
  return promise.finally(() => clearTimeout(timer));
}

/** Whether a daemon of this role answers at the socket. A socket that cannot be asked counts as nobody's. */
export async function isRunning(socketPath: string, role: Role): Promise<boolean> {
  try {
    const { body } = await askDaemon(socketPath, '/livez', 2_000);
    return JSON.parse(body).role === role;
  } catch {
    return false;
  }
}
