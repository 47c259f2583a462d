package daemon

import (
	"context"
	"errors"
	"log/slog"
	"testing"
	"time"
)

// TestTriesEngine: until something came of it, a few times, and no longer than the daemon is
// there.
func TestTriesEngine(t *testing.T) {
	made := 0
	var ends []error
	d := &Daemon{log: slog.New(slog.DiscardHandler), deps: Deps{Try: func(context.Context) error {
		made++
		return ends[made-1]
	}}}
	busy := errors.New("no time")
	for _, c := range []struct {
		ends []error
		want int
	}{{[]error{nil}, 1}, {[]error{busy, nil}, 2}, {[]error{busy, busy, busy}, 3}} {
		made, ends = 0, c.ends
		if d.tryEngine(t.Context(), []time.Duration{0, 1, 1}); made != c.want {
			t.Errorf("%v: tried %d times", c.ends, made)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	d.deps.Try = func(context.Context) error {
		cancel()
		return busy
	}
	d.tryEngine(ctx, []time.Duration{0, time.Hour})
	d.tryEngine(ctx, []time.Duration{time.Hour})
}
