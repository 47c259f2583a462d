// Package vcpu follows the vCPU threads of virtual machines through the scheduler:
// how long each runs, waits for a processor and sleeps, and the idle slots in which
// all vCPUs of a machine sleep at once. Slots can be told of as they begin.
//
// # Life cycle
//
// Load attaches the programs to the scheduler's tracepoints of the whole host; a
// switch between threads nobody asked about costs two hash lookups. Attach begins to
// follow a machine, Detach ends that, Close ends everything. Nothing is pinned.
//
// # What is not known at once
//
// A thread's state is known from its next switch or wakeup on. Until then its times
// are the scheduler's own account of it (/proc/PID/task/TID/schedstat), which has
// everything but the slots.
//
// # Concurrency
//
// Monitor's methods may be called from any goroutine, those of one Machine by one at
// a time. Slots has one reader.
package vcpu
