// Package track finds out which pages of a running VM are written, from outside:
// QEMU's memory is registered with a userfaultfd that resolves write-protect faults
// in the kernel (WP_ASYNC), and PAGEMAP_SCAN reports and re-arms what was written.
// The guest never waits for us.
//
// # Life cycle
//
// Open takes a userfaultfd out of QEMU (a thread of it stands still for less than a
// millisecond) and registers the blocks. Arm marks pages, all or a sample; Take
// reports what was written since and marks it again; Close drops the descriptor,
// whereupon the kernel unregisters everything and lifts every mark, and makes huge
// pages whole again that were split meanwhile, for a bounded time. When the process
// ends without Close the kernel does the same but for the huge pages.
//
// # Who may have a VM's memory
//
// A mapping belongs to one userfaultfd at a time. While a checkpoint is being taken,
// or QEMU itself uses it (postcopy, background-snapshot), Open answers
// problem.Busy; while a Tracker is open, a checkpoint would be refused in turn: its
// owner closes it first, and holds the VM's lock so that others know.
//
// # Failure modes
//
// Blocks whose mapping cannot be tracked (private files on most file systems, ROM)
// are left out and listed; if main memory is among them, Open refuses. A VM that ends
// answers problem.NotFound. The bpf counter is optional: without it everything
// works but the live count and the curve's short end.
//
// # Concurrency
//
// A Tracker has one owner at a time. It starts no goroutine.
package track
