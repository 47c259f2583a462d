package replay

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

var update = flag.Bool("update", false, "write the traces in testdata again")

const start = int64(1_800_000_000_000_000_000)

// The traces are made, not recorded: four hours of a line a minute.
var generated = map[string]func(*rand.Rand, int, *policy.Signals){
	"idle": func(rng *rand.Rand, _ int, s *policy.Signals) {
		s.Vm.UsedBytes = 1200 << 20
		s.Memory = &policypb.Memory{DirtyPagesPerSecond: 20 + 20*rng.Float64(), GPages: 4000, GTauNs: 130e9, CompressRatio: 0.4}
		s.Network = &policypb.Network{OutPacketsPerSecond: rng.Float64(), Idle: rng.IntN(10) > 0, IdleShare: 0.98}
		s.Cpu = &policypb.CPU{BusyShare: 0.01, Idle: rng.IntN(10) > 0}
	},
	// By the hour: busy, quiet, busy, a rush.
	"server": func(rng *rand.Rand, i int, s *policy.Signals) {
		rate := []float64{3000, 200, 2500, 12000}[i/60] * (0.7 + 0.6*rng.Float64())
		s.Vm.UsedBytes = 2600 << 20
		s.Memory = &policypb.Memory{DirtyPagesPerSecond: rate, GPages: 25 * rate, GTauNs: 25e9, CompressRatio: 0.5}
		s.Network = &policypb.Network{OutPacketsPerSecond: rate / 5, Idle: rng.Float64() < 200/rate, IdleShare: min(1, 200/rate)}
		s.Cpu = &policypb.CPU{BusyShare: min(1, rate/12000), Idle: rng.Float64() < 200/rate}
		s.Disk = &policypb.Disk{WrittenBytesPerSecond: 400 * rate, WritesPerSecond: rate / 40}
	},
	// Sweeps over its memory, with a quieter phase of twenty minutes in each hour.
	"compute": func(rng *rand.Rand, i int, s *policy.Signals) {
		rate := 40000 * (0.9 + 0.2*rng.Float64())
		if i%60 >= 40 {
			rate /= 20
		}
		s.Vm.UsedBytes = 3500 << 20
		s.Memory = &policypb.Memory{DirtyPagesPerSecond: rate, GPages: 700_000, GTauNs: 700_000 / rate * 1e9, CompressRatio: 0.8}
		s.Network = &policypb.Network{Idle: true, IdleShare: 1}
		s.Cpu = &policypb.CPU{BusyShare: 1}
	},
}

func generate(name string) []*policy.Signals {
	rng := rand.New(rand.NewPCG(7, uint64(len(name))))
	var trace []*policy.Signals
	for i := range 240 {
		s := &policy.Signals{NowNs: start + int64(i)*int64(time.Minute),
			Vm:   &policypb.VM{Name: name, RamBytes: 4 << 30, Vcpus: 2, Accel: "kvm"},
			Host: &policypb.Host{StoreBytesPerSecond: 300e6, FailuresPerSecond: 1 / (7 * 86400.0)},
			Capabilities: &policypb.Capabilities{Modes: []string{"stop", "buffer", "cow"}, Engines: []string{"uffd"},
				Compressions: []string{"none"}, IdleSlots: true, Throttle: true, MinIntervalNs: int64(time.Second), Keep: 4}}
		generated[name](rng, i, s)
		trace = append(trace, s)
	}
	return trace
}

func traceFile(t testing.TB, name string) []*policy.Signals {
	t.Helper()
	path := filepath.Join("testdata", name+".jsonl")
	if *update {
		var b bytes.Buffer
		for _, s := range generate(name) {
			line, err := protojson.Marshal(s)
			if err != nil {
				t.Fatal(err)
			}
			b.Write(append(bytes.ReplaceAll(line, []byte(", "), []byte(",")), '\n'))
		}
		if err := os.WriteFile(path, b.Bytes(), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	trace, err := Read(f)
	if err != nil {
		t.Fatal(err)
	}
	return trace
}

// beginnings of each trace, in lines: where in its phases a replay begins decides where
// a handful of checkpoints fall, so costs are averaged over several.
var beginnings = []int{0, 7, 13, 22, 31, 37, 44, 53}

// averaged is the mean cost of what a policy does from each beginning on.
func averaged(t *testing.T, trace []*policy.Signals, create policy.New, params map[string]string) (cost float64, checkpoints int) {
	t.Helper()
	for _, from := range beginnings {
		p, err := create(params)
		if err != nil {
			t.Fatal(err)
		}
		res, err := Run(t.Context(), trace[from:len(trace)-60+from], InProcess{p}, DefaultModel)
		if err != nil {
			t.Fatal(err)
		}
		cost += res.Cost / float64(len(beginnings))
		checkpoints += len(res.Checkpoints)
	}
	return cost, checkpoints / len(beginnings)
}

// TestTraces: every shipped policy can be replayed on every trace, and auto costs at
// most a tenth more than the best fixed interval within the same bounds, which is known
// in hindsight only.
//
// What that shows is limited. The traces are generated; the cost of a checkpoint is a
// model; and costs are means over eight beginnings. From one beginning, auto costs 1.15
// times the best fixed interval on the trace of a computation (1.32 times without the
// bounds): with about ten checkpoints in the trace, where they fall decides.
func TestTraces(t *testing.T) {
	for _, name := range slices.Sorted(maps.Keys(generated)) {
		trace := traceFile(t, name)
		best, interval := math.Inf(1), time.Duration(0)
		for at := 10 * time.Second; ; at = at * 23 / 20 { // bounds as auto's by default
			at = min(at, 15*time.Minute)
			if cost, _ := averaged(t, trace, shipped.NewFixed, map[string]string{"interval": at.String()}); cost < best {
				best, interval = cost, at
			}
			if at == 15*time.Minute {
				break
			}
		}
		t.Logf("%-8s best fixed interval %8s: %.5f %%", name, interval.Round(time.Second), 100*best)
		for _, p := range slices.Sorted(maps.Keys(shipped.All)) {
			cost, n := averaged(t, trace, shipped.All[p], nil)
			t.Logf("%-8s %-16s %5d checkpoints, %.5f %%, %.2f of the best fixed", name, p, n, 100*cost, cost/best)
			if p == shipped.Default && cost > 1.1*best {
				t.Errorf("%s costs %.4g %%, the best fixed interval (%v) %.4g %%", p, 100*cost, interval, 100*best)
			}
		}
	}
}

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
	trace := generate("idle")
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
