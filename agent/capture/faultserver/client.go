package faultserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/cgroup"
)

// Start says how to start a fault server.
type Start struct {
	Self    string   // our own binary
	Args    []string // its arguments that lead to Main
	Control *os.File // the control page
	Config  Config
	// Kept, with Config.Kept, is the userfaultfd under which the marks were left.
	Kept *os.File
	// Ring sizes in pages: one for each fault thread, then one for each scanner.
	FaultRingPages, ScanRingPages int
}

// Client is the agent's end of a fault server. Its methods are called by one
// goroutine at a time.
type Client struct {
	cmd   *exec.Cmd
	cfg   Config
	conn  *net.UnixConn
	arena *arena.Arena
	buf   []byte
	stats Stats
	fd    int  // of the userfaultfd in the server
	over  bool // the server has replied for the last time

	freezeWithin time.Duration
}

// startPatience is for a server to be ready: it makes its arena present first.
const startPatience = 15 * time.Second

// freezePatience is for RAM to be frozen, which takes milliseconds. The server's sign
// of life comes from a thread of its own, so nothing else notices one that hangs over
// this command, and the guest stands still.
const freezePatience = 5 * time.Second

// New starts a fault server. Ready must be called next.
func New(o Start) (*Client, error) {
	if err := o.Config.validate(); err != nil {
		return nil, err
	}
	var ringPages []int
	for range o.Config.FaultThreads {
		ringPages = append(ringPages, o.FaultRingPages)
	}
	for range o.Config.ScanThreads {
		ringPages = append(ringPages, o.ScanRingPages)
	}
	a, arenaFile, err := arena.Create(ringPages)
	if err != nil {
		return nil, err
	}
	defer arenaFile.Close()
	c := &Client{arena: a, buf: make([]byte, maxDatagram), freezeWithin: freezePatience}
	peer, err := c.socketPair()
	if err != nil {
		return nil, errors.Join(err, a.Close())
	}
	defer peer.Close()

	c.cfg = o.Config
	c.cmd = exec.Command(o.Self, o.Args...)
	c.cmd.ExtraFiles = []*os.File{peer, arenaFile, o.Control}
	if o.Config.Kept {
		c.cmd.ExtraFiles = append(c.cmd.ExtraFiles, o.Kept)
	}
	c.cmd.Stderr = os.Stderr
	// No collection, no preemption signals: a fault thread is left alone.
	c.cmd.Env = []string{"GODEBUG=asyncpreemptoff=1", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	// Its own session: closing a terminal or ^C is for the agent to handle.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := c.cmd.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("start the fault server: %w", err), c.conn.Close(), a.Close())
	}
	peer.Close() // or the end of the server would not end our reads
	// Apart from the agent: who freezes or starves that must not hold the guest.
	cgroup.Move(c.PID(), c.group())
	return c, nil
}

// Ready configures the server and waits until it is ready to arm.
func (c *Client) Ready(ctx context.Context) error {
	// Nobody may be watching it: one that hangs here would hang us as well.
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	b, err := json.Marshal(c.cfg)
	if err != nil {
		return err
	}
	if _, err := c.conn.Write(b); err != nil {
		return fmt.Errorf("configure the fault server: %w", err)
	}
	return c.receive(ctx)
}

func (c *Client) socketPair() (peer *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("socketpair: %w", err)
	}
	ours := os.NewFile(uintptr(fds[0]), "fault server")
	defer ours.Close()
	peer = os.NewFile(uintptr(fds[1]), "fault server peer")
	conn, err := net.FileConn(ours)
	if err != nil {
		return nil, errors.Join(err, peer.Close())
	}
	c.conn = conn.(*net.UnixConn)
	return peer, nil
}

func (c *Client) group() string { return fmt.Sprintf("faultserver-%d", c.PID()) }

// PID is the fault server's process id.
func (c *Client) PID() int { return c.cmd.Process.Pid }

// Arena is where captured pages arrive.
func (c *Client) Arena() *arena.Arena { return c.arena }

// Stats is what the server counted up to its last reply.
func (c *Client) Stats() Stats { return c.stats }

