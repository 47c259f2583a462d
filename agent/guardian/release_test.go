package guardian

import (
	"context"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
)

// TestAgentGivesUp: an agent that cannot resume a VM because QEMU does not answer
// ends its guardian in order; the VM runs as soon as QEMU is back all the same.
func TestAgentGivesUp(t *testing.T) {
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
	ep, err := qmp.ParseEndpoint(q.agent)
	if err != nil {
		t.Fatal(err)
	}
	g, err := Start(t.Context(), Config{Control: f, QEMU: p, Endpoint: ep, Stderr: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	c.BeatAgent()
	c.Engaged.Store(1)
	c.Running.Store(1)
	c.Stopped.Store(1)
	if err := q.manager.Execute(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(q.pid, unix.SIGSTOP); err != nil { // it hangs
		t.Fatal(err)
	}
	err = g.Stop(t.Context())
	if err == nil {
		t.Error("Stop does not say that the VM was left stopped")
	}
	if _, err := Recover(t.Context(), p); !problem.Is(err, problem.Busy) {
		t.Errorf("the next agent: %v, want busy", err)
	}
	gone := waitExitOf(t, g.PID(), 2500*time.Millisecond)
	if err := unix.Kill(q.pid, unix.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if gone {
		t.Fatal("the guardian ended while the VM was stopped")
	}
	q.waitTicks(15 * time.Second)
	<-g.Done()
	if r := q.report(); !r.Resumed || r.AgentEnded {
		t.Errorf("report: %+v", r)
	}
	q.clean()
}

// TestRelease: agent and guardian die together; a third puts the VM right.
func TestRelease(t *testing.T) {
	for _, phase := range []string{"stopped", "armed", "sigstopped"} {
		t.Run(phase, func(t *testing.T) {
			q := startQEMU(t)
			a := q.startAgent(phase, nil)
			ctx := context.Background()
			if _, err := Release(ctx, q.pid); !problem.Is(err, problem.Busy) {
				t.Fatalf("with a live agent: %v, want busy", err)
			}
			// The fault server is stopped, so that it does not go by itself.
			unix.Kill(a.server, unix.SIGSTOP)
			unix.Kill(a.guardian, unix.SIGKILL)
			a.kill()
			r, err := Release(ctx, q.pid)
			if err != nil {
				t.Fatalf("%v: %+v", err, r)
			}
			if !r.Resumed || !r.ServerEnded || r.Armed || r.Continued != (phase == "sigstopped") {
				t.Errorf("report: %+v", r)
			}
			q.waitTicks(time.Second)
			q.clean()
			again, err := Release(ctx, q.pid)
			if err != nil || again.Resumed || again.ServerEnded || again.GuardEnded || len(again.ClosedFDs) > 0 {
				t.Errorf("second release: %+v, %v", again, err)
			}
		})
	}
	if _, err := Release(context.Background(), 1<<22-1); !problem.Is(err, problem.NotFound) {
		t.Errorf("unknown pid: %v, want not found", err)
	}
}

// TestRecover: agent and guardian died together in a pause. The next agent finds that
// out before it begins; without it the VM would stay paused as if by somebody else.
func TestRecover(t *testing.T) {
	q := startQEMU(t)
	p, err := vm.OpenProcess(q.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if r, err := Recover(t.Context(), p); err != nil || r.Disks != nil || r.TookNS != 0 {
		t.Errorf("nothing was left, and yet it did %+v, %v", r, err)
	}
	a := q.startAgent("stopped", nil)
	unix.Kill(a.guardian, unix.SIGKILL)
	waitGone(t, "guardian", a.guardian) // so far the next agent waits for the VM's lock
	a.kill()
	if got := q.status(); got != "paused" {
		t.Fatalf("VM is %s", got)
	}
	if r, err := Recover(t.Context(), p); err != nil || !r.Resumed {
		t.Errorf("%+v, %v", r, err)
	}
	q.waitTicks(time.Second)
	waitGone(t, "fault server", a.server)
	q.clean()
}
