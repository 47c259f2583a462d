package pager

import (
	"context"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/uffd"
)

// leave leaves this process so many descriptors, until the end of the test.
func leave(t *testing.T, n int) {
	t.Helper()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	var held []int
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
			t.Error(err)
		}
		for _, fd := range held {
			unix.Close(fd)
		}
	})
	for range n {
		fd, err := unix.Open(os.DevNull, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		held = append(held, fd)
	}
	now := old
	now.Cur = uint64(held[n-1]) + 1 // the lowest that are free were taken
	for _, fd := range held {
		unix.Close(fd)
	}
	held = nil
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &now); err != nil {
		t.Fatal(err)
	}
}

// TestSupervisorWithoutDescriptors: a supervisor that cannot look at the process served does
// not call it gone. The worker would be ended for that, and its guest wait for ever.
func TestSupervisorWithoutDescriptors(t *testing.T) {
	dir := t.TempDir()
	self, err := myself()
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Self: "/proc/self/exe", RunDir: dir, ImageDir: dir, QEMUPID: self.PID, QEMUStart: self.Start,
		Blocks: []Block{{Bytes: PageBytes, HVA: 1 << 30}}}
	if err := cfg.resolve(); err != nil {
		t.Fatal(err)
	}
	if err := writeFile(dir, stateFile, &state{Schema: stateSchema, Phase: PhaseServing.String(), Config: cfg}); err != nil {
		t.Fatal(err)
	}
	ctl, err := newControl()
	if err != nil {
		t.Fatal(err)
	}
	defer ctl.close()
	ctl.advance(PhaseServing)
	leave(t, 1) // for a pidfd, and none to read /proc
	err = supervise(context.Background(), &options{runDir: dir}, ctl, nil)
	if !errors.Is(err, unix.EMFILE) || errors.Is(err, uffd.ErrGone) {
		t.Errorf("it ended with %v", err)
	}
	if p := ctl.phaseNow(); p != PhaseServing {
		t.Errorf("it published that the pager is %v", p)
	}
}
