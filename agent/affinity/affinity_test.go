package affinity

import (
	"os/exec"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/procstat"
)

// busy starts a process that never sleeps, on one processor.
func busy(t *testing.T, cpu int) int {
	t.Helper()
	cmd := exec.Command("sh", "-c", "while :; do :; done")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	var set unix.CPUSet
	set.Set(cpu)
	if err := unix.SchedSetaffinity(cmd.Process.Pid, &set); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		s, err := procstat.Read(cmd.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		if s.State == 'R' && s.Processor == cpu {
			return cmd.Process.Pid
		}
		if time.Now().After(deadline) {
			t.Fatalf("it does not run on processor %d: %+v", cpu, s)
		}
	}
}

// onThread runs f on a thread that ends with it.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

func affinityNow(t *testing.T) unix.CPUSet {
	t.Helper()
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(0, &set); err != nil {
		t.Error(err)
	}
	return set
}

func firstAndLast(t *testing.T) (all unix.CPUSet, first, last int) {
	t.Helper()
	all = affinityNow(t)
	if all.Count() < 2 {
		t.Fatal("the tests need two processors")
	}
	first = -1
	for i := range 1024 {
		if all.IsSet(i) {
			if first < 0 {
				first = i
			}
			last = i
		}
	}
	return all, first, last
}

func TestStaysAwayFromARunningVCPU(t *testing.T) {
	all, first, last := firstAndLast(t)
	pid := busy(t, first)
	onThread(func() {
		th := Of([]int{pid}).Thread()
		th.Keep()
		want := all
		want.Clear(first)
		if got := affinityNow(t); got != want {
			t.Errorf("may run on %v, want %v", got, want)
		}
		var moved unix.CPUSet
		moved.Set(last)
		if err := unix.SchedSetaffinity(pid, &moved); err != nil {
			t.Error(err)
			return
		}
		want = all
		want.Clear(last)
		for deadline := time.Now().Add(10 * time.Second); affinityNow(t) != want; th.Keep() {
			if time.Now().After(deadline) {
				t.Errorf("the vCPU moved, the thread did not: %v", affinityNow(t))
				return
			}
		}
	})
}

func TestIsNotRestrictedWhereVCPUsTakeEverything(t *testing.T) {
	all, _, _ := firstAndLast(t)
	var pids []int
	for i := range 1024 {
		if all.IsSet(i) {
			pids = append(pids, busy(t, i))
		}
	}
	if len(pids) > most {
		pids = pids[:most]
	}
	onThread(func() {
		th := Of(pids).Thread()
		th.Keep()
		if got := affinityNow(t); len(pids) == all.Count() && got != all {
			t.Errorf("may run on %v, want %v", got, all)
		}
	})
}

func TestAStoppedVCPUDoesNotCount(t *testing.T) {
	all, first, _ := firstAndLast(t)
	pid := busy(t, first)
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(10 * time.Second); ; runtime.Gosched() {
		s, err := procstat.Read(pid)
		if err != nil {
			t.Fatal(err)
		}
		if s.Stopped() {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it does not stop")
		}
	}
	onThread(func() {
		Of([]int{pid}).Thread().Keep()
		if got := affinityNow(t); got != all {
			t.Errorf("may run on %v, want %v", got, all)
		}
	})
}
