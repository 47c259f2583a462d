package inject

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

const (
	// scratchBytes is the memory a session offers its caller inside the target.
	scratchBytes = 2048
	// attempts on different threads, and the time each gets to stop.
	maxAttempts    = 8
	attemptTimeout = 300 * time.Millisecond
	// closeTimeout bounds the orderly way of letting go; after it the tracing
	// thread ends itself.
	closeTimeout = time.Second

	pidfdThread = unix.O_EXCL // PIDFD_THREAD
)

// Session is a thread of another process, held at a ptrace stop.
type Session struct {
	t    *tracer
	ctx  context.Context
	work chan func()
	end  chan struct{} // closed when the tracing goroutine has returned
	quit bool          // set on the tracing goroutine: let go is done

	osThread int // pidfd of the tracing OS thread; -1 before Linux 6.9
}

// Open stops a thread of the process and makes it ready to run system calls.
// The context bounds everything that is done in the session, except that Close
// takes up to a second more to leave in good order.
func Open(ctx context.Context, pid int) (*Session, error) {
	return open(ctx, pid, 0, Options{})
}

// open is Open on one given thread if only is not 0.
func open(ctx context.Context, pid, only int, o Options) (*Session, error) {
	if err := ctx.Err(); err != nil {
		return nil, problem.New(problem.CodeOf(err), "inject", pidObject(pid), "%w", err)
	}
	if err := CanTrace(pid); err != nil {
		return nil, err
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return nil, problem.New(problem.Refused, "inject", pidObject(pid), "open its memory: %w", err)
	}
	maps, err := readMaps(pid)
	if err != nil {
		mem.Close()
		return nil, problem.New(problem.NotFound, "inject", pidObject(pid), "read its maps: %w", err)
	}
	g, err := findGadgets(mem, maps)
	if err != nil {
		mem.Close()
		return nil, problem.New(problem.Refused, "inject", pidObject(pid), "%w", err).
			WithHint("its program code offers no way to return from a signal; nothing was touched")
	}
	s, err := openAny(ctx, only, o, tracer{pid: pid, mem: mem, g: g, maps: maps})
	if err != nil {
		mem.Close()
		return nil, err
	}
	return s, nil
}

// openAny tries threads in order of preference.
func openAny(ctx context.Context, only int, o Options, proto tracer) (*Session, error) {
	pid := proto.pid
	threads, err := listThreads(pid, o.VCPUs...)
	if err != nil {
		return nil, problem.New(problem.NotFound, "inject", pidObject(pid), "%w: %w", ErrGone, err)
	}
	var last error
	tried := 0
	for _, th := range threads {
		if only != 0 && th.tid != only {
			continue
		}
		if tried++; tried > maxAttempts {
			break
		}
		t := proto
		t.tid = th.tid
		if o.Borrow != nil {
			o.Borrow(t.tid)
		}
		s := start(ctx, &t)
		if last = s.begin(); last == nil {
			return s, nil
		}
		if ctx.Err() != nil || !retryElsewhere(last) {
			return nil, last
		}
	}
	if last == nil {
		last = problem.New(problem.Busy, "inject", pidObject(pid), "none of its threads can be stopped now").
			WithHint("all are in uninterruptible sleep or exiting; try again")
	}
	return nil, last
}

// retryElsewhere: the failure was one thread's, another may do.
func retryElsewhere(err error) bool {
	return errors.Is(err, errUnfit) || errors.Is(err, ErrGone) || errors.Is(err, context.DeadlineExceeded)
}

func pidObject(pid int) string { return fmt.Sprintf("pid %d", pid) }

// start makes the tracing goroutine. It never runs on the process's first OS
// thread: Go cannot end that one, and ending is the last way to let go.
func start(ctx context.Context, t *tracer) *Session {
	s := &Session{t: t, ctx: ctx, work: make(chan func()), end: make(chan struct{}), osThread: -1}
	go s.trace()
	return s
}

func (s *Session) trace() {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		done := make(chan struct{})
		go func() { defer close(done); s.trace() }()
		<-done
		runtime.UnlockOSThread()
		return
	}
	defer close(s.end)
	s.osThread, _ = unix.PidfdOpen(unix.Gettid(), pidfdThread)
	defer hurry()()
	stop := s.t.watchSignals()
	defer stop()
	for f := range s.work {
		f()
		if s.quit {
			break
		}
	}
	if s.t.released {
		runtime.UnlockOSThread()
	}
	// Otherwise this OS thread ends with the goroutine, and the kernel detaches:
	// also from a thread that has ended, whose process could not be reaped by its
	// parent as long as it has a tracer.
}

