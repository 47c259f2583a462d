//go:build ignore
// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//
// Watches a virtual machine's network at its tap: packets and bytes each way, the
// last packet each way, idle slots (nothing either way for a gap), TCP requests that
// wait for an answer, and windows that are closed. It passes every packet on.

#include "cknet.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

struct flow_key {
	__u32 vm[4], peer[4]; /* IPv4 in the last word */
	__u32 ifindex;
	__u16 vm_port, peer_port;
};

struct flow {
	__u32 request_end; /* sequence number after the last byte to the VM */
	__u32 answer_end;  /* and from it */
	__u64 asked_at;
	__u8 vm_scale, peer_scale;
	__u8 scaled;  /* bit 0: the VM offered scaling, bit 1: the peer */
	__u8 syn;     /* who was seen opening: same bits */
	__u8 pending; /* a request waits for its answer */
	__u8 vm_shut, peer_shut; /* the window that side offers is closed */
	__u8 known;   /* ends are known: same bits */
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct flow_key);
	__type(value, struct flow);
} flows SEC(".maps");

struct device {
	struct bpf_timer timer;
	__u64 gap_ns; /* nothing for so long is idle; 0: slots are not looked for */
	__u64 last_in, last_out; /* to and from the VM */
	__u64 packets_in, packets_out, bytes_in, bytes_out;
	__u64 requests, answers, gone; /* gone: closed before an answer */
	__u64 answer_ns;
	__u64 shut, opened; /* windows closed, and open again */
	__u64 idle_since, idle_ns, slots, false_slots, longest;
	__s64 pending;
	__s64 stalled; /* windows closed now */
	__u32 idle;
	__u32 armed;
	__u32 ready;
	__u32 pad;
	__u32 notify;
	__u32 lost;
	__u32 ifindex;
	__u32 quick_ns; /* a slot that ends this soon after it was told was a false one */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32); /* interface index */
	__type(value, struct device);
} devices SEC(".maps");

enum { IDLE_BEGINS = 1, IDLE_ENDS = 2 };

struct event {
	__u64 at;
	__u64 ns; /* begins: silent so far; ends: silent in all */
	__s64 pending;
	__u32 ifindex;
	__u32 kind;
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1 << 18);
} events SEC(".maps");

/* A window closes below one full segment and opens again at two: one that hovers in
 * between is counted once. */
volatile const __u32 shut_below = 1460;
volatile const __u32 open_from = 2920;

static __always_inline void tell(struct device *d, __u32 kind, __u64 at, __u64 ns)
{
	if (!d->notify)
		return;
	struct event *e = bpf_ringbuf_reserve(&events, sizeof *e, 0);
	if (!e) {
		__sync_fetch_and_add(&d->lost, 1);
		return;
	}
	e->at = at;
	e->ns = ns;
	e->pending = d->pending;
	e->ifindex = d->ifindex;
	e->kind = kind;
	bpf_ringbuf_submit(e, 0);
}

static __always_inline __u64 last(struct device *d)
{
	__u64 in = d->last_in, out = d->last_out;
	return in > out ? in : out;
}

/* Packets only note when they came; the timer looks at that and waits for the rest. */
static int on_timer(void *map, __u32 *key, struct device *d)
{
	__u64 now = bpf_ktime_get_ns(), since = last(d), silent = now - since;
	if ((__s64)silent < 0)
		silent = 0;
	if (silent < d->gap_ns) {
		bpf_timer_start(&d->timer, d->gap_ns - silent, 0);
		return 0;
	}
	d->idle_since = since;
	d->idle = 1;
	__sync_fetch_and_add(&d->slots, 1);
	tell(d, IDLE_BEGINS, now, silent);
	d->armed = 0;
	/* A packet that came just now has seen the timer armed. */
	if (last(d) != since && __sync_val_compare_and_swap(&d->armed, 0, 1) == 0)
		bpf_timer_start(&d->timer, d->gap_ns, 0);
	return 0;
}

static __always_inline void wake(struct device *d, __u64 now)
{
	if (!d->gap_ns)
		return;
	if (__sync_val_compare_and_swap(&d->idle, 1, 0) == 1) {
		__u64 ns = now - d->idle_since;
		__sync_fetch_and_add(&d->idle_ns, ns);
		if (ns > d->longest)
			d->longest = ns;
		if (ns < d->gap_ns + d->quick_ns)
			__sync_fetch_and_add(&d->false_slots, 1);
		tell(d, IDLE_ENDS, now, ns);
	}
	if (__sync_val_compare_and_swap(&d->armed, 0, 1) == 0) {
		if (!d->ready) { /* the first packet makes the timer */
			bpf_timer_init(&d->timer, &devices, CLOCK_MONOTONIC);
			bpf_timer_set_callback(&d->timer, on_timer);
			d->ready = 1;
		}
		bpf_timer_start(&d->timer, d->gap_ns, 0);
	}
}

