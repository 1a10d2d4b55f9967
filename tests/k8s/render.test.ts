import { globSync, mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { kustomize, RENDERED, render, renderFile } from '../../k8s/render.ts';
import { complaintsAbout, type Manifest, readManifests } from '../lab/manifests.ts';

/** In this ring because it brings kubectl. */

const root = join(import.meta.dirname, '../..');
const files = join(root, 'k8s');
const overlays = globSync('overlays/*', { cwd: files }).map((path) => path.replace('overlays/', ''));

it.each(Object.entries(RENDERED))('%s is what kustomize makes of the overlay %s', async (file, overlay) => {
  expect(readFileSync(join(files, file), 'utf8')).toBe(await renderFile(overlay));
});

describe('the overlays', () => {
  it.each(overlays)('%s is made of objects that the schemas take, with images that have a tag', async (overlay) => {
    const text = await render(overlay);
    const manifests = readManifests(text);
    expect(manifests.length).toBeGreaterThan(0);
    for (const manifest of manifests) expect(complaintsAbout(manifest)).toEqual([]);
    const images = [...text.matchAll(/ image: (.*)/g)].map(([, image]) => image);
    expect(images.length).toBeGreaterThan(0);
    for (const image of images) expect(image).toMatch(/^[\w./-]+:(?!latest$)[\w.-]+$/);
  });

  it('with monitoring listens, and is probed, where Prometheus gets', async () => {
    const text = await render('monitoring');
    const plain = await render('pods');
    expect(plain.match(/127\.0\.0\.1/g)).toHaveLength(4);
    expect(text).not.toContain('127.0.0.1');
    expect(text).toContain("value: '[$(POD_IP)]:9468'");
    // Kubernetes fills in what was named before.
    expect(text.indexOf('name: POD_IP')).toBeLessThan(text.indexOf('name: DETOUR_HTTP'));
  });
});

it('with mptcpify names the setting, and sees the control groups of pods without changing them', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'detour-overlay-'));
  try {
    symlinkSync(files, join(folder, 'k8s'));
    mkdirSync(join(folder, 'own'));
    const [kind, resources] = [
      'apiVersion: kustomize.config.k8s.io/v1beta1\nkind: Kustomization',
      '../k8s/overlays/pods',
    ];
    const text = `${kind}\nresources: [${resources}]\ncomponents: [../k8s/components/mptcpify]\n`;
    writeFileSync(join(folder, 'own/kustomization.yaml'), text);
    const agent = readManifests(await kustomize(join(folder, 'own'))).find(({ kind }) => kind === 'DaemonSet');
    if (!agent) throw new Error('there is no DaemonSet');
    expect(complaintsAbout(agent)).toEqual([]);
    const shown = JSON.stringify(agent);
    expect(shown).toContain('{"name":"DETOUR_MPTCPIFY","value":"labelled"}');
    expect(shown).toContain('{"mountPath":"/sys/fs/cgroup","name":"cgroup","readOnly":true}');
  } finally {
    rmSync(folder, { recursive: true });
  }
});

it("an overlay of one's own, as docs/kubernetes.md has it, sets image, priority and settings", async () => {
  const folder = mkdtempSync(join(tmpdir(), 'detour-overlay-'));
  try {
    const document = readFileSync(join(root, 'docs/kubernetes.md'), 'utf8');
    const text = /```yaml\n(apiVersion: kustomize[^`]*)```/.exec(document)?.[1] ?? '';
    // Next to a clone of this repository.
    symlinkSync(root, join(folder, 'detour'));
    mkdirSync(join(folder, 'own'));
    writeFileSync(join(folder, 'own/detour-key'), 'keyid:secret\n');
    writeFileSync(join(folder, 'own/kustomization.yaml'), text);
    const manifests = readManifests(await kustomize(join(folder, 'own')));
    for (const manifest of manifests) expect(complaintsAbout(manifest)).toEqual([]);
    const named = (kind: string): Manifest => {
      const found = manifests.find((one) => one.kind === kind);
      if (!found) throw new Error(`there is no ${kind}`);
      return found;
    };
    const [secret, settings] = [named('Secret').metadata.name, named('ConfigMap').metadata.name];
    // With the hash that makes a change roll out.
    expect([secret, settings]).toEqual([
      expect.stringMatching(/^detour-client-\w+$/),
      expect.stringMatching(/^detour-client-\w+$/),
    ]);
    const agent = JSON.stringify(named('DaemonSet'));
    for (const part of [
      '"priorityClassName":"system-node-critical"',
      '"image":"registry.example.org/detour-client:0.1.0"',
      `"secretName":"${secret}"`,
      `"configMapRef":{"name":"${settings}"}`,
    ])
      expect(agent).toContain(part);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
