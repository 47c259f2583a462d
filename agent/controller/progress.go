package controller

import "time"

// progress takes what happens to the checkpoint that is queued or under way.
func (m *Machine) progress(now time.Time, e Event) {
	switch e := e.(type) {
	case Admitted:
		if m.state == Queued {
			m.state, m.attempted = Arming, now
			m.do(Take{Timed: m.group != 0, Order: m.order})
		}
	case Armed:
		if m.state == Arming && m.group != 0 {
			m.state, m.limit = Prepared, now.Add(m.cfg.PreparedLimit)
			m.say()
		}
	case Stopped:
		switch {
		case m.state == Arming && m.group == 0:
			m.state = Capturing
		case m.state == Arming || m.state == Prepared: // nobody asked for it
			m.abort()
		}
	case Fixed:
		if m.state == Capturing && m.group != 0 {
			m.state = Held
			m.say()
		}
	case Resumed:
		switch {
		case m.state == Capturing && m.group == 0, m.state == ResumeAt && m.at.IsZero():
			m.state, m.limit = Committing, time.Time{}
			m.say()
		case m.state.Still(): // it was not we who had it resumed: the instant is lost
			m.abort()
		}
	case Retaken:
		switch {
		case m.state == Aborted || !m.state.UnderWay():
		case m.group != 0: // its instant has passed
			m.abort()
		default:
			m.state = Arming
		}
	case Taken:
		m.taken()
	case Failed:
		m.failed(e.Class)
	case Retained:
		if m.state == Retaining {
			m.finish(Exists, Idle)
		}
	}
}

// taken: the checkpoint exists. That counts even if it was to be given up.
func (m *Machine) taken() {
	if !m.state.UnderWay() {
		return
	}
	m.state, m.proven = Retaining, true
	m.at, m.limit = time.Time{}, time.Time{}
	m.say()
	m.do(Retain{})
}

func (m *Machine) failed(class Failure) {
	if !m.state.UnderWay() {
		return
	}
	m.state = Aborted
	m.say()
	// That a VM has ended is not for an error to say, and what is given up was not tried.
	hopeless := class == Senseless || class == Forbidden && !m.proven
	if hopeless && !m.dead && !m.leaving {
		m.leaving, m.reason = true, Hopeless
		end := Ended
		if class == Forbidden {
			end = Refused
		}
		m.finish(Missed, end)
		return
	}
	m.finish(Missed, Idle)
}

// finish ends what was queued or under way, and goes on to next: Idle, or an end.
func (m *Machine) finish(o Outcome, next State) {
	began := m.state != Queued
	if m.order != 0 {
		m.do(Answer{m.order, o})
	}
	if began { // an order's failure is reported as well: it is part of the VM's record
		m.do(Report{o})
	} else if m.group != 0 {
		m.do(Say{m.group, Aborted})
	}
	m.order, m.group, m.at, m.limit = 0, 0, time.Time{}, time.Time{}
	if m.queued {
		m.queued = false
		m.do(Leave{})
	}
	m.state = Idle
	if next.Final() {
		m.end(next)
		return
	}
	m.settle()
}

// settle is reached with nothing of ours in the VM: it goes on, or is let go.
func (m *Machine) settle() {
	switch {
	case m.leaving:
		m.end(Ended)
	case m.dead:
		m.bury()
	case m.next != 0:
		m.order, m.next = m.next, 0
		m.enqueue()
	default:
		m.ask()
	}
}

// end lets the VM go.
func (m *Machine) end(final State) {
	m.state = final
	m.dismiss()
	m.due, m.askAt, m.reviveAt = time.Time{}, time.Time{}, time.Time{}
	m.do(LetGo{m.reason})
}

// dismiss answers who waits for what will not come.
func (m *Machine) dismiss() {
	if m.next != 0 {
		m.do(Answer{m.next, Over})
		m.next = 0
	}
}

// say tells the group where its member stands.
func (m *Machine) say() {
	if m.group != 0 {
		m.do(Say{m.group, m.state})
	}
}
