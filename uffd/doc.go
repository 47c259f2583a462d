// Package uffd speaks userfaultfd: negotiate, register, write-protect, copy,
// continue, wake, read.
//
// It works on descriptors of this process and of others alike: a userfaultfd is
// bound to the address space it was created in, and whoever holds a copy of the
// descriptor serves it. How one is made inside another process is not this
// package's business; it adopts what it is given.
//
// # Life cycle
//
// A descriptor (New for this process, or one taken from another) goes through
// Adopt, which does the handshake once and for all, or through Resume if a
// process that has died since did it. Then Register, WriteProtect, Read in a
// loop, Unprotect or Copy for each message, Unregister, Close. When the last
// copy of a descriptor is closed the kernel unregisters everything by itself:
// write-protected memory becomes ordinary again, memory whose content was still
// to come reads as zeros.
//
// # Concurrency
//
// No locks: every method is one system call (or a retried one) and may run in
// any goroutine at any time. The one rule is that Close comes last. Methods
// ending in Raw allocate nothing and bypass the scheduler, for a fault loop on a
// locked thread; see raw_unsafe.go for what that costs the rest of the process.
// There is no fault loop here: what a fault means is its owner's business.
//
// # Blocking or not
//
// Read follows O_NONBLOCK of the open file description. Wait (poll) works only
// with O_NONBLOCK set; a blocking Read can be ended only by a signal to its
// thread or by a fault.
//
// # Failure modes
//
// Every error is an *OpError with the errno and, where one applies, a sentinel:
// ErrUnsupported names missing features or explains which memory a mode does
// not take; ErrExists means that somebody else filled the page (the waiters have
// been woken, because the kernel does not do it then); ErrAgain that an event
// must be read first; ErrGone that the target has exited or executed another
// program.
//
// # Kernels
//
// Synchronous write protection: anonymous memory 5.7, memfd and tmpfs 5.19,
// marks on absent anonymous pages (WP_UNPOPULATED) 6.4, asynchronous (WP_ASYNC)
// 6.7. Probe reports exactly what the running kernel has.
package uffd
