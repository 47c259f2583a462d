package controller

import "time"

// Event is something that happened.
type Event interface{ event() }

// Events.
type (
	// Tick: time has passed, at least until Machine.Wake.
	Tick struct{}
	// Decided: the policy answered Ask. At is when it wants a checkpoint (zero: none
	// until it is asked again), Again when it wants to be asked at the latest (zero:
	// when something changes).
	Decided struct{ At, Again time.Time }
	// PolicyChanged: another policy is in charge, so what was decided is void.
	PolicyChanged struct{}

	// Ordered: an operator wants a checkpoint now, and waits for the answer.
	Ordered struct{ Order uint64 }
	// CancelWanted: an operator wants the one under way to be given up.
	CancelWanted struct{}
	// DetachWanted: the VM is to be let go.
	DetachWanted struct{}
	// Stopping: the agent ends; the VM is let go, and taken up again by the next one.
	Stopping struct{}

	// Admitted: the turn that Enqueue asked for has come.
	Admitted struct{}
	// Armed: RAM is prepared.
	Armed struct{}
	// Stopped: the guest stands still for us.
	Stopped struct{}
	// Fixed: the state of the instant is ours. Only a member of a group hears of it,
	// since the guest of any other runs on at once.
	Fixed struct{}
	// Resumed: the guest runs again.
	Resumed struct{}
	// Retaken: the attempt was discarded, and another one is made in the same turn.
	Retaken struct{}
	// Taken: the checkpoint exists.
	Taken struct{}
	// Failed: it does not, and nothing of it is left in the VM.
	Failed struct{ Class Failure }
	// Retained: older checkpoints were dropped, or could not be.
	Retained struct{}

	// Prepare: a group wants this VM to arm.
	Prepare struct{ Group uint64 }
	// Suspend: the group's instant.
	Suspend struct {
		Group uint64
		At    time.Time
	}
	// Resume: all members are fixed; this is when their guests run on.
	Resume struct {
		Group uint64
		At    time.Time
	}
	// Disband: the group gives its checkpoint up.
	Disband struct{ Group uint64 }

	// Died: the VM is gone.
	Died struct{ How Death }
	// Restored: what Revive asked for was done, or not.
	Restored struct{ OK bool }
)

func (Tick) event()          {}
func (Decided) event()       {}
func (PolicyChanged) event() {}
func (Ordered) event()       {}
func (CancelWanted) event()  {}
func (DetachWanted) event()  {}
func (Stopping) event()      {}
func (Admitted) event()      {}
func (Armed) event()         {}
func (Stopped) event()       {}
func (Fixed) event()         {}
func (Resumed) event()       {}
func (Retaken) event()       {}
func (Taken) event()         {}
func (Failed) event()        {}
func (Retained) event()      {}
func (Prepare) event()       {}
func (Suspend) event()       {}
func (Resume) event()        {}
func (Disband) event()       {}
func (Died) event()          {}
func (Restored) event()      {}
