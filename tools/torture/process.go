package torture

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Proc is a process held by pidfd, against reuse of its number.
type Proc struct {
	PID  int
	Verb string // its first argument, or the program's name
	fd   int
}

// hold opens a process.
func hold(pid int) (*Proc, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("pid %d: %w", pid, err)
	}
	return &Proc{PID: pid, Verb: verbOf(pid), fd: fd}, nil
}

func (p *Proc) close() { unix.Close(p.fd) }

func (p *Proc) signal(sig unix.Signal) error {
	return unix.PidfdSendSignal(p.fd, sig, nil, 0)
}

// ended waits at most d for the process to end; a zombie has.
func (p *Proc) ended(d time.Duration) bool {
	deadline := time.Now().Add(d)
	for {
		left := max(time.Until(deadline), 0)
		fds := []unix.PollFd{{Fd: int32(p.fd), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int((left+time.Millisecond-1)/time.Millisecond))
		if n > 0 {
			return true
		}
		if err != nil && !errors.Is(err, unix.EINTR) || left == 0 {
			return false
		}
	}
}

// verbOf is the hidden verb of one of our helpers, else the program's name.
func verbOf(pid int) string {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/cmdline")
	if err != nil || len(b) == 0 {
		return ""
	}
	args := strings.Split(string(b), "\x00")
	if len(args) > 1 && strings.HasPrefix(args[1], "__") {
		return args[1]
	}
	return filepath.Base(args[0])
}

// stat reads state letter and parent of a process.
func stat(pid int) (state byte, parent int, ok bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, 0, false
	}
	f := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	if len(f) < 2 || len(f[0]) != 1 {
		return 0, 0, false
	}
	parent, err = strconv.Atoi(string(f[1]))
	return f[0][0], parent, err == nil
}

// children lists the live processes whose parent is pid.
func children(pid int) []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []int
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if state, parent, ok := stat(n); ok && parent == pid && state != 'Z' && state != 'X' {
			out = append(out, n)
		}
	}
	return out
}

// findChild returns the child of one of the parents that runs a verb, nil if
// there is none.
func findChild(verb string, parents ...int) *Proc {
	for _, parent := range parents {
		for _, pid := range children(parent) {
			if verbOf(pid) != verb {
				continue
			}
			if p, err := hold(pid); err == nil {
				return p
			}
		}
	}
	return nil
}

// orphans are the helpers of ours that came to this process when their parent
// died. Those that have ended are reaped on the way.
func orphans() (left []int) {
	self := os.Getpid()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	for _, e := range entries {
		n, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		state, parent, ok := stat(n)
		if !ok || parent != self || mine.has(n) {
			continue
		}
		if state == 'Z' {
			// Nobody else waits for it: os/exec knows only what it started itself.
			_, _ = unix.Wait4(n, nil, unix.WNOHANG, nil)
			continue
		}
		left = append(left, n)
	}
	return left
}

// becomeReaper makes orphans of what we start our children.
func becomeReaper() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("become the reaper of orphans: %w", err)
	}
	return nil
}

func within(path string, text string) error { return os.WriteFile(path, []byte(text), 0) }
