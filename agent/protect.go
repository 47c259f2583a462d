package agent

import (
	"context"
	"errors"
	"time"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
)

// Protection says how often to take checkpoints and how many to keep.
type Protection struct {
	Interval time.Duration
	KeepLast int
	Capture  capture.Options
	// Taken is told about each checkpoint, Failed about each that did not
	// succeed and will be tried again.
	Taken  func(*capture.Result)
	Failed func(error)
}

// Protect takes checkpoints at the interval until ctx ends or the VM does. A
// failed checkpoint is reported and tried again at the next turn; only what can
// never succeed ends it. A refusal counts as that before the first success: later
// ones are of a VM that can be protected, and pass (a backup job, a debugger, a
// migration, memory that is short).
func (v *VM) Protect(ctx context.Context, st *store.Store, p Protection) error {
	timer := time.NewTimer(0)
	defer timer.Stop()
	proven := false
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-v.Ended():
			return problem.New(problem.NotFound, "protect", "VM "+v.Name, "its QEMU process has ended").
				WithHint("ckagent restore %s brings its last checkpoint back", v.Name)
		case <-timer.C:
		}
		next := time.Now().Add(p.Interval)
		err := v.turn(ctx, st, p)
		switch {
		case err == nil:
			proven = true
		case ctx.Err() != nil:
			return errors.Join(ctx.Err(), err)
		case hopeless(err, proven):
			return err
		default:
			p.Failed(err)
		}
		timer.Reset(max(0, time.Until(next)))
	}
}

// hopeless reports whether another try would fail in the same way. That the VM has
// ended is not for an error to say: Ended does.
func hopeless(err error, proven bool) bool {
	return problem.Is(err, problem.Usage) || !proven && problem.Is(err, problem.Refused)
}

// turn takes one checkpoint, drops what is beyond the count, and gives the
// monitor back.
func (v *VM) turn(ctx context.Context, st *store.Store, p Protection) error {
	res, err := v.Checkpoint(ctx, st, p.Capture)
	if err == nil {
		p.Taken(res)
		if p.KeepLast > 0 {
			err = Retain(ctx, st, v.Name, p.KeepLast)
		}
	}
	return errors.Join(err, v.Rest())
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
