package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/formula"
)

// overheadCap keeps the share of its time that the guest loses to checkpoints at a
// target.
type overheadCap struct {
	target, first, shortest, longest float64
	params                           []*policy.Param
}

// NewOverheadCap makes the policy `overhead-cap`.
func NewOverheadCap(given map[string]string) (policy.Policy, error) {
	p := read(given)
	o := &overheadCap{target: p.share("target", 0.01, "of the guest's time, at most"),
		first:    p.duration("first", 5*time.Minute, "the interval to begin with"),
		shortest: p.duration("shortest", 5*time.Second, "never more often"),
		longest:  p.duration("longest", time.Hour, "never wait longer")}
	o.params = p.known
	return o, p.done()
}

func (o *overheadCap) Describe() *policy.Description {
	return &policy.Description{Name: "overhead-cap", Version: "1", Formula: "T <- T clamp(f / target, 1/2, 2), f = lost / (lost + run)",
		Source: "feedback on the share lost to the last checkpoint and its interval", Params: o.params}
}

// Decide follows the interval through the history, so that it needs no memory.
func (o *overheadCap) Decide(s *policy.Signals) (*policy.Decision, error) {
	list := succeeded(s, 64)
	t := o.first
	share := 0.0
	if n := len(list); n > 1 {
		was := seconds(list[n-1].GetAtNs() - list[n-2].GetAtNs())
		took := Lost(list[n-1])
		share = took / max(was, took)
		t = formula.OverheadCap(was, share, o.target)
	}
	t = bounded(s, max(t, o.shortest), o.longest)
	return due(s, t, fmt.Sprintf("the last checkpoint took %.2g %% of its interval, %.2g %% are allowed: the next after %s",
		100*share, 100*o.target, span(t))), nil
}
