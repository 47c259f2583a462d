package pager

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/agent/selfexe"
	"github.com/ckagent/ckagent/uffd"
)

const (
	beatEvery   = 50 * time.Millisecond
	frozenAfter = 500 * time.Millisecond // of a process that does not run at all
	starvedFor  = 2 * time.Second        // of one that could run but got no CPU, or hangs
	graceNS     = int64(2 * time.Second) // from being started to the first beat
	// Replacements made at once, of processes that got to work and of ones that
	// did not; further ones wait, each twice as long as the last.
	freeDeaths   = 100
	freeFailures = 3
	maxBackoff   = 2 * time.Second
	calmNS       = int64(10 * time.Second) // without a death: at once again
)

// role is one of the two processes.
type role struct {
	verb string
	name string
	seat func(*control) *seat
}

var (
	workerRole     = role{VerbWorker, "pager", func(c *control) *seat { return &c.worker }}
	supervisorRole = role{VerbSupervisor, "pagerd", func(c *control) *seat { return &c.supervisor }}
)

// groupName is the control group of a process of a role.
func groupName(role string, pid int) string { return role + "-" + strconv.Itoa(pid) }

// spawn starts a process of a role on the shared control memory: fd 3 is that, fd 4
// what keeps it on a leash until it is told to go (nil: it goes at once). It takes
// the seat of old.
func spawn(r role, old occupant, self, runDir string, ctl *control, leash *os.File, warm string) (*os.Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	log, err := os.OpenFile(filepath.Join(runDir, logFile), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", r.name, err)
	}
	defer log.Close()
	args := []string{self, r.verb, "--run-dir", runDir, "--old", strconv.FormatUint(old.pack(), 10)}
	if leash == nil {
		leash = null
		args = append(args, "--resume")
	}
	if warm != "" {
		args = append(args, "--warm", warm)
	}
	p, err := os.StartProcess(self, args, &os.ProcAttr{
		Dir:   "/",
		Env:   os.Environ(),
		Files: []*os.File{null, log, log, ctl.file, leash},
		Sys:   &syscall.SysProcAttr{Setsid: true}, // no terminal, no job control

	})
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", r.name, err)
	}
	child, err := procstat.Read(p.Pid)
	if err == nil && !r.seat(ctl).claim(old, occupant{p.Pid, child.StartTicks}, nowNS()+graceNS) {
		err = errSuperseded
	}
	if err != nil {
		_ = p.Kill()
		_, _ = p.Wait()
		return nil, fmt.Errorf("start %s: %w", r.name, err)
	}
	return p, nil
}

// watcher keeps the other seat filled. It belongs to one goroutine.
type watcher struct {
	role    role
	runDir  string
	ctl     *control
	log     func(format string, args ...any)
	pidfd   int
	held    occupant // by pidfd
	zombies []*os.Process
	deaths  int    // in a row
	fails   int    // of them, of ones that never got to work, in a row
	works   uint64 // seat.works when last looked at
	lastNS  int64  // of the last death
	lookNS  int64  // when it last looked
	wokeNS  int64  // when it last did after standing still itself
}

// run looks after the seat until stop is signalled or the pager's work is over.
func (w *watcher) run(ctx context.Context, stop *uffd.Stop) {
	w.pidfd = -1
	defer w.drop()
	for ctx.Err() == nil && !w.ctl.phaseNow().over() {
		w.look(ctx)
		// Without a pidfd poll ignores the entry and only waits.
		if await(beatEvery, stop.FD(), w.pidfd) == stopped {
			break
		}
		w.reap()
	}
	w.reap()
}

func (w *watcher) drop() {
	if w.pidfd >= 0 {
		unix.Close(w.pidfd)
		w.pidfd = -1
	}
}

