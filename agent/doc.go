// Package agent is the host's side of protecting VMs: it takes hold of a running
// QEMU, learns what has to be recorded about it, and takes checkpoints of it, once
// or at an interval.
//
// # Life cycle
//
// Attach locks the VM against a second ckagent, opens process and monitor,
// refuses what cannot be protected, and resolves memory layout and machine.
// Checkpoint may then be called any number of times. Between two checkpoints the
// monitor is given back, so that other tools get their turn; nothing of ours is
// in QEMU then. Close lets go of the VM, which never noticed.
//
// # Concurrency
//
// A VM belongs to one goroutine. The lock of package vm makes it belong to one
// process as well.
package agent