// hurry gives the tracing thread the highest priority it may have, since a thread
// of somebody else's waits for it at each step. Best effort.
func hurry() (undo func()) {
	tid := unix.Gettid()
	nice, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
	if err != nil {
		return func() {}
	}
	nice = 20 - nice // the system call returns 20-nice
	if unix.Setpriority(unix.PRIO_PROCESS, tid, -20) != nil {
		return func() {}
	}
	// A tracing thread that ends takes its priority with it.
	return func() { _ = unix.Setpriority(unix.PRIO_PROCESS, tid, nice) }
}

// do runs f on the tracing OS thread.
func (s *Session) do(f func()) bool {
	done := make(chan struct{})
	select {
	case s.work <- func() { defer close(done); f() }:
		<-done
		return true
	case <-s.end:
		return false
	}
}

// begin stops the thread and prepares it; on failure the session is over.
func (s *Session) begin() error {
	var err error
	s.do(func() {
		ctx, cancel := context.WithTimeout(s.ctx, attemptTimeout)
		defer cancel()
		if err = s.t.look(); err == nil {
			err = s.t.seize(ctx)
		}
		if err == nil {
			hook("interrupted")
			err = s.t.prepare()
		}
		if err != nil {
			s.leave()
		}
	})
	if err != nil {
		s.join()
	}
	return err
}

// join waits for the tracing goroutine, and where that one ends its OS thread
// to let go, for the end of the OS thread too: until then the target is held.
func (s *Session) join() {
	<-s.end
	if s.osThread < 0 {
		return
	}
	if !s.t.released {
		fds := []unix.PollFd{{Fd: int32(s.osThread), Events: unix.POLLIN}}
		deadline := time.Now().Add(closeTimeout)
		for left := closeTimeout; left > 0; left = time.Until(deadline) {
			if _, err := unix.Poll(fds, int(left.Milliseconds())+1); !errors.Is(err, unix.EINTR) {
				break
			}
		}
	}
	unix.Close(s.osThread)
	s.osThread = -1
}

// leave lets the thread go, on the tracing goroutine, and ends that goroutine.
func (s *Session) leave() error {
	s.quit = true
	ctx, cancel := context.WithTimeout(context.WithoutCancel(s.ctx), closeTimeout)
	defer cancel()
	return s.t.restore(ctx)
}

// Syscall runs one system call in the target. A failed call is its unix.Errno;
// anything else is a *problem.Error and ends what the session can do.
func (s *Session) Syscall(nr uintptr, args ...uintptr) (uintptr, error) {
	return s.named(fmt.Sprintf("syscall%d", nr), nr, args...)
}

func (s *Session) named(name string, nr uintptr, args ...uintptr) (uintptr, error) {
	var r uintptr
	err := error(problem.New(problem.Failed, "inject", pidObject(s.t.pid), "session is closed"))
	s.do(func() { r, err = s.t.invoke(s.ctx, name, nr, args...) })
	return r, err
}

// invoke is call with errno made an error.
func (t *tracer) invoke(ctx context.Context, name string, nr uintptr, args ...uintptr) (uintptr, error) {
	var a [6]uintptr
	if copy(a[:], args) < len(args) {
		return 0, t.errorf(problem.Failed, "%s: more than 6 arguments", name)
	}
	r, err := t.call(ctx, name, nr, a)
	if err != nil {
		return 0, err
	}
	if r < 0 && r >= lowestKernelErr {
		return 0, unix.Errno(-r)
	}
	return uintptr(r), nil
}

// Scratch is memory of the target that is the session's own: its address there
// and its size in bytes. It is gone after Close.
func (s *Session) Scratch() (addr uint64, n int) { return s.t.l.scratch, scratchBytes }

// Write puts b at an address of the target's memory.
func (s *Session) Write(addr uint64, b []byte) error {
	if _, err := s.t.mem.WriteAt(b, int64(addr)); err != nil {
		return problem.New(problem.Failed, "inject", pidObject(s.t.pid), "write %d bytes at %#x: %w", len(b), addr, err)
	}
	return nil
}

// Read fills b from an address of the target's memory.
func (s *Session) Read(addr uint64, b []byte) error {
	if _, err := s.t.mem.ReadAt(b, int64(addr)); err != nil {
		return problem.New(problem.Failed, "inject", pidObject(s.t.pid), "read %d bytes at %#x: %w", len(b), addr, err)
	}
	return nil
}

// TID is the thread that is held.
func (s *Session) TID() int { return s.t.tid }

// Stopped is how long the thread was held, from the attach to the detach; 0
// before Close.
func (s *Session) Stopped() time.Duration { return s.t.duration }

// Close lets the thread go, exactly as it was. It may be called again.
func (s *Session) Close() error {
	var err error
	s.do(func() { err = s.leave() })
	s.join()
	s.t.mem.Close()
	return err
}
