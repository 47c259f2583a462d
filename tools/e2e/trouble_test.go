package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"

	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestQEMUEndsAtEachStep kills QEMU as each kind of command reaches it.
func TestQEMUEndsAtEachStep(t *testing.T) {
	// What commands there are is learnt from a checkpoint that goes well.
	x := newTool(t)
	b := newBed(t)
	first := x.checkpoint(t, b.v.PID(), "--qmp", b.proxy.Path(), "--name", "first")
	var commands []string
	for _, m := range b.proxy.Seen() {
		if !m.FromQEMU && m.Command != "" && !slices.Contains(commands, m.Command) {
			commands = append(commands, m.Command)
		}
	}
	b.v.Kill()
	if len(commands) < 8 || !slices.Contains(commands, "cont") {
		t.Fatalf("commands: %q", commands)
	}
	if testing.Short() {
		commands = []string{"add-fd", "stop", "cont"}
	}
	for _, command := range commands {
		t.Run(command, func(t *testing.T) {
			b := newBed(t)
			b.at(command, func() { _ = b.v.Crash() }) // it fails only without rights over our own child
			r := x.run(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", b.proxy.Path(), "--json")
			b.wantReached(t, 1)
			f := wantFailure(t, r, exitNotFound, itoa(b.v.PID()))
			if testing.Verbose() {
				t.Log(f.Message)
			}
			x.wantNoProcess(t)
			x.wantOnly(t, first.ID)
		})
	}
	var verified struct{ Verified bool }
	x.json(t, &verified, "verify", "first", "--store", x.store)
}

// TestMonitorLost: the connection is cut, or half a command is sent, at each step
// of the pause; the VM goes on.
func TestMonitorLost(t *testing.T) {
	for _, command := range []string{"add-fd", "stop", "xen-save-devices-state", "cont"} {
		for name, verdict := range map[string]vmtest.Verdict{"cut": vmtest.Cut, "half": vmtest.Half, "hangup": vmtest.Hangup} {
			t.Run(command+"/"+name, func(t *testing.T) {
				x := newTool(t)
				b := newBed(t)
				b.strike(command, verdict)
				r := x.run(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", b.proxy.Path(), "--json")
				b.wantReached(t, 1)
				if r.code == exitOK {
					t.Errorf("want a failure: %s", r)
				} else if f, err := failureOf(r); err != nil && !r.givenUp() {
					t.Errorf("%v: %s", err, r)
				} else if err == nil && (f.Op == "ckagent" || f.Hint == "" || strings.Contains(f.Message, "\n")) {
					t.Errorf("the failure does not say of what, or what to do: %+v", f)
				} else if testing.Verbose() {
					t.Logf("exit %d: %s", r.code, r.out)
				}
				if s := awaitState(t, b.control, "running"); s != "running" {
					t.Errorf("the machine is %s after: %s", s, r)
				}
				x.wantNoProcess(t)
				wantRunning(t, b.v)
				x.wantOnly(t)
			})
		}
	}
}

// awaitState waits a moment for a state; somebody may still be at it.
func awaitState(t testing.TB, m *vmtest.Monitor, want string) string {
	t.Helper()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 150 {
		if s := state(t, m); s == want {
			return s
		}
		<-tick.C
	}
	return state(t, m)
}

// TestSilentMonitor: QEMU's answers do not come. Beside each other: most of it is
// waiting, with limits far off.
func TestSilentMonitor(t *testing.T) {
	t.Run("no greeting", func(t *testing.T) {
		t.Parallel()
		x := newTool(t)
		b := newBed(t)
		path := filepath.Join(b.v.Dir(), "mute.sock")
		l, err := net.Listen("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		f := x.fails(t, exitBusy, []string{path}, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", path)
		if !f.Retryable || f.Hint == "" {
			t.Errorf("%+v", f)
		}
		wantRunning(t, b.v)
		x.wantOnly(t)
	})
	t.Run("somebody else has it", func(t *testing.T) {
		t.Parallel()
		x := newTool(t)
		b := newBed(t)
		_ = monitor(t, b.v.QMPPath()) // QEMU serves one client
		x.fails(t, exitBusy, nil, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", b.v.QMPPath())
		// Found by itself, the other monitor is used.
		b.control.Close()
		c := x.checkpoint(t, b.v.PID())
		wantRunning(t, b.v)
		x.wantOnly(t, c.ID)
	})
	for _, command := range []string{"query-status", "add-fd", "stop", "cont"} {
		t.Run("no answer to "+command, func(t *testing.T) {
			t.Parallel()
			x := newTool(t)
			b := newBed(t)
			b.strike(command, vmtest.Drop)
			s := x.start(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", b.proxy.Path(), "--json")
			begin := time.Now()
			timer := time.NewTimer(12 * time.Second) // longer than the operator waits
			defer timer.Stop()
			select {
			case code := <-s.done:
				s.done <- code
			case <-timer.C:
				s.signal(unix.SIGINT)
			}
			r := s.wait(t, 20*time.Second)
			b.wantReached(t, 1)
			t.Logf("exit %d after %v: %s%s", r.code, time.Since(begin).Round(time.Millisecond), r.out, r.err)
			if f, err := failureOf(r); err != nil && !r.givenUp() || err == nil && f.Message == "" {
				t.Errorf("%v: %s", err, r)
			}
			if s := awaitState(t, b.control, "running"); s != "running" {
				t.Errorf("the machine is %s", s)
			}
			x.wantNoProcess(t)
			wantRunning(t, b.v)
			x.wantOnly(t)
		})
	}
}

// TestPausedGuest: what somebody else paused stays paused, through the checkpoint
// and the restore.
func TestPausedGuest(t *testing.T) {
	x := newTool(t)
	b := newBed(t)
	if err := b.control.Execute(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	for _, mode := range []string{"cow", "buffer", "stop"} {
		c := x.checkpoint(t, b.v.PID(), "--mode", mode, "--qmp", b.v.QMPPath())
		if s := state(t, b.control); s != "paused" {
			t.Fatalf("mode %s: the machine is %s", mode, s)
		}
		if c.PauseNS != 0 {
			t.Errorf("mode %s: a pause of %d ns of a machine that did not run", mode, c.PauseNS)
		}
		wantUntouched(t, b.v.PID())
	}
	if err := b.v.Crash(); err != nil {
		t.Fatal(err)
	}
	r, w := x.restore(t, b.v.Config().Name, b.v.SerialPath())
	m := monitor(t, r.QMP)
	if s := state(t, m); s != "paused" || !r.Paused {
		t.Errorf("restored it is %s, reported paused=%v", s, r.Paused)
	}
	wantUntouched(t, w.PID())
	if err := m.Execute(t.Context(), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	x.wantDrained(t, r, w, true)
}

// TestChangedMeanwhile: somebody does something to the machine between the arm and
// the pause.
func TestChangedMeanwhile(t *testing.T) {
	t.Run("device added", func(t *testing.T) {
		x := newTool(t)
		b := newBed(t)
		b.at("add-fd", func() {
			if err := b.control.Execute(t.Context(), "device_add", map[string]any{"driver": "virtio-rng-pci", "id": "late0"}, nil); err != nil {
				t.Error(err)
			}
		})
		f := x.fails(t, exitBusy, []string{"changed"}, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", b.proxy.Path())
		if !f.Retryable || f.Hint == "" {
			t.Errorf("%+v", f)
		}
		b.wantReached(t, 1)
		wantRunning(t, b.v)
		x.wantOnly(t)
		// And again, with the device: it is recorded and comes back.
		c, _, w := x.roundTrip(t, b.v, true, "--qmp", b.v.QMPPath())
		if !slices.ContainsFunc(w.Argv(), func(a string) bool { return strings.Contains(a, "late0") }) {
			t.Errorf("%s lost the device: %q", c.ID, w.Argv())
		}
	})
	t.Run("paused by somebody", func(t *testing.T) {
		x := newTool(t)
		b := newBed(t)
		b.at("add-fd", func() {
			if err := b.control.Execute(t.Context(), "stop", nil, nil); err != nil {
				t.Error(err)
			}
		})
		c := x.checkpoint(t, b.v.PID(), "--qmp", b.proxy.Path())
		b.wantReached(t, 1)
		if s := state(t, b.control); s != "paused" {
			t.Errorf("the machine is %s", s)
		}
		// It ran when QEMU was lent the memory for the device state. What QEMU took
		// out of a descriptor set it closes only while the machine runs, and only
		// when it looks: at the end of a monitor's connection. That one is all that
		// stays until then.
		left, err := traces(b.v.PID())
		if err != nil || len(left) > 1 || len(left) == 1 && !strings.Contains(left[0], "memfd:ckagent-device-state") {
			t.Errorf("left: %q, %v", left, err)
		}
		if err := b.control.Execute(t.Context(), "cont", nil, nil); err != nil {
			t.Fatal(err)
		}
		d := x.checkpoint(t, b.v.PID(), "--qmp", b.proxy.Path())
		wantRunning(t, b.v)
		x.wantOnly(t, d.ID, c.ID)
	})
	t.Run("reset", func(t *testing.T) {
		x := newTool(t)
		b := newBed(t)
		// vmtest machines end on a reset unless told otherwise.
		if err := b.control.Execute(t.Context(), "set-action", map[string]string{"reboot": "reset"}, nil); err != nil {
			t.Fatal(err)
		}
		mark := b.v.SerialSize()
		b.at("add-fd", func() {
			if err := b.control.Execute(t.Context(), "system_reset", nil, nil); err != nil {
				t.Error(err)
			}
		})
		c := x.checkpoint(t, b.v.PID(), "--qmp", b.proxy.Path())
		b.wantReached(t, 1)
		wantUntouched(t, b.v.PID())
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if _, err := b.v.AwaitSerialFrom(ctx, mark, `^READY `); err != nil {
			t.Error(err)
		}
		var verified struct{ Verified bool }
		if x.json(t, &verified, "verify", c.ID, "--store", x.store); !verified.Verified {
			t.Error("not verified")
		}
	})
	// Before the pause, and when the capture is over but not yet committed.
	for _, command := range []string{"add-fd", "remove-fd"} {
		t.Run("migrated at "+command, func(t *testing.T) {
			x := newTool(t)
			b := newBed(t)
			out := filepath.Join(b.v.Dir(), "stream")
			b.at(command, func() {
				err := b.control.Execute(t.Context(), "migrate-set-parameters", map[string]any{"max-bandwidth": 1 << 20}, nil)
				if err == nil {
					err = b.control.Execute(t.Context(), "migrate", map[string]any{"uri": "exec:cat > " + out}, nil)
				}
				if err != nil {
					t.Error(err)
				}
			})
			r := x.run(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", b.proxy.Path(), "--json")
			b.wantReached(t, 1)
			t.Logf("%s", r)
			f := wantFailure(t, r, exitBusy, "migrat")
			if !f.Retryable {
				t.Errorf("%+v", f)
			}
			// While it goes on nothing can be taken either.
			if r := x.run(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", b.v.QMPPath(), "--json"); r.code != exitBusy && r.code != exitRefused {
				t.Errorf("during a migration: %s", r)
			}
			if err := b.control.Execute(t.Context(), "migrate_cancel", nil, nil); err != nil {
				t.Error(err)
			}
			wantRunning(t, b.v)
			x.wantOnly(t)
		})
	}
}

// TestInterrupt: ^C while the VM is paused for us, and during attach, leaves it
// running and untouched.
func TestInterrupt(t *testing.T) {
	for _, command := range []string{"query-migrate", "add-fd", "stop", "cont", "remove-fd"} {
		t.Run(command, func(t *testing.T) {
			x := newTool(t)
			b := newBed(t)
			var s *started
			ready := make(chan struct{})
			b.at(command, func() {
				<-ready
				s.signal(unix.SIGINT)
			})
			s = x.start(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", b.proxy.Path(), "--json")
			close(ready)
			r := s.wait(t, time.Minute)
			b.wantReached(t, 1)
			if r.code == exitOK && command == "remove-fd" {
				return // it was done before the signal was seen, which is as good
			}
			f := wantFailure(t, r, exitCancelled, "interrupted")
			if f.Op != "checkpoint" || strings.Contains(f.Message, "\n") || strings.Contains(f.Message, "context canceled") || strings.Contains(f.Message, "timeout") {
				t.Errorf("want one clear line: %+v", f)
			}
			if s := awaitState(t, b.control, "running"); s != "running" {
				t.Errorf("the machine is %s", s)
			}
			x.wantNoProcess(t)
			wantRunning(t, b.v)
			x.wantOnly(t)
		})
	}
}

// TestAttach protects a VM at an interval until ^C, keeping the last three.
func TestAttach(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, small())
	ctx, cancel := context.WithTimeout(t.Context(), runTimeout)
	defer cancel()
	c := x.command(ctx, "attach", itoa(v.PID()), "--store", x.store, "--interval", "300ms", "--keep-last", "3", "--json")
	var errs bytes.Buffer
	c.Stderr = &errs
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	var ids []string
	var last string
	lines := bufio.NewScanner(out)
	for lines.Scan() {
		var k struct{ Schema, ID string }
		if err := json.Unmarshal(lines.Bytes(), &k); err != nil {
			t.Errorf("%v: %q", err, lines.Text())
		}
		last = lines.Text()
		if k.ID != "" {
			if ids = append(ids, k.ID); len(ids) == 5 {
				if err := c.Process.Signal(unix.SIGINT); err != nil {
					t.Error(err)
				}
			}
		}
	}
	_ = c.Wait() // the exit code says it
	wantFailure(t, result{c.Args[1:], c.ProcessState.ExitCode(), last + "\n", errs.String()}, exitCancelled)
	x.wantNoProcess(t)
	wantRunning(t, v)
	if len(ids) < 5 {
		t.Fatalf("only %d checkpoints: %s", len(ids), errs.String())
	}
	x.wantOnly(t, ids[len(ids)-3:]...)
	if l := x.ls(t); !slices.ContainsFunc(l, func(l listed) bool { return l.ID == ids[len(ids)-1] }) {
		t.Errorf("the newest is not among %+v", l)
	}
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	r, w := x.restore(t, v.Config().Name, v.SerialPath())
	if r.ID != ids[len(ids)-1] {
		t.Errorf("restored %s, the newest is %s", r.ID, ids[len(ids)-1])
	}
	x.wantDrained(t, r, w, true)
}

// TestAliveAndClone: a VM that lives is not started a second time, unless as a
// clone, which runs beside it.
func TestAliveAndClone(t *testing.T) {
	x := newTool(t)
	v := vmtest.Start(t, small())
	v.WaitProgress(t, 200)
	c := x.checkpoint(t, v.PID())
	f := x.fails(t, exitRefused, []string{itoa(v.PID())}, "restore", c.ID, "--store", x.store)
	if !strings.Contains(f.Hint, "--clone") {
		t.Errorf("hint: %+v", f)
	}
	wantRunning(t, v)
	serial := filepath.Join(t.TempDir(), "serial")
	r, w := x.restore(t, c.ID, serial, "--clone", "--map", v.SerialPath()+"="+serial)
	x.wantDrained(t, r, w, true)
	if r.Name == v.Config().Name {
		t.Errorf("the clone has the original's name: %+v", r)
	}
	wantRunning(t, v)
	w.Kill()
	wantRunning(t, v)
	if _, err := os.Stat(v.QMPPath()); err != nil {
		t.Error(err)
	}
}
