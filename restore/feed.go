package restore

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/qmp"
)

// streamName is the stream's descriptor inside QEMU.
const streamName = "ckagent-stream"

// feed is a migration stream on its way into QEMU. It goes through a pipe: QEMU
// wants no plain files there, and a pipe ends by itself.
type feed struct {
	read  *os.File
	write *os.File
	rest  []byte // what did not fit into the pipe
	done  chan error
}

// newFeed fills a pipe with as much of the stream as it takes.
func newFeed(stream []byte) (*feed, error) {
	var p [2]int
	if err := unix.Pipe2(p[:], unix.O_CLOEXEC); err != nil {
		return nil, fmt.Errorf("pipe: %w", err)
	}
	// Large enough for all of it where the system allows; a larger stream is
	// written while QEMU reads.
	if size, err := unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, max(len(stream), 64<<10)); err != nil || size < len(stream) {
		_, _ = unix.FcntlInt(uintptr(p[1]), unix.F_SETPIPE_SZ, 1<<20)
	}
	size, err := unix.FcntlInt(uintptr(p[1]), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		size = 4096
	}
	f := &feed{read: os.NewFile(uintptr(p[0]), "stream"), rest: stream}
	if size >= len(stream) {
		n, err := unix.Write(p[1], stream)
		if err != nil {
			unix.Close(p[1])
			f.read.Close()
			return nil, fmt.Errorf("fill pipe: %w", err)
		}
		f.rest = stream[n:]
	}
	if len(f.rest) == 0 {
		unix.Close(p[1])
		return f, nil
	}
	// The writer polls, so that it can be interrupted.
	if err := unix.SetNonblock(p[1], true); err != nil {
		unix.Close(p[1])
		f.read.Close()
		return nil, fmt.Errorf("pipe: %w", err)
	}
	f.write = os.NewFile(uintptr(p[1]), "stream")
	return f, nil
}

// pump writes what is left; the goroutine is joined by close.
func (f *feed) pump() {
	if f.write == nil || f.done != nil {
		return
	}
	f.done = make(chan error, 1)
	go func() {
		_, err := f.write.Write(f.rest)
		f.done <- errors.Join(err, f.write.Close())
	}()
}

// close ends the feed; what QEMU has not read is lost.
func (f *feed) close() {
	f.read.Close()
	if f.write != nil {
		_ = f.write.SetWriteDeadline(unixEpoch)
		if f.done != nil {
			<-f.done
		} else {
			f.write.Close()
		}
	}
}

// unixEpoch is a deadline that has passed.
var unixEpoch = time.Unix(1, 0)

// handFeed gives QEMU its end and asks for events of the load.
func handFeed(ctx context.Context, c *qmp.Client, f *feed) error {
	if err := c.ExecuteFD(ctx, "getfd", map[string]string{"fdname": streamName}, nil, f.read); err != nil {
		return err
	}
	// Only QEMU may hold it from here on: its death then ends our writing.
	f.read.Close()
	return c.Execute(ctx, "migrate-set-capabilities", map[string]any{"capabilities": []any{
		map[string]any{"capability": "events", "state": true}}}, nil)
}

// loaded is when a device state was in and when the guest ran.
type loaded struct {
	at      time.Time // loaded
	running time.Time // zero if the guest stays paused
}

// load has QEMU read the stream, and the guest run as soon as it is in unless it is
// to stay paused.
func load(ctx context.Context, c *qmp.Client, f *feed, run bool) (loaded, error) {
	var l loaded
	incoming, err := qmp.Encode("migrate-incoming", map[string]string{"uri": "fd:" + streamName})
	if err != nil {
		return l, err
	}
	reqs := []*qmp.Request{incoming}
	if run {
		// While a migration comes in, cont means: run when it is complete.
		cont, err := qmp.Encode("cont", nil)
		if err != nil {
			return l, err
		}
		reqs = append(reqs, cont)
	}
	sub := c.Subscribe(64, "MIGRATION", "RESUME")
	defer sub.Close()
	calls, err := c.Send(reqs...)
	if err != nil {
		return l, err
	}
	f.pump()
	for _, k := range calls {
		if err := k.Wait(ctx, nil); err != nil {
			return l, err
		}
	}
	for l.at.IsZero() || run && l.running.IsZero() {
		select {
		case e, ok := <-sub.C():
			if !ok {
				return l, c.Err()
			}
			if e.Name == "RESUME" {
				l.running = e.Received
				continue
			}
			var d struct{ Status string }
			if err := json.Unmarshal(e.Data, &d); err != nil {
				return l, err
			}
			switch d.Status {
			case "completed":
				l.at = e.Received
			case "failed", "cancelled":
				return l, errLoad
			}
		case <-ctx.Done():
			return l, context.Cause(ctx)
		}
	}
	return l, nil
}

var (
	errLoad    = errors.New("QEMU could not load the device state")
	errTooSlow = errors.New("it took too long")
)

// loadError explains a failed load.
func loadError(q *qemu, ctx context.Context, err error) error {
	e := q.failed(ctx, "load the device state", err)
	var p *problem.Error
	if errors.As(e, &p) && p.Code == problem.Failed {
		p.Hint = "the machine started differs from the checkpointed one: compare the command line shown by --dry-run, the QEMU version and the accelerator"
	}
	return e
}
