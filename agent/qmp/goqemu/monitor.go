package goqemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"

	upstream "github.com/digitalocean/go-qemu/qmp"

	"github.com/ckagent/ckagent/agent/qmp"
)

// eventQueue is how many events a go-qemu consumer may fall behind.
const eventQueue = 1024

var _ upstream.Monitor = (*Monitor)(nil)

// Monitor is a qmp.Client seen through go-qemu's interface.
type Monitor struct {
	c     *qmp.Client
	pumps sync.WaitGroup // one per Events, joined by Disconnect
}

// New returns a monitor for raw.NewMonitor and everything else built on
// go-qemu's interface. The client belongs to the monitor from now on in so far
// as Disconnect closes it; commands of both may be mixed freely.
func New(c *qmp.Client) *Monitor { return &Monitor{c: c} }

// Connect finds the session already negotiated; it fails if it has ended.
func (m *Monitor) Connect() error { return m.c.Err() }

// Disconnect gives the monitor back and ends every stream of events.
func (m *Monitor) Disconnect() error {
	err := m.c.Close()
	m.pumps.Wait()
	return err
}

// Run executes a command given as JSON and returns the whole reply. As the
// interface has no context it waits for as long as the connection lasts.
func (m *Monitor) Run(command []byte) ([]byte, error) { return m.RunWithFile(command, nil) }

// RunWithFile is Run with a descriptor passed along.
func (m *Monitor) RunWithFile(command []byte, file *os.File) ([]byte, error) {
	var in struct {
		Execute   string          `json:"execute"`
		Arguments json.RawMessage `json:"arguments"`
		ID        json.RawMessage `json:"id"`
	}
	if err := json.Unmarshal(command, &in); err != nil {
		return nil, fmt.Errorf("qmp command: %w", err)
	}
	if in.Execute == "" {
		return nil, errors.New("qmp command without the member execute")
	}
	var args any
	if in.Arguments != nil {
		args = in.Arguments
	}
	var files []*os.File
	if file != nil {
		files = append(files, file)
	}
	out := struct {
		Return json.RawMessage `json:"return"`
		ID     json.RawMessage `json:"id,omitempty"`
	}{ID: in.ID}
	if err := m.c.ExecuteFD(context.Background(), in.Execute, args, &out.Return, files...); err != nil {
		return nil, err
	}
	return json.Marshal(out)
}

// Events streams events until ctx ends or the connection does. The channel is
// closed then.
func (m *Monitor) Events(ctx context.Context) (<-chan upstream.Event, error) {
	if err := m.c.Err(); err != nil {
		return nil, err
	}
	sub := m.c.Subscribe(eventQueue)
	out := make(chan upstream.Event)
	m.pumps.Go(func() {
		defer close(out)
		defer sub.Close()
		for {
			select {
			case <-ctx.Done():
				return
			case e, ok := <-sub.C():
				if !ok {
					return
				}
				ge := upstream.Event{Event: e.Name}
				_ = json.Unmarshal(e.Data, &ge.Data) // absent or an object, QEMU's schema says
				ge.Timestamp.Seconds = e.Timestamp.Unix()
				ge.Timestamp.Microseconds = int64(e.Timestamp.Nanosecond() / 1000)
				select {
				case out <- ge:
				case <-ctx.Done():
					return
				case <-m.c.Done():
					return
				}
			}
		}
	})
	return out, nil
}
