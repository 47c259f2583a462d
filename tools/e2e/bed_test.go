package e2e

import (
	"bytes"
	"context"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/tools/vmtest"
)

// bed is a machine whose monitor ckagent sees through a proxy, and the test
// through a socket of its own.
type bed struct {
	v       *vmtest.VM
	proxy   *vmtest.Proxy
	control *vmtest.Monitor
	reached atomic.Int64 // rules that struck
}

func newBed(t testing.TB) *bed {
	t.Helper()
	return newBedOf(t, vmtest.Config{Guest: vmtest.Mini, MemoryMiB: 64, WSMiB: 8, SweepMS: 500, Rate: 2000, Idle: true})
}

func newBedOf(t testing.TB, cfg vmtest.Config) *bed {
	t.Helper()
	cfg.Control = true
	b := &bed{v: vmtest.Start(t, cfg)}
	b.control = monitor(t, b.v.ControlPath())
	var err error
	if b.proxy, err = vmtest.NewProxy(filepath.Join(b.v.Dir(), "proxy.sock"), b.v.QMPPath()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.proxy.Close(); err != nil {
			t.Error(err)
		}
	})
	b.v.WaitProgress(t, 200)
	return b
}

// at calls do when the command first passes, and holds it until do returns.
func (b *bed) at(command string, do func()) (remove func()) {
	return b.proxy.Withhold(command, func(_ context.Context, m vmtest.Message) {
		if m.Nth == 1 {
			b.reached.Add(1) // first: the verb may have ended before do returns
			do()
		}
	})
}

// strike gives the first command of the name a verdict.
func (b *bed) strike(command string, verdict vmtest.Verdict) (remove func()) {
	return b.proxy.Add(vmtest.Rule{Command: command, Decide: func(_ context.Context, m vmtest.Message) vmtest.Verdict {
		if m.Nth > 1 {
			return vmtest.Pass
		}
		b.reached.Add(1)
		return verdict
	}})
}

func (b *bed) wantReached(t testing.TB, n int64) {
	t.Helper()
	if got := b.reached.Load(); got != n {
		t.Errorf("the proxy struck %d times, want %d: the test tests nothing", got, n)
	}
}

// started is a verb that runs.
type started struct {
	args     []string
	pid      int
	signal   func(unix.Signal)
	out, err *bytes.Buffer
	done     chan int // the exit code
}

// start runs a verb without waiting for its end, which wait has to.
func (x *tool) start(t testing.TB, args ...string) *started {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), runTimeout)
	s := &started{args: args, out: new(bytes.Buffer), err: new(bytes.Buffer), done: make(chan int, 1)}
	c := x.command(ctx, args...)
	c.Stdout, c.Stderr = s.out, s.err
	if err := c.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	s.pid = c.Process.Pid
	s.signal = func(sig unix.Signal) { _ = c.Process.Signal(sig) } // it may have ended by itself
	go func() {
		defer cancel()
		_ = c.Wait() // the exit code says it
		s.done <- c.ProcessState.ExitCode()
	}()
	return s
}

// wait returns when the verb has ended.
func (s *started) wait(t testing.TB, limit time.Duration) result {
	t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case code := <-s.done:
		return result{s.args, code, s.out.String(), s.err.String()}
	case <-timer.C:
		s.signal(unix.SIGKILL)
		code := <-s.done
		t.Fatalf("did not end within %v: %s", limit, result{s.args, code, s.out.String(), s.err.String()})
		return result{}
	}
}
