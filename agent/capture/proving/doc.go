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
// # Outcomes
//
// A path is proved, or refuted: a byte is wrong, a page is missing or came twice, or
// the trial ended twice in another way that is not for lack of time, such as the
// kernel's refusal of the programs. Both are written down until the next boot. A trial
// that ran out of time, or in which too few pages were written, says nothing: it is made
// again, with more patience and at a higher priority, and if none of the few comes to an
// end the path is what it was before, not tried.
//
// # Life cycle
//
// Prover.Known says what is written down for this boot and this build, and waits for
// nothing: it is what a checkpoint asks that chooses its engine by itself. Prover.Prove and
// Prover.All make the trials of what is not known, some seconds each. Prover.Apart has
// them made by a process of its own, for those who have guests to look after: its
// child ends with its standard input, and so with whoever started it. Main is that
// child, Subject what a trial is made of.
//
// # Concurrency and failure modes
//
// All functions may be called by several goroutines and processes at once: one makes the
// trial of a path, and the others wait for its answer. A process that dies in the middle
// leaves nothing; the subject is killed with it. The subject runs at a low priority, for
// guests must not notice it; the rest of a trial costs next to nothing.
package proving
