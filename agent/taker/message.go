package taker

import (
	"time"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

// Verb is the hidden command under which the binary calls Main. The pid of the VM follows,
// for people.
const Verb = "__take"

// protocol changes with what is said over the line. The two ends are of different builds
// when ckagent was replaced under a daemon that runs.
const protocol = 2

// Descriptors the child inherits.
const (
	lineFD = 3
	lockFD = 4 // of the VM: held, and handed on to the guardian
	markFD = 5 // a socket by which marks come, and go back
)

const (
	beatEvery = time.Second
	// silence is how long nothing may be heard of a child. On a host without processors to
	// spare a beat is seconds late.
	silence = 15 * time.Second
	// lapses is how often in a row a third of that has to pass: a daemon that was frozen
	// itself finds all its timers due before it has read anything.
	lapses = 3
	// aftermath is how long the guardian of a child that has ended may take to put the VM
	// right before it is not waited for any more.
	aftermath = 5 * time.Second
	// lastWords is how much of what was said on standard error is kept.
	lastWords = 2 << 10
)

// Order is what a checkpoint is to be taken of, and how.
type Order struct {
	Protocol int `json:"protocol"` // set by Start

	PID           int           `json:"pid"`
	StartTicks    uint64        `json:"start_ticks"`
	Name          string        `json:"name"`
	QMP           string        `json:"qmp,omitempty"`
	LeaveDisksOut bool          `json:"leave_disks_out,omitempty"`
	Overlays      bool          `json:"overlays,omitempty"`
	Freeze        time.Duration `json:"freeze_ns,omitempty"`

	Store   string          `json:"store"`
	Capture capture.Options `json:"capture"` // as far as it is data
	Paced   bool            `json:"paced"`   // bytes to the store are to be asked for; set by Start
	Tracked bool            `json:"tracked"` // marks come, or none, and are wanted; set by Start
}

// down is what the daemon says: one of its parts.
type down struct {
	Order   *Order `json:"order,omitempty"`
	Begin   bool   `json:"begin,omitempty"`
	Granted uint64 `json:"granted,omitempty"` // the number of an ask
}

// up is what the child says: one of its parts, or none for a beat, and Urgent with any.
type up struct {
	Ready bool           `json:"ready,omitempty"`
	Step  *capture.Event `json:"step,omitempty"`
	Heard *qmp.Event     `json:"heard,omitempty"`
	Ask   *ask           `json:"ask,omitempty"`
	// Urgent are bytes that went to the store without asking since it was said last.
	Urgent int             `json:"urgent,omitempty"`
	Result *capture.Result `json:"result,omitempty"`
	Error  *problem.Wire   `json:"error,omitempty"`
}

// last reports whether nothing follows.
func (u *up) last() bool { return u.Result != nil || u.Error != nil }

// ask is for room in the host's bandwidth.
type ask struct {
	Number uint64 `json:"number"`
	Bytes  int    `json:"bytes"`
}
