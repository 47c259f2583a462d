/* SPDX-License-Identifier: Apache-2.0
 *
 * Address spaces, the page tables of x86-64, and what leads to both. Structures are
 * reduced to the members used and relocated when a program is loaded; the suffix
 * keeps them apart from other headers' reductions of the same structures.
 */
#pragma once

#include "cktask.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct mm_struct___mm {
	void *pgd;
};

struct file___mm {
	void *private_data;
};

struct userfaultfd_ctx___mm {
	struct mm_struct___mm *mm;
};

struct iovec___mm {
	void *iov_base;
	__u64 iov_len;
};

/* Where data of a read or write lies in user memory. */
struct iov_iter___mm {
	__u8 iter_type;
	__u8 data_source; /* it is read from; 0: written to */
	__u64 iov_offset;
	struct iovec___mm *__iov;
	void *ubuf;
	__u64 count;
	__u64 nr_segs;
};

#pragma clang attribute pop

enum { /* iov_iter.iter_type */
	ITER_UBUF = 0,
	ITER_IOVEC = 1,
};

/* Bits of a page-table entry. */
#define PTE_PRESENT (1ull << 0)
#define PTE_WRITE (1ull << 1)
#define PTE_HUGE (1ull << 7)     /* in the second-lowest level */
#define PTE_PROTNONE (1ull << 8) /* without PRESENT: there, but nobody may touch it */
#define PTE_UFFD_WP (1ull << 10)
#define PTE_FRAME 0x000ffffffffff000ull
#define PMD_FRAME 0x000fffffffe00000ull
/* What must not have changed for a page to be the same, and as protected. The
 * processor's own bits (accessed, dirty) may. */
#define PTE_IDENTITY (PTE_PRESENT | PTE_WRITE | PTE_PROTNONE | PTE_HUGE | PTE_UFFD_WP | PTE_FRAME)

/* A mark where nothing is mapped, at the lowest level: an entry as of a page on swap, of
 * the last of the 32 types, which no swap file has (SWP_PTE_MARKER), at "offset" 1
 * (PTE_MARKER_UFFD_WP). The type is in the five highest bits, the offset inverted in
 * those from 9 to 58; no other bit is set. */
#define PTE_MARKED_ABSENT (31ull << 59 | (~1ull << 14) >> 5)

static __always_inline __u64 table_entry(__u64 table, __u64 index)
{
	__u64 e = 0; /* not present, if it cannot be read */
	bpf_probe_read_kernel(&e, sizeof(e), (void *)(table + (index & 511) * 8));
	return e;
}

/* The kernel inverts the frame of an entry that the processor does not take. */
static __always_inline __u64 entry_frame(__u64 entry, __u64 mask)
{
	return (entry & PTE_PRESENT ? entry : ~entry) & mask;
}
