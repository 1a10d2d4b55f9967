/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/* The other kind of program that appliance/kernel/bpf.ts loads: counts the connections that processes of a control group open. */
#include "../../appliance/bpf/kernel.h"

char LICENSE[] SEC("license") = "GPL";

/* uapi/linux/bpf.h */
#define BPF_SOCK_OPS_TCP_CONNECT_CB 3

struct bpf_sock_ops {
	__u32 op;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} connects SEC(".maps");

SEC("sockops")
int count(struct bpf_sock_ops *ops)
{
	__u32 first = 0;
	__u64 *number = bpf_map_lookup_elem(&connects, &first);

	if (number && ops->op == BPF_SOCK_OPS_TCP_CONNECT_CB)
		__sync_fetch_and_add(number, 1);
	return 1;
}
