package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
)

// fixed takes a checkpoint every so often, whatever happens: what cron would do.
type fixed struct {
	interval float64
	params   []*policy.Param
}

// NewFixed makes the policy `fixed`.
func NewFixed(given map[string]string) (policy.Policy, error) {
	p := read(given)
	f := &fixed{interval: p.duration("interval", 15*time.Minute, "between two checkpoints")}
	f.params = p.known
	return f, p.done()
}

func (f *fixed) Describe() *policy.Description {
	return &policy.Description{Name: "fixed", Version: "1", Formula: "T = interval", Source: "none needed", Params: f.params}
}

func (f *fixed) Decide(s *policy.Signals) (*policy.Decision, error) {
	t := bounded(s, f.interval, f.interval)
	return due(s, t, fmt.Sprintf("every %s", span(t))), nil
}
