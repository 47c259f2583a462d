package inject

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// Kind is what a descriptor inside a target is.
type Kind string

// The descriptors that an interrupted session can leave in a target.
const (
	KindUserfaultfd Kind = "userfaultfd"
	KindDevice      Kind = "/dev/userfaultfd" // the device that makes them
	KindSocket      Kind = "socket"           // the one that carries the device inside
)

// Leftover is a descriptor that may stem from a session whose tracer died.
type Leftover struct {
	FD   int
	Kind Kind
	// Certain is set if nobody but ckagent makes such a one: a socket with an
	// address of ours. The others may be the target's own (a QEMU in post-copy
	// has a userfaultfd): compare with a list made before.
	Certain bool
}

const (
	userfaultfdLink = "anon_inode:[userfaultfd]"
	devicePath      = "/dev/userfaultfd"
	// socketPrefix begins the abstract address of the socket that carries the
	// device into the target; by it the socket is known for ours.
	socketPrefix = "ckagent-inject-"
)

// FindUserfaultfds lists the descriptors of a process that are userfaultfds.
func FindUserfaultfds(pid int) ([]int, error) {
	all, err := FindLeftovers(pid)
	if err != nil {
		return nil, err
	}
	var fds []int
	for _, l := range all {
		if l.Kind == KindUserfaultfd {
			fds = append(fds, l.FD)
		}
	}
	return fds, nil
}

// FindLeftovers lists, in ascending order, the descriptors of a process that a
// session may have left: userfaultfds, open /dev/userfaultfds, and datagram
// sockets with an address of ours or neither address nor peer yet.
func FindLeftovers(pid int) ([]Leftover, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		code := problem.Failed
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			code = problem.NotFound
		}
		return nil, problem.New(code, "list descriptors", pidObject(pid), "%w", err)
	}
	var out []Leftover
	var sockets map[string]bool
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		link, err := os.Readlink(dir + "/" + e.Name())
		if err != nil {
			continue // closed meanwhile
		}
		switch {
		case link == userfaultfdLink:
			out = append(out, Leftover{FD: fd, Kind: KindUserfaultfd})
		case link == devicePath || strings.HasSuffix(link, devicePath):
			out = append(out, Leftover{FD: fd, Kind: KindDevice})
		case strings.HasPrefix(link, "socket:["):
			if sockets == nil {
				sockets = socketCandidates(pid)
			}
			if certain, ok := sockets[link]; ok {
				out = append(out, Leftover{fd, KindSocket, certain})
			}
		}
	}
	slices.SortFunc(out, func(a, b Leftover) int { return a.FD - b.FD })
	return out, nil
}

// socketCandidates are the links of the sockets that may be ours, in the network
// namespace of the process; true for those that are.
func socketCandidates(pid int) map[string]bool {
	f, err := os.Open(fmt.Sprintf("/proc/%d/net/unix", pid))
	if err != nil {
		return map[string]bool{}
	}
	defer f.Close()
	return parseUnixSockets(f)
}

// parseUnixSockets reads a /proc/net/unix table.
func parseUnixSockets(r io.Reader) map[string]bool {
	set := map[string]bool{}
	sc := bufio.NewScanner(io.LimitReader(r, 64<<20))
	for sc.Scan() {
		// Num RefCount Protocol Flags Type St Inode [Path]
		f := strings.Fields(sc.Text())
		switch {
		case len(f) == 8 && strings.HasPrefix(f[7], "@"+socketPrefix):
			set["socket:["+f[6]+"]"] = true
		case len(f) == 7 && f[4] == "0002" && f[5] == "01": // SOCK_DGRAM, unconnected, no address
			set["socket:["+f[6]+"]"] = false
		}
	}
	return set
}

// Home reports whether a thread that a session had borrowed is past all that its tracer,
// which is dead, had it do. A tracer's death sets it free in the midst of a call of ours,
// which may make a descriptor yet: on a busy host long after. None of these calls sleeps
// interruptibly, so one that does is back where it was; so is one that has ended.
func Home(pid, tid int) bool {
	th, err := readThread(pid, tid)
	return err != nil || th.state == 'S' || th.state == 'Z' || th.state == 'X'
}

// CloseFD closes a descriptor inside a process, after checking that it is one
// that FindLeftovers lists.
func CloseFD(ctx context.Context, pid, fd int) error {
	return CloseFDs(ctx, pid, []int{fd})
}

// CloseFDs is CloseFD for several descriptors in one session. One that is gone is
// fine: a thread whose tracer died may still be closing it. What they are is
// checked again while the session's thread is held; another thread of the target
// could in theory still replace one between check and close.
func CloseFDs(ctx context.Context, pid int, fds []int) error {
	have, err := FindLeftovers(pid)
	if err != nil {
		return err
	}
	want := map[int]Leftover{}
	for _, fd := range fds {
		i := slices.IndexFunc(have, func(l Leftover) bool { return l.FD == fd })
		if i >= 0 {
			want[fd] = have[i]
			continue
		}
		if _, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", pid, fd)); err == nil {
			return problem.New(problem.Refused, "close", fdObject(pid, fd), "it is none that ckagent makes")
		}
	}
	if len(want) == 0 {
		return nil
	}
	s, err := Open(ctx, pid)
	if err != nil {
		return err
	}
	s.do(func() { err = s.t.closeAll(ctx, want) })
	return errors.Join(err, s.Close())
}

func fdObject(pid, fd int) string { return fmt.Sprintf("descriptor %d of pid %d", fd, pid) }

// closeAll closes, of the descriptors wanted, those that still are what they were.
func (t *tracer) closeAll(ctx context.Context, want map[int]Leftover) error {
	have, err := FindLeftovers(t.pid)
	if err != nil {
		return err
	}
	var errs []error
	for _, l := range have {
		if w, ok := want[l.FD]; !ok || w.Kind != l.Kind {
			continue
		}
		if _, err := t.invoke(ctx, "close", unix.SYS_CLOSE, uintptr(l.FD)); err != nil && !errors.Is(err, unix.EBADF) {
			errs = append(errs, problem.New(problem.Failed, "close", fdObject(t.pid, l.FD), "%w", err))
		}
	}
	return errors.Join(errs...)
}
