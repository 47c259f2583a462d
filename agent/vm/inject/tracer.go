package inject

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

// ErrGone says that the thread, or its process, ended while we were at it.
var ErrGone = errors.New("the target ended meanwhile")

// TestHook, if set, is called at each point where the target is in a state of
// ours, with the name of the state. Tests let the tracer die there.
var TestHook func(stop string)

func hook(name string) {
	if TestHook != nil {
		TestHook(name)
	}
}

const (
	// spinWaits bounds the busy phase of a wait: a system call is over in
	// microseconds, and a detour through the scheduler would multiply the stop.
	spinWaits = 300
	// recheck bounds the harm of a SIGCHLD that another part of the program
	// swallowed, and finds a main thread that became a zombie (never reported
	// while others live).
	recheck = 20 * time.Millisecond
	// maxReissues bounds how often a call of ours may be interrupted.
	maxReissues = 64
	// allSignals is every signal; the kernel leaves out SIGKILL and SIGSTOP.
	allSignals = ^uint64(0)
)

// tracer is the state of one traced thread; it is used on one OS thread only.
type tracer struct {
	pid, tid int
	mem      *os.File
	g        gadgets
	maps     []mapping // as they were before the stop
	status   []byte    // the thread's /proc status, likewise
	xstate   []byte
	sigchld  chan os.Signal

	stopped  bool // in a ptrace stop
	altered  bool // registers are ours
	gone     bool
	released bool // detached in good order
	orig     registers
	mask     uint64
	l        layout
	park     registers
	filters  [][]unix.SockFilter
	suspend  bool // PTRACE_O_SUSPEND_SECCOMP is set
	since    time.Time
	duration time.Duration
}

func (t *tracer) errorf(code problem.Code, format string, args ...any) *problem.Error {
	return problem.New(code, "inject", fmt.Sprintf("pid %d thread %d", t.pid, t.tid), format, args...)
}

// failed maps the errors of ptrace: ESRCH is a thread that is no more.
func (t *tracer) failed(what string, err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ECHILD) {
		t.gone, t.stopped = true, false
		return t.errorf(problem.NotFound, "%s: %w (%w)", what, ErrGone, err)
	}
	return t.errorf(problem.Failed, "%s: %w", what, err)
}

// waitStop waits for the next ptrace stop and returns its status word.
func (t *tracer) waitStop(ctx context.Context) (uint32, error) {
	for range spinWaits {
		if st, ok, err := t.poll(); ok || err != nil {
			return st, err
		}
		schedYield()
	}
	tick := time.NewTimer(recheck)
	defer tick.Stop()
	for {
		st, ok, err := t.poll()
		if ok || err != nil {
			return st, err
		}
		select {
		case <-t.sigchld:
		case <-tick.C:
			if t.zombie() {
				return 0, t.failed("wait", unix.ESRCH)
			}
			tick.Reset(recheck)
		case <-ctx.Done():
			return 0, t.errorf(problem.CodeOf(ctx.Err()), "wait for a stop: %w", ctx.Err())
		}
	}
}

func (t *tracer) poll() (uint32, bool, error) {
	st, ok, err := waitStatus(t.tid)
	switch {
	case errors.Is(err, unix.EINTR):
		return 0, false, nil
	case err != nil:
		return 0, false, t.failed("wait", err)
	case !ok:
		return 0, false, nil
	case st&0xff != 0x7f: // exited or killed
		return 0, false, t.failed("wait", unix.ESRCH)
	}
	t.stopped = true
	return st, true, nil
}

func (t *tracer) zombie() bool {
	th, err := readThread(t.pid, t.tid)
	return err != nil || th.state == 'Z' || th.state == 'X'
}

func stopSignal(st uint32) int { return int(st>>8) & 0xff }
func stopEvent(st uint32) int  { return int(st >> 16) }

// resume lets the thread go on to its next stop, delivering sig.
func (t *tracer) resume(request, sig int) error {
	if _, err := ptrace(request, t.tid, 0, uintptr(sig)); err != nil {
		return t.failed("resume", err)
	}
	t.stopped = false
	return nil
}

