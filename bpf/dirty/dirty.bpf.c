//go:build ignore
// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//
// Counts the write faults of chosen processes on chosen ranges of their memory
// and remembers which pages they were about. On memory that is write-protected
// asynchronously (WP_ASYNC), the first write to each page since it was armed is
// such a fault: the programs are a live counter of what PAGEMAP_SCAN will report.
// They change and delay nothing.

#include "cktask.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define PAGE_SHIFT 12
#define HEAT_SHIFT 9 /* pages per heat region: 512, that is 2 MiB */
#define MAX_RANGES 24

/* The error code of an x86 page fault: the access was a write. */
#define FAULT_WRITE 2

/* A piece of the process's address space; its pages are numbered from first on. */
struct range {
	__u64 start;
	__u64 bytes;
	__u64 first;
};

struct target {
	__u64 faults;        /* write faults seen */
	__u64 kernel_faults; /* of them, in kernel mode: copies to user memory */
	__u64 pages;         /* bits set: pages written for the first time */
	__u64 mm;            /* learned from the first fault */
	__u32 ranges;
	__u32 pad;
	struct range range[MAX_RANGES];
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32); /* process id */
	__type(value, struct target);
} targets SEC(".maps");

/* Kernel threads that work in a target's memory have another process id. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64); /* address of its mm_struct */
	__type(value, __u32);
} spaces SEC(".maps");

struct bitmap {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
};

/* One bit for each page: it was written since somebody cleared the bit. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__array(values, struct bitmap);
} bitmaps SEC(".maps");

struct heat {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE | BPF_F_INNER_MAP);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
};

/* First writes in each region of 2 MiB. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH_OF_MAPS);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__array(values, struct heat);
} heats SEC(".maps");

static __always_inline int page_fault(__u64 address, __u64 error_code, int kernel)
{
	if (!(error_code & FAULT_WRITE))
		return 0;
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 mm = (__u64)task->mm;
	__u32 tgid = task->tgid;
	if (task->flags & PF_KTHREAD) {
		__u32 *owner = bpf_map_lookup_elem(&spaces, &mm);
		if (!owner)
			return 0;
		tgid = *owner;
	}
	struct target *t = bpf_map_lookup_elem(&targets, &tgid);
	if (!t)
		return 0;
	if (t->mm != mm) {
		t->mm = mm;
		bpf_map_update_elem(&spaces, &mm, &tgid, BPF_ANY);
	}
	for (__u32 i = 0; i < MAX_RANGES; i++) {
		if (i >= t->ranges)
			return 0;
		__u64 offset = address - t->range[i].start;
		if (offset >= t->range[i].bytes)
			continue;
		__sync_fetch_and_add(&t->faults, 1);
		if (kernel)
			__sync_fetch_and_add(&t->kernel_faults, 1);
		__u64 page = t->range[i].first + (offset >> PAGE_SHIFT);
		void *bits = bpf_map_lookup_elem(&bitmaps, &tgid);
		if (!bits)
			return 0;
		__u32 index = page >> 6;
		__u64 bit = 1ull << (page & 63);
		__u64 *word = bpf_map_lookup_elem(bits, &index);
		if (!word || *word & bit || __sync_fetch_and_or(word, bit) & bit)
			return 0;
		__sync_fetch_and_add(&t->pages, 1);
		void *heat = bpf_map_lookup_elem(&heats, &tgid);
		if (!heat)
			return 0;
		index = page >> HEAT_SHIFT;
		word = bpf_map_lookup_elem(heat, &index);
		if (word)
			__sync_fetch_and_add(word, 1);
		return 0;
	}
	return 0;
}

SEC("tp_btf/page_fault_user")
int on_user_fault(__u64 *args)
{
	return page_fault(args[0], args[2], 0);
}

SEC("tp_btf/page_fault_kernel")
int on_kernel_fault(__u64 *args)
{
	return page_fault(args[0], args[2], 1);
}
