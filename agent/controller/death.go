package controller

import "time"

// died learns that the VM has ended. What is under way fails by that, and has to say so
// first: until then something of ours may be at work on the corpse.
func (m *Machine) died(how Death) {
	if m.dead {
		return
	}
	m.dead, m.how = true, how
	switch {
	case m.state == Idle:
		m.settle()
	case m.state == Queued:
		m.finish(Missed, Idle)
	case m.state.UnderWay():
		m.abort()
	}
}

// bury does what is to be done about a VM that has ended.
func (m *Machine) bury() {
	m.dismiss()
	if m.cfg.OnDeath != Nothing {
		m.do(Announce{m.how})
	}
	if m.cfg.OnDeath == Restore && m.how == Crashed && m.proven {
		m.state = Restoring
		m.due, m.askAt = time.Time{}, time.Time{}
		m.revive()
		return
	}
	m.reason = Gone
	m.end(Ended)
}

func (m *Machine) revive() {
	m.reviveAt = time.Time{}
	m.do(Revive{})
}

func (m *Machine) restored(now time.Time, ok bool) {
	switch {
	case m.state != Restoring:
	case ok:
		m.reason = BroughtBack
		m.end(Ended)
	case m.revivals < len(m.cfg.Revivals):
		m.reviveAt = now.Add(m.cfg.Revivals[m.revivals])
		m.revivals++
	default:
		m.reason = Gone
		m.end(Ended)
	}
}
