package vm

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
	"github.com/ckagent/ckagent/agent/vm/inject"
)

func TestOpenProcessRefusesWhatIsNotQEMU(t *testing.T) {
	if _, err := OpenProcess(os.Getpid()); !problem.Is(err, problem.Refused) {
		t.Errorf("this test process: got %v, want refused", err)
	}
	for _, pid := range []int{0, -1, 1 << 30} {
		if _, err := OpenProcess(pid); !problem.Is(err, problem.NotFound) {
			t.Errorf("pid %d: got %v, want not found", pid, err)
		}
	}
}

func TestOpenProcessRefusesThreadIDs(t *testing.T) {
	p, err := openAny(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	tids, err := p.Threads()
	if err != nil {
		t.Fatal(err)
	}
	for _, tid := range tids {
		if tid == p.PID {
			continue
		}
		if _, err := openAny(tid); !problem.Is(err, problem.NotFound) {
			t.Errorf("thread %d: got %v, want not found", tid, err)
		}
		return
	}
	t.Fatal("a Go test binary with a single thread")
}

func TestProcessIdentity(t *testing.T) {
	p, err := openAny(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	exe, _ := os.Executable()
	wd, _ := os.Getwd()
	var lim unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &lim); err != nil {
		t.Fatal(err)
	}
	// Go raises the soft limit of its own process; /proc shows the raised one.
	if got := p.Limits["Max open files"]; got.Hard != lim.Max {
		t.Errorf("hard limit of open files %d, want %d", got.Hard, lim.Max)
	}
	if p.Exe != exe || p.Cwd != wd || p.Root != "/" || p.UID != os.Geteuid() || p.GID != os.Getegid() {
		t.Errorf("identity %+v", p)
	}
	if len(p.Argv) != len(os.Args) || p.Argv[0] != os.Args[0] {
		t.Errorf("argv %q, want %q", p.Argv, os.Args)
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/net", &st); err != nil {
		t.Fatal(err)
	}
	if p.Namespaces["net"] != st.Ino {
		t.Errorf("network namespace %d, want %d", p.Namespaces["net"], st.Ino)
	}
	if len(p.Cgroups) == 0 {
		t.Error("no cgroup")
	}
	if tracer, err := p.Tracer(); err != nil || tracer != 0 {
		t.Errorf("tracer %d, %v", tracer, err)
	}
}

// sleeper starts a child that lives until its stdin is closed.
func sleeper(t *testing.T) (*exec.Cmd, func()) {
	t.Helper()
	cmd := exec.Command("cat")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	end := func() { in.Close(); _ = cmd.Wait() }
	t.Cleanup(end)
	return cmd, end
}

func TestProcessExitIsSeen(t *testing.T) {
	cmd, end := sleeper(t)
	p, err := openAny(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if !p.Alive() || p.Check() != nil {
		t.Fatal("a running process counts as gone")
	}
	select {
	case <-p.Done():
		t.Fatal("Done before the exit")
	default:
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := p.Wait(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Wait on a running process: %v", err)
	}
	waited := make(chan error, 1)
	go func() { waited <- p.Wait(t.Context()) }()
	end()
	if err := <-waited; err != nil {
		t.Errorf("Wait: %v", err)
	}
	<-p.Done()
	if p.Alive() || !problem.Is(p.Check(), problem.NotFound) {
		t.Error("an exited process counts as alive")
	}
	if _, err := p.ReadMaps(); err == nil {
		t.Error("maps of a process that is gone")
	}
}

func TestZombieIsNotFound(t *testing.T) {
	cmd := exec.Command("true")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000); err != nil {
		t.Fatal(err)
	}
	if _, err := openAny(cmd.Process.Pid); !problem.Is(err, problem.NotFound) {
		t.Errorf("zombie: %v", err)
	}
}

// Between its last instruction and its end a process has no program any more, and its
// pidfd does not tell yet. A process whose first thread has ended stays like that.
func TestExitingIsNotFound(t *testing.T) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), headless+"=1")
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = in.Close() // it ends
		_ = cmd.Wait() // as it may
	}()
	waitFor(t, func() bool {
		s, err := procstat.Read(cmd.Process.Pid)
		return err == nil && s.Ended()
	})
	fd, err := unix.PidfdOpen(cmd.Process.Pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if readable(fd) {
		t.Fatal("the process has ended as a whole: this test shows nothing")
	}
	for name, open := range map[string]func(int) (*Process, error){"openAny": openAny, "OpenProcess": OpenProcess} {
		if _, err := open(cmd.Process.Pid); !problem.Is(err, problem.NotFound) {
			t.Errorf("%s: %v, want not found", name, err)
		}
	}
	if err := inject.CanTrace(cmd.Process.Pid); !problem.Is(err, problem.NotFound) {
		t.Errorf("CanTrace: %v, want not found", err)
	}
}

