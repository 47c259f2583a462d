package shipped

import (
	"math"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

const start = int64(1_800_000_000 * second)

// server is a web server of a middling host: 2 GiB in use, 2,000 pages/s.
func server() *policy.Signals {
	s := &policy.Signals{
		Vm:      &policypb.VM{Name: "web", RamBytes: 4 << 30, UsedBytes: 2 << 30, Vcpus: 2, Accel: "kvm"},
		NowNs:   start,
		Memory:  &policypb.Memory{DirtyPagesPerSecond: 2000, GPages: 100_000, GTauNs: 50 * second, CompressRatio: 0.5},
		Network: &policypb.Network{OutPacketsPerSecond: 400, IdleShare: 0.4},
		Disk:    &policypb.Disk{WrittenBytesPerSecond: 1e6},
		Host:    &policypb.Host{StoreBytesPerSecond: 500e6, FailuresPerSecond: 1 / (30 * 86400.0)},
		Capabilities: &policypb.Capabilities{Modes: []string{"stop", "buffer", "cow"}, Engines: []string{"uffd"},
			Compressions: []string{"none", "s2"}, IdleSlots: true, MinIntervalNs: int64(second), Keep: 4},
	}
	for i := range 8 {
		s.History = append(s.History, &policy.Checkpoint{AtNs: start - int64(8-i)*int64(300*second), Ok: true, Mode: "cow",
			PauseNs: 3e6, TotalNs: 4e9, WorkLostShare: 0.02, CapturedPages: uint64(1000 * (i + 1))})
	}
	s.LastSuccessNs = s.History[7].AtNs
	return s
}

func decide(t *testing.T, name string, s *policy.Signals, params map[string]string) *policy.Decision {
	t.Helper()
	p, err := All[name](params)
	if err != nil {
		t.Fatal(err)
	}
	d, err := p.Decide(s)
	if err != nil {
		t.Fatal(name, err)
	}
	return d
}

// TestEverySignalGetsAValidDecision: whatever is known or not, likely or absurd, the
// answer is one a host can act on, and the same twice.
func TestEverySignalGetsAValidDecision(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for name, create := range All {
		p, err := create(nil)
		if err != nil {
			t.Fatal(name, err)
		}
		if d := p.Describe(); d.GetName() != name || d.GetFormula() == "" || d.GetSource() == "" {
			t.Errorf("%s describes itself as %v", name, d)
		}
		for i := range 500 {
			s := server()
			mutate(rng, s)
			before := proto.Clone(s)
			d, err := p.Decide(s)
			if err != nil {
				t.Fatalf("%s, case %d: %v", name, i, err)
			}
			if err := policy.Check(s, d); err != nil {
				t.Fatalf("%s, case %d: %v\n%v\nof %v", name, i, err, d, s)
			}
			if again, _ := p.Decide(s); !proto.Equal(d, again) {
				t.Fatalf("%s decides differently on the same signals: %v, %v", name, d, again)
			}
			if !proto.Equal(before, s) {
				t.Fatalf("%s changes its signals", name)
			}
		}
	}
}

// mutate leaves out and exaggerates.
func mutate(rng *rand.Rand, s *policy.Signals) {
	wild := func() float64 { return []float64{0, 1e-9, 1, 1e6, 1e15, math.Inf(1), -1}[rng.IntN(7)] }
	for range rng.IntN(4) {
		switch rng.IntN(12) {
		case 0:
			s.Memory = nil
		case 1:
			s.Host = nil
		case 2:
			s.History = nil
		case 3:
			s.LastSuccessNs = 0
		case 4:
			s.Memory = &policypb.Memory{DirtyPagesPerSecond: wild(), GPages: wild(), GTauNs: wild(), CompressRatio: wild()}
		case 5:
			s.Host = &policypb.Host{StoreBytesPerSecond: wild(), FailuresPerSecond: wild()}
		case 6:
			s.Capabilities.IdleSlots = false
		case 7:
			for _, c := range s.History[:len(s.History)/2] {
				c.Ok = false
			}
		case 8:
			for _, c := range s.History {
				c.Ok = false
			}
		case 9:
			s.Network = &policypb.Network{BufferedBytes: 1, OldestBufferedNs: s.NowNs - rng.Int64N(1e9)}
		case 10:
			s.Disk = &policypb.Disk{WrittenBytesPerSecond: wild(), WrittenSinceCheckpointBytes: rng.Uint64()}
		case 11:
			s.Capabilities.MinIntervalNs = rng.Int64N(int64(time.Hour))
		}
	}
}

func TestYoungDaly(t *testing.T) {
	for mtbf, want := range map[string]float64{"24h": 116.7, "6h": 56.7, "15m": 9.14} {
		s := server()
		s.Host.FailuresPerSecond = 0
		d := decide(t, "young-daly", s, map[string]string{"cost": "5m", "mtbf": mtbf})
		if got := time.Duration(d.GetIntervalNs()).Minutes(); math.Abs(got-want) > 0.06 {
			t.Errorf("mean time between failures %s: %v min, want %v", mtbf, got, want)
		}
	}
}

func TestFixed(t *testing.T) {
	s := server()
	d := decide(t, "fixed", s, map[string]string{"interval": "10m"})
	if want := s.LastSuccessNs + int64(600*second); d.GetAtNs() != want {
		t.Errorf("%v, want at %d", d, want)
	}
	s.NowNs = s.LastSuccessNs + int64(601*second)
	if d := decide(t, "fixed", s, map[string]string{"interval": "10m"}); !d.GetNow() {
		t.Errorf("overdue: %v", d)
	}
	s.LastSuccessNs = 0
	if d := decide(t, "fixed", s, nil); !d.GetNow() || !strings.Contains(d.GetReason(), "first") {
		t.Errorf("the first: %v", d)
	}
}

// TestRetries: failures in a row put the next attempt off, up to a limit, and make
// auto try another mode.
func TestRetries(t *testing.T) {
	s := server()
	s.LastSuccessNs -= int64(3600 * second)
	last := 0.0
	for n := 1; n <= 8; n++ {
		s.History = append(s.History, &policy.Checkpoint{AtNs: s.NowNs, Mode: "cow", Error: "store full"})
		d := decide(t, "fixed", s, nil)
		wait := seconds(d.GetAtNs() - s.NowNs)
		if d.GetNow() || wait < last || wait > 320 {
			t.Errorf("after %d failures: %v", n, d)
		}
		last = wait
		want := "cow"
		if n >= giveUpAfter {
			want = "buffer"
		}
		if got := decide(t, "auto", s, nil).GetMode(); got != want {
			t.Errorf("after %d failures of cow: mode %s", n, got)
		}
	}
}

func TestWhatMovesThem(t *testing.T) {
	interval := func(name string, params map[string]string, change func(*policy.Signals)) float64 {
		s := server()
		if change != nil {
			change(s)
		}
		return seconds(decide(t, name, s, params).GetIntervalNs())
	}
	more := func(what string, a, b float64) {
		t.Helper()
		if a <= b {
			t.Errorf("%s: %v s, not more than %v s", what, a, b)
		}
	}
	more("bandwidth: a slow store", interval("bandwidth", nil, func(s *policy.Signals) {
		for _, c := range s.History {
			c.TotalNs *= 10
		}
	}), interval("bandwidth", nil, nil))
	more("bandwidth: a slow store, before the first", interval("bandwidth", nil, func(s *policy.Signals) { s.History, s.Host.StoreBytesPerSecond = nil, 50e6 }),
		interval("bandwidth", nil, func(s *policy.Signals) { s.History = nil }))
	more("dirty-watermark: an idle guest", interval("dirty-watermark", nil, func(s *policy.Signals) {
		s.Memory.GTauNs *= 4
		s.Memory.DirtyPagesPerSecond /= 4
	}), interval("dirty-watermark", nil, nil))
	more("output-trigger: silence", interval("output-trigger", nil, func(s *policy.Signals) { s.Network.OutPacketsPerSecond = 0 }), interval("output-trigger", nil, nil))
	more("gerofi: fewer disk writes", interval("gerofi", nil, func(s *policy.Signals) { s.Disk.WrittenBytesPerSecond = 1e4; s.Memory = nil }), interval("gerofi", nil, func(s *policy.Signals) { s.Memory = nil }))
	more("cost-min: rare failures", interval("cost-min", nil, func(s *policy.Signals) { s.Host.FailuresPerSecond /= 100 }), interval("cost-min", nil, nil))
	more("overhead-cap: a costly checkpoint", interval("overhead-cap", nil, func(s *policy.Signals) {
		s.History[7].WorkLostShare, s.History[7].TotalNs = 0.5, 60e9
	}), interval("overhead-cap", nil, nil))
	if d := decide(t, "idle-slot", server(), nil); d.GetIdleSlot() != nil {
		t.Errorf("idle-slot is overdue by the history: %v", d)
	}
	s := server()
	s.NowNs = s.LastSuccessNs + int64(10*second)
	d := decide(t, "idle-slot", s, nil)
	if slot := d.GetIdleSlot(); slot.GetNotBeforeNs() != s.LastSuccessNs+int64(60*second) || slot.GetDeadlineNs() != s.LastSuccessNs+int64(300*second) {
		t.Errorf("idle-slot: %v", d)
	}
	s.Network.BufferedBytes, s.Network.OldestBufferedNs = 100, s.NowNs-int64(second)
	if d := decide(t, "gerofi", s, nil); !d.GetNow() {
		t.Errorf("gerofi holds output for a second: %v", d)
	}
}

func TestParams(t *testing.T) {
	for name, given := range map[string]map[string]string{
		"fixed": {"interval": "-1s"}, "auto": {"overhead": "2"}, "bandwidth": {"what": "1"},
		"cost-min": {"weight": "NaN"}, "idle-slot": {"shortest": "10m", "longest": "1m"}, "young-daly": {"cost": "cheap"},
	} {
		if _, err := All[name](given); err == nil {
			t.Errorf("%s takes %v", name, given)
		}
	}
}

// TestNow: auto goes by what a checkpoint costs now. All of the last ones were taken of a
// busy guest and were dear; it has fallen quiet, which its rate says and its curve of the
// last minutes does not say yet.
func TestNow(t *testing.T) {
	s := server()
	for _, c := range s.History {
		c.CapturedPages, c.WorkLostShare = 100_000, 0.25
	}
	busy := decide(t, "auto", s, nil)
	s.Memory.DirtyPagesPerSecond = 20
	quiet := decide(t, "auto", s, nil)
	if a, b := seconds(busy.GetIntervalNs()), seconds(quiet.GetIntervalNs()); a < 2.5*b {
		t.Errorf("busy every %v s, quiet every %v s: %s; %s", a, b, busy.GetReason(), quiet.GetReason())
	}
	if a, b := curve(s).Dirty(1), 20.0; math.Abs(a-b) > 0.05*b {
		t.Errorf("%v pages in a second, at 20 pages/s", a)
	}
	// What cannot tell them apart is not asked: within its error the curve holds.
	s.Memory.DirtyPagesPerSecond, s.Memory.ErrorPagesPerSecond = 1000, 600
	if got, want := curve(s).Tau, 50.0; got != want {
		t.Errorf("tau %v, want %v", got, want)
	}
}

// TestDuration: how long a checkpoint takes follows what it stores as far as those that were
// taken did, and what is in use or was written where none was.
func TestDuration(t *testing.T) {
	const mib = 1 << 20
	taken := func(stored, ms int64) *policy.Checkpoint {
		return &policy.Checkpoint{Ok: true, StoredBytes: uint64(stored) * mib, TotalNs: ms * 1e6}
	}
	for what, c := range map[string]struct {
		incremental bool
		history     []*policy.Checkpoint
		at50        float64 // seconds, after an interval in which 100 MiB are written that take 50 in the store
		ever        float64
	}{
		"full ones":                {false, []*policy.Checkpoint{taken(2000, 4000), taken(2000, 4100), taken(2000, 3900)}, 4, 4},
		"full ones, none yet":      {false, nil, 4, 4},
		"none yet":                 {true, nil, 0.1, 0.3815},
		"all much the same":        {true, []*policy.Checkpoint{taken(20, 700), taken(25, 500), taken(22, 600)}, 0.6, 0.6},
		"what is stored tells":     {true, []*policy.Checkpoint{taken(2000, 4300), taken(20, 340), taken(10, 320)}, 0.4, 0.6815},
		"all memory is read":       {true, []*policy.Checkpoint{taken(2000, 1000), taken(20, 1000), taken(10, 1000)}, 1, 1},
		"it seems to take nothing": {true, []*policy.Checkpoint{taken(1000, 100), taken(20, 1000)}, 0.55, 0.55},
	} {
		s := server()
		s.Capabilities.Incremental, s.History = c.incremental, c.history
		s.Vm.UsedBytes, s.Host.StoreBytesPerSecond = 2000*mib, 500*mib
		s.Memory = &policypb.Memory{GPages: 97_664, GTauNs: 50 * second, CompressRatio: 0.5} // 381.5 MiB
		took, known := duration(s)
		after := curve(s).Until(100 * mib / pageBytes)
		for interval, want := range map[float64]float64{after: c.at50, math.Inf(1): c.ever} {
			if got := took(interval); !known || math.Abs(got-want) > 0.002*want {
				t.Errorf("%s: %v s after %v, want %v", what, got, interval, want)
			}
		}
	}
	s := server()
	s.History, s.Host = nil, nil
	if took, known := duration(s); known || took(10) != 0 {
		t.Error("nothing is known")
	}
}

// TestStoreThatKeepsUp: auto's store is taken to keep up with checkpoints as long as they
// take, however little of what is in use each of them stores.
func TestStoreThatKeepsUp(t *testing.T) {
	params := map[string]string{"shortest": "100ms", "overhead": "1", "mtbf": "1s"}
	for _, stored := range []uint64{2 << 30, 20 << 20} {
		s := server()
		s.Capabilities.MinIntervalNs, s.Capabilities.IdleSlots, s.Host.FailuresPerSecond = 1, false, 1
		for _, c := range s.History {
			c.StoredBytes = stored
		}
		s.Host.StoreBytesPerSecond = policy.StoreSpeed(s.History)
		if d := decide(t, "auto", s, params); d.GetIntervalNs() != 8e9 || !strings.Contains(d.GetReason(), "store keeps up") {
			t.Errorf("%d bytes in 4 s each: %s", stored, d.GetReason())
		}
	}
}
