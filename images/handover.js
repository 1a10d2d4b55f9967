// The first lines of dist/detour.js. The program needs Node 24, and the machine's own may be older while `make build` has
// brought a newer one into the tree: then this process hands everything over to that one and lives as long as it does.
import { spawn as handoverSpawn } from 'node:child_process';
import { existsSync as handoverExists } from 'node:fs';

if (Number.parseInt(process.versions.node, 10) < 24) {
  const found = ['../.cache/node/bin/node', `../node_modules/node-linux-${process.arch}/bin/node`]
    .map((path) => new URL(path, import.meta.url).pathname)
    .find((path) => handoverExists(path));
  if (found === undefined) {
    console.error(
      `detour needs Node 24 or newer, and this is Node ${process.versions.node}: install it, or run 'make build', which brings it into the tree`,
    );
    process.exit(69);
  }
  // Whoever kills this process without notice means the program: it notices by the closed channel and goes the same way.
  const guard =
    'process.once("disconnect",()=>process.kill(process.pid,"SIGKILL"));process.channel.unref();delete process.env.NODE_CHANNEL_FD';
  const program = handoverSpawn(
    found,
    [`--import=data:text/javascript,${encodeURIComponent(guard)}`, ...process.argv.slice(1)],
    { stdio: ['inherit', 'inherit', 'inherit', 'ipc'] },
  );
  for (const signal of ['SIGTERM', 'SIGINT', 'SIGHUP', 'SIGQUIT']) {
    process.on(signal, () => {
      // Ctrl-C reaches both from the terminal; a second one would mean "at once".
      if (signal !== 'SIGINT' || !process.stdin.isTTY) program.kill(signal);
    });
  }
  const [code, signal] = await new Promise((resolve) => {
    program.once('exit', (...end) => resolve(end));
    program.once('error', (error) => {
      console.error(`detour: ${found} cannot be run: ${error.message}`);
      resolve([69, null]);
    });
  });
  if (signal !== null) {
    process.removeAllListeners(signal);
    process.kill(process.pid, signal);
  }
  process.exit(code ?? 1);
}
