package qmp

import (
	"encoding/json"
	"slices"
	"sync"
	"time"
)

// Event is something QEMU said by itself.
type Event struct {
	Name      string
	Data      json.RawMessage // nil if it has none
	Timestamp time.Time       // QEMU's wall clock, microseconds
	Received  time.Time       // when read(2) returned with it, monotonic
}

// Subscription is a bounded queue of events. When it is full the oldest gives
// way and is counted. The channel is closed by Close and when the connection
// ends.
type Subscription struct {
	c     *Client
	names []string // none: all
	ch    chan Event

	mu      sync.Mutex // orders the reader's sends with close
	dropped uint64
	closed  bool
}

// Subscribe queues the events of these names (none: all) from now on; buf is
// how many are kept (at least 1).
func (c *Client) Subscribe(buf int, names ...string) *Subscription {
	s := &Subscription{c: c, names: slices.Clone(names), ch: make(chan Event, max(buf, 1))}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		s.closed = true
		close(s.ch)
		return s
	}
	// Copied on write: the reader walks the list without the lock.
	c.subs = append(slices.Clone(c.subs), s)
	return s
}

// C is where events arrive.
func (s *Subscription) C() <-chan Event { return s.ch }

// Dropped counts the events that gave way to newer ones.
func (s *Subscription) Dropped() uint64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropped
}

// Close ends the subscription and closes its channel. It may be called twice.
func (s *Subscription) Close() {
	c := s.c
	c.mu.Lock()
	if i := slices.Index(c.subs, s); i >= 0 {
		c.subs = slices.Delete(slices.Clone(c.subs), i, i+1)
	}
	c.mu.Unlock()
	s.end()
}

func (s *Subscription) end() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closed {
		s.closed = true
		close(s.ch)
	}
}

func (s *Subscription) wants(name string) bool {
	return len(s.names) == 0 || slices.Contains(s.names, name)
}

// push is called by the reader alone.
func (s *Subscription) push(e Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	for {
		select {
		case s.ch <- e:
			return
		default:
		}
		select {
		case <-s.ch:
			s.dropped++
		default: // the consumer was faster
		}
	}
}
