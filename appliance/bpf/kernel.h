/* SPDX-License-Identifier: Apache-2.0 OR GPL-2.0-only */
/*
 * What BPF programs of ours need to know of the kernel. Types of the kernel name only the fields that are read; where those are in the kernel that
 * runs is found out when the program is loaded (CO-RE), so there is one object for every kernel and architecture, and no vmlinux.h.
 */
#pragma once

typedef unsigned char __u8;
typedef unsigned short __u16;
typedef unsigned int __u32;
typedef unsigned long long __u64;
typedef int __s32;
typedef long long __s64;
/* Not by sparse's rules: libbpf's list of helpers names them in declarations. */
typedef __u16 __be16;
typedef __u32 __be32;
typedef __u32 __wsum;

#include <bpf/bpf_helpers.h>
#include <bpf/bpf_tracing.h>

/* uapi/linux/bpf.h, which would need the headers of one architecture */
enum {
	BPF_MAP_TYPE_HASH = 1,
	BPF_MAP_TYPE_ARRAY = 2,
	/* Memory for what is there, not for what may be. */
	BPF_F_NO_PREALLOC = 1,
};

#define KERNEL_TYPE __attribute__((preserve_access_index))
