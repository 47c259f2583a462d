package heartbeat

import (
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

//go:noinline
func somethingShort(n *uint64) { *n++ }

// switches is how often the thread of a busy goroutine has given up its processor
// by itself within d.
func switches(t *testing.T, d time.Duration) int64 {
	t.Helper()
	var before, after unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &before); err != nil {
		t.Fatal(err)
	}
	var n uint64
	for until := time.Now().Add(d); time.Now().Before(until); {
		somethingShort(&n)
	}
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &after); err != nil {
		t.Fatal(err)
	}
	return after.Nvcsw - before.Nvcsw
}

// The scheduler takes a thread away from a goroutine that has run for long, and
// not while it is pinned, whatever else wants to run.
func TestPinnedThreadIsLeftAlone(t *testing.T) {
	var stop atomic.Bool
	done := make(chan struct{})
	go func() {
		defer close(done)
		for !stop.Load() {
			runtime.Gosched()
		}
	}()
	defer func() { stop.Store(true); <-done }()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1)) // so that there is a reason
	for deadline := time.Now().Add(20 * time.Second); switches(t, 200*time.Millisecond) == 0; {
		if time.Now().After(deadline) {
			t.Fatal("it is left alone without a pin: this test shows nothing")
		}
	}
	Pin()
	n := switches(t, 200*time.Millisecond)
	Unpin()
	if n > 2 { // a page fault may have to wait
		t.Errorf("it was taken off its processor %d times", n)
	}
}
