package guardian

import (
	"bufio"
	"context"
	"encoding/json"
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

	"github.com/ckagent/ckagent/agent/cgroup"

	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm/inject"
)

// The test binary also plays the other processes: guardian, agent, fault server.
const (
	roleAgent  = "play-agent"
	roleServer = "play-server"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		var err error
		switch os.Args[1] {
		case Verb:
			err = Main(context.Background(), os.Args[2:])
		case roleAgent:
			err = playAgent(os.Args[2], os.Args[3], os.Args[4])
		case roleServer:
			err = playServer(os.Args[2], os.Args[3])
		default:
			os.Exit(runTests(m))
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, os.Args[1], err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(runTests(m))
}

func runTests(m *testing.M) int {
	dir, err := os.MkdirTemp("", "guardian")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	stateDir = filepath.Join(dir, "run")
	os.Setenv("CKAGENT_RUN_DIR", stateDir)
	code := m.Run()
	if code == 0 {
		if err := goleak.Find(goleak.IgnoreTopFunction("os/signal.signal_recv"),
			goleak.IgnoreTopFunction("os/signal.loop")); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return code
}

// qemu is a running QEMU whose guest is a BIOS that finds nothing to boot: its
// timer interrupt counts in guest memory.
type qemu struct {
	t       testing.TB
	pid     int
	cmd     *exec.Cmd
	dir     string
	agent   string // the monitor the agent uses
	manager *qmp.Client
}

func startQEMU(t testing.TB) *qemu {
	t.Helper()
	bin, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("qemu-system-x86_64 is not installed")
	}
	dir := t.TempDir()
	q := &qemu{t: t, dir: dir, agent: filepath.Join(dir, "agent.sock")}
	manager := filepath.Join(dir, "manager.sock")
	q.cmd = exec.Command(bin, "-accel", "tcg", "-machine", "pc", "-m", strconv.Itoa(guestRAM>>20), "-nodefaults",
		"-display", "none", "-qmp", "unix:"+q.agent+",server=on,wait=off", "-qmp", "unix:"+manager+",server=on,wait=off",
		"-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny")
	q.cmd.Stderr = os.Stderr
	if err := q.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	q.pid = q.cmd.Process.Pid
	t.Cleanup(func() {
		if q.manager != nil {
			q.manager.Close()
		}
		q.cmd.Process.Kill()
		q.cmd.Wait()
	})
	q.manager = dial(t, manager)
	q.waitTicks(2 * time.Second)
	return q
}

// dial connects as soon as the socket is there.
func dial(t testing.TB, path string) *qmp.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	ep, err := qmp.ParseEndpoint(path)
	if err != nil {
		t.Fatal(err)
	}
	for {
		c, err := qmp.Dial(ctx, ep)
		if err == nil {
			return c
		}
		if ctx.Err() != nil {
			t.Fatalf("connect to %s: %v", path, err)
		}
		unix.Poll(nil, 2)
	}
}

func (q *qemu) status() string {
	q.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	var st struct{ Status string }
	if err := q.manager.Execute(ctx, "query-status", nil, &st); err != nil {
		q.t.Fatal(err)
	}
	return st.Status
}

// ticks is the BIOS timer count, at 0x46c.
func (q *qemu) ticks() uint64 {
	q.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	s, err := q.manager.HMP(ctx, "xp /1wx 0x46c")
	if err != nil {
		q.t.Fatal(err)
	}
	_, hex, _ := strings.Cut(strings.TrimSpace(s), ": 0x")
	n, err := strconv.ParseUint(hex, 16, 64)
	if err != nil {
		q.t.Fatalf("xp: %q", s)
	}
	return n
}

// waitTicks waits until the guest counts on, and says how long that took.
func (q *qemu) waitTicks(limit time.Duration) time.Duration {
	q.t.Helper()
	began := time.Now()
	for first := q.ticks(); ; {
		if q.ticks() != first {
			return time.Since(began)
		}
		if time.Since(began) > limit {
			q.t.Fatalf("the guest does not run after %v: %s", limit, q.status())
		}
		unix.Poll(nil, 5)
	}
}

// agent is a child that plays one.
type agent struct {
	cmd              *exec.Cmd
	in               io.WriteCloser
	guardian, server int
	waited           sync.Once
}

func (q *qemu) startAgent(phase string, prepare func(pid int)) *agent {
	q.t.Helper()
	a := &agent{cmd: exec.Command("/proc/self/exe", roleAgent, strconv.Itoa(q.pid), q.agent, phase)}
	a.cmd.Stderr = os.Stderr
	in, _ := a.cmd.StdinPipe()
	out, _ := a.cmd.StdoutPipe()
	if err := a.cmd.Start(); err != nil {
		q.t.Fatal(err)
	}
	a.in = in
	q.t.Cleanup(func() { a.kill() })
	if prepare != nil {
		prepare(a.cmd.Process.Pid)
	}
	l, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		q.t.Fatalf("agent: %v", err)
	}
	if _, err := fmt.Sscanf(l, "at "+phase+" guardian %d server %d", &a.guardian, &a.server); err != nil {
		q.t.Fatalf("%q: %v", l, err)
	}
	return a
}

func (a *agent) kill() {
	a.cmd.Process.Kill()
	a.waited.Do(func() { a.in.Close(); a.cmd.Wait() })
}

// waitGone waits for the end of a process that is not our child.
func waitGone(t testing.TB, what string, pid int) {
	t.Helper()
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if !waitExit(fd, 10*time.Second) {
		t.Fatalf("%s (pid %d) is still there", what, pid)
	}
}

// report reads what the guardian left.
func (q *qemu) report() (r Report) {
	q.t.Helper()
	id, err := identify(q.pid)
	if err != nil {
		q.t.Fatal(err)
	}
	b, err := os.ReadFile(statePath(stateDir, id) + reportSuffix)
	if err != nil {
		q.t.Fatal(err)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		q.t.Fatal(err)
	}
	return r
}

// clean checks that nothing of ours is left in QEMU or on the host.
func (q *qemu) clean() {
	q.t.Helper()
	k, err := armed(q.pid)
	if err != nil || k != (armedKinds{}) {
		q.t.Fatalf("still armed: %+v, %v", k, err)
	}
	if fds, err := inject.FindLeftovers(q.pid); err != nil || len(fds) != 0 {
		q.t.Fatalf("descriptors left: %v, %v", fds, err)
	}
	if err := inject.CanTrace(q.pid); err != nil {
		q.t.Fatal(err)
	}
	id, _ := identify(q.pid)
	for _, suffix := range []string{stateSuffix, controlSuffix} {
		if _, err := os.Stat(statePath(stateDir, id) + suffix); err == nil {
			q.t.Fatalf("state file %s is left", suffix)
		}
	}
	for _, dir := range cgroup.Dirs(groupName(id)) {
		if exists(dir) {
			q.t.Fatalf("cgroup %s is left", dir)
		}
	}
	// The agent's monitor is free again.
	dial(q.t, q.agent).Close()
}

func exists(path string) bool { _, err := os.Stat(path); return err == nil }
