package vm

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/tools/guest"
	"golang.org/x/sys/unix"
)

// build is a QEMU to test with.
type build struct {
	name, binary string
	env, args    []string
}

// builds are the QEMUs to test with: the machine's own, and the newer one that the
// guest tools keep in their cache.
func builds(t testing.TB) []build {
	t.Helper()
	path, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	out := []build{{name: "system", binary: path}}
	newer.once.Do(func() { newer.qemu, newer.err = guest.QEMU10(context.Background()) })
	if newer.err != nil {
		t.Logf("QEMU 10 is not tested: %v", newer.err)
		return out
	}
	return append(out, build{"qemu10", newer.qemu.Binary, newer.qemu.Env, newer.qemu.Args})
}

// newer is QEMU 10, unpacked into the cache once.
var newer struct {
	once sync.Once
	qemu guest.QEMU
	err  error
}

// startQEMU runs QEMU with a monitor; it is killed at the test's end.
func startQEMU(t testing.TB, b build, args ...string) *exec.Cmd {
	t.Helper()
	dir, err := os.MkdirTemp("", "ckvm")
	if err != nil {
		t.Fatal(err)
	}
	sock := filepath.Join(dir, "qmp")
	all := append(slices.Clone(b.args), "-display", "none", "-qmp", "unix:"+sock+",server=on,wait=off")
	cmd := exec.Command(b.binary, append(all, args...)...)
	cmd.Env = append(os.Environ(), b.env...)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { _ = cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		<-exited
		os.RemoveAll(dir)
	})
	// The socket is there once QEMU has parsed its command line; the monitor
	// greets once the machine is built.
	deadline := time.Now().Add(20 * time.Second)
	for {
		fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		err = unix.Connect(fd, &unix.SockaddrUnix{Name: sock})
		if err == nil {
			// Wait for the greeting: from then on the machine stands.
			p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
			_, err = unix.Poll(p, 20_000)
			n, _, _ := unix.Recvfrom(fd, make([]byte, 1), unix.MSG_DONTWAIT)
			unix.Close(fd)
			if err == nil && n > 0 { // not the end of a QEMU that gave up
				return cmd
			}
		} else {
			unix.Close(fd)
		}
		select {
		case <-exited:
			t.Fatalf("QEMU did not start: %s", stderr.String())
		case <-time.After(5 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			t.Fatalf("no monitor: %v", err)
		}
	}
}

func openQEMU(t testing.TB, b build, args ...string) *Target {
	t.Helper()
	cmd := startQEMU(t, b, args...)
	tgt, err := Open(t.Context(), cmd.Process.Pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tgt.Close() })
	return tgt
}

func truncated(t testing.TB, dir, name string, size int64) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, size); err != nil {
		t.Fatal(err)
	}
	return path
}

func copied(t testing.TB, dir, from string) string {
	t.Helper()
	b, err := os.ReadFile(from)
	if err != nil {
		t.Skipf("no firmware to test with: %v", err)
	}
	to := filepath.Join(dir, filepath.Base(from))
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return to
}

func TestOpenIdentifies(t *testing.T) {
	for _, b := range builds(t) {
		t.Run(b.name, func(t *testing.T) {
			tgt := openQEMU(t, b, "-S", "-M", "q35", "-m", "64", "-smp", "3", "-name", "guest=alpha,debug-threads=on")
			if tgt.Name != "alpha" || !strings.HasPrefix(tgt.Machine, "pc-q35-") || tgt.Accel != "tcg" || len(tgt.VCPUs) != 3 {
				t.Errorf("identity %+v", tgt)
			}
			tids, err := tgt.Process.Threads()
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range tgt.VCPUs {
				if !slices.Contains(tids, c.TID) {
					t.Errorf("vCPU %d on thread %d, which is not QEMU's", c.Index, c.TID)
				}
			}
			p, err := PredictPause(t.Context(), tgt)
			if err != nil || p.UsedBytes == 0 || p.UsedBytes > p.TotalBytes || p.Pause <= 0 {
				t.Errorf("prediction %+v, %v", p, err)
			}
			other := startQEMU(t, b, "-S", "-M", "pc", "-m", "64")
			if _, err := Open(t.Context(), other.Process.Pid, Options{QMP: tgt.Endpoint.Address}); err == nil {
				t.Error("another VM's monitor was taken")
			}
		})
	}
}

