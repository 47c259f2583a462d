package vmtest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"

	"golang.org/x/sys/unix"
)

// A Message is one JSON object that passes a Proxy.
type Message struct {
	FromQEMU bool
	Command  string          // execute or exec-oob of a command
	Event    string          // the name of an event
	ID       json.RawMessage // of commands and replies that have one
	Raw      []byte          // as it was sent
	Nth      int             // counts, from 1, the messages a rule matched
}

// Verdict is what becomes of a message.
type Verdict int

const (
	Pass   Verdict = iota // send it on
	Drop                  // swallow it
	Cut                   // swallow it and hang up on both sides
	Half                  // send half of it on, then hang up on both sides
	Hangup                // send it on, then hang up on both sides
	Torn                  // send half of it on and go on: what a sender leaves that dies while it writes
)

// A Rule is asked about the messages it matches, in order, before they are sent
// on. While it runs everything behind the message waits (the other direction
// does not), so a rule that blocks withholds it.
type Rule struct {
	Command string // commands of this name on their way to QEMU; or
	Event   string // events of this name from QEMU; or
	Match   func(Message) bool
	Decide  func(ctx context.Context, m Message) Verdict // nil: Pass
}

// Proxy stands between a QMP client and QEMU's socket, unseen by both: bytes,
// descriptors (SCM_RIGHTS) and stray bytes between messages pass as they are.
// Rules see each message; this makes the proxy a witness of what the client
// does, and in what order.
//
// One client is served at a time, as QEMU does; QEMU's socket is taken when a
// client connects and given back when it leaves. Each direction has a goroutine,
// owned by the session, owned by the accept loop, joined by Close.
type Proxy struct {
	path, target string
	listener     *net.UnixListener
	ctx          context.Context
	cancel       context.CancelFunc
	done         chan struct{}

	mu    sync.Mutex
	rules []*activeRule
	seen  []Message
}

type activeRule struct {
	Rule
	n int
}

// maxSeen bounds the record of a proxy.
const maxSeen = 1 << 14

// NewProxy listens on path and connects clients to QEMU's socket target.
func NewProxy(path, target string) (*Proxy, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("QMP proxy: %w", err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &Proxy{path: path, target: target, listener: l, ctx: ctx, cancel: cancel, done: make(chan struct{})}
	go p.accept()
	return p, nil
}

// Path is the socket a client is to be pointed to.
func (p *Proxy) Path() string { return p.path }

// Add puts a rule behind those there are; the first that matches decides.
// remove takes it out again.
func (p *Proxy) Add(r Rule) (remove func()) {
	a := &activeRule{Rule: r}
	p.mu.Lock()
	p.rules = append(p.rules, a)
	p.mu.Unlock()
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		for i, x := range p.rules {
			if x == a {
				p.rules = append(p.rules[:i:i], p.rules[i+1:]...)
				return
			}
		}
	}
}

// Withhold keeps every command of the name from QEMU until hold returns: with
// "cont" the machine stays paused for as long as hold looks at it.
func (p *Proxy) Withhold(command string, hold func(ctx context.Context, m Message)) (remove func()) {
	return p.Add(Rule{Command: command, Decide: func(ctx context.Context, m Message) Verdict {
		hold(ctx, m)
		return Pass
	}})
}

// Seen is what passed (or was swallowed) so far, in the order of each direction.
func (p *Proxy) Seen() []Message {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]Message(nil), p.seen...)
}

// Close hangs up, cancels rules that still hold something, and waits.
func (p *Proxy) Close() error {
	p.cancel()
	err := p.listener.Close()
	<-p.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func (p *Proxy) accept() {
	defer close(p.done)
	for {
		client, err := p.listener.AcceptUnix()
		if err != nil {
			return
		}
		server, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: p.target, Net: "unix"})
		if err != nil {
			client.Close() // what a client of a dead QEMU sees too
			continue
		}
		p.session(client, server)
	}
}

func (p *Proxy) session(client, server *net.UnixConn) {
	ctx, cancel := context.WithCancel(p.ctx)
	hangup := func() {
		cancel()
		client.Close()
		server.Close()
	}
	defer hangup()
	stop := context.AfterFunc(p.ctx, hangup)
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { defer hangup(); p.pump(ctx, client, server, false) })
	both.Go(func() { defer hangup(); p.pump(ctx, server, client, true) })
	both.Wait()
}

// pump moves one direction until it ends. Descriptors stay with the message
// during whose bytes they arrived and leave with its first byte.
func (p *Proxy) pump(ctx context.Context, from, to *net.UnixConn, fromQEMU bool) {
	var s splitter
	defer func() { closeAll(s.files) }()
	buf, oob := make([]byte, 1<<16), make([]byte, unix.CmsgSpace(16*4))
	for {
		n, oobn, _, _, err := from.ReadMsgUnix(buf, oob)
		if n == 0 || err != nil {
			return
		}
		s.files = append(s.files, filesIn(oob[:oobn])...)
		pieces := s.feed(buf[:n])
		open := true
		for _, x := range pieces {
			open = open && p.forward(ctx, to, x, fromQEMU)
			closeAll(x.files)
		}
		if !open {
			return
		}
	}
}

// forward sends one piece on as the rules say; false ends the session.
func (p *Proxy) forward(ctx context.Context, to *net.UnixConn, x piece, fromQEMU bool) bool {
	if !x.message {
		return send(to, x.data, x.files)
	}
	switch p.judge(ctx, x.data, fromQEMU) {
	case Drop:
		return true
	case Cut:
		return false
	case Half:
		send(to, x.data[:len(x.data)/2], x.files)
		return false
	case Hangup:
		send(to, x.data, x.files)
		return false
	case Torn:
		return send(to, x.data[:len(x.data)/2], x.files)
	}
	return send(to, x.data, x.files)
}

func (p *Proxy) judge(ctx context.Context, raw []byte, fromQEMU bool) Verdict {
	var head struct {
		Execute string          `json:"execute"`
		OOB     string          `json:"exec-oob"`
		Event   string          `json:"event"`
		ID      json.RawMessage `json:"id"`
	}
	_ = json.Unmarshal(raw, &head) // what is no JSON has no name and passes
	m := Message{FromQEMU: fromQEMU, Command: head.Execute + head.OOB, Event: head.Event, ID: head.ID,
		Raw: append([]byte(nil), raw...)}
	var rule *activeRule
	p.mu.Lock()
	if len(p.seen) < maxSeen {
		p.seen = append(p.seen, m)
	}
	for _, r := range p.rules {
		if r.Command != "" && !fromQEMU && r.Command == m.Command || r.Event != "" && fromQEMU && r.Event == m.Event ||
			r.Match != nil && r.Match(m) {
			rule = r
			r.n++
			m.Nth = r.n
			break
		}
	}
	p.mu.Unlock()
	if rule == nil || rule.Decide == nil {
		return Pass
	}
	return rule.Decide(ctx, m)
}

func send(to *net.UnixConn, data []byte, files []int) bool {
	var oob []byte
	if len(files) > 0 {
		oob = unix.UnixRights(files...)
	}
	for len(data) > 0 || oob != nil {
		n, _, err := to.WriteMsgUnix(data, oob, nil)
		if err != nil {
			return false
		}
		data, oob = data[n:], nil
	}
	return true
}

func filesIn(oob []byte) (files []int) {
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil
	}
	for _, m := range msgs {
		if fds, err := unix.ParseUnixRights(&m); err == nil {
			files = append(files, fds...)
		}
	}
	return files
}

func closeAll(files []int) {
	for _, fd := range files {
		unix.Close(fd)
	}
}
