package agent

import (
	"context"
	"os"
	"sync"
	"time"

	"github.com/ckagent/ckagent/agent/controller"
	"github.com/ckagent/ckagent/agent/problem"
)

// interlude is what is done to a VM between two checkpoints, one thing at a time. It gives
// way: a checkpoint ends it and waits for its end.
type interlude struct {
	mu     sync.Mutex
	taken  bool               // the VM is a checkpoint's, or its monitor is still ours
	cancel context.CancelFunc // of what is being done; nil: nothing
	done   chan struct{}      // closed when it has ended
}

// take has the VM for a checkpoint, until give.
func (i *interlude) take() {
	i.mu.Lock()
	i.taken = true
	cancel, done := i.cancel, i.done
	i.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

func (i *interlude) give() {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.taken = false
}

// do runs f unless the VM is not free. f's context ends when a checkpoint wants the VM.
func (i *interlude) do(ctx context.Context, f func(context.Context) error) (free bool, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	i.mu.Lock()
	if i.taken || i.cancel != nil {
		i.mu.Unlock()
		return false, nil
	}
	done := make(chan struct{})
	i.cancel, i.done = cancel, done
	i.mu.Unlock()
	defer func() {
		i.mu.Lock()
		i.cancel = nil
		i.mu.Unlock()
		close(done)
	}()
	return true, f(ctx)
}

// Between has something done to the VM while no checkpoint is under way and none is due for
// some time; problem.Busy otherwise. f's context ends when a checkpoint wants the VM after
// all, which then waits until f returns. lock is the VM's, for a process that f starts; the
// monitor is free meanwhile.
func (p *Protector) Between(ctx context.Context, least time.Duration, f func(ctx context.Context, lock *os.File) error) error {
	p.mu.Lock()
	quiet := p.state == controller.Idle && (p.due.IsZero() || time.Until(p.due) > least)
	p.mu.Unlock()
	free := false
	var err error
	if quiet {
		v := p.v
		free, err = v.interlude.do(ctx, func(ctx context.Context) error {
			v.witness.pause()
			defer v.witness.resume()
			return f(ctx, v.lock.File())
		})
	}
	if !free {
		return problem.New(problem.Busy, "use", "VM "+p.v.Name, "a checkpoint is under way or due")
	}
	return err
}
