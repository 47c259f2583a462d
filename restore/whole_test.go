package restore

import (
	"bytes"
	"context"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// differing counts the pages of a restored, paused VM that are not what the
// checkpoint says, by block.
func differing(t *testing.T, res *Result, img interface {
	ReadPage(block int, page uint64, dst []byte) (bool, error)
}, names []string, sizes []uint64) map[string]int {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	ep, err := qmp.ParseEndpoint(res.QMP)
	if err != nil {
		t.Fatal(err)
	}
	c, err := qmp.Dial(ctx, ep)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p, err := vm.OpenProcess(res.QEMUPID)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	blocks, err := vm.ResolveLayout(ctx, p, c, nil)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]int{}
	want := make([]byte, 4096)
	for i, name := range names {
		for _, b := range blocks {
			if b.Name != name {
				continue
			}
			have, err := vmtest.ReadRAM(res.QEMUPID, b.HVA, sizes[i])
			if err != nil {
				t.Fatal(err)
			}
			for page := uint64(0); page < sizes[i]/4096; page++ {
				if _, err := img.ReadPage(i, page, want); err != nil {
					t.Fatal(err)
				}
				if !bytes.Equal(want, have[page*4096:(page+1)*4096]) {
					out[name]++
				}
			}
		}
	}
	return out
}

// TestEveryPage restores a machine lazily and eagerly without letting its guest
// run, and compares every page of every block with the checkpoint.
func TestEveryPage(t *testing.T) {
	v := vmtest.Start(t, vmtest.Config{Machine: "q35", MemoryMiB: 192, WSMiB: 8, SweepMS: 500, OVMF: true, Args: []string{"-vga", "std"}})
	v.WaitSweeps(t, 1)
	st := testStore(t)
	id := takeCheckpoint(t, v, st, nil)
	v.Kill()
	img, err := st.OpenImage(t.Context(), id)
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	var names []string
	var sizes []uint64
	for _, b := range img.Manifest().Blocks {
		names, sizes = append(names, b.Name), append(sizes, b.UsedBytes)
	}
	for _, eager := range []bool{false, true} {
		o := testOptions(t)
		o.Paused, o.Eager = true, eager
		res, err := Run(t.Context(), st, id, o)
		if err != nil {
			t.Fatal(err)
		}
		logPhases(t, res)
		if res.Lazy == eager || !res.Paused || res.DrainedNS == 0 {
			t.Errorf("lazy %v paused %v drained %d", res.Lazy, res.Paused, res.DrainedNS)
		}
		if d := differing(t, res, img, names, sizes); len(d) > 0 {
			t.Errorf("eager %v: pages that differ: %v", eager, d)
		}
		attached(t, res)
		killRestored(t, res)
	}
}
