package agent

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/plugins"
	"github.com/ckagent/ckagent/plugins/policy"
)

// MinInterval is the least time between two attempts, whatever a policy says.
const MinInterval = 100 * time.Millisecond

// Protection says who decides about checkpoints, and within which bounds.
type Protection struct {
	Slot     *plugins.Slot
	KeepLast int
	// Capture is how they are taken. What it leaves to us a policy may choose: mode
	// and engine "auto", and the compression if Compressions names any.
	Capture      capture.Options
	Compressions []string
	// Taken is told about each checkpoint, Failed about each that did not succeed
	// and will be tried again, Decided about each decision that is not the one
	// before it.
	Taken   func(*capture.Result)
	Failed  func(error)
	Decided func(plugins.Verdict)
}

// Protector takes checkpoints of one VM when its policy wants them. Run is its one
// goroutine; the other methods may be called by any.
type Protector struct {
	v  *VM
	st *store.Store
	p  Protection

	machine  image.Machine // as it was at the beginning
	gentlest capture.Mode  // what mode auto comes to

	ask    chan *order // a checkpoint now
	detach chan struct{}
	once   sync.Once // closes detach
	done   chan struct{}

	mu       sync.Mutex
	record   record
	verdict  plugins.Verdict
	made     time.Time // the verdict
	next     time.Time // the checkpoint; zero: none until asked again
	interval time.Duration
	cancel   context.CancelFunc // of the checkpoint that is being taken; nil: none is
	proven   bool
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
	gentlest, _, _ := capture.Choose(v.target.Blocks)
	return &Protector{v: v, st: st, p: p, machine: v.machine, gentlest: gentlest, ask: make(chan *order),
		detach: make(chan struct{}), done: make(chan struct{}), record: record{since: time.Now()}}
}

// Run takes checkpoints until ctx ends, the VM does, or Detach is called. A failed
// checkpoint is reported and the policy says when it is tried again; only what can
// never succeed ends it. A refusal counts as that before the first success: later
// ones are of a VM that can be protected, and pass (a backup job, a debugger, a
// migration, memory that is short).
func (p *Protector) Run(ctx context.Context) error {
	defer close(p.done)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	defer wg.Wait()
	defer close(stop)
	wg.Go(func() { // a checkpoint under way is given up as well
		select {
		case <-p.detach:
			cancel(errDetached)
		case <-stop:
		}
	})
	for {
		decision := p.decide(ctx)
		err := p.await(ctx, decision)
		if errors.Is(context.Cause(ctx), errDetached) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

var errDetached = errors.New("detached")

// await waits for what comes first: the time of the checkpoint, which it takes, that
// of another decision, or somebody's wish.
func (p *Protector) await(ctx context.Context, d *policy.Decision) error {
	wake, take := p.schedule(d)
	timer := time.NewTimer(time.Until(wake))
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-p.v.Ended():
		return problem.New(problem.NotFound, "protect", "VM "+p.v.Name, "its QEMU process has ended").
			WithHint("ckagent restore %s brings its last checkpoint back", p.v.Name)
	case <-p.p.Slot.Changes():
		return nil // somebody else decides from now on
	case o := <-p.ask:
		res, err := p.turn(ctx, d, o.progress)
		o.answer <- answer{res, err}
		return p.judge(ctx, err)
	case <-timer.C:
	}
	if !take {
		return nil
	}
	_, err := p.turn(ctx, d, nil)
	return p.judge(ctx, err)
}

// schedule says when to wake up for a decision, and whether to take a checkpoint then.
func (p *Protector) schedule(d *policy.Decision) (wake time.Time, take bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	earliest := now
	if at := p.record.attempted; !at.IsZero() {
		earliest = at.Add(MinInterval)
	}
	p.next, p.interval = time.Time{}, time.Duration(d.GetIntervalNs())
	switch {
	case d.GetNow():
		p.next = now
	case d.GetAtNs() != 0:
		p.next = time.Unix(0, d.GetAtNs())
	case d.GetIdleSlot() != nil: // not offered, so never asked for; the deadline holds
		p.next = time.Unix(0, d.GetIdleSlot().GetDeadlineNs())
	}
	if !p.next.IsZero() && p.next.Before(earliest) {
		p.next = earliest
	}
	ask := time.Unix(0, d.GetAskAgainNs())
	if d.GetAskAgainNs() != 0 && ask.Before(now.Add(MinInterval)) {
		ask = now.Add(MinInterval)
	}
	if p.next.IsZero() || d.GetAskAgainNs() != 0 && ask.Before(p.next) {
		return ask, false
	}
	return p.next, true
}

// decide asks the policy.
func (p *Protector) decide(ctx context.Context) *policy.Decision {
	v := p.p.Slot.Decide(ctx, p.signals())
	p.decided(v)
	return v.Decision
}

func (p *Protector) decided(v plugins.Verdict) {
	p.mu.Lock()
	same := p.verdict.Decision.GetReason() == v.Decision.GetReason() && p.verdict.Generation == v.Generation && p.verdict.Source == v.Source
	p.verdict, p.made = v, time.Now()
	p.mu.Unlock()
	if !same {
		p.p.Decided(v)
	}
}

// judge says whether an attempt's error ends the protection.
func (p *Protector) judge(ctx context.Context, err error) error {
	p.mu.Lock()
	proven := p.proven
	p.proven = proven || err == nil
	p.mu.Unlock()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return errors.Join(ctx.Err(), err)
	case hopeless(err, proven):
		return err
	}
	p.p.Failed(err)
	return nil
}

