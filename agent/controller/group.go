package controller

// prepare makes the VM a member of a group's checkpoint.
func (m *Machine) prepare(group uint64) {
	if m.state != Idle || m.leaving || m.dead {
		m.do(Say{group, Aborted})
		return
	}
	m.group = group
	m.enqueue()
}

// suspend learns the group's instant. A time that has passed is now: others may stand
// still already.
func (m *Machine) suspend(e Suspend) {
	if m.state == Prepared && e.Group == m.group {
		m.state, m.at = SuspendAt, e.At
	}
}

// resume learns when the guest runs on. Later than its limit it does so anyway, and the
// member is lost to the group.
func (m *Machine) resume(e Resume) {
	if m.state == Held && e.Group == m.group {
		m.state, m.at = ResumeAt, e.At
	}
}
