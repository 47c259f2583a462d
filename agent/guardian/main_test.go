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
	"github.com/ckagent/ckagent/agent/vm"
	"github.com/ckagent/ckagent/agent/vm/inject"
	"github.com/ckagent/ckagent/uffd"
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

// playServer is a fault server that serves nothing: it arms all guest RAM when
// told to on stdin ("arm"), leaves beats, and lets go when its stdin ends.
func playServer(qemu, control string) error {
	pid, _ := strconv.Atoi(qemu)
	f, err := os.OpenFile("/proc/self/fd/3", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	c, err := OpenControl(f)
	if err != nil {
		return err
	}
	c.BeatServer() // before the first, nobody watches for more
	go func() {
		for range time.Tick(20 * time.Millisecond) {
			c.BeatServer()
		}
	}()
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch in.Text() {
		case "arm":
			if err := armRAM(pid); err != nil {
				return err
			}
			fmt.Println("armed")
		}
	}
	return nil
}

var armedHandle *uffd.Handle // kept until the process ends

func armRAM(pid int) error {
	f, _, err := inject.Userfaultfd(context.Background(), pid, inject.Options{})
	if err != nil {
		return err
	}
	h, err := uffd.Adopt(f, uffd.FeaturePagefaultFlagWP)
	if err != nil {
		return err
	}
	armedHandle = h
	p, err := vm.OpenProcess(pid)
	if err != nil {
		return err
	}
	defer p.Close()
	vmas, err := p.ReadSmaps()
	if err != nil {
		return err
	}
	for _, v := range vmas {
		if v.Is("dc") && v.Bytes() == guestRAM {
			if _, err := h.Register(v.Start, v.Bytes(), uffd.ModeWP); err != nil {
				return err
			}
			return h.WriteProtect(v.Start, v.Bytes())
		}
	}
	return fmt.Errorf("no guest RAM found in %d mappings", len(vmas))
}

const guestRAM = 64 << 20

// playAgent brings itself to a phase of a checkpoint, says so, and stays there,
// leaving beats, until its stdin ends; then it goes on in order.
func playAgent(qemu, socket, phase string) error {
	ctx := context.Background()
	pid, _ := strconv.Atoi(qemu)
	p, err := vm.OpenProcess(pid)
	if err != nil {
		return err
	}
	ep, err := qmp.ParseEndpoint(socket)
	if err != nil {
		return err
	}
	client, err := qmp.Dial(ctx, ep)
	if err != nil {
		return err
	}
	dup, err := client.DupFile()
	if err != nil {
		return err
	}
	c, page, err := CreateControl()
	if err != nil {
		return err
	}
	// The page is passed on as descriptor 3 of the fault server.
	server := exec.Command("/proc/self/exe", roleServer, qemu, "3")
	server.ExtraFiles = []*os.File{page}
	server.Stderr = os.Stderr
	orders, _ := server.StdinPipe()
	answers, _ := server.StdoutPipe()
	if err := server.Start(); err != nil {
		return err
	}
	g, err := Start(ctx, Config{Control: page, QEMU: p, QMP: dup, Endpoint: ep, Stderr: os.Stderr,
		FaultServerPID: server.Process.Pid})
	if err != nil {
		return err
	}
	go func() {
		for range time.Tick(BeatEvery) {
			c.BeatAgent()
		}
	}()
	c.BeatAgent()
	steps := agentSteps(ctx, c, client, dup, pid, func() error {
		fmt.Fprintln(orders, "arm")
		if s, err := bufio.NewReader(answers).ReadString('\n'); err != nil {
			return fmt.Errorf("fault server: %q: %w", s, err)
		}
		return nil
	})
	if err := steps[phase](); err != nil {
		return fmt.Errorf("%s: %w", phase, err)
	}
	fmt.Printf("at %s guardian %d server %d\n", phase, g.PID(), server.Process.Pid)
	io.Copy(io.Discard, os.Stdin)
	orders.Close()
	server.Wait()
	return g.Stop(ctx)
}

// agentSteps maps a phase to what leads there from the start.
func agentSteps(ctx context.Context, c *Control, client *qmp.Client, dup *os.File, qemu int, arm func() error) map[string]func() error {
	raw := func(s string) error { _, err := dup.Write([]byte(s)); return err }
	engaged := func() error { c.Engaged.Store(1); return nil }
	stopped := func() error {
		engaged()
		c.Running.Store(1)
		c.Stopped.Store(1)
		return client.Execute(ctx, "stop", nil, nil)
	}
	then := func(first func() error, next func() error) func() error {
		return func() error {
			if err := first(); err != nil {
				return err
			}
			return next()
		}
	}
	return map[string]func() error{
		"idle":    func() error { return nil },
		"engaged": engaged,
		"half-stop": then(engaged, func() error {
			c.Running.Store(1)
			c.Stopped.Store(1)
			return raw(`{"execute":"st`)
		}),
		"stopped":   stopped,
		"armed":     then(stopped, arm),
		"half-cont": then(stopped, func() error { return raw(`{"execute":"cont","id":"ha`) }),
		"unread":    then(stopped, func() error { return raw(strings.Repeat(`{"execute":"query-qmp-schema"}`, 2)) }),
		"capturing": then(then(stopped, arm), func() error {
			if err := client.Execute(ctx, "cont", nil, nil); err != nil {
				return err
			}
			c.Stopped.Store(0)
			return nil
		}),
		"resumed": then(stopped, func() error {
			if err := client.Execute(ctx, "cont", nil, nil); err != nil {
				return err
			}
			c.Stopped.Store(0)
			return nil
		}),
		"sigstopped": then(stopped, func() error {
			c.SigStopped.Store(1)
			return unix.Kill(qemu, unix.SIGSTOP)
		}),
		"found-paused": func() error { // somebody else paused it before
			engaged()
			c.Running.Store(0)
			c.Stopped.Store(1)
			return client.Execute(ctx, "stop", nil, nil)
		},
	}
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
