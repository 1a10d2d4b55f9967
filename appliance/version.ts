import { readFileSync } from 'node:fs';

declare const DETOUR_BUILD_VERSION: string | undefined;
declare const DETOUR_BUILD_REVISION: string | undefined;

/** What `detour version`, `/v1/status` and `detour_build_info` say. The bundle has it built in; a clone reads its own package. */
export const VERSION: string =
  typeof DETOUR_BUILD_VERSION === 'string'
    ? DETOUR_BUILD_VERSION
    : JSON.parse(readFileSync(new URL('../package.json', import.meta.url), 'utf8')).version;

/** The git commit it was built from, or `source`. */
export const REVISION: string = typeof DETOUR_BUILD_REVISION === 'string' ? DETOUR_BUILD_REVISION : 'source';