// look judges the occupant once: dead, frozen, or fine.
func (w *watcher) look(ctx context.Context) {
	s := w.role.seat(w.ctl)
	o := s.occupant()
	if w.held != o || w.pidfd < 0 {
		w.drop()
		w.held = o
		if fd, err := unix.PidfdOpen(o.PID, 0); err == nil {
			if o.exists() {
				w.pidfd = fd
			} else {
				unix.Close(fd)
			}
		}
	}
	if w.pidfd < 0 || !alive(w.pidfd) {
		w.replace(ctx, o, "died")
		return
	}
	// Two that were stopped and go on together must not end each other: silence
	// counts from when we could have heard something.
	now := nowNS()
	if now-w.lookNS > int64(frozenAfter) {
		w.wokeNS = now
	}
	w.lookNS = now
	silent, state, tooLong := s.silence(o, now, w.wokeNS)
	if !tooLong {
		return
	}
	if err := unix.PidfdSendSignal(w.pidfd, unix.SIGKILL, nil, 0); err != nil && err != unix.ESRCH {
		w.log("cannot end the frozen %s %d: %v", w.role.name, o.PID, err)
	}
	// Not waited for: one that sleeps in the kernel may take long to go, and two
	// at a time do no harm.
	w.replace(ctx, o, fmt.Sprintf("gave no sign of life for %v (state %c)", silent.Round(time.Millisecond), state))
}

// silence is for how long a living occupant gave no sign of life to who listens
// since then, its state, and whether that is too long.
func (s *seat) silence(o occupant, now, since int64) (silent time.Duration, state byte, tooLong bool) {
	silent = time.Duration(now - max(since, s.beatNS.Load()))
	if silent < frozenAfter {
		return silent, 0, false
	}
	p, err := procstat.Read(o.PID)
	return silent, p.State, err == nil && (p.Stopped() || p.State == 'D') || silent >= starvedFor
}

// lifeless reports whether nobody in this seat does anything: dead, or silent for
// too long.
func (s *seat) lifeless(now int64) bool {
	o := s.occupant()
	if !present(o) {
		return true
	}
	_, _, tooLong := s.silence(o, now, 0)
	return tooLong
}

// replace fills the seat again, at once unless it dies over and over.
func (w *watcher) replace(ctx context.Context, old occupant, why string) {
	if w.ctl.phaseNow().over() || ctx.Err() != nil {
		return
	}
	now := nowNS()
	if now-w.lastNS > calmNS {
		w.deaths = 0
	}
	w.deaths++
	w.fails++
	if works := w.role.seat(w.ctl).works.Load(); works != w.works {
		w.works, w.fails = works, 0
	}
	w.lastNS = now
	if over := max(w.deaths-freeDeaths, w.fails-freeFailures); over > 0 {
		d := maxBackoff
		if over < 8 {
			d = min(d, 10*time.Millisecond<<over)
		}
		t := time.NewTimer(d)
		defer t.Stop()
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
	if w.role.seat(w.ctl).occupant() != old {
		return // somebody else was faster
	}
	w.drop()
	p, err := spawn(w.role, old, selfexe.Path(), w.runDir, w.ctl, nil, "")
	if errors.Is(err, errSuperseded) {
		return
	}
	if err != nil {
		w.log("%s %d %s; cannot start another: %v", w.role.name, old.PID, why, err)
		return
	}
	w.log("%s %d %s; %d takes over", w.role.name, old.PID, why, p.Pid)
	w.zombies = append(w.zombies, p)
	_ = noteSeats(w.runDir, w.ctl)
	cgroup.Remove(groupName(w.role.name, old.PID))
}

// reap collects children that have ended.
func (w *watcher) reap() { w.zombies = reap(w.zombies) }

func reap(ps []*os.Process) []*os.Process {
	rest := ps[:0]
	for _, p := range ps {
		var ws unix.WaitStatus
		if got, err := unix.Wait4(p.Pid, &ws, unix.WNOHANG, nil); got == 0 && err == nil {
			rest = append(rest, p)
			continue
		}
		_ = p.Release()
	}
	return rest
}

// alive polls a pidfd.
func alive(pidfd int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if err == unix.EINTR {
			continue
		}
		return err == nil && n == 0
	}
}

// stopped is await's answer when it was told to stop.
const stopped = -2

// await returns when one of the pidfds ends (its index), -1 after d, stopped when
// stop is readable.
func await(d time.Duration, stop int, pidfds ...int) int {
	fds := []unix.PollFd{{Fd: int32(stop), Events: unix.POLLIN}}
	for _, fd := range pidfds {
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	if _, err := unix.Poll(fds, int(d/time.Millisecond)); err != nil {
		return -1
	}
	if fds[0].Revents != 0 {
		return stopped
	}
	for i, f := range fds[1:] {
		if f.Revents != 0 {
			return i
		}
	}
	return -1
}
