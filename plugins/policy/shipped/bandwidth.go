package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/formula"
)

// bandwidth checkpoints as often as the store can take it: what was written in an
// interval is stored before the next.
type bandwidth struct {
	share, shortest, longest float64
	params                   []*policy.Param
}

// NewBandwidth makes the policy `bandwidth`.
func NewBandwidth(given map[string]string) (policy.Policy, error) {
	p := read(given)
	b := &bandwidth{share: p.share("share", 0.5, "of the store's time that may be used"),
		shortest: p.duration("shortest", 10*time.Second, "never more often"),
		longest:  p.duration("longest", time.Hour, "never wait longer")}
	b.params = p.known
	return b, p.done()
}

func (b *bandwidth) Describe() *policy.Description {
	return &policy.Description{Name: "bandwidth", Version: "1", Formula: "least T with W(T) <= share T",
		Source: "W(T): how long a checkpoint after T takes, by the last ones and, where it stores what was written since the one before, by the dirty-rate curve G fitted online: w0 + w1 G(T) 4096 r; r is what a written page takes in the store", Params: b.params}
}

func (b *bandwidth) Decide(s *policy.Signals) (*policy.Decision, error) {
	took, known := duration(s)
	if !known {
		t := bounded(s, b.longest, b.longest)
		return due(s, t, fmt.Sprintf("the store's bandwidth is not known: every %s", span(t))), nil
	}
	t := formula.KeepsUp(took, b.share)
	reason := fmt.Sprintf("%.3g %% of the store's time are ours, which keeps up from every %s on", 100*b.share, span(t))
	t = bounded(s, max(t, b.shortest), b.longest)
	return due(s, t, reason), nil
}
