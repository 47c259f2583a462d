package plugins

import (
	"time"

	"github.com/ckagent/ckagent/plugins/policy"
)

// Source is where a decision came from.
type Source string

const (
	FromProgram  Source = "program"
	FromLast     Source = "last"     // the program's last valid one
	FromFallback Source = "fallback" // the built-in policy
)

// Verdict is a decision and whose it is.
type Verdict struct {
	Decision   *policy.Decision
	Source     Source
	Policy     string
	Generation uint64 // 0: built in
	SHA256     string
	Trouble    error // why it is not the program's
	Took       time.Duration
}

// Status is what is to be seen of a slot.
type Status struct {
	Policy      string // in charge
	Path        string // empty: built in
	Generation  uint64 // 0: built in
	SHA256      string
	Params      map[string]string
	PID         int
	Description *policy.Description // nil: built in
	Wanted      string              // that was set; differs from Policy while the fallback is in charge
	Trouble     error               // the last thing that went wrong since the last valid decision
	Decisions   uint64              // of all generations and the fallback
}
