package e2e

import (
	"bytes"
	"context"
	"os"
	"slices"
	"strconv"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/signals/track"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/inject"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// writtenSince keeps tracking between checkpoints.
type writtenSince struct {
	t      *track.Tracker
	blocks []vm.RAMBlock
	since  string // the last checkpoint
}

func takeUserfaultfd(ctx context.Context, pid int, vcpus []int) (*os.File, error) {
	f, _, err := inject.Userfaultfd(ctx, pid, inject.Options{VCPUs: vcpus})
	return f, err
}

// layoutOf learns where the memory is, while nobody else uses the monitor.
func layoutOf(t *testing.T, v *vmtest.VM) *writtenSince {
	t.Helper()
	ctx := t.Context()
	target, err := vm.Open(ctx, v.PID(), vm.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = target.Layout(ctx); err != nil {
		t.Fatal(err)
	}
	w := &writtenSince{blocks: slices.Clone(target.Blocks)}
	if err := target.Close(); err != nil {
		t.Fatal(err)
	}
	return w
}

// begin arms the memory. Whoever attaches has done so: armed memory would be refused.
func (w *writtenSince) begin(t *testing.T, v *vmtest.VM) {
	t.Helper()
	var err error
	w.t, err = track.Open(t.Context(), track.Config{PID: v.PID(), Blocks: w.blocks, Take: takeUserfaultfd, CollapseBudget: time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.t.ArmAll(); err != nil {
		t.Fatal(err)
	}
}

// taken is capture.Options.Written.
func (w *writtenSince) taken(context.Context) (*capture.Written, error) {
	out := &capture.Written{Since: w.since}
	at := map[string][]uint64{}
	for i := range w.blocks {
		set := make([]uint64, (w.blocks[i].UsedBytes/pageBytes+63)/64)
		out.Pages = append(out.Pages, set)
		at[w.blocks[i].Name] = set
	}
	for _, s := range w.t.Skipped { // not known
		for i := range at[s.Name] {
			at[s.Name][i] = ^uint64(0)
		}
	}
	err := w.t.TakeAll(func(first, count uint64) {
		b := w.t.BlockOf(first)
		set := at[b.Name]
		for p := first - b.First; p < first-b.First+count && p/64 < uint64(len(set)); p++ {
			set[p/64] |= 1 << (p % 64)
		}
	})
	return out, err
}

// TestIncremental takes checkpoints of a guest that rewrites about one page in a hundred
// in between, and compares what is stored and how long it takes with a full one: with
// pages compared by content, with what tracking says was written, and with the marks of
// engine bpf left in the memory. Each is compared with the memory at its instant.
// CKAGENT_E2E_INCREMENTAL is the MiB that the guest has filled, for ten checkpoints of each.
func TestIncremental(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "takes many checkpoints")
	}
	cfg, rounds := vmtest.Config{MemoryMiB: 256, WSMiB: 96, DirtyMiB: 1, Rate: 100, Control: true}, 1
	if s := os.Getenv("CKAGENT_E2E_INCREMENTAL"); s != "" {
		mib, err := strconv.Atoi(s)
		if err != nil {
			t.Fatal(err)
		}
		cfg, rounds = vmtest.Config{MemoryMiB: mib + max(256, mib/8), WSMiB: mib, DirtyMiB: mib / 100, Rate: 2 * mib, Control: true}, 10
	}
	for _, way := range []string{"content", "tracking", "marks"} {
		t.Run(way, func(t *testing.T) {
			x := newTool(t)
			v := vmtest.Start(t, cfg)
			v.WaitProgress(t, 100)
			o := capture.Options{Mode: capture.COW, Disks: capture.DisksNone, Helper: []string{x.bin}}
			var w *writtenSince
			if way == "tracking" {
				w = layoutOf(t, v)
				o.Mode, o.Written = capture.Buffer, w.taken
			}
			if way == "marks" {
				o.Engine = capture.EngineBPF
			}
			st, err := store.Open(x.store)
			if err != nil {
				t.Fatal(err)
			}
			a, err := agent.Attach(t.Context(), v.PID(), agent.Options{LeaveDisksOut: true, Track: way == "marks"})
			if err != nil {
				t.Fatal(err)
			}
			defer a.Close()
			if w != nil {
				w.begin(t, v)
				defer func() {
					if err := w.t.Close(); err != nil {
						t.Error(err)
					}
				}()
			}
			control := monitor(t, v.ControlPath())
			hva, size, err := v.MainRAM()
			if err != nil {
				t.Fatal(err)
			}
			// Used again and again: collecting them would be in the way of what is measured.
			at, got := make([]byte, size), make([]byte, size)
			var full *image.Manifest
			var stored, total, pause []float64
			for i := range rounds + 1 {
				v.WaitProgress(t, uint64(cfg.DirtyMiB)<<8)
				// The memory of the instant: the test stops the machine before, so that it
				// is the same for both.
				if err := control.Execute(t.Context(), "stop", nil, nil); err != nil {
					t.Fatal(err)
				}
				if err := vmtest.ReadRAMInto(v.PID(), hva, at); err != nil {
					t.Fatal(err)
				}
				res, err := a.Checkpoint(t.Context(), st, o)
				if err != nil {
					t.Fatal(err)
				}
				if err := control.Execute(t.Context(), "cont", nil, nil); err != nil {
					t.Fatal(err)
				}
				m := res.Manifest
				if w != nil {
					w.since = m.ID
				}
				wantMainRAM(t, x.dir(t, m.ID), at, got)
				if i == 0 {
					full = m
					continue
				}
				if m.Parent == "" || res.Image.UnchangedPages == 0 {
					t.Errorf("checkpoint %d is a full one: %+v", i, res.Notes)
				}
				stored = append(stored, float64(m.Stats.StoredBytes)/float64(full.Stats.StoredBytes))
				total = append(total, float64(m.Stats.TotalNS)/float64(full.Stats.TotalNS))
				pause = append(pause, float64(m.Stats.PauseNS)/1e6)
			}
			slices.Sort(stored)
			slices.Sort(total)
			slices.Sort(pause)
			mid := len(stored) / 2
			t.Logf("%s: full: %d bytes in %v, pause %v; incremental: %.4f of the bytes (%.4f at most), %.3f of the time (%.3f at most), pause %.2f ms",
				way, full.Stats.StoredBytes, time.Duration(full.Stats.TotalNS), time.Duration(full.Stats.PauseNS),
				stored[mid], stored[len(stored)-1], total[mid], total[len(total)-1], pause[mid])
			if stored[mid] > 0.10 {
				t.Errorf("an incremental checkpoint stores %.1f %% of a full one", 100*stored[mid])
			}
		})
	}
}

// wantMainRAM compares main memory of a checkpoint with a copy.
func wantMainRAM(t *testing.T, dir string, want, got []byte) {
	t.Helper()
	r, err := image.OpenReader(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for i, b := range r.Manifest().Blocks {
		if !b.Main {
			continue
		}
		if _, err := r.ReadRun(i, 0, got[:b.UsedBytes]); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got[:b.UsedBytes], want[:b.UsedBytes]) {
			t.Fatalf("%s holds other memory than at its instant", dir)
		}
	}
}
