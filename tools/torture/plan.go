package torture

import (
	"math/rand/v2"
	"strings"
	"time"
)

// Survey is what an unharmed run looks like: its messages in order, and who was
// there at each.
type Survey struct {
	Steps   []string
	Present []string // as "agent qemu,fault server,guardian"
	Took    time.Duration
}

func (s *Survey) has(i int, v Victim) bool {
	switch v {
	case Agent, QEMU:
		return true
	case Service:
		return strings.Contains(s.Present[i], ","+string(Server))
	case Both:
		return strings.Contains(s.Present[i], ","+string(Guardian))
	}
	return strings.Contains(s.Present[i], ","+string(v))
}

// core are the steps from the first at which a helper is there to the last: the
// ones at which something can be held. The others only look at the machine.
func (s *Survey) core() (from int) {
	for i := range s.Steps {
		if s.has(i, Guardian) || s.has(i, Server) {
			return i
		}
	}
	return len(s.Steps)
}

// pairs are the victims and what is done to them.
var pairs = []struct {
	v Victim
	a []Action
}{
	{Agent, []Action{Kill, Stop, Freeze, Starve}},
	{Server, []Action{Kill, Stop}},
	{Guardian, []Action{Kill, Stop}},
	{Service, []Action{Kill, Freeze, Starve}},
	{Both, []Action{Kill}},
	{QEMU, []Action{Kill, Stop}},
}

// engineOf has the engines take turns.
func engineOf(i int, mode string) string {
	if mode != "cow" {
		return ""
	}
	return []string{"uffd", "bpf"}[i%2]
}

// logSteps are steps of a checkpoint that show in the agent's log only.
var logSteps = []string{"log prearm", "log resume", "log commit"}

// StepRounds are all victims and actions at every step of a checkpoint in mode
// cow; with what becomes of a command in flight; with the guest paused before; and
// the agent at every step in the other modes. They are shuffled, so that a campaign
// that runs out of time has seen some of each.
func StepRounds(rng *rand.Rand, s *Survey) (rounds []Round) {
	core := s.core()
	add := func(r Round) {
		r.Kind, r.Again, r.Engine = "step", len(rounds)%4 == 0, engineOf(len(rounds), r.Mode)
		rounds = append(rounds, r)
	}
	for i, step := range s.Steps {
		if i < core {
			// Nothing is held here: one in six, and who is there.
			if i%6 == 0 {
				for _, a := range []Action{Kill, Stop} {
					add(Round{Victim: Agent, Action: a, Mode: "cow", Step: step})
				}
				add(Round{Victim: QEMU, Action: Kill, Mode: "cow", Step: step})
			}
			continue
		}
		for _, p := range pairs {
			if !s.has(i, p.v) {
				continue
			}
			for _, a := range p.a {
				add(Round{Victim: p.v, Action: a, Mode: "cow", Step: step})
			}
		}
		if strings.HasPrefix(step, "command ") {
			for _, wire := range []string{"dropped", "torn"} {
				add(Round{Victim: Agent, Action: Kill, Mode: "cow", Step: step, Wire: wire})
				add(Round{Victim: Agent, Action: Stop, Mode: "cow", Step: step, Wire: wire})
			}
		}
		add(Round{Victim: Agent, Action: Kill, Mode: "cow", Step: step, Paused: true})
		add(Round{Victim: Agent, Action: Stop, Mode: "cow", Step: step, Paused: true})
		for _, mode := range []string{"buffer", "stop"} {
			add(Round{Victim: Agent, Action: Kill, Mode: mode, Step: step})
			add(Round{Victim: Agent, Action: Freeze, Mode: mode, Step: step})
		}
	}
	for _, step := range logSteps {
		for _, p := range pairs {
			for _, a := range p.a {
				add(Round{Victim: p.v, Action: a, Mode: "cow", Step: step})
			}
		}
	}
	rng.Shuffle(len(rounds), func(i, j int) { rounds[i], rounds[j] = rounds[j], rounds[i] })
	return rounds
}

