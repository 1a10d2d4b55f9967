/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What a client's kernel has to do for in-band transit (docs/protocol.md): into the SYN of a join to a capability port goes the address and the port
 * of the server, which the joining socket's Multipath TCP connection knows. There is no state for each server.
 */
#include "../../appliance/bpf/kernel.h"

char LICENSE[] SEC("license") = "GPL";

/* uapi/linux/bpf.h */
enum {
	BPF_MAP_TYPE_SK_STORAGE = 24,
	BPF_SK_STORAGE_GET_F_CREATE = 1,
	BPF_SOCK_OPS_TCP_CONNECT_CB = 3,
	BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB = 4,
	BPF_SOCK_OPS_HDR_OPT_LEN_CB = 14,
	BPF_SOCK_OPS_WRITE_HDR_OPT_CB = 15,
	BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG = 64,
};

#define AF_INET 2
#define OPTION_KIND 253
#define OPTION_BYTES 8

struct bpf_sock;

/* uapi/linux/bpf.h: the kernel finds fields by where they are here. */
struct bpf_sock_ops {
	__u32 op;
	__u32 args[4];
	__u32 family;
	__u32 remote_ip4; /* network order */
	__u32 local_ip4;
	__u32 remote_ip6[4];
	__u32 local_ip6[4];
	__u32 remote_port; /* network order, in the upper half on little-endian machines */
	__u32 local_port;
	__u32 is_fullsock;
	__u32 snd_cwnd;
	__u32 srtt_us;
	__u32 bpf_sock_ops_cb_flags;
	__u32 others[20];
	__u64 bytes_received;
	__u64 bytes_acked;
	union {
		struct bpf_sock *sk;
		__u64 : 64;
	} __attribute__((aligned(8)));
};

_Static_assert(__builtin_offsetof(struct bpf_sock_ops, sk) == 184, "as in uapi/linux/bpf.h");

struct sock_common {
	__be32 skc_daddr;
	__be16 skc_dport;
	unsigned short skc_family;
} KERNEL_TYPE;

struct sock {
	struct sock_common __sk_common;
} KERNEL_TYPE;

struct inet_sock {
	struct sock sk;
} KERNEL_TYPE;

struct inet_connection_sock {
	struct inet_sock icsk_inet;
} KERNEL_TYPE;

struct mptcp_sock {
	struct inet_connection_sock sk;
} KERNEL_TYPE;

struct place {
	__be32 address;
	__be16 port;
	__u16 zero;
};

struct option {
	__u8 bytes[OPTION_BYTES];
};

/* Capability ports of detours. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 1024);
	__type(key, struct place);
	__type(value, __u32);
} inband_ports SEC(".maps");

/* What a socket's SYN is to carry. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct option);
} inband_options SEC(".maps");

static int prepare(struct bpf_sock_ops *ops)
{
	struct place detour = {.address = ops->remote_ip4, .port = ops->remote_port >> 16};
	struct bpf_sock *sk = ops->sk;
	struct mptcp_sock *connection;
	struct option *option;
	__u32 address;
	__u16 port;

	if (ops->family != AF_INET || !sk || !bpf_map_lookup_elem(&inband_ports, &detour))
		return 1;
	connection = bpf_skc_to_mptcp_sock(sk);
	if (!connection)
		return 1;
	address = connection->sk.icsk_inet.sk.__sk_common.skc_daddr;
	port = connection->sk.icsk_inet.sk.__sk_common.skc_dport;
	option = bpf_sk_storage_get(&inband_options, sk, 0, BPF_SK_STORAGE_GET_F_CREATE);
	if (!option)
		return 1;
	option->bytes[0] = OPTION_KIND;
	option->bytes[1] = OPTION_BYTES;
	/* Both are in network order already, on machines that are little-endian. */
	option->bytes[2] = address;
	option->bytes[3] = address >> 8;
	option->bytes[4] = address >> 16;
	option->bytes[5] = address >> 24;
	option->bytes[6] = port;
	option->bytes[7] = port >> 8;
	bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
	return 1;
}

SEC("sockops")
int inband(struct bpf_sock_ops *ops)
{
	struct bpf_sock *sk;
	struct option *option;

	switch (ops->op) {
	case BPF_SOCK_OPS_TCP_CONNECT_CB:
		return prepare(ops);
	case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
	case BPF_SOCK_OPS_WRITE_HDR_OPT_CB:
	case BPF_SOCK_OPS_ACTIVE_ESTABLISHED_CB:
		break;
	default:
		return 1;
	}
	sk = ops->sk;
	if (!sk)
		return 1;
	option = bpf_sk_storage_get(&inband_options, sk, 0, 0);
	if (!option)
		return 1;
	if (ops->op == BPF_SOCK_OPS_HDR_OPT_LEN_CB)
		bpf_reserve_hdr_opt(ops, OPTION_BYTES, 0);
	else if (ops->op == BPF_SOCK_OPS_WRITE_HDR_OPT_CB)
		bpf_store_hdr_opt(ops, option->bytes, OPTION_BYTES, 0);
	else
		bpf_sock_ops_cb_flags_set(ops, ops->bpf_sock_ops_cb_flags & ~BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
	return 1;
}