static __always_inline void answered(struct device *d, struct flow *f, __u64 now, int reply)
{
	if (!f->pending)
		return;
	f->pending = 0;
	__sync_fetch_and_add(&d->pending, -1);
	if (reply) {
		__sync_fetch_and_add(&d->answers, 1);
		__sync_fetch_and_add(&d->answer_ns, now - f->asked_at);
	} else {
		__sync_fetch_and_add(&d->gone, 1);
	}
}

static __always_inline void opened(struct device *d, __u8 *shut)
{
	if (!*shut)
		return;
	*shut = 0;
	__sync_fetch_and_add(&d->stalled, -1);
	__sync_fetch_and_add(&d->opened, 1);
}

static __always_inline void window(struct device *d, __u8 *shut, __u32 size)
{
	if (size >= open_from)
		opened(d, shut);
	else if (size < shut_below && !*shut) {
		*shut = 1;
		__sync_fetch_and_add(&d->stalled, 1);
		__sync_fetch_and_add(&d->shut, 1);
	}
}

/* The window scale option of a SYN: -1 if there is none. */
static __always_inline int scale_of(struct __sk_buff *skb, __u32 at, __u32 end)
{
	for (int i = 0; i < 20 && at < end; i++) {
		__u8 option[3] = {};
		if (bpf_skb_load_bytes(skb, at, option, 1) || option[0] == 0)
			return -1;
		if (option[0] == 1) {
			at++;
			continue;
		}
		if (bpf_skb_load_bytes(skb, at + 1, &option[1], 1) || option[1] < 2)
			return -1;
		if (option[0] == 3 && option[1] == 3) {
			if (bpf_skb_load_bytes(skb, at + 2, &option[2], 1))
				return -1;
			return option[2] > 14 ? 14 : option[2];
		}
		at += option[1];
	}
	return -1;
}

static __always_inline int tcp(struct __sk_buff *skb, struct device *d, struct flow_key *k, __u32 at, __u32 end, int to_vm, __u64 now)
{
	struct tcp h;
	if (bpf_skb_load_bytes(skb, at, &h, sizeof h))
		return TCX_NEXT;
	__u32 header = (h.words >> 4) * 4;
	if (header < sizeof h || at + header > end)
		return TCX_NEXT;
	__u32 data = end - at - header, seq = swap32(h.seq), ack = swap32(h.ack), win = swap16(h.window);
	k->vm_port = to_vm ? h.to : h.from;
	k->peer_port = to_vm ? h.from : h.to;
	__u8 bit = to_vm ? 2 : 1;
	struct flow *f = bpf_map_lookup_elem(&flows, k);
	if (!f) {
		struct flow none = {};
		if (h.flags & TCP_RST)
			return TCX_NEXT;
		bpf_map_update_elem(&flows, k, &none, BPF_NOEXIST);
		f = bpf_map_lookup_elem(&flows, k);
		if (!f)
			return TCX_NEXT;
	}
	if (h.flags & TCP_SYN) {
		int scale = scale_of(skb, at + sizeof h, at + header);
		answered(d, f, now, 0); /* the ports are used again */
		if (to_vm)
			f->peer_scale = scale < 0 ? 0 : scale;
		else
			f->vm_scale = scale < 0 ? 0 : scale;
		f->scaled = (f->scaled & ~bit) | (scale >= 0 ? bit : 0);
		f->syn |= bit;
		f->known |= bit;
		opened(d, to_vm ? &f->peer_shut : &f->vm_shut);
		if (to_vm)
			f->request_end = seq + 1 + data;
		else
			f->answer_end = seq + 1 + data;
		return TCX_NEXT; /* the window of a SYN is not scaled and no stall */
	}
	if (h.flags & TCP_RST) {
		answered(d, f, now, 0);
		opened(d, &f->vm_shut);
		opened(d, &f->peer_shut);
		bpf_map_delete_elem(&flows, k);
		return TCX_NEXT;
	}
	/* Scaling holds if both ends offered it. Of a connection whose opening was not
	 * seen the scale is unknown: only zero is closed then, and any other is open. */
	if (f->syn != 3)
		win = win ? open_from : 0;
	else if (f->scaled == 3)
		win <<= to_vm ? f->peer_scale : f->vm_scale;
	window(d, to_vm ? &f->peer_shut : &f->vm_shut, win);
	__u32 stop = seq + data;
	if (to_vm) {
		if (data && (!(f->known & bit) || (__s32)(stop - f->request_end) > 0)) {
			f->known |= bit;
			f->request_end = stop;
			if (!f->pending) {
				f->pending = 1;
				f->asked_at = now;
				__sync_fetch_and_add(&d->pending, 1);
				__sync_fetch_and_add(&d->requests, 1);
			}
		}
	} else if (data) {
		/* The answer: new data that acknowledges all of the request. */
		int fresh = !(f->known & bit) || (__s32)(stop - f->answer_end) > 0;
		if (fresh) {
			f->known |= bit;
			f->answer_end = stop;
		}
		if (fresh && f->pending && h.flags & TCP_ACK && (__s32)(ack - f->request_end) >= 0)
			answered(d, f, now, 1);
	}
	if (h.flags & TCP_FIN && !to_vm) {
		answered(d, f, now, 0);
		opened(d, &f->vm_shut);
		opened(d, &f->peer_shut);
	}
	return TCX_NEXT;
}

