package restore

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/restore/liveness"
)

// TestRunDirOfSamePID: in a container every restore may have the same pid. What an
// earlier one left, or a guest of its that runs, is in nobody's way.
func TestRunDirOfSamePID(t *testing.T) {
	root := t.TempDir()
	a, err := reserveRunDir(root, "vm")
	if err != nil {
		t.Fatal(err)
	}
	dirCount.Add(^uint64(0)) // as another process of the same pid would count
	b, err := reserveRunDir(root, "vm")
	if err != nil {
		t.Fatal(err)
	}
	if first := runDirName(root, "vm"); a.path == b.path || !strings.HasPrefix(b.path, first) {
		t.Errorf("%s, then %s", a.path, b.path)
	}
}

// TestSweepUnrecordedQEMU: a restorer that was killed between starting QEMU and writing
// down its pid leaves a QEMU that stands in the way of every further restore.
func TestSweepUnrecordedQEMU(t *testing.T) {
	root := t.TempDir()
	d, err := reserveRunDir(root, "vm")
	if err != nil {
		t.Fatal(err)
	}
	boot, err := liveness.BootID()
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.Create(filepath.Join(d.path, logName))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	held := exec.Command("sleep", "60") // stands for a QEMU that was started with -S
	held.Stdout, held.Stderr = log, log
	if err := held.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = held.Process.Kill()
		_ = held.Wait() // killed one way or the other
	}()
	self, err := startTicks(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	d.state = state{VM: "vm", BootID: boot, Restorer: identity{os.Getpid(), self}}
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	if n, err := Sweep(root); err != nil || n != 0 {
		t.Errorf("swept %d, %v: but its restorer lives", n, err)
	}
	if _, err := startTicks(held.Process.Pid); err != nil {
		t.Fatalf("it was ended although its restorer lives: %v", err)
	}
	d.state.Restorer.Start++ // that one is dead
	if err := d.save(); err != nil {
		t.Fatal(err)
	}
	if n, err := Sweep(root); err != nil || n != 1 {
		t.Errorf("swept %d, %v", n, err)
	}
	if _, err := startTicks(held.Process.Pid); err == nil {
		t.Error("its QEMU lives on, and nobody knows of it")
	}
}
