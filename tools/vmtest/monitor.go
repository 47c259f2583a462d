package vmtest

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"
)

// Monitor is a plain QMP client for tests: one command at a time, all events
// kept. It shares no code with the agent's, so that each can contradict the
// other.
type Monitor struct {
	Version [3]int // major, minor, micro, as the greeting said
	conn    net.Conn
	replies chan reply
	done    chan struct{}
	one     sync.Mutex // held by the command under way

	mu      sync.Mutex
	events  []Event
	changed chan struct{} // closed and renewed with each event
	err     error
}

// Event is one QMP event.
type Event struct {
	Name     string
	At       time.Time // as QEMU stamped it
	Received time.Time
	Data     json.RawMessage
}

// maxEvents bounds what is kept; a stormy guest loses its oldest half.
const maxEvents = 4096

type reply struct {
	Return json.RawMessage
	Error  *struct{ Class, Desc string }
}

// DialMonitor connects to a QMP socket and negotiates.
func DialMonitor(ctx context.Context, path string) (*Monitor, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	m := &Monitor{conn: conn, replies: make(chan reply, 1), done: make(chan struct{}), changed: make(chan struct{})}
	greeted := make(chan struct{})
	go m.read(greeted)
	select {
	case <-greeted:
	case <-ctx.Done():
		m.Close()
		return nil, ctx.Err()
	case <-m.done:
		return nil, fmt.Errorf("QMP greeting: %w", m.failure())
	}
	if err := m.Execute(ctx, "qmp_capabilities", nil, nil); err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

func (m *Monitor) failure() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

func (m *Monitor) read(greeted chan struct{}) {
	defer close(m.done)
	r := json.NewDecoder(bufio.NewReaderSize(m.conn, 1<<16))
	for {
		var msg struct {
			reply
			QMP *struct {
				Version struct {
					Qemu struct{ Major, Minor, Micro int }
				}
			}
			Event     string
			Data      json.RawMessage
			Timestamp struct{ Seconds, Microseconds int64 }
		}
		if err := r.Decode(&msg); err != nil {
			m.mu.Lock()
			m.err = fmt.Errorf("QMP connection: %w", err)
			m.mu.Unlock()
			return
		}
		switch {
		case msg.QMP != nil:
			q := msg.QMP.Version.Qemu
			m.Version = [3]int{q.Major, q.Minor, q.Micro}
			close(greeted)
		case msg.Event != "":
			m.mu.Lock()
			if len(m.events) >= maxEvents {
				m.events = append([]Event(nil), m.events[maxEvents/2:]...)
			}
			m.events = append(m.events, Event{Name: msg.Event, Data: msg.Data, Received: time.Now(),
				At: time.Unix(msg.Timestamp.Seconds, msg.Timestamp.Microseconds*1000)})
			close(m.changed)
			m.changed = make(chan struct{})
			m.mu.Unlock()
		default:
			select { // a reply nobody waits for any more is dropped
			case m.replies <- msg.reply:
			default:
			}
		}
	}
}

// Execute runs one command; out may be nil. After a context ended during a
// command the connection is out of step and closed.
func (m *Monitor) Execute(ctx context.Context, command string, args, out any) error {
	m.one.Lock()
	defer m.one.Unlock()
	req := map[string]any{"execute": command}
	if args != nil {
		req["arguments"] = args
	}
	b, err := json.Marshal(req)
	if err != nil {
		return err
	}
	if _, err := m.conn.Write(append(b, '\n')); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	select {
	case r := <-m.replies:
		if r.Error != nil {
			return fmt.Errorf("QMP %s: %s: %s", command, r.Error.Class, r.Error.Desc)
		}
		if out == nil {
			return nil
		}
		return json.Unmarshal(r.Return, out)
	case <-ctx.Done():
		m.conn.Close()
		return fmt.Errorf("QMP %s: %w", command, ctx.Err())
	case <-m.done:
		return fmt.Errorf("QMP %s: %w", command, m.failure())
	}
}

// HMP runs a line of the human monitor.
func (m *Monitor) HMP(ctx context.Context, line string) (out string, err error) {
	err = m.Execute(ctx, "human-monitor-command", map[string]string{"command-line": line}, &out)
	return out, err
}

// Events returns what has come so far.
func (m *Monitor) Events() []Event {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]Event(nil), m.events...)
}

// AwaitEvent returns the first event of the name received at or after since.
func (m *Monitor) AwaitEvent(ctx context.Context, name string, since time.Time) (Event, error) {
	for {
		m.mu.Lock()
		changed := m.changed
		for _, e := range m.events {
			if e.Name == name && !e.Received.Before(since) {
				m.mu.Unlock()
				return e, nil
			}
		}
		m.mu.Unlock()
		select {
		case <-changed:
		case <-ctx.Done():
			return Event{}, fmt.Errorf("wait for event %s: %w", name, ctx.Err())
		case <-m.done:
			return Event{}, fmt.Errorf("wait for event %s: %w", name, m.failure())
		}
	}
}

// Close hangs up and waits for the reader.
func (m *Monitor) Close() error {
	err := m.conn.Close()
	<-m.done
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
