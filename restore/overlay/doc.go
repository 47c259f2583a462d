// Package overlay makes the disks of a restored VM: qcow2 files whose backing chain
// is the volumes of a checkpoint, which nobody writes to.
//
// # Life cycle of an overlay
//
//	checked   every volume of its chain is the one that the manifest names (Check)
//	made      an empty file over the chain (Create), or a copy of it where QEMU
//	          may not read the store (Copy)
//	used      by the restored QEMU, which alone writes to it
//	flat      where asked for: QEMU has copied the rest of the chain into it in the
//	          background and depends on the store no longer (Stream)
//
// An overlay is the disk of a VM that runs: nothing here removes one that a guest
// may have written to. Its qcow2 header tells whether it still needs its volumes.
//
// # Failure
//
// A volume that is not the manifest's is problem.Integrity, whatever it is instead: a
// damaged one, or one of another checkpoint. What qemu-img says on failing is part of
// the error.
//
// Functions start no goroutine that outlives them and may be called at the same time
// for different files.
package overlay
