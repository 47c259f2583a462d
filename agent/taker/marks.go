package taker

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/ckagent/ckagent/agent/capture"
	"github.com/ckagent/ckagent/agent/passfd"
)

// marks is the way of what is tracked between checkpoints, from the daemon to the child and
// back. Only one of them has it, or it is on its way, so that it goes with whoever dies; a
// checkpoint that fails has none to give back. Of nil, nothing is tracked.
type marks struct{ conn *net.UnixConn }

// give gives away what there is, if anything.
func (m *marks) give(k *capture.Tracking) error {
	if m == nil {
		return nil
	}
	what, f := k.Give()
	var files []*os.File
	if f != nil {
		defer f.Close()
		files = append(files, f)
	}
	return passfd.Send(m.conn, what, files...)
}

// arrival is how long may pass until something arrives that has been sent.
const arrival = time.Second

// take takes what was given, which the other end has done already.
func (m *marks) take() (*capture.Tracking, error) {
	if err := m.conn.SetReadDeadline(time.Now().Add(arrival)); err != nil {
		return nil, err
	}
	var what capture.Marks
	files, err := passfd.Receive(m.conn, make([]byte, passfd.MaxBytes), &what)
	switch {
	case err != nil:
		return nil, fmt.Errorf("the marks of the last checkpoint: %w", err)
	case len(files) == 0:
		return &capture.Tracking{}, nil
	}
	return capture.Tracked(what, files[0]), passfd.Close(files[1:])
}

func (m *marks) close() error {
	if m == nil {
		return nil
	}
	return m.conn.Close()
}

// takeMarked is take for an order that comes with marks: what the child keeps of them when
// it has done goes back.
func takeMarked(ctx context.Context, o *Order, lock *os.File, l *Line, take Take) (*capture.Result, error) {
	conn, err := passfd.Inherited(markFD, "marks")
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	m := &marks{conn}
	if o.Capture.Track, err = m.take(); err != nil {
		return nil, err
	}
	res, err := take(ctx, o, lock, l)
	if err != nil {
		return nil, err
	}
	if err := m.give(o.Capture.Track); err != nil { // the next one reads everything
		res.Notes = append(res.Notes, err.Error())
	}
	return res, nil
}
