package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// small is a machine that boots quickly and keeps itself busy.
func small() vmtest.Config {
	return vmtest.Config{MemoryMiB: 192, WSMiB: 16, SweepMS: 500, Rate: 2000}
}

// monitor is the test's own QMP connection.
func monitor(t testing.TB, path string) *vmtest.Monitor {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	m, err := vmtest.DialMonitor(ctx, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.Close() })
	return m
}

// state is the run state as QEMU says it.
func state(t testing.TB, m *vmtest.Monitor) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	var s struct{ Status string }
	if err := m.Execute(ctx, "query-status", nil, &s); err != nil {
		t.Fatal(err)
	}
	return s.Status
}

// wantRunning fails unless the machine is as if nothing had happened: the guest
// makes progress, its memory is right, nothing of ours is there.
func wantRunning(t testing.TB, v *vmtest.VM) {
	t.Helper()
	wantUntouched(t, v.PID())
	v.WaitProgress(t, 200)
	v.Invariants()
}

// restore brings a checkpoint back, drained, and adopts the machine.
func (x *tool) restore(t testing.TB, ref, serial string, args ...string) (restored, *vmtest.VM) {
	t.Helper()
	return x.restoreWith(t, ref, serial, args)
}

// restoreWith is restore with more arguments for QEMU.
func (x *tool) restoreWith(t testing.TB, ref, serial string, args []string, qemu ...string) (restored, *vmtest.VM) {
	t.Helper()
	from := int64(0)
	if st, err := os.Stat(serial); err == nil {
		from = st.Size()
	}
	var r restored
	args = append([]string{"restore", ref, "--store", x.store, "--json"}, args...)
	if len(qemu) > 0 {
		args = append(append(args, "--"), qemu...)
	}
	out := x.run(t, args...)
	if out.code != exitOK {
		t.Fatalf("want success: %s", out)
	}
	if err := oneObject(out.out, &r); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	t.Cleanup(func() { removeLater(r) }) // comes after the machine was killed
	v := vmtest.StartAdopted(t, r.QEMUPID, r.QMP, serial, from)
	if r.ReadyNS <= 0 || r.RunningNS < r.ReadyNS || r.ResumeNS < 0 {
		t.Errorf("restore reports nonsense: %+v", r)
	}
	return r, v
}

// removeLater takes away what a restored machine keeps while it lives and what
// the next restore would sweep up.
func removeLater(r restored) {
	if fd, err := openPID(r.QEMUPID); err == nil {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		ended, _ := unix.Poll(p, 0)
		closeFD(fd)
		if ended == 0 {
			return // it is alive: adopted again
		}
	}
	os.RemoveAll(r.RunDir)
	for _, pattern := range []string{"/sys/fs/cgroup/ckagent/restored-%d", "/sys/fs/cgroup/*/ckagent/restored-%d"} {
		dirs, _ := filepath.Glob(fmt.Sprintf(pattern, r.QEMUPID))
		for _, d := range dirs {
			os.Remove(d)
		}
	}
}

// wantDrained fails unless a restored machine runs, is right in all of its
// memory, and has nothing of ours attached.
func (x *tool) wantDrained(t testing.TB, r restored, v *vmtest.VM, sweep bool) {
	t.Helper()
	wantUntouched(t, v.PID())
	x.wantNoProcess(t)
	if sweep {
		v.WaitSweeps(t, 1)
	}
	v.WaitProgress(t, 200)
	v.Invariants()
	if r.DrainedNS <= 0 {
		t.Errorf("not drained: %+v", r)
	}
}

// roundTrip takes a machine through checkpoint, verify, a kill, a lazy restore,
// and back to work.
func (x *tool) roundTrip(t testing.TB, v *vmtest.VM, sweep bool, args ...string) (checkpoint, restored, *vmtest.VM) {
	t.Helper()
	v.WaitProgress(t, 200)
	c := x.checkpoint(t, v.PID(), args...)
	wantRunning(t, v)
	var verified struct {
		Verified bool `json:"verified"`
	}
	if x.json(t, &verified, "verify", c.ID, "--store", x.store); !verified.Verified {
		t.Error("verify does not say that it verified")
	}
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	r, w := x.restore(t, c.VM, v.SerialPath())
	if r.ID != c.ID || !r.Lazy || r.LazyBytes < uint64(v.Config().MemoryMiB)<<20 {
		t.Errorf("want a lazy restore of %s with all of its %d MiB: %+v", c.ID, v.Config().MemoryMiB, r)
	}
	x.wantDrained(t, r, w, sweep)
	t.Logf("mode %s: pause %v (device state %v), total %v, %d faults; QEMU up %v, running +%v, drained %v, %d faults",
		c.Mode, time.Duration(c.PauseNS), time.Duration(c.DeviceStateNS), time.Duration(c.TotalNS), c.Faults,
		time.Duration(r.ReadyNS), time.Duration(r.ResumeNS), time.Duration(r.DrainedNS), r.Faults)
	return c, r, w
}

func itoa(n int) string { return strconv.Itoa(n) }

// wantUp is wantDrained for eager restores as well, whose memory is in before
// the guest runs.
func (x *tool) wantUp(t testing.TB, v *vmtest.VM) {
	t.Helper()
	wantUntouched(t, v.PID())
	x.wantNoProcess(t)
	v.WaitSweeps(t, 1)
	v.Invariants()
}
