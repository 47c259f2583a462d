package policy

import (
	"time"

	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// The messages of the contract under the names authors use.
type (
	Signals     = policypb.Signals
	Decision    = policypb.Decision
	Description = policypb.Description
	Param       = policypb.Param
	Checkpoint  = policypb.Checkpoint
)

// Deadline is how long a call may take before it counts against the policy.
const Deadline = 500 * time.Millisecond

// Policy decides. Both methods are called by one goroutine at a time.
type Policy interface {
	Describe() *Description
	// Decide must be a function of its argument alone.
	Decide(*Signals) (*Decision, error)
}

// New makes a policy from an operator's parameters; an unknown one is an error.
type New func(params map[string]string) (Policy, error)

// At is a decision for a checkpoint at an instant.
func At(ns, intervalNS int64, reason string) *Decision {
	return &Decision{When: &policypb.Decision_AtNs{AtNs: ns}, IntervalNs: intervalNS, Reason: reason}
}

// Now is a decision for a checkpoint at once.
func Now(reason string) *Decision {
	return &Decision{When: &policypb.Decision_Now{Now: true}, Reason: reason}
}

// AskAgain is no checkpoint until the policy was asked once more, at an instant at the
// latest.
func AskAgain(ns int64, reason string) *Decision { return &Decision{AskAgainNs: ns, Reason: reason} }

// AtIdleSlot is a decision for the next idle slot between two instants.
func AtIdleSlot(notBeforeNS, deadlineNS int64, reason string) *Decision {
	return &Decision{When: &policypb.Decision_IdleSlot{IdleSlot: &policypb.IdleSlot{
		NotBeforeNs: notBeforeNS, DeadlineNs: deadlineNS}}, Reason: reason}
}
