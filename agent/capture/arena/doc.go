// Package arena is the shared memory through which the fault server hands
// captured pages to the agent: one memfd that both map, divided into rings with
// one producer and one consumer each.
//
// The fault server must never wait for a disk, and the agent must never hold up
// a guest. The arena is what separates them: the producer copies a page here and
// releases the guest; the consumer hashes, compresses and writes when it can.
// Its size is fixed at creation, so the memory a checkpoint may cost is known
// before it starts. A full ring is back-pressure: a scanner waits, a fault
// waits at most its stall budget and then gives the checkpoint up.
//
// # Concurrency
//
// A Ring is single producer, single consumer. Each index has one writer:
// the producer owns head, the consumer owns tail; a record's bytes are published
// by the store to head and given back by the store to tail. A producer that is in no
// hurry gives itself slack (SetSlack), so that it is not woken for every record given
// back. Waiting is by futex
// on the index words' companions, which works across the two processes; there
// are no locks. A consumer that has emptied its ring is not woken for each record
// that follows: for a moment it lets them gather.
//
// # Failure modes
//
// Either process may die at any instruction. The survivor sees it through its
// peer's pidfd, not through the arena; nothing here can be left locked. The
// consumer treats what it reads as untrusted: a record that does not fit the
// arena is an error, never an out-of-bounds access.
package arena
