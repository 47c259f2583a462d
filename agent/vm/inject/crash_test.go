package inject

import (
	"context"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// untouched are the states before anything was changed: a call that the kernel
// never restarts ends with EINTR there, as after any debugger's visit.
var untouched = []string{"seized", "interrupted", "frame-written"}

// TestTracerDiesAtEveryStop kills the tracer at each state it puts a thread
// into, for each kind of thread, and lets the victim check itself afterwards.
func TestTracerDiesAtEveryStop(t *testing.T) {
	verbs := []string{"device"}
	if _, err := os.Stat(devicePath); err != nil {
		verbs = []string{"syscall"}
	}
	for _, verb := range verbs {
		for _, kind := range kinds {
			t.Run(verb+"/"+kind, func(t *testing.T) {
				t.Parallel()
				v := startVictim(t, kind)
				out, _ := runTracer(t, verb, v.pid, v.worker, "list")
				stops := strings.Fields(out)
				if len(stops) < 15 {
					t.Fatalf("only %d stops: %v", len(stops), stops)
				}
				v.progress(1)
				before := v.check()
				if before.eintr != 0 {
					t.Fatal("a whole session made the call end with EINTR")
				}
				for i, stop := range stops {
					if testing.Short() && i%4 != 0 {
						continue // the code is the same for the race detector
					}
					if v.sleeps() {
						v.waitAsleep()
					}
					if _, killed := runTracer(t, verb, v.pid, v.worker, stop); !killed {
						t.Fatalf("%s: the tracer did not get to %q", kind, stop)
					}
					v.untraced()
					var atHome []Leftover
					if v.sleeps() {
						atHome = v.leftAtHome()
					}
					v.progress(1)
					if later := v.left(); v.sleeps() && !slices.Equal(atHome, later) {
						t.Fatalf("at %s: %v when the thread was home, %v later", stop, atHome, later)
					}
					now := v.check()
					if now.eintr > before.eintr && !slices.Contains(untouched, stop) {
						t.Fatalf("at %s: the call ended with EINTR", stop)
					}
					before = now
					clean(t, v, stop)
				}
				v.progress(1)
				t.Logf("%d stops survived, %+v", len(stops), v.check())
			})
		}
	}
}

// TestStaticProgram: no libc mapping, the way home is in the program itself.
func TestStaticProgram(t *testing.T) {
	if _, err := buildStatic(); err != nil {
		t.Skipf("no static C library: %v", err)
	}
	v := startBuilt(t, buildStatic, "spin")
	for _, stop := range []string{"parked", "masked", "recvmsg-enter", "ioctl-exit", "trapped", "unmasked"} {
		if _, killed := runTracer(t, "device", v.pid, v.worker, stop); !killed {
			t.Fatalf("no stop %q", stop)
		}
		v.untraced()
		v.progress(1)
		clean(t, v, stop)
	}
}

// clean removes what a dead tracer left, as the guardian does.
func clean(t *testing.T, v *victim, stop string) {
	t.Helper()
	left, err := FindLeftovers(v.pid)
	if err != nil {
		t.Fatal(err)
	}
	if len(left) > 2 {
		t.Fatalf("at %s: %d descriptors left: %v", stop, len(left), left)
	}
	var fds []int
	for _, l := range left {
		fds = append(fds, l.FD)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := CloseFDs(ctx, v.pid, fds); err != nil {
		t.Fatalf("at %s: %v", stop, err)
	}
	left, err = FindLeftovers(v.pid)
	if err != nil || len(left) != 0 {
		t.Fatalf("at %s: left after closing %v: %v, %v", stop, fds, left, err)
	}
	for _, e := range entries(t, v.pid) {
		if !slices.Contains(v.baseline, e) {
			t.Fatalf("at %s: descriptor %s is new", stop, e)
		}
	}
}