func TestOpenProcessAsRefusesARecycledPid(t *testing.T) {
	// A recycled pid is a process with another start time; the number cannot be
	// made to come round in a test, so the recorded start time is moved instead.
	cmd, _ := sleeper(t)
	p, err := openAny(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	if _, err := openAs(cmd.Process.Pid, p.StartTicks, openAny); err != nil {
		t.Errorf("same process: %v", err)
	}
	if _, err := openAs(cmd.Process.Pid, p.StartTicks-1, openAny); !problem.Is(err, problem.NotFound) {
		t.Errorf("other start time: %v", err)
	}
}

func TestCloseJoinsTheWatcher(t *testing.T) {
	cmd, _ := sleeper(t)
	p, err := openAny(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	done := p.Done()
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	select {
	case <-done:
		t.Error("Done closed although the process lives")
	default:
	}
	if err := cmd.Process.Signal(unix.Signal(0)); err != nil {
		t.Errorf("the process was harmed: %v", err)
	}
}

func TestAllowedBinary(t *testing.T) {
	for path, want := range map[string]bool{
		"/usr/bin/qemu-system-x86_64":                       true,
		"/usr/libexec/qemu-kvm":                             true,
		"/usr/bin/kvm":                                      true,
		"/nix/store/x-qemu/bin/.qemu-system-x86_64-wrapped": true,
		"/usr/bin/qemu-img":                                 false,
		"/usr/bin/qemu-system-aarch64":                      false,
		"/tmp/qemu-system-x86_64/sh":                        false,
		"":                                                  false,
	} {
		if got := AllowedBinary(path); got != want {
			t.Errorf("AllowedBinary(%q) = %v", path, got)
		}
	}
}

func TestParseCmdlineKeepsEmptyArguments(t *testing.T) {
	got := parseCmdline([]byte("qemu\x00-append\x00\x00-S\x00"))
	if len(got) != 4 || got[2] != "" || got[3] != "-S" {
		t.Errorf("got %q", got)
	}
	if parseCmdline(nil) != nil {
		t.Error("no bytes make no arguments")
	}
}

func FuzzProcfs(f *testing.F) {
	for _, name := range []string{"status", "cgroup", "limits"} {
		if b, err := os.ReadFile("/proc/self/" + name); err == nil {
			f.Add(b)
		}
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseStatus(b); err == nil && (s.uid < 0 || s.gid < 0) {
			t.Error("a status without ids")
		}
		_, _ = parseCgroups(b)
		_, _ = parseLimits(b)
		_ = parseCmdline(b)
	})
}

func TestLockIsExclusive(t *testing.T) {
	dir := t.TempDir()
	a, err := lockIn(t.Context(), dir, 1234, 99)
	if err != nil {
		t.Fatal(err)
	}
	_, err = lockIn(t.Context(), dir, 1234, 99)
	if !problem.Is(err, problem.Busy) {
		t.Fatalf("second lock: %v", err)
	}
	if want := "pid " + strconv.Itoa(os.Getpid()); !contains(err.Error(), want) {
		t.Errorf("%q does not name the holder (%s)", err, want)
	}
	b, err := lockIn(t.Context(), dir, 1234, 100)
	if err != nil {
		t.Fatalf("another process of that pid: %v", err)
	}
	if err := errors.Join(a.Close(), b.Close(), a.Close()); err != nil {
		t.Fatal(err)
	}
	names, _ := os.ReadDir(dir)
	if len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
	c, err := lockIn(t.Context(), dir, 1234, 99)
	if err != nil {
		t.Fatalf("lock after release: %v", err)
	}
	c.Close()
}

// TestLockOutlivesItsHolder: who inherited the lock of a holder that was killed is
// waited for, but not for ever.
func TestLockOutlivesItsHolder(t *testing.T) {
	dir := t.TempDir()
	l, err := lockIn(t.Context(), dir, 7, 7)
	if err != nil {
		t.Fatal(err)
	}
	heir := exec.Command("sleep", "1000")
	heir.ExtraFiles = []*os.File{l.File()}
	if err := heir.Start(); err != nil {
		t.Fatal(err)
	}
	defer heir.Wait()
	defer heir.Process.Kill()
	late, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lockIn(late, dir, 7, 7); !problem.Is(err, problem.Busy) || contains(err.Error(), "dead") {
		t.Errorf("a holder that lives: %v", err)
	}
	// As a kill leaves it: the file is there, and says who it was.
	if _, err := l.file.WriteAt([]byte("pid 4194305 (ckagent)\n"), 0); err != nil {
		t.Fatal(err)
	}
	l.file.Close()
	late, cancel = context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := lockIn(late, dir, 7, 7); !problem.Is(err, problem.Busy) || !contains(err.Error(), "dead") {
		t.Errorf("an heir that lives: %v", err)
	}
	timer := time.AfterFunc(100*time.Millisecond, func() { _ = heir.Process.Kill() })
	defer timer.Stop()
	mine, err := lockIn(t.Context(), dir, 7, 7)
	if err != nil {
		t.Fatalf("after the heir's end: %v", err)
	}
	if err := mine.Close(); err != nil {
		t.Error(err)
	}
}

// TestLockHandover has many goroutines take and give one lock: never two holders.
func TestLockHandover(t *testing.T) {
	dir := t.TempDir()
	held := make(chan struct{}, 1)
	errs := make(chan error, 8)
	for range 8 {
		go func() {
			for n := 0; n < 50; {
				l, err := lockIn(t.Context(), dir, 1, 1)
				if problem.Is(err, problem.Busy) {
					continue
				}
				if err != nil {
					errs <- err
					return
				}
				select {
				case held <- struct{}{}:
				default:
					errs <- errors.New("two holders")
					return
				}
				<-held
				if err := l.Close(); err != nil {
					errs <- err
					return
				}
				n++
			}
			errs <- nil
		}()
	}
	for range 8 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
}
