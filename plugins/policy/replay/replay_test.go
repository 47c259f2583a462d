package replay

import (
	"bytes"
	"context"
	"errors"
	"math"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

// TestArithmetic is a replay that can be followed by hand: 100 s, checkpoints every
// 10 s that take 1 s each.
func TestArithmetic(t *testing.T) {
	var trace []*policy.Signals
	for i := range 2 {
		trace = append(trace, &policy.Signals{NowNs: start + int64(i)*50e9, Vm: &policypb.VM{UsedBytes: 1e9},
			Host: &policypb.Host{StoreBytesPerSecond: 1e9, FailuresPerSecond: 1e-4}})
	}
	p, err := shipped.NewFixed(map[string]string{"interval": "10s"})
	if err != nil {
		t.Fatal(err)
	}
	res, err := Run(t.Context(), trace, InProcess{p}, Model{Fixed: 100 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	if len(res.Checkpoints) != 10 || res.Bytes != 10e9 || res.DurationNS != 100e9 {
		t.Errorf("%d checkpoints, %d bytes, %d ns", len(res.Checkpoints), res.Bytes, res.DurationNS)
	}
	// Ages run from 0 to 1 s, nine times from 1 to 11 s, and from 1 to 10 s.
	age := 0.5 + 9*(121-1)/2.0 + (100-1)/2.0
	for what, c := range map[string][2]float64{"overhead": {res.Overhead, 0.01}, "exposure": {res.Exposure, 1e-4 * age / 100},
		"mean loss": {float64(res.MeanLossNS) / 1e9, age / 100}, "worst loss": {float64(res.MaxLossNS) / 1e9, 11}} {
		if math.Abs(c[0]-c[1]) > 1e-6 {
			t.Errorf("%s %v, want %v", what, c[0], c[1])
		}
	}
}

// eager wants a checkpoint now, always, or nothing but to be asked again.
type eager struct{ ask bool }

func (eager) Describe() *policy.Description { return &policy.Description{Name: "eager"} }
func (e eager) Decide(s *policy.Signals) (*policy.Decision, error) {
	if e.ask {
		return &policy.Decision{AskAgainNs: s.GetNowNs(), Reason: "later"}, nil
	}
	return policy.Now("why not"), nil
}

func TestItEnds(t *testing.T) {
	trace := tuning[0].trace(t)
	res, err := Run(t.Context(), trace, InProcess{eager{}}, DefaultModel)
	if err != nil || len(res.Checkpoints) < 1000 {
		t.Errorf("%v", err)
	}
	if _, err := Run(t.Context(), trace, InProcess{eager{ask: true}}, DefaultModel); !errors.Is(err, ErrEndless) {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Run(ctx, trace, InProcess{eager{}}, DefaultModel); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func FuzzRead(f *testing.F) {
	f.Add([]byte("{\"nowNs\":\"1\"}\n{\"nowNs\":\"2\"}\n"))
	f.Add([]byte("{\"nowNs\":\"2\"}\n{\"nowNs\":\"1\"}\n"))
	f.Add([]byte(strings.Repeat("{", 100)))
	f.Fuzz(func(t *testing.T, b []byte) {
		trace, err := Read(bytes.NewReader(b))
		if err == nil && len(trace) < 2 || err != nil && !errors.Is(err, ErrTrace) {
			t.Errorf("%d lines, %v", len(trace), err)
		}
	})
}

// TestRepeat: what is repeated costs what it did, but for the first checkpoint's being
// one among more.
func TestRepeat(t *testing.T) {
	trace := tuning[1].trace(t)
	p, err := shipped.NewFixed(map[string]string{"interval": "5m"})
	if err != nil {
		t.Fatal(err)
	}
	once, err := Run(t.Context(), trace, InProcess{p}, DefaultModel)
	if err != nil {
		t.Fatal(err)
	}
	thrice, err := Run(t.Context(), Repeat(trace, 3), InProcess{p}, DefaultModel)
	if err != nil {
		t.Fatal(err)
	}
	if thrice.DurationNS != 3*once.DurationNS || math.Abs(thrice.Cost/once.Cost-1) > 0.02 {
		t.Errorf("%v of %v, once %v of %v", thrice.Cost, thrice.DurationNS, once.Cost, once.DurationNS)
	}
}

// TestWitnessed is a replay of a trace that tells of checkpoints, whatever the model says:
// 100 s, a checkpoint 10 s after the one before, of which each is half a second old when
// its instant comes and whole 2 s later.
func TestWitnessed(t *testing.T) {
	seen := []*policy.Checkpoint{{AtNs: start - 5e9, Ok: true, PauseNs: 30e6, TotalNs: 2e9, StoredBytes: 5e6, LeadNs: 500e6, CommitNs: 2e9, WorkLostShare: 0.01},
		{AtNs: start - 1e9, Error: "busy"}}
	var trace []*policy.Signals
	for i := range 2 {
		trace = append(trace, &policy.Signals{NowNs: start + int64(i)*50e9, Vm: &policypb.VM{UsedBytes: 1e9}, History: seen,
			Host: &policypb.Host{StoreBytesPerSecond: 1, FailuresPerSecond: 1e-4}})
	}
	p, err := shipped.NewFixed(map[string]string{"interval": "10s"})
	if err != nil {
		t.Fatal(err)
	}
	told := &listener{Policy: p}
	res, err := Run(t.Context(), trace, InProcess{told}, Model{Fixed: time.Second, PerPage: time.Second, StoreBytesPerSecond: 1})
	if err != nil {
		t.Fatal(err)
	}
	// At 0.5, 11, 21.5, ... 95.
	n := len(res.Checkpoints)
	if n != 10 || res.Bytes != 50e6 || res.Checkpoints[n-1].AtNS != start+95e9 || res.Checkpoints[0].LostNS != 50e6 {
		t.Errorf("%d checkpoints, %d bytes, %+v", n, res.Bytes, res.Checkpoints)
	}
	// Ages run from 0 to 2.5 s, nine times from 2 to 12.5 s, and from 2 to 5 s.
	age := 2.5*2.5/2 + 9*(12.5*12.5-4)/2 + (25-4)/2.0
	if mean := float64(res.MeanLossNS) / 1e9; math.Abs(mean-age/100) > 1e-6 || res.MaxLossNS != 12.5e9 || math.Abs(res.Overhead-0.005) > 1e-9 {
		t.Errorf("mean loss %v, want %v; worst %v; overhead %v", mean, age/100, res.MaxLossNS, res.Overhead)
	}
	last := told.last.GetHistory()
	if len(last) == 0 || last[0].GetTotalNs() != 2e9 || last[0].GetLeadNs() != 500e6 || told.last.GetHost().GetStoreBytesPerSecond() != 2.5e6 {
		t.Errorf("the policy was told %v", told.last)
	}
	if seen[0].GetAtNs() != start-5e9 || trace[0].GetHost().GetStoreBytesPerSecond() != 1 {
		t.Error("the trace was changed")
	}
}

// TestBeginningOfAProtection: what the first checkpoints took, which are not like the
// others, is not what they take again and again, and a trace that begins without any is not
// replayed by figures that are nobody's.
func TestBeginningOfAProtection(t *testing.T) {
	var trace []*policy.Signals
	var history []*policy.Checkpoint
	for i := range 20 {
		trace = append(trace, &policy.Signals{NowNs: start + int64(i)*1e9, History: history[:len(history):len(history)]})
		c := &policy.Checkpoint{AtNs: start + int64(i)*1e9, Ok: true, PauseNs: 10e6, TotalNs: 1e8, StoredBytes: 1e6}
		if i < settled-1 {
			c.PauseNs = 500e6
		}
		history = append(history, c)
	}
	p, err := shipped.NewFixed(map[string]string{"interval": "1s"})
	if err != nil {
		t.Fatal(err)
	}
	res, err := Run(t.Context(), Repeat(trace, 50), InProcess{p}, Model{Fixed: 10 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	dear := 0
	for _, c := range res.Checkpoints {
		if c.LostNS != 10e6 {
			dear++
		}
	}
	if n := len(res.Checkpoints); n < 700 || dear == 0 || dear > 2*settled {
		t.Errorf("%d of %d checkpoints are like the first ones", dear, n)
	}
	if res.DurationNS != (20+49*17)*int64(time.Second) {
		t.Errorf("it takes %v", time.Duration(res.DurationNS))
	}
}

// listener keeps what its policy was told last.
type listener struct {
	policy.Policy
	last *policy.Signals
}

func (l *listener) Decide(s *policy.Signals) (*policy.Decision, error) {
	l.last = s
	return l.Policy.Decide(s)
}
