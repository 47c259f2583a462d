package daemon

import (
	"context"
	"time"

	"golang.org/x/sync/semaphore"
)

// onSchedule does something after first, and then each time after as long as do says, until
// stop is called, which returns when it is over. Each time it takes one of the turns.
func onSchedule(ctx context.Context, first time.Duration, turns *semaphore.Weighted, do func(context.Context) (next time.Duration)) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		timer := time.NewTimer(first)
		defer timer.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-timer.C:
			}
			if turns.Acquire(ctx, 1) != nil {
				return
			}
			next := do(ctx)
			turns.Release(1)
			timer.Reset(next)
		}
	}()
	return func() {
		cancel()
		<-ended
	}
}
