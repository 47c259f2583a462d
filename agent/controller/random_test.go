package controller

import (
	"math/rand/v2"
	"strings"
	"testing"
	"time"
)

// ledger checks from outside what a machine does.
type ledger struct {
	t        *testing.T
	history  []string
	now      time.Time
	asks     int // out
	turns    int // asked for or granted, and not given back
	granted  bool
	running  bool // a checkpoint
	still    time.Time
	orders   map[uint64]bool // not answered yet
	revivals int             // out
	gone     bool
}

func (l *ledger) fail(format string, args ...any) {
	l.t.Helper()
	for _, h := range l.history[max(0, len(l.history)-25):] {
		l.t.Log(h)
	}
	l.t.Fatalf(format, args...)
}

func (l *ledger) see(m *Machine, commands []Command) {
	l.t.Helper()
	for _, c := range commands {
		l.history = append(l.history, "    "+commandText(c))
		if a, answer := c.(Answer); answer {
			if !l.orders[a.Order] {
				l.fail("order %d is answered twice", a.Order)
			}
			delete(l.orders, a.Order)
			continue
		}
		if l.gone {
			l.fail("%s after the end", commandText(c))
		}
		switch c.(type) {
		case Ask:
			l.asks++
		case Enqueue:
			l.turns++
			l.granted = false
		case Leave:
			l.turns--
		case Take:
			if l.running || !l.granted {
				l.fail("a checkpoint is begun while one runs (%v), or without a turn (granted %v)", l.running, l.granted)
			}
			l.running = true
		case Revive:
			l.revivals++
			if l.running {
				l.fail("a VM is brought back while a checkpoint is at work on it")
			}
		case GiveUp, ResumeNow:
			if !l.running {
				l.fail("%s, and nothing is under way", commandText(c))
			}
			l.still = time.Time{}
		case LetGo:
			l.gone = true
			if l.running {
				l.fail("let go with a checkpoint under way")
			}
		}
	}
	if l.asks > 1 || l.turns > 1 || l.turns < 0 || l.revivals > 1 {
		l.fail("asks %d, turns %d, revivals %d", l.asks, l.turns, l.revivals)
	}
	if l.gone != m.State().Final() || l.running != m.State().UnderWay() || l.turns == 1 != m.queued {
		l.fail("state %v: gone %v, running %v, turns %d", m.State(), l.gone, l.running, l.turns)
	}
	if m.State() == Idle && m.asked != (l.asks == 1) {
		l.fail("asked %v, asks %d", m.asked, l.asks)
	}
	if l.gone && len(l.orders) > 0 {
		l.fail("the end came with orders unanswered")
	}
	if !l.still.IsZero() && l.now.Sub(l.still) > m.cfg.HeldLimit {
		l.fail("the guest of a member stands still since %v", l.now.Sub(l.still))
	}
	if w := m.Wake(); !w.IsZero() && !w.After(l.now) {
		l.fail("wants a tick in the past: %v", l.now.Sub(w))
	}
	if m.State() == Idle && !m.asked && m.Wake().IsZero() && !decidedNothing(l.history) {
		l.fail("idle, and waits for nothing: the VM is forgotten")
	}
}

// decidedNothing: the policy itself wanted that.
func decidedNothing(history []string) bool {
	for i := len(history) - 1; i >= 0; i-- {
		if strings.HasSuffix(history[i], " none") {
			return true
		}
	}
	return false
}

