package qmp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/libvirt"
)

// Classes of the errors that a relay answers with by itself, beside QEMU's own.
const (
	ClassLibvirt       = "Libvirt"       // libvirt refused
	ClassLibvirtBusy   = "LibvirtBusy"   // another job has the domain
	ClassManagerPaused = "ManagerPaused" // it was paused through its manager: not ours to resume
)

var errOldLibvirt = errors.New("libvirt is older than 8.2, which is the first to pass descriptors to QEMU")

// relay stands at the other end of a client's socket and speaks QMP with it, as
// QEMU would, while libvirt carries out what it says. So everything above works
// over libvirt as it does over a monitor: commands in order, several in one
// write, descriptors, events, a reset of the parser.
//
// Two goroutines write to the socket: serve, and libvirt's reader, which brings
// events. QEMU announces STOP before it answers stop, and callers tell by it
// whether it was them who stopped the machine; libvirt brings the two by
// different ways. The reply, and those after it, are therefore held until the
// event is through.
type relay struct {
	lib    *libvirt.Client
	dom    libvirt.Domain
	conn   *net.UnixConn
	ctx    context.Context
	cancel context.CancelFunc
	done   chan struct{} // serve has ended
	files  []*os.File    // received, not yet used by a command

	mu       sync.Mutex // orders what is written, and guards what follows
	awaiting string     // an event without which no reply goes out
	held     [][]byte
	timer    *time.Timer
}

const (
	// eventPatience is how long a reply is held for its event.
	eventPatience = time.Second
	relayWrite    = 2 * time.Second // a client always reads
	maxRelayFiles = 4
)

// newRelayed makes a client over a domain's daemon; m's client belongs to it,
// also on failure.
func newRelayed(ctx context.Context, m Managed, e Endpoint) (_ *Client, err error) {
	var r *relay
	defer func() {
		if err != nil && r == nil {
			_ = m.Client.Close()
		}
	}()
	v, err := m.Client.Version(ctx)
	if err != nil {
		return nil, err
	}
	if v < libvirt.FilesVersion {
		return nil, errOldLibvirt
	}
	ours, theirs, err := connPair()
	if err != nil {
		return nil, err
	}
	r = &relay{lib: m.Client, dom: m.Domain, conn: theirs, done: make(chan struct{})}
	r.ctx, r.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go r.serve() // joined by Client.Close
	c, err := newClient(ctx, ours, e, negotiationTimeout, nil)
	if err != nil {
		r.close()
		return nil, err
	}
	c.relay = r
	return c, nil
}

func connPair() (a, b *net.UnixConn, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	x, err := connOf(fds[0])
	if err != nil {
		_ = unix.Close(fds[1])
		return nil, nil, err
	}
	y, err := connOf(fds[1])
	if err != nil {
		return nil, nil, errors.Join(err, x.Close())
	}
	return x.(*net.UnixConn), y.(*net.UnixConn), nil // made as unix sockets
}

// close ends the relay after its client's end was closed, or instead of that.
func (r *relay) close() {
	r.cancel()
	_ = r.conn.Close()
	<-r.done
	_ = r.lib.Close() // nothing is under way any more
}

// serve greets and then carries out what the client says until it leaves.
func (r *relay) serve() {
	defer close(r.done)
	// To the client this is the end of the connection, whatever the cause.
	defer r.conn.Close()
	defer func() {
		for _, f := range r.files {
			f.Close()
		}
		r.mu.Lock()
		defer r.mu.Unlock()
		if r.timer != nil {
			r.timer.Stop()
		}
	}()
	if r.greet() != nil {
		return
	}
	s := newSplitter()
	oob := make([]byte, unix.CmsgSpace(4*maxRelayFiles))
	for {
		buf, err := s.space()
		if err != nil {
			return
		}
		n, oobn, _, _, err := r.conn.ReadMsgUnix(buf, oob)
		if err != nil || n == 0 || r.take(oob[:oobn]) != nil {
			return
		}
		// A byte that JSON never has resets QEMU's parser.
		if i := bytes.LastIndexByte(buf[:n], 0xff); i >= 0 {
			rest := slices.Clone(buf[i+1 : n])
			s = newSplitter()
			if buf, err = s.space(); err != nil {
				return
			}
			n = copy(buf, rest)
		}
		s.fill(n)
		for {
			msg, err := s.next()
			if err != nil {
				return
			}
			if msg == nil {
				break
			}
			if r.command(msg) != nil {
				return
			}
		}
	}
}

// take keeps descriptors for the command that uses them.
func (r *relay) take(oob []byte) error {
	if len(oob) == 0 {
		return nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return err
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return err
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			r.files = append(r.files, os.NewFile(uintptr(fd), "passed"))
		}
	}
	if len(r.files) > maxRelayFiles {
		return errors.New("more descriptors than commands")
	}
	return nil
}

// greet says what QEMU would, and registers for its events.
func (r *relay) greet() error {
	if err := r.lib.Watch(r.ctx, r.dom, r.event); err != nil {
		return err
	}
	text, err := r.lib.Monitor(r.ctx, r.dom, `{"execute":"query-version"}`, nil)
	if err != nil {
		return err
	}
	m, ok := parseMessage([]byte(text))
	if !ok || m.ret == nil {
		return fmt.Errorf("%w: %.80q", ErrProtocol, text)
	}
	return r.write(fmt.Appendf(nil, `{"QMP":{"version":%s,"capabilities":[]}}`+"\n", m.ret))
}

