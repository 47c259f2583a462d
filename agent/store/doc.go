// Package store is where checkpoints live: a directory that only its owner can
// read, with one directory per VM and in it one per checkpoint.
//
//	<store>/store.json                      format and version
//	<store>/lock                            flock of short critical sections
//	<store>/secret                          what the keys of tags come from
//	<store>/vms/<vm>/<id>/manifest.json     present: the checkpoint exists
//	                      pagemap seg-0000 ... device-state
//	                      lease.<...>       somebody writes or reads it
//	                      pinned            kept whatever retention says
//	<store>/vms/<vm>/disks/<volume>         content of a disk; stays while a manifest names it
//
// Life cycle of a checkpoint. Begin makes its directory with a writer's lease.
// An image.Writer fills it. Commit syncs every file and the directory, renames
// the manifest into place and syncs again: the rename is the instant from which
// the checkpoint exists. Abort, or a death before that, leaves a directory
// without a manifest, which List and Get do not see and GC removes. Remove takes
// the manifest away first, durably, and then the rest.
//
// Chains. A checkpoint that continues another has hard links to the segments that it
// took pages over from. So every directory is whole by itself, members of a chain are
// removed without a look at the others, and a segment goes with its last name. Merge
// rewrites a checkpoint so that it shares less; its manifest is replaced by a rename.
//
// Leases. A lease is an empty file whose name says everything: role, host, boot,
// pid namespace, pid and start time of the holder. Creating one is atomic, so none
// is ever half-written. It is live while that process lives; dead if the host has
// booted since or the process is gone; unknown if it is of another host or pid
// namespace, and then treated as live until an operator forces it. Hosts that
// share a store need different host names or machine ids.
//
// Concurrency. All methods are safe for concurrent use, within and across
// processes: taking a lease and deciding that there is none happen under one file
// lock, held for milliseconds. Lock order: Store.mu, then the file lock. Big files
// are deleted after it is released, when nobody can reach them any more.
//
// Failure modes: problem.Store for a store that is full, read-only or out of
// reach (errno kept), problem.Integrity for damage, problem.NotFound,
// problem.Refused for what must not be removed, problem.Busy when the lock is held
// for too long. A file system that hangs blocks the caller; see package fsys.
package store
