package signals

import (
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// Tell puts a sample into the terms of policies. What was not measured stays absent.
func (s *Sample) Tell(to *policy.Signals) {
	if d := s.Dirty; d != nil {
		m := &policypb.Memory{DirtyPagesPerSecond: d.Rate, ErrorPagesPerSecond: d.Error, WssBytes: d.WSSBytes,
			GPages: d.CurvePages, GTauNs: float64(d.CurveTauNS)}
		if x := d.Shares; x != nil {
			m.ZeroShare, m.FalseDirtyShare, m.DuplicateShare, m.CompressRatio = x.Zero, x.FalseDirty, x.Duplicate, x.Ratio
		}
		to.Memory = m
	}
	if v := s.VCPU; v != nil {
		to.Cpu = &policypb.CPU{BusyShare: v.RunShare, IdleSlotsPerSecond: v.SlotsRate, Idle: v.HasSlots && v.IdleSinceNS > 0}
	}
	if len(s.Network) > 0 {
		n := &policypb.Network{Idle: true}
		for _, dev := range s.Network {
			n.OutBytesPerSecond += dev.OutRate
			n.InBytesPerSecond += dev.InRate
			n.OutPacketsPerSecond += dev.OutPktRate
			n.OpenRequests += uint64(max(0, dev.Pending))
			n.Idle = n.Idle && dev.Idle
			n.IdleShare = max(n.IdleShare, dev.IdleShare)
		}
		to.Network = n
	}
	if k := s.Disk; k != nil {
		to.Disk = &policypb.Disk{WrittenBytesPerSecond: k.Rate, WritesPerSecond: k.Ops}
	}
	if v := s.VCPU; v != nil && v.HasSlots && len(s.Network) > 0 && to.Capabilities != nil {
		to.Capabilities.IdleSlots = true // they are seen, so that they can be waited for
	}
}
