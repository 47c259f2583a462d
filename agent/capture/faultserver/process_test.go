package faultserver

import (
	"os"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
)

// launch starts a fault server ahead, as startServer does it by itself.
func launch(o *Start, expected Engine) error {
	p, err := Launch(o.Self, o.Args, expected)
	o.Process = p
	return err
}

// capture takes all there is and checks that it is what the memory held at the freeze.
func (g *target) capture(t *testing.T, c *Client) {
	t.Helper()
	if err := c.Prearm(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	want, got := append([]byte(nil), g.mem...), make([]byte, len(g.mem))
	if err := c.Scan(); err != nil {
		t.Fatal(err)
	}
	g.write(0, 1<<40)
	if pages, err := drainAll(t, c, got); err != nil || pages != uint64(len(want)/pageBytes) {
		t.Errorf("%d pages, %v", pages, err)
	}
	if string(got) != string(want) {
		t.Error("what was captured is not what the memory held")
	}
}

// A server that was launched ahead serves whatever it was expected to be for, and one that
// has ended meanwhile is replaced.
func TestLaunchedAhead(t *testing.T) {
	for _, c := range []struct {
		name             string
		expected, engine Engine
		killed           bool
	}{
		{"as expected", Kernel, Kernel, false},
		{"for another engine", Kernel, Synchronous, false},
		{"for the kernel after all", Synchronous, Kernel, false},
		{"and killed", Kernel, Kernel, true},
	} {
		t.Run(c.name, func(t *testing.T) {
			g := newTarget(t, source.Anonymous, 256, false)
			var ahead *Process
			srv := startServer(t, g, func(o *Start) {
				with(c.engine)(o)
				if err := launch(o, c.expected); err != nil {
					t.Fatal(err)
				}
				if ahead = o.Process; c.killed {
					end(t, ahead, unix.SIGKILL)
				}
			})
			if same := srv.PID() == ahead.PID(); same == c.killed {
				t.Errorf("the one that was launched serves: %v", same)
			}
			g.capture(t, srv)
			if err := srv.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// end ends a process and waits until that is so, without reaping it.
func end(t *testing.T, p *Process, sig syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
	awaitEnd(t, p)
}

func awaitEnd(t *testing.T, p *Process) {
	t.Helper()
	var info unix.Siginfo
	if err := unix.Waitid(unix.P_PID, p.PID(), &info, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
}

// One that nobody has told anything ends when its owner's socket does, as it does if that
// one dies; one that does not listen is killed.
func TestLaunchedProcessEndsWithItsOwner(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for name, frozen := range map[string]bool{"waiting": false, "frozen": true} {
		t.Run(name, func(t *testing.T) {
			p, err := Launch(self, []string{"faultserver", "-1"}, Kernel)
			if err != nil {
				t.Fatal(err)
			}
			if frozen {
				if err := p.cmd.Process.Signal(unix.SIGSTOP); err != nil {
					t.Fatal(err)
				}
			} else {
				if err := p.conn.CloseWrite(); err != nil {
					t.Fatal(err)
				}
				awaitEnd(t, p)
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
			// Not being needed is no failure of its.
			if state := p.cmd.ProcessState; !frozen && !state.Success() {
				t.Errorf("it ended with %v", state)
			}
			if err := unix.Kill(p.PID(), 0); err != unix.ESRCH {
				t.Errorf("it is still there: %v", err)
			}
		})
	}
}
