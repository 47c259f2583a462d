// Package liveness answers the question a restore has to ask first: may the VM
// that is about to be started still be running?
//
// Check looks, without touching anything, for the process that was checkpointed
// (pid, start time and boot id), for any QEMU that carries the VM's name or UUID,
// listens on one of its control sockets or has one of its writable images open,
// and for locks on those images. Each finding is a Doubt; a restore refuses while
// there is one, unless the operator says that the VM is dead.
//
// Absence of a doubt is no proof for VMs whose images lie on shared storage:
// another host may run them. Image locks that the storage passes on are seen.
//
// Hold takes the lock that keeps two restores of one VM apart on this host; the
// kernel drops it when the process ends.
//
// All functions may be called from any goroutine; none starts one.
package liveness
