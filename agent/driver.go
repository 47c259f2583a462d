package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/controller"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/plugins/policy"
)

// driver carries out what a controller.Machine says. Its fields belong to the goroutine
// of Protector.Run; what takes long is done by workers, which join waits for and which
// report by notes.
type driver struct {
	*Protector
	m      *controller.Machine
	out    []controller.Command // to be carried out
	ctx    context.Context      // of the workers; ends with over
	over   context.CancelFunc
	wg     sync.WaitGroup
	turn   *turn // queued or under way; nil: none
	before *policy.Decision

	stopping bool
	missed   error // the attempt that failed just now, until it was told
	why      controller.Reason
}

// turn is the host's for one checkpoint.
type turn struct {
	ctx    context.Context // ends when the turn is given back
	leave  context.CancelFunc
	giveUp context.CancelFunc // of the checkpoint; nil before it began
	// What became of it: written by its worker, which then sends the note by which Run
	// learns that it may read them.
	res *capture.Result
	err error
}

func newDriver(ctx context.Context, p *Protector) *driver {
	d := &driver{Protector: p}
	d.ctx, d.over = context.WithCancel(context.WithoutCancel(ctx))
	d.m, d.out = controller.New(controller.Config{MinInterval: MinInterval, PreparedLimit: preparedLimit, HeldLimit: heldLimit,
		OnDeath: p.p.OnDeath, Proven: p.p.Proven, Revivals: revivals}, time.Now())
	return d
}

func (d *driver) join() {
	d.over()
	d.wg.Wait()
}

// run returns when the machine has let the VM go.
func (d *driver) run(ctx context.Context) error {
	interrupted, died := ctx.Done(), d.v.Ended()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		d.carryOut()
		d.mu.Lock()
		d.state, d.due = d.m.State(), d.m.Due()
		d.mu.Unlock()
		if d.m.State().Final() {
			return d.result(ctx)
		}
		var wake <-chan time.Time
		if at := d.m.Wake(); !at.IsZero() {
			timer.Reset(time.Until(at))
			wake = timer.C
		}
		var e controller.Event
		select {
		case n := <-d.inbox:
			if n.of != nil && n.of != d.turn {
				continue
			}
			e = n.event
		case <-interrupted:
			interrupted, d.stopping = nil, true
			e = controller.Stopping{}
		case <-died:
			died = nil
			d.wg.Go(d.examine)
			continue
		case <-d.p.Slot.Changes():
			e = controller.PolicyChanged{}
		case <-wake:
			e = controller.Tick{}
		}
		d.out = d.m.Step(time.Now(), e)
	}
}

// result is what Run returns.
func (d *driver) result(ctx context.Context) error {
	switch d.why {
	case controller.Detached:
		return nil
	case controller.Suspended:
		return errors.Join(ctx.Err(), d.missed)
	case controller.Hopeless:
		return d.missed
	case controller.BroughtBack:
		return nil
	default:
		return problem.New(problem.NotFound, "protect", "VM "+d.v.Name, "its QEMU process has ended: %s", d.Ending().GetDetail()).
			WithHint("ckagent restore %s brings its last checkpoint back", d.v.Name)
	}
}

// send reports to Run from a worker.
func (d *driver) send(of *turn, e controller.Event) {
	select {
	case d.inbox <- note{e, of}:
	case <-d.ctx.Done():
	}
}

func (d *driver) carryOut() {
	for _, c := range d.out {
		switch c := c.(type) {
		case controller.Ask:
			d.wg.Go(d.ask)
		case controller.Enqueue:
			d.enqueue()
		case controller.Leave:
			d.turn.leave()
			d.turn = nil
		case controller.Take:
			t, o := d.turn, d.Protector.order(c.Order)
			ctx, cancel := context.WithCancel(t.ctx)
			t.giveUp = cancel
			before := d.before
			d.wg.Go(func() { d.take(ctx, t, before, o) })
		case controller.GiveUp:
			d.turn.giveUp()
		case controller.Retain:
			t, keep := d.turn, d.before.GetKeep()
			d.wg.Go(func() { d.retain(t, int(keep)) })
		case controller.Answer:
			d.answer(c)
		case controller.Report:
			d.report(c.Outcome)
		case controller.LetGo:
			d.why = c.Why
		case controller.SuspendNow, controller.ResumeNow, controller.Say:
			// Of members of groups alone, and nothing here sends what makes one.
		case controller.Announce:
			if d.p.Died != nil {
				d.p.Died(d.Ending())
			}
		case controller.Revive:
			d.wg.Go(d.revive)
		}
	}
	d.out = nil
	if d.missed != nil && !d.m.State().Final() {
		d.p.Failed(d.missed)
		d.missed = nil
	}
}