// hopeless reports whether another try would fail in the same way. That the VM has
// ended is not for an error to say: Ended does.
func hopeless(err error, proven bool) bool {
	return problem.Is(err, problem.Usage) || !proven && problem.Is(err, problem.Refused)
}

// turn takes one checkpoint as decided, drops what is beyond the count, and gives the
// monitor back.
func (p *Protector) turn(ctx context.Context, d *policy.Decision, progress func(capture.Event)) (*capture.Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	p.mu.Lock()
	p.cancel, p.record.attempted = cancel, time.Now()
	p.mu.Unlock()
	o := chosen(p.p.Capture, d)
	if own := o.Progress; progress != nil {
		o.Progress = func(e capture.Event) {
			progress(e)
			if own != nil {
				own(e)
			}
		}
	}
	res, err := p.v.Checkpoint(ctx, p.st, o)
	p.mu.Lock()
	p.cancel = nil
	p.record.add(res, err, string(o.Mode))
	p.mu.Unlock()
	if err == nil {
		p.p.Taken(res)
		if keep := p.p.KeepLast; keep > 0 {
			err = Retain(ctx, p.st, p.v.Name, max(keep, int(d.GetKeep())))
		}
	}
	return res, errors.Join(err, p.v.Rest())
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

// Checkpoint takes one now. problem.Busy while another is being taken.
func (p *Protector) Checkpoint(ctx context.Context, progress func(capture.Event)) (*capture.Result, error) {
	p.mu.Lock()
	busy := p.cancel != nil
	p.mu.Unlock()
	if busy {
		return nil, problem.New(problem.Busy, "checkpoint", "VM "+p.v.Name, "one is being taken")
	}
	o := &order{progress: progress, answer: make(chan answer, 1)}
	select {
	case p.ask <- o:
	case <-p.done:
		return nil, p.ended("checkpoint")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	select { // once taken up it is finished: whoever asked may have gone
	case a := <-o.answer:
		return a.res, a.err
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (p *Protector) ended(op string) error {
	return problem.New(problem.NotFound, op, "VM "+p.v.Name, "its protection has ended")
}

// SetPolicy replaces the policy; the one before it stays if that fails.
func (p *Protector) SetPolicy(ctx context.Context, ref string, params map[string]string) (plugins.Verdict, error) {
	return p.p.Slot.Set(ctx, ref, params, p.signals())
}

// Cancel gives up the checkpoint that is being taken, if one is.
func (p *Protector) Cancel() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.cancel == nil {
		return false
	}
	p.cancel()
	return true
}

// Detach ends Run, and returns when it has.
func (p *Protector) Detach(ctx context.Context) error {
	p.once.Do(func() { close(p.detach) })
	select {
	case <-p.done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
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
