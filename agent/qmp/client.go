package qmp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	greetingTimeout    = time.Second      // a free monitor greets within microseconds
	negotiationTimeout = 10 * time.Second // QEMU has greeted, so its main loop lives
	sendTimeout        = 2 * time.Second  // of Send, which has no context
	answerTimeout      = 15 * time.Second // of Execute, where the caller sets no deadline of its own
)

// Version is what QEMU's greeting says.
type Version struct {
	Major, Minor, Micro int
	Package             string // the distribution's, may be empty
}

func (v Version) String() string { return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro) }

// AtLeast compares major and minor.
func (v Version) AtLeast(major, minor int) bool {
	return v.Major > major || v.Major == major && v.Minor >= minor
}

// Client is a QMP session in command mode. All methods may be called from any
// goroutine. Lock order: sem, then mu, then a subscription's mu.
type Client struct {
	conn     net.Conn
	endpoint Endpoint
	relay    *relay // speaks at the other end of conn if libvirt is in between
	peer     peerProcess
	version  Version
	caps     []string

	// sem is the right to write; it guards out and torn.
	sem  chan struct{}
	out  []byte
	torn bool // half a command is on the wire: reset QEMU's parser first

	answerWithin time.Duration // answerTimeout but in tests

	// fdTurn is held from sending a descriptor to the reply.
	fdTurn chan struct{}

	mu      sync.Mutex
	pending map[uint64]*Call
	nextID  uint64
	subs    []*Subscription
	err     error  // why there is no connection any more
	stray   uint64 // errors without an id are expected up to the reply of this id
	late    uint64 // replies nobody waited for any more
	reason  string // of the SHUTDOWN event

	greeting chan []byte
	closing  sync.Once
	done     chan struct{} // the reader has ended
}

// NewClient takes over a connection on which QEMU has yet to greet, and
// negotiates. The connection is closed if that fails.
func NewClient(ctx context.Context, conn net.Conn) (*Client, error) {
	return newClient(ctx, conn, Endpoint{FD: -1}, greetingTimeout, nil)
}

// newClient waits that long for the greeting, and runs check, if given, between
// it and the first command.
func newClient(ctx context.Context, conn net.Conn, ep Endpoint, wait time.Duration, check func() error) (*Client, error) {
	c := start(conn, ep)
	err := c.greet(ctx, wait)
	if err == nil && check != nil {
		err = check()
	}
	if err == nil {
		ctx, cancel := context.WithTimeout(ctx, negotiationTimeout)
		err = c.Execute(ctx, "qmp_capabilities", nil, nil)
		cancel()
	}
	if err != nil {
		_ = c.Close()
		return nil, err
	}
	return c, nil
}

// AdoptClient takes over a connection in an unknown state, such as one whose
// owner died: see Resync. There is no greeting any more, hence no Version.
func AdoptClient(ctx context.Context, conn net.Conn) (*Client, error) {
	if err := Resync(ctx, conn); err != nil {
		_ = conn.Close()
		return nil, err
	}
	return start(conn, Endpoint{FD: -1}), nil
}

func start(conn net.Conn, ep Endpoint) *Client {
	c := &Client{
		answerWithin: answerTimeout,
		conn:         conn,
		endpoint:     ep,
		peer:         watchPeer(ep),
		sem:          make(chan struct{}, 1),
		fdTurn:       make(chan struct{}, 1),
		pending:      make(map[uint64]*Call),
		greeting:     make(chan []byte, 1),
		done:         make(chan struct{}),
	}
	go c.read()
	return c
}

// greet waits for the greeting and takes it in.
func (c *Client) greet(ctx context.Context, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	var raw []byte
	select {
	case raw = <-c.greeting:
	case <-timer.C:
		return ErrBusy
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-c.done:
		select {
		case raw = <-c.greeting:
		default:
			return c.Err()
		}
	}
	var g struct {
		Version struct {
			QEMU    struct{ Major, Minor, Micro int }
			Package string
		}
		Capabilities []string
	}
	if err := json.Unmarshal(raw, &g); err != nil {
		return fmt.Errorf("greeting: %w", errors.Join(ErrProtocol, err))
	}
	q := g.Version.QEMU
	c.version = Version{q.Major, q.Minor, q.Micro, g.Version.Package}
	c.caps = g.Capabilities
	return nil
}

// Version is QEMU's, as greeted.
func (c *Client) Version() Version { return c.version }

// Capabilities is what the greeting offers ("oob"); none is enabled.
func (c *Client) Capabilities() []string { return c.caps }

// Endpoint is where the client is connected, as far as it was dialled here.
func (c *Client) Endpoint() Endpoint { return c.endpoint }

// Done is closed when the connection has ended; Err then says why.
func (c *Client) Done() <-chan struct{} { return c.done }

// Err is nil while the connection lasts.
func (c *Client) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// DupFile returns a duplicate of the socket, for a process that shall be able
// to take over (see Resync). Only one of the two may read at a time. It is nil if
// libvirt is in between: the session ends with this process then, and everybody
// has one of their own.
func (c *Client) DupFile() (*os.File, error) {
	if c.relay != nil {
		return nil, nil
	}
	return dupConn(c.conn)
}

