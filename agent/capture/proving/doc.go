// Package proving finds out whether engine bpf can be trusted on this host: it takes
// captures of a process made for it, by the way of a real one, and compares them with
// the memory as it was at the freeze.
//
// The subject is a child process that writes to its memory all the time, from several
// threads and by system calls. A fault server takes a userfaultfd from it by injection,
// arms, freezes while the subject stands still, and captures while it writes on. Every
// byte of every page must be the byte that a copy taken at the freeze has, and enough
// pages must have come by the kernel's ring, from the threads' stores and from the
// kernel's copies alike, that the comparison says something. Each accelerator and kind
// of RAM is a path of its own through the kernel and is proved by itself:
//
//   - tcg: a guest's store is a store of a thread of QEMU's, and so it is here.
//   - kvm: a guest's store is a fault of the processor's second page tables, or is
//     emulated; the subject makes a virtual machine whose guest writes. What KVM writes
//     by itself into the RAM of larger guests (kvmclock) is not in the trial.
//
// # Life cycle
//
// Load returns what is known since this boot and for this binary (a file below
// /run/ckagent), or runs the trials, about a second, and writes it down. A trial that
// fails is an answer as well. Subject is what the child runs.
//
// # Concurrency and failure modes
//
// Load may be called by several processes at once; the last to finish writes the file.
// The child is killed with its parent. What keeps a trial from being made (no rights, no
// such system call) is its detail, as a wrong byte would be.
package proving
