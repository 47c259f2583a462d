package torture

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/restore/pager"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// restorePhases are the steps of a lazy restore as its log names them. From
// "running" on the guest runs.
var restorePhases = []string{"planned", "started", "greeted", "ready", "layout", "armed", "fed", "running", "drained"}

var restorePairs = []struct {
	v Victim
	a []Action
}{
	{Restorer, []Action{Kill, Stop}},
	{Pager, []Action{Kill, Stop}},
	{Supervisor, []Action{Kill, Stop}},
	{Pagers, []Action{Kill}},
	{QEMU, []Action{Kill}},
}

// drainRate slows paging in, so that an instant after the start finds it at work.
const drainRate = "48M"

// pagerBack is how long a guest may wait for a page whose pager was harmed: a frozen
// one is recognized after half a second, one that gets no processor after two, and
// the next one has to start.
const pagerBack = 5 * time.Second

// RestoreRounds are all victims and actions at each phase of a restore, and n
// random instants while memory is paged in.
func RestoreRounds(rng *rand.Rand, n int) (rounds []Round) {
	for _, phase := range restorePhases {
		for _, p := range restorePairs {
			for _, a := range p.a {
				if phase == "planned" && p.v != Restorer {
					continue // there is nobody else yet
				}
				rounds = append(rounds, Round{Kind: "restore", Victim: p.v, Action: a, Mode: "lazy", Step: "log restore phase=" + phase})
			}
		}
	}
	defer func() {
		rng.Shuffle(len(rounds), func(i, j int) { rounds[i], rounds[j] = rounds[j], rounds[i] })
	}()
	for range n {
		p := restorePairs[rng.IntN(len(restorePairs))]
		rounds = append(rounds, Round{Kind: "restore", Victim: p.v, Action: p.a[rng.IntN(len(p.a))], Mode: "lazy",
			Step: "log restore phase=running", Delay: time.Duration(rng.Int64N(int64(time.Second)))})
	}
	return rounds
}

// SmallRestoreRounds are those that every change should pass.
func SmallRestoreRounds() (rounds []Round) {
	add := func(v Victim, a Action, phase string, after time.Duration) {
		rounds = append(rounds, Round{Kind: "restore", Victim: v, Action: a, Mode: "lazy", Step: "log restore phase=" + phase, Delay: after})
	}
	add(Pager, Kill, "running", 100*time.Millisecond)
	add(Pager, Stop, "running", 100*time.Millisecond)
	add(Pagers, Kill, "running", 100*time.Millisecond)
	add(Restorer, Kill, "armed", 0)
	return rounds
}

// restored is a restore under way.
type restored struct {
	run
	qmp    string
	from   int64 // of the console
	qemu   *Proc
	passed map[string]bool // phases
	mu     sync.Mutex
}

// Restores runs rounds that harm a restore.
func (c *Campaign) Restores(ctx context.Context, rounds []Round) error {
	b, err := NewBed(ctx, c.ground, Sizes["256 MiB"])
	if err != nil {
		return fmt.Errorf("new guest: %w", err)
	}
	defer b.Close()
	// The original crashes; from now on every guest is a restored one.
	if err := b.vm.Crash(); err != nil {
		return err
	}
	for _, r := range rounds {
		if ctx.Err() != nil {
			return nil
		}
		o := b.Restore(context.WithoutCancel(ctx), r)
		for n := 1; n <= maxRepeats && o.hostTooSlow(); n++ {
			fmt.Fprintf(c.Log, "     again: %v, but the host kept a thread of ours waiting %v\n", o.Exceptions, o.Starved.Round(time.Millisecond))
			o = b.Restore(context.WithoutCancel(ctx), r)
			o.Repeated = n
		}
		c.note(o)
	}
	return nil
}

// Restore restores the bed's checkpoint, does the harm, checks, and ends the guest.
func (b *Bed) Restore(ctx context.Context, round Round) *Outcome {
	out := &Outcome{Round: round, Size: b.size.Name}
	x := &restored{run: run{b: b, round: round, out: out, acted: make(chan struct{}), undo: func() {}},
		qmp: filepath.Join(b.dir, "restored.sock"), from: b.vm.SerialSize(), passed: map[string]bool{}}
	host := watchHost()
	x.do(ctx)
	out.Starved = host.end()
	if len(out.Exceptions) > 0 {
		out.Log = x.log.String()
		for _, pattern := range []string{"pager.log", "qemu.log"} {
			names, _ := filepath.Glob("/run/ckagent/restored/torture-" + fmt.Sprint(os.Getpid()) + "*/" + pattern)
			for _, n := range names {
				text, _ := os.ReadFile(n)
				out.Log += n + ":\n" + string(text)
			}
		}
	}
	x.clean()
	return out
}

// clean ends whatever is left, so that the next round is a fresh one.
func (x *restored) clean() {
	x.undo()
	if x.qemu != nil {
		_ = x.qemu.signal(unix.SIGKILL)
		if x.qemu.ended(5 * time.Second) {
			mine.drop(x.qemu.PID)
		}
		x.qemu.close()
	}
	var left []int
	if !await(afterwards, func() bool { left = orphans(); return len(left) == 0 }) {
		for _, pid := range left {
			x.out.fail("left behind after QEMU's end: pid %d %s", pid, verbOf(pid))
			_ = unix.Kill(pid, unix.SIGKILL) // our own descendant, and not reaped yet
		}
		await(time.Second, func() bool { return len(orphans()) == 0 })
	}
}

