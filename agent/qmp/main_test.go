package qmp

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testContext ends well before the test binary's own limit.
func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// qemuProcess is a QEMU started for a test.
type qemuProcess struct {
	cmd *exec.Cmd
	pid int
}

// startQEMU starts QEMU without a guest (-machine none unless args say
// otherwise) in dir, and waits until it listens at the file wait, if any.
func startQEMU(t *testing.T, dir, wait string, prepare func(*exec.Cmd), args ...string) *qemuProcess {
	t.Helper()
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	machine := []string{"-machine", "none"}
	for _, a := range args {
		if a == "-machine" {
			machine = nil
		}
	}
	args = append(append(machine, "-accel", "tcg", "-display", "none", "-nodefaults", "-S"), args...)
	cmd := exec.Command(bin, args...)
	cmd.Dir = dir
	log, err := os.Create(filepath.Join(t.TempDir(), "qemu.log"))
	if err != nil {
		t.Fatal(err)
	}
	cmd.Stderr = log
	if prepare != nil {
		prepare(cmd)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = log.Close()
		if t.Failed() {
			if text, _ := os.ReadFile(log.Name()); len(text) > 0 {
				t.Logf("QEMU said: %s", text)
			}
		}
	})
	awaitCommandLine(t, cmd.Process.Pid)
	if wait != "" {
		if !filepath.IsAbs(wait) {
			wait = filepath.Join(dir, wait)
		}
		awaitListening(t, cmd.Process.Pid, wait)
		awaitMainLoop(t, cmd.Process.Pid)
	}
	return &qemuProcess{cmd, cmd.Process.Pid}
}

// await looks every few milliseconds until it sees what it is told to look for.
func await(t testing.TB, what string, look func() bool) {
	t.Helper()
	tick := time.NewTicker(2 * time.Millisecond)
	defer tick.Stop()
	for deadline := time.After(15 * time.Second); !look(); {
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatal("in vain: " + what)
		}
	}
}

// awaitCommandLine waits for the end of exec: the new program has no arguments yet
// when its parent learns that it was found.
func awaitCommandLine(t testing.TB, pid int) {
	t.Helper()
	await(t, fmt.Sprintf("a command line of pid %d", pid), func() bool {
		b, err := readProc(pid, "cmdline")
		return err == nil && len(b) > 0
	})
}

// awaitListening looks at the process's socket table, without connecting.
func awaitListening(t testing.TB, pid int, path string) {
	t.Helper()
	await(t, "QEMU listens at "+path, func() bool {
		table, _ := unixTable(pid)
		held, err := sockets(pid)
		return err == nil && slices.ContainsFunc(table, func(s unixSocket) bool {
			_, ours := held[s.inode]
			return ours && s.listening && filepath.Base(s.path) == filepath.Base(path)
		})
	})
}

// awaitMainLoop waits until QEMU's main thread waits for events. Before that QEMU listens
// already, but has not connected the monitor to the socket: whoever talks to it then finds
// that QEMU 7.2 says nothing or ends, once in some hundred starts.
func awaitMainLoop(t testing.TB, pid int) {
	t.Helper()
	await(t, "QEMU's main loop", func() bool {
		b, err := readProc(pid, "syscall")
		nr, _, _ := strings.Cut(string(b), " ")
		return err == nil && nr == strconv.Itoa(unix.SYS_PPOLL)
	})
}

func dial(t *testing.T, e Endpoint) *Client {
	t.Helper()
	c, err := Dial(testContext(t), e)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func socketPair(t *testing.T) (ours, theirs int) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	return fds[0], fds[1]
}
