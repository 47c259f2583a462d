// Package vm is the target: one running QEMU process, seen from outside and
// through its monitor, without changing anything in it.
//
// # What it knows
//
//   - Process: the process, held by pidfd and start time, so that a recycled pid
//     is noticed; identity, limits, cgroups, namespaces, exit.
//   - Target: a Process plus its QMP monitor, with version, machine type,
//     accelerator and vCPU threads.
//   - RAMBlock: where each of QEMU's RAM blocks lies in its address space, proved
//     by size, permissions and one unbroken mapping per block (ResolveLayout).
//   - Refusal: what cannot be protected, by a stable code, with what to do
//     instead (Target.Refusals); asked before anything is touched.
//   - Machine: everything needed to build the same machine again, with the
//     recorded command line compared to the machine as it is now
//     (Target.Describe).
//
// # Life cycle
//
// OpenProcess or Open, any number of calls, Close. Close joins the one goroutine
// a Process may own (the watcher behind Done). A Target borrows its monitor: it
// holds the QMP connection from Open to Close, and other tools wait that long.
//
// # Concurrency
//
// A Process may be used by several goroutines at once; its identity fields never
// change after OpenProcess. A Target's fields are fixed after Open; its methods
// only read /proc and talk through the monitor, which serialises by itself.
// There is one lock (Process.mu, around starting the watcher and closing); no
// other lock is taken while it is held.
//
// # Failure modes
//
// A process that goes away at any moment turns every call into problem.NotFound
// or a wrapped errno, never into data about its successor. Output of QEMU and
// the kernel is parsed strictly and within limits: a line that is not understood
// is an error, not something to skip, because a RAM block missed is guest memory
// lost. ResolveLayout fails with problem.Refused rather than guess.
package vm
