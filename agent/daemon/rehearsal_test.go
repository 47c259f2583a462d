package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/api/apipb"
)

// rehearser is a daemon whose children are a script, which notes how it was called.
func rehearser(t *testing.T, script string) (d *Daemon, calls func() []string) {
	t.Helper()
	dir := t.TempDir()
	self, notes := filepath.Join(dir, "self"), filepath.Join(dir, "calls")
	if err := os.WriteFile(self, []byte(fmt.Sprintf("echo \"$*\" >>%s\n%s\n", notes, script)), 0o700); err != nil {
		t.Fatal(err)
	}
	c := Standard()
	c.StateDir = filepath.Join(dir, "state")
	d, err := New(c, Deps{Log: slog.New(slog.DiscardHandler), Self: []string{"/bin/sh", self}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d, func() []string {
		b, _ := os.ReadFile(notes) // there may be none
		return strings.Split(strings.TrimSpace(string(b)), "\n")
	}
}

// after waits for a rehearsal that began after an instant.
func after(t *testing.T, w *ward, at int64) *apipb.Rehearsal {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for late := time.After(time.Minute); ; {
		if r := w.record().Rehearsal; r.GetAtNs() > at {
			return r
		}
		select {
		case <-tick.C:
		case <-late:
			t.Fatal("no rehearsal within a minute")
		}
	}
}

// TestRehearsalsOnSchedule: one after the other at the interval, each with what it found;
// a failure shows; the next daemon goes on where the last one was; they take turns with
// checkpoints.
func TestRehearsalsOnSchedule(t *testing.T) {
	const every = 30 * time.Millisecond
	good := `echo '{"schema":"ckagent.rehearse/1","id":"c1","command_to_running_ns":7}'`
	d, calls := rehearser(t, good)
	log := slog.New(slog.DiscardHandler)
	rec := Record{Schema: recordSchema, Name: "web", PID: 7, Since: time.Now(), Spec: &apipb.Spec{Store: "/store", RehearseEveryNs: int64(every)}}
	w := newWard(d, rec, false)
	began := time.Now()
	stop := w.rehearseOnSchedule(t.Context(), log)
	first := after(t, w, 0)
	second := after(t, w, first.GetAtNs())
	stop()
	if !first.GetOk() || first.GetId() != "c1" || first.GetRunningNs() != 7 || first.GetError() != "" {
		t.Errorf("%+v", first)
	}
	if apart := second.GetAtNs() - first.GetAtNs(); time.Duration(apart) < every || time.Unix(0, first.GetAtNs()).Sub(began) < every {
		t.Errorf("the first after %v, the second %v later", time.Unix(0, first.GetAtNs()).Sub(began), time.Duration(apart))
	}
	if c := calls(); len(c) < 2 || c[0] != "rehearse vm:web --store /store --for 10s --json" {
		t.Errorf("called as %q", c)
	}
	saved, err := d.state.Read()
	if err != nil || len(saved) != 1 || saved[0].Rehearsal.GetId() != "c1" {
		t.Errorf("on disk: %v, %+v", err, saved)
	}

	bad, calls := rehearser(t, `echo '{"error":{"code":"integrity","op":"rehearse","message":"page 7 is wrong"}}'; exit 4`)
	rec.Rehearsal = &apipb.Rehearsal{AtNs: time.Now().Add(-time.Hour).UnixNano(), Ok: true, Id: "old"}
	rec.Spec = &apipb.Spec{Store: "/store", RehearseEveryNs: int64(time.Hour)}
	w = newWard(bad, rec, true)
	stop = w.rehearseOnSchedule(t.Context(), log)
	r := after(t, w, rec.Rehearsal.GetAtNs()) // it is due: the last was an hour ago
	stop()
	if s := w.status(); r.GetOk() || !strings.Contains(r.GetError(), "page 7") || len(s.GetDegraded()) != 1 || !strings.Contains(s.GetDegraded()[0], "page 7") {
		t.Errorf("%+v, status %+v", r, s)
	}
	if c := calls(); len(c) != 1 {
		t.Errorf("rehearsed within an hour: %q", c)
	}

	// It was rehearsed in the future: the clock was set back since.
	set, calls := rehearser(t, good)
	ahead := rec
	ahead.Rehearsal = &apipb.Rehearsal{AtNs: time.Now().Add(1000 * time.Hour).UnixNano(), Ok: true, Id: "old"}
	ahead.Spec = &apipb.Spec{Store: "/store", RehearseEveryNs: int64(every)}
	w = newWard(set, ahead, true)
	stop = w.rehearseOnSchedule(t.Context(), log)
	for late := time.After(time.Minute); calls()[0] == ""; {
		select {
		case <-time.After(5 * time.Millisecond):
		case <-late:
			t.Fatal("not rehearsed within a minute of the clock being set back")
		}
	}
	stop()

	// While all turns are taken none begins.
	busy, calls := rehearser(t, good)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	turns := int64(busy.cfg.Limits.Checkpoints)
	if err := busy.limits.turns.Acquire(ctx, turns); err != nil {
		t.Fatal(err)
	}
	w = newWard(busy, rec, true)
	stop = w.rehearseOnSchedule(ctx, log)
	defer stop()
	select {
	case <-time.After(100 * time.Millisecond):
	case <-ctx.Done():
	}
	if c := calls(); c[0] != "" {
		t.Errorf("beside as many checkpoints as are allowed: %q", c)
	}
	busy.limits.turns.Release(turns)
	after(t, w, rec.Rehearsal.GetAtNs())
}

// A VM is restored by its name alone: "db" may also be the beginning of the id of another
// VM's checkpoint, and "-x" an option.
func TestChildrenGetNames(t *testing.T) {
	d, calls := rehearser(t, `echo '{"qemu_pid":7}'`)
	for _, name := range []string{"db", "-x"} {
		if pid, err := d.restore(t.Context(), d.log, name, "/store"); pid != 7 || err != nil {
			t.Errorf("%d, %v", pid, err)
		}
	}
	if c := calls(); len(c) != 2 || c[0] != "restore vm:db --store /store --detach --json" || c[1] != "restore vm:-x --store /store --detach --json" {
		t.Errorf("called as %q", c)
	}
}
