package guestagent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
)

const (
	maxReply = 64 << 10 // of the replies that are asked for here, hundreds of bytes
	maxSkip  = 1 << 20  // of what somebody else left on the wire
	// delimiter resets the agent's parser, and stands before the reply to a
	// delimited sync.
	delimiter = 0xff
)

// Client is a conversation with a guest's agent, one command at a time.
type Client struct {
	conn   net.Conn
	r      *bufio.Reader
	object string
}

// Error is a command that the agent refused.
type Error struct {
	Command string
	Class   string `json:"class"`
	Desc    string `json:"desc"`
}

func (e *Error) Error() string { return fmt.Sprintf("%s: %s: %s", e.Command, e.Class, e.Desc) }

// Dial connects to the agent and gets in step with it. root is where the VM's root
// directory is seen from here ("/proc/PID/root"), "" for our own. The end of ctx
// bounds it; an agent that does not answer is problem.Failed.
func Dial(ctx context.Context, ch Channel, root string) (*Client, error) {
	object := ch.Network + ":" + ch.Address
	if ch.Taken {
		return nil, problem.New(problem.Busy, "connect to guest agent", object, "somebody else is connected").
			WithHint("close the other client; on a libvirt domain virsh domfsfreeze and domfsthaw talk to it instead, from hooks")
	}
	var d net.Dialer
	address := ch.Address
	if ch.Network == "unix" && !strings.HasPrefix(address, "@") {
		f, err := os.OpenFile(root+filepath.Dir(address), unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return nil, problem.New(problem.NotFound, "connect to guest agent", object, "%w", err)
		}
		defer f.Close()
		// Short whatever the directory is called: a socket's address has 107 bytes.
		address = fmt.Sprintf("/proc/self/fd/%d/%s", f.Fd(), filepath.Base(address))
	}
	conn, err := d.DialContext(ctx, ch.Network, address)
	if err != nil {
		return nil, problem.New(problem.CodeOf(err), "connect to guest agent", object, "%w", err)
	}
	c := newClient(conn, object)
	if err := c.sync(ctx); err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return c, nil
}

func newClient(conn net.Conn, object string) *Client {
	return &Client{conn: conn, r: bufio.NewReaderSize(conn, 4096), object: object}
}

// Close ends the conversation. The guest stays as it is.
func (c *Client) Close() error { return c.conn.Close() }

// File is a duplicate of the connection for another process.
func (c *Client) File() (*os.File, error) {
	f, ok := c.conn.(interface{ File() (*os.File, error) })
	if !ok {
		return nil, fmt.Errorf("connection %T has no descriptor", c.conn)
	}
	return f.File()
}

// Freeze freezes the guest's file systems and returns how many. It is undone by
// Thaw, and by nothing else that the guest does by itself.
func (c *Client) Freeze(ctx context.Context) (n int, err error) {
	return n, c.execute(ctx, "guest-fsfreeze-freeze", nil, &n)
}

// Thaw lets the guest's file systems go on and returns how many were frozen.
func (c *Client) Thaw(ctx context.Context) (n int, err error) {
	return n, c.execute(ctx, "guest-fsfreeze-thaw", nil, &n)
}

// Frozen tells whether file systems of the guest are frozen.
func (c *Client) Frozen(ctx context.Context) (bool, error) {
	var s string
	err := c.execute(ctx, "guest-fsfreeze-status", nil, &s)
	return s == "frozen", err
}

// Time is the guest's wall clock.
func (c *Client) Time(ctx context.Context) (time.Time, error) {
	var ns int64
	err := c.execute(ctx, "guest-get-time", nil, &ns)
	return time.Unix(0, ns), err
}

// SetTime sets the guest's wall clock and its real-time clock.
func (c *Client) SetTime(ctx context.Context, t time.Time) error {
	return c.execute(ctx, "guest-set-time", map[string]int64{"time": t.UnixNano()}, nil)
}

