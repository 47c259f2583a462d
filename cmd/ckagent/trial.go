package main

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/ckagent/ckagent/agent/capture"
)

// maxTrials bounds how often one attach has engine bpf tried: a host that never has the
// time for it is left alone.
const maxTrials = 3

// trial has engine bpf tried between the checkpoints of an attach, after one that had to do
// without. Nobody waits for it.
type trial struct {
	ctx  context.Context // ends with stop
	stop context.CancelFunc
	try  func(context.Context) error // in another process
	log  *slog.Logger

	wg   sync.WaitGroup
	busy atomic.Bool
	made int // of the one who calls after
}

func newTrial(ctx context.Context, try func(context.Context) error, log *slog.Logger) *trial {
	t := &trial{try: try, log: log}
	t.ctx, t.stop = context.WithCancel(ctx)
	return t
}

// after is told of each checkpoint when it exists, by one goroutine, and before end.
func (t *trial) after(r *capture.Result) {
	if !r.Untried || t.made == maxTrials || t.busy.Swap(true) {
		return
	}
	t.made++
	t.wg.Go(func() {
		defer t.busy.Store(false)
		switch err := t.try(t.ctx); {
		case t.ctx.Err() != nil:
		case err != nil:
			t.log.Info("engine bpf is still not tried", "error", err)
		default:
			t.log.Debug("engine bpf was tried", "hint", "ckagent doctor shows what came of it")
		}
	})
}

// end gives a trial up and waits until nothing is left of it.
func (t *trial) end() {
	t.stop()
	t.wg.Wait()
}
