// Package disk counts what processes write to regular files and block devices, file
// by file: bytes, writes and syncs, whichever way QEMU does its I/O.
//
//	aio=threads   write system calls of its worker threads: bytes as done
//	aio=io_uring  completions: bytes as done
//	aio=native    io_submit: bytes as asked for; a write that fails or is cut short
//	              is counted whole (Written.SubmittedBytes says how much is of this kind)
//
// What goes over a network (NBD, iSCSI by user space, Ceph) is no file and not seen,
// nor what a vhost worker or another process writes in the VM's name.
//
// # Life cycle
//
// Load attaches the programs: one to the end of every system call of the host, which
// costs those of other processes one hash lookup, and one to io_uring's completions.
// Attach begins to count a process, Detach ends that, Close ends everything. Nothing
// is pinned. If the io_uring program cannot be loaded, the rest works without it
// (Missing).
//
// # Concurrency
//
// Methods may be called from any goroutine.
package disk
