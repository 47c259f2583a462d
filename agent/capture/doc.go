// Package capture takes a checkpoint of a running VM: one stopped instant of
// RAM, vCPUs and devices, written to a store.
//
// # Modes
//
// All modes share the pause (stop, device state, something, cont), the source
// that RAM is read from, and the image it is written to. They differ in what
// happens to RAM inside the pause:
//
//   - stop: RAM is written to the store. The pause is as long as that takes.
//   - buffer: RAM is copied to memory, and written after the pause.
//   - cow: RAM is write-protected, and copied after the pause; a page that the
//     guest wants to write first is copied at that moment, by a process of ours
//     (engine uffd) or in the kernel (engine bpf; both in package faultserver).
//
// # Order of a copy-on-write checkpoint
//
//	space checked, lease taken      nothing touched yet
//	fault server, guardian started
//	pre-arm                         all RAM protected, guest running
//	disks flushed                   so that stop has nothing left to flush
//	stop, save device state         pipelined in one write
//	freeze                          what was written since the pre-arm is re-armed
//	cont                            the guest runs; the checkpoint is decided
//	faults and scan -> arena -> image
//	release                         nothing of ours is left in the guest, but for the
//	                                marks of engine bpf that a Tracking keeps
//	fsync, rename                   the checkpoint exists
//
// Saving the device state can write guest RAM, so the freeze comes after it.
//
// # Failure
//
// Whatever fails, the VM goes on as before and no checkpoint becomes visible.
// Inside the pause nothing is allocated on purpose, opened or resolved, and the
// way out of it is the same in every case. A capture whose proof fails is
// discarded and taken again, at last in a way that needs no proof.
//
// # Concurrency
//
// Take runs in the caller's goroutine; the goroutines it starts (one per ring of
// the arena or per reader) are joined before it returns.
package capture
