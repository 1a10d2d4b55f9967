import { Counter, Gauge, Histogram, Registry } from 'prom-client';
import type { AnnouncedStatus } from './announcer.ts';
import type { MptcpifyStatus } from './mptcpify.ts';
import type { SourceStatus } from './sources.ts';
import type { State } from './state.ts';

/** What Prometheus is told: sums over all namespaces that are served, so that labels stay few. */
export type ClientMetrics = ReturnType<typeof createMetrics>;

/** What there is now, whenever it is asked for. */
export type Measured = {
  /** Of the namespaces that are served. */
  readonly states: () => readonly State[];
  readonly sources: () => readonly SourceStatus[];
  readonly workloads: () => readonly WorkloadState[];
  readonly mptcpify: () => MptcpifyStatus;
  readonly announced: () => readonly AnnouncedStatus[];
};

/** Of a container or pod that asked to be served. */
export type WorkloadState = 'starting' | 'served' | 'failed';

export function createMetrics({ states, sources, workloads, mptcpify, announced }: Measured) {
  const registry = new Registry();
  const registers = [registry];
  const each = <T>(pick: (state: State) => Iterable<T>): T[] => states().flatMap((state) => [...pick(state)]);
  const count = <T extends string>(values: Iterable<T>): Map<T, number> => {
    const counts = new Map<T, number>();
    for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
    return counts;
  };
  new Gauge({
    name: 'detour_client_connections',
    help: 'MPTCP connections this host opened, by whether they may get paths',
    labelNames: ['managed'],
    registers,
    collect() {
      const all = each(({ connections }) => connections.values());
      const counts = count(all.map((one) => (one.unmanaged === null ? 'yes' : 'no')));
      for (const managed of ['yes', 'no'] as const) this.set({ managed }, counts.get(managed) ?? 0);
    },
  });
  new Gauge({
    name: 'detour_client_paths',
    help: 'Paths of those connections',
    labelNames: ['kind', 'state'],
    registers,
    collect() {
      this.reset();
      const counts = count(
        each(({ connections }) => connections.values()).flatMap(({ paths }) =>
          paths.map(({ kind, state }) => `${kind} ${state}`),
        ),
      );
      for (const [key, value] of counts) {
        const [kind = '', at = ''] = key.split(' ');
        this.set({ kind, state: at }, value);
      }
    },
  });
  new Gauge({
    name: 'detour_client_detours',
    help: 'Addresses of detours',
    labelNames: ['state'],
    registers,
    collect() {
      const counts = count(each(({ detours }) => detours.values()).map(({ state }) => state));
      for (const at of ['starting', 'up', 'down', 'suspended'] as const) this.set({ state: at }, counts.get(at) ?? 0);
    },
  });
  new Gauge({
    name: 'detour_client_tunnels',
    help: 'Tunnels to detours; those that are down are tried again',
    labelNames: ['state'],
    registers,
    collect() {
      const counts = count(each(({ tunnels }) => tunnels.values()).map(({ state }) => state));
      for (const at of ['asked', 'up', 'down', 'suspended'] as const) this.set({ state: at }, counts.get(at) ?? 0);
    },
  });
  new Gauge({
    name: 'detour_client_rescued_servers',
    help: 'Servers that new connections reach through a detour, because they do not answer directly',
    registers,
    collect() {
      this.set(each(({ rescue }) => rescue?.cases.values() ?? []).filter(({ via }) => via !== null).length);
    },
  });
  new Gauge({
    name: 'detour_client_leases',
    help: 'Leases held or asked for; idle ones are kept for the next connection to the same server',
    labelNames: ['state'],
    registers,
    collect() {
      const counts = count(each(({ leases }) => leases.values()).map(({ state }) => state));
      for (const at of ['asked', 'granted', 'refused'] as const) this.set({ state: at }, counts.get(at) ?? 0);
      this.set({ state: 'idle' }, each(({ idle }) => idle.keys()).length);
    },
  });
  new Gauge({
    name: 'detour_client_namespaces',
    help: 'Network namespaces that are served, this one among them',
    registers,
    collect() {
      this.set(states().length);
    },
  });
  new Gauge({
    name: 'detour_client_workloads',
    help: 'Containers and pods that asked to be served; failed ones are tried again',
    labelNames: ['state'],
    registers,
    collect() {
      const counts = count(workloads());
      for (const state of ['starting', 'served', 'failed'] as const) this.set({ state }, counts.get(state) ?? 0);
    },
  });
  new Gauge({
    name: 'detour_client_mptcpify_on',
    help: 'Whether plain TCP sockets are made Multipath TCP (DETOUR_MPTCPIFY)',
    registers,
    collect() {
      this.set(mptcpify().state === 'on' ? 1 : 0);
    },
  });
  new Gauge({
    name: 'detour_client_announcements',
    help: 'Ports of this server that detours were asked to lead joins to (DETOUR_ANNOUNCE)',
    labelNames: ['state'],
    registers,
    collect() {
      const counts = count(announced().map(({ state }) => state));
      for (const state of ['asked', 'announced', 'refused', 'unanswered'] as const)
        this.set({ state }, counts.get(state) ?? 0);
    },
  });
  new Counter({
    name: 'detour_client_mptcpified_sockets_total',
    help: 'Plain TCP sockets that were made Multipath TCP since the BPF program was attached; listening ones among them',
    registers,
    collect() {
      this.reset();
      this.inc(mptcpify().sockets ?? 0);
    },
  });
  addSourceMetrics(registry, sources);
  return {
    registry,
    joins: new Counter({
      name: 'detour_client_joins_total',
      help: 'Paths by what became of them; lost ones had been up',
      labelNames: ['outcome'],
      registers,
    }),
    exchanges: new Counter({
      name: 'detour_client_control_requests_total',
      help: 'Questions to detours by their result; timeout is five unanswered tries',
      labelNames: ['type', 'result'],
      registers,
    }),
    events: new Counter({
      name: 'detour_client_events_total',
      help: "The kernel's path manager events; events-lost counts gaps",
      labelNames: ['kind'],
      registers,
    }),
    decisions: new Counter({
      name: 'detour_client_decisions_total',
      help: "What was decided about connections' paths; repair is a path destroyed or tried anew because nothing got through",
      labelNames: ['act'],
      registers,
    }),
    networkChanges: new Counter({
      name: 'detour_client_network_changes_total',
      help: "Changes of this host's addresses or routes, and wake-ups, after which all detours were asked again",
      registers,
    }),
    rescues: new Counter({
      name: 'detour_client_rescues_total',
      help: 'Servers that did not answer directly, by what became of new connections to them',
      labelNames: ['what'],
      registers,
    }),
    joinDelay: new Histogram({
      name: 'detour_client_join_delay_seconds',
      help: 'From the ESTABLISHED event to the SYN of a first join whose lease was ready',
      buckets: [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1],
      registers,
    }),
  };
}

function addSourceMetrics(registry: Registry, sources: () => readonly SourceStatus[]): void {
  const registers = [registry];
  const labelNames = ['source'];
  new Gauge({
    name: 'detour_client_source_up',
    help: 'Whether a source of detours gave its latest answer; 0 while an older one still counts, or none came yet',
    labelNames,
    registers,
    collect() {
      for (const { source, state } of sources()) this.set({ source }, state === 'ok' ? 1 : 0);
    },
  });
  new Gauge({
    name: 'detour_client_source_detours',
    help: 'Addresses in use that a source gave',
    labelNames,
    registers,
    collect() {
      for (const { source, detours } of sources()) this.set({ source }, detours);
    },
  });
  new Gauge({
    name: 'detour_client_source_left_out',
    help: 'What a source gave beyond the bounds',
    labelNames,
    registers,
    collect() {
      for (const { source, leftOut } of sources()) this.set({ source }, leftOut);
    },
  });
  new Counter({
    name: 'detour_client_source_failures_total',
    help: 'Questions to a source, or readings of a file, that failed',
    labelNames,
    registers,
    collect() {
      this.reset();
      for (const { source, failures } of sources()) this.inc({ source }, failures);
    },
  });
}
