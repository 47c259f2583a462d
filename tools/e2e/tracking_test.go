package e2e

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestTrackedInTheKernel has an attach leave the marks of engine bpf in a guest that runs:
// each checkpoint of the chain is compared with the memory at its instant, and knows most
// pages by their marks. Then the attach is killed: nothing stays marked, and the next one
// has to do without.
func TestTrackedInTheKernel(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "takes many checkpoints")
	}
	x := newTool(t)
	b := newBedOf(t, vmtest.Config{MemoryMiB: 192, WSMiB: 64, DirtyMiB: 8, Rate: 4000})
	v, proxy := b.v, b.proxy
	var e explained
	x.json(t, &e, "explain", itoa(v.PID()))
	w := newWitness(t, v, b.control, e.Blocks)
	defer w.watch(proxy)()
	v.WaitProgress(t, 5000)

	attach := func() *started {
		before := len(x.ls(t))
		s := x.start(t, "attach", itoa(v.PID()), "--store", x.store, "--qmp", "unix:"+proxy.Path(), "--interval", "1h",
			"--keep-last", "0", "--mode", "cow", "--engine", "bpf", "--track", "--json")
		within(t, 30*time.Second, "the first checkpoint", func() bool { return len(x.ls(t)) > before })
		return s
	}
	s := attach()
	for i := range max(3, rounds(t)/2) {
		v.WaitProgress(t, 1000)
		var c checkpoint
		x.json(t, &c, "checkpoint", itoa(v.PID()))
		w.mu.Lock()
		err := errors.Join(w.errs...)
		w.mu.Unlock()
		if err == nil {
			_, err = w.compare(x.dir(t, c.ID))
		}
		if err != nil {
			t.Fatalf("checkpoint %d: %v", i, err)
		}
	}
	found, err := traces(v.PID())
	if err != nil || !slices.ContainsFunc(found, func(f string) bool { return strings.Contains(f, "(uw)") }) {
		t.Errorf("nothing is marked between two checkpoints: %q, %v", found, err)
	}
	s.signal(unix.SIGKILL)
	killed := s.wait(t, 10*time.Second)
	within(t, 10*time.Second, "nothing marked any more", func() bool {
		found, err := traces(v.PID())
		return err == nil && len(found) == 0
	})
	v.WaitProgress(t, 1000)
	wantSame(t, killed)

	s = attach()
	s.signal(unix.SIGINT)
	wantSame(t, s.wait(t, 20*time.Second))
	wantUntouched(t, v.PID())
	v.Invariants()
}

// wantSame reads what an attach has said of its checkpoints: each but the first knows pages
// by their marks, unless the one before was lost.
func wantSame(t *testing.T, r result) {
	t.Helper()
	marked := false
	for line := range strings.Lines(r.out) {
		var c struct {
			checkpoint
			Same uint64 `json:"same_pages"`
		}
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if c.ID == "" { // a failure, which is tried again
			marked = false
			continue
		}
		t.Logf("%s, parent %q: engine %s, %d pages the same by their marks, %d bytes stored, pause %v, total %v",
			c.ID, c.Parent, c.Engine, c.Same, c.StoredBytes, time.Duration(c.PauseNS), time.Duration(c.TotalNS).Round(time.Millisecond))
		if c.Engine == "bpf" && len(c.Retaken) == 0 && marked != (c.Same > c.Pages/2) {
			t.Errorf("%s: %d of %d pages are the same by their marks; marks were kept: %v", c.ID, c.Same, c.Pages, marked)
		}
		marked = c.Engine == "bpf"
	}
}

// within looks until something is true.
func within(t *testing.T, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.Now().Add(limit); !ok(); <-tick.C {
		if time.Now().After(deadline) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}