// ask asks the policy.
func (d *driver) ask() {
	s := d.signals()
	if d.p.Asked != nil {
		d.p.Asked(s)
	}
	v := d.p.Slot.Decide(d.ctx, s)
	if d.ctx.Err() != nil {
		return // nobody acts on it
	}
	d.mu.Lock()
	same := d.verdict.Decision.GetReason() == v.Decision.GetReason() && d.verdict.Generation == v.Generation && d.verdict.Source == v.Source
	d.verdict, d.made = v, time.Now()
	d.interval = time.Duration(v.Decision.GetIntervalNs())
	d.mu.Unlock()
	if !same {
		d.p.Decided(v)
	}
	d.send(nil, eventOf(v.Decision, s, time.Now()))
}

// idleLook is the time between two looks for an idle slot that is waited for: as often as
// the signals are of another instant.
const idleLook = time.Second

// eventOf is a decision on these signals as the controller takes it. A slot is waited for by
// asking again: a policy that wants one says so as long as it has not come.
//
// A policy says by the wall clock of now when something is to be done; what it means is how
// long from now, and that is not to change when the clock is set.
func eventOf(d *policy.Decision, s *policy.Signals, now time.Time) controller.Decided {
	at := func(ns int64) time.Time { return now.Add(time.Duration(ns - now.UnixNano())) }
	var e controller.Decided
	switch {
	case d.GetNow():
		e.At = now
	case d.GetAtNs() != 0:
		e.At = at(d.GetAtNs())
	case d.GetIdleSlot() != nil:
		from, until := at(d.GetIdleSlot().GetNotBeforeNs()), at(d.GetIdleSlot().GetDeadlineNs())
		switch early := now.Before(from); {
		case !early && s.GetNetwork().GetIdle() && s.GetCpu().GetIdle():
			e.At = now
		case early:
			e.At, e.Again = until, from
		default:
			e.At, e.Again = until, now.Add(idleLook)
		}
	}
	if ask := at(d.GetAskAgainNs()); d.GetAskAgainNs() != 0 && (e.Again.IsZero() || ask.Before(e.Again)) {
		e.Again = ask
	}
	return e
}

// revivals are the waits before the tries to bring a crashed VM back that follow the first.
var revivals = []time.Duration{time.Second, 10 * time.Second, time.Minute}

// examine finds out how the VM ended.
func (d *driver) examine() {
	how, detail := d.v.autopsy(d.ctx)
	d.mu.Lock()
	d.ending = &apipb.Ending{How: how.String(), Detail: detail, AtNs: time.Now().UnixNano()}
	d.mu.Unlock()
	d.send(nil, controller.Died{How: how})
}

// revive brings the VM back.
func (d *driver) revive() {
	err := d.v.lock.Close() // whoever restores has to see that nobody works on the dead one
	pid := 0
	if err == nil {
		pid, err = d.p.Revive(d.ctx)
	}
	if err != nil {
		d.p.Failed(problem.New(problem.CodeOf(err), "restore", "VM "+d.v.Name, "%w", err))
		d.send(nil, controller.Restored{OK: false})
		return
	}
	d.mu.Lock()
	d.heir = pid
	d.mu.Unlock()
	d.send(nil, controller.Restored{OK: true})
}

