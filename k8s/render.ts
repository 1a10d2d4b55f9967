/**
 * Writes the files for `kubectl apply -f`, which are what kustomize makes of the overlays: `node k8s/render.ts`. By the kubectl of
 * Debian 13, whatever this machine has, so that they come out the same everywhere; tests/k8s/render.test.ts holds them to it.
 */
import { execFile } from 'node:child_process';
import { existsSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { promisify } from 'node:util';

const run = promisify(execFile);
const root = join(import.meta.dirname, '..');
const tool = join(root, '.cache/kubectl');
const kubectl = join(tool, 'usr/bin/kubectl');

/** The files for `kubectl apply -f`, and the overlay that each is made of. */
export const RENDERED: Readonly<Record<string, string>> = {
  'detour-client.yaml': 'pods',
  'detour-client-host.yaml': 'host',
  'detour-router.yaml': 'router',
  'detour-server.yaml': 'server',
};

/** What kustomize makes of a folder. Brings kubectl when it is not there yet. Throws what kubectl says. */
export async function kustomize(folder: string): Promise<string> {
  if (!existsSync(kubectl)) await run(join(root, 'tests/lab/host.sh'), ['unpack', 'trixie', tool, 'kubectl']);
  const { stdout } = await run(kubectl, ['kustomize', folder]);
  return stdout;
}

/** What it makes of one of the overlays. */
export const render = (overlay: string): Promise<string> => kustomize(join(root, 'k8s/overlays', overlay));

/** The text of a file of `RENDERED`. */
export async function renderFile(overlay: string): Promise<string> {
  return `# Made by \`node k8s/render.ts\` out of k8s/overlays/${overlay}: change it there.\n${await render(overlay)}`;
}

if (import.meta.main) {
  for (const [file, overlay] of Object.entries(RENDERED)) {
    writeFileSync(join(root, 'k8s', file), await renderFile(overlay));
  }
}
