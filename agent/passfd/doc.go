// Package passfd passes messages, and open files with them, between two processes of ours:
// JSON over a socket pair that keeps messages apart (SOCK_SEQPACKET), the files as rights
// (unix(7)).
//
// # Life of a file on its way
//
// Who sends a file keeps its own. The message holds another reference from then on, whatever
// becomes of its sender, until it is received; one that nobody receives any more goes with
// the socket. So a file whose last reference is in a message lives as long as somebody may
// still want it, and no longer.
//
// # Failure modes
//
// A peer that does not read for [patience] makes Send fail. One that has gone makes Send fail
// and Receive return io.EOF, after what it has sent. Messages of more than [MaxBytes] and
// with more than [maxFiles] files are for neither.
//
// # Concurrency
//
// A connection is used by one goroutine at a time in each direction. No function starts one.
package passfd
