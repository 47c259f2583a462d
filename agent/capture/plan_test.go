package capture

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/problem"
)

// TestPlan: what is tried after what.
func TestPlan(t *testing.T) {
	unproven := &faultserver.Error{Failure: faultserver.Unproven}
	escaped := &faultserver.Error{Failure: faultserver.Unproven, Escaped: []faultserver.Page{{Page: 7}}}
	unsupported := &faultserver.Error{Failure: faultserver.Unsupported}
	stalled := &faultserver.Error{Failure: faultserver.Stalled}
	short := problem.New(problem.Refused, "buffer RAM", "", "too much")
	for _, c := range []struct {
		name   string
		mode   Mode
		engine Engine
		asked  Mode
		fails  []error
		want   string
	}{
		{"all the way", COW, EngineBPF, Auto, []error{unproven, unproven, unproven, short}, "cow/bpf cow/uffd cow/uffd buffer/none stop/none"},
		{"escaped once", COW, EngineBPF, Auto, []error{escaped, unproven}, "cow/bpf cow/bpf+1 cow/uffd"},
		{"escaped twice", COW, EngineBPF, Auto, []error{escaped, escaped, unproven}, "cow/bpf cow/bpf+1 cow/uffd cow/uffd"},
		{"no programs", COW, EngineBPF, COW, []error{unsupported, unproven}, "cow/bpf cow/uffd cow/uffd"},
		{"no userfaultfd", COW, EngineUffd, Auto, []error{unsupported}, "cow/uffd buffer/none"},
		{"no userfaultfd, cow asked for", COW, EngineUffd, COW, []error{unsupported}, "cow/uffd"},
		{"cow asked for", COW, EngineUffd, COW, []error{unproven, unproven, short}, "cow/uffd cow/uffd buffer/none"},
		{"the store hangs", COW, EngineBPF, Auto, []error{stalled}, "cow/bpf"},
		{"anything else", COW, EngineBPF, Auto, []error{errors.New("x")}, "cow/bpf"},
		{"stop", Stop, EngineNone, Stop, []error{unproven}, "stop/none"},
	} {
		p := newPlan(c.mode, c.engine, c.asked)
		var got []string
		for i := 0; ; i++ {
			a := p.attempts[0]
			s := string(a.mode) + "/" + string(a.engine)
			if len(a.escaped) > 0 {
				s += "+1"
			}
			got = append(got, s)
			if i == len(c.fails) || !p.next(c.fails[i]) {
				break
			}
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%s: %s, want %s", c.name, strings.Join(got, " "), c.want)
		}
	}
	if p := newPlan(COW, EngineBPF, Auto); !slices.ContainsFunc(p.attempts, func(a attempt) bool { return a.mode == Buffer }) {
		t.Error("no attempt that needs no proof")
	}
}
