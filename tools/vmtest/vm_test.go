package vmtest

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/guest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestLinuxGuest(t *testing.T) {
	v := Start(t, Config{WSMiB: 32, Rate: 4000, Echo: true, Append: "GD_AUDIT=1 GD_FILES=tmpfs"})
	r := v.WaitProgress(t, 2000)
	if r.Bad != 0 || r.WSPages != 32*256 || !r.Ready {
		t.Fatalf("report %+v", r)
	}
	conn, err := net.DialTimeout("tcp", v.EchoAddr(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	sent := strings.Repeat("every byte comes back ", 1000)
	go io.WriteString(conn, sent) //nolint:errcheck // the read below notices
	got := make([]byte, len(sent))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != sent {
		t.Fatalf("echo of %d bytes differs: %v", len(sent), err)
	}
	v.WaitSerial(t, `^FILES wrote=[1-9]`, 20*time.Second)
	v.Invariants()
}

// Every kind of broken page must be found by the guest itself, in both guests.
func TestGuestsDetectCorruption(t *testing.T) {
	for _, kind := range []string{"word", "stale", "early", "counter"} {
		t.Run("mini/"+kind, func(t *testing.T) {
			t.Parallel()
			v := Start(t, Config{Guest: Mini, MemoryMiB: 64, WSMiB: 2, Rate: 2000, Append: "sweep=100000 corrupt=" + kind + ":1"})
			wantBad(t, v)
		})
	}
	for _, kind := range []string{"word", "stale", "early", "counter"} {
		t.Run("linux/"+kind, func(t *testing.T) {
			t.Parallel()
			v := Start(t, Config{WSMiB: 2, Rate: 2000, Append: "GD_CORRUPT=" + kind + ":0"})
			wantBad(t, v)
		})
	}
}

func wantBad(t *testing.T, v *VM) {
	t.Helper()
	v.WaitSerial(t, `^CORRUPT kind=`, 20*time.Second)
	v.WaitSerial(t, `^WS .*bad=[1-9]`, 20*time.Second)
	r := v.Report()
	if r.Check() == nil || len(r.Details) == 0 {
		t.Fatalf("corruption went unnoticed: %+v", r)
	}
	t.Log(r.Details[0])
}

// A page changed from outside, behind the guest's back, is found as well.
func TestGuestDetectsForeignWrite(t *testing.T) {
	v := Start(t, Config{Guest: Mini, MemoryMiB: 64, WSMiB: 2, Rate: 100, Append: "sweep=100000"})
	hva, _, err := v.MainRAM()
	if err != nil {
		t.Fatal(err)
	}
	v.WaitProgress(t, 10)
	v.Invariants()
	if err := WriteRAM(v.PID(), hva+16<<20+7*4096+12, []byte{0xee, 0xee}); err != nil {
		t.Fatal(err)
	}
	v.WaitSerial(t, `^BAD kind=torn page=7 word=3 `, 20*time.Second)
}

func TestMiniUnderKVM(t *testing.T) {
	NeedKVM(t)
	v := Start(t, Config{Guest: Mini, Accel: "kvm", MemoryMiB: 64, WSMiB: 4, Rate: 400})
	r := v.WaitProgress(t, 100)
	if r.Bad != 0 || r.Ticks == 0 {
		t.Fatalf("report %+v", r)
	}
	v.Invariants()
}

func TestKillLeavesNothing(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	v, err := Launch(ctx, Config{Guest: Mini, MemoryMiB: 32, Backend: FileTmpfs})
	if err != nil {
		t.Fatal(err)
	}
	dir, pid, backing := v.Dir(), v.PID(), v.remove[0]
	if _, err := os.Stat(backing); err != nil {
		t.Fatal(err)
	}
	v.Kill()
	v.Kill()
	if v.Alive() {
		t.Error("still alive")
	}
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("pid %d is still there: %v", pid, err)
	}
	for _, path := range []string{dir, backing} {
		if _, err := os.Stat(path); !os.IsNotExist(err) {
			t.Errorf("%s is left behind: %v", path, err)
		}
	}
}

func TestWaitNoticesDeath(t *testing.T) {
	v := Start(t, Config{Guest: Mini, MemoryMiB: 32})
	result := make(chan error)
	go func() {
		_, err := v.AwaitSerial(t.Context(), "this line never comes")
		result <- err
	}()
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	if err := <-result; !errors.Is(err, ErrEnded) {
		t.Fatalf("got %v", err)
	}
}

func TestLaunchFailureNamesTheCause(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	_, err := Launch(ctx, Config{Guest: NoGuest, Args: []string{"-device", "no-such-device"}})
	if err == nil || !strings.Contains(err.Error(), "no-such-device") {
		t.Fatalf("got %v", err)
	}
}

func TestAdopt(t *testing.T) {
	v := Start(t, Config{Guest: Mini, MemoryMiB: 32, WSMiB: 1})
	v.WaitSerial(t, `^TICK 2 `, 20*time.Second)
	a, err := Adopt(v.PID(), v.QMPPath(), v.SerialPath(), v.SerialSize())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := a.AwaitSerial(ctx, `^TICK `); err != nil {
		t.Fatal(err)
	}
	r, err := a.AwaitProgress(ctx, 50)
	if err != nil || r.Check() != nil || r.FirstTick <= 2 {
		t.Fatalf("%v %+v", err, r)
	}
	a.Kill()
	<-v.Done()
}

// A spinning vCPU's longest silence, stamped by the host, is what the machine was
// stopped for; the guest's own clock does not see it under TCG.
func TestBeatsSeeAPause(t *testing.T) {
	v := Start(t, Config{Guest: Mini, MemoryMiB: 32, BeatUS: 500, Control: true})
	m, err := DialMonitor(t.Context(), v.ControlPath())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	v.WaitSerial(t, `^TICK 5 `, 20*time.Second)
	begin := time.Now()
	if err := m.Execute(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	timer := time.NewTimer(300 * time.Millisecond) // the length of the pause under test
	<-timer.C
	if err := m.Execute(t.Context(), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	end := time.Now()
	from := v.SerialSize()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if _, err := v.AwaitSerialFrom(ctx, from, `^GAP `); err != nil {
		t.Fatal(err)
	}
	gap, began, ok := v.Beats().LongestGap(begin.Add(-time.Second), end.Add(100*time.Millisecond))
	if !ok || gap < 300*time.Millisecond || gap > end.Sub(begin)+50*time.Millisecond {
		t.Fatalf("gap %v (ok=%v) beginning %v after stop of a pause of %v", gap, ok, began.Sub(begin), end.Sub(begin))
	}
	if n := v.Beats().Lost(); n != 0 {
		t.Errorf("%d beats lost", n)
	}
	if r := v.Report(); r.LongestGap > 200*time.Millisecond {
		t.Logf("the guest's own clock saw %v: a busy host", r.LongestGap)
	}
	t.Logf("stop..cont %v, longest silence %v", end.Sub(begin), gap)
}

func TestQEMU10(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	q, err := guest.QEMU10(ctx)
	if err != nil {
		t.Fatal(err)
	}
	v := Start(t, Config{QEMU: q, Guest: Mini, MemoryMiB: 64, WSMiB: 4, Control: true})
	m, err := DialMonitor(ctx, v.ControlPath())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if m.Version[0] != 10 {
		t.Fatalf("version %v", m.Version)
	}
	v.WaitProgress(t, 100)
	v.Invariants()
}

// Every configuration of the matrix boots and its guest makes progress: here those that
// the end-to-end tests do not take through a whole round anyway, with
// CKAGENT_E2E_LONG=1 all of them.
func TestMatrix(t *testing.T) {
	if testing.Short() {
		Skip(t, "short", "boots every configuration")
	}
	for _, c := range Matrix() {
		if c.CoveredBy == "" && os.Getenv("CKAGENT_E2E_LONG") == "" {
			continue
		}
		t.Run(c.Name, func(t *testing.T) {
			t.Parallel()
			v := Start(t, c.Prepare(t))
			v.WaitProgress(t, 200)
			v.Invariants()
			if _, _, err := v.MainRAM(); err != nil && c.Config.Backend != FileExt4 {
				t.Error(err)
			}
		})
	}
}

// Which of the guest's clocks go on over a pause: none but the RTC (and that one
// decides what tools/guest/README.md says about measuring gaps).
func TestClocksOverAPause(t *testing.T) {
	v := Start(t, Config{Control: true})
	m, err := DialMonitor(t.Context(), v.ControlPath())
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	v.WaitSerial(t, `^TICK 12 `, 20*time.Second)
	const pause = 3 * time.Second
	if err := m.Execute(t.Context(), "stop", nil, nil); err != nil {
		t.Fatal(err)
	}
	timer := time.NewTimer(pause)
	<-timer.C
	mark := v.SerialSize()
	if err := m.Execute(t.Context(), "cont", nil, nil); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	after, err := v.AwaitSerialFrom(ctx, mark, `^TICK .*rtc=2`)
	if err != nil {
		t.Fatal(err)
	}
	var before string
	for line := range strings.Lines(v.Serial()[:mark]) {
		if strings.HasPrefix(line, "TICK ") && strings.Contains(line, "rtc=2") {
			before = line
		}
	}
	field := func(line, key string) string {
		_, rest, _ := strings.Cut(line, key+"=")
		value, _, _ := strings.Cut(rest, " ")
		return value
	}
	step := func(key string) time.Duration {
		a, err1 := strconv.ParseInt(field(before, key), 10, 64)
		b, err2 := strconv.ParseInt(field(after, key), 10, 64)
		if err1 != nil || err2 != nil {
			t.Fatalf("%q %q", before, after)
		}
		return time.Duration(b-a) * time.Microsecond
	}
	rtcBefore, err1 := time.Parse(time.RFC3339, field(before, "rtc"))
	rtcAfter, err2 := time.Parse(time.RFC3339, field(after, "rtc"))
	if err1 != nil || err2 != nil {
		t.Fatalf("%q %q", before, after)
	}
	t.Logf("over a pause of %v: monotonic %v, realtime %v, RTC %v", pause, step("mono_us"), step("real_us"), rtcAfter.Sub(rtcBefore))
	if mono, rtc := step("mono_us"), rtcAfter.Sub(rtcBefore); mono > pause || rtc < pause {
		t.Errorf("monotonic went on by %v, the RTC by %v over a pause of %v", mono, rtc, pause)
	}
	v.Invariants()
}

// Files on an ext4 disk outlive the machine, are verified by the next one, and a
// script from the disk runs.
func TestDiskAndScript(t *testing.T) {
	dir := t.TempDir()
	disk, tree := filepath.Join(dir, "disk"), filepath.Join(dir, "tree")
	if err := os.Mkdir(tree, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(tree, "run.sh"), []byte("echo script runs on $(uname -s)\nexit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.CommandContext(t.Context(), "mke2fs", "-q", "-t", "ext4", "-d", tree, disk, "32M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cfg := Config{Append: "GD_DISK=vda GD_FILES=disk GD_RUN=/mnt/run.sh", Args: []string{
		"-drive", "if=none,id=d0,format=raw,file=" + disk, "-device", "virtio-blk-pci,drive=d0"}}
	v := Start(t, cfg)
	v.WaitSerial(t, `^script runs on Linux`, 20*time.Second)
	v.WaitSerial(t, `^RUN done status=3`, 20*time.Second)
	v.WaitSerial(t, `^FILES wrote=[1-9]`, 20*time.Second)
	v.Invariants()
	if err := v.Crash(); err != nil {
		t.Fatal(err)
	}
	cfg.Dir = "" // a machine of its own on the same disk
	next := Start(t, cfg)
	line := next.WaitSerial(t, `^FILES ready .*next=[1-9]`, 20*time.Second)
	next.Invariants()
	t.Log(line)
}

func TestSkipLineIsStable(t *testing.T) {
	path := filepath.Join(t.TempDir(), "skips")
	for range 2 {
		if err := appendLine(path, skipLine("some-id", "needs %d of them", 3)); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if want := "SKIP-REASON some-id: needs 3 of them\n"; err != nil || string(b) != want+want {
		t.Fatalf("%q %v", b, err)
	}
}
