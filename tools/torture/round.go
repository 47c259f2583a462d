package torture

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/guardian"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// Round says what to do to whom, and when.
type Round struct {
	Kind     string        `json:"kind"` // step, random, pause, log, ...
	Victim   Victim        `json:"victim"`
	Action   Action        `json:"action"`
	Mode     string        `json:"mode"`               // of the checkpoint
	Engine   string        `json:"engine,omitempty"`   // of mode cow; auto if empty
	Step     string        `json:"step,omitempty"`     // message or log line to act at
	Delay    time.Duration `json:"delay,omitempty"`    // after the step, or after the start
	Fraction float64       `json:"fraction,omitempty"` // the same as a part of the usual length
	Wire     string        `json:"wire,omitempty"`     // what becomes of the message: passed, dropped, torn
	Paused   bool          `json:"paused_before,omitempty"`
	Again    bool          `json:"again,omitempty"` // take a checkpoint afterwards
}

func (r Round) String() string {
	s := fmt.Sprintf("%s: %s of %s, mode %s", r.Kind, r.Action, r.Victim, r.Mode)
	if r.Engine != "" {
		s += ", engine " + r.Engine
	}
	if r.Step != "" {
		s += fmt.Sprintf(", at %q", r.Step)
	}
	if r.Wire != "" {
		s += " (" + r.Wire + ")"
	}
	if r.Delay > 0 {
		s += fmt.Sprintf(" +%v", r.Delay.Round(10*time.Microsecond))
	}
	if r.Paused {
		s += ", guest paused before"
	}
	return s
}

// Outcome is what came of a round.
type Outcome struct {
	Round
	Size       string        `json:"size"`
	Acted      bool          `json:"acted"`          // the instant was reached, and the victim was there
	InPause    bool          `json:"in_pause"`       // between STOP and RESUME
	Exit       int           `json:"exit"`           // of the agent; -1: killed
	Silence    time.Duration `json:"silence"`        // of the guest, after the harm
	Longest    time.Duration `json:"longest"`        // of the guest, in the whole round
	Settled    time.Duration `json:"settled"`        // from the harm until nothing of ours was in QEMU
	Took       time.Duration `json:"took"`           // the agent
	Busy       bool          `json:"busy,omitempty"` // given up unharmed, for lack of processor
	Starved    time.Duration `json:"starved"`        // longest time a thread of this process was kept waiting meanwhile
	Repeated   int           `json:"repeated,omitempty"`
	Exceptions []string      `json:"exceptions,omitempty"`
	late       int           // exceptions that are about time alone
	Steps      []string      `json:"-"`
	Present    []string      `json:"-"` // victims that were there at each step (only with Round.Kind "survey")
	Log        string        `json:"log,omitempty"`
}

func (o *Outcome) fail(format string, args ...any) {
	o.Exceptions = append(o.Exceptions, fmt.Sprintf(format, args...))
}

// failLate is fail for a bound that was missed.
func (o *Outcome) failLate(format string, args ...any) {
	o.late++
	o.fail(format, args...)
}

// hostTooSlow reports whether nothing but time went wrong, on a host that kept
// others waiting as well. Such a round is taken again.
func (o *Outcome) hostTooSlow() bool {
	return len(o.Exceptions) > 0 && o.late == len(o.Exceptions) && o.Starved > starvedHost
}

const starvedHost = 40 * time.Millisecond

// run is a round under way.
type run struct {
	b     *Bed
	round Round
	out   *Outcome
	store string // the bed's if empty
	cmd   *exec.Cmd
	log   syncBuffer

	once  sync.Once
	acted chan struct{} // closed when the harm is done, or could not be
	at    time.Time     // valid once acted is closed
	undo  func()
	err   error
}

// syncBuffer keeps what a process says, bounded.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) line(l string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.b.Len() < 1<<16 {
		s.b.WriteString(l + "\n")
	}
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

const (
	agentPatience = 25 * time.Second // for an agent to end by itself
	afterwards    = 3 * time.Second  // for helpers to end after their agent
	qemuStopped   = 1500 * time.Millisecond
)

