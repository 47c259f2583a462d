package daemon

import (
	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/plugins/policy"
)

// measure adds what was seen of a VM last to what its policy is told.
func (d *Daemon) measure(pid int, s *policy.Signals) {
	for _, x := range d.snapshot().VMs {
		if x.PID == pid {
			x.Tell(s)
		}
	}
	s.Host.QueuedCheckpoints = uint64(max(0, d.limits.waiting.Load()))
}

// snapshot is what was seen last; empty before the first look.
func (d *Daemon) snapshot() signals.Snapshot {
	if w := d.watch.Load(); w != nil {
		return w.Last()
	}
	return signals.Snapshot{}
}
