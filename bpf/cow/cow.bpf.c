//go:build ignore
// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//
// Copy before write, in the kernel. On memory that is write-protected asynchronously
// (WP_ASYNC) the kernel answers the first write to a page by taking the page's mark
// away; nobody waits. The programs here see the fault before that happens, and copy
// the page while it still bears its mark. See doc.go for why the copy is the page as
// it was when it was marked.
//
// The programs change nothing of what they watch. The one exception is asked for by
// stop_bytes: a process that writes faster than its copies are fetched is stopped by a
// signal, which whoever reads the ring ends.

#include "leaf.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define PAGE_SHIFT 12
#define PAGE_BYTES 4096
#define MAX_RANGES 32

/* The error code of an x86 page fault: the access was a write. */
#define FAULT_WRITE 2

#define SIGSTOP 19

enum { BPF_RB_NO_WAKEUP = 1, BPF_RB_AVAIL_DATA = 0 };

static long (*bpf_send_signal)(__u32 sig) = (void *)109;
static __u64 (*bpf_ringbuf_query)(void *ringbuf, __u64 flags) = (void *)134;
static void (*bpf_ringbuf_discard)(void *data, __u64 flags) = (void *)133;

/* Pieces of the address space; pages are numbered from first on. */
struct range {
	__u64 start;
	__u64 bytes;
	__u64 first;
};

volatile const struct range ranges[MAX_RANGES];
volatile const __u32 range_count = 0;

/* The same memory as a guest of KVM numbers it. */
struct guest_range {
	__u64 start; /* guest-physical */
	__u64 bytes;
	__u64 host; /* address in the process */
};

volatile const struct guest_range guest_ranges[MAX_RANGES];
volatile const __u32 guest_range_count = 0;

enum mode {
	MODE_OFF = 0,
	MODE_TRACK = 1,   /* remember which pages are written */
	MODE_CAPTURE = 2, /* and copy them before */
};

/* Shared with the process that loaded the programs. Words that it writes and words
 * that the programs write lie on different cache lines. */
struct state {
	/* written by the owner; the first two once, by the program prepare */
	__u64 mm; /* address of the mm_struct */
	struct tables tables; /* of that memory */
	__u32 mode;
	__u32 pad0;
	__u64 epoch;      /* of the records to come */
	__u64 stop_bytes; /* stop the process when so much waits in the ring; 0: never */
	__u64 pad1;

	/* written by both */
	__u32 stopped; /* SIGSTOP was sent; the owner clears it when it sends SIGCONT */
	__u32 pad2;
	__u64 stops;
	__u64 drop; /* a test: lose the so many-th record from now on; 0: none */
	__u64 pad3[5];

	/* written by programs: pages that were about to be written and not copied */
	__u64 full;       /* no room in the ring */
	__u64 unreadable; /* the page could not be read */
	__u64 changing;   /* the entry changed at each of several looks */
	__u64 odd_io;     /* direct I/O into memory described in a way not known here */
	__u64 dropped;    /* because of drop */
	/* nothing is lost by these */
	__u64 absent;     /* nothing was mapped: what comes may be marked, and fault again */
	__u64 unmarked;   /* somebody else's fault came first */
	__u64 twice;      /* somebody else copied it at the same time */
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct state);
} states SEC(".maps");

/* One bit for each page: it was written, or is about to be, since the owner cleared
 * the bit. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} dirty SEC(".maps");

/* One bit for each page: nobody needs to copy it any more. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} captured SEC(".maps");

/* One bit for each page: where it is not mapped and bears its mark, it held zeros when
 * it was marked, and does. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} blank SEC(".maps");

/* Which page a record is of. One that ends here is of a page of zeros. */
struct label {
	__u64 page;
	__u64 epoch;
};

struct record {
	struct label of;
	__u8 data[PAGE_BYTES];
};

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} ring SEC(".maps");

/* press_back stops a process that is too fast. The signal takes effect before the
 * thread returns to what it was about to write. */
static __always_inline void press_back(struct state *s)
{
	if (!s->stop_bytes || s->stopped || bpf_ringbuf_query(&ring, BPF_RB_AVAIL_DATA) < s->stop_bytes)
		return;
	if (__sync_lock_test_and_set(&s->stopped, 1))
		return;
	if (bpf_send_signal(SIGSTOP)) { /* a kernel thread at work for the process */
		s->stopped = 0;
		return;
	}
	__sync_fetch_and_add(&s->stops, 1);
}

