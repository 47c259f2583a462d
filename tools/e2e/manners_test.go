package e2e

import (
	"context"
	"slices"
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestEvents: what a manager hears of a checkpoint is one pause, and nothing else.
func TestEvents(t *testing.T) {
	x := newTool(t)
	b := newBed(t)
	for _, mode := range []string{"cow", "buffer", "stop"} {
		from := len(b.control.Events())
		x.checkpoint(t, b.v.PID(), "--mode", mode, "--qmp", b.v.QMPPath())
		var heard []string
		// The answer comes after all that came before.
		if s := state(t, b.control); s != "running" {
			t.Errorf("mode %s: the machine is %s", mode, s)
		}
		for _, e := range b.control.Events()[from:] {
			heard = append(heard, e.Name)
		}
		if !slices.Equal(heard, []string{"STOP", "RESUME"}) {
			t.Errorf("mode %s: a manager heard %q", mode, heard)
		}
	}
	wantRunning(t, b.v)
}

// TestManagerWins: who lets the VM run, pauses it anew or resets it in the middle of
// our pause has the last word, and no checkpoint comes of it.
func TestManagerWins(t *testing.T) {
	for _, c := range []struct {
		name  string
		does  []string
		state string
	}{
		{"continued", []string{"cont"}, "running"},
		{"continued and paused", []string{"cont", "stop"}, "paused"},
		{"reset", []string{"system_reset"}, "running"},
	} {
		t.Run(c.name, func(t *testing.T) {
			x := newTool(t)
			// The store takes a while, and the VM stands still meanwhile.
			b := newBedOf(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 1024, WSMiB: 512, Rate: 2000, Idle: true})
			if err := b.control.Execute(t.Context(), "set-action", map[string]string{"reboot": "reset"}, nil); err != nil {
				t.Fatal(err)
			}
			begin := time.Now()
			s := x.start(t, "checkpoint", itoa(b.v.PID()), "--store", x.store, "--qmp", b.v.QMPPath(), "--mode", "stop", "--json")
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			if _, err := b.control.AwaitEvent(ctx, "STOP", begin); err != nil {
				t.Fatal(err)
			}
			for _, command := range c.does {
				if err := b.control.Execute(ctx, command, nil, nil); err != nil {
					t.Fatal(err)
				}
			}
			f := wantFailure(t, s.wait(t, time.Minute), exitBusy, "somebody else")
			if !f.Retryable {
				t.Errorf("%+v", f)
			}
			if s := state(t, b.control); s != c.state {
				t.Errorf("the machine is %s, its manager left it %s", s, c.state)
			}
			x.wantNoProcess(t)
			x.wantOnly(t)
			if c.state == "paused" {
				if err := b.control.Execute(ctx, "cont", nil, nil); err != nil {
					t.Fatal(err)
				}
				// What it was lent QEMU gives back when it runs and a connection ends.
				x.checkpoint(t, b.v.PID(), "--qmp", b.v.QMPPath())
			}
			if c.name != "reset" {
				wantRunning(t, b.v)
			}
		})
	}
}
