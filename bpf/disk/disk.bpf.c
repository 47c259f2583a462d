//go:build ignore
// SPDX-License-Identifier: GPL-2.0 OR Apache-2.0
//
// Counts what chosen processes write to regular files and block devices, file by
// file: by the write system calls of their threads (aio=threads), by io_submit
// (aio=native) and by io_uring.

#include "cktask.h"

char LICENSE[] SEC("license") = "Dual BSD/GPL";

#define S_IFMT 0170000
#define S_IFREG 0100000
#define S_IFBLK 0060000

/* x86-64 system calls. */
enum {
	SYS_write = 1,
	SYS_pwrite64 = 18,
	SYS_writev = 20,
	SYS_fsync = 74,
	SYS_fdatasync = 75,
	SYS_io_submit = 209,
	SYS_pwritev = 296,
	SYS_pwritev2 = 328,
};

/* Operations of struct iocb and of io_uring (user-space ABI). */
enum { IOCB_CMD_PWRITE = 1, IOCB_CMD_FSYNC = 2, IOCB_CMD_FDSYNC = 3, IOCB_CMD_PWRITEV = 8 };
enum { IORING_OP_WRITEV = 2, IORING_OP_FSYNC = 3, IORING_OP_WRITE_FIXED = 5, IORING_OP_WRITE = 23 };

struct iocb {
	__u64 data;
	__u32 key, rw_flags;
	__u16 opcode;
	short reqprio;
	__u32 fd;
	__u64 buf;
	__u64 nbytes;
	__u64 offset;
	__u64 reserved;
	__u32 flags, resfd;
};

struct iovec {
	__u64 base, len;
};

struct file_key {
	__u64 inode;
	__u32 device; /* of a block device itself: its own number, inode 0 */
	__u32 tgid;
};

struct written {
	__u64 bytes;
	__u64 writes;
	__u64 syncs;
	__u64 submitted; /* of bytes: as asked for, not as done */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 16384);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, struct file_key);
	__type(value, struct written);
} files SEC(".maps");

struct process {
	__u64 missed; /* writes whose file or size was not understood */
};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u32);
	__type(value, struct process);
} processes SEC(".maps");

static __always_inline void count(__u32 tgid, struct file *file, __u64 bytes, int sync, int submitted)
{
	struct inode *inode = 0;
	struct super_block *sb = 0;
	unsigned short mode = 0;
	unsigned long ino = 0;
	struct file_key key = {.tgid = tgid};
	bpf_probe_read_kernel(&inode, sizeof inode, &file->f_inode);
	if (!inode || bpf_probe_read_kernel(&mode, sizeof mode, &inode->i_mode))
		return;
	if ((mode & S_IFMT) == S_IFBLK) {
		bpf_probe_read_kernel(&key.device, sizeof key.device, &inode->i_rdev);
	} else if ((mode & S_IFMT) == S_IFREG) {
		bpf_probe_read_kernel(&ino, sizeof ino, &inode->i_ino);
		bpf_probe_read_kernel(&sb, sizeof sb, &inode->i_sb);
		if (sb)
			bpf_probe_read_kernel(&key.device, sizeof key.device, &sb->s_dev);
		key.inode = ino;
	} else {
		return;
	}
	struct written *w = bpf_map_lookup_elem(&files, &key);
	if (!w) {
		struct written none = {};
		bpf_map_update_elem(&files, &key, &none, BPF_NOEXIST);
		w = bpf_map_lookup_elem(&files, &key);
		if (!w)
			return;
	}
	if (sync) {
		__sync_fetch_and_add(&w->syncs, 1);
		return;
	}
	__sync_fetch_and_add(&w->writes, 1);
	__sync_fetch_and_add(&w->bytes, bytes);
	if (submitted)
		__sync_fetch_and_add(&w->submitted, bytes);
}

static __always_inline struct file *file_of(struct task_struct *task, __u64 fd)
{
	struct files_struct *files = task->files;
	struct fdtable *table = 0;
	struct file **array = 0, *file = 0;
	unsigned int max = 0;
	if (!files)
		return 0;
	bpf_probe_read_kernel(&table, sizeof table, &files->fdt);
	if (!table)
		return 0;
	bpf_probe_read_kernel(&max, sizeof max, &table->max_fds);
	bpf_probe_read_kernel(&array, sizeof array, &table->fd);
	if (fd >= max || !array)
		return 0;
	bpf_probe_read_kernel(&file, sizeof file, array + fd);
	return file;
}

