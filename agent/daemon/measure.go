package daemon

import (
	"slices"

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

// snapshot is what was seen last, with the dirty rates of our own VMs; empty before the
// first look.
func (d *Daemon) snapshot() (s signals.Snapshot) {
	if w := d.watch.Load(); w != nil {
		s = w.Last()
	}
	s.VMs = slices.Clone(s.VMs) // the watcher's own stays as it is
	for _, w := range d.all() {
		dirty := w.dirty.Load().now()
		i := slices.IndexFunc(s.VMs, func(x signals.Sample) bool { return x.PID == w.pid() })
		if dirty != nil && i >= 0 {
			s.VMs[i].Dirty, s.VMs[i].DirtyNote = dirty, ""
		}
	}
	return s
}
