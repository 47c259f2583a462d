package vcpu

import (
	"math"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// worker is a thread that runs and sleeps in turns: a vCPU of ours.
type worker struct {
	tid  int
	stop chan struct{}
	done sync.WaitGroup
}

func newWorker(on, off time.Duration) *worker {
	w := &worker{stop: make(chan struct{})}
	ready := make(chan struct{})
	w.done.Go(func() {
		runtime.LockOSThread()
		w.tid = unix.Gettid()
		close(ready)
		for {
			select {
			case <-w.stop:
				return
			default:
			}
			// By its own CPU time, so that a busy host does not shorten it.
			for begin := cpu(); cpu()-begin < on; {
			}
			ts := unix.NsecToTimespec(int64(off))
			_ = unix.Nanosleep(&ts, nil) // a signal makes it shorter, once
		}
	})
	<-ready
	return w
}

func cpu() time.Duration {
	var t unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}

func (w *worker) end() { close(w.stop); w.done.Wait() }

func monitor(t *testing.T) *Monitor {
	t.Helper()
	m, err := Load()
	if err != nil {
		t.Fatalf("%+v", err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// TestTimes compares with the scheduler's own account and with what was slept.
func TestTimes(t *testing.T) {
	m := monitor(t)
	a, b := newWorker(2*time.Millisecond, 8*time.Millisecond), newWorker(4*time.Millisecond, 6*time.Millisecond)
	defer a.end()
	defer b.end()
	v, err := m.Attach(os.Getpid(), []int{a.tid, b.tid}, true)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Attach(os.Getpid(), []int{a.tid}, false); err == nil {
		t.Error("attached twice")
	}
	slots, err := m.Slots()
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	var s0, s1 [2]account
	for i, w := range []*worker{a, b} {
		s0[i], _ = schedstat(os.Getpid(), w.tid)
	}
	t0, i0, err := v.Read()
	if err != nil {
		t.Fatal(err)
	}
	var begun, over int
	var told time.Duration
	slots.SetDeadline(begin.Add(time.Second))
	for {
		s, err := slots.Next()
		if err != nil {
			break
		}
		if s.PID != os.Getpid() {
			t.Errorf("a slot of pid %d", s.PID)
		}
		if s.Length == 0 {
			begun++
		} else {
			over++
			told += s.Length
		}
	}
	t1, i1, err := v.Read()
	if err != nil {
		t.Fatal(err)
	}
	for i, w := range []*worker{a, b} {
		s1[i], _ = schedstat(os.Getpid(), w.tid)
	}
	wall := time.Since(begin)
	for i := range t0 {
		run, want := t1[i].Run-t0[i].Run, s1[i].run-s0[i].run
		if d := math.Abs(float64(run-want)) / float64(wall); d > 0.02 {
			t.Errorf("vCPU %d ran %v, the scheduler says %v", i, run, want)
		}
		wait, want := t1[i].Wait-t0[i].Wait, s1[i].wait-s0[i].wait
		if d := math.Abs(float64(wait-want)) / float64(wall); d > 0.03 {
			t.Errorf("vCPU %d waited %v, the scheduler says %v", i, wait, want)
		}
		if t1[i].Switches == t0[i].Switches {
			t.Error("never switched")
		}
	}
	idle := i1.Total - i0.Total
	t.Logf("in %v: %+v; idle %v in %d slots, %d begun and %d over told of, %v", wall, t1, idle, i1.Slots-i0.Slots, begun, over, told)
	if begun == 0 || over == 0 || math.Abs(float64(told-idle)) > 0.1*float64(idle)+float64(20*time.Millisecond) {
		t.Errorf("told of %v in %d slots, counted %v", told, over, idle)
	}
	// Neither runs, waits: both sleep at least that long together.
	least := wall - (t1[0].Run - t0[0].Run) - (t1[0].Wait - t0[0].Wait) - (t1[1].Run - t0[1].Run) - (t1[1].Wait - t0[1].Wait)
	if idle < least-50*time.Millisecond || idle > wall {
		t.Errorf("idle %v, at least %v", idle, least)
	}
	if err := slots.Close(); err != nil {
		t.Error(err)
	}
	if err := v.Detach(); err != nil {
		t.Error(err)
	}
	var key uint32
	if err := m.objs.VCPUs.NextKey(nil, &key); err == nil {
		t.Error("a thread is left")
	}
}

// TestNotSeenYet: a thread that sleeps all the time has its times from the
// scheduler.
func TestNotSeenYet(t *testing.T) {
	m := monitor(t)
	w := newWorker(0, 300*time.Millisecond)
	defer w.end()
	v, err := m.Attach(os.Getpid(), []int{w.tid}, false)
	if err != nil {
		t.Fatal(err)
	}
	got, _, err := v.Read()
	if err != nil || got[0].Run > 5*time.Millisecond || got[0].Sleep <= 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if err := v.Detach(); err != nil {
		t.Error(err)
	}
	if _, err := m.Attach(os.Getpid(), nil, false); err == nil {
		t.Error("a machine without vCPU was taken")
	}
	if _, err := m.Attach(os.Getpid(), []int{1 << 22}, false); err == nil {
		t.Error("a thread that is not there was taken")
	}
}
