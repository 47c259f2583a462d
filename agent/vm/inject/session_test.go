package inject

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

func withTimeout(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// TestSessionLeavesThreadAsItWas runs whole sessions in threads of every kind.
func TestSessionLeavesThreadAsItWas(t *testing.T) {
	for _, kind := range kinds {
		t.Run(kind, func(t *testing.T) {
			t.Parallel()
			v := startVictim(t, kind)
			for range 5 {
				if v.sleeps() {
					v.waitAsleep()
				}
				s, err := open(withTimeout(t), v.pid, v.worker, Options{})
				if err != nil {
					t.Fatal(err)
				}
				if pid, err := s.Syscall(unix.SYS_GETTID); err != nil || int(pid) != v.worker {
					t.Errorf("gettid: %d, %v; want %d", pid, err, v.worker)
				}
				if _, err := s.Syscall(unix.SYS_CLOSE, 12345); !errors.Is(err, unix.EBADF) {
					t.Errorf("close of nothing: %v, want EBADF", err)
				}
				if err := s.Close(); err != nil {
					t.Error(err)
				}
				if _, err := s.Syscall(unix.SYS_GETPID); err == nil {
					t.Error("a closed session runs system calls")
				}
				if err := s.Close(); err != nil {
					t.Errorf("second close: %v", err)
				}
				v.untraced()
				v.progress(1)
			}
			if r := v.check(); r.eintr != 0 {
				t.Errorf("%d calls ended with EINTR", r.eintr)
			}
		})
	}
}

// TestRemainingTime: a sleep of 150 ms that is interrupted every 10 ms still ends,
// again and again: each session lets it go on with what remains.
func TestRemainingTime(t *testing.T) {
	for _, kind := range []string{"nanosleep", "ppoll-timeout"} {
		v := startVictim(t, kind)
		first, began, visits := v.check().rounds, time.Now(), 0
		for v.check().rounds < first+4 {
			if time.Since(began) > 20*time.Second {
				t.Fatalf("%s: %d rounds of 150 ms with %d visits in 20 s", kind, v.check().rounds-first, visits)
			}
			s, err := open(withTimeout(t), v.pid, v.worker, Options{})
			if errors.Is(err, errUnfit) {
				continue
			}
			if err != nil {
				v.check() // a worker that found something wrong has ended
				t.Fatal(err)
			}
			if _, err := s.Syscall(unix.SYS_GETPID); err != nil {
				t.Error(err)
			}
			if err := s.Close(); err != nil {
				t.Fatal(err)
			}
			visits++
			unix.Poll(nil, 10)
		}
		t.Logf("%s: %d visits in %v", kind, visits, time.Since(began).Round(time.Millisecond))
	}
}

func TestScratchMemory(t *testing.T) {
	v := startVictim(t, "futex")
	s, err := Open(withTimeout(t), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	addr, n := s.Scratch()
	name := []byte("ckagent-scratch\x00")
	if n < 1024 || addr%64 != 0 {
		t.Fatalf("%d bytes of scratch at %#x", n, addr)
	}
	if err := s.Write(addr, name); err != nil {
		t.Fatal(err)
	}
	fd, err := s.Syscall(unix.SYS_MEMFD_CREATE, uintptr(addr), 0)
	if err != nil {
		t.Fatal(err)
	}
	link, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", v.pid, fd))
	if !strings.Contains(link, "ckagent-scratch") {
		t.Errorf("descriptor %d is %q", fd, link)
	}
	if _, err := s.Syscall(unix.SYS_CLOSE, fd); err != nil {
		t.Error(err)
	}
	back := make([]byte, len(name))
	if err := s.Read(addr, back); err != nil || string(back) != string(name) {
		t.Errorf("%q, %v", back, err)
	}
}

// TestSIGSTOPDuringSession: the process is stopped while a thread of it is held:
// the session goes on, the process is stopped afterwards, and SIGCONT wakes it.
func TestSIGSTOPDuringSession(t *testing.T) {
	for _, before := range []bool{true, false} {
		v := startVictim(t, "futex")
		v.waitAsleep()
		if before {
			stopAndWait(t, v)
		}
		s, err := open(withTimeout(t), v.pid, v.worker, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if !before {
			unix.Kill(v.pid, unix.SIGSTOP)
		}
		for range 20 {
			if id, err := s.Syscall(unix.SYS_GETTID); err != nil || int(id) != v.worker {
				t.Fatalf("gettid: %d, %v", id, err)
			}
		}
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		v.untraced()
		waitState(t, v, 'T')
		unix.Kill(v.pid, unix.SIGCONT)
		v.progress(2)
	}
}

func stopAndWait(t *testing.T, v *victim) {
	unix.Kill(v.pid, unix.SIGSTOP)
	waitState(t, v, 'T')
}

func waitState(t *testing.T, v *victim, state byte) {
	t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for {
		th, err := readThread(v.pid, v.worker)
		if err != nil {
			t.Fatal(err)
		}
		if th.state == state {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("state %c, want %c", th.state, state)
		}
		unix.Poll(nil, 1)
	}
}

// TestTargetEnds: killed at every stop, the session ends with ErrGone, soon.
func TestTargetEnds(t *testing.T) {
	v := startVictim(t, "futex")
	out, _ := runTracer(t, "device", v.pid, v.worker, "list")
	defer func() { TestHook = nil }()
	for _, stop := range strings.Fields(out) {
		if stop == "detached" || stop == "restored" || strings.Contains(stop, "#") {
			continue
		}
		v := startVictim(t, "futex")
		TestHook = func(name string) {
			if name == stop {
				unix.Kill(v.pid, unix.SIGKILL)
			}
		}
		began := time.Now()
		f, _, err := userfaultfd(withTimeout(t), v.pid, v.worker, Options{})
		TestHook = nil
		if err == nil {
			// Everything had been done already: what we hold is of a dead process.
			f.Close()
			if !slices.Contains([]string{"leaving", "trapped", "unmasked", "close-uffd-exit"}, stop) {
				t.Errorf("at %s: no error", stop)
			}
		} else if !errors.Is(err, ErrGone) && !problem.Is(err, problem.NotFound) && !problem.Is(err, problem.Failed) {
			t.Errorf("at %s: %v", stop, err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("at %s: it took %v to notice", stop, took)
		}
	}
}

// TestBounded: a call that blocks in the target ends with the context, and the
// thread is let go.
func TestBounded(t *testing.T) {
	v := startVictim(t, "ppoll")
	v.waitAsleep()
	ctx, cancel := context.WithTimeout(context.Background(), 200*time.Millisecond)
	defer cancel()
	s, err := open(ctx, v.pid, v.worker, Options{})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	_, err = s.Syscall(unix.SYS_PAUSE)
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("pause: %v, want the deadline", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if took := time.Since(began); took > time.Second {
		t.Errorf("took %v", took)
	}
	v.untraced()
	v.progress(2)
}

// TestUserfaultfd makes one both ways, and checks that it belongs to the target.
func TestUserfaultfd(t *testing.T) {
	v := startVictim(t, "futex")
	for _, o := range []Options{{}, {SyscallOnly: true}, {KeepInside: true}} {
		var tr Trace
		o.Trace = &tr
		f, remote, err := Userfaultfd(withTimeout(t), v.pid, o)
		if err != nil {
			t.Fatalf("%+v: %v", o, err)
		}
		link, _ := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
		if link != userfaultfdLink {
			t.Errorf("descriptor is %q", link)
		}
		inside, err := FindUserfaultfds(v.pid)
		if err != nil {
			t.Fatal(err)
		}
		want := []int(nil)
		if o.KeepInside {
			want = []int{remote}
		}
		if !slices.Equal(inside, want) {
			t.Errorf("%+v: inside %v, want %v", o, inside, want)
		}
		if o.SyscallOnly == tr.Device {
			if _, err := os.Stat(devicePath); err == nil {
				t.Errorf("%+v: through the device: %v", o, tr.Device)
			}
		}
		if remote >= 0 {
			if err := CloseFD(withTimeout(t), v.pid, remote); err != nil {
				t.Error(err)
			}
		}
		f.Close()
		v.progress(1)
	}
	if err := CloseFD(withTimeout(t), v.pid, 0); !problem.Is(err, problem.Refused) {
		t.Errorf("closing stdin of the target: %v, want a refusal", err)
	}
}

// TestRefusals of processes that are there and of one that is not.
func TestRefusals(t *testing.T) {
	if err := CanTrace(1<<22 - 1); !problem.Is(err, problem.NotFound) {
		t.Errorf("no process: %v", err)
	}
	if err := CanTrace(2); !problem.Is(err, problem.Refused) {
		t.Errorf("kernel thread: %v", err)
	}
	v := startVictim(t, "futex")
	s, err := Open(withTimeout(t), v.pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := CanTrace(v.pid); !problem.Is(err, problem.Refused) || !strings.Contains(err.Error(), "traced already") {
		t.Errorf("traced already: %v", err)
	}
	if _, err := Open(withTimeout(t), v.pid); !problem.Is(err, problem.Refused) {
		t.Errorf("second session: %v", err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if err := CanTrace(v.pid); err != nil {
		t.Error(err)
	}
}

// TestSeccomp: what the target's filter would kill it for is refused before it
// is tried; what it would only fail is suspended, and harmless if we die.
func TestSeccomp(t *testing.T) {
	if !ownCapability(unix.CAP_SYS_ADMIN) {
		t.Skip("without CAP_SYS_ADMIN seccomp filters cannot be read")
	}
	socket := fmt.Sprint(unix.SYS_SOCKET)
	t.Run("kill", func(t *testing.T) {
		v := startVictim(t, "futex", "kill", socket)
		var tr Trace
		// The device cannot be passed, so that userfaultfd(2) is used.
		f, _, err := userfaultfd(withTimeout(t), v.pid, v.worker, Options{Trace: &tr})
		if err != nil || tr.Device {
			t.Fatalf("%v, through the device: %v", err, tr.Device)
		}
		f.Close()
		v.progress(1)
		v = startVictim(t, "futex", "kill", fmt.Sprint(unix.SYS_USERFAULTFD))
		if _, _, err := userfaultfd(withTimeout(t), v.pid, v.worker, Options{SyscallOnly: true}); !problem.Is(err, problem.Refused) {
			t.Errorf("%v, want a refusal", err)
		}
		v.progress(1)
		v = startVictim(t, "read", "kill", fmt.Sprint(unix.SYS_RT_SIGRETURN))
		if _, _, err := userfaultfd(withTimeout(t), v.pid, v.worker, Options{}); !problem.Is(err, problem.Refused) {
			t.Errorf("no sigreturn: %v, want a refusal", err)
		}
		v.progress(1)
	})
	t.Run("errno", func(t *testing.T) {
		v := startVictim(t, "futex", "errno", socket)
		var tr Trace
		f, _, err := userfaultfd(withTimeout(t), v.pid, v.worker, Options{Trace: &tr})
		if err != nil || !tr.Device {
			t.Fatalf("%v, through the device: %v", err, tr.Device)
		}
		f.Close()
		for _, stop := range []string{"socket-set", "socket-enter", "recvmsg-enter", "trapped"} {
			v.waitAsleep()
			if _, killed := runTracer(t, "device", v.pid, v.worker, stop); !killed {
				t.Fatalf("no stop %q", stop)
			}
			v.progress(1)
			clean(t, v, stop)
		}
	})
}

// startQEMU starts a QEMU under its own sandbox whose guest is a BIOS.
func startQEMU(t testing.TB, extra ...string) (pid int) {
	t.Helper()
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	args := append([]string{"-accel", "tcg", "-m", "64", "-name", "victim,debug-threads=on", "-nodefaults", "-display", "none",
		"-object", "iothread,id=io0", "-qmp", "unix:" + filepath.Join(t.TempDir(), "q") + ",server=on,wait=off"}, extra...)
	cmd := exec.Command(bin, args...)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		if ps, err := cmd.Process.Wait(); err != nil || ps.String() != "signal: killed" {
			t.Errorf("QEMU ended by itself: %v, %v", ps, err)
		}
	})
	// All its threads are there when the vCPU is.
	deadline := time.Now().Add(10 * time.Second)
	for {
		list, _ := listThreads(cmd.Process.Pid)
		if slices.ContainsFunc(list, func(th thread) bool { return strings.HasPrefix(th.comm, "CPU 0") }) {
			return cmd.Process.Pid
		}
		if time.Now().After(deadline) {
			t.Fatalf("QEMU has no vCPU thread: %v", list)
		}
		unix.Poll(nil, 5)
	}
}

var sandbox = []string{"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"}

// TestQEMU takes descriptors out of a sandboxed QEMU, in a thread that is no vCPU,
// and reports how long that thread was held.
func TestQEMU(t *testing.T) {
	pid := startQEMU(t, sandbox...)
	list, err := listThreads(pid)
	if err != nil {
		t.Fatal(err)
	}
	var held []time.Duration
	mains := 0 // it serves the guest's devices: taken where no other would do at the moment
	for range 100 {
		var tr Trace
		f, _, err := Userfaultfd(withTimeout(t), pid, Options{Trace: &tr})
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
		held = append(held, tr.Stopped)
		if th, err := readThread(pid, tr.TID); err != nil || strings.HasPrefix(th.comm, "CPU ") {
			t.Errorf("borrowed thread %+v, %v of %+v", th, err, list)
		}
		if tr.TID == pid {
			mains++
		}
	}
	if mains > 5 {
		t.Errorf("the main thread was borrowed %d times of 100, of %+v", mains, list)
	}
	slices.Sort(held)
	t.Logf("thread held: p50 %v, p99 %v, max %v", held[len(held)/2], held[len(held)*99/100], held[len(held)-1])
	if held[len(held)/2] > 3*time.Millisecond {
		t.Errorf("thread held for %v (median)", held[len(held)/2])
	}
	if left, err := FindLeftovers(pid); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// TestQEMUTracerDies kills the tracer at every stop in the main thread and in the
// vCPU thread of a sandboxed QEMU, which goes on answering.
func TestQEMUTracerDies(t *testing.T) {
	pid := startQEMU(t, sandbox...)
	list, err := listThreads(pid)
	if err != nil {
		t.Fatal(err)
	}
	for _, th := range list {
		out, _ := runTracer(t, "device", pid, th.tid, "list")
		for _, stop := range strings.Fields(out) {
			if _, killed := runTracer(t, "device", pid, th.tid, stop); !killed {
				t.Errorf("%s: no stop %q", th.comm, stop)
			}
			left, err := FindLeftovers(pid)
			if err != nil {
				t.Fatalf("%s at %s: %v", th.comm, stop, err)
			}
			for _, l := range left {
				if err := CloseFD(withTimeout(t), pid, l.FD); err != nil {
					t.Fatalf("%s at %s: close %+v: %v", th.comm, stop, l, err)
				}
			}
		}
	}
	if now, err := listThreads(pid); err != nil || len(now) != len(list) {
		t.Errorf("threads %+v, %v; were %+v", now, err, list)
	}
}