// SmallRounds are one round for each kind of victim and action at the steps that
// matter most: what every change should pass.
func SmallRounds() (rounds []Round) {
	add := func(v Victim, a Action, step, wire string) {
		rounds = append(rounds, Round{Kind: "step", Victim: v, Action: a, Mode: "cow", Step: step, Wire: wire, Again: len(rounds)%5 == 0, Engine: engineOf(len(rounds), "cow")})
	}
	add(Agent, Kill, "greeting", "")
	add(Agent, Kill, "command stop", "torn")
	add(Agent, Kill, "event STOP", "")
	add(Agent, Kill, "reply xen-save-devices-state", "")
	add(Agent, Kill, "command cont", "dropped")
	add(Agent, Kill, "command cont", "torn")
	add(Agent, Kill, "event RESUME", "")
	add(Agent, Kill, "log commit", "")
	add(Agent, Stop, "reply xen-save-devices-state", "")
	add(Agent, Stop, "event RESUME", "")
	add(Agent, Freeze, "command cont", "dropped")
	add(Agent, Starve, "event STOP", "")
	add(Server, Kill, "reply xen-save-devices-state", "")
	add(Server, Kill, "event RESUME", "")
	add(Server, Stop, "event RESUME", "")
	add(Guardian, Kill, "event STOP", "")
	add(Guardian, Stop, "event STOP", "")
	add(Service, Freeze, "event RESUME", "")
	add(Both, Kill, "command cont", "dropped")
	add(QEMU, Stop, "event STOP", "")
	add(QEMU, Kill, "command cont", "")
	return rounds
}

// within the pause, in order.
var pauseSteps = []string{"event STOP", "reply stop", "reply xen-save-devices-state", "command cont"}

// RandomRounds draws n instants: a part of them inside the pause, the others over
// the whole length of a checkpoint.
func RandomRounds(rng *rand.Rand, n, inPause int) (rounds []Round) {
	for i := range n {
		p := pairs[rng.IntN(len(pairs))]
		if p.v != Agent && rng.IntN(3) == 0 {
			p = pairs[0] // the agent is what dies most in practice
		}
		r := Round{Kind: "random", Victim: p.v, Action: p.a[rng.IntN(len(p.a))], Mode: "cow", Again: i%10 == 0, Engine: engineOf(i, "cow")}
		if i < inPause {
			r.Kind, r.Step = "pause", pauseSteps[rng.IntN(len(pauseSteps))]
			r.Delay = time.Duration(rng.Int64N(int64(8 * time.Millisecond)))
			if r.Step == "command cont" {
				r.Delay = 0
			}
			if r.Action == Kill && (p.v == Agent || p.v == Service || p.v == Both) {
				r.Wire = []string{"passed", "dropped", "torn"}[rng.IntN(3)]
				if r.Step != "command cont" {
					r.Wire = "" // what QEMU says arrives or not, which a dead agent cannot tell
				}
			}
		} else {
			r.Fraction = rng.Float64()
		}
		rounds = append(rounds, r)
	}
	rng.Shuffle(len(rounds), func(i, j int) { rounds[i], rounds[j] = rounds[j], rounds[i] })
	return rounds
}

// SizeRounds are those whose silence grows with RAM: what lets go of it.
func SizeRounds() (rounds []Round) {
	add := func(v Victim, a Action, step, wire string) {
		rounds = append(rounds, Round{Kind: "size", Victim: v, Action: a, Mode: "cow", Step: step, Wire: wire})
	}
	rounds = append(rounds, Round{Kind: "unharmed", Victim: Nobody, Action: None, Mode: "cow"})
	for _, step := range []string{"event STOP", "reply xen-save-devices-state", "event RESUME"} {
		add(Agent, Kill, step, "")
		add(Agent, Stop, step, "")
		add(Service, Freeze, step, "")
		add(Service, Kill, step, "")
		add(Server, Kill, step, "")
		add(Server, Stop, step, "")
	}
	add(Agent, Kill, "command cont", "dropped")
	add(Agent, Stop, "command cont", "torn")
	add(Agent, Freeze, "command cont", "")
	add(Agent, Starve, "event RESUME", "")
	add(Both, Kill, "command cont", "dropped")
	return rounds
}
