package restore

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// TestSweepAfterKilledRestorer: a restorer that dies around the instant it lets the
// guest go leaves a QEMU of which only QEMU knows whether it runs. One that does not
// and never did stands in the way of the next restore and is ended; one that runs,
// or ran and was paused since, is somebody's VM.
func TestSweepAfterKilledRestorer(t *testing.T) {
	v := vmtest.Start(t, firmwareOnly())
	st := testStore(t)
	id := takeCheckpoint(t, v, st, nil)
	v.Kill()
	for _, c := range []struct {
		name   string
		paused bool // from the start
		then   string
		gone   bool
	}{
		{name: "never ran", paused: true, gone: true},
		{name: "runs", then: "query-status"},
		{name: "ran and was paused", then: "stop"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := testOptions(t)
			o.Paused = c.paused
			res, err := Run(t.Context(), st, id, o)
			if err != nil {
				t.Fatal(err)
			}
			defer killRestored(t, res)
			if c.then != "" {
				ranFor(t, res.QEMUPID, 2*idleVCPU)
				m, err := vmtest.DialMonitor(t.Context(), res.QMP)
				if err != nil {
					t.Fatal(err)
				}
				err = m.Execute(t.Context(), c.then, nil, nil)
				m.Close()
				if err != nil {
					t.Fatal(err)
				}
			}
			path := filepath.Join(res.RunDir, stateName)
			raw, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			var s state
			if err := json.Unmarshal(raw, &s); err != nil || s.Guest != stageRuns {
				t.Fatalf("%s, %v: want the guest on record as let go", raw, err)
			}
			if n, err := Sweep(o.RunRoot); err != nil || n != 0 {
				t.Errorf("swept %d, %v: but its restorer had finished", n, err)
			}
			// Disks of a guest that never ran go with it; others are all there is of it.
			s.DiskDir = filepath.Join(t.TempDir(), "vm", "disks")
			s.Disks = []string{filepath.Join(s.DiskDir, "a.qcow2"), filepath.Join(s.DiskDir, "never-made")}
			if err := errors.Join(os.MkdirAll(s.DiskDir, 0o700), os.WriteFile(s.Disks[0], []byte("disk"), 0o600)); err != nil {
				t.Fatal(err)
			}
			s.Guest, s.Restorer = stageTold, identity{PID: s.Restorer.PID, Start: s.Restorer.Start + 1}
			if raw, err = json.Marshal(s); err == nil {
				err = os.WriteFile(path, raw, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			if _, err := Sweep(o.RunRoot); err != nil {
				t.Error(err)
			}
			if alive := s.QEMU.alive(); alive == c.gone {
				t.Errorf("QEMU is alive: %v", alive)
			}
			if _, err := os.Stat(s.DiskDir); (err == nil) == c.gone {
				t.Errorf("directory of its disks: %v", err)
			}
			if c.gone {
				return
			}
			s.QEMU.end()
			if n, err := Sweep(o.RunRoot); err != nil || n != 1 {
				t.Errorf("swept %d after its end, %v", n, err)
			}
			if _, err := os.Stat(s.Disks[0]); err != nil {
				t.Errorf("the disk of a guest that ran: %v", err)
			}
		})
	}
}

// ranFor waits until the process has used so much processor time.
func ranFor(t *testing.T, pid int, d time.Duration) {
	t.Helper()
	eventually(t, 10*time.Second, "the guest uses the processor", func() bool {
		tasks, _ := filepath.Glob("/proc/" + itoa(pid) + "/task/*/schedstat")
		for _, f := range tasks {
			b, err := os.ReadFile(f)
			if err != nil || filepath.Base(filepath.Dir(f)) == itoa(pid) {
				continue
			}
			used, _, _ := strings.Cut(string(b), " ")
			if ns, err := strconv.ParseInt(used, 10, 64); err == nil && ns > d.Nanoseconds() {
				return true
			}
		}
		return false
	})
}