// Close gives the monitor back: the session ends also for duplicates of the
// socket, and the next client is served at once. It joins the reader.
func (c *Client) Close() error {
	var err error
	c.closing.Do(func() {
		c.mu.Lock()
		if c.err == nil {
			c.err = ErrClosed
		}
		c.mu.Unlock()
		if rc, e := rawOf(c.conn); e == nil {
			_ = rc.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_RDWR) })
		}
		// A connection that QEMU's end has closed already is as closed as it can be.
		if err = c.conn.Close(); errors.Is(err, net.ErrClosed) {
			err = nil
		}
		<-c.done
		if c.relay != nil {
			c.relay.close()
		}
		c.peer.close()
	})
	<-c.done
	return err
}

// forget drops a call nobody waits for; its reply is then thrown away.
func (c *Client) forget(k *Call) {
	c.mu.Lock()
	delete(c.pending, k.id)
	c.mu.Unlock()
}

// read is the reader goroutine, joined by Close.
func (c *Client) read() {
	defer close(c.done)
	s := newSplitter()
	for {
		buf, err := s.space()
		if err == nil {
			var n int
			n, err = c.conn.Read(buf)
			now := time.Now() // before anything else: pauses are measured with it
			s.fill(n)
			for {
				msg, bad := s.next()
				if bad != nil {
					err = bad
				}
				if msg == nil {
					break
				}
				c.dispatch(msg, now)
			}
		}
		if err != nil {
			c.fail(err)
			return
		}
	}
}

func (c *Client) dispatch(msg []byte, now time.Time) {
	m, ok := parseMessage(msg)
	switch {
	case !ok:
		// Framed but malformed: whoever waits for it times out.
	case m.event != nil:
		c.event(m, now)
	case m.greeting != nil:
		select {
		case c.greeting <- bytes.Clone(m.greeting):
		default:
		}
	case m.ret != nil || m.err != nil:
		if k := c.claim(m); k != nil {
			k.ret, k.qerr, k.at = bytes.Clone(m.ret), bytes.Clone(m.err), now
			close(k.done)
		}
	}
}

// claim finds the call a reply belongs to and takes it out of pending.
func (c *Client) claim(m message) *Call {
	c.mu.Lock()
	defer c.mu.Unlock()
	var k *Call
	if m.id != nil {
		id, err := strconv.ParseUint(string(m.id), 10, 64)
		if err != nil {
			c.late++ // of a session before ours on an adopted connection
			return nil
		}
		if c.stray != 0 && id >= c.stray {
			c.stray = 0
		}
		k = c.pending[id]
	} else if c.stray == 0 {
		// QEMU could not parse a command and so does not know its id. As it
		// works in order, it is the oldest.
		for _, p := range c.pending {
			if k == nil || p.id < k.id {
				k = p
			}
		}
	}
	if k == nil {
		c.late++
		return nil
	}
	delete(c.pending, k.id)
	return k
}

func (c *Client) event(m message, now time.Time) {
	var name string
	if json.Unmarshal(m.event, &name) != nil {
		return
	}
	c.mu.Lock()
	if name == "SHUTDOWN" {
		var d struct{ Reason string }
		_ = json.Unmarshal(m.data, &d)
		c.reason = "SHUTDOWN"
		if d.Reason != "" {
			c.reason = d.Reason
		}
	} else if name == "RESUME" || name == "RESET" {
		c.reason = "" // -no-shutdown: it lives on
	}
	subs := c.subs
	c.mu.Unlock()
	var e Event
	for _, s := range subs {
		if !s.wants(name) {
			continue
		}
		if e.Name == "" {
			e = Event{Name: name, Data: bytes.Clone(m.data), Received: now}
			var ts struct{ Seconds, Microseconds int64 }
			if json.Unmarshal(m.timestamp, &ts) == nil && ts.Seconds >= 0 {
				e.Timestamp = time.Unix(ts.Seconds, ts.Microseconds*1000)
			}
		}
		s.push(e)
	}
}

// fail ends everything that waits. Only the reader calls it, once.
func (c *Client) fail(cause error) {
	exited := c.peer.exited()
	c.mu.Lock()
	if c.err == nil {
		if errors.Is(cause, io.EOF) {
			cause = io.ErrUnexpectedEOF
		}
		c.err = &lostError{
			cause:  cause,
			reason: c.reason,
			// On its way out QEMU closes its monitors first.
			exited: exited == yes || c.reason != "",
		}
	}
	err := c.err
	pending, subs := c.pending, c.subs
	c.pending, c.subs = make(map[uint64]*Call), nil
	c.mu.Unlock()
	for _, k := range pending {
		k.err = err
		close(k.done)
	}
	for _, s := range subs {
		s.end()
	}
	if !errors.Is(err, ErrClosed) {
		_ = c.conn.Close()
	}
}
