package agent

import (
	"context"
	"errors"
	"time"

	"github.com/ckagent/ckagent/agent/guestagent"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/selfexe"
	"github.com/ckagent/ckagent/agent/vm"
)

// thawTimeout is how long a guest may take to answer a thaw.
const thawTimeout = 5 * time.Second

// freeze has the guest's own agent freeze its file systems, and returns what thaws
// them. Should we die in between, or take longer than within, a guard thaws. A
// guest that does not freeze in time is not waited for.
func freeze(ctx context.Context, t *vm.Target, helper []string, within time.Duration) (thaw func() error, err error) {
	if s, err := t.Status(ctx); err != nil {
		return nil, err
	} else if !s.Running {
		return nil, problem.New(problem.Refused, "freeze", t.Process.String(), "the VM is %s: its guest can do nothing", s.State).
			WithHint("let it run, or take the checkpoint without --freeze")
	}
	ch, err := guestagent.Find(ctx, t.QMP)
	if err != nil {
		return nil, err
	}
	helper = selfexe.Or(helper)
	begin := time.Now()
	limited, cancel := context.WithTimeout(ctx, within)
	defer cancel()
	c, err := guestagent.Dial(limited, ch, t.Process.Path("root"))
	if err != nil {
		return nil, err
	}
	guard, err := guestagent.StartGuard(guestagent.GuardConfig{Helper: helper, Agent: c, QEMUPID: t.Process.PID, Within: within})
	if err != nil {
		return nil, errors.Join(err, c.Close())
	}
	// After the freeze was sent, only a thaw that was answered is known to be one.
	undo := func() error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), thawTimeout)
		defer cancel()
		_, err := c.Thaw(ctx)
		return errors.Join(guard.Release(err == nil), c.Close())
	}
	if _, err := c.Freeze(limited); err != nil {
		if limited.Err() != nil {
			// Out of step: the guard gets in step again, and thaws.
			return nil, errors.Join(err, guard.Release(false), c.Close())
		}
		return nil, errors.Join(err, undo())
	}
	return func() error {
		took := time.Since(begin)
		if err := undo(); err != nil {
			return err
		}
		if took >= within {
			return problem.New(problem.Busy, "freeze", t.Process.String(), "the guest's file systems were thawed after %v, before the VM was done with its pause", within).
				WithHint("take it again, or allow more with --freeze-timeout")
		}
		return nil
	}, nil
}
