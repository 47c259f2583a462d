package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// withAgent is a machine whose guest has an agent, and files it writes.
func withAgent(t *testing.T, words string) *vmtest.VM {
	t.Helper()
	dir, err := os.MkdirTemp("", "e2e-ga-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	cfg := small()
	cfg.Dir, cfg.Control = dir, true
	cfg.Append = "GD_GA=1 GD_FILES=tmpfs GD_FILES_MS=20 " + words
	cfg.Args = []string{"-device", "virtio-serial-pci", "-chardev", "socket,id=ga,path=" + filepath.Join(dir, "ga.sock") + ",server=on,wait=off",
		"-device", "virtserialport,chardev=ga,name=org.qemu.guest_agent.0"}
	v := vmtest.Start(t, cfg)
	v.WaitSerial(t, "^GA up", time.Minute)
	return v
}

// TestFreeze: the guest's file systems are frozen for the pause and thawed after it,
// whatever becomes of us, and a restored guest is thawed as well.
func TestFreeze(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "boots a guest")
	}
	x := newTool(t)
	v := withAgent(t, "")
	said := filepath.Join(t.TempDir(), "hooks")
	hook := `echo "$CKAGENT_HOOK $CKAGENT_VM $CKAGENT_QEMU_PID $CKAGENT_RESULT $CKAGENT_CHECKPOINT" >>` + said
	c := x.checkpoint(t, v.PID(), "--freeze", "--pre-hook", hook, "--post-hook", hook)
	wantFrozenAndThawed(t, v, 1)
	raw, err := os.ReadFile(said)
	want := fmt.Sprintf("pre %s %d  \npost %s %d ok %s\n", c.VM, v.PID(), c.VM, v.PID(), c.ID)
	if err != nil || string(raw) != want {
		t.Errorf("the hooks saw %q (%v), want %q", raw, err, want)
	}
	wantRunning(t, v)
	x.wantNoProcess(t)

	t.Run("killed while it is frozen", func(t *testing.T) {
		proxy, err := vmtest.NewProxy(filepath.Join(v.Dir(), "proxy.sock"), v.QMPPath())
		if err != nil {
			t.Fatal(err)
		}
		defer proxy.Close()
		b := &bed{v: v, proxy: proxy}
		var s *started
		ready := make(chan struct{})
		defer b.at("stop", func() {
			<-ready
			s.signal(unix.SIGKILL)
		})()
		begin := time.Now()
		s = x.start(t, "checkpoint", itoa(v.PID()), "--store", x.store, "--qmp", proxy.Path(), "--freeze", "--freeze-timeout", "30s")
		close(ready)
		if r := s.wait(t, time.Minute); r.code == exitOK {
			t.Errorf("want a dead agent: %s", r)
		}
		b.wantReached(t, 1)
		wantFrozenAndThawed(t, v, 2)
		if took := time.Since(begin); took > 20*time.Second {
			t.Errorf("thawed after %v: by its deadline, not by the death", took)
		}
		x.wantNoProcess(t)
		wantRunning(t, v)
		x.wantOnly(t, c.ID)
	})

	t.Run("no longer than it may be", func(t *testing.T) {
		proxy, err := vmtest.NewProxy(filepath.Join(v.Dir(), "proxy2.sock"), v.QMPPath())
		if err != nil {
			t.Fatal(err)
		}
		defer proxy.Close()
		// The pause comes late: when the time is over the guard thaws, before it.
		defer proxy.Withhold("stop", func(ctx context.Context, m vmtest.Message) {
			if m.Nth == 1 {
				awaitLines(t, v, "^GA thawed n=1", 3)
			}
		})()
		f := x.fails(t, exitBusy, []string{"thawed"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--qmp", proxy.Path(), "--freeze", "--freeze-timeout", "300ms")
		if !f.Retryable {
			t.Errorf("%+v", f)
		}
		x.wantNoProcess(t)
		wantRunning(t, v)
		x.wantOnly(t, c.ID)
	})

	// The guest's clock: it goes on where it was, and is set on request.
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	const outage = 3 * time.Second
	pauseFor(t, outage)
	_, w := x.restore(t, c.ID, v.SerialPath(), "--assume-dead")
	awaitLines(t, w, "^GA thawed n=1", 1) // it was frozen in the checkpoint
	before, after := ticksAround(t, w)
	if jump := after.real - before.real; jump < 0 || jump > 1_500_000 {
		t.Errorf("the wall clock jumped by %d us over an outage of %v", jump, outage)
	}
	if jump := after.mono - before.mono; jump < 0 || jump > 1_500_000 {
		t.Errorf("the monotonic clock jumped by %d us over an outage of %v", jump, outage)
	}
	rtc := rtcAfter(t, w)
	if off := time.Since(rtc); off < -3*time.Second || off > 3*time.Second {
		t.Errorf("the real-time clock, which follows the host's, is off by %v", off)
	}
	x.wantNoProcess(t)
	w.WaitProgress(t, 200)
	w.Kill()

	r, w := x.restore(t, c.ID, v.SerialPath(), "--clock", "host")
	if r.Clock != "agent" || r.ClockStepNS < int64(outage) {
		t.Errorf("clock %q, corrected by %v, want at least %v", r.Clock, time.Duration(r.ClockStepNS), outage)
	}
	_, after = ticksAround(t, w)
	// The last of a running log: it was written some moments ago at most.
	if off := time.Since(time.UnixMicro(lastTick(t, w).real)); off < -time.Second || off > 3*time.Second {
		t.Errorf("the guest's wall clock is off by %v (first tick after the restore: %+v)", off, after)
	}
	w.WaitProgress(t, 200)
	w.Invariants()
}

// TestSilentAgent: a guest agent that does not answer, or is not there, costs a
// checkpoint and nothing else.
func TestSilentAgent(t *testing.T) {
	if testing.Short() {
		vmtest.Skip(t, "short", "boots a guest")
	}
	x := newTool(t)
	v := withAgent(t, "GD_GA_MUTE=1")
	begin := time.Now()
	f := x.fails(t, exitFailed, []string{"agent", "does not answer"}, "checkpoint", itoa(v.PID()), "--store", x.store, "--freeze", "--freeze-timeout", "500ms")
	if took := time.Since(begin); took > 20*time.Second || f.Hint == "" {
		t.Errorf("after %v: %+v", took, f)
	}
	x.wantNoProcess(t)
	wantRunning(t, v)

	m := vmtest.Start(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 4, Rate: 2000, Idle: true, Args: []string{"-rtc", "base=utc,clock=vm"}})
	x.fails(t, exitRefused, []string{"org.qemu.guest_agent.0"}, "checkpoint", itoa(m.PID()), "--store", x.store, "--freeze")
	// Hooks, here where a checkpoint is quick.
	x.fails(t, exitRefused, []string{"pre-hook", "not today"}, "checkpoint", itoa(m.PID()), "--store", x.store, "--pre-hook", "echo not today; exit 3")
	x.fails(t, exitRefused, []string{"pre-hook", "1s"}, "checkpoint", itoa(m.PID()), "--store", x.store, "--pre-hook", "sleep 60 & wait", "--hook-timeout", "1s")
	x.wantOnly(t)
	c := x.checkpoint(t, m.PID(), "--post-hook", "echo cannot tell; exit 4")
	if len(c.Notes) != 1 || !strings.Contains(c.Notes[0], "cannot tell") || !strings.Contains(c.Notes[0], "post-hook") {
		t.Errorf("notes: %q", c.Notes)
	}
	wantRunning(t, m)
	// Its clock cannot be set: nothing leads into the guest.
	if err := m.Crash(); err != nil {
		t.Fatal(err)
	}
	x.fails(t, exitRefused, []string{"clock"}, "restore", c.ID, "--store", x.store, "--clock", "host")
	_, w := x.restore(t, c.ID, m.SerialPath())
	if argv := strings.Join(w.Argv(), " "); !strings.Contains(argv, "-rtc base=utc,clock=vm") {
		t.Errorf("-rtc was not used again: %s", argv)
	}
	x.wantDrained(t, restored{DrainedNS: 1}, w, false)
}