// Userfaultfd is a descriptor of ours of the userfaultfd that the server works with,
// from Prearm on and until the capture has ended. As long as it is open, the marks that
// Config.Keep leaves stay, also if the server dies.
func (c *Client) Userfaultfd() (*os.File, error) {
	pidfd, err := unix.PidfdOpen(c.PID(), 0)
	if err != nil {
		return nil, fmt.Errorf("fault server: %w", err)
	}
	defer unix.Close(pidfd)
	fd, err := unix.PidfdGetfd(pidfd, c.fd, 0)
	if err != nil {
		return nil, fmt.Errorf("fault server: its userfaultfd: %w", err)
	}
	return os.NewFile(uintptr(fd), "userfaultfd"), nil
}

// Prearm takes a userfaultfd from QEMU and arms all of RAM while the guest runs.
func (c *Client) Prearm(ctx context.Context) error { return c.call(ctx, opPrearm) }

// Rearm arms again what the guest has written since, so that little is left for
// Freeze. It is best called right before the guest is stopped.
func (c *Client) Rearm(ctx context.Context) error { return c.call(ctx, opRearm) }

// Freeze makes RAM as it is now the checkpoint's. The guest is stopped, but not for
// long: after an error there is nothing left to do with this server but Close.
func (c *Client) Freeze(ctx context.Context) error {
	within, cancel := context.WithTimeout(ctx, c.freezeWithin)
	defer cancel()
	err := c.call(within, opFreeze)
	if within.Err() != nil && ctx.Err() == nil && err != nil {
		return &Error{Failure: Silent, Detail: fmt.Sprintf("the fault server did not freeze RAM within %v", c.freezeWithin)}
	}
	return err
}

// Scan starts capturing what the guest does not touch. Wait tells the outcome.
func (c *Client) Scan() error { return c.send(opScan) }

// Wait returns when every page is in the arena and nothing is armed any more, or
// when the capture failed; then nothing is armed either.
func (c *Client) Wait(ctx context.Context) error { return c.receive(ctx) }

// Abort makes the server let go. It is safe at any time.
func (c *Client) Abort(ctx context.Context) error {
	if c.over {
		return nil
	}
	if err := c.call(ctx, opAbort); FailureOf(err) == "" {
		return err
	}
	return nil
}

func (c *Client) call(ctx context.Context, o op) error {
	if err := c.send(o); err != nil {
		return err
	}
	return c.receive(ctx)
}

func (c *Client) send(o op) error {
	b, err := json.Marshal(request{Op: o})
	if err != nil {
		return err
	}
	if _, err := c.conn.Write(b); err != nil {
		return fmt.Errorf("fault server: %s: %w", o, err)
	}
	return nil
}

// receive waits for a reply. A server that died is a capture that failed: the
// kernel has let go for it.
func (c *Client) receive(ctx context.Context) error {
	interrupted := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { interrupted <- c.conn.SetReadDeadline(time.Unix(1, 0)) })
	n, err := c.conn.Read(c.buf)
	if !stop() {
		// The deadline was set or is being set: only then can it be taken back. A
		// reply that came at the same moment is as good as any.
		err = errors.Join(<-interrupted, c.conn.SetReadDeadline(time.Time{}), err)
		if n == 0 {
			return errors.Join(ctx.Err(), err)
		}
		err = nil
	}
	if err == nil && n == 0 {
		err = io.EOF
	}
	if err != nil {
		c.over = true
		return &Error{Failure: Broken, Detail: fmt.Sprintf("the fault server is gone: %v", err)}
	}
	var r reply
	if err := json.Unmarshal(c.buf[:n], &r); err != nil {
		return fmt.Errorf("fault server: reply: %w", err)
	}
	c.stats, c.fd = r.Stats, r.FD
	if r.Failure != "" {
		c.over = true
		return &Error{Failure: r.Failure, Detail: r.Detail, Escaped: r.Escaped}
	}
	return nil
}

// Close ends the server, which lets go if it has not, and frees the arena. The
// consumers of its rings have ended. A server that does not end within a second
// is killed: then the kernel lets go.
func (c *Client) Close() error {
	err := c.conn.Close()
	kill := time.AfterFunc(time.Second, func() { _ = c.cmd.Process.Kill() })
	// How it ended does not matter any more; that it ended does.
	_ = c.cmd.Wait()
	kill.Stop()
	cgroup.Remove(c.group())
	return errors.Join(err, c.arena.Close())
}
