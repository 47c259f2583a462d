package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// explained is what explain says of a machine.
type explained struct {
	VM       string `json:"vm"`
	PID      int    `json:"qemu_pid"`
	QEMU     string `json:"qemu"`
	Machine  string `json:"machine"`
	Accel    string `json:"accel"`
	VCPUs    int    `json:"vcpus"`
	State    string `json:"state"`
	Protects bool   `json:"can_protect"`
	Mode     string `json:"mode"`
	Reason   string `json:"reason"`
	Refusals []struct{ Code, Object, Reason, Advice string }
	Blocks   []block `json:"blocks"`
}

// block is a RAMBlock as explain shows it.
type block struct {
	Name      string `json:"name"`
	UsedBytes uint64 `json:"used_bytes"`
	HVA       uint64 `json:"hva"`
}

// TestMatrix takes every configuration from explain to a restored guest.
func TestMatrix(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "boots every configuration")
	}
	for _, c := range vmtest.Matrix() {
		if c.CoveredBy != "" && os.Getenv("CKAGENT_E2E_LONG") == "" {
			t.Logf("%s is covered by %s; CKAGENT_E2E_LONG=1 runs it", c.Name, c.CoveredBy)
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			cfg := c.Prepare(t)
			x := newTool(t)
			v := vmtest.Start(t, cfg)
			cfg = v.Config()
			var e explained
			x.json(t, &e, "explain", itoa(v.PID()))
			want := "cow"
			if c.StopOnly {
				want = "stop"
			}
			if !e.Protects || e.Mode != want || e.PID != v.PID() || e.VM != cfg.Name || e.VCPUs != cfg.VCPUs || e.State != "running" || e.Accel != cfg.Accel {
				t.Errorf("explain: %+v", e)
			}
			var ram uint64
			for _, b := range e.Blocks {
				ram += b.UsedBytes
			}
			if ram < uint64(cfg.MemoryMiB)<<20 {
				t.Errorf("explain finds %d bytes of RAM in %+v", ram, e.Blocks)
			}
			wantUntouched(t, v.PID()) // explain is read-only
			if c.StopOnly {
				if e.Reason == "" {
					t.Error("explain does not say why it is mode stop")
				}
				f := x.fails(t, exitRefused, []string{"write-protect", "mode stop"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--mode", "cow")
				if f.Hint == "" {
					t.Errorf("no hint: %+v", f)
				}
				x.wantOnly(t)
			}
			ck, _, _ := x.roundTrip(t, v, true)
			if ck.Mode != want || ck.RAMBytes != ram {
				t.Errorf("mode %s, want %s; %d bytes, explain said %d", ck.Mode, want, ck.RAMBytes, ram)
			}
			engine := "bpf"
			if cfg.Accel == "kvm" || cfg.Backend == vmtest.FileTmpfs {
				engine = "uffd" // experimental, and not proved
			}
			if want == "cow" && ck.Engine != engine || want == "stop" && ck.Engine != "none" {
				t.Errorf("mode %s with engine %s", ck.Mode, ck.Engine)
			}
			x.wantOnly(t, ck.ID)
		})
	}
}

// TestModes takes one machine through each mode and each compression.
func TestModes(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, small())
	var ids []string
	raw := uint64(0)
	for _, args := range [][]string{
		{"--mode", "cow"}, {"--mode", "buffer"}, {"--mode", "stop"},
		{"--mode", "cow", "--compress", "s2"}, {"--mode", "cow", "--compress", "zstd"},
		{"--mode", "stop", "--compress", "zstd"},
	} {
		v.WaitProgress(t, 200)
		c := x.checkpoint(t, v.PID(), append(args, "--keep-last", "0")...)
		wantRunning(t, v)
		if c.Mode != args[1] || len(c.Retaken) > 0 {
			t.Errorf("%v: mode %s, retaken %q", args, c.Mode, c.Retaken)
		}
		if raw == 0 {
			raw = c.StoredBytes
		}
		if len(args) == 4 && c.StoredBytes >= raw {
			t.Errorf("%v stores %d bytes, uncompressed are %d", args, c.StoredBytes, raw)
		}
		ids = append(ids, c.ID)
		t.Logf("%v: pause %.2f ms, total %.0f ms, %d MiB stored", args, float64(c.PauseNS)/1e6, float64(c.TotalNS)/1e6, c.StoredBytes>>20)
	}
	// Of whom wants full ones only, none has what a child needs.
	alone := x.checkpoint(t, v.PID(), "--full-every", "1", "--keep-last", "0")
	if _, err := os.Stat(filepath.Join(x.dir(t, alone.ID), "tags")); !os.IsNotExist(err) {
		t.Errorf("a checkpoint that is not to be continued has tags: %v", err)
	}
	next := x.checkpoint(t, v.PID(), "--keep-last", "0")
	if alone.Parent != "" || next.Parent == alone.ID {
		t.Errorf("%s continues %q, %s continues %q", alone.ID, alone.Parent, next.ID, next.Parent)
	}
	ids = append(ids, alone.ID, next.ID)
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	for i, id := range ids {
		var eager []string
		if i%2 == 1 { // both ways for each kind
			eager = []string{"--eager"}
		}
		r, w := x.restore(t, id, v.SerialPath(), eager...)
		if r.Lazy != (eager == nil) {
			t.Errorf("%v: lazy is %v", eager, r.Lazy)
		}
		x.wantUp(t, w)
		w.Kill()
	}
	x.wantOnly(t, ids...)
	if !slices.ContainsFunc(x.ls(t), func(l listed) bool { return l.ID == ids[0] && l.Mode == "cow" }) {
		t.Errorf("ls: %+v", x.ls(t))
	}
}
