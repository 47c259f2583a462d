package e2e

import (
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestEngineIsTakenOnlyWhereProved: RAM of a kind that no test on this host has seen is
// no matter for engine bpf; under KVM, where it is experimental, it is taken if asked for.
func TestEngineIsTakenOnlyWhereProved(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, Backend: vmtest.FileTmpfs, MemoryMiB: 64, WSMiB: 8, Rate: 2000})
	f := x.fails(t, exitRefused, []string{"engine bpf", "private file", "uffd"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--mode", "cow", "--engine", "bpf")
	if f.Hint == "" {
		t.Errorf("no hint: %+v", f)
	}
	x.wantOnly(t)
	wantUntouched(t, v.PID())
	if c := x.checkpoint(t, v.PID(), "--mode", "cow"); c.Engine != "uffd" || len(c.Retaken) > 0 {
		t.Errorf("engine %s, retaken %q", c.Engine, c.Retaken)
	}
	x.fails(t, exitUsage, []string{"uffd or bpf"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--engine", "magic")
	v.Kill()

	v = vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, Accel: "kvm", MemoryMiB: 64, WSMiB: 8, Rate: 2000})
	// What KVM writes by itself nobody sees the first time; then it is copied in the pause.
	for engine, want := range map[string]string{"auto": "uffd", "bpf": "bpf"} {
		if c := x.checkpoint(t, v.PID(), "--mode", "cow", "--engine", engine); c.Engine != want || len(c.Retaken) > 1 {
			t.Errorf("kvm, engine %s: %s, retaken %q", engine, c.Engine, c.Retaken)
		}
	}
}

// TestConsecutiveInTheKernel does the same with the engine that copies pages in the
// kernel, and restores the last.
func TestConsecutiveInTheKernel(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "takes many checkpoints")
	}
	for _, c := range []struct {
		name string
		cfg  vmtest.Config
	}{
		{"anonymous", vmtest.Config{MemoryMiB: 512, WSMiB: 256, Rate: 20000, VCPUs: 2}},
		{"memfd", vmtest.Config{MemoryMiB: 256, WSMiB: 128, Rate: 20000, Backend: vmtest.Memfd}},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newTool(t)
			v, ids := consecutive(t, x, c.cfg, course{engine: "bpf", n: max(3, rounds(t)/2), keep: 0})
			if err := v.Crash(); err != nil {
				t.Fatal(err)
			}
			r, m := x.restore(t, ids[len(ids)-1], v.SerialPath())
			x.wantDrained(t, r, m, true)
			m.Kill()
			removeLater(r)
		})
	}
}
