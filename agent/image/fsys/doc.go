// Package fsys is the thin layer of file operations under images and the store.
//
// Everything a checkpoint writes goes through FS: creating, writing, syncing,
// renaming, removing. That buys two things. The order of those operations is
// what makes a commit atomic, and a recorder put in their place can replay every
// prefix of it with unsynced data lost (package crashfs). And a store can live
// elsewhere than in a directory (package memfs).
//
// Life cycle: OS is stateless. A File belongs to one goroutine at a time; a
// ReadFile may be read by many. Closing is the owner's job.
//
// Failure modes: every error keeps its errno (errors.Is(err, unix.ENOSPC)); Problem
// turns one into what an operator reads. A file system that hangs blocks the
// caller in the kernel: no context can end that, which is why nothing that a
// guest waits for may call into this package.
package fsys
