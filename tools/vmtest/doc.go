// Package vmtest runs QEMU machines with self-checking guests for tests,
// benchmarks and the demo, and says what the guests saw.
//
// # Use
//
// A test calls Start, anything else Launch: the same machine, but Start reports
// to the test, waits until the guest is up and ends the machine with the test.
// A machine that was started by somebody else (a restored one) is taken over by
// Adopt. Config says what to run; Matrix is the list of configurations that
// ckagent has to handle.
//
// The witnesses here are independent of the code under test on purpose: a small
// QMP client (Monitor), reading of guest memory through /proc (ReadRAM), a QMP
// proxy that holds back, delays, drops or cuts commands (Proxy), and heartbeats
// stamped by the host's kernel (Beats).
//
// # Life cycle
//
// A VM owns its QEMU process (own process group, killed by the kernel if this
// process dies), one goroutine that waits for it, and a directory with the
// sockets, the serial log and QEMU's messages. Kill ends all of it and may be
// called any number of times, from any goroutine.
//
// # Waiting
//
// Nothing here sleeps: waiting for the guest is waiting for its serial log to
// grow (inotify) or its process to end (pidfd), under a context or a deadline.
//
// # Skips
//
// Skip says "SKIP-REASON <id>: <reason>", also in a file, so that continuous
// integration can compare the skips of a run with the list that is expected.
package vmtest
