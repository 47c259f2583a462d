package e2e

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestBalloon: a guest that gives memory back and takes it again, by its balloon and
// by free page reporting, while checkpoints are taken. What is discarded between the
// freeze and its copy makes an attempt worthless; it is noticed and taken again, and
// no checkpoint is wrong.
func TestBalloon(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "boots a guest")
	}
	for _, backend := range []struct {
		name, reports string
		kind          vmtest.Backend
	}{{"anonymous", "on", vmtest.Anonymous}, {"memfd", "off", vmtest.Memfd}} {
		t.Run(backend.name, func(t *testing.T) {
			x := newTool(t)
			cfg := vmtest.Config{MemoryMiB: 256, WSMiB: 24, SweepMS: 500, Rate: 2000, Control: true, Backend: backend.kind,
				Args: []string{"-device", "virtio-balloon-pci,free-page-reporting=" + backend.reports + ",deflate-on-oom=on"}}
			v := vmtest.Start(t, cfg)
			m := monitor(t, v.ControlPath())
			stop := make(chan struct{})
			var pump sync.WaitGroup
			inflated := false
			pump.Go(func() {
				tick := time.NewTicker(150 * time.Millisecond)
				defer tick.Stop()
				for i := 0; ; i++ {
					size := 256 << 20
					if i%2 == 0 {
						size = 128 << 20
					}
					if err := m.Execute(t.Context(), "balloon", map[string]int{"value": size}, nil); err != nil {
						t.Error(err)
						return
					}
					select {
					case <-stop:
						return
					case <-tick.C:
					}
					var info struct{ Actual uint64 }
					if err := m.Execute(t.Context(), "query-balloon", nil, &info); err != nil {
						t.Error(err)
						return
					}
					inflated = inflated || info.Actual < 256<<20
				}
			})
			var last checkpoint
			retaken := 0
			for n := 0; n < 2 || retaken == 0 && n < 10; n++ {
				c := x.checkpoint(t, v.PID(), "--qmp", v.QMPPath(), "--mode", "cow")
				for _, why := range c.Retaken {
					if !strings.Contains(why, "discarded") && !strings.Contains(why, "balloon") {
						t.Errorf("retaken: %s", why)
					}
				}
				retaken += len(c.Retaken)
				last = c
			}
			close(stop)
			pump.Wait()
			if !inflated {
				t.Error("the balloon never moved: the test tests nothing")
			}
			wantRunning(t, v)
			if retaken == 0 {
				t.Error("no attempt of ten checkpoints was discarded: the test tests nothing")
			}
			if err := v.Crash(); err != nil {
				t.Fatal(err)
			}
			r, w := x.restore(t, last.ID, v.SerialPath())
			x.wantDrained(t, r, w, true)
		})
	}
}

// TestReportedPages: where a page that the guest reports as free can be used again
// without a trace, nothing is left to luck.
func TestReportedPages(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 4, Rate: 2000, Backend: vmtest.Memfd,
		Args: []string{"-device", "virtio-balloon-pci,free-page-reporting=on"}})
	var e explained
	if x.json(t, &e, "explain", itoa(v.PID())); !e.Protects || e.Mode != "stop" || !strings.Contains(e.Reason, "free-page-reporting") {
		t.Errorf("explain: %+v", e)
	}
	x.fails(t, exitRefused, []string{"free-page-reporting"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--mode", "cow")
	c := x.checkpoint(t, v.PID())
	if c.Mode != "stop" {
		t.Errorf("mode %s", c.Mode)
	}
	wantRunning(t, v)
}
