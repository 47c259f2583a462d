package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/ckagent/ckagent/agent/problem"
)

func TestInterruptIsOneLine(t *testing.T) {
	by := fmt.Errorf("qmp stop: no reply yet: %w", context.Canceled)
	late := fmt.Errorf("read: %w", os.ErrDeadlineExceeded)
	own := problem.New(problem.Failed, "resume", "pid 7", "the VM was left paused")
	for _, c := range []struct {
		err  error
		want string
	}{
		{context.Canceled, "checkpoint: interrupted"},
		{errors.Join(context.Canceled, errors.Join(by, late)), "checkpoint: interrupted"},
		{errors.Join(by, own, late), "checkpoint: interrupted; besides: resume pid 7: the VM was left paused"},
	} {
		err := interrupted("checkpoint", c.err)
		if err.Error() != c.want || !problem.Is(err, problem.Cancelled) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: %q, want %q", c.err, err, c.want)
		}
	}
}
