package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
)

// costMin minimizes what protection costs in all: work lost to checkpoints, which
// follows what is written while they are taken, and work lost to failures.
type costMin struct {
	mtbf, weight, shortest, longest float64
	params                          []*policy.Param
}

// NewCostMin makes the policy `cost-min`.
func NewCostMin(given map[string]string) (policy.Policy, error) {
	p := read(given)
	c := &costMin{mtbf: p.duration("mtbf", 30*24*time.Hour, "mean time between failures where the host knows none"),
		weight:   p.number("weight", 1, "of a second lost to a failure against one lost to checkpoints"),
		shortest: p.duration("shortest", 5*time.Second, "never more often"),
		longest:  p.duration("longest", 24*time.Hour, "never wait longer")}
	c.params = p.known
	return c, p.done()
}

func (c *costMin) Describe() *policy.Description {
	return &policy.Description{Name: "cost-min", Version: "1",
		Formula: "least (c0 + c1 S(w))/T + weight (T/2 + w)/M; w: seconds it is written, S(w): mean of G over w",
		Source:  "Young's balance with a cost that follows the dirty-rate curve while a checkpoint is written", Params: c.params}
}

func (c *costMin) Decide(s *policy.Signals) (*policy.Decision, error) {
	m := mtbf(s, c.mtbf)
	model := costModel(s, m, c.weight)
	t := model.Least(max(c.shortest, seconds(s.GetCapabilities().GetMinIntervalNs())), c.longest)
	t = bounded(s, t, c.longest)
	return due(s, t, fmt.Sprintf("every %s costs %.3g %% in all: a checkpoint now takes %s (%s and %.3g us a page), failures every %s",
		span(t), 100*model.At(t), span(model.Lost(t)), span(model.Fixed), model.PerPage*1e6, span(m))), nil
}
