package restore

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/restore/pager"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestDetachKeepsLease restores without waiting: the guest runs on, the pager
// drains alone, and holds the checkpoint until it is done.
func TestDetachKeepsLease(t *testing.T) {
	v := vmtest.Start(t, vmtest.Config{MemoryMiB: 192, WSMiB: 8, SweepMS: 500})
	v.WaitSweeps(t, 1)
	st := testStore(t)
	id := takeCheckpoint(t, v, st, nil)
	v.Kill()
	o := testOptions(t)
	o.Detach, o.BytesPerSecond = true, 64<<20 // some seconds of drain
	from := v.SerialSize()
	res, err := Run(t.Context(), st, id, o)
	if err != nil {
		t.Fatal(err)
	}
	defer killRestored(t, res)
	if res.DrainedNS != 0 || res.ResumeNS <= 0 || res.CommandToRunningNS != res.ReadyNS+res.ResumeNS {
		t.Errorf("times: %+v", res)
	}
	waitForLeases(t, st, id, 2) // worker and supervisor
	if _, err := st.Remove(t.Context(), id, false); !problem.Is(err, problem.Refused) && !problem.Is(err, problem.Busy) {
		t.Errorf("removed while the pager reads it: %v", err)
	}
	w := vmtest.StartAdopted(t, res.QEMUPID, res.QMP, v.SerialPath(), from)
	w.WaitSweeps(t, 1)
	w.Invariants()
	p, err := pager.Resume(t.Context(), res.RunDir)
	if err == nil { // else it was done already
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		if err := p.Wait(ctx); err != nil {
			t.Errorf("drain: %v", err)
		}
		p.Close()
	}
	attached(t, res)
	waitForLeases(t, st, id, 0)
}

// waitForLeases waits until so many processes hold the checkpoint.
func waitForLeases(t *testing.T, st *store.Store, id string, want int) {
	t.Helper()
	eventually(t, 10*time.Second, fmt.Sprintf("%d processes hold the checkpoint", want), func() bool { return len(leaseHolders(t, st, id)) == want })
}

// leaseHolders are the processes that hold a checkpoint.
func leaseHolders(t *testing.T, st *store.Store, id string) []int {
	t.Helper()
	list, err := st.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	holders := map[int]bool{}
	for _, info := range list {
		for _, l := range info.Leases {
			if info.ID == id && l.State == store.Live {
				holders[l.PID] = true
			}
		}
	}
	return slices.Collect(maps.Keys(holders))
}

// TestInterruptedDrain ends the wait for the drain: the guest and its pager go on.
func TestInterruptedDrain(t *testing.T) {
	v := vmtest.Start(t, vmtest.Config{MemoryMiB: 192, WSMiB: 8, SweepMS: 500})
	v.WaitSweeps(t, 1)
	st := testStore(t)
	id := takeCheckpoint(t, v, st, nil)
	v.Kill()
	o := testOptions(t)
	o.BytesPerSecond = 32 << 20
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	o.OnPhase = func(p Phase) {
		if p.Name == PhaseRunning {
			cancel()
		}
	}
	from := v.SerialSize()
	res, err := Run(ctx, st, id, o)
	if res == nil || !problem.Is(err, problem.Cancelled) {
		t.Fatalf("%+v, %v: want the VM and cancelled", res, err)
	}
	defer killRestored(t, res)
	w := vmtest.StartAdopted(t, res.QEMUPID, res.QMP, v.SerialPath(), from)
	w.WaitSweeps(t, 1)
	w.Invariants()
}

// TestPausedStaysPaused restores a guest that was paused when it was checkpointed.
func TestPausedStaysPaused(t *testing.T) {
	v := vmtest.Start(t, firmwareOnly())
	st := testStore(t)
	id := takeCheckpoint(t, v, st, func(m *image.Manifest) { m.Machine.Facts[image.FactGuestRuns] = "false" })
	v.Kill()
	res, err := Run(t.Context(), st, id, testOptions(t))
	if err != nil {
		t.Fatal(err)
	}
	defer killRestored(t, res)
	m, err := vmtest.DialMonitor(t.Context(), res.QMP)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	var s struct{ Status string }
	if err := m.Execute(t.Context(), "query-status", nil, &s); err != nil || s.Status != "paused" {
		t.Errorf("%v: status %q, want paused", err, s.Status)
	}
}

// TestDamage restores from a store where the newest checkpoint is damaged, and from
// one whose device state is cut off.
func TestDamage(t *testing.T) {
	v := vmtest.Start(t, firmwareOnly())
	st := testStore(t)
	old := takeCheckpoint(t, v, st, nil)
	id := takeCheckpoint(t, v, st, nil)
	name := v.Config().Name
	v.Kill()
	state := filepath.Join(st.Dir(), "vms", name, id, "device-state")
	whole, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	bad := append([]byte(nil), whole...)
	bad[len(bad)/2] ^= 1
	if err := os.WriteFile(state, bad, 0o600); err != nil {
		t.Fatal(err)
	}
	failing(t, st, id, testOptions(t), problem.Integrity)
	res, err := Run(t.Context(), st, "vm:"+name, testOptions(t))
	if err != nil {
		t.Fatal(err)
	}
	defer killRestored(t, res)
	if res.ID != old || !strings.Contains(strings.Join(res.Notes, " "), id) {
		t.Errorf("restored %s, notes %q: the damaged %s is not named", res.ID, res.Notes, id)
	}
}

// TestRestoreOfRestored checkpoints a restored VM and restores it once more.
func TestRestoreOfRestored(t *testing.T) {
	v := vmtest.Start(t, firmwareOnly())
	st := testStore(t)
	id := takeCheckpoint(t, v, st, nil)
	v.Kill()
	o := testOptions(t)
	first, err := Run(t.Context(), st, id, o)
	if err != nil {
		t.Fatal(err)
	}
	again := takeCheckpointOf(t, v.Config(), first.QEMUPID, first.QMP, st, nil)
	killRestored(t, first)
	second, err := Run(t.Context(), st, again, o)
	if err != nil {
		t.Fatal(err)
	}
	killRestored(t, second)
	if len(second.Changes) != 0 {
		t.Errorf("the second restore changed the command line of the first: %v", second.Changes)
	}
	// Both are gone: so are their directories at the next sweep.
	if n, err := Sweep(o.RunRoot); err != nil || n != 1 {
		t.Errorf("%d directories swept, %v; want that of the second (the first went before)", n, err)
	}
}

func TestResultJSON(t *testing.T) {
	b, err := json.Marshal(Result{})
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{"schema", "id", "qemu_pid", "qmp", "lazy", "ram_bytes", "ready_ns", "resume_ns", "command_to_running_ns", "drained_ns"} {
		if !strings.Contains(string(b), `"`+key+`":`) {
			t.Errorf("no %s in %s", key, b)
		}
	}
}

func TestMakePlanIsDry(t *testing.T) {
	m := &image.Manifest{ID: "x", VM: "web", QEMU: image.QEMU{BinaryPath: "/usr/bin/qemu-system-x86_64"},
		Machine: image.Machine{Type: "pc-q35-7.2", Accel: "tcg", Argv: []string{"qemu", "-name", "web", "-m", "1G"}}}
	o := testOptions(t)
	o.Clone = true
	p, err := MakePlan(m, o)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(p.String(), "-incoming defer") || !strings.HasPrefix(p.Name, "web-clone-") {
		t.Errorf("plan: %s", p)
	}
	if left, _ := os.ReadDir(o.RunRoot); len(left) != 0 {
		t.Errorf("a plan left %v", left)
	}
}
