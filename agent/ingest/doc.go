// Package ingest makes a checkpoint of a migration stream that somebody wrote
// without us: `migrate exec:cat`, `migrate file:`, a libvirt save image. It is the
// counterpart of package export.
//
// Life cycle. Import reads one stream, from its first byte to its last, and commits
// one checkpoint to a store or nothing. Pages go to a spool first, an unnamed file
// beside the checkpoint, because a stream written from a running guest has pages
// several times and the last counts; then each page goes into the image once.
//
// What a stream lacks the caller gives: the command line. The machine type is the
// stream's own. The device state is kept as it is, from the first section behind RAM
// to the end mark. Disks are not in a stream: the checkpoint has none.
//
// Concurrency. A call is one goroutine. Memory is 17 bytes and a little per page of
// RAM, and the device state; what a stream claims beyond that is refused.
//
// Failure modes. A damaged stream is problem.Integrity; one that QEMU wrote in a way
// that is not read here (xbzrle, multifd, post-copy, mapped-ram, ...) is
// problem.Refused and names it; both leave nothing in the store.
package ingest
