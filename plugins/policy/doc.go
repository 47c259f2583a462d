// Package policy is the contract between ckagent and the programs that decide when
// and how a VM is checkpointed, and what authors of such programs need in Go.
//
// A policy is a program of its own, started by ckagent through hashicorp/go-plugin:
// gRPC over a unix socket, mutual TLS with certificates made for that one start, an
// empty environment. It is told signals (what is known of the VM, its past
// checkpoints and the host) and answers with a decision and the reason for it, in
// words. policy.proto is the contract for every language; policypb is it in Go.
//
// Life cycle. Serve is the whole main of a policy. The host starts the program, calls
// Describe with the operator's parameters once, then Decide whenever something
// changed or the last decision's time has come, one call at a time per VM. It ends the
// program by closing the connection and, after a moment, by a signal. A policy keeps
// no state that matters: the same signals get the same decision, so that a recording
// of signals can be replayed and a new generation takes over without being told more.
//
// Failure modes. An error, an answer that takes longer than Deadline, or a decision
// that Check refuses counts against the policy: the host goes on with the last valid
// decision, then with its built-in fallback. Nothing a policy does can leave a VM
// without protection.
package policy
