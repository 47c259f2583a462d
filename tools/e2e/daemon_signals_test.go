package e2e

import (
	"encoding/json"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestDaemonSamplesDirtyRates: the daemon looks between two checkpoints at how fast a VM
// writes its memory, leaves nothing there, and a checkpoint that is ordered meanwhile does
// not have to wait for it.
func TestDaemonSamplesDirtyRates(t *testing.T) {
	h := newHost(t, "[signals]\ndirty_every = '4s'\n")
	h.start(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 32, WSMiB: 8, Rate: 500, Idle: true, Name: "rated"})
	v.WaitProgress(t, 50)
	h.json(t, &struct{}{}, "attach", itoa(v.PID()), "--interval", "1h")
	h.wait(t, "its first checkpoint", func(m map[string]statusView) bool { return m["rated"].Checkpoints == 1 })
	var rate float64
	h.wait(t, "a dirty rate", func(map[string]statusView) bool {
		r := h.run(t, "top", "--count", "1", "--json")
		var s struct {
			VMs []struct {
				VM    string
				Dirty *struct {
					Rate float64 `json:"dirty_pages_per_second"`
				}
			}
		}
		if err := json.Unmarshal([]byte(r.out), &s); err != nil {
			t.Fatalf("%v: %s", err, r)
		}
		for _, x := range s.VMs {
			if x.VM == "rated" && x.Dirty != nil {
				rate = x.Dirty.Rate
			}
		}
		return rate != 0
	})
	if rate < 250 || rate > 1000 {
		t.Errorf("%.0f pages/s, where 500 are written", rate)
	}
	// The next look is under way, or about to be.
	sampling := func() bool {
		for _, p := range h.x.processes() {
			if args, err := readArgs(p); err == nil && strings.Contains(args, " dirty-rate ") {
				return true
			}
		}
		return false
	}
	h.wait(t, "the next look", func(map[string]statusView) bool { return sampling() })
	var c checkpoint
	h.json(t, &c, "checkpoint", "rated")
	if c.ID == "" {
		t.Errorf("%+v", c)
	}
	// An idle slot is waited for where it is seen: there is one long before the hour is over.
	h.x.install(t, filepath.Join(h.dir, "policies"), "idle-slot")
	h.json(t, &struct{}{}, "policy", "set", "rated", "idle-slot", "--param", "shortest=100ms", "--param", "longest=1h")
	h.wait(t, "checkpoints in idle slots", func(m map[string]statusView) bool { return m["rated"].Checkpoints >= 4 })
	h.json(t, &struct{}{}, "detach", "rated")
	if left, err := traces(v.PID()); err != nil || len(left) > 0 {
		t.Errorf("left in the VM: %v, %v", left, err)
	}
	v.WaitProgress(t, 50)
	h.kill(t, unix.SIGTERM)
}
