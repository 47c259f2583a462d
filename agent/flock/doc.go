// Package flock keeps processes apart by locks on files. The kernel drops a lock when
// the last process that holds its descriptor has ended, however it ended.
//
// A lock's file may be removed by its holder, while it holds it; whoever gets the lock of
// a file that has lost its name tries again. The directory is made if it is missing.
//
// All functions may be called from any goroutine; none starts one.
package flock
