package inject

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// roleEnv makes the test binary play a tracer that dies: see playTracer.
const roleEnv = "INJECT_TEST_TRACER"

var scratchDir string

func TestMain(m *testing.M) {
	if spec := os.Getenv(roleEnv); spec != "" {
		os.Exit(playTracer(spec))
	}
	os.Exit(func() int {
		dir, err := os.MkdirTemp("", "inject")
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
		defer os.RemoveAll(dir)
		scratchDir = dir
		code := m.Run()
		if code == 0 {
			if err := goleak.Find(goleak.IgnoreTopFunction("os/signal.signal_recv"),
				goleak.IgnoreTopFunction("os/signal.loop")); err != nil {
				fmt.Fprintln(os.Stderr, err)
				return 1
			}
		}
		return code
	}())
}

var (
	buildVictim = sync.OnceValues(func() (string, error) { return compile("victim") })
	buildStatic = sync.OnceValues(func() (string, error) { return compile("victim-static", "-static") })
)

func compile(name string, flags ...string) (string, error) {
	bin := filepath.Join(scratchDir, name)
	args := append([]string{"-O1", "-mavx2", "-mno-red-zone", "-Wall", "-Wextra", "-Werror", "-pthread",
		"-o", bin, "testdata/victim.c"}, flags...)
	out, err := exec.Command("gcc", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("gcc: %w: %s", err, out)
	}
	return bin, nil
}

// victim is a running testdata/victim.
type victim struct {
	t      testing.TB
	kind   string
	pid    int
	worker int
	in     io.WriteCloser
	out    *bufio.Reader

	baseline []string // its descriptors and what they are
}

func startVictim(t testing.TB, kind string, args ...string) *victim {
	t.Helper()
	return startBuilt(t, buildVictim, kind, args...)
}

func startBuilt(t testing.TB, build func() (string, error), kind string, args ...string) *victim {
	t.Helper()
	if _, err := exec.LookPath("gcc"); err != nil {
		t.Skip("no gcc to build the victim with")
	}
	if b, err := os.ReadFile("/proc/cpuinfo"); err == nil && !strings.Contains(string(b), " avx2 ") {
		t.Skip("this processor has no AVX2, which the victim checks")
	}
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(bin, append([]string{kind}, args...)...)
	cmd.Stderr = os.Stderr
	in, _ := cmd.StdinPipe()
	out, _ := cmd.StdoutPipe()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		in.Close()
		cmd.Process.Kill()
		cmd.Wait()
	})
	v := &victim{t: t, kind: kind, pid: cmd.Process.Pid, in: in, out: bufio.NewReader(out)}
	if _, err := fmt.Sscanf(v.line(), "worker %d", &v.worker); err != nil {
		t.Fatal(err)
	}
	v.progress(1) // what it opens by itself is open then
	v.baseline = entries(t, v.pid)
	return v
}

// entries lists the descriptors of a process as "number link".
func entries(t testing.TB, pid int) []string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range list {
		link, _ := os.Readlink(filepath.Join(dir, e.Name()))
		out = append(out, e.Name()+" "+link)
	}
	return out
}

func (v *victim) line() string {
	v.t.Helper()
	s, err := v.out.ReadString('\n')
	if err != nil {
		var ws unix.WaitStatus
		unix.Wait4(v.pid, &ws, unix.WNOHANG, nil)
		v.t.Fatalf("victim %s died: %v, status %#x", v.kind, err, uint32(ws))
	}
	return strings.TrimSpace(s)
}

// report is a victim's answer to "check".
type report struct{ rounds, sent, handled, eintr int }

// check asks how often the worker has checked itself; a failed check is fatal.
func (v *victim) check() (r report) {
	v.t.Helper()
	fmt.Fprintln(v.in, "check")
	l := v.line()
	if _, err := fmt.Sscanf(l, "rounds %d sent %d handled %d eintr %d", &r.rounds, &r.sent, &r.handled, &r.eintr); err != nil {
		v.t.Fatalf("victim %s: %s", v.kind, l)
	}
	return r
}

