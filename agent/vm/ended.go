package vm

import (
	"context"
	"errors"
	"time"

	"github.com/ckagent/ckagent/agent/qmp"
)

// endPatience is for a process whose connection broke to be gone: the kernel closes
// its sockets a moment before it lets others know that it has exited.
const endPatience = 500 * time.Millisecond

// Explain puts "the process has exited" (problem.NotFound) before an error that came
// of it; any other error is returned as it is.
func (p *Process) Explain(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, qmp.ErrLost) {
		ctx, cancel := context.WithTimeout(context.Background(), endPatience)
		defer cancel()
		_ = p.Wait(ctx) // what matters is what Check finds
	}
	if gone := p.Check(); gone != nil {
		return errors.Join(gone, err)
	}
	return err
}
