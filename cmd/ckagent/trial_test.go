package main

import (
	"context"
	"errors"
	"log/slog"
	"testing"

	"github.com/ckagent/ckagent/agent/capture"
)

// TestTrialBetweenCheckpoints: one at a time, only after a checkpoint that did without, not
// for ever, and none is left behind.
func TestTrialBetweenCheckpoints(t *testing.T) {
	begun, ends := make(chan struct{}), make(chan error)
	made := 0
	try := func(ctx context.Context) error {
		made++
		begun <- struct{}{}
		select {
		case err := <-ends:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	untried := &capture.Result{Untried: true}
	x := newTrial(t.Context(), try, slog.New(slog.DiscardHandler))
	x.after(&capture.Result{})
	x.wg.Wait()
	for range maxTrials - 1 {
		x.after(untried)
		<-begun
		x.after(untried) // while one is being made
		ends <- errors.New("no time")
		x.wg.Wait()
	}
	x.after(untried)
	<-begun
	x.end()
	if made != maxTrials {
		t.Errorf("%d trials", made)
	}
	x.after(untried)
	x.wg.Wait()
	if made != maxTrials {
		t.Errorf("%d trials, at most %d", made, maxTrials)
	}
}
