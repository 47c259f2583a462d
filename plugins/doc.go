// Package plugins is the host of the policies: programs that decide when and how a VM
// is checkpointed, each in a process of its own (package policy is their contract).
//
// A Registry is a directory of installed programs, which only root can write and
// which has their checksums; nothing is run from anywhere else. A Generation is one
// such program, started: hashicorp/go-plugin over gRPC with mutual TLS, an empty
// environment, no standard input, a process group of its own, limits. A Slot is the
// place of a VM's policy: which generation is in it changes while decisions go on.
//
// # Life cycle
//
// Slot.Set starts generation N+1, has it describe itself and decide on the current
// signals, and only then puts it in N's place; N ends when its last call has
// returned. If any of this fails N stays. A program that crashes, hangs, floods or
// answers what policy.Check refuses loses its place to the built-in fallback (the
// policy fixed, in this process) and is started again, later every time; so is one that was
// insisted on and did not come up (Slot.Insist). Slot.Decide never fails and takes
// policy.Deadline at most.
//
// # Concurrency
//
// Slot.mu guards which generation is in charge and its calls in flight; no call of a
// program is made and no process is started or ended under it. Slot.change is held by
// whoever replaces the generation, one at a time, and taken before mu. The goroutines
// of a slot are joined by Slot.Close, those of a generation by its end.
//
// # Failure modes
//
// A host that is killed takes its programs with it (the kernel ends them), and leaves the
// directories of their sockets, which the next host on this machine takes away: each is
// locked as long as its host lives.
//
// A generation ends by the death of its process group and the closing of our ends of
// its pipes, whatever the program does: every wait on it is bounded by that.
package plugins
