package agent

import (
	"context"
	"encoding/json"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ckagent/ckagent/agent/controller"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
)

// witness hears on a VM's monitor how it ends. While a checkpoint has the monitor it
// listens there; in between, if it is wanted, it has a connection of its own, and then
// other tools find that monitor busy. Its methods but what it sees belong to the VM's
// goroutine.
type witness struct {
	v      *VM
	wanted bool            // between checkpoints too
	tell   func(qmp.Event) // what was seen is another process's to judge; nil: ours

	cancel context.CancelFunc // of the connection of its own; nil: there is none
	wg     sync.WaitGroup

	hearing atomic.Bool // on a connection of its own

	mu       sync.Mutex
	reason   string // of the SHUTDOWN event
	panicked bool
	migrated bool // its state went to another QEMU
}

// witnessRetry is how often a monitor that somebody else has is tried.
const witnessRetry = 100 * time.Millisecond

// follow listens on a client until that is closed.
func (w *witness) follow(c *qmp.Client) {
	sub := c.Subscribe(16, "SHUTDOWN", "GUEST_PANICKED")
	w.wg.Go(func() {
		for e := range sub.C() {
			w.see(e)
		}
	})
}

func (w *witness) see(e qmp.Event) {
	if w.tell != nil {
		w.tell(e)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	switch e.Name {
	case "SHUTDOWN":
		var d struct {
			Reason string `json:"reason"`
		}
		if json.Unmarshal(e.Data, &d) == nil {
			w.reason = d.Reason
		}
	case "GUEST_PANICKED":
		w.panicked = true
	}
}

// resume listens by itself.
func (w *witness) resume() {
	if !w.wanted || w.cancel != nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	w.cancel = cancel
	w.wg.Go(func() { w.listen(ctx) })
}

// pause gives its own connection back.
func (w *witness) pause() {
	if w.cancel != nil {
		w.cancel()
		w.cancel = nil
		w.wg.Wait()
	}
}

func (w *witness) end() {
	w.pause()
	w.wg.Wait()
}

// listen has a connection of its own until ctx or the VM ends.
func (w *witness) listen(ctx context.Context) {
	again := time.NewTicker(witnessRetry)
	defer again.Stop()
	for w.v.proc.Alive() {
		if c, _, err := vm.Connect(ctx, w.v.proc, vm.Options{QMP: w.v.opts.QMP}); err == nil {
			w.hear(ctx, c)
		}
		select {
		case <-ctx.Done():
			return
		case <-again.C:
		}
	}
}

// hear returns when ctx or the connection has ended.
func (w *witness) hear(ctx context.Context, c *qmp.Client) {
	defer c.Close() // of a connection that only listened
	sub := c.Subscribe(16, "SHUTDOWN", "GUEST_PANICKED", "STOP", "RESUME")
	w.look(ctx, c)
	w.hearing.Store(true)
	defer w.hearing.Store(false)
	for {
		select {
		case <-ctx.Done():
			return
		case e, more := <-sub.C():
			if !more {
				return
			}
			if w.see(e); e.Name == "STOP" || e.Name == "RESUME" {
				w.look(ctx, c)
			}
		}
	}
}

// look asks whether the VM's state has gone elsewhere: a migration ends with a VM that
// is stopped for good, and is ended by whoever ordered it.
func (w *witness) look(ctx context.Context, c *qmp.Client) {
	s, err := vm.ReadStatus(ctx, c)
	if err != nil {
		return
	}
	w.mu.Lock()
	w.migrated = s.State == "postmigrate" || s.State == "finish-migrate"
	w.mu.Unlock()
}

// exitWait is how long a dead process may take to be reaped: only then the kernel says
// how it ended.
const exitWait = 2 * time.Second

// autopsy says how the VM ended. What was seen on its monitor comes first, then how its
// process ended. A process that nobody manages and that was killed has crashed: the
// kernel's memory killer and an operator's kill -9 look the same.
func (v *VM) autopsy(ctx context.Context) (controller.Death, string) {
	ctx, cancel := context.WithTimeout(ctx, exitWait)
	defer cancel()
	exit, known := v.proc.ExitStatus(ctx)
	w := v.witness
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.migrated:
		return controller.Migrated, "it was migrated away"
	case w.panicked:
		return controller.Crashed, "its guest panicked"
	}
	switch w.reason {
	case "":
	case "guest-shutdown", "guest-reset", "subsystem-reset":
		return controller.Poweroff, "its guest shut down"
	case "guest-panic":
		return controller.Crashed, "its guest panicked"
	case "host-error":
		return controller.Crashed, "QEMU ended it on an error"
	default:
		return controller.Destroyed, "it was ended from outside (" + w.reason + ")"
	}
	manager := v.machine.Facts[image.FactManager]
	if !known {
		return controller.Unknown, "its process has ended, and nobody saw how"
	}
	return judgeExit(exit, manager)
}
