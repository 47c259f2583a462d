package signals

import (
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/ckagent/ckagent/agent/signals/estimate"
	"github.com/ckagent/ckagent/plugins/policy"
	"github.com/ckagent/ckagent/plugins/policy/policypb"
)

// TestTell: every figure of a sample that has a place in a policy's signals gets there,
// and what was not measured is absent.
func TestTell(t *testing.T) {
	s := &Sample{
		Dirty: &Dirty{Rate: 1, Error: 2, WSSBytes: 3, CurvePages: 4, CurveTauNS: 5, Shares: &estimate.Shares{Zero: 0.1, FalseDirty: 0.2, Duplicate: 0.3, Ratio: 0.4}},
		VCPU:  &VCPU{RunShare: 0.5, SlotsRate: 6, HasSlots: true, IdleSinceNS: 7},
		Network: []Network{{OutRate: 8, InRate: 9, OutPktRate: 10, Pending: 11, Idle: true, IdleShare: 0.6},
			{OutRate: 80, InRate: 90, OutPktRate: 100, Pending: 110, Idle: true, IdleShare: 0.5}},
		Disk: &Disk{Rate: 12, Ops: 13},
	}
	to := &policy.Signals{Capabilities: &policypb.Capabilities{}}
	s.Tell(to)
	if !to.GetCapabilities().GetIdleSlots() {
		t.Error("idle slots are seen, and cannot be waited for")
	}
	if n := to.GetNetwork(); n.GetOutPacketsPerSecond() != 110 || n.GetOpenRequests() != 121 || n.GetIdleShare() != 0.6 || !n.GetIdle() {
		t.Errorf("%v", n)
	}
	// What nobody measures yet, or the host knows elsewhere.
	unknown := map[protoreflect.Name]bool{"buffered_bytes": true, "oldest_buffered_ns": true, "typical_idle_slot_ns": true, "written_since_checkpoint_bytes": true}
	for _, m := range []protoreflect.Message{to.GetMemory().ProtoReflect(), to.GetNetwork().ProtoReflect(), to.GetCpu().ProtoReflect(), to.GetDisk().ProtoReflect()} {
		for i := range m.Descriptor().Fields().Len() {
			if f := m.Descriptor().Fields().Get(i); m.Has(f) == unknown[f.Name()] {
				t.Errorf("%s: told %v", f.FullName(), m.Has(f))
			}
		}
	}
	nothing := &policy.Signals{Capabilities: &policypb.Capabilities{}}
	(&Sample{}).Tell(nothing)
	if nothing.GetCapabilities().GetIdleSlots() || nothing.GetMemory() != nil || nothing.GetNetwork() != nil || nothing.GetCpu() != nil || nothing.GetDisk() != nil {
		t.Errorf("%v", nothing)
	}
}