// command carries out one command. An error ends the session.
func (r *relay) command(msg []byte) error {
	var in struct {
		Execute   string          `json:"execute"`
		Arguments json.RawMessage `json:"arguments"`
		ID        json.RawMessage `json:"id"`
	}
	if err := json.Unmarshal(msg, &in); err != nil {
		return err
	}
	var file *os.File
	switch in.Execute {
	case "qmp_capabilities": // libvirt has done that
		return r.reply(in.ID, "return", []byte("{}"))
	case "getfd", "add-fd":
		if len(r.files) > 0 {
			file, r.files = r.files[0], r.files[1:]
			defer file.Close()
		}
	case "stop":
		running, err := r.running()
		if err != nil {
			return r.failed(in.ID, err)
		}
		if running {
			r.await("STOP")
		}
	case "cont":
		// Who pauses the domain through libvirt wants it to stay so.
		state, reason, err := r.lib.State(r.ctx, r.dom)
		if err != nil {
			return r.failed(in.ID, err)
		}
		if state == libvirt.Paused && reason != libvirt.PausedUnknown {
			return r.reply(in.ID, "error", fmt.Appendf(nil,
				`{"class":%q,"desc":"the domain was paused through libvirt (reason %d)"}`, ClassManagerPaused, reason))
		}
	}
	// Without an id: libvirt gives each command one of its own.
	var b bytes.Buffer
	name, err := json.Marshal(in.Execute)
	if err != nil {
		return err
	}
	fmt.Fprintf(&b, `{"execute":%s`, name)
	if in.Arguments != nil {
		fmt.Fprintf(&b, `,"arguments":%s`, in.Arguments)
	}
	b.WriteByte('}')
	text, err := r.lib.Monitor(r.ctx, r.dom, b.String(), file)
	if err != nil {
		return r.failed(in.ID, err)
	}
	m, ok := parseMessage([]byte(text))
	switch {
	case ok && m.ret != nil:
		return r.reply(in.ID, "return", m.ret)
	case ok && m.err != nil:
		r.unawait()
		return r.reply(in.ID, "error", m.err)
	}
	return fmt.Errorf("%w: %.80q", ErrProtocol, text)
}

// running asks whether the machine runs, for what stop is going to change.
func (r *relay) running() (bool, error) {
	text, err := r.lib.Monitor(r.ctx, r.dom, `{"execute":"query-status"}`, nil)
	if err != nil {
		return false, err
	}
	var out struct {
		Return struct{ Running bool }
	}
	err = json.Unmarshal([]byte(text), &out)
	return out.Return.Running, err
}

// failed answers with libvirt's refusal. A domain that has no QEMU any more, and
// a connection that was lost, end the session.
func (r *relay) failed(id []byte, err error) error {
	r.unawait()
	refused, ok := errors.AsType[*libvirt.Error](err)
	if !ok || libvirt.IsNoDomain(err) || libvirt.IsNotRunning(err) {
		return err
	}
	class := ClassLibvirt
	if libvirt.IsBusy(err) {
		class = ClassLibvirtBusy
	}
	body, err := json.Marshal(Error{Class: class, Desc: refused.Message})
	if err != nil {
		return err
	}
	return r.reply(id, "error", body)
}

func (r *relay) reply(id []byte, kind string, body []byte) error {
	b := fmt.Appendf(nil, `{%q:%s`, kind, body)
	if id != nil {
		b = fmt.Appendf(b, `,"id":%s`, id)
	}
	return r.write(append(b, "}\n"...))
}

// write sends a reply, after those that are held.
func (r *relay) write(b []byte) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.awaiting != "" {
		r.held = append(r.held, b)
		return nil
	}
	return r.send(b)
}

// send is called with mu held.
func (r *relay) send(b []byte) error {
	if err := r.conn.SetWriteDeadline(time.Now().Add(relayWrite)); err != nil {
		return err
	}
	_, err := r.conn.Write(b)
	return err
}

// await holds all replies from now on until an event of this name was passed on,
// or does not come.
func (r *relay) await(name string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.awaiting = name
	if r.timer != nil {
		r.timer.Stop()
	}
	r.timer = time.AfterFunc(eventPatience, r.unawait)
}

func (r *relay) unawait() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.release()
}

// release is called with mu held. A failed write shows at the next read.
func (r *relay) release() {
	r.awaiting = ""
	for _, b := range r.held {
		_ = r.send(b)
	}
	r.held = nil
}

// event passes on what QEMU said by itself; libvirt's reader calls it.
func (r *relay) event(e libvirt.Event) {
	if e.Domain.UUID != r.dom.UUID || e.Details != "" && !json.Valid([]byte(e.Details)) {
		return
	}
	name, err := json.Marshal(e.Name)
	if err != nil {
		return
	}
	b := fmt.Appendf(nil, `{"timestamp":{"seconds":%d,"microseconds":%d},"event":%s`, e.Seconds, e.Micros, name)
	if e.Details != "" {
		b = fmt.Appendf(b, `,"data":%s`, e.Details)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	_ = r.send(append(b, "}\n"...))
	if e.Name == r.awaiting {
		r.timer.Stop()
		r.release()
	}
}
