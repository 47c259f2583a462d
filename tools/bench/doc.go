// Package bench measures ckagent against its peers, in one run, on the same
// guests, in alternation: QEMU's background-snapshot and stop-and-copy migration,
// -incoming of a full file, userfaultfd-go's mapper.Handle, write(2), and the
// same system calls in a loop in C.
//
// # Use
//
// Run measures the parts it is asked for and returns rows (package report), charts
// and what the stages of a checkpoint cost. cmd/bench is the program.
//
// # What is measured from where
//
// Nothing is taken from ckagent's own word where it can be seen from outside: the
// pause is the STOP and RESUME events of QEMU on a second monitor, the gap is what
// a spinning vCPU's heartbeats show (vmtest.Beats), the lost work is the guest's
// own counter, the total is the life of the process that was started. Peers get
// the quickest way there is: a file descriptor instead of a pipe, no bandwidth
// limit, a store in memory, where nobody waits for a disk (the part "disk" does,
// with fsync on both sides).
//
// # Life cycle and concurrency
//
// One goroutine measures; a guest that is not measured is stopped, so that it
// takes nothing from the one that is. Each guest has one more goroutine that
// follows its console (workLog), joined by close. Guests, processes and files are
// gone when Run returns. Waiting for time to pass is part of the measurement here
// (a window of one second before and after): it is done on timers, under the
// context.
//
// # Failure
//
// A part that cannot be measured on this machine (memory, no guest image) ends the
// run with an error that says which one; nothing is skipped in silence. A figure
// that could not be taken is absent from the table.
package bench
