/* SPDX-License-Identifier: Apache-2.0
 *
 * The kernel's structures that our tracing programs look into, reduced to the
 * members used. Offsets are relocated when a program is loaded (CO-RE); a member
 * that the running kernel lacks fails the load of that program alone.
 */
#pragma once

#include "ckbpf.h"

#pragma clang attribute push(__attribute__((preserve_access_index)), apply_to = record)

struct mm_struct;

struct task_struct {
	unsigned int flags;
	int pid;
	int tgid;
	struct mm_struct *mm;
	struct files_struct *files;
};

struct pt_regs {
	unsigned long r10;
	unsigned long dx;
	unsigned long si;
	unsigned long di;
	unsigned long orig_ax;
};

struct fdtable {
	unsigned int max_fds;
	struct file **fd;
};

struct files_struct {
	struct fdtable *fdt;
};

struct super_block {
	__u32 s_dev;
};

struct inode {
	unsigned short i_mode;
	__u32 i_rdev;
	struct super_block *i_sb;
	unsigned long i_ino;
};

struct file {
	struct inode *f_inode;
};

struct io_kiocb {
	struct file *file;
	__u8 opcode;
};

struct io_uring_cqe {
	__u64 user_data;
	__s32 res;
	__u32 flags;
};

struct sock_common {
	unsigned short skc_family;
};

struct sock {
	struct sock_common __sk_common;
};

#pragma clang attribute pop

/* A task without an address space of its own, such as a vhost worker. */
#define PF_KTHREAD 0x00200000
