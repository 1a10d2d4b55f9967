/** An application of one connection, which says how long it took to connect and lives until it is stopped. */
import type { Host } from './netns.ts';

type Call = { readonly connected: boolean; readonly ms: number; readonly peer: string; readonly why: string };

/**
 * An application: connects, says how long that took, then echoes what the server says to every line it is told, until it
 * is told to stop.
 */
const CALLER = `
import json, socket, sys, time
host, port, limit = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
s = socket.socket(socket.AF_INET6 if ':' in host else socket.AF_INET, socket.SOCK_STREAM, 262)
s.settimeout(limit)
start = time.monotonic()
try:
  s.connect((host, port))
  peer, why = s.getpeername()[0], ''
except OSError as error:
  peer, why = '', str(error)
print(json.dumps({'connected': not why, 'ms': 1000 * (time.monotonic() - start), 'peer': peer, 'why': why}), flush=True)
if why: sys.exit(0)
s.sendall(b'{"mode":"echo"}\\n')
for line in sys.stdin:
  s.sendall(line.encode())
  print('echo', s.recv(1000).decode().strip(), flush=True)
`;

/** Starts an application and returns when its connection is there, or is not. */
export async function call(host: Host, to: string, options: { readonly limitS?: number; readonly port?: number } = {}) {
  const { limitS = 10, port = 5000 } = options;
  const program = host.spawn(['python3', '-c', CALLER, to, String(port), String(limitS)]);
  const result: Call = JSON.parse(await program.waitFor('"connected"', limitS * 1000 + 5_000));
  let said = 0;
  return {
    ...result,
    program,
    /** Whether its connection carries something there and back. */
    async speak(deadlineMs = 10_000): Promise<void> {
      const word = `word${++said}`;
      program.write(`${word}\n`);
      await program.waitFor(`echo ${word}`, deadlineMs);
    },
  };
}
