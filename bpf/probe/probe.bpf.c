//go:build ignore
// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//
// One tiny program for each mechanism the project may use, to learn whether this
// kernel takes it. None changes or delays anything.

#include "ckbpf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct __sk_buff;

/* Faults of the process tgid seen so far. */
volatile const __u32 tgid = 0;
__u64 user_faults = 0;

SEC("tp_btf/page_fault_user")
int page_fault_user(__u64 *args)
{
	if (bpf_get_current_pid_tgid() >> 32 == tgid)
		__sync_fetch_and_add(&user_faults, 1);
	return 0;
}

/* A function that is rarely called and exists everywhere. */
SEC("fentry/__x64_sys_getpgid")
int fentry_getpgid(__u64 *args)
{
	return 0;
}

SEC("tcx/ingress")
int tcx_pass(struct __sk_buff *skb)
{
	return -1; /* TCX_NEXT */
}

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} ring SEC(".maps");

SEC("tc")
int ring_write(struct __sk_buff *skb)
{
	__u64 token = 0x636b6167656e7431;
	return bpf_ringbuf_output(&ring, &token, sizeof token, 0);
}

struct timed {
	struct bpf_timer timer;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct timed);
} timers SEC(".maps");

static int on_timer(void *map, __u32 *key, struct timed *value)
{
	__u64 token = 0x636b6167656e7432;
	bpf_ringbuf_output(&ring, &token, sizeof token, 0);
	return 0;
}

SEC("tc")
int timer_start(struct __sk_buff *skb)
{
	__u32 key = 0;
	struct timed *v = bpf_map_lookup_elem(&timers, &key);
	if (!v)
		return 1;
	if (bpf_timer_init(&v->timer, &timers, CLOCK_MONOTONIC))
		return 2;
	if (bpf_timer_set_callback(&v->timer, on_timer))
		return 3;
	return bpf_timer_start(&v->timer, 100000 /* ns */, 0) ? 4 : 0;
}
