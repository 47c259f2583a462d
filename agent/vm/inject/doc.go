// Package inject runs system calls inside another, unmodified and running
// process, and takes descriptors out of it: the means by which ckagent gets a
// userfaultfd bound to the address space of a QEMU that was never prepared.
//
// # The tracer may die at any instruction
//
// A thread that is stopped by ptrace and whose tracer dies is resumed by the
// kernel with whatever registers are set at that moment. So every state this
// package ever puts a thread into must be one from which the thread finds its
// own way home:
//
//  1. The thread is seized and interrupted. Nothing has changed yet.
//  2. Below the red zone of its stack an rt_sigframe is written that holds the
//     thread exactly as it was: general registers, the XSAVE area, signal mask,
//     an interrupted system call wound back to its instruction. Below rsp-128
//     is nobody's memory, so still nothing has changed.
//  3. One PTRACE_SETREGS parks the thread on a `ret` whose return address is the
//     C library's own signal return (`mov $15,%rax; syscall`), with rsp at the
//     frame. From here on resuming means: sigreturn to where it was.
//  4. All signals are blocked by PTRACE_SETSIGMASK (the frame gives the mask
//     back), so that no handler runs in between; blocked signals stay pending.
//  5. Each system call starts at a `syscall; ret` sequence of the target's own
//     code and is watched by PTRACE_SYSCALL stops; its `ret` leads to 3. The
//     thread is never single-stepped and no instruction of it is overwritten.
//  6. At the end the thread is brought to one more PTRACE_EVENT_STOP, mask and
//     registers get their original values, and it is let go: the kernel itself
//     then restarts the interrupted system call, as after any debugger's visit,
//     with what remains of its timeout. The frame was only the insurance.
//
// When the tracer dies, the one thing that differs from 6 is that sigreturn
// forgets the kernel's restart block: a relative nanosleep, poll or futex wait
// that was interrupted starts over with its whole timeout (absolute ones and
// nanosleep(&t, &t) are exact); one that had been interrupted before, so that
// the kernel alone knows what it was, ends with EINTR. Threads in such calls are
// chosen last. An epoll_wait without a timeout, which the kernel never restarts,
// is restarted.
//
// # Life cycle and concurrency
//
// [Open] chooses a thread (asleep in a system call, no vCPU, not the main loop,
// if there is one), and a goroutine locked to its OS thread becomes the tracer;
// all ptrace requests are made there. A Session is used by one goroutine at a
// time. [Session.Close] lets the thread go. If it cannot (the thread sits in an
// uninterruptible call, the context ended) the tracing OS thread ends itself,
// which is the tracer's death of above: the safe way out.
//
// # Failure modes
//
// Everything is bounded by the caller's context, and each attempt on one thread
// by a shorter limit of its own. A thread or process that exits yields [ErrGone].
// What cannot be traced is refused by [CanTrace] before anything is touched:
// Yama, missing capabilities, a tracer that is there already, AppArmor, strict
// seccomp. Seccomp filters are fetched and evaluated for each call that is about
// to be injected: one that would kill the target or be handed to somebody else
// is refused, since PTRACE_O_SUSPEND_SECCOMP ends with its tracer; one that
// would merely fail is let through by PTRACE_O_SUSPEND_SECCOMP. Shadow stacks,
// 32-bit processes and syscall user dispatch are refused.
//
// The stack needs 6 to 16 KiB below rsp inside the mapping that rsp points into
// (checked); programs that run on smaller, packed stacks without guards, such as
// goroutines, are not targets of this package.
package inject
