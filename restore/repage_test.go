package restore

import (
	"context"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestRepageAfterBothDied kills worker and supervisor of a detached restore at the
// same instant: the guest waits for its memory until the paging is taken up by hand.
func TestRepageAfterBothDied(t *testing.T) {
	v := vmtest.Start(t, vmtest.Config{MemoryMiB: 192, WSMiB: 8, SweepMS: 500})
	v.WaitSweeps(t, 1)
	st := testStore(t)
	id := takeCheckpoint(t, v, st, nil)
	v.Kill()
	o := testOptions(t)
	o.Detach, o.BytesPerSecond = true, 32<<20 // some seconds of drain
	from := v.SerialSize()
	res, err := Run(t.Context(), st, id, o)
	if err != nil {
		t.Fatal(err)
	}
	defer killRestored(t, res)
	waitForLeases(t, st, id, 2)
	pids := leaseHolders(t, st, id)
	for _, sig := range []unix.Signal{unix.SIGSTOP, unix.SIGKILL} { // neither sees the other die
		for _, pid := range pids {
			if err := unix.Kill(pid, sig); err != nil {
				t.Fatal(err)
			}
		}
	}
	waitForLeases(t, st, id, 0)

	if _, err := Repage(t.Context(), o.RunRoot, "nobody", false); !problem.Is(err, problem.NotFound) {
		t.Errorf("a VM that does not exist: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	again, err := Repage(ctx, o.RunRoot, itoa(res.QEMUPID), false)
	if err != nil {
		t.Fatal(err)
	}
	if again.DrainedNS <= 0 || again.ID != id || again.QEMUPID != res.QEMUPID || again.VM != res.Name {
		t.Errorf("%+v", again)
	}
	w := vmtest.StartAdopted(t, res.QEMUPID, res.QMP, v.SerialPath(), from)
	w.WaitSweeps(t, 1)
	w.Invariants()
	attached(t, res)
	if _, err := Repage(t.Context(), o.RunRoot, res.Name, false); !problem.Is(err, problem.NotFound) {
		t.Errorf("nothing left to page: %v", err)
	}
}