// TestRandomRuns: whatever happens in whatever order, the invariants hold. The events
// are those that may happen, and now and then those that may not.
func TestRandomRuns(t *testing.T) {
	runs := 6000
	if testing.Short() {
		runs = 2000
	}
	seen := map[State]int{}
	for seed := range runs {
		rng := rand.New(rand.NewPCG(uint64(seed), 7))
		cfg := Config{MinInterval: time.Second, PreparedLimit: 5 * time.Second, HeldLimit: 100 * time.Millisecond,
			OnDeath: OnDeath(rng.IntN(3)), Proven: rng.IntN(2) == 0, Revivals: []time.Duration{time.Second}}
		l := &ledger{t: t, now: zero, orders: map[uint64]bool{}}
		m, c := New(cfg, zero)
		l.see(m, c)
		for i := range 60 {
			l.now = l.now.Add(time.Duration(rng.Int64N(int64(60 * time.Millisecond))))
			if w := m.Wake(); rng.IntN(3) == 0 && !w.IsZero() && w.After(l.now) {
				l.now = w
			} else if !w.IsZero() && l.now.After(w) {
				l.now = w // whoever drives it is told when to come
			}
			e := l.event(rng, m, uint64(i+1))
			l.history = append(l.history, l.now.Sub(zero).String()+" "+eventText(e))
			l.see(m, m.Step(l.now, e))
			seen[m.State()]++
		}
		// However it stands, a detach ends it once the effects are over.
		for _, e := range []Event{DetachWanted{}, Failed{Given}, Retained{}} {
			if _, failed := e.(Failed); failed {
				l.running = false
			}
			l.history = append(l.history, eventText(e))
			l.see(m, m.Step(l.now, e))
		}
		if !m.State().Final() {
			l.fail("a detach leaves it %v", m.State())
		}
	}
	for s := range stateNames {
		if seen[State(s)] == 0 {
			t.Errorf("no run came to %v: the test tests less than it says", State(s))
		}
	}
}

func eventText(e Event) string {
	if d, ok := e.(Decided); ok && d.At.IsZero() && d.Again.IsZero() {
		return "none"
	}
	for text, known := range phrases {
		if known == e {
			return text
		}
	}
	return "other"
}

// event is what may come next; sometimes anything.
func (l *ledger) event(rng *rand.Rand, m *Machine, n uint64) Event {
	soon := func() time.Time { return l.now.Add(time.Duration(rng.Int64N(int64(3 * time.Second)))) }
	var may []Event
	add := func(ok bool, e ...Event) {
		if ok {
			may = append(may, e...)
		}
	}
	add(true, Tick{}, PolicyChanged{}, Prepare{n}, Disband{m.group})
	add(l.asks > 0, Decided{At: soon()}, Decided{At: soon()}, Decided{At: soon(), Again: soon()}, Decided{Again: soon()})
	add(l.asks > 0 && rng.IntN(20) == 0, Decided{})
	add(l.turns > 0 && !l.granted, Admitted{}, Admitted{}, Admitted{})
	add(l.running, Armed{}, Stopped{}, Resumed{}, Fixed{}, Retaken{}, Taken{}, Failed{Passing}, Failed{Failure(rng.IntN(4))})
	add(l.running, Suspend{m.group, soon().Add(-2 * time.Second)}, Resume{m.group, l.now.Add(time.Duration(rng.IntN(200)) * time.Millisecond)})
	// A group's way is long: mostly what it hopes for comes next.
	for range 12 {
		add(l.running && m.State() == Arming && m.group != 0, Armed{})
		add(m.State() == Prepared, Suspend{m.group, l.now.Add(20 * time.Millisecond)})
		add(m.State() == Capturing && m.group != 0, Fixed{})
		add(m.State() == Held, Resume{m.group, l.now.Add(20 * time.Millisecond)})
		add(m.State() == ResumeAt && m.at.IsZero(), Resumed{})
	}
	add(m.State() == Retaining, Retained{}, Retained{})
	add(l.revivals > 0, Restored{rng.IntN(2) == 0})
	add(rng.IntN(4) == 0, Ordered{n}, CancelWanted{})
	add(rng.IntN(40) == 0, DetachWanted{}, Stopping{}, Died{Death(rng.IntN(5))})
	e := may[rng.IntN(len(may))]
	switch e := e.(type) {
	case Ordered:
		l.orders[e.Order] = true
	case Decided:
		l.asks--
	case Admitted:
		l.granted = true
	case Taken, Failed:
		l.running, l.still = false, time.Time{}
	case Fixed:
		if m.State() == Capturing && m.group != 0 {
			l.still = l.now
		}
	case Resumed:
		l.still = time.Time{}
	case Restored:
		l.revivals--
	}
	return e
}