#define MAX_IOCBS 1024
#define MAX_IOVECS 1024 /* as many as the kernel takes */

/* Loops are calls of bpf_loop, whose body the verifier looks at once: unrolled, the two
 * inside of each other cost it a second of processor time at every start, and longer
 * than a watchdog waits in a slow guest. */
struct vector {
	__u64 at;
	__u64 bytes;
	__u32 failed;
};

static long add_iovec(__u64 i, struct vector *s)
{
	struct iovec v;
	if (bpf_probe_read_user(&v, sizeof v, (void *)(s->at + i * sizeof v))) {
		s->failed = 1;
		return 1;
	}
	s->bytes += v.len;
	return 0;
}

struct submission {
	__u64 list;
	__u64 missed;
	__u32 tgid;
};

static long one_iocb(__u64 i, struct submission *s)
{
	__u64 where = 0;
	struct iocb cb;
	if (bpf_probe_read_user(&where, sizeof where, (void *)(s->list + i * 8))) {
		s->missed++;
		return 1;
	}
	if (bpf_probe_read_user(&cb, sizeof cb, (void *)where)) {
		s->missed++;
		return 0;
	}
	int sync = cb.opcode == IOCB_CMD_FSYNC || cb.opcode == IOCB_CMD_FDSYNC;
	struct vector v = {.at = cb.buf};
	if (cb.opcode == IOCB_CMD_PWRITE) {
		v.bytes = cb.nbytes;
	} else if (cb.opcode == IOCB_CMD_PWRITEV) {
		__u32 n = cb.nbytes < MAX_IOVECS ? cb.nbytes : MAX_IOVECS;
		bpf_loop(n, add_iovec, &v, 0);
		if (v.failed || cb.nbytes > MAX_IOVECS)
			s->missed++;
	} else if (!sync) {
		return 0;
	}
	struct file *file = file_of(bpf_get_current_task_btf(), cb.fd);
	if (file)
		count(s->tgid, file, v.bytes, sync, 1);
	return 0;
}

SEC("tp_btf/sys_exit")
int on_exit(__u64 *args)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 tgid = task->tgid;
	struct process *p = bpf_map_lookup_elem(&processes, &tgid);
	long ret = args[1];
	if (!p || ret < 0)
		return 0;
	struct pt_regs *regs = (struct pt_regs *)args[0];
	__u64 nr = 0, first = 0;
	bpf_probe_read_kernel(&nr, sizeof nr, &regs->orig_ax);
	switch (nr) {
	case SYS_write:
	case SYS_writev:
	case SYS_pwrite64:
	case SYS_pwritev:
	case SYS_pwritev2:
	case SYS_fsync:
	case SYS_fdatasync: {
		bpf_probe_read_kernel(&first, sizeof first, &regs->di);
		struct file *file = file_of(task, first);
		if (file)
			count(tgid, file, ret, nr == SYS_fsync || nr == SYS_fdatasync, 0);
		return 0;
	}
	case SYS_io_submit: {
		struct submission s = {.tgid = tgid};
		bpf_probe_read_kernel(&s.list, sizeof s.list, &regs->dx);
		__u32 n = ret < MAX_IOCBS ? ret : MAX_IOCBS;
		s.missed = ret - n;
		bpf_loop(n, one_iocb, &s, 0);
		if (s.missed)
			__sync_fetch_and_add(&p->missed, s.missed);
		return 0;
	}
	}
	return 0;
}

/* ctx, request, completion (the last since Linux 6.16) */
SEC("tp_btf/io_uring_complete")
int on_uring(__u64 *args)
{
	struct task_struct *task = bpf_get_current_task_btf();
	__u32 tgid = task->tgid;
	struct process *p = bpf_map_lookup_elem(&processes, &tgid);
	struct io_kiocb *req = (struct io_kiocb *)args[1];
	struct io_uring_cqe *cqe = (struct io_uring_cqe *)args[2];
	if (!p || !req || cqe->res < 0)
		return 0;
	__u8 opcode = 0;
	struct file *file = 0;
	if (bpf_probe_read_kernel(&opcode, sizeof opcode, &req->opcode))
		return 0;
	if (opcode != IORING_OP_WRITEV && opcode != IORING_OP_WRITE && opcode != IORING_OP_WRITE_FIXED && opcode != IORING_OP_FSYNC)
		return 0;
	bpf_probe_read_kernel(&file, sizeof file, &req->file);
	if (file)
		count(tgid, file, cqe->res, opcode == IORING_OP_FSYNC, 0);
	return 0;
}
