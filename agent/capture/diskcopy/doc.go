// Package diskcopy takes the disks of a checkpoint: it prepares everything before the
// pause, adds to the pause the few commands that fix the instant, and copies the
// content of that instant to volumes in the store while the guest runs on.
//
// # Life cycle
//
// Prepare makes the volumes (qcow2 files, incremental where the drive's bitmap and
// the volumes it continues are whole) and lends them to QEMU as descriptors, and with
// them a bounded piece of memory per disk for what the guest overwrites meanwhile.
// Requests are sent while the machine is stopped and its caches are flushed: one
// transaction for the bitmaps of all disks, then the filters. Confirm takes their
// replies. Start starts the copies after the resume, Wait waits for them, Finish takes
// everything of ours out of QEMU but the bitmaps, Seal makes the volumes durable. Then
// either Keep (the checkpoint exists: from now on its bitmaps count) or Drop (it does
// not: bitmaps are put back as they were). Drop may come at any moment.
//
// Package agent/vm/disk has a picture of what is in QEMU meanwhile.
//
// With overlays (Config.Overlay) there is no filter and no memory: the transaction
// switches the drives, the copies read the images, and Finish has QEMU commit the
// overlays. Encrypted images are copied as they lie, which needs that nobody writes.
//
// # Concurrency
//
// A Set belongs to one goroutine.
//
// # Failure modes
//
// A volume that cannot be written, memory for old content that is used up, a copy
// that stands still: the checkpoint fails (problem.Store, problem.Busy), the guest
// runs on. If the agent dies, the guardian ends the jobs, commits overlays and takes out
// nodes and filters; bitmaps stay. Those then belong to a checkpoint that does not exist
// or do not record any more, and the next checkpoint copies the disk whole and removes
// them. If QEMU dies, an overlay stays beside its image, and no other is made until
// somebody has committed or removed it.
package diskcopy