// look reads what can be read before the stop, and takes the memory that will be
// needed, so as to keep the stop short.
func (t *tracer) look() (err error) {
	if t.status, err = os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/status", t.pid, t.tid)); err != nil {
		return t.failed("read status", unix.ESRCH)
	}
	t.xstate = make([]byte, xstateMaxBytes()+4096)
	return nil
}

// seize stops the thread at a PTRACE_EVENT_STOP without changing it.
func (t *tracer) seize(ctx context.Context) error {
	t.since = time.Now()
	if _, err := ptrace(ptraceSeize, t.tid, 0, optionSysGood); err != nil {
		if errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) {
			if why := CanTrace(t.pid); why != nil {
				return why
			}
			return t.errorf(problem.Refused, "ptrace is not permitted: %w", err)
		}
		return t.failed("seize", err)
	}
	hook("seized")
	return t.interrupt(ctx)
}

// interrupt brings a running thread to a PTRACE_EVENT_STOP. Signals that come in
// between are delivered: any other stop clears the pending trap, so it is asked
// for again.
func (t *tracer) interrupt(ctx context.Context) error {
	for {
		if _, err := ptrace(ptraceInterrupt, t.tid, 0, 0); err != nil {
			return t.failed("interrupt", err)
		}
		if t.stopped {
			panic("inject: interrupt of a stopped thread")
		}
		st, err := t.waitStop(ctx)
		if err != nil {
			return err
		}
		if stopEvent(st) == eventStop {
			return nil
		}
		sig := stopSignal(st)
		if sig == int(unix.SIGTRAP)|0x80 {
			sig = 0
		}
		if err := t.resume(unix.PTRACE_CONT, sig); err != nil {
			return err
		}
	}
}

// prepare checks that the stopped thread can be used and gives it its way home.
func (t *tracer) prepare() error {
	if err := getRegs(t.tid, &t.orig); err != nil {
		return t.failed("read registers", err)
	}
	if err := t.checkThread(); err != nil {
		return err
	}
	var err error
	if t.mask, err = getSigMask(t.tid); err != nil {
		return t.failed("read signal mask", err)
	}
	n, err := getRegSet(t.tid, ntX86XState, t.xstate)
	if err != nil {
		return t.failed("read vector registers", err)
	}
	t.l = layoutBelow(t.orig.Rsp, max(xstateMaxBytes(), n), t.g)
	if err := t.checkRoom(); err != nil {
		return err
	}
	if !verifyGadgets(t.mem, t.g) {
		return t.unfit("its code changed")
	}
	if err := t.checkRseq(); err != nil {
		return err
	}
	t.park = parked(t.orig, t.l, t.g)
	if err := t.loadSeccomp(); err != nil {
		return err
	}
	frame := buildFrame(t.l, t.g, &t.orig, t.mask, t.xstate[:n], enabledFeatures())
	if _, err := t.mem.WriteAt(frame, int64(t.l.entry)); err != nil {
		return t.errorf(problem.Failed, "write signal frame: %w", err)
	}
	hook("frame-written")
	if err := setRegs(t.tid, &t.park); err != nil {
		return t.failed("park", err)
	}
	t.altered = true
	hook("parked")
	if err := setSigMask(t.tid, allSignals); err != nil {
		return t.failed("block signals", err)
	}
	hook("masked")
	return nil
}

// errUnfit marks a thread that cannot be used while another one may.
var errUnfit = errors.New("thread cannot be used")

func (t *tracer) unfit(format string, args ...any) error {
	return t.errorf(problem.Busy, "%w: %s", errUnfit, fmt.Sprintf(format, args...))
}

