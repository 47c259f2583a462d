package e2e

import (
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestEngineIsTakenOnlyWhereProved: a guest of KVM raises faults that no test on this
// host has seen, so that engine bpf is refused there, and auto does without it.
func TestEngineIsTakenOnlyWhereProved(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, Accel: "kvm", MemoryMiB: 64, WSMiB: 8, Rate: 2000})
	f := x.fails(t, exitRefused, []string{"engine bpf", "kvm", "uffd"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--mode", "cow", "--engine", "bpf")
	if f.Hint == "" {
		t.Errorf("no hint: %+v", f)
	}
	x.wantOnly(t)
	wantUntouched(t, v.PID())
	if c := x.checkpoint(t, v.PID(), "--mode", "cow"); c.Engine != "uffd" || len(c.Retaken) > 0 {
		t.Errorf("engine %s, retaken %q", c.Engine, c.Retaken)
	}
	x.fails(t, exitUsage, []string{"uffd or bpf"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--engine", "magic")
}
