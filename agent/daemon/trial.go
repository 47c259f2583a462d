package daemon

import (
	"context"
	"time"
)

// trialWaits are the waits before engine bpf is tried: at the start, and where the host had
// not the time for it some while later. Checkpoints do without until then.
var trialWaits = []time.Duration{0, 10 * time.Minute, time.Hour}

// tryEngine has the engine tried, so that no checkpoint waits for it.
func (d *Daemon) tryEngine(ctx context.Context, waits []time.Duration) {
	for _, wait := range waits {
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		err := d.deps.Try(ctx)
		if err == nil || ctx.Err() != nil {
			return
		}
		d.log.Info("engine bpf is still not tried", "error", err)
	}
}
