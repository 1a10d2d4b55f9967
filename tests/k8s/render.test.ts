import { globSync, readFileSync } from 'node:fs';
import { join } from 'node:path';
import { describe, expect, it } from 'vitest';
import { RENDERED, render, renderFile } from '../../k8s/render.ts';
import { complaintsAbout, readManifests } from '../lab/manifests.ts';

/** In this ring because it brings kubectl. */

const folder = join(import.meta.dirname, '../../k8s');
const overlays = globSync('overlays/*', { cwd: folder }).map((path) => path.replace('overlays/', ''));

it.each(Object.entries(RENDERED))('%s is what kustomize makes of the overlay %s', async (file, overlay) => {
  expect(readFileSync(join(folder, file), 'utf8')).toBe(await renderFile(overlay));
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
