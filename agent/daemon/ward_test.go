package daemon

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/api/apipb"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// keeper is a daemon that nobody talks to.
func keeper(t *testing.T) *Daemon {
	t.Helper()
	c := Standard()
	c.StateDir = filepath.Join(t.TempDir(), "state [1]") // no pattern, whatever it looks like
	d, err := New(c, Deps{Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.stop()
		d.wg.Wait()
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// ourselves is the record of a VM whose process lives and is no QEMU.
func ourselves(t *testing.T, name string) Record {
	t.Helper()
	st, err := procstat.Read(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	return Record{Name: name, PID: os.Getpid(), StartTicks: st.StartTicks, BootID: BootID(), Since: time.Now().UTC().Round(0),
		Spec: &apipb.Spec{Store: filepath.Join(t.TempDir(), "store"), IntervalNs: int64(time.Hour)}}
}

// TestStateIsFull: a VM that was protected before stays the daemon's although its record
// cannot be written, and one that is new is refused.
func TestStateIsFull(t *testing.T) {
	d := keeper(t)
	if err := os.Rename(d.state.dir, d.state.dir+".gone"); err != nil {
		t.Fatal(err)
	}
	old, err := d.admit(ourselves(t, "old"), true)
	if err != nil {
		t.Fatal(err)
	}
	young, err := d.admit(ourselves(t, "young"), false)
	if err != nil {
		t.Fatal(err)
	}
	<-young.done
	if err := young.failure(); !problem.Is(err, problem.Store) {
		t.Errorf("the new one: %v", err)
	}
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for old.failure() == nil {
		<-tick.C
	}
	select {
	case <-old.done:
		t.Errorf("let go: %v", old.failure())
	default:
	}
	if err := old.failure(); problem.Is(err, problem.Store) {
		t.Errorf("not attached to: %v", err)
	}
}

// TestDeadVMOutlivesAnAttach: what could not be attached to takes nothing from a VM that
// is gone and had the name.
func TestDeadVMOutlivesAnAttach(t *testing.T) {
	d := keeper(t)
	dead := Record{Name: "web", PID: 1 << 22, StartTicks: 1, BootID: "before", Since: time.Now(), Proven: true, Spec: &apipb.Spec{Store: "/store"}}
	d.lost(dead)
	w, err := d.admit(ourselves(t, "web"), false)
	if err != nil {
		t.Fatal(err)
	}
	<-w.ready
	if w.failure() == nil {
		t.Fatal("this process was taken for a VM")
	}
	d.wg.Wait()
	if gone := d.departed(); len(gone) != 1 || gone[0].PID != dead.PID || gone[0].Ending.GetHow() != "host" {
		t.Errorf("it knows of %+v", gone)
	}
	kept, err := d.state.Read()
	if err != nil || len(kept) != 1 || kept[0].PID != dead.PID || kept[0].Ending.GetHow() != "host" || !kept[0].Proven {
		t.Errorf("the next one will know of %+v, %v", kept, err)
	}
	// Who forgets it is told if that did not last.
	if err := os.RemoveAll(d.state.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(d.state.dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if found, err := d.forgetGone("web"); !found || err == nil || len(d.departed()) != 1 {
		t.Errorf("forgotten: %v, %v", found, err)
	}
	if _, err := d.state.Read(); err == nil {
		t.Error("a directory that cannot be read holds no VMs")
	}
}

// TestNobodyIsDeadUnseen: with no descriptor left nothing can be read about a process, and
// that does not make a VM one that has ended.
func TestNobodyIsDeadUnseen(t *testing.T) {
	r := ourselves(t, "web")
	var was unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	none := unix.Rlimit{Cur: 0, Max: was.Max}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &none); err != nil {
		t.Fatal(err)
	}
	_, err := procstat.Read(r.PID)
	alive := r.Alive()
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &was); err != nil {
		t.Fatal(err)
	}
	if !errors.Is(err, unix.EMFILE) {
		t.Fatalf("%v; want EMFILE", err)
	}
	if !alive {
		t.Error("taken for dead")
	}
}
