package controller

// Command is something to be done. Commands are carried out in their order; none waits
// for the one before it to have had its effect.
type Command interface{ command() }

// Commands.
type (
	// Ask the policy; it is answered by Decided.
	Ask struct{}
	// Enqueue asks the host for a turn; it is answered by Admitted.
	Enqueue struct{}
	// Leave takes back what Enqueue asked for, or gives back what was granted.
	Leave struct{}

	// Take begins a checkpoint. It is answered by Armed, Stopped, Resumed and at last
	// by Taken or Failed. If it is Timed it waits, armed, for SuspendNow, and then,
	// stopped (Fixed), for ResumeNow.
	// Order is who waits for it; 0: nobody.
	Take struct {
		Timed bool
		Order uint64
	}
	// SuspendNow and ResumeNow are for a timed one.
	SuspendNow struct{}
	ResumeNow  struct{}
	// GiveUp the checkpoint under way: it is answered by Failed, or by Taken if it was
	// too late.
	GiveUp struct{}
	// Retain drops checkpoints beyond those to be kept; it is answered by Retained.
	Retain struct{}

	// Answer an order.
	Answer struct {
		Order   uint64
		Outcome Outcome
	}
	// Report tells what became of a checkpoint that nobody ordered.
	Report struct{ Outcome Outcome }
	// Say tells the group where its member stands: Prepared, Held, Committing, Retaining
	// (the checkpoint exists) or Aborted (there will be none).
	Say struct {
		Group uint64
		State State
	}

	// Revive brings the VM's last checkpoint back; it is answered by Restored.
	Revive struct{}
	// Announce tells people how the VM ended.
	Announce struct{ How Death }
	// LetGo ends it all: no other command follows.
	LetGo struct{ Why Reason }
)

func (Ask) command()        {}
func (Enqueue) command()    {}
func (Leave) command()      {}
func (Take) command()       {}
func (SuspendNow) command() {}
func (ResumeNow) command()  {}
func (GiveUp) command()     {}
func (Retain) command()     {}
func (Answer) command()     {}
func (Report) command()     {}
func (Say) command()        {}
func (Revive) command()     {}
func (Announce) command()   {}
func (LetGo) command()      {}

// Outcome is what became of a checkpoint.
type Outcome uint8

// The outcomes.
const (
	Exists   Outcome = iota // it was taken
	Missed                  // it was not; the error is the attempt's
	Occupied                // one is under way, and another order waits already
	Over                    // the protection has ended
)

var outcomeNames = [...]string{"exists", "missed", "occupied", "over"}

func (o Outcome) String() string { return outcomeNames[o] }

// Reason is why a VM is let go.
type Reason uint8

// The reasons.
const (
	Detached    Reason = iota // somebody wanted it
	Suspended                 // the agent ends; the next one goes on
	Hopeless                  // no checkpoint will ever succeed
	Gone                      // the VM has ended
	BroughtBack               // it has ended, and another process has its last checkpoint
)

var reasonNames = [...]string{"detached", "suspended", "hopeless", "gone", "brought-back"}

func (r Reason) String() string { return reasonNames[r] }
