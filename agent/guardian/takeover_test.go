package guardian

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm"
)

// harm is what happens to the agent.
type harm struct {
	name string
	dies bool // it is gone by itself, otherwise the guardian has to find out
	do   func(t *testing.T, a *agent) (prepare func(pid int), act func())
}

var harms = []harm{
	{"kill", true, func(t *testing.T, a *agent) (func(int), func()) {
		return nil, func() { a.kill() }
	}},
	{"stop", false, func(t *testing.T, a *agent) (func(int), func()) {
		return nil, func() { unix.Kill(a.cmd.Process.Pid, unix.SIGSTOP) }
	}},
	{"freeze", false, freeze},
}

// freeze puts the agent and its fault server, but not its guardian, into a frozen
// cgroup.
func freeze(t *testing.T, a *agent) (func(int), func()) {
	var dir, file, frozen, thawed string
	for _, h := range cgroup.Hierarchies() {
		if h.Freezer {
			dir, file, frozen, thawed = h.Mount, "freezer.state", "FROZEN", "THAWED"
			break
		}
		if exists(filepath.Join(h.Mount, "cgroup.controllers")) {
			dir, file, frozen, thawed = h.Mount, "cgroup.freeze", "1", "0"
		}
	}
	if dir == "" {
		t.Skip("no cgroup freezer is mounted")
	}
	dir = filepath.Join(dir, "ckagent-test-"+strconv.Itoa(os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Skipf("cgroups cannot be made here: %v", err)
	}
	t.Cleanup(func() {
		os.WriteFile(filepath.Join(dir, file), []byte(thawed), 0)
		for range 100 {
			if os.Remove(dir) == nil {
				return
			}
			unix.Poll(nil, 10)
		}
		t.Errorf("cgroup %s cannot be removed", dir)
	})
	prepare := func(pid int) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
			t.Fatal(err)
		}
	}
	return prepare, func() {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(frozen), 0); err != nil {
			t.Fatal(err)
		}
	}
}

// TestTakeOver harms the agent in each phase of a checkpoint: the VM runs again
// within a second, and nothing is left.
func TestTakeOver(t *testing.T) {
	phases := []string{"engaged", "half-stop", "stopped", "armed", "half-cont", "unread", "capturing", "resumed", "sigstopped"}
	if testing.Short() { // for the race detector: with the VM stopped, armed, and running again
		phases = []string{"stopped", "armed", "capturing"}
	}
	for _, h := range harms {
		var longest time.Duration
		for _, phase := range phases {
			t.Run(h.name+"/"+phase, func(t *testing.T) {
				q := startQEMU(t)
				a := &agent{}
				prepare, act := h.do(t, a)
				*a = *q.startAgent(phase, prepare)
				began := time.Now()
				act()
				q.waitTicks(10 * time.Second)
				took := time.Since(began)
				longest = max(longest, took)
				if took > time.Second+100*time.Millisecond { // a tick of the guest's clock is 55 ms
					t.Errorf("the guest ran only after %v", took)
				}
				waitGone(t, "guardian", a.guardian)
				waitGone(t, "fault server", a.server)
				r := q.report()
				if r.AgentEnded == h.dies || r.Armed || len(r.Problems) > 0 {
					t.Errorf("report: %+v", r)
				}
				if got := q.status(); got != "running" {
					t.Errorf("VM is %s", got)
				}
				a.kill()
				q.clean()
			})
		}
		t.Logf("%s: longest until the guest was seen to run: %v", h.name, longest.Round(time.Millisecond))
	}
}

// TestManagersPause: what somebody else paused stays paused.
func TestManagersPause(t *testing.T) {
	t.Run("before", func(t *testing.T) {
		q := startQEMU(t)
		a := q.startAgent("found-paused", nil)
		a.kill()
		waitGone(t, "guardian", a.guardian)
		if got := q.status(); got != "paused" {
			t.Errorf("VM is %s", got)
		}
		q.clean()
	})
	t.Run("after we resumed", func(t *testing.T) {
		q := startQEMU(t)
		a := q.startAgent("resumed", nil)
		if err := q.manager.Execute(context.Background(), "stop", nil, nil); err != nil {
			t.Fatal(err)
		}
		a.kill()
		waitGone(t, "guardian", a.guardian)
		if got := q.status(); got != "paused" {
			t.Errorf("VM is %s", got)
		}
		q.clean()
	})
}

// TestIdle: an agent that holds nothing may be silent, and its death touches
// nothing.
func TestIdle(t *testing.T) {
	q := startQEMU(t)
	a := q.startAgent("idle", nil)
	if err := unix.Kill(a.cmd.Process.Pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}

	if waitExitOf(t, a.guardian, AgentSilence+300*time.Millisecond) {
		t.Fatal("the guardian ended for the silence of an idle agent")
	}
	if _, err := identify(a.cmd.Process.Pid); err != nil {
		t.Fatal("the guardian killed an idle agent")
	}
	a.kill()
	waitGone(t, "guardian", a.guardian)
	waitGone(t, "fault server", a.server)
	q.waitTicks(time.Second)
	q.clean()
	// On a busy host the fault server may not have gone in time: no more than that.
	qid, _ := identify(q.pid)
	if exists(statePath(stateDir, qid) + reportSuffix) {
		if r := q.report(); !r.ServerEnded || r.AgentEnded || r.Continued || r.Resumed || len(r.ClosedFDs) > 0 || len(r.Problems) > 0 {
			t.Errorf("report: %+v", r)
		}
	}
}