// enqueue waits for a turn, and holds it until it is given back.
func (d *driver) enqueue() {
	t := &turn{}
	t.ctx, t.leave = context.WithCancel(d.ctx)
	d.turn = t
	d.mu.Lock()
	d.before = d.verdict.Decision
	d.mu.Unlock()
	if d.p.Enter == nil {
		d.wg.Go(func() { d.send(t, controller.Admitted{}) })
		return
	}
	d.wg.Go(func() {
		leave, err := d.p.Enter(t.ctx)
		if err != nil {
			return // it was given back while it was waited for
		}
		defer leave()
		d.send(t, controller.Admitted{})
		<-t.ctx.Done()
	})
}

// steps are what progress means for the controller.
var steps = map[string]controller.Event{
	"prearm": controller.Armed{}, "stop": controller.Stopped{}, "resume": controller.Resumed{}, "retake": controller.Retaken{},
}

// take takes one checkpoint as decided, and gives the monitor back.
func (d *driver) take(ctx context.Context, t *turn, decision *policy.Decision, o *order) {
	defer t.giveUp()
	began := time.Now()
	opts := chosen(d.p.Capture, decision)
	own := opts.Progress
	opts.Progress = func(e capture.Event) {
		if step, known := steps[e.Step]; known {
			select { // with the VM about to stand still, nobody is waited for
			case d.inbox <- note{step, t}:
			default:
			}
		}
		if o != nil && o.progress != nil {
			o.progress(e)
		}
		if own != nil {
			own(e)
		}
	}
	d.mu.Lock()
	d.record.attempted = began
	d.mu.Unlock()
	res, err := d.v.Checkpoint(ctx, d.st, opts)
	d.mu.Lock()
	d.record.add(res, err, string(opts.Mode))
	d.mu.Unlock()
	t.res, t.err = res, errors.Join(err, d.v.Rest())
	if err != nil {
		d.send(t, controller.Failed{Class: classOf(ctx, err)})
		return
	}
	d.send(t, controller.Taken{})
}

// chosen are the options with what the operator leaves to the policy. Mode auto is mode
// cow where that is offered, and knows what to do if it fails.
func chosen(o capture.Options, d *policy.Decision) capture.Options {
	if m := d.GetMode(); m != "" && m != string(capture.COW) && o.Mode == capture.Auto {
		o.Mode = capture.Mode(m)
	}
	if e := d.GetEngine(); e != "" && o.Engine == capture.EngineAuto {
		o.Engine = capture.Engine(e)
	}
	if c := d.GetCompression(); c != "" {
		o.Compress = c
	}
	return o
}

// retain drops what is beyond the count; the policy may have raised it.
func (d *driver) retain(t *turn, keep int) {
	if d.p.KeepLast > 0 {
		t.err = errors.Join(t.err, Retain(t.ctx, d.st, d.v.Name, max(d.p.KeepLast, keep)))
	}
	d.send(t, controller.Retained{})
}

func (d *driver) answer(c controller.Answer) {
	o := d.Protector.order(c.Order)
	if o == nil {
		return
	}
	object := "VM " + d.v.Name
	switch c.Outcome {
	case controller.Exists:
		o.answer <- answer{d.turn.res, d.turn.err}
	case controller.Missed:
		err := d.turn.err
		if err == nil {
			err = problem.New(problem.Cancelled, "checkpoint", object, "given up before its turn came")
		}
		o.answer <- answer{nil, err}
	case controller.Occupied:
		o.answer <- answer{nil, problem.New(problem.Busy, "checkpoint", object, "one is being taken, and another was ordered")}
	case controller.Over:
		o.answer <- answer{nil, d.ended("checkpoint")}
	}
}

// report tells of a checkpoint. A failure that ends everything is Run's to return.
func (d *driver) report(o controller.Outcome) {
	if o != controller.Exists {
		d.missed = d.turn.err
		return
	}
	d.p.Taken(d.turn.res)
	c := &d.p.Capture
	d.merger.after(d.st, d.turn.res.Manifest, c.FullEvery, c.Compress, d.p.Failed)
	if d.turn.err != nil {
		d.p.Failed(d.turn.err) // older ones are still there
	}
}
