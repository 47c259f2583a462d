// Package disk reads QEMU's block graph, says what of it a checkpoint can hold, and
// takes out whatever of ours is in it.
//
// # What a checkpoint puts into the graph
//
// Per drive, between a device and the top node of its medium, for the time of the
// copy:
//
//	device -> ckagent-cbw-N -> top node of the medium
//	              |  target
//	          ckagent-fleece-N   old content of what the guest overwrites, in memory
//	ckagent-snap-N -> ckagent-cbw-N   the disk as it was, read by the job ckagent-copy-N
//	ckagent-target-N                  the volume in the store, written by that job
//
// and on the top node, from one checkpoint to the next, the bitmap
// ckagent-bitmap-ID of what was written since checkpoint ID. The node that the guest
// writes to stays the same: nothing of ours is in the way of a manager's next start.
//
// With overlays instead of filters, for the time of the copy and of the commit after it:
//
//	device -> [filters of its own] -> ckagent-overlay-N -> image, read by the job ckagent-copy-N
//
// The overlay is a file beside the image (OverlayName) with what was written since; the
// job ckagent-commit-N writes that to the image and takes the overlay out.
//
// A guest write waits for a copy into memory and never for the store: the job reads
// through the snapshot node and writes by itself. When that memory is used up, or
// anything else in the way of the copy fails, QEMU breaks the snapshot
// (on-cbw-error=break-snapshot): the job fails and the guest does not notice.
//
// # Life cycle
//
// Read takes one look at the graph. Sources and Judge work on that look alone.
// Sweep removes everything of ours whoever left it: a checkpoint that is done, a
// guardian whose agent died, `ckagent release` or `ckagent detach`.
//
// # Concurrency and failure modes
//
// A Graph never changes; functions take turns by the monitor alone. The graph may
// change between a look and what follows from it: QEMU refuses then, and the
// checkpoint fails. Sweep does what it can, joins its errors, and may be repeated.
package disk
