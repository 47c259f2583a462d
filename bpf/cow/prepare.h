/* SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
 *
 * The program that learns what the others need to know of the memory they watch. Part of
 * cow.bpf.c.
 */
#pragma once

#define KNOWN_WORDS 4

struct prepare_args {
	__u32 fd; /* a userfaultfd of the caller's */
	__u32 pad;
	__u64 page; /* address of a page of the caller's */
	__u64 known[KNOWN_WORDS]; /* what it begins with; nothing else in memory does */
};

struct search {
	struct tables tables; /* of the caller; direct_map is the guess */
	__u64 top; /* guesses go down from here */
	__u64 page;
	__u64 known[KNOWN_WORDS];
	__u32 found;
	__u32 pad;
};

/* fits reports whether a guess at the direct map leads to what the known page holds.
 * That the tables lead to something is not enough: seen from a wrong base, whatever
 * lies in memory is taken for tables, and now and then it looks like some. */
static __always_inline int fits(struct search *f, __u64 base, __u32 levels)
{
	struct leaf l = {};
	__u64 content[KNOWN_WORDS] = {};
	f->tables.direct_map = base;
	f->tables.levels = levels;
	if (!find_leaf(&f->tables, f->page, &l))
		return 0;
	if (bpf_probe_read_kernel(content, sizeof(content), (void *)l.content))
		return 0;
	for (int i = 0; i < KNOWN_WORDS; i++)
		if (content[i] != f->known[i])
			return 0;
	return 1;
}

static int try_base(__u32 i, struct search *f)
{
	__u64 base = f->top - ((__u64)i << 30);
	f->found = fits(f, base, 4) || fits(f, base, 5);
	return f->found;
}

/* The direct map begins at a multiple of 1 GiB, wherever the kernel was placed, and
 * holds the topmost page table: it is at most as far below that as there is memory. */
#define MAX_MEMORY_GIB (16 << 10)

/* prepare learns whose memory a userfaultfd protects, where its page tables are, and
 * where the kernel maps physical memory. Its answer is 0, or which step failed. */
SEC("syscall")
int prepare(struct prepare_args *args)
{
	__u32 zero = 0;
	struct state *s = bpf_map_lookup_elem(&states, &zero);
	if (!s)
		return 1;
	struct task_struct *task = bpf_get_current_task_btf();
	__u64 files = (__u64)task->files, fdt = 0, fds = 0, file = 0, context = 0, mm = 0, pgd = 0;
	bpf_probe_read_kernel(&fdt, sizeof(fdt), &((struct files_struct *)files)->fdt);
	bpf_probe_read_kernel(&fds, sizeof(fds), &((struct fdtable *)fdt)->fd);
	bpf_probe_read_kernel(&file, sizeof(file), (void *)(fds + (__u64)args->fd * 8));
	if (!file)
		return 2;
	bpf_probe_read_kernel(&context, sizeof(context), &((struct file___mm *)file)->private_data);
	bpf_probe_read_kernel(&mm, sizeof(mm), &((struct userfaultfd_ctx___mm *)context)->mm);
	bpf_probe_read_kernel(&pgd, sizeof(pgd), &((struct mm_struct___mm *)mm)->pgd);
	if (!mm || !pgd)
		return 3;
	struct search f = { .page = args->page };
	for (int i = 0; i < KNOWN_WORDS; i++)
		f.known[i] = args->known[i];
	__u64 own = (__u64)task->mm;
	bpf_probe_read_kernel(&f.tables.pgd, sizeof(f.tables.pgd), &((struct mm_struct___mm *)own)->pgd);
	if (!f.tables.pgd)
		return 4;
	f.top = f.tables.pgd & ~((1ull << 30) - 1);
	bpf_loop(MAX_MEMORY_GIB, try_base, &f, 0);
	if (!f.found)
		return 5;
	s->mm = mm;
	s->tables.pgd = pgd;
	s->tables.direct_map = f.tables.direct_map;
	s->tables.levels = f.tables.levels;
	return 0;
}
