// Package qmp talks to QEMU's machine protocol: it finds the monitors of a
// running process (Discover), connects (Dial, DialPID), runs commands, one at a
// time (Execute) or several in one write (Encode, Send, Call.Wait), passes
// descriptors, and hands out events (Subscribe).
//
// A monitor serves one client at a time, and is borrowed: connect, act, Close.
// Close frees it at once, also for duplicates of the socket (DupFile). A
// process that inherited a duplicate from an owner that died takes over with
// Resync or AdoptClient.
//
// The monitor that libvirt made for itself is reached through libvirt's daemon: a
// relay plays QEMU's part at the other end of the Client's socket and carries out
// what it is told by libvirt's procedures (relay.go). Such sessions are not
// exclusive, and end with the process: DupFile has nothing to give away.
//
// Life cycle: a Client owns one goroutine, its reader, from creation to Close,
// which joins it. The reader notes the time right after each read(2), cuts the
// stream into messages, and completes the call whose id a reply carries; who
// waits decodes it. It never blocks on a consumer: a call holds its reply, a
// subscription drops its oldest event and counts it.
//
// Concurrency: every method may be called from any goroutine. Writers take
// turns (Client.sem); commands that carry a descriptor also wait for each
// other's reply. Lock order: sem, Client.mu, Subscription.mu.
//
// Cancellation leaves the stream usable. A call given up is forgotten, and its
// reply thrown away by id when it comes. A command cut off in the middle of the
// write is never finished: the next one first resets QEMU's parser (0xFF).
//
// Failures: what QEMU refuses is *Error, word for word. A connection that ends
// fails everything under way with ErrLost, and with ErrExited too when the
// process at the other end is known to be gone. Messages are bounded (128 MiB),
// and what is not JSON ends the connection with ErrProtocol. Dial and Discover
// return *problem.Error: Busy names who holds the monitor where that can be
// seen, Refused and NotFound say what to do instead.
package qmp
