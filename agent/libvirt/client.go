package libvirt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Client is a connection to a libvirt daemon.
type Client struct {
	conn *net.UnixConn

	// sem is the right to write; it guards out.
	sem chan struct{}
	out []byte

	mu      sync.Mutex
	pending map[uint32]*call
	serial  uint32
	err     error
	event   func(Event)

	closing sync.Once
	done    chan struct{} // the reader has ended
}

// call is a procedure under way. Its fields are written by the reader before
// done is closed.
type call struct {
	done   chan struct{}
	status uint32
	reply  []byte
	err    error
}

// New takes over a connection to a daemon, authenticates and opens the URI
// (qemu:///system). The connection is closed if that fails.
func New(ctx context.Context, conn *net.UnixConn, uri string) (*Client, error) {
	c := &Client{conn: conn, sem: make(chan struct{}, 1), pending: make(map[uint32]*call), done: make(chan struct{})}
	go c.read()
	if err := c.open(ctx, uri); err != nil {
		_ = c.hangUp()
		return nil, err
	}
	return c, nil
}

// Kinds of authentication a daemon may ask for.
const (
	authNone   = 0
	authPolkit = 2
)

func (c *Client) open(ctx context.Context, uri string) error {
	reply, err := c.call(ctx, programRemote, procAuthList, nil, nil)
	if err != nil {
		return fmt.Errorf("ask for authentication: %w", err)
	}
	d := decoder{b: reply}
	offered := map[uint32]bool{}
	for range min(d.uint(), 16) {
		offered[d.uint()] = true
	}
	if err := d.failed("authentication"); err != nil {
		return err
	}
	switch {
	case offered[authNone]:
	case offered[authPolkit]:
		if _, err := c.call(ctx, programRemote, procAuthPolkit, nil, nil); err != nil {
			return fmt.Errorf("authenticate with polkit: %w", err)
		}
	default:
		return fmt.Errorf("authenticate: the daemon wants a password (SASL): %w", errors.ErrUnsupported)
	}
	var e encoder
	e.present(true)
	e.string(uri)
	e.uint(0)
	if _, err := c.call(ctx, programRemote, procOpen, e.b, nil); err != nil {
		return fmt.Errorf("open %s: %w", uri, err)
	}
	return nil
}

// Done is closed when the connection has ended; Err then says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is nil while the connection lasts.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

const closePatience = time.Second

// Close says good-bye, so that the daemon does not log a lost client, ends the
// connection and joins the reader.
func (c *Client) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closePatience)
	defer cancel()
	if c.Err() == nil {
		_, _ = c.call(ctx, programRemote, procClose, nil, nil) // the end comes either way
	}
	return c.hangUp()
}

func (c *Client) hangUp() error {
	var err error
	c.closing.Do(func() {
		c.mu.Lock()
		if c.err == nil {
			c.err = ErrClosed
		}
		c.mu.Unlock()
		if err = c.conn.Close(); errors.Is(err, net.ErrClosed) {
			err = nil
		}
	})
	<-c.done
	return err
}

