package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestDisksInSnapshots: a checkpoint whose disk is an internal snapshot of the original
// image is restored from a copy of that; without the image it is refused.
func TestDisksInSnapshots(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 2, Rate: 2000, Idle: true, Control: true,
		Disks: []vmtest.Disk{{Format: "qcow2", MiB: 8}}})
	control := monitor(t, v.ControlPath())
	io := func(m *vmtest.Monitor, command string) {
		t.Helper()
		out, err := m.HMP(t.Context(), `qemu-io disk0 "`+command+`"`)
		if err != nil || strings.Contains(out, "failed") || strings.Contains(out, "rror") {
			t.Errorf("%s: %v: %s", command, err, out)
		}
	}
	v.WaitProgress(t, 200)
	io(control, "write -P 1 0 1M")
	c := x.checkpoint(t, v.PID(), "--qmp", v.QMPPath(), "--disks", "snapshot")
	io(control, "write -P 2 0 1M")
	control.Close()
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	original := v.Config().Disks[0].Path
	sum := fileSum(t, original)
	r, w := x.restore(t, c.ID, v.SerialPath(), "--disk-dir", t.TempDir())
	m := monitor(t, r.QMP)
	io(m, "read -P 1 0 1M")
	io(m, "write -P 3 0 1M")
	m.Close()
	w.WaitProgress(t, 200)
	w.Invariants()
	w.Kill()
	removeLater(r)
	if fileSum(t, original) != sum {
		t.Error("the original was written to")
	}
	if err := os.Rename(original, original+".aside"); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "disks")
	f := x.fails(t, exitRefused, []string{original}, "restore", c.ID, "--store", x.store, "--disk-dir", dir)
	if f.Hint == "" {
		t.Errorf("no hint: %+v", f)
	}
	if left, err := os.Stat(dir); err == nil {
		t.Errorf("left: %v", left)
	}
}
