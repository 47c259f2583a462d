package pager

import (
	"context"
	"encoding/json"
	"io"
	"time"
)

// Keeper makes sure that a source is not removed, until the Closer is closed. It
// should be cheap, and end with ctx.
type Keeper func(ctx context.Context, params json.RawMessage) (io.Closer, error)

// keepAgain is the pause between attempts at a source that cannot be reached.
const keepAgain = time.Second

// keep holds the source from a goroutine of its own, because a store may hang and
// the supervisor must not. end gives it back; what hangs there is left to the end of
// the process.
func keep(ctx context.Context, keeper Keeper, params json.RawMessage, log func(string, ...any)) (end func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		told := false
		for ctx.Err() == nil {
			held, err := keeper(ctx, params)
			if err == nil {
				<-ctx.Done()
				if err := held.Close(); err != nil {
					log("give the source back: %v", err)
				}
				return
			}
			if !told && ctx.Err() == nil {
				log("the source is not held: %v", err)
				told = true
			}
			t := time.NewTimer(keepAgain)
			select {
			case <-ctx.Done():
			case <-t.C:
			}
			t.Stop()
		}
	}()
	return func() {
		cancel()
		t := time.NewTimer(joinLimit)
		defer t.Stop()
		select {
		case <-done:
		case <-t.C:
		}
	}
}
