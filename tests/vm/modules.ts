import { execFile } from 'node:child_process';
import { promisify } from 'node:util';

/** What laboratories, the router's rules and the agent's questions need; what these depend on comes with them. */
export const MODULES: readonly string[] = [
  ...['veth', 'bridge', 'br_netfilter', 'tun', 'dummy', 'wireguard', 'overlay'],
  ...['sch_netem', 'sch_tbf', 'sch_fq', 'tcp_diag', 'mptcp_diag'],
  ...['nf_tables', 'nft_chain_nat', 'nft_nat', 'nft_masq', 'nft_ct', 'nft_limit', 'nft_connlimit', 'nft_fib_inet'],
  ...['nft_reject_inet', 'nft_compat', 'nf_conntrack_netlink', 'xt_MASQUERADE', 'xt_conntrack'],
];

/**
 * Loads them all. The kernel would load each when it is asked for, but it takes the emulated processor longer to load those of the
 * router's rules, one after the other, than the router waits for nft.
 */
export async function loadModules(): Promise<void> {
  await promisify(execFile)('modprobe', ['--all', ...MODULES]);
}