/* finish hands the record of a page on, unless somebody else has done so since. word and
 * bit are the page's among those that are captured. */
static __always_inline void finish(struct state *s, struct label *r, __u64 page, __u64 *word, __u64 bit)
{
	r->page = page;
	r->epoch = s->epoch;
	if (__sync_fetch_and_or(word, bit) & bit) {
		__sync_fetch_and_add(&s->twice, 1);
		goto discard;
	}
	if (s->drop && __sync_fetch_and_sub(&s->drop, 1) == 1) {
		__sync_fetch_and_add(&s->dropped, 1);
		goto discard;
	}
	bpf_ringbuf_submit(r, BPF_RB_NO_WAKEUP);
	press_back(s);
	return;
discard:
	bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
}

/* claim makes the record of a page that nobody has touched since it was marked, if this
 * is one. It cannot be left to the fault that follows when the kernel has mapped the
 * page: another thread may be first to map it, and then this one's fault finds it mapped,
 * takes the mark off, and there is none. */
static __always_inline void claim(struct state *s, const struct leaf *l, __u64 page, __u64 *word, __u64 bit)
{
	__u32 index = page >> 6;
	__u64 *known = bpf_map_lookup_elem(&blank, &index);
	if (l->entry != PTE_MARKED_ABSENT || !known || !(*known & bit)) {
		__sync_fetch_and_add(&s->absent, 1);
		return;
	}
	struct label *r = bpf_ringbuf_reserve(&ring, sizeof(*r), 0);
	if (!r) {
		__sync_fetch_and_add(&s->full, 1);
		return;
	}
	finish(s, r, page, word, bit);
}

#define LOOKS 4

/* capture copies a page that is about to be written. */
static __always_inline void capture(struct state *s, __u64 page, __u64 address)
{
	__u32 index = page >> 6;
	__u64 bit = 1ull << (page & 63);
	__u64 *word = bpf_map_lookup_elem(&captured, &index);
	if (!word || *word & bit)
		return;
	struct leaf l = {};
	if (!find_leaf(&s->tables, address, &l)) {
		claim(s, &l, page, word, bit);
		return;
	}
	if (!(l.entry & PTE_UFFD_WP)) {
		__sync_fetch_and_add(&s->unmarked, 1);
		return;
	}
	struct record *r = bpf_ringbuf_reserve(&ring, sizeof(*r), 0);
	if (!r) {
		__sync_fetch_and_add(&s->full, 1);
		return;
	}
	for (int look = 0; look < LOOKS; look++) {
		if (bpf_probe_read_kernel(r->data, PAGE_BYTES, (void *)l.content)) {
			__sync_fetch_and_add(&s->unreadable, 1);
			goto discard;
		}
		__u64 again = 0;
		bpf_probe_read_kernel(&again, sizeof(again), (void *)l.where);
		if (!((again ^ l.entry) & PTE_IDENTITY)) {
			finish(s, &r->of, page, word, bit);
			return;
		}
		/* Split, moved, or written: look anew. */
		if (!find_leaf(&s->tables, address, &l)) {
			__sync_fetch_and_add(&s->absent, 1);
			goto discard;
		}
		if (!(l.entry & PTE_UFFD_WP)) {
			__sync_fetch_and_add(&s->unmarked, 1);
			goto discard;
		}
	}
	__sync_fetch_and_add(&s->changing, 1);
discard:
	bpf_ringbuf_discard(r, BPF_RB_NO_WAKEUP);
}

/* touch is told of an address of the process that is about to be written. */
static __always_inline void touch(struct state *s, __u64 address)
{
	for (__u32 i = 0; i < MAX_RANGES; i++) {
		if (i >= range_count)
			return;
		__u64 offset = address - ranges[i].start;
		if (offset >= ranges[i].bytes)
			continue;
		__u64 page = ranges[i].first + (offset >> PAGE_SHIFT);
		__u32 index = page >> 6;
		__u64 bit = 1ull << (page & 63);
		__u64 *word = bpf_map_lookup_elem(&dirty, &index);
		if (word && !(*word & bit))
			__sync_fetch_and_or(word, bit);
		if (s->mode == MODE_CAPTURE)
			capture(s, page, address);
		return;
	}
}

/* ours returns the state if the current task works in the memory we watch, kernel
 * threads in its name included. */
