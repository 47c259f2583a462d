package guardian

import (
	"os/exec"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
)

// A process that does not end at once is put before everybody, however far behind it was,
// and nobody minds one that has ended.
func TestWhoIsEndedHurries(t *testing.T) {
	c := exec.Command("sleep", "60")
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	pid := c.Process.Pid
	if err := unix.Setpriority(unix.PRIO_PROCESS, pid, 19); err != nil {
		t.Fatal(err)
	}
	policy := func() uintptr {
		p, _, errno := syscall.RawSyscall(unix.SYS_SCHED_GETSCHEDULER, uintptr(pid), 0, 0)
		if errno != 0 {
			t.Fatal(errno)
		}
		return p &^ (1 << 30) // SCHED_RESET_ON_FORK
	}
	if p := policy(); p != unix.SCHED_NORMAL {
		t.Fatalf("policy %d before", p)
	}
	hurry(pid)
	if p := policy(); p != unix.SCHED_FIFO {
		t.Errorf("policy %d, want %d", p, unix.SCHED_FIFO)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if !end(fd, pid, cgroup.Roots(), serverPatience) {
		t.Error("it lives on")
	}
	_ = c.Wait() // killed
	hurry(pid)
}
