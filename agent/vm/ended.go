package vm

import (
	"context"
	"errors"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

// endPatience is for a process whose connection broke, or whose threads are gone, to be
// gone as a whole: the kernel ends its threads and closes its sockets a moment before it
// lets others know that it has exited.
const endPatience = 500 * time.Millisecond

// ending waits a moment for the end of a process that shows signs of it, and returns
// problem.NotFound if it came.
func (p *Process) ending() error {
	ctx, cancel := context.WithTimeout(context.Background(), endPatience)
	defer cancel()
	_ = p.Wait(ctx) // what matters is what Check finds
	return p.Check()
}

// Explain puts "the process has exited" (problem.NotFound) before an error that came
// of it; any other error is returned as it is.
func (p *Process) Explain(err error) error {
	if err == nil {
		return nil
	}
	gone := p.Check()
	if errors.Is(err, qmp.ErrLost) {
		gone = p.ending()
	}
	if gone != nil {
		return errors.Join(gone, err)
	}
	if errors.Is(err, qmp.ErrLost) {
		return lost(p, err)
	}
	return err
}

// lost says of a broken connection to a QEMU that lives what it was needed for and
// what to do.
func lost(p *Process, err error) error {
	e, ok := errors.AsType[*problem.Error](err)
	if !ok {
		e = problem.New(problem.Failed, "talk to QEMU", p.String(), "%w", err)
		err = e
	}
	if e.Hint == "" {
		e.Hint = "the VM itself lives; try again, or name another monitor with --qmp"
		e.Retryable = true
	}
	return err
}
