import type { Memory } from '../../appliance/kernel/memory.ts';
import { type Sysctl, SysctlError } from '../../appliance/kernel/sysctl.ts';

/** Kernel parameters in a map; absent ones do not exist, those in `readOnly` cannot be written. */
export class FakeSysctl implements Sysctl {
  readonly values: Map<string, string>;
  readonly readOnly = new Set<string>();

  constructor(values: Readonly<Record<string, string>>) {
    this.values = new Map(Object.entries(values));
  }

  async read(name: string): Promise<string | null> {
    return this.values.get(name) ?? null;
  }

  async write(name: string, value: string): Promise<void> {
    if (!this.values.has(name)) throw new SysctlError(name, value, 'ENOENT');
    if (this.readOnly.has(name)) throw new SysctlError(name, value, 'EROFS');
    this.values.set(name, value);
  }

  async writable(name: string): Promise<boolean> {
    return this.values.has(name) && !this.readOnly.has(name);
  }
}

/** A memory that outlives agents but not the test. */
export class FakeMemory implements Memory {
  values: ReadonlyMap<string, string> | null = null;
  broken = false;

  async recall(): Promise<ReadonlyMap<string, string> | null> {
    if (this.broken) throw new Error('cannot read: nft: no such program');
    return this.values;
  }

  async remember(values: ReadonlyMap<string, string>): Promise<void> {
    if (this.broken) throw new Error('cannot write: nft: no such program');
    this.values ??= new Map(values);
  }

  async forget(): Promise<void> {
    if (this.broken) throw new Error('cannot delete: nft: no such program');
    this.values = null;
  }
}