// execute runs one command.
func (c *Client) execute(ctx context.Context, command string, args, out any) error {
	return c.bounded(ctx, command, func() error {
		b, err := encode(command, args)
		if err != nil {
			return err
		}
		if _, err := c.conn.Write(b); err != nil {
			return err
		}
		line, err := readLine(c.r)
		if err != nil {
			return err
		}
		return decode(line, command, out)
	})
}

// sync throws away what was under way on the wire until the answer to a number of
// our own comes.
func (c *Client) sync(ctx context.Context) error {
	return c.bounded(ctx, "guest-sync-delimited", func() error {
		id := rand.Int64N(1 << 53)
		b, err := encode("guest-sync-delimited", map[string]int64{"id": id})
		if err != nil {
			return err
		}
		if _, err := c.conn.Write(append([]byte{delimiter}, b...)); err != nil {
			return err
		}
		for skipped := 0; skipped < maxSkip; {
			b, err := c.r.ReadByte()
			if err != nil {
				return err
			}
			if skipped++; b != delimiter {
				continue
			}
			line, err := readLine(c.r)
			if err != nil {
				return err
			}
			skipped += len(line)
			var got int64
			if decode(line, "guest-sync-delimited", &got) == nil && got == id {
				return nil
			}
		}
		return fmt.Errorf("no answer in the first %d bytes", maxSkip)
	})
}

// bounded runs a step of the conversation until ctx ends. After that the
// conversation is out of step and good for nothing but Close.
func (c *Client) bounded(ctx context.Context, command string, step func() error) error {
	stop := context.AfterFunc(ctx, func() { _ = c.conn.SetDeadline(time.Unix(1, 0)) })
	err := step()
	if !stop() && ctx.Err() != nil {
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return problem.New(problem.Failed, command, c.object, "the guest's agent does not answer").
				WithHint("is qemu-ga running in the guest?")
		}
		return problem.New(problem.Cancelled, command, c.object, "%w", ctx.Err())
	}
	if err == nil {
		return nil
	}
	p := problem.New(problem.Failed, command, c.object, "%w", err)
	if refused, ok := errors.AsType[*Error](err); ok && (refused.Class == "CommandNotFound" || refused.Class == "CommandDisabled") {
		p.Code = problem.Refused
		p.Hint = "this guest agent does not do that, or its configuration forbids it"
	}
	return p
}

func encode(command string, args any) ([]byte, error) {
	b, err := json.Marshal(struct {
		Execute   string `json:"execute"`
		Arguments any    `json:"arguments,omitempty"`
	}{command, args})
	return append(b, '\n'), err
}

var errLong = errors.New("the reply is longer than any that was asked for")

// readLine reads up to the end of the line, which it leaves out.
func readLine(r *bufio.Reader) ([]byte, error) {
	var line []byte
	for {
		part, err := r.ReadSlice('\n')
		if len(line)+len(part) > maxReply {
			return nil, errLong
		}
		line = append(line, part...)
		switch {
		case err == nil:
			return bytes.TrimSpace(line), nil
		case errors.Is(err, io.EOF):
			return nil, io.ErrUnexpectedEOF
		case !errors.Is(err, bufio.ErrBufferFull):
			return nil, err
		}
	}
}

// decode reads a reply, whose text is the guest's.
func decode(line []byte, command string, out any) error {
	var r struct {
		Return json.RawMessage `json:"return"`
		Error  *Error          `json:"error"`
	}
	if err := json.Unmarshal(line, &r); err != nil {
		return fmt.Errorf("reply %.80q: %w", line, err)
	}
	switch {
	case r.Error != nil:
		r.Error.Command = command
		r.Error.Class, r.Error.Desc = clip(r.Error.Class), clip(r.Error.Desc)
		return r.Error
	case r.Return == nil:
		return fmt.Errorf("reply %.80q has no result", line)
	case out == nil:
		return nil
	}
	if err := json.Unmarshal(r.Return, out); err != nil {
		return fmt.Errorf("result %.80q: %w", r.Return, err)
	}
	return nil
}

// clip keeps what a guest says fit for a line of text.
func clip(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f {
			return ' '
		}
		return r
	}, s)
	return s[:min(len(s), 200)]
}
