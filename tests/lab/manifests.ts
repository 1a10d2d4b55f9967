/** Kubernetes objects as text, held to the schemas that Kubernetes and prometheus-operator publish. */
import { PodMonitor } from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PodMonitor';
import { PrometheusRule } from '@kubernetes-models/prometheus-operator/monitoring.coreos.com/v1/PrometheusRule';
import { DaemonSet } from 'kubernetes-models/apps/v1/DaemonSet';
import { Deployment } from 'kubernetes-models/apps/v1/Deployment';
import { ClusterRole } from 'kubernetes-models/rbac.authorization.k8s.io/v1/ClusterRole';
import { ClusterRoleBinding } from 'kubernetes-models/rbac.authorization.k8s.io/v1/ClusterRoleBinding';
import { ConfigMap } from 'kubernetes-models/v1/ConfigMap';
import { Namespace } from 'kubernetes-models/v1/Namespace';
import { Pod } from 'kubernetes-models/v1/Pod';
import { Secret } from 'kubernetes-models/v1/Secret';
import { Service } from 'kubernetes-models/v1/Service';
import { ServiceAccount } from 'kubernetes-models/v1/ServiceAccount';
import { parseAllDocuments } from 'yaml';

export type Manifest = {
  readonly apiVersion: string;
  readonly kind: string;
  readonly metadata: {
    readonly name: string;
    readonly namespace?: string;
    readonly labels?: Readonly<Record<string, string>>;
  };
  readonly [field: string]: unknown;
};

type Model = { validate(): void };
/** Each class asks for an object of its own type, which is what is to be found out here. */
type ModelClass = new (data: never) => Model;

const KINDS: Readonly<Record<string, ModelClass>> = {
  'apps/v1 DaemonSet': DaemonSet,
  'apps/v1 Deployment': Deployment,
  'monitoring.coreos.com/v1 PodMonitor': PodMonitor,
  'monitoring.coreos.com/v1 PrometheusRule': PrometheusRule,
  'rbac.authorization.k8s.io/v1 ClusterRole': ClusterRole,
  'rbac.authorization.k8s.io/v1 ClusterRoleBinding': ClusterRoleBinding,
  'v1 ConfigMap': ConfigMap,
  'v1 Namespace': Namespace,
  'v1 Pod': Pod,
  'v1 Secret': Secret,
  'v1 Service': Service,
  'v1 ServiceAccount': ServiceAccount,
};

/** The objects of a file of several documents. Throws for a text that is no YAML. */
export function readManifests(text: string): Manifest[] {
  return parseAllDocuments(text).map((document) => {
    const [error] = document.errors;
    if (error) throw error;
    return document.toJS() as Manifest;
  });
}

/** What the schema of its kind says against an object; fields that it does not know are among it, for the API server would drop them. */
export function complaintsAbout(manifest: Manifest): string[] {
  const kind = `${manifest.apiVersion} ${manifest.kind}`;
  const Class = KINDS[kind];
  if (!Class) return [`${kind}: no schema for this kind is known here`];
  const model = new Class(manifest as never);
  // The schemas allow further fields, as OpenAPI does. What a validator has no rule for, it never looks at.
  const reads: Reads = new Map();
  try {
    watched(model, reads).validate();
  } catch (error) {
    return [error instanceof Error ? error.message : String(error)];
  }
  return unread({ ...model }, reads.get(model), reads, '');
}

/** Names of the fields that were read, by object. */
type Reads = Map<object, Set<string>>;

/** `value`, whose fields and theirs are noted when they are read. */
function watched<T extends object>(value: T, reads: Reads): T {
  return new Proxy(value, {
    get(target, field, receiver) {
      const seen = reads.get(value) ?? new Set();
      reads.set(value, seen);
      if (typeof field === 'string') seen.add(field);
      const found: unknown = Reflect.get(target, field, receiver);
      return typeof found === 'object' && found !== null ? watched(found, reads) : found;
    },
  });
}

function unread(value: object, seen: ReadonlySet<string> | undefined, reads: Reads, path: string): string[] {
  return Object.entries(value).flatMap(([field, inner]: [string, unknown]) => {
    const at = path === '' ? field : `${path}.${field}`;
    if (!seen?.has(field)) return [`${at}: is no field of this kind`];
    return typeof inner === 'object' && inner !== null ? unread(inner, reads.get(inner), reads, at) : [];
  });
}