// call runs one procedure and returns the payload of its reply. A file is passed
// along as the procedure's descriptor.
func (c *Client) call(ctx context.Context, program, procedure uint32, args []byte, file *os.File) ([]byte, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	select {
	case c.sem <- struct{}{}:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	k := &call{done: make(chan struct{})}
	c.mu.Lock()
	if c.err != nil {
		err := c.err
		c.mu.Unlock()
		<-c.sem
		return nil, err
	}
	c.serial++
	serial := c.serial
	c.pending[serial] = k
	c.mu.Unlock()
	err := c.write(ctx, program, procedure, serial, args, file)
	<-c.sem
	if err != nil {
		c.forget(serial)
		return nil, err
	}
	select {
	case <-k.done:
	case <-ctx.Done():
		c.forget(serial)
		return nil, fmt.Errorf("no reply yet, libvirt may still carry it out: %w", context.Cause(ctx))
	}
	switch {
	case k.err != nil:
		return nil, k.err
	case k.status == statusError:
		return nil, decodeError(k.reply)
	case k.status != statusOK:
		return nil, fmt.Errorf("%w: reply with status %d", ErrProtocol, k.status)
	}
	return k.reply, nil
}

func (c *Client) forget(serial uint32) {
	c.mu.Lock()
	delete(c.pending, serial)
	c.mu.Unlock()
}

// write puts one message on the wire. One that was cut off leaves the stream
// useless, and ends the connection.
func (c *Client) write(ctx context.Context, program, procedure, serial uint32, args []byte, file *os.File) (err error) {
	h := head{program: program, procedure: procedure, kind: kindCall, serial: serial}
	var e encoder
	if file != nil {
		h.kind = kindCallWithFDs
		e.uint(1)
	}
	h.bytes = uint32(headBytes + len(e.b) + len(args))
	if h.bytes > maxMessageBytes {
		return fmt.Errorf("a message of %d bytes is too long for libvirt", h.bytes)
	}
	c.out = append(append(h.append(c.out[:0]), e.b...), args...)
	fired := make(chan struct{})
	_ = c.conn.SetWriteDeadline(time.Time{})
	stop := context.AfterFunc(ctx, func() {
		_ = c.conn.SetWriteDeadline(time.Unix(1, 0))
		close(fired)
	})
	defer func() {
		if !stop() {
			<-fired
		}
	}()
	n, err := c.conn.Write(c.out)
	if err == nil && file != nil {
		// The daemon reads the message first, and then one byte a descriptor.
		err = sendFile(c.conn, file)
	}
	if err == nil {
		return nil
	}
	if n > 0 {
		_ = c.conn.Close() // the reader tells everybody
	}
	if ctx.Err() != nil {
		return fmt.Errorf("send to libvirt: %w", context.Cause(ctx))
	}
	return fmt.Errorf("%w: %w", ErrLost, err)
}

// sendFile does not use Fd(), which may switch a pipe shared with others to
// blocking.
func sendFile(conn *net.UnixConn, f *os.File) error {
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	cerr := rc.Control(func(fd uintptr) {
		_, _, err = conn.WriteMsgUnix([]byte{0}, unix.UnixRights(int(fd)), nil)
	})
	return errors.Join(cerr, err)
}

// read is the reader goroutine, joined by Close.
func (c *Client) read() {
	defer close(c.done)
	for {
		h, body, err := readMessage(c.conn)
		if err == nil {
			err = c.dispatch(h, body)
		}
		if err != nil {
			c.fail(err)
			return
		}
	}
}

// readMessage reads one message whole.
func readMessage(r io.Reader) (h head, body []byte, err error) {
	var b [headBytes]byte
	if _, err = io.ReadFull(r, b[:]); err != nil {
		return h, nil, err
	}
	if h, err = decodeHead(b[:]); err != nil {
		return h, nil, err
	}
	body = make([]byte, h.bytes-headBytes)
	_, err = io.ReadFull(r, body)
	return h, body, err
}

func (c *Client) dispatch(h head, body []byte) error {
	switch {
	case h.kind == kindReply:
		c.mu.Lock()
		k := c.pending[h.serial]
		delete(c.pending, h.serial)
		c.mu.Unlock()
		if k != nil { // else nobody waits for it any more
			k.status, k.reply = h.status, body
			close(k.done)
		}
	case h.kind == kindMessage && h.program == programQEMU && h.procedure == procMonitorEvent:
		e, err := decodeEvent(body)
		if err != nil {
			return err
		}
		c.mu.Lock()
		see := c.event
		c.mu.Unlock()
		if see != nil {
			see(e)
		}
	case h.kind == kindMessage: // of no interest
	default:
		return fmt.Errorf("%w: message of kind %d", ErrProtocol, h.kind)
	}
	return nil
}

// fail ends everything that waits. Only the reader calls it, once.
func (c *Client) fail(cause error) {
	if errors.Is(cause, io.EOF) {
		cause = io.ErrUnexpectedEOF
	}
	c.mu.Lock()
	if c.err == nil {
		c.err = fmt.Errorf("%w: %w", ErrLost, cause)
	}
	err := c.err
	pending := c.pending
	c.pending = make(map[uint32]*call)
	c.mu.Unlock()
	for _, k := range pending {
		k.err = err
		close(k.done)
	}
	_ = c.conn.Close() // closed already where Close was called
}
