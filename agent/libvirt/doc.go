// Package libvirt talks to a libvirt daemon over its remote procedure calls, as
// far as is needed to reach the QEMU of a domain: monitor commands, a descriptor
// passed along with one, monitor events, and what the domain is (XML, state).
//
// The clients there are for Go take no context, no descriptor and no limit to
// what the daemon sends; and libvirt's C library would make every build a cgo
// build. What is used here is a header of seven words and a dozen procedures,
// fixed since libvirt 0.6 (monitor events 1.2.3, descriptors 8.2).
//
// Life cycle: Dial connects, authenticates (nothing for root, polkit for others)
// and opens a URI; Close ends the connection and joins its one goroutine, the
// reader. The reader completes the call whose serial number a reply carries and
// hands events to the function given to Watch, which must not wait for a call.
//
// Concurrency: every method may be called from any goroutine. The daemon carries
// out calls of one connection in parallel: whoever needs an order waits for one
// reply before the next call. Lock order: sem, then mu.
//
// Failures: what libvirt refuses is *Error, word for word. A connection that
// ends fails everything under way with ErrLost. A call whose context ends may
// still be carried out; its reply is thrown away. Sizes are bounded, and what is
// not understood ends the connection with ErrProtocol.
package libvirt
