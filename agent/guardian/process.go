package guardian

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/heartbeat"
	"github.com/ckagent/ckagent/agent/procstat"
)

// identity names a process against reuse of its pid.
type identity struct {
	PID        int    `json:"pid"`
	StartTicks uint64 `json:"start_ticks"` // field 22 of /proc/PID/stat
}

// identify reads the identity of a live process; zombies do not count.
func identify(pid int) (identity, error) {
	id, s, err := readIdentity(pid)
	if err == nil && s.Ended() {
		err = fmt.Errorf("pid %d: %w", pid, os.ErrProcessDone)
	}
	return id, err
}

// readIdentity reads the identity of a process, which may have ended.
func readIdentity(pid int) (identity, procstat.Stat, error) {
	s, err := procstat.Read(pid)
	return identity{PID: pid, StartTicks: s.StartTicks}, s, err
}

// alive reports whether this very process exists.
func (id identity) alive() bool {
	now, err := identify(id.PID)
	return err == nil && now == id
}

// working is alive, but for one that is about to end: its locks go before it does.
func (id identity) working() bool {
	now, s, err := readIdentity(id.PID)
	return err == nil && now == id && !s.Exiting()
}

// open returns a pidfd of this very process, or an error if it is gone. One that
// is just ending counts: its threads may still be at it.
func (id identity) open() (*os.File, error) {
	fd, err := unix.PidfdOpen(id.PID, 0)
	if err != nil {
		return nil, err
	}
	// Holding the pidfd, the pid cannot be reused: what is true now stays.
	if now, _, err := readIdentity(id.PID); err != nil || now != id {
		unix.Close(fd)
		return nil, unix.ESRCH
	}
	return os.NewFile(uintptr(fd), fmt.Sprintf("pidfd %d", id.PID)), nil
}

// waitExit waits for the end of a process; false if it lives on after d.
func waitExit(pidfd int, d time.Duration) bool {
	deadline := time.Now().Add(d)
	for {
		left := max(time.Until(deadline), 0)
		fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int((left+time.Millisecond-1)/time.Millisecond))
		switch {
		case err == nil && n > 0:
			return true
		case err != nil && !errors.Is(err, unix.EINTR):
			return false
		case left == 0:
			return false
		}
	}
}

// end kills a process and sees that it goes: SIGKILL, and out of a frozen or starved
// cgroup if that has no effect (a task frozen by the v1 freezer dies when it is thawed,
// which it is, alone, in a cgroup that is not frozen; one without a share of the
// processor dies as slowly as it lived), and with whatever priority it takes. If it hangs
// in the kernel, it is left to die when it can.
func end(pidfd, pid int, home cgroup.Group, patience time.Duration) (gone bool) {
	if err := unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0); err != nil {
		return errors.Is(err, unix.ESRCH)
	}
	if waitExit(pidfd, min(patience, 30*time.Millisecond)) {
		return true
	}
	home.Free(pid)
	hurry(pid)
	return waitExit(pidfd, patience)
}

// hurry puts all threads of a process before everybody's. A fault server's end lifts the
// protection under the lock of QEMU's address space, which the guest's next fault waits for;
// and its threads, which come after the guest as long as it lives, die as they have lived.
func hurry(pid int) {
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return // it has ended
	}
	for _, t := range threads {
		if tid, err := strconv.Atoi(t.Name()); err == nil {
			heartbeat.RealtimeOf(tid)
		}
	}
}

// groupName is the control group of the guardian of a VM.
func groupName(qemu identity) string {
	return fmt.Sprintf("guardian-%d-%d", qemu.PID, qemu.StartTicks)
}
