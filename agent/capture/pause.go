package capture

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
)

// journal is where the pause is written down before it happens, so that somebody
// else can end it if we cannot.
type journal interface {
	Stopping() // a running VM is about to be stopped by us
	Resumed()  // it runs again, or we never stopped it
}

// pause stops the VM for one instant. Everything it needs is prepared before:
// the commands are encoded, the device state has a file to go to, the events are
// subscribed to.
type pause struct {
	q                *qmp.Client
	stop, save, cont *qmp.Request
	events           *qmp.Subscription
	journal          journal
	state            *os.File // memfd with the device state
	fdset            int      // that lends QEMU the state, -1: none
	named            bool     // it is lent by name
	object           string
	running          bool // the VM ran when this was prepared
	// disks are further commands for QEMU to carry out after saving the state, and
	// confirm takes their replies.
	disks   []*qmp.Request
	confirm func(context.Context, []*qmp.Call) error
}

// Timing is what a pause took.
type Timing struct {
	PauseNS       int64 // STOP event to RESUME event, by QEMU's clock; 0 if the VM was paused before
	StopNS        int64 // sending stop to the STOP event
	DeviceStateNS int64 // STOP event to the device state's reply, the disks' flush between them included
	InsideNS      int64 // what the mode did
	DisksNS       int64 // what fixing the disks' instant took beyond that
	ContNS        int64 // sending cont to its reply
	At            time.Time
	WasRunning    bool // and so was resumed
}

const (
	resumeTimeout = 5 * time.Second  // for cont, which must not depend on a cancelled context
	stopTimeout   = 30 * time.Second // for stop, with its flush of the disks, and the device state
)

// newPause prepares. The caller closes it.
func newPause(ctx context.Context, q *qmp.Client, proc *vm.Process, object string, j journal) (p *pause, err error) {
	p = &pause{q: q, journal: j, fdset: -1, object: object}
	defer func() {
		if err != nil {
			err = errors.Join(err, p.close(ctx))
		}
	}()
	fd, err := unix.MemfdCreate("ckagent-device-state", unix.MFD_CLOEXEC)
	if err != nil {
		return p, fmt.Errorf("memory for the device state: %w", err)
	}
	p.state = os.NewFile(uintptr(fd), "device state")
	name, err := p.lend(ctx, proc)
	if err != nil {
		return p, err
	}
	if p.stop, err = qmp.Encode("stop", nil); err != nil {
		return p, err
	}
	if p.cont, err = qmp.Encode("cont", nil); err != nil {
		return p, err
	}
	// live:false, or the image locks would be dropped.
	p.save, err = qmp.Encode("xen-save-devices-state",
		map[string]any{"filename": name, "live": false})
	if err != nil {
		return p, err
	}
	p.events = q.Subscribe(64, "STOP", "RESUME", "RESET")
	var status struct {
		Running bool `json:"running"`
	}
	if err := q.Execute(ctx, "query-status", nil, &status); err != nil {
		return p, err
	}
	p.running = status.Running
	return p, nil
}

func (p *pause) close(ctx context.Context) error {
	var errs []error
	if p.events != nil {
		p.events.Close()
	}
	errs = append(errs, p.takeBack(ctx))
	if p.state != nil {
		errs = append(errs, p.state.Close())
	}
	return errors.Join(errs...)
}