func TestOpenWithAnotherVMsMonitor(t *testing.T) {
	b := builds(t)[0]
	dir := t.TempDir()
	extra := filepath.Join(dir, "second")
	first := startQEMU(t, b, "-S", "-M", "pc", "-m", "64", "-qmp", "unix:"+extra+",server=on,wait=off")
	second := startQEMU(t, b, "-S", "-M", "pc", "-m", "64")
	tgt, err := Open(t.Context(), first.Process.Pid, Options{QMP: extra})
	if err != nil {
		t.Fatal(err)
	}
	tgt.Close()
	if _, err := Open(t.Context(), second.Process.Pid, Options{QMP: extra}); !problem.Is(err, problem.Refused) {
		t.Errorf("got %v, want refused", err)
	}
	if tgt, err = Open(t.Context(), first.Process.Pid, Options{QMP: extra}); err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	// But a process that is on its way out has lost its threads, and is no stranger.
	p, err := OpenProcess(second.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	own := tgt.Process
	tgt.Process = p
	_ = second.Process.Kill()
	if _, err := tgt.ReadVCPUs(t.Context()); !problem.Is(err, problem.NotFound) {
		t.Errorf("got %v, want not found", err)
	}
	tgt.Process = own
}

func TestQEMUWithoutMonitor(t *testing.T) {
	b := builds(t)[0]
	cmd := exec.Command(b.binary, "-S", "-display", "none", "-M", "pc", "-m", "64", "-serial", "none", "-monitor", "none")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Process.Kill(); _ = cmd.Wait() }()
	// Until exec has happened the child is this test binary.
	waitFor(t, func() bool { p, err := OpenProcess(cmd.Process.Pid); closeIf(p, err); return err == nil })
	if _, err := Open(t.Context(), cmd.Process.Pid, Options{}); err == nil || problem.Is(err, problem.Failed) {
		t.Errorf("got %v", err)
	}
}

func closeIf(p *Process, err error) {
	if err == nil {
		p.Close()
	}
}

// waitFor polls a condition that nothing announces.
func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatal("timed out")
		}
	}
}

func TestPauseKeepsAPausedMachinePaused(t *testing.T) {
	tgt := openQEMU(t, builds(t)[0], "-M", "pc", "-m", "64")
	was, err := tgt.Pause(t.Context())
	if err != nil || !was {
		t.Fatalf("pause of a running machine: %v %v", was, err)
	}
	if was, err = tgt.Pause(t.Context()); err != nil || was {
		t.Fatalf("pause of a paused machine: %v %v", was, err)
	}
	if r, err := tgt.Refusals(t.Context()); err != nil || len(r) != 0 {
		t.Errorf("a paused machine is refused: %+v %v", r, err)
	}
	if err := tgt.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	if s, err := tgt.Status(t.Context()); err != nil || !s.Running {
		t.Errorf("after resume %+v %v", s, err)
	}
}

func TestTargetGoneIsNotFound(t *testing.T) {
	cmd := startQEMU(t, builds(t)[0], "-S", "-M", "pc", "-m", "64")
	tgt, err := Open(t.Context(), cmd.Process.Pid, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer tgt.Close()
	_ = cmd.Process.Kill()
	<-tgt.Process.Done()
	for name, call := range map[string]func() error{
		"layout":   func() error { _, err := tgt.Layout(t.Context()); return err },
		"refusals": func() error { _, err := tgt.Refusals(t.Context()); return err },
		"describe": func() error { _, err := tgt.Describe(t.Context()); return err },
		"open":     func() error { _, err := Open(t.Context(), cmd.Process.Pid, Options{}); return err },
	} {
		if err := call(); !problem.Is(err, problem.NotFound) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

var _ Monitor = (*qmp.Client)(nil)

func codes(list []Refusal) []string {
	var out []string
	for _, r := range list {
		out = append(out, r.Code)
	}
	slices.Sort(out)
	return slices.Compact(out)
}
