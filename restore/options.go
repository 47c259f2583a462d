package restore

import (
	"time"

	"github.com/ckagent/ckagent/restore/plan"
)

// RunRoot is where restored VMs have their private directories: on tmpfs, since
// nothing in them outlives the host's boot.
const RunRoot = "/run/ckagent/restored"

// Options of a restore. The zero value restores lazily and waits for the drain.
type Options struct {
	Self       string            // the ckagent binary, which is also the pager
	RunRoot    string            // RunRoot if empty
	QMPPath    string            // control socket of the restored VM; in its run directory if empty
	Map        []plan.Mapping    // --map
	Secrets    map[string]string // --secret ID=FILE
	Extra      []string          // QEMU arguments after --
	Binary     string            // another QEMU than the recorded one
	Eager      bool              // all memory before the guest runs
	Detach     bool              // return when the guest runs
	Clone      bool              // another VM with the same state
	CloneID    string            // names a clone; made up if empty
	AssumeDead bool              // the operator knows that the original is dead
	Paused     bool              // leave the guest paused whatever it was
	ForceCPU   bool              // restore although the CPU lacks what the guest uses
	HostClock  bool              // set the guest's wall clock to the host's
	Disks      DiskMode          // DisksCheckpoint if empty
	DiskDir    string            // where the guest's disks are made; a new directory below DiskRoot if empty
	// FlattenDisks makes the disks independent of the store once the guest runs.
	FlattenDisks bool
	// rehearsal: the clone is not to outlive whoever made it.
	rehearsal   bool
	StartWithin time.Duration // for QEMU to come up; 60 s
	LoadWithin  time.Duration // for the device state; 60 s

	BytesPerSecond uint64 // of the background drain; 0: unlimited

	// OnPhase is told of each step as it is reached, from one goroutine at a time;
	// it must not block.
	OnPhase func(Phase)
	// OnFlatten is told how many bytes of the disks were looked at, as OnDrain is.
	OnFlatten func(done, total uint64)
	// OnDrain is told how far a drain is, a few times a second.
	OnDrain func(Progress)
}

func (o *Options) fill() {
	if o.RunRoot == "" {
		o.RunRoot = RunRoot
	}
	if o.StartWithin == 0 {
		o.StartWithin = time.Minute
	}
	if o.LoadWithin == 0 {
		o.LoadWithin = time.Minute
	}
}

// Phase is a step of a restore and when it was reached.
type Phase struct {
	Name string `json:"name"`
	AtNS int64  `json:"at_ns"` // since the restore was asked for
}

// Names of phases, in order. PhaseGreeted is QEMU's monitor, PhaseReady its main
// loop.
const (
	PhasePlanned = "planned"
	PhaseStarted = "started"
	PhaseGreeted = "greeted"
	PhaseReady   = "ready"
	PhaseLayout  = "layout"
	PhaseArmed   = "armed"
	PhaseFed     = "fed"
	PhaseRunning = "running"
	PhaseDrained = "drained"
	PhaseFlat    = "flat" // the disks need the store no longer
)

// Progress of a drain.
type Progress struct {
	Bytes      uint64 `json:"bytes"` // brought in so far
	TotalBytes uint64 `json:"total_bytes"`
	Faults     uint64 `json:"faults"`
}

// Result says what a restore did; times are nanoseconds.
type Result struct {
	Schema             string        `json:"schema"`
	ID                 string        `json:"id"`
	VM                 string        `json:"vm"`
	Name               string        `json:"name"` // of the restored VM: another one for a clone
	QEMUPID            int           `json:"qemu_pid"`
	QMP                string        `json:"qmp"`
	RunDir             string        `json:"run_dir"`
	Lazy               bool          `json:"lazy"`
	Clone              string        `json:"clone,omitempty"`
	Paused             bool          `json:"paused"`
	RAMBytes           uint64        `json:"ram_bytes"`
	LazyBytes          uint64        `json:"lazy_bytes"`            // of them paged in on demand
	ReadyNS            int64         `json:"ready_ns"`              // command to QEMU up (its main loop answers)
	ResumeNS           int64         `json:"resume_ns"`             // QEMU up to guest running (or loaded, if it stays paused)
	CommandToRunningNS int64         `json:"command_to_running_ns"` // both
	DrainedNS          int64         `json:"drained_ns"`            // command to everything in and let go; 0 if detached
	Faults             uint64        `json:"faults"`
	Disks              []DiskResult  `json:"disks"`             // made for it; none where it uses the original images
	FlatNS             int64         `json:"flat_ns,omitempty"` // command to the disks needing the store no longer
	Clock              string        `json:"clock"`             // guest: goes on where it was; agent: set by the guest's agent; rtc: for the guest to read
	ClockStepNS        int64         `json:"clock_step_ns"`     // by which the agent corrected it
	Phases             []Phase       `json:"phases"`
	Changes            []plan.Change `json:"changes"`
	Notes              []string      `json:"notes"`
}

// Schema of Result's JSON form.
const Schema = "ckagent.restore/1"
