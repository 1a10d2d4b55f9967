import { BpfError } from '../../appliance/kernel/bpf.ts';
import type { Groups } from '../../appliance/kernel/cgroups.ts';
import type { Switches, Table } from '../../appliance/kernel/mptcpify.ts';

/** A map of the kernel that can be full, and that may be forbidden to write. */
class FakeTable<K> implements Table<K> {
  readonly values = new Map<K, number>();
  /** As in bpf/mptcpify.bpf.c. */
  room = 16_384;
  readOnly = false;

  entries(): ReadonlyMap<K, number> {
    return new Map(this.values);
  }

  set(key: K, value: number): void {
    if (this.readOnly) throw new BpfError('failed', 'writing: EPERM');
    if (!this.values.has(key) && this.values.size >= this.room) throw new BpfError('failed', 'writing: E2BIG');
    this.values.set(key, value);
  }

  delete(key: K): void {
    if (this.readOnly) throw new BpfError('failed', 'writing: EPERM');
    this.values.delete(key);
  }
}

/** What mptcpify.bpf.c reads; no sockets. */
export class FakeSwitches implements Switches {
  readonly by: Switches['by'];
  readonly nets = new FakeTable<number>();
  readonly groups = new FakeTable<bigint>();
  sockets = 0;
  closed = false;

  constructor(by: Switches['by'] = 'agent') {
    this.by = by;
  }

  made(): number {
    return this.sockets;
  }

  close(): void {
    this.closed = true;
  }
}

/** Control groups by their paths; found as the real ones are, the uppermost first. */
export class FakeGroups implements Groups {
  readonly paths = new Map<string, bigint>();
  broken: string | null = null;

  async find(names: ReadonlySet<string>): Promise<ReadonlyMap<string, readonly bigint[]>> {
    if (this.broken !== null) throw new Error(this.broken);
    const found = new Map<string, bigint[]>();
    for (const [path, id] of this.paths) {
      const parts = path.split('/');
      const last = parts.pop() ?? '';
      for (const name of names) {
        const above = parts.some((part) => [...names].some((one) => part.includes(one)));
        if (last.includes(name) && !above) found.set(name, [...(found.get(name) ?? []), id]);
      }
    }
    return found;
  }
}
