package restore

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/restore/liveness"
	"github.com/ckagent/ckagent/restore/plan"
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

// TestRunDirOfLongName: there is room for a socket's path, which has 107 bytes.
func TestRunDirOfLongName(t *testing.T) {
	for _, name := range []string{strings.Repeat("namespace_", 12) + "-clone-0123abcd", strings.Repeat("x", image.MaxNameBytes), strings.Repeat("ü", image.MaxNameBytes/2), strings.Repeat("/", 200)} {
		if qga := filepath.Join(runDirName(RunRoot, name)+".12", plan.VMDir, "org.qemu.guest_agent.0.sock"); len(qga) > 107 {
			t.Errorf("%q: %s has %d bytes", name, qga, len(qga))
		}
	}
}

// TestRunDirStaysOurs: the user QEMU runs as may write to its part alone. What lies
// beside it says which processes to end, which files to remove and which binary to
// start, and is done with our rights.
func TestRunDirStaysOurs(t *testing.T) {
	root := t.TempDir()
	d, err := reserveRunDir(root, "vm")
	if err != nil {
		t.Fatal(err)
	}
	other := os.Geteuid() + 1
	if err := d.own(other, os.Getegid()); err != nil && os.Geteuid() == 0 {
		t.Fatal(err)
	}
	owner := func(path string) int {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		if st.Mode&0o022 != 0 {
			t.Errorf("%s can be written to by others: %o", path, st.Mode)
		}
		return int(st.Uid)
	}
	if got := owner(d.path); got != os.Geteuid() {
		t.Errorf("%s belongs to uid %d", d.path, got)
	}
	if got := owner(d.vmDir()); os.Geteuid() == 0 && got != other {
		t.Errorf("%s belongs to uid %d, not to QEMU's", d.vmDir(), got)
	}
	if st, err := os.Stat(d.path); err != nil || st.Mode().Perm() != 0o711 {
		t.Errorf("QEMU cannot pass, or can list: %v, %v", st.Mode(), err)
	}
}

// TestUnreadableIsNotGone: a process that cannot be looked at, for want of a descriptor, may
// be there; what is noted of it stays.
func TestUnreadableIsNotGone(t *testing.T) {
	start, err := startTicks(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	none := old
	none.Cur = 0
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	alive := identity{os.Getpid(), start}.alive()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if !alive {
		t.Error("taken for gone")
	}
	if (identity{os.Getpid(), start + 1}).alive() {
		t.Error("another process of this pid is taken for this one")
	}
}