// progress makes the worker do n more rounds and check itself in each.
func (v *victim) progress(n int) {
	v.t.Helper()
	first := v.check()
	deadline := time.Now().Add(10 * time.Second)
	for {
		now := v.check()
		if now.rounds >= first.rounds+n && (v.kind != "signals" || now.handled > first.handled) {
			return
		}
		if time.Now().After(deadline) {
			v.t.Fatalf("victim %s makes no progress: %d rounds", v.kind, now.rounds-first.rounds)
		}
		v.poke()
		unix.Poll(nil, 1)
	}
}

func (v *victim) poke() {
	switch v.kind {
	case "read", "ppoll", "futex", "epoll":
		// One at a time: an eventfd adds up, and the worker expects 1.
		if v.asleep() {
			fmt.Fprintln(v.in, "poke")
			v.check() // the poke has been obeyed
		}
	}
}

// asleep: the worker sleeps in its call, and not in the rest of one that was
// interrupted already: what that one was is known to the kernel alone.
func (v *victim) asleep() bool {
	th, err := readThread(v.pid, v.worker)
	return err == nil && th.state == 'S' && th.nr >= 0 && th.nr != unix.SYS_RESTART_SYSCALL
}

func (v *victim) waitAsleep() {
	v.t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for !v.asleep() {
		if time.Now().After(deadline) {
			v.t.Fatalf("victim %s does not sleep", v.kind)
		}
		unix.Poll(nil, 1)
	}
}

func (v *victim) left() []Leftover {
	v.t.Helper()
	left, err := FindLeftovers(v.pid)
	if err != nil {
		v.t.Fatal(err)
	}
	return left
}

// leftAtHome is what is left as soon as the worker is said to be home.
func (v *victim) leftAtHome() []Leftover {
	v.t.Helper()
	deadline := time.Now().Add(5 * time.Second)
	for !Home(v.pid, v.worker) {
		if time.Now().After(deadline) {
			v.t.Fatalf("victim %s does not come home", v.kind)
		}
	}
	return v.left()
}

func (v *victim) sleeps() bool { return v.kind != "spin" && v.kind != "signals" }

// untraced checks that nothing of a tracer is left.
func (v *victim) untraced() {
	v.t.Helper()
	if pid, comm := findTracer(v.pid); pid != 0 {
		v.t.Fatalf("victim %s is traced by %d (%s)", v.kind, pid, comm)
	}
}

var kinds = []string{"read", "nanosleep", "nanosleep-same", "ppoll", "ppoll-timeout", "futex", "epoll", "spin", "signals"}

// playTracer runs one session in the process given by spec, "verb pid tid stop":
// it kills itself at the named stop ("" lives on; "list" prints all the stops).
func playTracer(spec string) int {
	f := strings.Split(spec, " ")
	verb, stop := f[0], f[3]
	pid, _ := strconv.Atoi(f[1])
	tid, _ := strconv.Atoi(f[2])
	seen := map[string]int{}
	TestHook = func(name string) {
		seen[name]++
		if seen[name] > 1 {
			name += "#" + strconv.Itoa(seen[name])
		}
		if stop == "list" {
			fmt.Println(name)
		}
		if name == stop {
			unix.Kill(unix.Getpid(), unix.SIGKILL)
			select {}
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	f1, _, err := userfaultfd(ctx, pid, tid, Options{SyscallOnly: verb == "syscall", KeepInside: verb == "keep"})
	if err != nil {
		fmt.Println("error:", err)
		return 1
	}
	f1.Close()
	return 0
}

// runTracer runs playTracer in a child and returns what it printed.
func runTracer(t testing.TB, verb string, pid, tid int, stop string) (out string, killed bool) {
	t.Helper()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d %s", roleEnv, verb, pid, tid, stop))
	cmd.Stderr = os.Stderr
	b, err := cmd.Output()
	if err != nil {
		if ws, ok := cmd.ProcessState.Sys().(interface{ Signaled() bool }); ok && ws.Signaled() {
			return string(b), true
		}
		t.Fatalf("tracer %s at %q: %v: %s", verb, stop, err, b)
	}
	return string(b), false
}
