// Package replay runs a policy over a recorded trace of signals and says what it would
// have done and what that would have cost. It does no I/O but reading the trace.
//
// A trace is JSON lines, each the Signals of one instant (proto3 JSON), in the order
// of now_ns; between two lines the former holds. History and the last decision are
// those of the replay, not the recorded ones.
//
// What a checkpoint takes is what the newest one did that the trace has told of by then, in
// everything: its pause, how long it took to its instant and from there, its bytes, the
// pages that were saved. Before the trace tells of any it is what the first one took, so
// that one that is gone through again begins as it went on. So a trace of a VM that was
// protected (`attach --record`) needs no figures by hand. It holds for checkpoints of the
// same kind: those that continue others are taken to store as much at any interval, and
// modes to cost the same.
//
// The model, for traces that tell of none. A checkpoint begins when the policy wants it, and
// that is its instant. It takes the time in which the store takes its bytes: all that is in
// use, or with incremental checkpoints what was written since the last; a look at the rest
// is not reckoned. The guest loses Model.Fixed and, for each page it writes before the scan
// that passes over memory meanwhile (for Model.ScanShare of that time) has copied it,
// Model.PerPage. What a failure costs is the time since the instant of the newest
// checkpoint that was whole by then; expected is its integral times the failure rate.
//
// Failure modes. A trace that is malformed, out of order or too large is an error, as
// is a decision that policy.Check refuses.
package replay
