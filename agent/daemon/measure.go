package daemon

import (
	"github.com/ckagent/ckagent/agent/signals"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// measure adds what was seen of a VM last to what its policy is told.
func (d *Daemon) measure(pid int, s *policy.Signals) {
	for _, x := range d.snapshot().VMs {
		if x.PID == pid {
			addSample(s, &x)
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

// addSample puts a sample into a policy's terms. What was not measured stays absent.
func addSample(s *policy.Signals, x *signals.Sample) {
	if r := x.Dirty; r != nil {
		s.Memory = &policypb.Memory{DirtyPagesPerSecond: r.Rate, ErrorPagesPerSecond: r.Error, WssBytes: r.WSSBytes,
			GPages: r.CurvePages, GTauNs: float64(r.CurveTauNS)}
	}
	if v := x.VCPU; v != nil {
		s.Cpu = &policypb.CPU{BusyShare: v.RunShare, IdleSlotsPerSecond: v.SlotsRate, Idle: v.HasSlots && v.IdleSinceNS > 0}
	}
	if len(x.Network) > 0 {
		n := &policypb.Network{Idle: true}
		for _, dev := range x.Network {
			n.OutBytesPerSecond += dev.OutRate
			n.InBytesPerSecond += dev.InRate
			n.OpenRequests += uint64(max(0, dev.Pending))
			n.Idle = n.Idle && dev.Idle
			n.IdleShare = max(n.IdleShare, dev.IdleShare)
		}
		s.Network = n
	}
	if k := x.Disk; k != nil {
		s.Disk = &policypb.Disk{WrittenBytesPerSecond: k.Rate, WritesPerSecond: k.Ops}
	}
}
