/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * Where a page of a process lies, by way of the page tables. Part of cow.bpf.c.
 */
#pragma once

#include "ckmm.h"

/* How to look addresses up: where the topmost page table is, where the kernel maps
 * physical memory, and how many levels of tables there are, 4 or 5. */
struct tables {
	__u64 pgd;
	__u64 direct_map;
	__u32 levels;
	__u32 pad;
};

struct leaf {
	__u64 where; /* address of the entry */
	__u64 entry;
	__u64 content; /* address of the page's content */
};

/* find_leaf looks an address up in the page tables. It reports whether a page is
 * mapped there. A huge page that is just being split is one as well. Where none is, the
 * entry is that of the lowest table, or 0 if there is no such table. */
static __always_inline int find_leaf(const struct tables *t, __u64 address, struct leaf *l)
{
	__u64 table = t->pgd, e;

	l->entry = 0;
	if (t->levels == 5) {
		e = table_entry(table, address >> 48);
		if (!(e & PTE_PRESENT))
			return 0;
		table = t->direct_map + (e & PTE_FRAME);
	}
	e = table_entry(table, address >> 39);
	if (!(e & PTE_PRESENT))
		return 0;
	table = t->direct_map + (e & PTE_FRAME);
	e = table_entry(table, address >> 30);
	if (!(e & PTE_PRESENT) || e & PTE_HUGE)
		return 0;
	table = t->direct_map + (e & PTE_FRAME);
	e = table_entry(table, address >> 21);
	if (e & PTE_HUGE) {
		l->where = table + (address >> 21 & 511) * 8;
		l->entry = e;
		l->content = t->direct_map + (entry_frame(e, PMD_FRAME) | (address & 0x1ff000));
		return 1;
	}
	if (!(e & PTE_PRESENT))
		return 0;
	table = t->direct_map + (e & PTE_FRAME);
	e = table_entry(table, address >> 12);
	l->entry = e;
	if (!(e & (PTE_PRESENT | PTE_PROTNONE)))
		return 0;
	l->where = table + (address >> 12 & 511) * 8;
	l->content = t->direct_map + entry_frame(e, PTE_FRAME);
	return 1;
}