static __always_inline struct state *ours(void)
{
	__u32 zero = 0;
	struct state *s = bpf_map_lookup_elem(&states, &zero);
	if (!s || !s->mode)
		return 0;
	struct task_struct *task = bpf_get_current_task_btf();
	return (__u64)task->mm == s->mm ? s : 0;
}

SEC("tp_btf/page_fault_user")
int on_user_fault(__u64 *args)
{
	__u64 address = args[0], error = args[2];
	struct state *s = ours();
	if (s && error & FAULT_WRITE)
		touch(s, address);
	return 0;
}

SEC("tp_btf/page_fault_kernel")
int on_kernel_fault(__u64 *args)
{
	__u64 address = args[0], error = args[2];
	struct state *s = ours();
	if (s && error & FAULT_WRITE)
		touch(s, address);
	return 0;
}

struct span {
	struct state *s;
	__u64 address;
};

static int touch_page(__u32 i, struct span *p)
{
	touch(p->s, p->address + (__u64)i * PAGE_BYTES);
	return 0;
}

static __always_inline void touch_span(struct state *s, __u64 start, __u64 bytes)
{
	if (!bytes)
		return;
	__u64 first = start & ~(PAGE_BYTES - 1ull);
	struct span p = { s, first };
	bpf_loop((start + bytes - 1 - first) / PAGE_BYTES + 1, touch_page, &p, 0);
}

struct segments {
	struct state *s;
	__u64 vector; /* address of the iovecs */
	__u64 skip;   /* bytes of the first that are done */
	__u64 left;
};

static int touch_segment(__u32 i, struct segments *v)
{
	struct iovec___mm *at = (struct iovec___mm *)v->vector + i;
	__u64 base = 0, bytes = 0;
	bpf_probe_read_kernel(&base, sizeof(base), &at->iov_base);
	bpf_probe_read_kernel(&bytes, sizeof(bytes), &at->iov_len);
	__u64 skip = v->skip < bytes ? v->skip : bytes;
	bytes -= skip;
	v->skip = 0;
	if (bytes > v->left)
		bytes = v->left;
	v->left -= bytes;
	touch_span(v->s, base + skip, bytes);
	return v->left == 0;
}

#define MAX_SEGMENTS 1024 /* UIO_MAXIOV */

/* Direct I/O pins the pages it will fill, and no fault is raised for them. */
SEC("tp_btf/iomap_dio_rw_begin")
int on_direct_io(__u64 *args)
{
	struct iov_iter___mm *it = (struct iov_iter___mm *)args[1];
	struct state *s = ours();
	if (!s)
		return 0;
	__u8 type = 0, source = 0;
	__u64 offset = 0, count = 0, base = 0, segments = 0;
	bpf_probe_read_kernel(&source, sizeof(source), &it->data_source);
	if (source)
		return 0;
	bpf_probe_read_kernel(&type, sizeof(type), &it->iter_type);
	bpf_probe_read_kernel(&offset, sizeof(offset), &it->iov_offset);
	bpf_probe_read_kernel(&count, sizeof(count), &it->count);
	if (type == ITER_UBUF) {
		bpf_probe_read_kernel(&base, sizeof(base), &it->ubuf);
		touch_span(s, base + offset, count);
		return 0;
	}
	bpf_probe_read_kernel(&segments, sizeof(segments), &it->nr_segs);
	if (type != ITER_IOVEC || segments > MAX_SEGMENTS) {
		__sync_fetch_and_add(&s->odd_io, 1);
		return 0;
	}
	bpf_probe_read_kernel(&base, sizeof(base), &it->__iov);
	struct segments v = { s, base, offset, count };
	bpf_loop(segments, touch_segment, &v, 0);
	return 0;
}

/* A guest's own store, where KVM has the processor look addresses up by itself. */
SEC("tp_btf/kvm_page_fault")
int on_guest_fault(__u64 *args)
{
	__u64 address = args[1], error = args[2];
	struct state *s = ours();
	if (!s || !(error & FAULT_WRITE))
		return 0;
	for (__u32 i = 0; i < MAX_RANGES; i++) {
		if (i >= guest_range_count)
			return 0;
		__u64 offset = address - guest_ranges[i].start;
		if (offset < guest_ranges[i].bytes) {
			touch(s, guest_ranges[i].host + offset);
			return 0;
		}
	}
	return 0;
}

#include "prepare.h"