// Run takes a checkpoint, does the harm, and checks.
func (b *Bed) Run(ctx context.Context, round Round) *Outcome {
	if round.Fraction > 0 {
		round.Delay = time.Duration(round.Fraction * float64(b.typ))
	}
	out := &Outcome{Round: round, Size: b.size.Name}
	r := &run{b: b, round: round, out: out, acted: make(chan struct{}), undo: func() {}}
	if round.Paused {
		if err := b.command(ctx, "stop"); err != nil {
			out.fail("pause the guest first: %v", err)
			return out
		}
	}
	host := watchHost()
	r.do(ctx)
	out.Starved = host.end()
	if !out.Acted && out.Exit == 0 && len(out.Exceptions) == 0 {
		b.typ = out.Took // the host may be quicker or slower than a minute ago
	}
	if round.Paused && b.vm.Alive() {
		if err := b.command(ctx, "cont"); err != nil {
			out.fail("let the guest go on: %v", err)
		}
	}
	if b.vm.Alive() {
		// Only now: QEMU keeps the descriptors of a set while its guest is paused,
		// and lets go of them when a monitor is closed while it runs.
		if err := b.moreOpen(); err != nil {
			out.fail("%v", err)
		}
	}
	if round.Again && len(out.Exceptions) == 0 && b.vm.Alive() {
		if o := b.Run(ctx, Round{Kind: "again", Victim: Nobody, Action: None, Mode: "cow"}); len(o.Exceptions) > 0 {
			out.fail("the next checkpoint: %s", strings.Join(o.Exceptions, "; "))
			out.Log = o.Log
		}
	}
	if len(out.Exceptions) > 0 {
		out.Log += r.log.String() + b.reports()
	}
	return out
}

// reports is what guardians wrote about what they did.
func (b *Bed) reports() (all string) {
	names, _ := filepath.Glob(filepath.Join(b.state, "*.report.json"))
	for _, n := range names {
		text, _ := os.ReadFile(n)
		all += "\n" + string(text)
	}
	return all
}

func (r *run) do(ctx context.Context) {
	b, out := r.b, r.out
	trap := map[string]func(context.Context) vmtest.Verdict{}
	var timer *time.Timer
	inPause := r.round.Kind == "pause"
	if r.round.Step != "" && !strings.HasPrefix(r.round.Step, "log ") {
		trap[r.round.Step] = func(context.Context) vmtest.Verdict {
			if r.round.Delay == 0 {
				r.act()
			} else {
				go r.later(r.round.Delay) // joined through acted
			}
			return verdicts[r.round.Wire]
		}
		if inPause && r.round.Step != "command cont" {
			// The pause does not end before the harm is done.
			trap["command cont"] = func(ctx context.Context) vmtest.Verdict {
				select {
				case <-r.acted:
				case <-ctx.Done():
				}
				return verdicts[r.round.Wire]
			}
		}
	}
	var present func(string)
	if r.round.Kind == "survey" {
		present = func(string) {
			who := "agent qemu"
			for verb, v := range map[string]Victim{capture.FaultServerVerb: Server, guardian.Verb: Guardian} {
				if p := findChild(verb, r.cmd.Process.Pid); p != nil {
					who += "," + string(v)
					p.close()
				}
			}
			out.Present = append(out.Present, who)
		}
	}
	b.tap.reset(trap, present)
	defer b.tap.reset(nil, nil)

	began := time.Now()
	ended, err := r.start()
	if err != nil {
		out.fail("start: %v", err)
		return
	}
	if r.round.Step == "" && r.round.Victim != Nobody {
		timer = time.AfterFunc(r.round.Delay, r.act)
		defer timer.Stop()
	}
	agent, err := hold(r.cmd.Process.Pid)
	if err != nil {
		out.fail("hold the agent: %v", err)
		return
	}
	defer agent.close()
	// The instant may never come: then this was an unharmed run.
	select {
	case <-r.acted:
	case <-ended:
	case <-time.After(agentPatience):
		out.fail("the agent did not end within %v, and the instant did not come", agentPatience)
		_ = agent.signal(unix.SIGKILL)
	}
	r.once.Do(func() { r.at = time.Now(); close(r.acted) })
	<-r.acted
	if r.err != nil {
		out.fail("harm: %v", r.err)
	}
	switch {
	case r.round.Victim == QEMU && r.round.Action == Kill && out.Acted:
		r.qemuDied(ended)
		return
	case r.round.Victim == QEMU && out.Acted:
		pause := time.NewTimer(qemuStopped)
		<-pause.C
		r.undo()
	}
	r.check(ctx, agent, began, ended)
}

// later acts after a delay, more exactly than a timer would.
func (r *run) later(d time.Duration) {
	t := time.NewTimer(d)
	<-t.C
	r.act()
}

