package capture

import (
	"context"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/affinity"
	"github.com/ckagent/ckagent/agent/capture/arena"
	"github.com/ckagent/ckagent/agent/image"
)

// drainer moves captured pages from an arena to an image, one goroutine per ring.
type drainer struct {
	w     *image.Writer
	vcpus affinity.VCPUs // to stay away from
	pace  func(ctx context.Context, bytes int, urgent bool) error

	mu  sync.Mutex
	hot image.HotRuns // what the guest wrote first, in that order
}

const (
	drainPoll = 50 * time.Millisecond // how soon an idle ring sees a cancel
	drainNice = 5
)

// run returns when every ring has ended, or with the first error.
func (d *drainer) run(ctx context.Context, a *arena.Arena) error {
	g, ctx := errgroup.WithContext(ctx)
	for i := range a.Rings() {
		g.Go(func() error { return d.ring(ctx, a.Ring(i)) })
	}
	return g.Wait()
}

func (d *drainer) ring(ctx context.Context, r *arena.Ring) error {
	// The guest comes first. The thread ends with us, and its priority with it.
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), drainNice) // a preference, not a need
	thread := d.vcpus.Thread()
	for ctx.Err() == nil {
		thread.Keep()
		rec, ok, done, err := r.Next(drainPoll)
		if err != nil || done {
			return err
		}
		if !ok {
			continue
		}
		if rec.Origin == arena.ByFault {
			d.noteHot(rec)
		}
		// Behind a full ring of faults a guest waits; behind the scanner's nobody does.
		if err := d.pace(ctx, len(rec.Data), rec.Origin == arena.ByFault); err != nil {
			return err
		}
		switch {
		case rec.Same:
			err = d.w.WriteUnchanged(rec.Block, rec.First, rec.Pages)
		case rec.Data == nil:
			err = d.w.WriteZero(rec.Block, rec.First, rec.Pages)
		default:
			err = d.w.WritePages(rec.Block, rec.First, rec.Data)
		}
		if err != nil {
			return err
		}
		r.Done()
	}
	return ctx.Err()
}

// noteHot remembers what a restore should fetch first.
func (d *drainer) noteHot(rec arena.Record) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if n := len(d.hot); n > 0 && d.hot[n-1].Block == rec.Block && d.hot[n-1].End() == rec.First {
		d.hot[n-1].Pages += rec.Pages
		return
	}
	if len(d.hot) < image.MaxHotRuns {
		d.hot = append(d.hot, image.PageRun{Block: rec.Block, First: rec.First, Pages: rec.Pages})
	}
}
