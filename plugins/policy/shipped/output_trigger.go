package shipped

import (
	"fmt"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
)

// outputTrigger has two modes: short intervals while the guest talks to the outside,
// so that what it said is soon covered (or let out, where output is held), long ones
// while it only computes.
type outputTrigger struct {
	network, processing, packets float64
	params                       []*policy.Param
}

// NewOutputTrigger makes the policy `output-trigger`.
func NewOutputTrigger(given map[string]string) (policy.Policy, error) {
	p := read(given)
	o := &outputTrigger{network: p.duration("network", 5*time.Second, "the interval while packets go out"),
		processing: p.duration("processing", 5*time.Minute, "the interval while none do"),
		packets:    p.number("packets", 1, "a second that count as talking")}
	o.params = p.known
	return o, p.done()
}

func (o *outputTrigger) Describe() *policy.Description {
	return &policy.Description{Name: "output-trigger", Version: "1", Formula: "T = network if output is pending or flowing, else processing",
		Source: "the two modes of Adaptive Remus", Params: o.params}
}

func (o *outputTrigger) Decide(s *policy.Signals) (*policy.Decision, error) {
	n := s.GetNetwork()
	switch {
	case n.GetBufferedBytes() > 0:
		t := bounded(s, o.network, o.processing)
		return due(s, t, fmt.Sprintf("%d bytes of output wait for a checkpoint: every %s", n.GetBufferedBytes(), span(t))), nil
	case n.GetOutPacketsPerSecond() >= o.packets:
		t := bounded(s, o.network, o.processing)
		return due(s, t, fmt.Sprintf("%.0f packets/s go out: every %s", n.GetOutPacketsPerSecond(), span(t))), nil
	}
	t := bounded(s, o.processing, o.processing)
	d := due(s, t, fmt.Sprintf("nothing goes out: every %s", span(t)))
	return d, nil
}
