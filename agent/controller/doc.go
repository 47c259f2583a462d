// Package controller decides what is done to one protected VM, and when. It is a state
// machine without input or output, in the manner of etcd's raft: Step takes what
// happened and returns what is to be done. Whoever drives it (package agent) carries
// the commands out and reports what came of them as further events; it reads no clock
// of its own, so that every run of it can be written down and repeated. The transcripts
// in testdata are such runs, made to be read.
//
// # Life cycle
//
// A Machine begins Idle and asks the policy. A checkpoint goes
//
//	Idle -> Queued -> Arming -> Capturing -> Committing -> Retaining -> Idle
//
// and, as a member of a group, whose members stand still at the same time,
//
//	Idle -> Queued -> Arming -> Prepared -> SuspendAt -> Capturing -> Held -> ResumeAt -> Committing
//
// From any of these it comes to Aborted when it is given up, and back to Idle when what
// it did is undone. Refused and Ended are final; Restoring comes before Ended where a
// VM that crashed is brought back.
//
// # Invariants
//
// They are written on the fields of Machine, and the tests check them after every step
// of random runs. The most important: at most one checkpoint is under way; an order is
// answered once; a guest is never held longer than Config.HeldLimit; nothing is started
// after the end.
//
// # Concurrency
//
// None: a Machine belongs to one goroutine.
package controller
