// Package disksnap keeps the disks of a checkpoint as internal snapshots of the very
// images that the guest uses: nothing is copied and nothing is stored, so it is quick
// and small, survives neither the host nor the image, and works for qcow2 alone. It is
// a fallback to be asked for by name.
//
// # Life cycle
//
// Plan judges the disks. Prepare deletes the snapshots of checkpoints that the store no
// longer has, for a store cannot reach into an image by itself; those of other stores,
// told apart by the end of their names, stay. Requests is one transaction
// for the pause, Confirm takes its reply. Then Keep, or Drop, which deletes the
// snapshots again. The methods between them are there so that this and package diskcopy
// can stand for one another.
//
// # Concurrency and failure modes
//
// A Set belongs to one goroutine. QEMU makes all snapshots or none. An agent that dies
// after the pause leaves snapshots of a checkpoint that does not exist; the next
// checkpoint by this method deletes them. They cost space in the image until then.
package disksnap
