/** `detour invite`: a client's configuration, ready to paste. Pure text; it holds the secret, so only stdout may see it. */

export type Invitation = {
  /** Name of the detour at the client. */
  readonly name: string;
  /** Where the client finds the router: a name or an address, IPv6 without brackets. */
  readonly host: string;
  readonly port: number;
  /** `keyid:secret`, without label. */
  readonly key: string;
  readonly image: string;
};

export const INVITE_FORMATS = ['docker', 'compose', 'kubernetes', 'env'] as const;
export type InviteFormat = (typeof INVITE_FORMATS)[number];

const SYSCTL_MOUNT = '/proc/sys/net/mptcp:/host/proc/sys/net/mptcp';

const source = ({ name, host, port }: Invitation): string =>
  `${name}=${host.includes(':') ? `[${host}]` : host}:${port}`;

/** The configuration as text. Everything in it is made of letters that neither a shell nor YAML interprets. */
export function renderInvite(invitation: Invitation, format: InviteFormat): string {
  const { key, image } = invitation;
  switch (format) {
    case 'env':
      return `DETOUR_KEY=${key}\nDETOUR_DETOURS=${source(invitation)}\n`;
    case 'docker':
      // The key goes into a file: what is on a command line shows in \`ps\` and in \`docker inspect\`.
      return `(umask 077 && printf '%s\\n' '${key}' > detour-key)
docker run -d --name detour-client --restart unless-stopped --network host \\
  --cap-drop ALL --cap-add NET_ADMIN --security-opt no-new-privileges --read-only --tmpfs /run \\
  -v "$PWD/detour-key:/run/secrets/detour_key:ro" \\
  -v ${SYSCTL_MOUNT} -e DETOUR_SYSCTL_ROOT=/host/proc/sys \\
  -e DETOUR_DETOURS='${source(invitation)}' \\
  ${image}
`;
    case 'compose':
      return `# First: (umask 077 && printf '%s\\n' '${key}' > detour-key)
services:
  detour-client:
    image: ${image}
    restart: unless-stopped
    network_mode: host
    cap_drop: [ALL]
    cap_add: [NET_ADMIN]
    security_opt: ["no-new-privileges:true"]
    read_only: true
    tmpfs: [/run]
    volumes: ["${SYSCTL_MOUNT}"]
    environment:
      DETOUR_SYSCTL_ROOT: /host/proc/sys
      DETOUR_DETOURS: "${source(invitation)}"
    secrets: [detour_key]
secrets:
  detour_key:
    file: ./detour-key
`;
    case 'kubernetes':
      return `# kubectl apply -f this, then -f k8s/detour-client.yaml (pods with an annotation) or -f k8s/detour-client-host.yaml (nodes)
apiVersion: v1
kind: Namespace
metadata:
  name: detour-system
  labels:
    pod-security.kubernetes.io/enforce: privileged
    pod-security.kubernetes.io/audit: privileged
    pod-security.kubernetes.io/warn: privileged
---
apiVersion: v1
kind: Secret
metadata:
  name: detour-client
  namespace: detour-system
type: Opaque
stringData:
  key: "${key}"
---
apiVersion: v1
kind: ConfigMap
metadata:
  name: detour-client
  namespace: detour-system
data:
  DETOUR_DETOURS: "${source(invitation)}"
`;
  }
}
