package faultserver

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/arena"
)

// Start says how to start a fault server.
type Start struct {
	Self    string   // our own binary
	Args    []string // its arguments that lead to Main
	Control *os.File // the control page
	Config  Config
	// Process, if not nil, is one that was launched ahead, by the same Self and Args.
	// New takes it over whatever comes of it.
	Process *Process
	// Kept, with Config.Kept, is the userfaultfd under which the marks were left.
	Kept *os.File
	// Ring sizes in pages: one for each fault thread, then one for each scanner.
	FaultRingPages, ScanRingPages int
}

// Client is the agent's end of a fault server. Its methods are called by one
// goroutine at a time.
type Client struct {
	proc  *Process
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

// New configures a fault server, and starts it if none was launched. It makes itself ready
// by and by; Ready must be called next.
func New(o Start) (_ *Client, err error) {
	proc := o.Process
	defer func() {
		if err != nil && proc != nil {
			err = errors.Join(err, proc.Close())
		}
	}()
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
	a, file, err := arena.Create(ringPages)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	files := []*os.File{file, o.Control}
	if o.Config.Kept {
		files = append(files, o.Kept)
	}
	if proc != nil && proc.tell(o.Config, files...) != nil { // it has ended meanwhile
		_ = proc.Close()
		proc = nil
	}
	if proc == nil {
		if proc, err = Launch(o.Self, o.Args, o.Config.Engine); err == nil {
			err = proc.tell(o.Config, files...)
		}
		if err != nil {
			return nil, errors.Join(err, a.Close())
		}
	}
	return &Client{proc: proc, arena: a, buf: make([]byte, maxDatagram), freezeWithin: freezePatience}, nil
}

// Ready waits until the server is ready to arm.
func (c *Client) Ready(ctx context.Context) error {
	// Nobody may be watching it: one that hangs here would hang us as well.
	ctx, cancel := context.WithTimeout(ctx, startPatience)
	defer cancel()
	err := c.receive(ctx)
	c.proc.settle()
	return err
}

// PID is the fault server's process id.
func (c *Client) PID() int { return c.proc.PID() }

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
	if _, err := c.proc.conn.Write(b); err != nil {
		return fmt.Errorf("fault server: %s: %w", o, err)
	}
	return nil
}

// receive waits for a reply. A server that died is a capture that failed: the
// kernel has let go for it.
func (c *Client) receive(ctx context.Context) error {
	interrupted := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { interrupted <- c.proc.conn.SetReadDeadline(time.Unix(1, 0)) })
	n, err := c.proc.conn.Read(c.buf)
	if !stop() {
		// The deadline was set or is being set: only then can it be taken back. A
		// reply that came at the same moment is as good as any.
		err = errors.Join(<-interrupted, c.proc.conn.SetReadDeadline(time.Time{}), err)
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
func (c *Client) Close() error { return errors.Join(c.proc.Close(), c.arena.Close()) }
