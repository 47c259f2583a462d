package plugins

import (
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
	"github.com/ckagent/ckagent/plugins/policy/shipped"
)

// full are signals of a VM with a whole history.
func full() *policy.Signals {
	s := now()
	for i := range 64 {
		at := s.GetNowNs() - int64(64-i)*int64(time.Minute)
		s.History = append(s.History, &policypb.Checkpoint{Id: fmt.Sprint(i), AtNs: at, Ok: true, Mode: "cow", Engine: "uffd", PauseNs: 2e6, TotalNs: 1e9, StoredBytes: 1 << 28, CapturedPages: 4000})
		s.LastSuccessNs = at
	}
	return s
}

// percentiles reports p50 and p99 of what was measured.
func percentiles(b *testing.B, took []time.Duration) {
	b.Helper()
	slices.Sort(took)
	b.ReportMetric(float64(took[len(took)/2].Microseconds()), "p50-us")
	b.ReportMetric(float64(took[len(took)*99/100].Microseconds()), "p99-us")
}

// BenchmarkInProcess is a decision without a boundary: what the others are held against.
func BenchmarkInProcess(b *testing.B) {
	p, err := shipped.NewFixed(map[string]string{"interval": "5m"})
	if err != nil {
		b.Fatal(err)
	}
	s := full()
	took := make([]time.Duration, 0, b.N)
	for b.Loop() {
		began := time.Now()
		if _, err := p.Decide(s); err != nil {
			b.Fatal(err)
		}
		took = append(took, time.Since(began))
	}
	percentiles(b, took)
}

// BenchmarkDecide is a decision of a program, of VMs that decide one after another and
// of VMs that all decide at once.
func BenchmarkDecide(b *testing.B) {
	for _, vms := range []int{1, 100} {
		b.Run(fmt.Sprintf("VMs=%d", vms), func(b *testing.B) {
			r := registry(b, "steady")
			slots := make([]*Slot, vms)
			for i := range slots {
				var err error
				if slots[i], err = NewSlot(SlotConfig{Registry: r, Host: &Host{StartTimeout: time.Minute, TempDir: shortDir(b)}}); err != nil {
					b.Fatal(err)
				}
				b.Cleanup(slots[i].Close)
				if _, err := slots[i].Set(b.Context(), "steady", nil, now()); err != nil {
					b.Fatal(err)
				}
			}
			for _, at := range []string{"in-turn", "at-once"} {
				b.Run(at, func(b *testing.B) {
					var mu sync.Mutex
					var took []time.Duration
					one := func(s *Slot) {
						v := s.Decide(b.Context(), full())
						if v.Source != FromProgram {
							b.Errorf("%+v", v)
						}
						mu.Lock()
						took = append(took, v.Took)
						mu.Unlock()
					}
					for b.Loop() { // one decision of every VM
						if at == "in-turn" {
							for _, s := range slots {
								one(s)
							}
							continue
						}
						var wg sync.WaitGroup
						for _, s := range slots {
							wg.Go(func() { one(s) })
						}
						wg.Wait()
					}
					percentiles(b, took)
				})
			}
		})
	}
}
