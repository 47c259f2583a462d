//go:build ignore
// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//
// Counts what chosen processes send and receive by IP sockets: the network of a
// virtual machine whose netdev is no tap but QEMU itself (user, socket, stream,
// dgram). Idle slots are found as at a tap.

#include "cktask.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define AF_INET 2
#define AF_INET6 10

struct process {
	struct bpf_timer timer;
	__u64 gap_ns;
	__u64 last_in, last_out;
	__u64 calls_in, calls_out, bytes_in, bytes_out;
	__u64 idle_since, idle_ns, slots, longest;
	__u32 idle;
	__u32 armed;
	__u32 ready;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct process);
} processes SEC(".maps");

static int on_timer(void *map, __u32 *key, struct process *p)
{
	__u64 now = bpf_ktime_get_ns(), in = p->last_in, out = p->last_out;
	__u64 since = in > out ? in : out, silent = now - since;
	if ((__s64)silent < 0)
		silent = 0;
	if (silent < p->gap_ns) {
		bpf_timer_start(&p->timer, p->gap_ns - silent, 0);
		return 0;
	}
	p->idle_since = since;
	p->idle = 1;
	__sync_fetch_and_add(&p->slots, 1);
	p->armed = 0;
	return 0;
}

static __always_inline int transfer(struct sock *sk, int ret, int to_vm)
{
	if (ret <= 0)
		return 0;
	__u32 tgid = bpf_get_current_pid_tgid() >> 32;
	struct process *p = bpf_map_lookup_elem(&processes, &tgid);
	if (!p)
		return 0;
	unsigned short family = sk->__sk_common.skc_family;
	if (family != AF_INET && family != AF_INET6)
		return 0;
	__u64 now = bpf_ktime_get_ns();
	if (to_vm) {
		__sync_fetch_and_add(&p->calls_in, 1);
		__sync_fetch_and_add(&p->bytes_in, ret);
		p->last_in = now;
	} else {
		__sync_fetch_and_add(&p->calls_out, 1);
		__sync_fetch_and_add(&p->bytes_out, ret);
		p->last_out = now;
	}
	if (!p->gap_ns)
		return 0;
	if (__sync_val_compare_and_swap(&p->idle, 1, 0) == 1) {
		__u64 ns = now - p->idle_since;
		__sync_fetch_and_add(&p->idle_ns, ns);
		if (ns > p->longest)
			p->longest = ns;
	}
	if (__sync_val_compare_and_swap(&p->armed, 0, 1) == 0) {
		if (!p->ready) {
			bpf_timer_init(&p->timer, &processes, CLOCK_MONOTONIC);
			bpf_timer_set_callback(&p->timer, on_timer);
			p->ready = 1;
		}
		bpf_timer_start(&p->timer, p->gap_ns, 0);
	}
	return 0;
}

/* sk, ret, flags (since Linux 6.3) */
SEC("tp_btf/sock_send_length")
int on_send(__u64 *args)
{
	return transfer((struct sock *)args[0], args[1], 0);
}

SEC("tp_btf/sock_recv_length")
int on_receive(__u64 *args)
{
	return transfer((struct sock *)args[0], args[1], 1);
}