static __always_inline int packet(struct __sk_buff *skb, int to_vm)
{
	__u32 ifindex = skb->ifindex;
	struct device *d = bpf_map_lookup_elem(&devices, &ifindex);
	if (!d)
		return TCX_NEXT;
	__u64 now = bpf_ktime_get_ns();
	if (to_vm) {
		__sync_fetch_and_add(&d->packets_in, 1);
		__sync_fetch_and_add(&d->bytes_in, skb->len);
		d->last_in = now;
	} else {
		__sync_fetch_and_add(&d->packets_out, 1);
		__sync_fetch_and_add(&d->bytes_out, skb->len);
		d->last_out = now;
	}
	wake(d, now);

	/* The tag may lie in the packet or have been taken out of it already. */
	__u32 at = ETH_HEADER;
	__u16 type = 0;
	if (bpf_skb_load_bytes(skb, 12, &type, 2))
		return TCX_NEXT;
	for (int i = 0; i < 2 && (type == swap16(ETH_P_8021Q) || type == swap16(ETH_P_8021AD)); i++) {
		if (bpf_skb_load_bytes(skb, at + 2, &type, 2))
			return TCX_NEXT;
		at += 4;
	}
	struct flow_key k = {.ifindex = ifindex};
	if (type == swap16(ETH_P_IP)) {
		struct ipv4 ip;
		if (bpf_skb_load_bytes(skb, at, &ip, sizeof ip))
			return TCX_NEXT;
		__u32 header = (ip.version_words & 15) * 4, length = swap16(ip.length);
		if (ip.protocol != IPPROTO_TCP || header < sizeof ip || ip.fragment & swap16(0x1fff))
			return TCX_NEXT;
		k.vm[3] = to_vm ? ip.to : ip.from;
		k.peer[3] = to_vm ? ip.from : ip.to;
		/* Segmentation offload may leave no length for 64 KiB and more. */
		return tcp(skb, d, &k, at + header, length ? at + length : skb->len, to_vm, now);
	}
	if (type != swap16(ETH_P_IPV6))
		return TCX_NEXT;
	struct ipv6 ip;
	if (bpf_skb_load_bytes(skb, at, &ip, sizeof ip))
		return TCX_NEXT;
	__u32 length = swap16(ip.length), end = length ? at + sizeof ip + length : skb->len;
	at += sizeof ip;
	__u8 next = ip.next;
	for (int i = 0; i < 4 && (next == IPPROTO_HOPOPTS || next == IPPROTO_ROUTING || next == IPPROTO_DSTOPTS); i++) {
		__u8 option[2];
		if (bpf_skb_load_bytes(skb, at, option, 2))
			return TCX_NEXT;
		next = option[0];
		at += (option[1] + 1) * 8;
	}
	if (next != IPPROTO_TCP)
		return TCX_NEXT;
	for (int i = 0; i < 4; i++) {
		k.vm[i] = to_vm ? ip.to[i] : ip.from[i];
		k.peer[i] = to_vm ? ip.from[i] : ip.to[i];
	}
	return tcp(skb, d, &k, at, end, to_vm, now);
}

/* What the host sends out of the tap goes to the VM. */
SEC("tcx/egress")
int to_vm(struct __sk_buff *skb)
{
	return packet(skb, 1);
}

SEC("tcx/ingress")
int from_vm(struct __sk_buff *skb)
{
	return packet(skb, 0);
}
