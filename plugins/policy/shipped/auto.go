package shipped

import (
	"fmt"
	"slices"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/formula"
)

// auto is the default: it chooses the interval that loses least work in all within
// what the store keeps up with and the guest is to notice, an idle slot near it where
// the guest has some, and the gentlest mode that works for this VM.
type auto struct {
	mtbf, overhead, shortest, longest float64
	params                            []*policy.Param
}

// NewAuto makes the policy `auto`.
func NewAuto(given map[string]string) (policy.Policy, error) {
	p := read(given)
	a := &auto{mtbf: p.duration("mtbf", 30*24*time.Hour, "mean time between failures where the host knows none"),
		overhead: p.share("overhead", 0.01, "of the guest's time, at most"),
		shortest: p.duration("shortest", 10*time.Second, "never more often"),
		longest:  p.duration("longest", 15*time.Minute, "never wait longer")}
	a.params = p.known
	return a, p.done()
}

func (a *auto) Describe() *policy.Description {
	return &policy.Description{Name: "auto", Version: "1",
		Formula: "least cost (cost-min) of a checkpoint taken now, at least what the store and the overhead allow, at an idle slot in [T, 1.2 T]",
		Source:  "cost-min, bandwidth, overhead-cap and idle-slot together; modes by preference and by what failed", Params: a.params}
}

// gentle are the modes by what the guest notices of them.
var gentle = []string{"cow", "tlc", "buffer", "stop"}

// giveUpAfter failures in a row of one mode, the next one is tried.
const giveUpAfter = 2

// storeShare of its time the store is used at most.
const storeShare = 0.5

// slack is how much longer than the interval an idle slot is waited for.
const slack = 1.2

func (a *auto) Decide(s *policy.Signals) (*policy.Decision, error) {
	m := mtbf(s, a.mtbf)
	model := costModel(s, m, 1)
	t := model.Least(a.shortest, a.longest)
	why := fmt.Sprintf("least work lost in all at %s (a checkpoint now costs %s, failures come every %s)", span(t), span(model.Lost(t)), span(m))
	if floor := model.Within(a.overhead, t); floor > t {
		t, why = floor, fmt.Sprintf("at most %.2g %% of the guest's time", 100*a.overhead)
	}
	if floor := formula.KeepsUp(model.Commit, storeShare); floor > t {
		t, why = floor, "as often as the store keeps up"
	}
	t = bounded(s, max(t, a.shortest), a.longest)
	mode, reason := chooseMode(s)
	why = fmt.Sprintf("every %s: %s; %s", span(t), why, reason)
	d := due(s, t, why)
	if late := bounded(s, t*slack, a.longest); s.GetCapabilities().GetIdleSlots() && rests(s) && late > t {
		d = slotOr(s, t, late, why+"; an idle slot")
	}
	d.Mode = mode
	return d, nil
}

// neverIdle is the share of its vCPUs' time from which on a guest has no idle slot that
// is worth waiting for.
const neverIdle = 0.95

// rests reports a guest that has idle slots now and then.
func rests(s *policy.Signals) bool {
	return s.GetNetwork().GetIdleShare() > 0 && s.GetCpu().GetBusyShare() < neverIdle
}

// chooseMode is the gentlest mode there is that did not just fail again and again.
func chooseMode(s *policy.Signals) (mode, reason string) {
	failed := map[string]int{}
	for _, c := range slices.Backward(s.GetHistory()) {
		if c.GetOk() {
			break
		}
		failed[c.GetMode()]++
	}
	has := s.GetCapabilities().GetModes()
	for _, m := range gentle {
		if slices.Contains(has, m) && failed[m] < giveUpAfter {
			if mode = m; len(failed) > 0 {
				return mode, fmt.Sprintf("mode %s after failures", mode)
			}
			return mode, fmt.Sprintf("mode %s is the gentlest here", mode)
		}
	}
	return "", "the host chooses the mode"
}
