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

// sent reports whether all of the stream is in the pipe. Before that QEMU cannot
// have loaded it, and will not if the feed is closed.
func (f *feed) sent() bool {
	if f.write == nil {
		return true
	}
	if f.done == nil {
		return false
	}
	select {
	case err := <-f.done:
		f.done <- err // for close
		return err == nil
	default:
		return false
	}
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
	events, err := qmp.Encode("migrate-set-capabilities", map[string]any{"capabilities": []any{
		map[string]any{"capability": "events", "state": true}}})
	if err != nil {
		return err
	}
	asked, err := c.Send(events) // and the other right behind it
	if err != nil {
		return err
	}
	if err := c.ExecuteFD(ctx, "getfd", map[string]string{"fdname": streamName}, nil, f.read); err != nil {
		return err
	}
	// Only QEMU may hold it from here on: its death then ends our writing.
	f.read.Close()
	return asked[0].Wait(ctx, nil)
}

// loaded is when a device state was in and when the guest ran.
type loaded struct {
	at      time.Time // loaded
	running time.Time // zero if the guest stays paused
}

// settleWithin is how long the outcome of a load is awaited after the caller gave up.
const settleWithin = 2 * time.Second

// settling is a context for waiting for what was begun and cannot be taken back: the
// end of ctx ends it only after a while, in which the outcome mostly turns out. A
// limit that was exceeded was such a while already.
func settling(ctx context.Context) (context.Context, context.CancelFunc) {
	out, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		cause := context.Cause(ctx)
		if !errors.Is(cause, errTooSlow) {
			t := time.NewTimer(settleWithin)
			defer t.Stop()
			select {
			case <-t.C:
			case <-out.Done():
			}
		}
		cancel(cause)
	})
	return out, func() {
		cancel(nil)
		if !stop() {
			<-ended
		}
	}
}

// load has QEMU read the stream, and the guest run as soon as it is in unless it is
// to stay paused. If the guest was told to run, the end of ctx is not the end of the
// load: what becomes of it is awaited for a while. An error then does not mean that
// the guest does not run: see mayRun.
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
	if ctx.Err() != nil { // the last moment
		return l, context.Cause(ctx)
	}
	calls, err := c.Send(reqs...)
	if err != nil {
		return l, err
	}
	if run {
		var stop context.CancelFunc
		ctx, stop = settling(ctx)
		defer stop()
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

// mayRun reports whether the guest, which was told to run, may have done so although
// load returned err. It does not if QEMU said so, has ended, or lacks a part of the
// stream.
func mayRun(q *qemu, f *feed, err error) bool {
	var refused *qmp.Error
	if errors.Is(err, errLoad) || errors.As(err, &refused) || !f.sent() {
		return false
	}
	// One that is on its way out closes its monitor first.
	ctx, stop := context.WithTimeout(context.Background(), endPatience)
	defer stop()
	if errors.Is(err, qmp.ErrLost) {
		return q.proc.Wait(ctx) != nil
	}
	return q.proc.Alive()
}

// leftAlone is the error for a guest of which is not known whether it runs.
type leftAlone struct{ error }

func (e leftAlone) Unwrap() error { return e.error }

// loadError explains a failed load.
func (x *run) loadError(ctx context.Context, err error) error {
	e := x.q.failed(ctx, "load the device state", err)
	var p *problem.Error
	if !errors.As(e, &p) || p.Code != problem.Failed {
		return e
	}
	p.Hint = "the machine started differs from the checkpointed one: compare the command line shown by --dry-run, the QEMU version and the accelerator"
	if x.older {
		p.Code = problem.Refused
		p.Hint = "it is older than QEMU " + x.m.QEMU.Version + ", on which the checkpoint was taken: start that version or a newer one, --qemu PATH"
	}
	return e
}
