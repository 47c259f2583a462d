package e2e

import (
	"slices"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// inspected is what inspect tells of the machine.
type inspected struct {
	Manifest struct {
		Machine struct {
			CPUModel string            `json:"cpu_model"`
			Facts    map[string]string `json:"facts"`
		} `json:"machine"`
	} `json:"manifest"`
}

// TestOtherCPU: a guest that uses what the new host's CPU has not is refused.
func TestOtherCPU(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 4, Rate: 2000, CPU: "qemu64,+smap,+adx"})
	c := x.checkpoint(t, v.PID())
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	// Another -cpu stands for another host: the last one counts.
	f := x.fails(t, exitRefused, []string{"smap", "adx"}, "restore", c.ID, "--store", x.store, "--", "-cpu", "qemu64")
	if !strings.Contains(f.Hint, "--force-cpu") {
		t.Errorf("%+v", f)
	}
	x.fails(t, exitRefused, []string{"vendor"}, "restore", c.ID, "--store", x.store, "--", "-cpu", "qemu64,+smap,+adx,vendor=GenuineIntel")
	r, w := x.restoreWith(t, c.ID, v.SerialPath(), []string{"--force-cpu"}, "-cpu", "qemu64")
	if !slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "as forced") && strings.Contains(n, "smap") }) {
		t.Errorf("notes: %q", r.Notes)
	}
	w.WaitProgress(t, 200)
	w.Kill()
	r, w = x.restoreWith(t, c.ID, v.SerialPath(), nil, "-cpu", "qemu64,+smap,+adx,+smep")
	if !slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "1 features more") }) {
		t.Errorf("notes: %q", r.Notes)
	}
	w.WaitProgress(t, 200)
}

// TestHostCPU: -cpu host is recorded as what it stands for here.
func TestHostCPU(t *testing.T) {
	vmtest.NeedKVM(t)
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, Accel: "kvm", MemoryMiB: 64, WSMiB: 4, Rate: 400, CPU: "host,arch-capabilities=off"})
	c := x.checkpoint(t, v.PID())
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	r, w := x.restore(t, c.ID, v.SerialPath())
	var in inspected
	x.json(t, &in, "inspect", c.ID, "--store", x.store)
	m := in.Manifest.Machine
	if strings.Count(m.CPUModel, "=on") < 10 || strings.Contains(m.CPUModel, "host,") || !strings.Contains(m.Facts["cpu_features"], "1.0.edx=") {
		t.Errorf("recorded %q, %q", m.CPUModel, m.Facts)
	}
	if len(r.Notes) > 0 {
		t.Errorf("on the same host: %q", r.Notes)
	}
	w.WaitProgress(t, 10)
}
