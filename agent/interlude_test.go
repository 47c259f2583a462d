package agent

import (
	"context"
	"errors"
	"testing"
)

// What is done between two checkpoints ends before the next begins, and nothing is done
// while one has the VM.
func TestInterlude(t *testing.T) {
	var i interlude
	began, ended := make(chan struct{}), false
	result := make(chan error, 1)
	go func() {
		_, err := i.do(t.Context(), func(ctx context.Context) error {
			close(began)
			<-ctx.Done()
			ended = true
			return ctx.Err()
		})
		result <- err
	}()
	<-began
	if free, _ := i.do(t.Context(), func(context.Context) error { return nil }); free {
		t.Error("two things are done at once")
	}
	i.take()
	if !ended {
		t.Error("the checkpoint did not wait")
	}
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if free, _ := i.do(t.Context(), func(context.Context) error { return nil }); free {
		t.Error("something is done during a checkpoint")
	}
	i.give()
	want := errors.New("x")
	if free, err := i.do(t.Context(), func(context.Context) error { return want }); !free || err != want {
		t.Errorf("%v %v", free, err)
	}
	i.take() // nothing is being done
}
