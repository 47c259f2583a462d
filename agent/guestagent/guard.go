package guestagent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/cgroup"
	"github.com/ckagent/ckagent/agent/problem"
)

// GuardVerb is the hidden command under which the binary calls GuardMain.
const GuardVerb = "__thaw"

// GuardConfig is what a guard is started with.
type GuardConfig struct {
	Helper  []string      // command line of our binary; the verb is appended
	Agent   *Client       // the connection it shares
	QEMUPID int           // names its control group
	Within  time.Duration // after which it thaws by itself
}

// Guard is the freezing side of a guard.
type Guard struct {
	link *net.UnixConn
	cmd  *exec.Cmd
	pid  int
}

const (
	guardPatience = 5 * time.Second // for its start, and its end once released
	thawPatience  = 5 * time.Second // for the guest's answer to the guard's thaw

	guardAgentFD = 3
	guardLinkFD  = 4
)

// StartGuard returns when the guard watches. Whoever started it calls Release.
func StartGuard(cfg GuardConfig) (*Guard, error) {
	object := fmt.Sprintf("for pid %d", cfg.QEMUPID)
	fail := func(err error) (*Guard, error) {
		return nil, problem.New(problem.Failed, "start thaw guard", object, "%w", err).
			WithHint("without one no guest is frozen; nothing was touched")
	}
	agent, err := cfg.Agent.File()
	if err != nil {
		return fail(err)
	}
	defer agent.Close()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "link"), os.NewFile(uintptr(fds[1]), "link")
	defer theirs.Close() // or the end of the guard would not be seen
	conn, err := net.FileConn(ours)
	ours.Close()
	if err != nil {
		return fail(err)
	}
	g := &Guard{link: conn.(*net.UnixConn)} // a unix socket makes a UnixConn
	args := append(append([]string(nil), cfg.Helper[1:]...), GuardVerb, cfg.Within.String(), fmt.Sprint(cfg.QEMUPID))
	g.cmd = exec.Command(cfg.Helper[0], args...)
	g.cmd.Dir, g.cmd.Stderr = "/", os.Stderr
	g.cmd.ExtraFiles = []*os.File{agent, theirs}
	g.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := g.cmd.Start(); err != nil {
		return fail(errors.Join(err, g.link.Close()))
	}
	g.pid = g.cmd.Process.Pid
	_ = g.link.SetReadDeadline(time.Now().Add(guardPatience))
	if _, err := io.ReadFull(g.link, make([]byte, 1)); err != nil {
		_ = g.cmd.Process.Kill() // it has done nothing yet
		return fail(errors.Join(err, g.link.Close(), g.reap()))
	}
	return g, nil
}

// PID is the guard's process id.
func (g *Guard) PID() int { return g.pid }

// Release ends the guard. thawed says that nothing is frozen any more; otherwise it
// thaws before it ends.
func (g *Guard) Release(thawed bool) error {
	var errs []error
	if thawed {
		if _, err := g.link.Write([]byte{1}); err != nil && !errors.Is(err, unix.EPIPE) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, g.link.Close(), g.reap())...)
}

// reap waits for the guard, which is bound to end soon.
func (g *Guard) reap() error {
	kill := time.AfterFunc(guardPatience+thawPatience, func() { _ = g.cmd.Process.Kill() })
	defer kill.Stop()
	err := g.cmd.Wait()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() > 0 {
		return problem.New(problem.Failed, "thaw", fmt.Sprintf("guard with pid %d", g.pid), "%w", err)
	}
	if err != nil {
		return problem.New(problem.Failed, "end thaw guard", fmt.Sprintf("pid %d", g.pid), "%w", err)
	}
	return nil
}

// GuardMain is the guard: the hidden verb of the binary.
func GuardMain(ctx context.Context, args []string) error {
	// What ends the agent's terminal or service must not end this.
	signal.Ignore(unix.SIGHUP, unix.SIGINT, unix.SIGTERM, unix.SIGPIPE, unix.SIGQUIT)
	if len(args) != 2 {
		return problem.New(problem.Usage, GuardVerb, "", "want a duration and a pid")
	}
	within, err := time.ParseDuration(args[0])
	if err != nil {
		return problem.New(problem.Usage, GuardVerb, args[0], "%w", err)
	}
	unix.CloseOnExec(guardAgentFD)
	unix.CloseOnExec(guardLinkFD)
	name := fmt.Sprintf("thaw-%s-%d", args[1], os.Getpid())
	group := cgroup.Join(name)
	defer group.Leave()
	agent, err := inherited(guardAgentFD)
	if err != nil {
		return err
	}
	defer agent.Close()
	link, err := inherited(guardLinkFD)
	if err != nil {
		return err
	}
	defer link.Close()
	if _, err := link.Write([]byte{1}); err != nil {
		return fmt.Errorf("thaw guard: %w", err)
	}
	if err := link.SetReadDeadline(time.Now().Add(within)); err != nil {
		return fmt.Errorf("thaw guard: %w", err)
	}
	if n, _ := link.Read(make([]byte, 1)); n == 1 {
		return nil // released
	}
	ctx, cancel := context.WithTimeout(ctx, thawPatience)
	defer cancel()
	c := newClient(agent, "guest agent")
	// The connection may stand in the middle of a command or a reply.
	if err := c.sync(ctx); err != nil {
		return err
	}
	_, err = c.Thaw(ctx)
	return err
}

func inherited(fd uintptr) (net.Conn, error) {
	f := os.NewFile(fd, "inherited")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("thaw guard: descriptor %d: %w", fd, err)
	}
	return c, nil
}
