package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
)

// dirtyWatermark checkpoints when so much of the memory has changed: the size of an
// increment, and of what a crash would have to recompute, stays about the same.
type dirtyWatermark struct {
	share, shortest, longest float64
	params                   []*policy.Param
}

// NewDirtyWatermark makes the policy `dirty-watermark`.
func NewDirtyWatermark(given map[string]string) (policy.Policy, error) {
	p := read(given)
	d := &dirtyWatermark{share: p.share("share", 0.05, "of the memory in use"),
		shortest: p.duration("shortest", 10*time.Second, "never more often"),
		longest:  p.duration("longest", time.Hour, "never wait longer")}
	d.params = p.known
	return d, p.done()
}

func (w *dirtyWatermark) Describe() *policy.Description {
	return &policy.Description{Name: "dirty-watermark", Version: "1", Formula: "T with G(T) = share of the pages in use",
		Source: "the dirty-rate curve G fitted online", Params: w.params}
}

func (w *dirtyWatermark) Decide(s *policy.Signals) (*policy.Decision, error) {
	budget := w.share * float64(s.GetVm().GetUsedBytes()) / pageBytes
	t := curve(s).Until(budget)
	d := due(s, bounded(s, max(t, w.shortest), w.longest),
		fmt.Sprintf("%.0f pages (%.3g %% of what is in use) are written within %s", budget, 100*w.share, span(t)))
	return d, nil
}
