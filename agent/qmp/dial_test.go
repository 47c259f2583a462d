package qmp

import (
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
)

func TestDialPrefersAFreeMonitor(t *testing.T) {
	dir := t.TempDir()
	a, b := filepath.Join(dir, "a.sock"), filepath.Join(dir, "b.sock")
	q := startQEMU(t, "/", b, nil, append(qmpAt(a), qmpAt(b)...)...)
	ctx := testContext(t)
	begin := time.Now()
	first, err := DialPID(ctx, q.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	second, err := DialPID(ctx, q.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if first.Endpoint().Address != a || second.Endpoint().Address != b {
		t.Errorf("%v, %v", first.Endpoint(), second.Endpoint())
	}
	if d := time.Since(begin); d > 900*time.Millisecond {
		t.Errorf("took %v: it waited at the busy one", d)
	}
}

func TestDialStoppedQEMU(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "q.sock")
	q := startQEMU(t, "/", sock, nil, qmpAt(sock)...)
	if err := q.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	_, err := DialPID(testContext(t), q.pid)
	if !problem.Is(err, problem.Busy) || !strings.Contains(err.Error(), "kill -CONT") {
		t.Errorf("stopped QEMU: %v", err)
	}
}
