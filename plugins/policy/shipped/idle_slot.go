package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// idleSlot waits for an instant at which the guest does nothing: nobody notices the
// pause, little is written in it, and two replicas agree on most pages.
type idleSlot struct {
	shortest, longest float64
	params            []*policy.Param
}

// NewIdleSlot makes the policy `idle-slot`.
func NewIdleSlot(given map[string]string) (policy.Policy, error) {
	p := read(given)
	i := &idleSlot{shortest: p.duration("shortest", time.Minute, "from then on an idle slot is taken"),
		longest: p.duration("longest", 5*time.Minute, "if none comes, then without")}
	i.params = p.known
	if err := p.done(); err != nil {
		return nil, err
	}
	if i.longest < i.shortest {
		return nil, fmt.Errorf("parameter longest=%s is less than shortest=%s", span(i.longest), span(i.shortest))
	}
	return i, nil
}

func (i *idleSlot) Describe() *policy.Description {
	return &policy.Description{Name: "idle-slot", Version: "1", Formula: "the first idle slot in [shortest, longest]",
		Source: "after PLOVER, NSDI 2018: synchronize when network and processors are idle", Params: i.params}
}

func (i *idleSlot) Decide(s *policy.Signals) (*policy.Decision, error) {
	shortest, longest := bounded(s, i.shortest, i.longest), bounded(s, i.longest, i.longest)
	if !s.GetCapabilities().GetIdleSlots() {
		return due(s, longest, fmt.Sprintf("idle slots cannot be seen here: every %s", span(longest))), nil
	}
	return slotOr(s, shortest, longest, "the next idle slot"), nil
}

// slotOr wants the first idle slot after one interval (seconds), and a checkpoint in
// any case after a longer one.
func slotOr(s *policy.Signals, shortest, longest float64, what string) *policy.Decision {
	d := due(s, longest, fmt.Sprintf("%s from %s on, at the latest after %s", what, span(shortest), span(longest)))
	at, ok := d.GetWhen().(*policypb.Decision_AtNs)
	if n, _ := policy.Failures(s); !ok || n > 0 {
		return d // overdue, or a retry: without waiting
	}
	slot := policy.AtIdleSlot(max(since(s)+int64(shortest*second), s.GetNowNs()), at.AtNs, d.GetReason())
	slot.IntervalNs = d.GetIntervalNs()
	return slot
}
