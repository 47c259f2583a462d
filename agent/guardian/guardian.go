package guardian

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"

	"github.com/ckagent/ckagent/agent/passfd"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
	"github.com/ckagent/ckagent/agent/vm"
)

// Verb is the hidden command under which the binary calls Main.
const Verb = "__guardian"

const (
	// DefaultServerStall is what a fault server may be without beat.
	DefaultServerStall = 300 * time.Millisecond
	// DefaultServerGrace is what a fault server has to leave by itself after the
	// agent's death.
	DefaultServerGrace = 100 * time.Millisecond

	startPatience = 5 * time.Second
	stopPatience  = 2 * time.Second
)

// Config is what a guardian is started with. It inherits duplicates of the files;
// they stay the caller's.
type Config struct {
	Self           string        // our binary; "" is the running one
	Args           []string      // its arguments; nil is {Verb}
	Env            []string      // added to the environment
	Stderr         *os.File      // nil is /dev/null
	Control        *os.File      // of CreateControl
	AgentPID       int           // 0 is the calling process
	QEMU           *vm.Process   // the VM
	QMP            *os.File      // duplicate of the agent's QMP socket (qmp.Client.DupFile); may be nil
	Endpoint       qmp.Endpoint  // where to reconnect should that socket be lost; zero is nowhere
	Lock           *os.File      // of the VM: nobody else works on it before the guardian has ended; may be nil
	FaultServerPID int           // 0 if there is none
	ServerStall    time.Duration // 0 is DefaultServerStall; must exceed the longest arm
	ServerGrace    time.Duration // 0 is DefaultServerGrace
}

// Guardian is the agent's side of a running guardian. All methods may be called
// from any goroutine.
type Guardian struct {
	pid     int
	qemu    identity
	link    *net.UnixConn
	control *Control
	cmd     *exec.Cmd

	stop sync.Once
	err  error
	done chan struct{} // closed when the process was reaped; exit is set before
	exit error
}

// Descriptors the child inherits, from 3 on.
const (
	linkFD = 3 + iota
	controlFD
	agentFD
	qemuFD
	serverFD
	qmpFD
	lockFD // only held
)

// setup is what the child is told over the link.
type setup struct {
	StateDir    string       `json:"state_dir"`
	QEMU        identity     `json:"qemu"`
	Agent       identity     `json:"agent"`
	Server      identity     `json:"server"` // PID 0: there is none
	HaveQMP     bool         `json:"have_qmp"`
	Endpoint    qmp.Endpoint `json:"endpoint"`
	ServerStall int64        `json:"server_stall_ns"`
	ServerGrace int64        `json:"server_grace_ns"`
}

// ready is the child's answer.
type ready struct {
	Error string `json:"error,omitempty"`
}

func failed(qemu int, format string, args ...any) error {
	return problem.New(problem.Failed, "start guardian", fmt.Sprintf("for pid %d", qemu), format, args...).
		WithHint("without a guardian no VM is stopped; nothing was touched")
}

// Start starts the guardian and returns when it watches. The fault server must
// not have armed anything, nor anything been injected into QEMU, before.
func Start(ctx context.Context, cfg Config) (*Guardian, error) {
	qemu := identity{cfg.QEMU.PID, cfg.QEMU.StartTicks}
	fail := func(err error) (*Guardian, error) { return nil, failed(qemu.PID, "%w", err) }
	s := setup{StateDir: stateDir, QEMU: qemu, HaveQMP: cfg.QMP != nil, Endpoint: cfg.Endpoint,
		ServerStall: int64(cfg.ServerStall), ServerGrace: int64(cfg.ServerGrace)}
	if s.ServerStall == 0 {
		s.ServerStall = int64(DefaultServerStall)
	}
	if s.ServerGrace == 0 {
		s.ServerGrace = int64(DefaultServerGrace)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return fail(err)
	}
	defer null.Close()
	agentPID := cfg.AgentPID
	if agentPID == 0 {
		agentPID = os.Getpid()
	}
	agent, id, err := openPID(agentPID)
	if err != nil {
		return fail(fmt.Errorf("agent: %w", err))
	}
	defer agent.Close()
	s.Agent = id
	server, socket, lock := null, null, null
	if cfg.FaultServerPID != 0 {
		if server, s.Server, err = openPID(cfg.FaultServerPID); err != nil {
			return fail(fmt.Errorf("fault server: %w", err))
		}
		defer server.Close()
	}
	if cfg.QMP != nil {
		socket = cfg.QMP
	}
	if cfg.Lock != nil {
		lock = cfg.Lock
	}
	ours, theirs, err := passfd.Pair("link")
	if err != nil {
		return fail(err)
	}
	control, err := OpenControl(cfg.Control)
	if err != nil {
		ours.Close()
		theirs.Close()
		return fail(err)
	}
	g := &Guardian{qemu: qemu, link: ours, control: control, done: make(chan struct{})}
	g.cmd = command(cfg)
	g.cmd.ExtraFiles = []*os.File{theirs, cfg.Control, agent, cfg.QEMU.PidFD(), server, socket, lock}
	err = g.cmd.Start()
	theirs.Close() // or its end would not be seen
	if err != nil {
		ours.Close()
		control.Close()
		return fail(err)
	}
	g.pid = g.cmd.Process.Pid
	go g.wait() // joined by Stop
	if err := g.handshake(ctx, s); err != nil {
		return fail(errors.Join(err, g.end(true)))
	}
	return g, nil
}

