package proving

import (
	"context"
	"errors"
	"os"

	"github.com/ckagent/ckagent/agent/capture/faultserver"
)

// Outcome is what is known of a path.
type Outcome string

// The outcomes. An Inconclusive one is never written down.
const (
	Proved       Outcome = "proved"
	Refuted      Outcome = "refuted"
	Inconclusive Outcome = "inconclusive" // for want of time
)

var (
	// errWrong is a capture that is not what it has to be.
	errWrong = errors.New("the capture is wrong")
	// errTooFew is one that says nothing.
	errTooFew = errors.New("too few pages came by the ring")
)

// finding is what one trial says.
type finding int

const (
	right    finding = iota
	wrong            // a page is not what it has to be
	doubtful         // it did not come to a comparison; a host that was in trouble would do
	late             // there was not the time
)

// find classes a trial's error. A wrong page is one, whatever came of the rest.
func find(err error) finding {
	switch {
	case err == nil:
		return right
	case errors.Is(err, errWrong):
		return wrong
	case errors.Is(err, errTooFew), errors.Is(err, context.DeadlineExceeded), errors.Is(err, os.ErrDeadlineExceeded):
		return late
	}
	switch faultserver.FailureOf(err) {
	case faultserver.Silent, faultserver.Stalled, faultserver.Aborted: // limits of time of the server's own
		return late
	}
	return doubtful
}

// trials sums up the findings of one path.
type trials struct{ doubts int }

// add says what is known after one more. A doubt counts when it comes again: what a
// kernel refuses it refuses each time, and a process that was killed for want of memory is
// not killed for ever.
func (t *trials) add(f finding) Outcome {
	switch f {
	case right:
		return Proved
	case wrong:
		return Refuted
	case doubtful:
		if t.doubts++; t.doubts > 1 {
			return Refuted
		}
	}
	return Inconclusive
}
