/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * Makes TCP sockets of chosen processes Multipath TCP: the kernel asks update_socket_protocol() for the protocol of each new socket (net/socket.c,
 * Linux 6.6), and this answers for it. A peer without Multipath TCP is spoken to by plain TCP, which the kernel sees to.
 *
 * Everything that may be chosen is in two maps, which appliance/client/switches.ts fills.
 */
#include "kernel.h"

/*
 * The kernel gives helpers and the fields of its structures to GPL-compatible programs only, and knows no Apache licence. So this file, like the
 * header beside it, may be had under either, and the kernel is told of the one that it knows.
 */
char LICENSE[] SEC("license") = "GPL";

/* linux/socket.h, linux/net.h, uapi/linux/in.h */
#define AF_INET 2
#define AF_INET6 10
#define SOCK_TYPE_MASK 0xf
#define SOCK_STREAM 1
#define IPPROTO_TCP 6
#define IPPROTO_MPTCP 262

/* Deeper control groups are as their ancestors at this depth: kubelets in containers come to 10. */
#define DEEPEST_GROUP 32

/* Bit 0 of a value says whether; the others are user space's own. */
#define ON 1

struct ns_common {
	unsigned int inum;
} KERNEL_TYPE;

struct net {
	struct ns_common ns;
} KERNEL_TYPE;

struct nsproxy {
	struct net *net_ns;
} KERNEL_TYPE;

struct task_struct {
	struct nsproxy *nsproxy;
} KERNEL_TYPE;

/*
 * Network namespaces, by inode. Only where somebody serves, because where net.mptcp.enabled is 0 an MPTCP socket is
 * refused (ENOPROTOOPT), and a program that asked for TCP would have none.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u32);
	__type(value, __u32);
} mptcp_nets SEC(".maps");

/* Control groups (v2), by id. The nearest one that is in here decides for all processes below it. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, __u64);
	__type(value, __u32);
} mptcp_groups SEC(".maps");

/* How many sockets were made Multipath TCP. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} mptcp_made SEC(".maps");

/*
 * The agent asks servers by plain TCP whether they answer directly, and its own connections want no paths. A process says so by its name (PR_SET_NAME),
 * which needs no privilege and ends with it; whoever takes that name stays with TCP, and harms nobody.
 */
static __always_inline int is_agent(void)
{
	/* TASK_COMM_LEN; what is behind the name is zero. */
	union {
		char text[16];
		__u64 part[2];
	} name = {}, agent = { "detour" };

	bpf_get_current_comm(name.text, sizeof(name.text));
	return name.part[0] == agent.part[0] && name.part[1] == agent.part[1];
}

static __always_inline int is_chosen(void)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 net = task->nsproxy->net_ns->ns.inum;
	__u32 choice = 0;

	if (!bpf_map_lookup_elem(&mptcp_nets, &net))
		return 0;
	for (int level = 0; level < DEEPEST_GROUP; level++) {
		__u64 group = bpf_get_current_ancestor_cgroup_id(level);
		__u32 *entry;

		if (group == 0)
			break;
		entry = bpf_map_lookup_elem(&mptcp_groups, &group);
		if (entry)
			choice = *entry;
	}
	return choice & ON;
}

/* 0 lets the kernel, or the next program on the same hook, go on as without this one. */
SEC("fmod_ret/update_socket_protocol")
int BPF_PROG(mptcpify, int family, int type, int protocol)
{
	__u32 first = 0;
	__u64 *made;

	if (family != AF_INET && family != AF_INET6)
		return 0;
	/* Comes with SOCK_CLOEXEC and SOCK_NONBLOCK in it. */
	if ((type & SOCK_TYPE_MASK) != SOCK_STREAM)
		return 0;
	if (protocol != 0 && protocol != IPPROTO_TCP)
		return 0;
	if (!is_chosen() || is_agent())
		return 0;
	made = bpf_map_lookup_elem(&mptcp_made, &first);
	if (made)
		__sync_fetch_and_add(made, 1);
	return IPPROTO_MPTCP;
}
