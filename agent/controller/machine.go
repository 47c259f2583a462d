package controller

import "time"

// Config does not change while a machine runs.
type Config struct {
	// MinInterval is the least time between the beginnings of two attempts that a
	// policy asks for. Operators and groups do not heed it.
	MinInterval time.Duration
	// PreparedLimit is how long a member of a group stays armed without its group's
	// word, HeldLimit how long its guest stands still.
	PreparedLimit, HeldLimit time.Duration
	OnDeath                  OnDeath
	// Revivals are the waits before another try to bring a crashed VM back; their
	// number bounds the tries.
	Revivals []time.Duration
	// Proven: a checkpoint of this VM succeeded before, under an earlier machine.
	Proven bool
}

// Machine is the protection of one VM. Its zero value is of no use; see New.
type Machine struct {
	cfg   Config
	state State
	out   []Command // of the step that is being made; empty between two steps

	// asked: the policy owes a Decided. At most one Ask is out at a time.
	asked bool
	// again: something changed since the policy was asked; its answer is void. Only
	// while asked.
	again bool
	// due is the checkpoint that the policy wants, askAt when it is asked again;
	// zero: neither. Both are zero while a checkpoint is under way.
	due, askAt time.Time

	// queued: a turn was asked for or granted, and not given back. True in Queued
	// and while a checkpoint is under way, false in Idle and at the end.
	queued bool
	// order is who waits for the checkpoint that is queued or under way; 0: nobody.
	// Each order is answered exactly once.
	order uint64
	// next is an order that waits until what is queued or under way is over; 0: none.
	next uint64
	// group is whose member the checkpoint is; 0: none's.
	group uint64
	// at is the group's time in SuspendAt and ResumeAt; limit is when a member that
	// hears nothing gives up, and is set in Prepared and SuspendAt, and from the stop
	// of a member's guest to its resumption.
	at, limit time.Time
	// attempted is the beginning of the last attempt.
	attempted time.Time
	// proven: some checkpoint succeeded, so a refusal is of a passing state.
	proven bool

	// leaving: the VM is let go as soon as nothing of ours is in it, for reason.
	leaving bool
	reason  Reason
	// dead: the VM has ended, as how says. Nothing is asked of it any more.
	dead bool
	how  Death
	// revivals are those tried; reviveAt is when the next is due, zero while one is
	// under way.
	revivals int
	reviveAt time.Time
}

// New makes a machine, and its first commands.
func New(cfg Config, now time.Time) (*Machine, []Command) {
	m := &Machine{cfg: cfg, proven: cfg.Proven}
	m.ask()
	return m, m.flush()
}

// Step takes an event that happened at now and returns what is to be done. Events that
// make no sense any more, because they crossed a command on the way, are ignored.
func (m *Machine) Step(now time.Time, e Event) []Command {
	if m.state.Final() {
		if o, ok := e.(Ordered); ok {
			m.do(Answer{o.Order, Over})
		}
		return m.flush()
	}
	m.step(now, e)
	m.tick(now)
	return m.flush()
}

func (m *Machine) do(c Command) { m.out = append(m.out, c) }

func (m *Machine) flush() []Command {
	out := m.out
	m.out = nil
	return out
}

func (m *Machine) step(now time.Time, e Event) {
	switch e := e.(type) {
	case Tick: // Step does the rest
	case Decided:
		m.decided(now, e)
	case PolicyChanged:
		m.changed()
	case Ordered:
		m.ordered(e.Order)
	case CancelWanted:
		m.cancel(now)
	case DetachWanted:
		m.leave(Detached)
	case Stopping:
		m.leave(Suspended)
	case Died:
		m.died(e.How)
	case Restored:
		m.restored(now, e.OK)
	case Prepare:
		m.prepare(e.Group)
	case Suspend:
		m.suspend(e)
	case Resume:
		m.resume(e)
	case Disband:
		if e.Group == m.group && e.Group != 0 {
			m.cancel(now)
		}
	default:
		m.progress(now, e)
	}
}

// tick does what is due.
func (m *Machine) tick(now time.Time) {
	switch {
	case m.state == Idle && !m.asked && isDue(now, m.due):
		m.enqueue()
	case m.state == Idle && isDue(now, m.askAt):
		m.ask()
	case m.state == SuspendAt && isDue(now, m.at):
		m.state = Capturing
		// From now on, not from Stopped: the guest may stand still at once.
		m.limit = now.Add(m.cfg.HeldLimit)
		m.do(SuspendNow{})
	case m.state == ResumeAt && isDue(now, m.at):
		m.at = time.Time{}
		m.do(ResumeNow{})
	case m.state == Restoring && isDue(now, m.reviveAt):
		m.revive()
	}
	if isDue(now, m.limit) && m.state.UnderWay() {
		m.abort()
	}
}

func isDue(now, at time.Time) bool { return !at.IsZero() && !now.Before(at) }

// Wake is when the machine wants a Tick at the latest; zero: it waits for something
// else.
func (m *Machine) Wake() time.Time {
	var first time.Time
	consider := func(at time.Time) {
		if !at.IsZero() && (first.IsZero() || at.Before(first)) {
			first = at
		}
	}
	switch {
	case m.state == Idle:
		consider(m.due)
		consider(m.askAt)
	case m.state == SuspendAt || m.state == ResumeAt:
		consider(m.at)
	case m.state == Restoring:
		consider(m.reviveAt)
	}
	if m.state.UnderWay() && m.state != Aborted {
		consider(m.limit)
	}
	return first
}

// State is where the machine stands.
func (m *Machine) State() State { return m.state }

// Due is when the policy wants the next checkpoint; zero: nobody knows.
func (m *Machine) Due() time.Time { return m.due }

// Leaving reports whether the VM is being let go.
func (m *Machine) Leaving() bool { return m.leaving || m.dead }
