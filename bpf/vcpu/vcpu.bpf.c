//go:build ignore
// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//
// Follows chosen threads, the vCPUs of virtual machines, through the scheduler: how
// long each runs, waits for a processor and sleeps, and when all of a machine's
// vCPUs sleep at once (an idle slot), which is told at its beginning.

#include "cktask.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

enum { UNKNOWN, RUNNING, WAITING, ASLEEP, STATES };

struct vcpu {
	__u64 since;
	__u64 spent[STATES]; /* ns in each state */
	__u64 switches;      /* times it was put on a processor */
	__u32 vm;
	__u32 state;
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__type(key, __u32); /* thread id */
	__type(value, struct vcpu);
} vcpus SEC(".maps");

struct machine {
	__u64 idle_since; /* 0: some vCPU is awake */
	__u64 idle_ns;    /* in slots that are over */
	__u64 slots;
	__u64 longest;
	__u32 vcpus;
	__u32 asleep;
	__u32 notify; /* tell of slots as they begin and end */
	__u32 lost;   /* events nobody took in time */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct machine);
} machines SEC(".maps");

struct slot {
	__u64 at;
	__u64 ns; /* 0: it begins; else it is over and lasted that long */
	__u32 vm;
	__u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} slots SEC(".maps");

static __always_inline void tell(struct machine *m, __u32 vm, __u64 at, __u64 ns)
{
	if (!m->notify)
		return;
	struct slot *s = bpf_ringbuf_reserve(&slots, sizeof *s, 0);
	if (!s) {
		__sync_fetch_and_add(&m->lost, 1);
		return;
	}
	s->at = at;
	s->ns = ns;
	s->vm = vm;
	s->pad = 0;
	bpf_ringbuf_submit(s, 0);
}

static __always_inline void enter(struct vcpu *v, __u32 state)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 old = v->state;
	if (old == state)
		return;
	if (old < STATES && v->since)
		v->spent[old] += now - v->since;
	v->since = now;
	v->state = state;
	if (old != ASLEEP && state != ASLEEP)
		return;
	__u32 vm = v->vm;
	struct machine *m = bpf_map_lookup_elem(&machines, &vm);
	if (!m)
		return;
	/* A vCPU's own changes come one after another; the number asleep is what the
	 * vCPUs share. Whoever makes it complete begins the slot, whoever breaks it
	 * ends it. */
	if (state == ASLEEP) {
		if (__sync_fetch_and_add(&m->asleep, 1) + 1 != m->vcpus)
			return;
		m->idle_since = now;
		__sync_fetch_and_add(&m->slots, 1);
		tell(m, vm, now, 0);
		return;
	}
	if (__sync_fetch_and_add(&m->asleep, -1) != m->vcpus)
		return;
	__u64 since = m->idle_since, ns = now - since;
	m->idle_since = 0;
	if (!since || (__s64)ns < 0)
		return;
	__sync_fetch_and_add(&m->idle_ns, ns);
	if (ns > m->longest)
		m->longest = ns;
	tell(m, vm, now, ns);
}

/* preempt, prev, next, prev_state (since Linux 5.18) */
SEC("tp_btf/sched_switch")
int on_switch(__u64 *args)
{
	struct task_struct *prev = (struct task_struct *)args[1], *next = (struct task_struct *)args[2];
	__u32 pid = prev->pid;
	struct vcpu *v = bpf_map_lookup_elem(&vcpus, &pid);
	if (v)
		enter(v, args[0] & 1 || !(__u32)args[3] ? WAITING : ASLEEP);
	pid = next->pid;
	v = bpf_map_lookup_elem(&vcpus, &pid);
	if (v) {
		v->switches++;
		enter(v, RUNNING);
	}
	return 0;
}

SEC("tp_btf/sched_wakeup")
int on_wakeup(__u64 *args)
{
	struct task_struct *task = (struct task_struct *)args[0];
	__u32 pid = task->pid;
	struct vcpu *v = bpf_map_lookup_elem(&vcpus, &pid);
	/* One that was woken before it had gone to sleep still runs. */
	if (v && v->state != RUNNING)
		enter(v, WAITING);
	return 0;
}
