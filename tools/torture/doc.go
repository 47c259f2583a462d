// Package torture harms ckagent at every step and at random instants, and looks
// from outside whether the VM got away unharmed.
//
// # What a round is
//
// A round takes a checkpoint of a running guest (or restores one) with the
// release binary, harms one process at one instant, and then checks the
// invariants: the guest goes on within its bound (heartbeats that the host's
// kernel stamps), no mapping stays write-protected, no page keeps the mark, no
// descriptor or tracer of ours is in QEMU, the VM is as running or paused as it
// was before, no process of ours is left, no half checkpoint is visible, the
// former one verifies. See check.go. Whatever does not hold is an exception of
// that round; a campaign passes with none.
//
// Victims are the agent, its fault server, its guardian, agent and fault server
// together (a service's cgroup), agent and guardian together (what `ckagent
// release` is for), QEMU, and of a restore the restorer, the pager, its
// supervisor and both. Actions are SIGKILL, SIGSTOP, the cgroup freezer and a
// processor quota of 1 %.
//
// # Instants
//
// The agent talks to QEMU through vmtest.Proxy, which withholds each message
// until the harm is done: that is exact. Steps without a message (phases of a
// restore, the drain, the commit) are taken from the binary's own log. Random
// instants are drawn from the length of an unharmed run, or inside the pause,
// where the proxy holds `cont` back until the harm is done.
//
// # Life cycle
//
// A Bed is a guest, a proxy before its monitor, and a store with a checkpoint.
// Rounds on a bed follow each other; a bed is thrown away when its QEMU died or
// after an exception. A Campaign is a list of rounds under a time budget; its
// outcomes go to a file of JSON lines, of which WriteReport makes the summary.
//
// # Concurrency
//
// One round at a time in a process. The process makes itself the subreaper of
// what it starts, so that an orphan of a killed agent comes to it: that is how
// it knows that none is left.
package torture
