package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// tracked is a guest that runs behind a proxy, whose checkpoints are compared with its
// memory at their instant.
type tracked struct {
	*bed
	x *tool
	w *witness
}

func newTracked(t *testing.T, x *tool) *tracked {
	t.Helper()
	if testing.Short() {
		vmtest.Skip(t, "short", "takes many checkpoints")
	}
	g := &tracked{bed: newBedOf(t, vmtest.Config{MemoryMiB: 192, WSMiB: 64, DirtyMiB: 8, Rate: 4000}), x: x}
	var e explained
	x.json(t, &e, "explain", itoa(g.v.PID()))
	g.w = newWitness(t, g.v, g.control, e.Blocks)
	t.Cleanup(g.w.watch(g.proxy))
	g.v.WaitProgress(t, 5000)
	return g
}

// attachment is how it is attached to.
func (g *tracked) attachment() []string {
	return []string{"attach", itoa(g.v.PID()), "--store", g.x.store, "--qmp", "unix:" + g.proxy.Path(), "--interval", "1h",
		"--keep-last", "0", "--mode", "cow", "--engine", "bpf", "--track", "--json"}
}

// checkpoint takes one more, by whoever is attached, and compares it.
func (g *tracked) checkpoint(t *testing.T, more ...string) (c checkpoint) {
	t.Helper()
	g.v.WaitProgress(t, 1000)
	g.x.json(t, &c, append([]string{"checkpoint", itoa(g.v.PID())}, more...)...)
	g.w.mu.Lock()
	err := errors.Join(g.w.errs...)
	g.w.mu.Unlock()
	if err == nil {
		_, err = g.w.compare(g.x.dir(t, c.ID))
	}
	if err != nil {
		t.Fatalf("%s: %v", c.ID, err)
	}
	return c
}

// wantMarked fails unless memory is marked between two checkpoints.
func (g *tracked) wantMarked(t *testing.T) {
	t.Helper()
	found, err := traces(g.v.PID())
	if err != nil || !slices.ContainsFunc(found, func(f string) bool { return strings.Contains(f, "(uw)") }) {
		t.Errorf("nothing is marked between two checkpoints: %q, %v", found, err)
	}
}

func (g *tracked) awaitUnmarked(t *testing.T) {
	t.Helper()
	within(t, 10*time.Second, "nothing marked any more", func() bool {
		found, err := traces(g.v.PID())
		return err == nil && len(found) == 0
	})
}

// TestTrackedInTheKernel has an attach leave the marks of engine bpf in a guest that runs:
// each checkpoint of the chain is compared with the memory at its instant, and knows most
// pages by their marks. Then the attach is killed: nothing stays marked, and the next one
// has to do without.
func TestTrackedInTheKernel(t *testing.T) {
	x := newTool(t)
	g := newTracked(t, x)
	attach := func() *started {
		before := len(x.ls(t))
		s := x.start(t, g.attachment()...)
		within(t, 30*time.Second, "the first checkpoint", func() bool { return len(x.ls(t)) > before })
		return s
	}
	s := attach()
	for range max(3, rounds(t)/2) {
		g.checkpoint(t)
	}
	g.wantMarked(t)
	s.signal(unix.SIGKILL)
	killed := s.wait(t, 10*time.Second)
	g.awaitUnmarked(t)
	g.v.WaitProgress(t, 1000)
	wantSame(t, killed)

	s = attach()
	s.signal(unix.SIGINT)
	wantSame(t, s.wait(t, 20*time.Second))
	wantUntouched(t, g.v.PID())
	g.v.Invariants()
}

// TestTrackedByTheDaemon is the same with a daemon, whose checkpoints are taken by a process
// each: the marks go from one to the next.
func TestTrackedByTheDaemon(t *testing.T) {
	h := newHost(t, "")
	g := newTracked(t, h.x)
	h.start(t)
	h.json(t, &struct{}{}, g.attachment()...)
	taken := func(n int) {
		h.wait(t, fmt.Sprintf("checkpoint %d", n), func(m map[string]statusView) bool {
			for _, v := range m {
				return int(v.Checkpoints) == n
			}
			return false
		})
	}
	taken(1)
	marked := false // the first may have been retaken by another engine
	for i := range 4 {
		c := g.checkpoint(t, "--socket", h.socket)
		t.Logf("%s, parent %q: engine %s, %d pages the same by their marks, pause %v (most of it the witness's), total %v", c.ID, c.Parent, c.Engine, c.Same,
			time.Duration(c.PauseNS), time.Duration(c.TotalNS).Round(time.Millisecond))
		bpf := c.Engine == "bpf" && len(c.Retaken) == 0
		if len(c.Notes) > 0 {
			t.Errorf("beside it: %q", c.Notes)
		}
		if i > 0 && bpf && marked != (c.Same > c.Pages/2) {
			t.Errorf("%d of %d pages are the same by their marks; marks were kept: %v", c.Same, c.Pages, marked)
		}
		if marked = c.Engine == "bpf"; marked {
			g.wantMarked(t)
		}
	}
	h.kill(t, unix.SIGKILL)
	g.awaitUnmarked(t)
	h.start(t)
	taken(1) // by this one
	h.json(t, &struct{}{}, "detach", itoa(g.v.PID()))
	wantUntouched(t, g.v.PID())
	g.v.Invariants()
	h.kill(t, unix.SIGTERM)
}

// wantSame reads what an attach has said of its checkpoints: each but the first knows pages
// by their marks, unless the one before was lost.
func wantSame(t *testing.T, r result) {
	t.Helper()
	marked := false
	for line := range strings.Lines(r.out) {
		var c checkpoint
		if err := json.Unmarshal([]byte(line), &c); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
		if c.ID == "" { // a failure, which is tried again
			marked = false
			continue
		}
		t.Logf("%s, parent %q: engine %s, %d pages the same by their marks, %d bytes stored, pause %v (most of it the witness's), total %v",
			c.ID, c.Parent, c.Engine, c.Same, c.StoredBytes, time.Duration(c.PauseNS), time.Duration(c.TotalNS).Round(time.Millisecond))
		if c.Engine == "bpf" && len(c.Retaken) == 0 && marked != (c.Same > c.Pages/2) {
			t.Errorf("%s: %d of %d pages are the same by their marks; marks were kept: %v", c.ID, c.Same, c.Pages, marked)
		}
		marked = c.Engine == "bpf"
	}
}
