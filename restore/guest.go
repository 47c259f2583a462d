package restore

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/ckagent/ckagent/agent/cmdline"
	"github.com/ckagent/ckagent/agent/guestagent"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

// Values of Result.Clock.
const (
	clockGuest = "guest"
	clockAgent = "agent"
	clockRTC   = "rtc"
)

// agentTimeout bounds the conversation with the agent of a guest whose memory is
// still being paged in.
const agentTimeout = 10 * time.Second

// frozen reports whether the guest's file systems were frozen in the checkpoint.
func (x *run) frozen() bool { return x.m.Machine.Facts[image.FactFrozen] == "true" }

// checkClock refuses to promise the host's time where nothing can bring it to the
// guest.
func (x *run) checkClock() error {
	if !x.o.HostClock {
		return nil
	}
	opts, err := cmdline.Parse(x.plan.Args)
	if err != nil {
		return problem.New(problem.Refused, "restore", "clock", "%w", err)
	}
	virtual := false
	for _, o := range opts {
		if o.Name != "rtc" && o.Name != "device" {
			continue
		}
		kv, err := o.KeyVal()
		if err != nil {
			continue
		}
		if name, _ := kv.Get("name"); o.Name == "device" && name == guestagent.PortName {
			return nil
		}
		if clock, _ := kv.Get("clock"); o.Name == "rtc" && clock == "vm" {
			virtual = true
		}
	}
	if virtual {
		return problem.New(problem.Refused, "restore", "clock", "the VM has no guest agent, and its real-time clock stands still with it (-rtc clock=vm): nothing can tell the guest the host's time").
			WithHint("restore it without --clock host and set the clock in the guest")
	}
	return nil
}

// present makes the restored VM known on its network and finds its guest's agent if
// that is wanted. The guest runs, or stays paused.
func (x *run) present(ctx context.Context, c *qmp.Client) {
	if x.cpuNote != "" {
		x.note("%s", x.cpuNote)
	}
	if x.plan.Paused {
		if x.frozen() {
			x.note("the guest's file systems are frozen: thaw them when it runs (guest-fsfreeze-thaw)")
		}
		if x.o.HostClock {
			x.note("the guest is paused: its clock was left as it is")
		}
		return
	}
	if len(x.plan.NICs) > 0 {
		// QEMU announces by itself when a state was loaded, before the guest runs.
		// A guest that announces itself can do so only now.
		err := c.Execute(ctx, "announce-self", map[string]int{"initial": 50, "max": 550, "rounds": 5, "step": 100}, nil)
		if err != nil {
			x.note("the VM could not be announced on its network: %v", err)
		}
	}
	if !x.frozen() && !x.o.HostClock {
		return
	}
	ch, err := guestagent.Find(ctx, c)
	switch {
	case err == nil:
		x.agent = ch
	case x.frozen():
		x.note("the guest's file systems are frozen, and nothing was found to thaw them: %v", err)
	default:
		x.clockByRTC()
	}
}

// clockByRTC says what the guest has to do for the host's time.
func (x *run) clockByRTC() {
	x.res.Clock = clockRTC
	x.note("no guest agent: the guest's real-time clock shows the host's time, its wall clock follows when the guest reads that (hwclock --hctosys)")
}

// attend has the guest's agent do what a guest needs that was asleep. The guest
// runs, whatever becomes of this.
func (x *run) attend(ctx context.Context) {
	if x.agent.Address == "" {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, agentTimeout)
	defer cancel()
	if err := x.converse(ctx); err != nil {
		var undone []string
		if x.frozen() {
			undone = append(undone, "its file systems may still be frozen (guest-fsfreeze-thaw)")
		}
		if x.o.HostClock && x.res.Clock == clockGuest {
			undone = append(undone, "its clock was not set")
		}
		x.note("the guest's agent: %v; %s", err, strings.Join(undone, ", "))
	}
}

func (x *run) converse(ctx context.Context) error {
	a, err := guestagent.Dial(ctx, x.agent, x.q.proc.Path("root"))
	if err != nil {
		return err
	}
	defer a.Close()
	if x.frozen() {
		if _, err := a.Thaw(ctx); err != nil {
			return fmt.Errorf("thaw: %w", err)
		}
	}
	if !x.o.HostClock {
		return nil
	}
	before, err := a.Time(ctx)
	if err != nil {
		return err
	}
	now := time.Now()
	if err := a.SetTime(ctx, now); err != nil {
		return err
	}
	x.res.Clock, x.res.ClockStepNS = clockAgent, now.Sub(before).Nanoseconds()
	return nil
}