func waitExitOf(t *testing.T, pid int, d time.Duration) bool {
	t.Helper()
	f, _, err := openPID(pid)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return waitExit(int(f.Fd()), d)
}

// TestOrderlyEnd: an agent that ends in order leaves nothing.
func TestOrderlyEnd(t *testing.T) {
	q := startQEMU(t)
	a := q.startAgent("resumed", nil)
	a.waited.Do(func() {
		a.in.Close()
		if err := a.cmd.Wait(); err != nil {
			t.Error(err)
		}
	})
	waitGone(t, "guardian", a.guardian)
	q.waitTicks(time.Second)
	q.clean()
}

// TestSilentServer: a fault server that is stopped holds up the guest until the
// guardian kills it.
func TestSilentServer(t *testing.T) {
	q := startQEMU(t)
	a := q.startAgent("capturing", nil)
	if err := unix.Kill(a.server, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	waitGone(t, "fault server", a.server)
	took := q.waitTicks(5*time.Second) + time.Since(began)
	if took > DefaultServerStall+700*time.Millisecond {
		t.Errorf("the guest ran only after %v", took)
	}
	t.Logf("guest runs %v after the fault server was stopped", took.Round(time.Millisecond))
	if waitExitOf(t, a.guardian, 0) {
		t.Error("the guardian ended with the fault server")
	}
	a.kill()
	waitGone(t, "guardian", a.guardian)
	q.clean()
}

// TestThrottled: the fault server stops QEMU by signal until the moment it ends. Nobody
// is left then who would let it go on, unless the guardian does.
func TestThrottled(t *testing.T) {
	for _, c := range []struct {
		name string
		do   func(a *agent)
	}{
		{"the agent dies", func(a *agent) { a.kill() }},
		{"the fault server dies", func(a *agent) { unix.Kill(a.server, unix.SIGKILL) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			q := startQEMU(t)
			a := q.startAgent("throttled", nil)
			c.do(a)
			waitGone(t, "fault server", a.server)
			q.waitTicks(5 * time.Second) // fails if the monitor is silent for long
			a.kill()
			waitGone(t, "guardian", a.guardian)
			q.clean()
		})
	}
}

// TestQEMUEnds: with the VM gone there is nothing to guard.
func TestQEMUEnds(t *testing.T) {
	q := startQEMU(t)
	a := q.startAgent("stopped", nil)
	q.cmd.Process.Kill()
	waitGone(t, "guardian", a.guardian)
	a.kill()
}

// own starts a guardian whose agent is the test itself.
func own(t *testing.T, q *qemu) (*Guardian, *Control) {
	t.Helper()
	p, err := vm.OpenProcess(q.pid)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.Close() })
	c, f, err := CreateControl()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close(); f.Close() })
	g, err := Start(context.Background(), Config{Control: f, QEMU: p, Stderr: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.Stop(context.Background()) })
	return g, c
}

// TestGuardianHarmed: the agent learns of it.
func TestGuardianHarmed(t *testing.T) {
	q := startQEMU(t)
	t.Run("killed", func(t *testing.T) {
		g, _ := own(t, q)
		if err := g.Check(); err != nil {
			t.Fatal(err)
		}
		unix.Kill(g.PID(), unix.SIGKILL)
		<-g.Done()
		if err := g.Check(); err == nil {
			t.Error("Check does not notice that the guardian was killed")
		}
		if err := g.Stop(context.Background()); err == nil {
			t.Error("Stop does not say that the guardian was killed")
		}
		q.clean()
	})
	t.Run("stopped", func(t *testing.T) {
		g, _ := own(t, q)
		unix.Kill(g.PID(), unix.SIGSTOP)
		deadline := time.Now().Add(3 * time.Second)
		for g.Check() == nil {
			if time.Now().After(deadline) {
				t.Fatal("Check does not notice that the guardian is stopped")
			}
			unix.Poll(nil, 10)
		}
		ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
		defer cancel()
		if err := g.Stop(ctx); err == nil {
			t.Error("Stop does not say that it had to kill")
		}
		q.clean()
	})
	t.Run("in order", func(t *testing.T) {
		g, _ := own(t, q)
		id, err := identify(g.PID())
		if err != nil {
			t.Fatal(err)
		}
		if sid, _ := unix.Getsid(g.PID()); sid != g.PID() {
			t.Errorf("session %d, want its own", sid)
		}
		began := time.Now()
		if err := g.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		t.Logf("stop took %v", time.Since(began).Round(time.Microsecond))
		if id.alive() || exists(fmt.Sprintf("/proc/%d", id.PID)) {
			t.Error("it is still there, or a zombie")
		}
		q.clean()
	})
}

// TestStartFails: a guardian that does not come up is an error, and nothing stays.
func TestStartFails(t *testing.T) {
	q := startQEMU(t)
	p, err := vm.OpenProcess(q.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	c, f, err := CreateControl()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer c.Close()
	for name, cfg := range map[string]Config{
		"no binary":       {Self: "/nonexistent"},
		"ends at once":    {Self: "/bin/true"},
		"no fault server": {FaultServerPID: 1<<22 - 1},
	} {
		cfg.Control, cfg.QEMU = f, p
		if _, err := Start(context.Background(), cfg); problem.CodeOf(err) != problem.Failed {
			t.Errorf("%s: %v", name, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if _, err := Start(ctx, Config{Control: f, QEMU: p}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	q.clean()
}