// wantFrozenAndThawed fails unless the guest was frozen and thawed n times in all.
func wantFrozenAndThawed(t *testing.T, v *vmtest.VM, n int) {
	t.Helper()
	awaitLines(t, v, "^GA thawed n=1", n)
	if got := len(regexp.MustCompile(`(?m)^GA frozen`).FindAllString(v.Serial(), -1)); got != n {
		t.Errorf("the guest was frozen %d times, want %d", got, n)
	}
}

// awaitLines waits until n lines of the console match.
func awaitLines(t *testing.T, v *vmtest.VM, expr string, n int) {
	t.Helper()
	re := regexp.MustCompile("(?m)" + expr)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for range 1500 {
		if len(re.FindAllString(v.Serial(), -1)) >= n {
			return
		}
		<-tick.C
	}
	t.Errorf("want %d lines %q", n, expr)
}

// pauseFor lets time pass: an outage has to last.
func pauseFor(t *testing.T, d time.Duration) {
	t.Helper()
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-t.Context().Done():
	}
}

// tick is what the guest said of its clocks, in microseconds.
type tick struct{ n, mono, real int64 }

var tickLine = regexp.MustCompile(`(?m)^TICK (\d+) mono_us=(\d+) real_us=(\d+) rtc=(\S+) \*[0-9a-f]{4}\r?$`)

func readTicks(log string) (out []tick) {
	for _, m := range tickLine.FindAllStringSubmatch(log, -1) {
		n, err1 := strconv.ParseInt(m[1], 10, 64)
		mono, err2 := strconv.ParseInt(m[2], 10, 64)
		wall, err3 := strconv.ParseInt(m[3], 10, 64)
		if errors.Join(err1, err2, err3) == nil {
			out = append(out, tick{n, mono, wall})
		}
	}
	return out
}

// ticksAround are the first tick after a restore and the one before it, which the
// original had written.
func ticksAround(t *testing.T, w *vmtest.VM) (before, after tick) {
	t.Helper()
	awaitLines(t, w, tickLine.String()[len("(?m)"):], 3)
	ours := readTicks(w.Serial())
	if len(ours) == 0 {
		t.Fatal("no ticks")
	}
	after = ours[0]
	raw, err := os.ReadFile(w.SerialPath())
	if err != nil {
		t.Fatal(err)
	}
	for _, k := range readTicks(string(raw)) {
		if k.n == after.n-1 {
			return k, after
		}
	}
	t.Fatalf("tick %d is in no log", after.n-1)
	return before, after
}

func lastTick(t *testing.T, w *vmtest.VM) tick {
	t.Helper()
	all := readTicks(w.Serial())
	if len(all) == 0 {
		t.Fatal("no ticks")
	}
	return all[len(all)-1]
}

// rtcAfter is the real-time clock as the guest read it after its restore.
func rtcAfter(t *testing.T, w *vmtest.VM) time.Time {
	t.Helper()
	line := w.WaitSerial(t, `^TICK .* rtc=2`, time.Minute)
	at, err := time.Parse(time.RFC3339, regexp.MustCompile(`rtc=(\S+)`).FindStringSubmatch(line)[1])
	if err != nil {
		t.Fatal(err)
	}
	return at
}
