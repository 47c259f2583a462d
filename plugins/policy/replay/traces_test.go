package replay

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

const start = int64(1_800_000_000_000_000_000)

// scenario is a trace and what is assumed about it.
type scenario struct {
	name, what string
	mixed      bool // the guest changes
	model      Model
	trace      func(testing.TB) []*policy.Signals
}

// recordedDay is what the recorded guests are replayed with: a failure a day, so that
// traces of minutes, gone through again and again, have many checkpoints in them; the
// store's speed is that of the machine they were recorded on.
var recordedDay = Model{Fixed: DefaultModel.Fixed, PerPage: DefaultModel.PerPage, StoreBytesPerSecond: 300e6, FailuresPerSecond: 1 / 86400.0}

// recorded are traces of real guests, made by `ckagent policy record` (tools/signals,
// TestRecord).
var recorded = []scenario{
	fromFile("idle", "an idle Linux guest with a server that nobody asks", false),
	fromFile("server", "a Linux guest with a database that commits 30 rows a second for 45 s, and then none", true),
	fromFile("compute", "a guest that writes up to 10,000 pages/s at random in 256 MiB for 45 s, and then none", true),
}

func fromFile(name, what string, mixed bool) scenario {
	return scenario{name, what, mixed, recordedDay, func(t testing.TB) []*policy.Signals {
		t.Helper()
		f, err := os.Open(filepath.Join("testdata", name+".jsonl.gz"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		trace, err := Read(f)
		if err != nil {
			t.Fatal(err)
		}
		const hours = 2
		last := len(trace) - 1
		return Repeat(trace, 1+int(int64(hours*time.Hour)/(trace[last].GetNowNs()-trace[0].GetNowNs())))
	}}
}

// tuning are the traces that the constants of the policies were chosen by: made, not
// recorded, four hours of a line a minute.
var tuning = []scenario{
	{"made idle", "20 to 40 pages/s", false, DefaultModel, made("idle", func(rng *rand.Rand, _ int, s *policy.Signals) {
		s.Vm.UsedBytes = 1200 << 20
		s.Memory = &policypb.Memory{DirtyPagesPerSecond: 20 + 20*rng.Float64(), GPages: 4000, GTauNs: 130e9, CompressRatio: 0.4}
		s.Network = &policypb.Network{OutPacketsPerSecond: rng.Float64(), Idle: rng.IntN(10) > 0, IdleShare: 0.98}
		s.Cpu = &policypb.CPU{BusyShare: 0.01, Idle: rng.IntN(10) > 0}
	})},
	// By the hour: busy, quiet, busy, a rush.
	{"made server", "by the hour 3,000, 200, 2,500 and 12,000 pages/s", true, DefaultModel, made("server", func(rng *rand.Rand, i int, s *policy.Signals) {
		rate := []float64{3000, 200, 2500, 12000}[i/60] * (0.7 + 0.6*rng.Float64())
		s.Vm.UsedBytes = 2600 << 20
		s.Memory = &policypb.Memory{DirtyPagesPerSecond: rate, GPages: 25 * rate, GTauNs: 25e9, CompressRatio: 0.5}
		s.Network = &policypb.Network{OutPacketsPerSecond: rate / 5, Idle: rng.Float64() < 200/rate, IdleShare: min(1, 200/rate)}
		s.Cpu = &policypb.CPU{BusyShare: min(1, rate/12000), Idle: rng.Float64() < 200/rate}
		s.Disk = &policypb.Disk{WrittenBytesPerSecond: 400 * rate, WritesPerSecond: rate / 40}
	})},
	// Sweeps over its memory, with a quieter phase of twenty minutes in each hour.
	{"made compute", "40,000 pages/s in 2.7 GiB, a twentieth of that for 20 minutes of each hour", true, DefaultModel, made("compute", func(rng *rand.Rand, i int, s *policy.Signals) {
		rate := 40000 * (0.9 + 0.2*rng.Float64())
		if i%60 >= 40 {
			rate /= 20
		}
		s.Vm.UsedBytes = 3500 << 20
		s.Memory = &policypb.Memory{DirtyPagesPerSecond: rate, GPages: 700_000, GTauNs: 700_000 / rate * 1e9, CompressRatio: 0.8}
		s.Network = &policypb.Network{Idle: true, IdleShare: 1}
		s.Cpu = &policypb.CPU{BusyShare: 1}
	})},
}

func made(name string, line func(rng *rand.Rand, i int, s *policy.Signals)) func(testing.TB) []*policy.Signals {
	return func(testing.TB) []*policy.Signals {
		rng := rand.New(rand.NewPCG(7, uint64(len(name))))
		var trace []*policy.Signals
		for i := range 240 {
			s := blank(name, i)
			line(rng, i, s)
			trace = append(trace, s)
		}
		return trace
	}
}

func blank(name string, minute int) *policy.Signals {
	return &policy.Signals{NowNs: start + int64(minute)*int64(time.Minute),
		Vm:   &policypb.VM{Name: name, RamBytes: 8 << 30, Vcpus: 2, Accel: "kvm"},
		Host: &policypb.Host{StoreBytesPerSecond: 300e6, FailuresPerSecond: 1 / (7 * 86400.0)},
		Capabilities: &policypb.Capabilities{Modes: []string{"stop", "buffer", "cow"}, Engines: []string{"uffd"},
			Compressions: []string{"none"}, IdleSlots: true, Throttle: true, MinIntervalNs: int64(time.Second), Keep: 4}}
}

// heldBack are the traces that the constants were not chosen by: twelve guests of eight
// hours, drawn at random. Half of them change, by phases of 5 to 90 minutes.
var heldBack = drawn(12)

func drawn(n int) (out []scenario) {
	for i := range n {
		rng := rand.New(rand.NewPCG(2026, uint64(i)))
		// From a to b, every ratio as likely as any other.
		between := func(a, b float64) float64 { return a * math.Pow(b/a, rng.Float64()) }
		mixed := i%2 == 1
		used := between(256<<20, 6<<30)
		store, mtbf := between(100e6, 800e6), between(86400, 30*86400)
		incremental := rng.IntN(4) == 0
		type phase struct {
			minutes           int
			rate, reuse, busy float64
		}
		var phases []phase
		for left := 480; left > 0; {
			p := phase{480, between(5, 60000), between(4, 400), rng.Float64()}
			if mixed {
				p.minutes = int(between(5, 90))
			}
			left -= p.minutes
			phases = append(phases, p)
		}
		noise := rng.Uint64()
		m := Model{Fixed: time.Duration(between(2e6, 40e6)), PerPage: time.Duration(between(3e3, 25e3)), FailuresPerSecond: 1 / mtbf}
		change := "steady"
		if mixed {
			change = fmt.Sprintf("%d phases", len(phases))
		}
		what := fmt.Sprintf("%.1f GiB, %s, a failure every %.1f days", used/(1<<30), change, mtbf/86400)
		if incremental {
			what += ", incremental"
		}
		out = append(out, scenario{fmt.Sprintf("drawn %d", i+1), what, mixed, m, func(testing.TB) []*policy.Signals {
			rng := rand.New(rand.NewPCG(noise, 1))
			var trace []*policy.Signals
			for _, p := range phases {
				for range p.minutes {
					if len(trace) == 480 {
						break
					}
					s := blank("drawn", len(trace))
					rate := p.rate * math.Exp(0.15*rng.NormFloat64())
					pages := min(rate*p.reuse, used/4096)
					s.Vm.UsedBytes = uint64(used)
					s.Host.StoreBytesPerSecond, s.Host.FailuresPerSecond = store, 1/mtbf
					s.Capabilities.Incremental = incremental
					s.Memory = &policypb.Memory{DirtyPagesPerSecond: rate, GPages: pages, GTauNs: pages / rate * 1e9, CompressRatio: 1}
					s.Cpu = &policypb.CPU{BusyShare: p.busy, Idle: rng.Float64() > p.busy}
					s.Network = &policypb.Network{OutPacketsPerSecond: rate / 10, IdleShare: 1 - p.busy, Idle: rng.Float64() > p.busy}
					trace = append(trace, s)
				}
			}
			return trace
		}})
	}
	return out
}
