package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/formula"
)

// costMin minimizes what protection costs in all: work lost to checkpoints, which
// follows what is written between them, and work lost to failures.
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
		Formula: "least (c0 + c1 G(T))/T + weight (T/2 + commit)/M",
		Source:  "Young's balance with a cost that follows the dirty-rate curve", Params: c.params}
}

func (c *costMin) Decide(s *policy.Signals) (*policy.Decision, error) {
	m := mtbf(s, c.mtbf)
	model := costModel(s, m, c.weight)
	t := model.Least(max(c.shortest, seconds(s.GetCapabilities().GetMinIntervalNs())), c.longest)
	t = bounded(s, t, c.longest)
	return due(s, t, fmt.Sprintf("every %s costs %.3g %% in all: %s a checkpoint and %.3g us a page, failures every %s",
		span(t), 100*model.At(t), span(model.Fixed), model.PerPage*1e6, span(m))), nil
}

// costModel splits what checkpoints cost into a fixed part and one per page by least
// squares over the history; with too little of it, all is fixed.
func costModel(s *policy.Signals, mtbf, weight float64) formula.Cost {
	fixed, _ := cost(s)
	model := formula.Cost{Curve: curve(s), Fixed: fixed, FailureRate: 1 / mtbf, Weight: weight}
	list := succeeded(s, 32)
	model.Commit = median(list, func(c *policy.Checkpoint) float64 { return seconds(c.GetTotalNs()) })
	if len(list) < 4 {
		return model
	}
	var n, sx, sy, sxx, sxy float64
	for _, c := range list {
		x := float64(c.GetCapturedPages())
		y := seconds(c.GetPauseNs()) + seconds(c.GetTotalNs())*c.GetWorkLostShare()
		n, sx, sy, sxx, sxy = n+1, sx+x, sy+y, sxx+x*x, sxy+x*y
	}
	if det := n*sxx - sx*sx; det > 1e-9*n*sxx {
		perPage := (n*sxy - sx*sy) / det
		if base := (sy - perPage*sx) / n; perPage > 0 && base > 0 {
			model.Fixed, model.PerPage = base, perPage
		}
	}
	return model
}
