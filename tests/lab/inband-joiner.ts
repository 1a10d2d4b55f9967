/**
 * A client without any judgement, for tests of the kernels' part: gives every Multipath TCP connection of this network namespace one more path,
 * by a join that names its server. Prints how many there are when that changes.
 *   node inband-joiner.ts <router> <keyid:secret>
 */

import { udpDatagrams } from '../../appliance/kernel/datagrams.ts';
import { openInband } from '../../appliance/kernel/inband.ts';
import { openPathManager } from '../../appliance/kernel/mptcp.ts';
import { ownNamespace } from '../../appliance/kernel/namespaces.ts';
import type { Address } from '../../appliance/protocol/address.ts';
import { parseEndpoint } from '../../appliance/protocol/address.ts';
import { readKey, Speaker } from './speaker.ts';

/** A router takes 50 SYNs a second from a client, and 100 at once. */
const EVERY_MS = 22;

const router = parseEndpoint(process.argv[2] ?? '');
if (!router) throw new Error('no router');
const speaker = await Speaker.open(udpDatagrams(), router, readKey(process.argv[3] ?? ''));
const port = (await speaker.hello())?.capabilityPort ?? 0;
if (port === 0) throw new Error('no capability port');
const remote = { address: router.address, port };
const naming = openInband();
naming.add(remote);
const waiting: { readonly token: number; readonly local: Address }[] = [];
let [joined, refused] = [0, 0];
const manager = await openPathManager(ownNamespace, (event) => {
  if (event.kind === 'established' && !event.serverSide)
    waiting.push({ token: event.token, local: event.local.address });
  else if (event.kind === 'subflow-established') joined++;
  else if (event.kind === 'subflow-closed' && event.error !== 0) refused++;
});
setInterval(() => {
  const next = waiting.shift();
  if (!next) return;
  manager.subflowCreate({ ...next, localId: 0, remote, backup: false }).catch(() => refused++);
}, EVERY_MS);
setInterval(() => process.stdout.write(`joined ${joined} refused ${refused}\n`), 500);
process.stdout.write('ready\n');
