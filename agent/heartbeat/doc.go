// Package heartbeat leaves a process's sign of life on a host that has no time for
// it: from a thread of its own, before all ordinary threads, in bare system calls.
//
// A Go timer would depend on a scheduler whose threads may all sit in other system
// calls or wait for a processor; and a beat that comes late costs a checkpoint,
// because the guardian cannot tell a starved process from a frozen one.
//
// The same manners serve other threads that somebody waits for (Realtime, Pin).
//
// The thread holds a P of the Go scheduler for as long as it beats; the caller
// raises GOMAXPROCS by one if the process needs all of its own. Start and Stop are
// called by the owner; nothing else is shared.
package heartbeat
