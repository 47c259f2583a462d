package procstat

import (
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParse(t *testing.T) {
	got, err := Parse([]byte("42 (evil) (name)) S 1 42 42 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987654321 1 2 3 0 0 0 0 0 0 0 0 0 0 0 0 17 5 0"))
	if err != nil {
		t.Fatal(err)
	}
	if want := (Stat{PID: 42, PPID: 1, Comm: "evil) (name)", State: 'S', Flags: 4194560, StartTicks: 987654321, Processor: 5}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, bad := range []string{"", "1", "1 (a) S 1", "x (a) S 1 42 42 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 9", ")("} {
		if _, err := Parse([]byte(bad)); err == nil {
			t.Errorf("Parse(%q) succeeded", bad)
		}
	}
}

// TestLifeOfAProcess follows one from its start to after its end.
func TestLifeOfAProcess(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	s, err := Read(cmd.Process.Pid)
	if err != nil || s.PID != cmd.Process.Pid || s.PPID != os.Getpid() || s.Ended() || s.Exiting() || s.StartTicks == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	// Ended, but not reaped.
	if err := unix.Waitid(unix.P_PID, cmd.Process.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	if z, err := Read(cmd.Process.Pid); err != nil || !z.Ended() || !z.Exiting() || z.StartTicks != s.StartTicks {
		t.Errorf("%+v, %v", z, err)
	}
	_ = cmd.Wait()
	if _, err := Read(cmd.Process.Pid); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
}

// The first thread of the kernel's is pid 2, where this pid namespace shows it.
func TestKernelThread(t *testing.T) {
	if s, err := Read(os.Getpid()); err != nil || s.Kernel() {
		t.Errorf("this process: %+v, %v", s, err)
	}
	if s, err := Read(2); err == nil && s.Comm == "kthreadd" && !s.Kernel() {
		t.Errorf("kthreadd: %+v", s)
	}
}

func FuzzParse(f *testing.F) {
	if b, err := os.ReadFile("/proc/self/stat"); err == nil {
		f.Add(b)
	}
	f.Add([]byte("1 (a) b) S 1 42 42 0 -1 0 1 2 3 4 5 6 7 8 20 0 1 0 9"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := Parse(b); err == nil && s.State == 0 {
			t.Error("a stat without a state")
		}
	})
}