func (x *restored) start() (ended chan struct{}, err error) {
	b := x.b
	x.cmd = exec.Command(b.g.Binary, "restore", b.base, "--store", b.store, "--qmp", x.qmp, "--bandwidth", drainRate, "--json", "-v")
	x.cmd.Env = append(os.Environ(), "CKAGENT_RUN_DIR="+b.state)
	rd, wr, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	x.cmd.Stdout, x.cmd.Stderr = wr, wr
	began := time.Now()
	if err := x.cmd.Start(); err != nil {
		rd.Close()
		wr.Close()
		return nil, err
	}
	wr.Close()
	pid := x.cmd.Process.Pid
	mine.add(pid)
	ended = make(chan struct{})
	go x.listen(rd)
	go func() {
		err := x.cmd.Wait()
		x.out.Took = time.Since(began)
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			x.out.Exit = exit.ExitCode()
		}
		mine.drop(pid)
		close(ended)
	}()
	return ended, nil
}

// listen follows the restore's log. QEMU is taken hold of as soon as it is there.
func (x *restored) listen(rd *os.File) {
	defer rd.Close()
	want, _ := strings.CutPrefix(x.round.Step, "log ")
	for s := bufio.NewScanner(rd); s.Scan(); {
		x.log.line(s.Text())
		_, phase, ok := strings.Cut(s.Text(), "msg=restore phase=")
		if !ok {
			continue
		}
		phase, _, _ = strings.Cut(phase, " ")
		x.mu.Lock()
		x.passed[phase] = true
		if x.qemu == nil && phase != "planned" {
			x.qemu = findProgram("qemu-system-x86_64", x.cmd.Process.Pid)
			if x.qemu != nil {
				mine.add(x.qemu.PID)
			}
		}
		x.mu.Unlock()
		if want != "" && "restore phase="+phase == want {
			if x.round.Delay > 0 {
				go func() {
					t := time.NewTimer(x.round.Delay)
					<-t.C
					x.act()
				}()
			} else {
				x.act()
			}
		}
	}
}

// act does the harm, once.
func (x *restored) act() {
	x.once.Do(func() {
		defer close(x.acted)
		roots := []int{x.cmd.Process.Pid, os.Getpid()}
		var victims []*Proc
		add := func(p *Proc) {
			if p != nil {
				victims = append(victims, p)
			}
		}
		need := 1
		switch x.round.Victim {
		case Restorer:
			if p, err := hold(x.cmd.Process.Pid); err == nil {
				add(p)
			}
		case Pager:
			add(findBelow(pager.VerbWorker, roots...))
		case Supervisor:
			add(findBelow(pager.VerbSupervisor, roots...))
		case Pagers:
			add(findBelow(pager.VerbWorker, roots...))
			add(findBelow(pager.VerbSupervisor, roots...))
			need = 2
		case QEMU:
			x.mu.Lock()
			if x.qemu != nil {
				if p, err := hold(x.qemu.PID); err == nil {
					add(p)
				}
			}
			x.mu.Unlock()
		}
		x.at = time.Now()
		if len(victims) < need {
			return
		}
		undo, err := x.b.cage.harm(x.round.Action, victims)
		x.undo = sync.OnceFunc(func() {
			undo()
			for _, p := range victims {
				p.close()
			}
		})
		if err != nil && !errors.Is(err, unix.ESRCH) {
			x.err = err
		}
		x.out.Acted = !errors.Is(err, unix.ESRCH)
	})
}

func (x *restored) reached(phase string) bool {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.passed[phase]
}

func (x *restored) do(ctx context.Context) {
	out := x.out
	began := time.Now()
	ended, err := x.start()
	if err != nil {
		out.fail("start: %v", err)
		return
	}
	select {
	case <-x.acted:
	case <-ended:
	case <-time.After(agentPatience):
		out.fail("the restore did not end within %v, and the instant did not come", agentPatience)
		_ = x.cmd.Process.Kill()
	}
	x.once.Do(func() { x.at = time.Now(); close(x.acted) })
	<-x.acted
	if x.err != nil {
		out.fail("harm: %v", x.err)
	}
	ran := x.reached("running") // before the harm, or at the same moment
	if x.round.Action == Stop && out.Acted {
		// Longer than any patience of theirs.
		t := time.NewTimer(1500 * time.Millisecond)
		<-t.C
		if x.round.Victim == Restorer {
			x.undo() // nobody replaces a restorer; a pager must be replaced without
		}
	}
	select {
	case <-ended:
	case <-time.After(agentPatience):
		out.fail("the restore has not ended %v after the harm", agentPatience)
		_ = x.cmd.Process.Kill()
		<-ended
	}
	x.undo()
	switch {
	case x.round.Victim == QEMU && out.Acted:
		out.Settled = time.Since(x.at)
		if out.Exit == 0 && !x.reached("drained") {
			out.fail("QEMU was killed and the restore ended with 0")
		}
		return // clean sees that nothing is left
	case out.Exit == 0, out.Exit == -1 && x.round.Victim == Restorer && (ran || x.guestRuns(ctx)):
		x.checkGuest(ctx, began)
	default:
		// The restore failed, as it may before the guest runs: nothing is left, and
		// it works when repeated.
		x.checkNothing(ctx, ran)
	}
}

