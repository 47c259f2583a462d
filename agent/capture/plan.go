package capture

import (
	"slices"

	"github.com/ckagent/ckagent/agent/capture/faultserver"
	"github.com/ckagent/ckagent/agent/problem"
)

// attempt is one way to take a checkpoint.
type attempt struct {
	mode   Mode
	engine Engine // of mode cow
	// escaped are pages that a capture in the kernel did not see being written, to be
	// copied in the pause.
	escaped []faultserver.Page
}

// plan is the attempts to make in turn. A capture that cannot be proved is discarded;
// a second try meets a quieter guest, and the last one needs no proof, because the guest
// stands still.
type plan struct {
	attempts []attempt
	asked    Mode
}

func newPlan(mode Mode, engine Engine, asked Mode) *plan {
	p := &plan{asked: asked}
	if mode != COW {
		p.attempts = []attempt{{mode: mode, engine: EngineNone}}
		return p
	}
	if engine == EngineBPF {
		p.attempts = append(p.attempts, attempt{mode: COW, engine: EngineBPF})
	}
	synchronous := attempt{mode: COW, engine: EngineUffd}
	p.attempts = append(p.attempts, synchronous, synchronous, attempt{mode: Buffer, engine: EngineNone})
	if asked != COW {
		p.attempts = append(p.attempts, attempt{mode: Stop, engine: EngineNone})
	}
	return p
}

// next goes on to the next attempt after the first of them failed. It reports false if
// there is none, or if another would fail in the same way.
func (p *plan) next(err error) bool {
	now := p.attempts[0]
	p.attempts = p.attempts[1:]
	failure := faultserver.FailureOf(err)
	switch {
	case now.engine == EngineBPF && failure == faultserver.Unproven:
		// Few pages that nobody sees being written are written again the next time.
		if lost := faultserver.EscapedOf(err); len(lost) > 0 && now.escaped == nil {
			now.escaped = lost
			p.attempts = slices.Insert(p.attempts, 0, now)
		}
	case now.engine == EngineBPF && failure == faultserver.Unsupported:
	case failure == faultserver.Unproven:
	case now.mode == Buffer && problem.Is(err, problem.Refused): // more RAM than memory for it
	case failure == faultserver.Unsupported: // and will not be at the next try either
		p.attempts = slices.DeleteFunc(p.attempts, func(a attempt) bool { return a.mode == COW || p.asked == COW })
	default:
		return false
	}
	return len(p.attempts) > 0
}
