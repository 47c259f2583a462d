package controller

// State is where a VM's protection stands.
type State uint8

// The states. In all of them the guest runs, except in Capturing, Held and ResumeAt.
const (
	// Idle: nothing of ours is in the VM.
	Idle State = iota
	// Queued: a checkpoint is wanted, and waits for its turn on this host.
	Queued
	// Arming: RAM is being write-protected, or is prepared otherwise.
	Arming
	// Prepared: armed; the group has not said when to suspend.
	Prepared
	// SuspendAt: armed, and suspended when its time has come.
	SuspendAt
	// Capturing: the guest stands still while its state is fixed.
	Capturing
	// Held: fixed; the guest stands still until the group says when it resumes.
	Held
	// ResumeAt: as Held, and resumed when its time has come.
	ResumeAt
	// Committing: the guest runs, and what was fixed goes to the store.
	Committing
	// Retaining: the checkpoint exists; older ones are dropped.
	Retaining
	// Aborted: the checkpoint was given up; what it did is being undone.
	Aborted
	// Restoring: the VM crashed, and its last checkpoint is brought back.
	Restoring
	// Refused: the VM cannot be protected. Final.
	Refused
	// Ended: nobody protects the VM any more. Final.
	Ended
)

var stateNames = [...]string{"idle", "queued", "arming", "prepared", "suspend-at", "capturing", "held", "resume-at",
	"committing", "retaining", "aborted", "restoring", "refused", "ended"}

func (s State) String() string { return stateNames[s] }

// Final reports whether nothing comes after a state.
func (s State) Final() bool { return s == Refused || s == Ended }

// UnderWay reports whether a checkpoint was begun and is not over.
func (s State) UnderWay() bool { return s >= Arming && s <= Committing || s == Aborted }

// Still reports whether the guest may stand still for us.
func (s State) Still() bool { return s == Capturing || s == Held || s == ResumeAt }

// Death is how a VM came to its end.
type Death uint8

// The ways to end.
const (
	// Unknown: it ended, and nobody saw how.
	Unknown Death = iota
	// Poweroff: its guest shut it down.
	Poweroff
	// Destroyed: its manager or an operator ended it.
	Destroyed
	// Migrated: it runs on somewhere else.
	Migrated
	// Crashed: QEMU died of itself, or was killed by nobody who manages it.
	Crashed
)

var deathNames = [...]string{"unknown", "poweroff", "destroyed", "migrated", "crashed"}

func (d Death) String() string { return deathNames[d] }

// OnDeath says what is done when a VM has crashed. Whatever it says, a VM that was shut
// down, destroyed or migrated is not brought back.
type OnDeath uint8

// What may be done.
const (
	Notify  OnDeath = iota // tell
	Restore                // bring it back from its last checkpoint, and tell
	Nothing                // neither
)

var onDeathNames = [...]string{"notify", "restore", "none"}

func (o OnDeath) String() string { return onDeathNames[o] }

// ParseOnDeath reads what an operator wrote.
func ParseOnDeath(text string) (OnDeath, bool) {
	for i, name := range onDeathNames {
		if name == text {
			return OnDeath(i), true
		}
	}
	return 0, false
}

// Failure is the class of a checkpoint that did not come to be.
type Failure uint8

// The classes.
const (
	Passing   Failure = iota // another try may succeed
	Forbidden                // the VM cannot be protected as it is now
	Senseless                // what was asked for makes no sense, and never will
	Given                    // it was given up because somebody wanted that
)

var failureNames = [...]string{"passing", "forbidden", "senseless", "given-up"}

func (f Failure) String() string { return failureNames[f] }