var verdicts = map[string]vmtest.Verdict{"": vmtest.Pass, "passed": vmtest.Pass, "dropped": vmtest.Drop, "torn": vmtest.Torn, "hung up": vmtest.Cut}

// start runs the agent. ended is closed when it was waited for.
func (r *run) start() (ended chan struct{}, err error) {
	b := r.b
	dir := r.store
	if dir == "" {
		dir = b.store
	}
	args := []string{"checkpoint", fmt.Sprint(b.PID()), "--qmp", b.proxy.Path(), "--store", dir, "--mode", r.round.Mode, "--keep-last", "0", "--json", "-v"}
	if r.round.Engine != "" {
		args = append(args, "--engine", r.round.Engine)
	}
	r.cmd = exec.Command(b.g.Binary, args...)
	r.cmd.Env = append(os.Environ(), "CKAGENT_RUN_DIR="+b.state)
	rd, wr, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	r.cmd.Stdout, r.cmd.Stderr = wr, wr
	began := time.Now()
	if err := r.cmd.Start(); err != nil {
		rd.Close()
		wr.Close()
		return nil, err
	}
	wr.Close()
	pid := r.cmd.Process.Pid
	mine.add(pid)
	ended = make(chan struct{})
	go r.listen(rd) // ends with the last process that has the pipe
	go func() {     // joined by everybody who waits for ended
		err := r.cmd.Wait()
		r.out.Took = time.Since(began)
		r.out.Exit = 0
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			r.out.Exit = exit.ExitCode()
		}
		mine.drop(pid)
		close(ended)
	}()
	return ended, nil
}

// listen reads the log, and acts at a line of it if that is the round's instant.
func (r *run) listen(rd *os.File) {
	defer rd.Close()
	want, isLog := strings.CutPrefix(r.round.Step, "log ")
	for s := bufio.NewScanner(rd); s.Scan(); {
		r.log.line(s.Text())
		if isLog && strings.Contains(s.Text(), "msg="+want) {
			if r.round.Delay > 0 {
				go r.later(r.round.Delay)
			} else {
				r.act()
			}
		}
	}
}

// act does the harm, once.
func (r *run) act() {
	r.once.Do(func() {
		defer close(r.acted)
		victims, err := r.victims()
		defer func() {
			for _, p := range victims {
				p.close()
			}
		}()
		r.at = time.Now()
		if err != nil || len(victims) == 0 {
			return // not there at this instant
		}
		// The pidfds are used by undo as well: their own copies.
		var keep []*Proc
		for _, p := range victims {
			if c, err := hold(p.PID); err == nil {
				keep = append(keep, c)
			}
		}
		r.out.InPause = r.b.tap.paused()
		r.at = time.Now()
		undo, err := r.b.cage.harm(r.round.Action, keep)
		r.undo = sync.OnceFunc(func() {
			undo()
			for _, p := range keep {
				p.close()
			}
		})
		if err != nil && !errors.Is(err, unix.ESRCH) {
			r.err = err
		}
		r.out.Acted = !errors.Is(err, unix.ESRCH)
	})
}

// victims finds whom to harm; none if one of them is not there.
func (r *run) victims() ([]*Proc, error) {
	agent := r.cmd.Process.Pid
	one := func(verb string) ([]*Proc, error) {
		if p := findChild(verb, agent); p != nil {
			return []*Proc{p}, nil
		}
		return nil, nil
	}
	self := func() ([]*Proc, error) {
		p, err := hold(agent)
		if err != nil {
			return nil, err
		}
		return []*Proc{p}, nil
	}
	pair := func(first, second []*Proc) ([]*Proc, error) {
		if len(first) == 0 || len(second) == 0 {
			return nil, nil
		}
		return append(first, second...), nil
	}
	switch r.round.Victim {
	case Agent:
		return self()
	case Server:
		return one(capture.FaultServerVerb)
	case Guardian:
		return one(guardian.Verb)
	case Service, Both:
		verb := capture.FaultServerVerb
		if r.round.Victim == Both {
			verb = guardian.Verb
		}
		second, _ := one(verb)
		first, err := self()
		if err != nil {
			return nil, err
		}
		return pair(second, first) // the agent last: it is the parent by which the other is found
	case QEMU:
		p, err := hold(r.b.PID())
		if err != nil {
			return nil, err
		}
		return []*Proc{p}, nil
	}
	return nil, nil
}
