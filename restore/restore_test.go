package restore

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/store"
	"github.com/ckagent/ckagent/tools/vmtest"
)

// options of a restore in a test: everything in directories of its own.
func testOptions(t testing.TB) Options {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	root, err := os.MkdirTemp("", "ckr-") // a socket's path is short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(root) })
	return Options{Self: self, RunRoot: root}
}

func testStore(t testing.TB) *store.Store {
	t.Helper()
	st, err := store.Open(filepath.Join(t.TempDir(), "store"))
	if err != nil {
		t.Fatal(err)
	}
	return st
}

// restoreAndCheck restores and follows the guest until it has verified all its
// memory once more.
func restoreAndCheck(t *testing.T, st *store.Store, ref string, o Options, old *vmtest.VM) *Result {
	t.Helper()
	from := old.SerialSize()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	res, err := Run(ctx, st, ref, o)
	if res != nil {
		t.Cleanup(func() { killRestored(t, res) })
	}
	if err != nil {
		t.Fatalf("restore: %v", err)
	}
	v := vmtest.StartAdopted(t, res.QEMUPID, res.QMP, old.SerialPath(), from)
	v.WaitSweeps(t, 1)
	v.Invariants()
	return res
}

func killRestored(t testing.TB, res *Result) {
	p, err := os.FindProcess(res.QEMUPID)
	if err == nil {
		_ = p.Kill()
		_, _ = p.Wait() // it is our child
	}
	cgroup.Remove(groupName(res.QEMUPID))
}

func logPhases(t testing.TB, res *Result) {
	t.Helper()
	var b strings.Builder
	last := int64(0)
	for _, p := range res.Phases {
		b.WriteString(p.Name + " +" + time.Duration(p.AtNS-last).Round(10*time.Microsecond).String() + "  ")
		last = p.AtNS
	}
	t.Logf("%s| ready %v resume %v running %v drained %v faults %d notes %q", b.String(), time.Duration(res.ReadyNS), time.Duration(res.ResumeNS),
		time.Duration(res.CommandToRunningNS), time.Duration(res.DrainedNS), res.Faults, res.Notes)
}

func itoa(n int) string { return strconv.Itoa(n) }

func TestRestoreLazily(t *testing.T) {
	v := vmtest.Start(t, vmtest.Config{MemoryMiB: 256, WSMiB: 64, SweepMS: 500})
	v.WaitSweeps(t, 1)
	st := testStore(t)
	id := takeCheckpoint(t, v, st, nil)
	v.Kill()
	res := restoreAndCheck(t, st, id, testOptions(t), v)
	logPhases(t, res)
}