// run stops the VM, saves the device state, calls inside, and lets the VM run
// again if it ran before. A VM that somebody else had paused stays paused.
func (p *pause) run(ctx context.Context, inside func(context.Context) error) (tm Timing, err error) {
	for len(p.events.C()) > 0 {
		<-p.events.C()
	}
	if err := p.state.Truncate(0); err != nil {
		return tm, err
	}
	asked, cancel := context.WithTimeout(ctx, stopTimeout)
	defer cancel()
	begin := time.Now()
	tm.At = begin.UTC()
	if p.running {
		// Not otherwise: who ends the pause for us must not resume a VM that
		// somebody else had paused.
		p.journal.Stopping()
	}
	// All in one write: QEMU works on the disks while we freeze RAM.
	calls, err := p.q.Send(append([]*qmp.Request{p.stop, p.save}, p.disks...)...)
	if err != nil {
		// Part of it may be on the wire: resume says whether there is anything
		// to put right.
		return tm, errors.Join(p.failed("stop", err), p.resume(ctx, &tm, true))
	}
	err = calls[0].Wait(asked, nil)
	if err != nil {
		return tm, errors.Join(p.failed("stop", err), p.resume(ctx, &tm, true))
	}
	stopped := calls[0].Done()
	// QEMU announces STOP before it answers. No announcement: somebody else had
	// stopped it, and it is not ours to resume.
	stopEvent, ours := p.event("STOP")
	if tm.WasRunning = ours; ours {
		if !p.running { // resumed by somebody since
			p.journal.Stopping()
		}
		// The two replies often arrive in one read, so the event's own time tells
		// when the machine stood still.
		stopped = begin.Add(stopEvent.Timestamp.Sub(begin))
		tm.StopNS = max(0, stopped.Sub(begin).Nanoseconds())
	} else {
		p.journal.Resumed()
	}
	if err = calls[1].Wait(asked, nil); err != nil {
		err = p.failed("save the device state", err)
	} else {
		saved := calls[1].Done()
		tm.DeviceStateNS = saved.Sub(stopped).Nanoseconds()
		err = inside(ctx)
		tm.InsideNS = time.Since(saved).Nanoseconds()
		if len(p.disks) > 0 {
			frozen := time.Now()
			err = errors.Join(err, p.confirm(asked, calls[2:]))
			tm.DisksNS = time.Since(frozen).Nanoseconds()
		}
	}
	if !ours {
		return tm, err
	}
	// Whoever has let the machine run or stopped it again meanwhile wins: it stays
	// as they left it. A stop alone cannot be seen, since it does nothing to a
	// machine that stands still.
	var c course
	if p.follow(&c); c.turns > 0 {
		p.journal.Resumed()
		return tm, errors.Join(err, p.meddled("let the VM run"))
	}
	err = errors.Join(err, p.resume(ctx, &tm, false))
	if p.follow(&c); c.turns == 0 {
		if e, ok := p.awaitEvent(ctx, "RESUME"); ok {
			c.note(e)
		}
	}
	if c.turns > 0 {
		tm.PauseNS = c.resumed.Timestamp.Sub(stopEvent.Timestamp).Nanoseconds()
	}
	if err == nil && c.reset {
		err = p.meddled("reset the VM")
	}
	return tm, err
}

// course is what became of the machine after it was stopped, as events tell.
type course struct {
	turns   int       // how often it was let run or stopped
	resumed qmp.Event // the first time it was let run
	reset   bool      // before that
}

func (c *course) note(e qmp.Event) {
	switch e.Name {
	case "RESET":
		c.reset = c.reset || c.turns == 0
		return
	case "RESUME":
		if c.turns == 0 {
			c.resumed = e
		}
	}
	c.turns++
}

// follow takes in the events that have arrived.
func (p *pause) follow(c *course) {
	for {
		select {
		case e, open := <-p.events.C():
			if !open {
				return
			}
			c.note(e)
		default:
			return
		}
	}
}

// meddled is the end of a checkpoint whose instant somebody else broke.
func (p *pause) meddled(what string) error {
	return problem.New(problem.Busy, "checkpoint", p.object, "somebody else %s while it was stopped for this", what).
		WithHint("nothing was changed about what they did; take it again")
}

// resume sends cont. With check, it is not known whether QEMU stopped at all, or
// whether it was us who stopped it; then the journal stays as it is if QEMU does
// not answer, and the guardian decides.
func (p *pause) resume(ctx context.Context, tm *Timing, check bool) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), resumeTimeout)
	defer cancel()
	if check {
		if _, ours := p.event("STOP"); !ours {
			var status struct {
				Running bool `json:"running"`
			}
			if err := p.q.Execute(ctx, "query-status", nil, &status); err != nil {
				return p.failed("resume", err)
			}
			if _, ours := p.event("STOP"); status.Running || !ours {
				p.journal.Resumed()
				return nil
			}
		}
	}
	begin := time.Now()
	calls, err := p.q.Send(p.cont)
	if err == nil {
		err = calls[0].Wait(ctx, nil)
	}
	if qmp.IsManagerPaused(err) {
		p.journal.Resumed() // it is not ours any more
		return p.meddled("paused the VM")
	}
	if err != nil {
		return p.failed("resume", err)
	}
	p.journal.Resumed()
	tm.ContNS = calls[0].Done().Sub(begin).Nanoseconds()
	return nil
}

func (p *pause) failed(op string, err error) error {
	code := problem.CodeOf(err)
	if errors.Is(err, context.Canceled) {
		code = problem.Cancelled
	}
	return problem.New(code, op, p.object, "%w", err)
}

// event takes the first event of this name that has arrived.
func (p *pause) event(name string) (qmp.Event, bool) {
	for {
		select {
		case e, open := <-p.events.C():
			if !open {
				return qmp.Event{}, false
			}
			if e.Name == name {
				return e, true
			}
		default:
			return qmp.Event{}, false
		}
	}
}

// awaitEvent waits for the next event of this name.
func (p *pause) awaitEvent(ctx context.Context, name string) (qmp.Event, bool) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
	defer cancel()
	for {
		select {
		case e, open := <-p.events.C():
			if !open {
				return qmp.Event{}, false
			}
			if e.Name == name {
				return e, true
			}
		case <-ctx.Done():
			return qmp.Event{}, false
		}
	}
}
