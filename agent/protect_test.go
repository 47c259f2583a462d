package agent

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/agent/controller"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// What an attempt's error means for the next one. A refusal is not the same as what
// fails: package controller says what follows from either.
func TestWhatAFailureMeans(t *testing.T) {
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		ctx  context.Context
		err  error
		want controller.Failure
	}{
		{t.Context(), problem.New(problem.Refused, "protect", "", "a device cannot be saved"), controller.Forbidden},
		{t.Context(), problem.New(problem.Usage, "checkpoint", "", "mode x"), controller.Senseless},
		{t.Context(), problem.New(problem.NotFound, "apply retention", "", "removed by somebody else"), controller.Passing},
		{t.Context(), problem.New(problem.Store, "write", "", "full"), controller.Passing},
		{t.Context(), problem.New(problem.Busy, "attach", "", "monitor"), controller.Passing},
		{t.Context(), errors.New("anything"), controller.Passing},
		{ended, problem.New(problem.Refused, "protect", "", "whatever came of giving it up"), controller.Given},
	} {
		if got := classOf(c.ctx, c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}

// TestNames: what cannot be told by the name it has is called by its pid, and what an
// operator asks for is refused.
func TestNames(t *testing.T) {
	long := strings.Repeat("x", 256)
	for own, want := range map[string]string{"": "vm-7", "web": "web", "12": "vm-12", "bücher": "bücher",
		"a/b": "vm-7", "b\xfccher": "vm-7", "b\uFFFDcher": "vm-7", long: "vm-7"} {
		if got, err := chooseName("", own, 7); err != nil || got != want {
			t.Errorf("%q: %q, %v; want %q", own, got, err, want)
		}
	}
	if got, err := chooseName("db", "web", 7); err != nil || got != "db" {
		t.Errorf("%q, %v", got, err)
	}
	for _, asked := range []string{"12", "a/b", "a\nb", "b\xfccher", long} {
		if got, err := chooseName(asked, "web", 7); !problem.Is(err, problem.Usage) {
			t.Errorf("%q: %q, %v", asked, got, err)
		}
	}
}

// TestWhatPoliciesAreToldOfFailures: the wire takes it, whatever bytes an error quotes and
// wherever it is cut.
func TestWhatPoliciesAreToldOfFailures(t *testing.T) {
	var r record
	for _, text := range []string{"open /srv/b\xfccher: gone", strings.Repeat("x", maxErrorText-1) + "ü"} {
		r.add(nil, errors.New(text), "cow")
	}
	for _, c := range r.history {
		if _, err := proto.Marshal(c); err != nil || c.Error == "" {
			t.Errorf("%q: %v", c.Error, err)
		}
	}
	if r.failures != 2 || !utf8.ValidString(r.lastError) {
		t.Errorf("%+v", r)
	}
}

// A decision means the same to the controller as to the policy that made it.
func TestWhatADecisionMeans(t *testing.T) {
	now := time.Unix(1000, 0)
	at := func(s int64) int64 { return time.Unix(s, 0).UnixNano() }
	slot := func(from int64) *policy.Decision {
		return &policy.Decision{When: &policypb.Decision_IdleSlot{IdleSlot: &policypb.IdleSlot{NotBeforeNs: at(from), DeadlineNs: at(1020)}}}
	}
	busy := &policy.Signals{Network: &policypb.Network{Idle: true}, Cpu: &policypb.CPU{}}
	idle := &policy.Signals{Network: &policypb.Network{Idle: true}, Cpu: &policypb.CPU{Idle: true}}
	sooner := slot(1010)
	sooner.AskAgainNs = at(1005)
	for _, c := range []struct {
		d    *policy.Decision
		s    *policy.Signals
		want controller.Decided
	}{
		{slot(1010), idle, controller.Decided{At: time.Unix(1020, 0), Again: time.Unix(1010, 0)}},
		{sooner, idle, controller.Decided{At: time.Unix(1020, 0), Again: time.Unix(1005, 0)}},
		{slot(1000), idle, controller.Decided{At: now}},
		{slot(900), busy, controller.Decided{At: time.Unix(1020, 0), Again: now.Add(idleLook)}},
		{slot(900), nil, controller.Decided{At: time.Unix(1020, 0), Again: now.Add(idleLook)}},
		{&policy.Decision{When: &policypb.Decision_Now{Now: true}}, idle, controller.Decided{At: now}},
		{&policy.Decision{When: &policypb.Decision_AtNs{AtNs: at(1010)}, AskAgainNs: at(1005)}, idle, controller.Decided{At: time.Unix(1010, 0), Again: time.Unix(1005, 0)}},
		{&policy.Decision{AskAgainNs: at(1030)}, idle, controller.Decided{Again: time.Unix(1030, 0)}},
		{nil, nil, controller.Decided{}},
	} {
		if got := eventOf(c.d, c.s, now); got != c.want {
			t.Errorf("%v: %v, want %v", c.d, got, c.want)
		}
	}
}

// TestClockIsSet: what was decided happens after the time that was meant, whatever becomes
// of the wall clock; a time without a monotonic reading would be compared with that.
func TestClockIsSet(t *testing.T) {
	now := time.Now()
	in := func(d time.Duration) int64 { return now.Add(d).UnixNano() }
	for _, d := range []*policy.Decision{
		{When: &policypb.Decision_AtNs{AtNs: in(time.Hour)}, AskAgainNs: in(time.Minute)},
		{When: &policypb.Decision_IdleSlot{IdleSlot: &policypb.IdleSlot{NotBeforeNs: in(time.Minute), DeadlineNs: in(time.Hour)}}, AskAgainNs: in(2 * time.Minute)},
	} {
		e := eventOf(d, nil, now)
		for what, at := range map[string]time.Time{"the checkpoint": e.At, "asking again": e.Again} {
			if at == at.Round(0) { // which takes the monotonic reading away
				t.Errorf("%v: %s waits for the wall clock: %v", d, what, at)
			}
		}
		if e.At.Sub(now) != time.Hour || e.Again.Sub(now) != time.Minute {
			t.Errorf("%v: %v and %v", d, e.At.Sub(now), e.Again.Sub(now))
		}
	}
}
