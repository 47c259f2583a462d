package shipped

import (
	"fmt"
	"math"
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
	b := &bandwidth{share: p.share("share", 0.5, "of the store's bandwidth that may be used"),
		shortest: p.duration("shortest", 10*time.Second, "never more often"),
		longest:  p.duration("longest", time.Hour, "never wait longer")}
	b.params = p.known
	return b, p.done()
}

func (b *bandwidth) Describe() *policy.Description {
	return &policy.Description{Name: "bandwidth", Version: "1", Formula: "least T with T >= G(T) 4096 r / BW",
		Source: "the dirty-rate curve G fitted online; r is what a written page takes in the store", Params: b.params}
}

func (b *bandwidth) Decide(s *policy.Signals) (*policy.Decision, error) {
	bw := s.GetHost().GetStoreBytesPerSecond() * b.share
	if bw <= 0 {
		t := bounded(s, b.longest, b.longest)
		return due(s, t, fmt.Sprintf("the store's bandwidth is not known: every %s", span(t))), nil
	}
	var t float64
	if s.GetCapabilities().GetIncremental() {
		t = formula.Bandwidth(curve(s), bytesPerPage(s), bw)
	} else { // every checkpoint stores all that is in use
		t = float64(s.GetVm().GetUsedBytes()) / bw
	}
	reason := fmt.Sprintf("%.0f MB/s of the store are ours, which keep up from every %s on", bw/1e6, span(t))
	if math.IsInf(t, 1) {
		t = b.longest
	}
	t = bounded(s, max(t, b.shortest), b.longest)
	return due(s, t, reason), nil
}
