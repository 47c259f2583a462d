package qmp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"github.com/ckagent/ckagent/agent/problem"
)

// Request is a command ready to be sent, any number of times and on any client:
// what can be prepared before a pause is prepared here.
type Request struct {
	command string
	head    []byte // up to and including `"id":`
	tail    []byte // what closes the object
}

// Command is the name of the command.
func (r *Request) Command() string { return r.command }

// Encode marshals a command; args may be nil, a struct, a map or a
// json.RawMessage, and must marshal to a JSON object.
func Encode(command string, args any) (*Request, error) {
	name, err := json.Marshal(command)
	if err != nil {
		return nil, fmt.Errorf("qmp %s: %w", command, err)
	}
	r := &Request{command: command, tail: []byte("}\n")}
	r.head = append(append(r.head, `{"execute":`...), name...)
	if args != nil {
		var b bytes.Buffer
		enc := json.NewEncoder(&b)
		enc.SetEscapeHTML(false)
		if err := enc.Encode(args); err != nil {
			return nil, fmt.Errorf("qmp %s: arguments: %w", command, err)
		}
		body := bytes.TrimSpace(b.Bytes())
		if !bytes.Equal(body, []byte("null")) {
			if len(body) == 0 || body[0] != '{' {
				return nil, fmt.Errorf("qmp %s: arguments are no JSON object: %.40s", command, body)
			}
			r.head = append(append(r.head, `,"arguments":`...), body...)
		}
	}
	r.head = append(r.head, `,"id":`...)
	return r, nil
}

func (r *Request) append(buf []byte, id uint64) []byte {
	buf = append(buf, r.head...)
	buf = strconv.AppendUint(buf, id, 10)
	return append(buf, r.tail...)
}

// Call is a command on its way. Its fields are written by the reader before
// done is closed and only read afterwards.
type Call struct {
	c       *Client
	id      uint64
	command string
	done    chan struct{}
	sent    time.Time
	at      time.Time
	ret     []byte
	qerr    []byte
	err     error
}

// Done is when read(2) returned with the end of the reply, on the monotonic
// clock; zero before Wait has returned and where no reply came.
func (k *Call) Done() time.Time {
	select {
	case <-k.done:
		return k.at
	default:
		return time.Time{}
	}
}

// Sent is the moment before the write(2) that carried the command.
func (k *Call) Sent() time.Time { return k.sent }

// Wait waits for the reply and decodes what was returned into out, which may be
// nil. When ctx ends first the reply will be thrown away whenever it comes; the
// command may still be carried out.
func (k *Call) Wait(ctx context.Context, out any) error {
	select {
	case <-k.done:
	default:
		select {
		case <-k.done:
		case <-ctx.Done():
			k.c.forget(k)
			return fmt.Errorf("qmp %s: no reply yet, QEMU may still carry it out: %w", k.command, context.Cause(ctx))
		}
	}
	if err := k.failure(); err != nil {
		return err
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(k.ret, out); err != nil {
		return fmt.Errorf("qmp %s: reply of an unexpected form: %w", k.command, err)
	}
	return nil
}

func (k *Call) failure() error {
	if k.err != nil {
		return fmt.Errorf("qmp %s: %w", k.command, k.err)
	}
	if k.qerr != nil {
		e := new(Error)
		if err := json.Unmarshal(k.qerr, e); err != nil {
			return fmt.Errorf("qmp %s: error reply of an unexpected form: %w", k.command, errors.Join(ErrProtocol, err))
		}
		if e.Class == ClassLibvirtBusy {
			return problem.New(problem.Busy, "qmp", k.command, "%w", e).
				WithHint("a job of libvirt's (a save, a migration, a snapshot) has the domain; wait for it to end")
		}
		return fmt.Errorf("qmp %s: %w", k.command, e)
	}
	return nil
}

// ErrSilent: QEMU has not answered for so long that its main loop must hang, or
// somebody keeps its answers.
var ErrSilent = errors.New("QEMU does not answer")

// Execute runs one command and decodes what it returns into out (nil: not
// wanted). A refusal by QEMU is an *Error in the chain. Under a context without a
// deadline an answer that does not come is ErrSilent, as problem.Busy.
func (c *Client) Execute(ctx context.Context, command string, args, out any) error {
	return c.ExecuteFD(ctx, command, args, out)
}

// ExecuteFD is Execute with a descriptor passed along (getfd, add-fd). QEMU
// keeps one descriptor per connection until a command takes it, so such
// commands go one at a time. The file stays the caller's.
func (c *Client) ExecuteFD(ctx context.Context, command string, args, out any, files ...*os.File) error {
	req, err := Encode(command, args)
	if err != nil {
		return err
	}
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, c.answerWithin,
			problem.New(problem.Busy, "qmp", command, "%w, for %v", ErrSilent, c.answerWithin).WithHint("QEMU hangs, perhaps in its storage, or somebody holds its answers back; try again when it answers"))
		defer cancel()
	}
	if len(files) > 0 {
		select {
		case c.fdTurn <- struct{}{}:
			defer func() { <-c.fdTurn }()
		case <-ctx.Done():
			return fmt.Errorf("qmp %s: not sent: %w", command, context.Cause(ctx))
		}
	}
	calls, err := c.start(ctx, 0, []*Request{req}, files)
	if err != nil {
		return fmt.Errorf("qmp %s: %w", command, err)
	}
	return calls[0].Wait(ctx, out)
}

// HMP runs a line of the human monitor and returns what it printed. Errors of
// HMP commands are part of that text.
func (c *Client) HMP(ctx context.Context, line string) (string, error) {
	var text string
	err := c.Execute(ctx, "human-monitor-command", map[string]string{"command-line": line}, &text)
	if err != nil {
		return "", fmt.Errorf("hmp %q: %w", line, err)
	}
	return text, nil
}

// Send puts several commands on the wire in one write; QEMU carries them out in
// this order. It gives up after two seconds of QEMU not reading.
func (c *Client) Send(reqs ...*Request) ([]*Call, error) {
	calls, err := c.start(context.Background(), sendTimeout, reqs, nil)
	if err != nil {
		return nil, fmt.Errorf("qmp %s: %w", commands(reqs), err)
	}
	return calls, nil
}

func commands(reqs []*Request) string {
	var names []byte
	for i, r := range reqs {
		if i > 0 {
			names = append(names, ", "...)
		}
		names = append(names, r.command...)
	}
	return string(names)
}
