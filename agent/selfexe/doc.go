// Package selfexe says how to start the running binary once more, for helper processes
// that have to be of the same build as whoever talks to them.
//
// All functions may be called from any goroutine.
package selfexe
