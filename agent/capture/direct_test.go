package capture

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
)

// A store that hangs, deaf to cancelling, holds up neither a VM that is stopped for
// it nor a cancel.
func TestHangingStoreEndsThePause(t *testing.T) {
	hang := func(d *direct) (work func(context.Context) error, free func()) {
		c := make(chan struct{})
		return func(context.Context) error { <-c; return nil }, func() { close(c); d.join() }
	}
	t.Run("no progress", func(t *testing.T) {
		d := &direct{}
		work, free := hang(d)
		defer free()
		if err := d.run(t.Context(), 20*time.Millisecond, work); !problem.Is(err, problem.Store) {
			t.Errorf("%v, want a problem of the store", err)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		d := &direct{}
		work, free := hang(d)
		defer free()
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := d.run(ctx, time.Hour, work); !errors.Is(err, context.Canceled) {
			t.Errorf("%v, want cancelled", err)
		}
	})
	t.Run("slow", func(t *testing.T) {
		d := &direct{}
		const stall = 500 * time.Millisecond
		err := d.run(t.Context(), stall, func(ctx context.Context) error {
			for begin := time.Now(); time.Since(begin) < 3*stall && ctx.Err() == nil; {
				d.steps.Add(1)
				select {
				case <-ctx.Done():
				case <-time.After(stall / 20):
				}
			}
			return ctx.Err()
		})
		d.join()
		if err != nil {
			t.Errorf("slow is not hanging: %v", err)
		}
	})
	t.Run("its own error", func(t *testing.T) {
		d := &direct{}
		want := errors.New("disk on fire")
		if err := d.run(t.Context(), time.Hour, func(context.Context) error { return want }); !errors.Is(err, want) {
			t.Errorf("%v, want %v", err, want)
		}
		d.join()
	})
}
