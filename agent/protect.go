package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/controller"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/plugins"
	"github.com/ckagent/ckagent/plugins/policy"
)

// MinInterval is the least time between two attempts, whatever a policy says.
const MinInterval = 100 * time.Millisecond

// Members of a group are let go if it is not heard of: armed memory costs the guest,
// and a guest that stands still costs more.
const (
	preparedLimit = 10 * time.Second
	heldLimit     = 100 * time.Millisecond
)

// Protection says who decides about checkpoints, and within which bounds.
type Protection struct {
	Slot     *plugins.Slot
	KeepLast int
	// Capture is how they are taken. What it leaves to us a policy may choose: mode
	// and engine "auto", and the compression if Compressions names any.
	Capture      capture.Options
	Compressions []string
	// Enter waits for a turn on this host, which leave gives back; nil: there is always one.
	Enter   func(ctx context.Context) (leave func(), err error)
	OnDeath controller.OnDeath
	// Proven: the VM has had a checkpoint under an earlier protection, so that a refusal
	// is of a passing state.
	Proven bool
	// Measure adds what is known of the VM from outside to the signals; nil: nothing is.
	Measure func(*policy.Signals)
	// Asked is told what the policy is, each time it is asked; nil: nobody is.
	Asked func(*policy.Signals)
	// Died is told how the VM ended, unless OnDeath is Nothing. Revive brings a crashed
	// VM back and returns its new process; it is needed for OnDeath Restore.
	Died   func(*apipb.Ending)
	Revive func(ctx context.Context) (pid int, err error)
	// Taken is told about each checkpoint, Failed about each that did not succeed
	// and will be tried again, Decided about each decision that is not the one
	// before it.
	Taken   func(*capture.Result)
	Failed  func(error)
	Decided func(plugins.Verdict)
}

// Protector takes checkpoints of one VM when its policy wants them: it carries out what
// package controller says. Run is its one goroutine; the other methods may be called by
// any.
type Protector struct {
	v  *VM
	st *store.Store
	p  Protection

	machine  image.Machine // as it was at the beginning
	gentlest capture.Mode  // what mode auto comes to

	merger merger

	inbox chan note     // what happened, for Run
	done  chan struct{} // closed when Run has returned

	mu       sync.Mutex
	record   record
	verdict  plugins.Verdict
	made     time.Time // the verdict
	interval time.Duration
	state    controller.State
	due      time.Time     // the checkpoint; zero: none until asked again
	ending   *apipb.Ending // how the VM ended; nil: it has not
	heir     int           // the process it was brought back as; 0: it was not
	number   uint64        // of the last order
	orders   map[uint64]*order
}

// note is an event on its way to Run. One that belongs to a turn is void when that turn
// is over.
type note struct {
	event controller.Event
	of    *turn
}

// order is an operator's wish for a checkpoint.
type order struct {
	progress func(capture.Event)
	answer   chan answer // has room for it
}

type answer struct {
	res *capture.Result
	err error
}

// Protect makes the protector of a VM that was just attached to, and which it has from
// then on.
func (v *VM) Protect(st *store.Store, p Protection) *Protector {
	gentlest, _, _ := capture.Choose(context.Background(), v.target, capture.Options{})
	v.witness.wanted = p.OnDeath == controller.Restore
	return &Protector{v: v, st: st, p: p, machine: v.machine, gentlest: gentlest, inbox: make(chan note, 64),
		done: make(chan struct{}), orders: map[uint64]*order{}, record: record{since: time.Now()}}
}

// Run takes checkpoints until ctx ends, the VM does, or Detach is called. A failed
// checkpoint is reported and the policy says when it is tried again; only what can
// never succeed ends it. A refusal counts as that before the first success: later
// ones are of a VM that can be protected, and pass (a backup job, a debugger, a
// migration, memory that is short).
func (p *Protector) Run(ctx context.Context) error {
	defer close(p.done)
	defer p.merger.stop()
	d := newDriver(ctx, p)
	defer d.join()
	return d.run(ctx)
}

// tell has Run hear of an event.
func (p *Protector) tell(ctx context.Context, op string, e controller.Event) error {
	select {
	case p.inbox <- note{event: e}:
		return nil
	case <-p.done:
		return p.ended(op)
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *Protector) ended(op string) error {
	return problem.New(problem.NotFound, op, "VM "+p.v.Name, "its protection has ended")
}

// Checkpoint takes one now, or after the one that is being taken. problem.Busy if somebody
// waits for that already.
func (p *Protector) Checkpoint(ctx context.Context, progress func(capture.Event)) (*capture.Result, error) {
	const op = "checkpoint"
	o := &order{progress: progress, answer: make(chan answer, 1)}
	p.mu.Lock()
	p.number++
	number := p.number
	p.orders[number] = o
	p.mu.Unlock()
	defer func() {
		p.mu.Lock()
		delete(p.orders, number)
		p.mu.Unlock()
	}()
	if err := p.tell(ctx, op, controller.Ordered{Order: number}); err != nil {
		return nil, err
	}
	select { // once taken up it is finished: whoever asked may have gone
	case a := <-o.answer:
		return a.res, a.err
	case <-p.done:
		select {
		case a := <-o.answer:
			return a.res, a.err
		default:
			return nil, p.ended(op)
		}
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// order is an operator's; nil if he has gone.
func (p *Protector) order(number uint64) *order {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.orders[number]
}

// SetPolicy replaces the policy; the one before it stays if that fails.
func (p *Protector) SetPolicy(ctx context.Context, ref string, params map[string]string) (plugins.Verdict, error) {
	return p.p.Slot.Set(ctx, ref, params, p.signals())
}

// InsistOnPolicy is SetPolicy for one that was in charge before: what does not come up now
// is tried again, and the fallback decides meanwhile.
func (p *Protector) InsistOnPolicy(ctx context.Context, ref string, params map[string]string) {
	p.p.Slot.Insist(ctx, ref, params, p.signals())
}

// Cancel gives up the checkpoint that is being taken or waits for its turn, if one is.
func (p *Protector) Cancel(ctx context.Context) (bool, error) {
	p.mu.Lock()
	state := p.state
	p.mu.Unlock()
	if state != controller.Queued && !state.UnderWay() {
		return false, nil
	}
	return true, p.tell(ctx, "cancel", controller.CancelWanted{})
}

// Detach ends Run, and returns when it has.
func (p *Protector) Detach(ctx context.Context) error {
	if err := p.tell(ctx, "detach", controller.DetachWanted{}); err != nil && !problem.Is(err, problem.NotFound) {
		return err
	}
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Ending is how the VM ended; nil while it has not.
func (p *Protector) Ending() *apipb.Ending {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ending
}

// Successor is the process that the VM was brought back as; 0: none.
func (p *Protector) Successor() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.heir
}

// retainTimeout is how long the store may keep us from ending.
const retainTimeout = 30 * time.Second

// Retain drops a VM's checkpoints beyond the count after a new one was taken. An
// interrupt does not end it: coming between the two it would leave one more than
// were asked for.
func Retain(ctx context.Context, st *store.Store, name string, keepLast int) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), retainTimeout)
	defer cancel()
	_, err := st.ApplyRetention(ctx, name, keepLast)
	return err
}

// classOf says what an attempt's error means for the next one. That the VM has ended is
// not for an error to say.
func classOf(ctx context.Context, err error) controller.Failure {
	switch {
	case ctx.Err() != nil || errors.Is(err, context.Canceled):
		return controller.Given
	case problem.Is(err, problem.Usage):
		return controller.Senseless
	case problem.Is(err, problem.Refused):
		return controller.Forbidden
	}
	return controller.Passing
}