// call runs one system call; name is for the test hook.
func (t *tracer) call(ctx context.Context, name string, nr uintptr, args [6]uintptr) (int64, error) {
	if !t.altered {
		return 0, t.errorf(problem.Failed, "system call on a thread that was let go")
	}
	if !t.stopped {
		return 0, t.errorf(problem.Failed, "the thread did not come back from the previous call")
	}
	if err := t.permitted(name, nr, args); err != nil {
		return 0, err
	}
	for range maxReissues {
		regs := calling(t.park, t.g, nr, args)
		if err := setRegs(t.tid, &regs); err != nil {
			return 0, t.failed(name, err)
		}
		hook(name + "-set")
		if err := t.syscallStop(ctx, syscallInfoEntry); err != nil {
			return 0, err
		}
		hook(name + "-enter")
		if err := t.syscallStop(ctx, syscallInfoExit); err != nil {
			return 0, err
		}
		if err := getRegs(t.tid, &regs); err != nil {
			return 0, t.failed(name, err)
		}
		hook(name + "-exit")
		if r := result(&regs); r < eRestartBlock || r > eRestartSys {
			return r, nil
		}
	}
	return 0, t.errorf(problem.Failed, "%s: interrupted %d times: %w", name, maxReissues, unix.EINTR)
}

// syscallStop goes on to the entry or exit of a system call. SIGSTOP cannot be
// blocked: it is passed on, and the process stops around our thread, which goes
// on until it is let go.
func (t *tracer) syscallStop(ctx context.Context, want byte) error {
	sig := 0
	for {
		if err := t.resume(unix.PTRACE_SYSCALL, sig); err != nil {
			return err
		}
		st, err := t.waitStop(ctx)
		if err != nil {
			return err
		}
		sig = 0
		switch {
		case stopEvent(st) == eventStop:
		case stopSignal(st) == int(unix.SIGTRAP)|0x80:
			kind, err := syscallStopKind(t.tid)
			if err != nil {
				return t.failed("read system call", err)
			}
			if kind == want {
				return nil
			}
			return t.errorf(problem.Failed, "stopped at %d of a system call, not at %d", kind, want)
		default:
			sig = stopSignal(st)
		}
	}
}

// restore gives the thread back what it had and lets it go.
func (t *tracer) restore(ctx context.Context) error {
	if t.gone {
		return nil
	}
	if !t.stopped && !t.altered {
		return t.errorf(problem.Busy, "it did not stop; nothing was changed")
	}
	if !t.stopped {
		// An injected call has not come back: bring it to a stop if it can be.
		if err := t.interrupt(ctx); err != nil {
			return err
		}
	}
	if t.altered {
		// A trap that is pending when the thread leaves a syscall stop is taken
		// before it executes anything in user mode.
		park := t.park
		if err := setRegs(t.tid, &park); err != nil {
			return t.failed("park", err)
		}
		hook("leaving")
		if err := t.trapBeforeUserMode(ctx); err != nil {
			return err
		}
		hook("trapped")
		if err := setSigMask(t.tid, t.mask); err != nil {
			return t.failed("restore signal mask", err)
		}
		hook("unmasked")
		regs := returning(t.orig)
		if err := setRegs(t.tid, &regs); err != nil {
			return t.failed("restore registers", err)
		}
		hook("restored")
	}
	if _, err := ptrace(unix.PTRACE_DETACH, t.tid, 0, 0); err != nil {
		return t.failed("detach", err)
	}
	t.duration = time.Since(t.since)
	t.stopped, t.altered, t.released = false, false, true
	hook("detached")
	return nil
}

func (t *tracer) trapBeforeUserMode(ctx context.Context) error {
	if _, err := ptrace(ptraceInterrupt, t.tid, 0, 0); err != nil {
		return t.failed("interrupt", err)
	}
	sig := 0
	for {
		if err := t.resume(unix.PTRACE_CONT, sig); err != nil {
			return err
		}
		st, err := t.waitStop(ctx)
		if err != nil {
			return err
		}
		if stopEvent(st) == eventStop {
			return nil
		}
		if sig = stopSignal(st); sig == int(unix.SIGTRAP)|0x80 {
			sig = 0
		}
		if _, err := ptrace(ptraceInterrupt, t.tid, 0, 0); err != nil {
			return t.failed("interrupt", err)
		}
	}
}

func (t *tracer) watchSignals() func() {
	t.sigchld = make(chan os.Signal, 1)
	signal.Notify(t.sigchld, unix.SIGCHLD)
	return func() { signal.Stop(t.sigchld) }
}
