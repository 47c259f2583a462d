package capture

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/guardian"
	"github.com/ckagent/ckagent/agent/heartbeat"
	"github.com/ckagent/ckagent/agent/problem"
)

// watch is everything that keeps the VM safe while we hold it: the control page,
// the guardian, our own heartbeat, and in mode cow the fault server. It is the
// pause's journal.
type watch struct {
	control *guardian.Control
	page    *os.File
	guard   *guardian.Guardian
	cow     *cow // nil in other modes
	s       *session

	beat *heartbeat.Heart
}

// startWatch starts the helper processes. Nothing has been done to the VM yet.
func startWatch(ctx context.Context, s *session) (w *watch, err error) {
	w = &watch{s: s}
	defer func() {
		if err != nil {
			err = errors.Join(err, w.close(ctx))
		}
	}()
	fail := func(err error) error {
		return problem.New(problem.Failed, "start the watch", s.object, "%w", err)
	}
	if w.control, w.page, err = guardian.CreateControl(); err != nil {
		return w, fail(err)
	}
	serverPID := 0
	if s.mode == COW {
		if w.cow, err = startCOW(s, w.page); err != nil {
			return w, err
		}
		serverPID = w.cow.srv.PID()
	}
	socket, err := s.target.QMP.DupFile()
	if err != nil {
		return w, fail(err)
	}
	if socket != nil { // else the guardian finds a way of its own
		defer socket.Close()
	}
	w.guard, err = guardian.Start(ctx, guardian.Config{
		Self: s.o.Helper[0], Args: append(s.o.Helper[1:len(s.o.Helper):len(s.o.Helper)], guardian.Verb),
		Control: w.page, QEMU: s.target.Process, QMP: socket, Endpoint: s.target.Endpoint,
		Lock: s.sub.Lock, FaultServerPID: serverPID, ServerStall: max(s.o.MaxStall, guardian.DefaultServerStall),
		Stderr: os.Stderr,
	})
	if err != nil {
		return w, err
	}
	w.control.BeatAgent()
	if w.beat, err = heartbeat.Start(guardian.BeatEvery, w.control.BeatAgent); err != nil {
		return w, fail(err)
	}
	w.control.Engaged.Store(1)
	return w, nil
}

// healthy refuses to stop a VM that nobody could resume for us.
func (w *watch) healthy() error { return w.guard.Check() }

// Stopping and Resumed are the pause's journal. The order of the two stores
// matters to whoever reads them in between: Stopped means something only with
// Running.
func (w *watch) Stopping() {
	w.control.Running.Store(1)
	w.control.Stopped.Store(1)
}

func (w *watch) Resumed() {
	w.control.Stopped.Store(0)
	w.control.Running.Store(0)
}

// explain adds what only the guardian knows to a failure.
func (w *watch) explain(s *session, err error) error {
	if err == nil || guardian.Acted(w.control.GuardianActed.Load()) != guardian.ServerKilled {
		return err
	}
	return problem.New(problem.Busy, "capture RAM", s.object, "the fault server gave no sign of life and was ended: %w", err).
		WithHint("the host is overloaded; take it again")
}

// mend resumes a VM that the pause had to leave behind because the monitor was
// lost or did not answer. The guardian still watches meanwhile. The connection is
// out of step at best, so a new one is made.
func (w *watch) mend(ctx context.Context) error {
	_ = w.s.target.QMP.Close() // lost as it is
	return guardian.Resume(ctx, w.control, w.s.target.Process, w.s.target.Endpoint)
}

// close ends the helpers. What might still be armed is released first, and while
// the guardian watches.
func (w *watch) close(ctx context.Context) error {
	ctx = context.WithoutCancel(ctx)
	var errs []error
	if w.cow != nil {
		errs = append(errs, w.cow.srv.Close())
	}
	if w.control != nil && w.control.SigStopped.Load() != 0 {
		// The server has done it, unless it died. A process that has ended waits for
		// nothing.
		_ = unix.PidfdSendSignal(int(w.s.target.Process.PidFD().Fd()), unix.SIGCONT, nil, 0)
		w.control.SigStopped.Store(0)
	}
	if w.control != nil && (w.control.Stopped.Load() != 0 || w.s.target.QMP.Err() != nil) {
		// Also where nothing is stopped: a descriptor that QEMU was lent over the
		// lost connection stays there while another monitor is connected.
		errs = append(errs, w.mend(ctx))
	}
	if w.control != nil {
		w.control.Engaged.Store(0)
	}
	if w.beat != nil {
		errs = append(errs, w.beat.Stop())
	}
	if w.guard != nil {
		errs = append(errs, w.guard.Stop(ctx))
	}
	if w.control != nil {
		errs = append(errs, w.control.Close(), w.page.Close())
	}
	return errors.Join(errs...)
}