// guestRuns asks whether the guest was let go in the very moment of the harm.
func (x *restored) guestRuns(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	m, err := vmtest.DialMonitor(ctx, x.qmp)
	if err != nil {
		return false
	}
	defer m.Close()
	var st struct{ Running bool }
	return m.Execute(ctx, "query-status", nil, &st) == nil && st.Running
}

// checkGuest: the guest runs, its memory comes in and is right, and nothing of ours
// stays attached.
func (x *restored) checkGuest(ctx context.Context, began time.Time) {
	out := x.out
	if x.qemu == nil {
		out.fail("the guest is said to run, but there is no QEMU")
		return
	}
	var why string
	if !await(15*time.Second, func() bool {
		why = traces(x.qemu.PID)
		if left := orphans(); why == "" && len(left) > 0 {
			why = fmt.Sprintf("%d processes of ours", len(left))
		}
		return why == ""
	}) {
		out.fail("not let go of 15 s after the restore's end: %s", why)
	}
	out.Settled = time.Since(x.at)
	v, err := vmtest.Adopt(x.qemu.PID, x.qmp, x.b.vm.SerialPath(), x.from)
	if err != nil {
		out.fail("adopt: %v", err)
		return
	}
	defer v.Kill()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	rep, err := v.AwaitSweeps(ctx, 1)
	if err != nil {
		out.fail("the guest does not go on: %v", err)
	}
	if err := rep.Check(); err != nil {
		out.fail("the guest says: %v", err)
	}
	if first := x.b.vm.Beats().Between(began, time.Now()); len(first) > 0 {
		from := x.at
		if first[0].At.After(from) {
			from = first[0].At // silence before it ran is the restore's own time
		}
		out.Silence, out.Longest = silence(x.b.vm.Beats(), first[0].At.Add(time.Second), from, time.Now())
	}
	if !out.Acted {
		out.Silence = 0
	}
	if out.Silence > pagerBack {
		out.failLate("the guest was silent for %v after the harm, limit %v", out.Silence.Round(time.Millisecond), pagerBack)
	}
}

// checkNothing: a restore that failed leaves no QEMU, and does not stand in the way
// of the next.
func (x *restored) checkNothing(ctx context.Context, ran bool) {
	out := x.out
	if ran {
		out.fail("the guest ran, but the restore ended with %d", out.Exit)
	}
	// A restorer that was killed cannot end the QEMU whose guest it did not let go
	// yet; whoever restores next does. In every other case it must be gone.
	ofKilled := x.round.Victim == Restorer && out.Exit == -1
	if x.qemu != nil && !ofKilled && !x.qemu.ended(3*time.Second) {
		out.fail("a QEMU (pid %d) whose guest never ran is left behind", x.qemu.PID)
		_ = x.qemu.signal(unix.SIGKILL)
		x.qemu.ended(3 * time.Second)
	}
	if x.round.Victim == Nobody {
		out.fail("a restore that nobody harmed ended with %d", out.Exit)
		return
	}
	again := x.b.Restore(ctx, Round{Kind: "restore", Victim: Nobody, Action: None, Mode: "lazy"})
	if len(again.Exceptions) > 0 {
		out.fail("the next restore: %s", strings.Join(again.Exceptions, "; "))
		out.Log += again.Log
	}
	if x.qemu != nil && !x.qemu.ended(0) {
		out.fail("a QEMU (pid %d) whose guest never ran is left behind after the next restore", x.qemu.PID)
	}
	var left []int
	if !await(afterwards, func() bool { left = orphans(); return len(left) == 0 }) {
		for _, pid := range left {
			out.fail("left behind: pid %d %s", pid, verbOf(pid))
			_ = unix.Kill(pid, unix.SIGKILL) // our own descendant, and not reaped yet
		}
	}
	out.Settled = time.Since(x.at)
	if out.Exit > 0 {
		x.checkMessage()
	}
}

// findBelow finds a descendant of the roots by its verb.
func findBelow(verb string, roots ...int) *Proc {
	return find(func(pid int) bool { return verbOf(pid) == verb }, roots...)
}

// findProgram finds a descendant by the program's name.
func findProgram(name string, roots ...int) *Proc { return findBelow(name, roots...) }

func find(is func(pid int) bool, roots ...int) *Proc {
	seen := map[int]bool{}
	for len(roots) > 0 {
		root := roots[0]
		roots = roots[1:]
		if seen[root] {
			continue
		}
		seen[root] = true
		for _, pid := range children(root) {
			if is(pid) {
				if p, err := hold(pid); err == nil {
					return p
				}
			}
			roots = append(roots, pid)
		}
	}
	return nil
}
