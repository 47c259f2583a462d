package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/formula"
)

// youngDaly balances the work that checkpoints take away against the work that a
// failure does. What a live checkpoint takes away is its pause and the guest's work
// lost while it is written, not the time it takes.
type youngDaly struct {
	cost, mtbf, longest float64
	params              []*policy.Param
}

// measured stands for the median of the last checkpoints.
const measured = "measured"

// NewYoungDaly makes the policy `young-daly`.
func NewYoungDaly(given map[string]string) (policy.Policy, error) {
	p := read(given)
	y := &youngDaly{}
	if v, ok := given["cost"]; ok && v != measured {
		y.cost = p.duration("cost", time.Second, "what a checkpoint takes away")
	} else {
		p.take("cost", measured, "what a checkpoint takes away; or a duration")
	}
	y.mtbf = p.duration("mtbf", 30*24*time.Hour, "mean time between failures where the host knows none")
	y.longest = p.duration("longest", 24*time.Hour, "never wait longer")
	y.params = p.known
	return y, p.done()
}

func (y *youngDaly) Describe() *policy.Description {
	return &policy.Description{Name: "young-daly", Version: "1",
		Formula: "T = sqrt(2dM)(1 + sqrt(d/2M)/3 + (d/2M)/9) - d for d < 2M, else M",
		Source:  "Daly, FGCS 22(3), 2006, after Young, CACM 17(9), 1974", Params: y.params}
}

func (y *youngDaly) Decide(s *policy.Signals) (*policy.Decision, error) {
	d, assumed := cost(s)
	if y.cost > 0 {
		d, assumed = y.cost, false
	}
	m := mtbf(s, y.mtbf)
	t := bounded(s, formula.Daly(d, m), y.longest)
	how := measured
	if assumed {
		how = "assumed"
	} else if y.cost > 0 {
		how = "set"
	}
	return due(s, t, fmt.Sprintf("a checkpoint costs %s (%s), failures come every %s: every %s", span(d), how, span(m), span(t))), nil
}

// mtbf is the mean time between failures in seconds.
func mtbf(s *policy.Signals, fallback float64) float64 {
	if f := s.GetHost().GetFailuresPerSecond(); f > 0 {
		return 1 / f
	}
	return fallback
}
