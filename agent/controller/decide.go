package controller

import "time"

// ask asks the policy, unless it is being asked.
func (m *Machine) ask() {
	m.due, m.askAt = time.Time{}, time.Time{}
	if m.asked {
		m.again = true
		return
	}
	m.asked, m.again = true, false
	m.do(Ask{})
}

// decided takes the policy's answer.
func (m *Machine) decided(now time.Time, d Decided) {
	if !m.asked {
		return
	}
	m.asked = false
	if m.state != Idle {
		return // it is asked again when the checkpoint is over
	}
	if m.again {
		m.ask()
		return
	}
	m.due, m.askAt = d.At, d.Again
	if earliest := m.attempted.Add(m.cfg.MinInterval); !m.due.IsZero() && m.due.Before(earliest) {
		m.due = earliest
	}
	// A policy that wants to be asked for ever is not asked all the time.
	if soonest := now.Add(m.cfg.MinInterval); !m.askAt.IsZero() && m.askAt.Before(soonest) {
		m.askAt = soonest
	}
	// What it says before its time has come replaces what it said now.
	if !m.askAt.IsZero() && m.askAt.Before(m.due) {
		m.due = time.Time{}
	}
}

// changed voids what was decided.
func (m *Machine) changed() {
	if m.state == Idle {
		m.ask()
	}
}

// ordered begins a checkpoint that an operator wants.
func (m *Machine) ordered(order uint64) {
	switch {
	case m.leaving || m.dead:
		m.do(Answer{order, Over})
	case m.state != Idle && m.next == 0 && !(m.state == Queued && m.order == 0 && m.group == 0):
		m.next = order
	case m.state == Idle:
		m.order = order
		m.enqueue()
	case m.state == Queued && m.order == 0 && m.group == 0:
		m.order = order // what was to be taken anyway is the operator's now
	default:
		m.do(Answer{order, Occupied})
	}
}

// enqueue asks for a turn.
func (m *Machine) enqueue() {
	m.state, m.queued = Queued, true
	m.due, m.askAt = time.Time{}, time.Time{}
	m.do(Enqueue{})
}

// cancel gives up what is queued or under way.
func (m *Machine) cancel(now time.Time) {
	switch {
	case m.state == Queued:
		m.attempted = now // or the policy, which knows of no attempt, has it taken at once
		m.finish(Missed, Idle)
	case m.state.UnderWay():
		m.abort()
	}
}

// abort gives up what is under way. The guest of a held member runs on by that: the
// capture lets nothing stand still that it gives up.
func (m *Machine) abort() {
	if m.state == Aborted {
		return
	}
	m.state = Aborted
	m.at, m.limit = time.Time{}, time.Time{}
	m.do(GiveUp{})
}

// leave lets the VM go as soon as nothing of ours is in it.
func (m *Machine) leave(why Reason) {
	if m.leaving {
		return
	}
	m.leaving, m.reason = true, why
	switch {
	case m.state == Queued:
		m.finish(Missed, Idle)
	case m.state == Idle || m.state == Restoring:
		m.settle()
	case m.state.UnderWay():
		m.abort()
	}
}