func command(cfg Config) *exec.Cmd {
	self, args := cfg.Self, cfg.Args
	if self == "" {
		self = "/proc/self/exe"
	}
	if args == nil {
		args = []string{Verb}
	}
	cmd := exec.Command(self, args...)
	cmd.Env = append(os.Environ(), cfg.Env...)
	cmd.Dir = "/"
	if cfg.Stderr != nil {
		cmd.Stderr = cfg.Stderr
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	return cmd
}

func openPID(pid int) (*os.File, identity, error) {
	id, err := identify(pid)
	if err != nil {
		return nil, id, err
	}
	f, err := id.open()
	return f, id, err
}

func (g *Guardian) handshake(ctx context.Context, s setup) error {
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = g.link.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	b, err := json.Marshal(s)
	if err != nil {
		return err
	}
	buf, n := make([]byte, 64<<10), 0
	if _, err = g.link.Write(b); err == nil {
		n, err = g.link.Read(buf)
	}
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("it does not answer: %w", context.Cause(ctx))
	case err != nil || n == 0:
		return fmt.Errorf("it ended before it was ready: %w", errors.Join(err, unix.ECHILD))
	}
	var r ready
	if err := json.Unmarshal(buf[:n], &r); err != nil {
		return err
	}
	if r.Error != "" {
		return errors.New(r.Error)
	}
	return nil
}

func (g *Guardian) wait() {
	g.exit = g.cmd.Wait()
	close(g.done)
}

// PID is the guardian's process id.
func (g *Guardian) PID() int { return g.pid }

// Done is closed when the guardian has ended, for whatever reason. An agent that
// did not call Stop must then abort what it is doing.
func (g *Guardian) Done() <-chan struct{} { return g.done }

// Check is nil while the guardian lives and runs. An agent calls it before it
// stops the VM, and regularly while it is engaged.
func (g *Guardian) Check() error {
	object := fmt.Sprintf("pid %d", g.pid)
	select {
	case <-g.done:
		return problem.New(problem.Failed, "check guardian", object, "it ended: %w",
			errors.Join(g.exit, unix.ECHILD)).WithHint("somebody killed it; the checkpoint is given up")
	default:
	}
	if age := time.Duration(Now() - g.control.GuardianBeatNS.Load()); age > GuardianSilence {
		return problem.New(problem.Failed, "check guardian", object, "no sign of life for %v",
			age.Round(time.Millisecond)).WithHint("it was stopped, or the host is overloaded; the checkpoint is given up")
	}
	return nil
}

// Stop ends the guardian in order and reaps it; it may be called again. After it
// nobody watches: nothing may be armed. If the control page says that the VM was
// stopped and is not known to run, the guardian is not ended but left to resume it
// when that can be done, and Stop says so.
func (g *Guardian) Stop(ctx context.Context) error {
	g.stop.Do(func() {
		g.control.QuitRequested.Store(1)
		g.link.Close() // wakes it
		if g.control.left() && g.qemu.alive() {
			g.err = g.leave()
			return
		}
		ctx, cancel := context.WithTimeout(ctx, stopPatience)
		defer cancel()
		forced := false
		select {
		case <-g.done:
		case <-ctx.Done():
			forced = true
		}
		g.err = g.end(forced)
	})
	return g.err
}

// leave lets the guardian go on alone. It ends when the VM runs or has ended.
func (g *Guardian) leave() error {
	p := problem.New(problem.Failed, "resume", fmt.Sprintf("pid %d", g.qemu.PID), "the VM was stopped and does not answer; its guardian with pid %d goes on trying", g.pid).
		WithHint("ckagent release %d, or cont in QEMU's monitor", g.qemu.PID)
	select {
	case <-g.done:
		p = problem.New(problem.Failed, "resume", fmt.Sprintf("pid %d", g.qemu.PID), "the VM was stopped and does not answer, and its guardian has ended").
			WithHint("ckagent release %d, or cont in QEMU's monitor", g.qemu.PID)
	default:
	}
	return errors.Join(p, g.control.Close())
}

// end reaps the child and removes what a killed one leaves.
func (g *Guardian) end(force bool) error {
	if force {
		// A guardian frozen in its cgroup dies when that one goes: see end.
		_ = g.cmd.Process.Kill()
	}
	<-g.done
	_ = g.link.Close() // may be closed already
	cgroup.Remove(groupName(g.qemu))
	removeState(stateDir, g.qemu)
	err := g.control.Close()
	if force {
		return errors.Join(err, problem.New(problem.Failed, "stop guardian", fmt.Sprintf("pid %d", g.pid), "it had to be killed"))
	}
	if g.exit != nil {
		return errors.Join(err, problem.New(problem.Failed, "stop guardian", fmt.Sprintf("pid %d", g.pid), "%w", g.exit))
	}
	return err
}
