// Package image is what a checkpoint consists of: a manifest, a pagemap, segments
// and the device state. FORMAT.md beside this file describes every byte.
//
// A Writer turns pages into files, a Reader turns files into pages. Neither
// decides when a checkpoint exists: that is the rename of the manifest, done by
// package store.
//
// Life cycle. NewWriter, any number of WritePages and WriteZero from any number
// of goroutines, WriteDeviceState, then Finish (every byte durable; its Summary
// fills the manifest) or Abort. OpenReader looks at the manifest and at 8 bytes
// per 4 MiB of RAM, whatever the size of the VM; the rest of the pagemap is read
// and checked when a page of it is asked for.
//
// Concurrency. Writers: a call takes a lane of its own (a segment file and its
// buffers) and returns it; calls wait for each other only when there are more of
// them than lanes. Each page is claimed by an atomic bit, so a page written twice
// is an error and not a race. Finish and Abort wait for the calls under way.
// Readers: every method is safe for concurrent use; Close waits for them. Lock
// order in the Writer: life, then lanes; the other locks are leaves.
//
// Why pread and not mmap: a mapped file that is truncated or sits on a failing
// disk kills its reader by SIGBUS, and the reader is the pager that a guest waits
// for; pread answers with an errno. A page is also checked and used in the same
// private buffer, so that nobody can change it in between. See FORMAT.md and
// BenchmarkReadPage for what it costs.
//
// Failure modes. Anything in a file that is not what was written is
// problem.Integrity with path, offset, expected and found; the page is not
// returned. Failing storage is problem.Store with the errno kept. A Writer that
// failed once stays failed: a checkpoint with a hole is not a checkpoint.
package image
