package vm

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

// exitPoll is how often the kernel is asked again: it knows when the parent has reaped
// the process, and tells nobody that it does.
const exitPoll = 10 * time.Millisecond

// ExitStatus is how the process ended, once it has and its parent knows. Linux says it
// from 6.15 on (PIDFD_GET_INFO with PIDFD_INFO_EXIT); known is false on older ones, and
// when ctx ends first.
func (p *Process) ExitStatus(ctx context.Context) (status unix.WaitStatus, known bool) {
	again := time.NewTicker(exitPoll)
	defer again.Stop()
	for {
		code, known, err := pidfdExit(p.pidfd)
		if known {
			return unix.WaitStatus(code), true
		}
		if err != nil {
			return 0, false
		}
		select {
		case <-ctx.Done():
			return 0, false
		case <-again.C:
		}
	}
}
