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

	// As many records as are there go into one write, up to these bounds: what the
	// guest wants to write comes page by page.
	batchRuns  = 128
	batchBytes = 256 << 10
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
	runs := make([]image.Run, 0, batchRuns)
	for ctx.Err() == nil {
		thread.Keep()
		rec, ok, done, err := r.Next(drainPoll)
		if err != nil || done {
			return err
		}
		runs = runs[:0]
		bytes, urgent := 0, false
		for ok && err == nil {
			urgent = urgent || rec.Origin == arena.ByFault
			switch {
			case rec.Same:
				err = d.w.WriteUnchanged(rec.Block, rec.First, rec.Pages)
			case rec.Data == nil:
				err = d.w.WriteZero(rec.Block, rec.First, rec.Pages)
			default:
				runs = append(runs, image.Run{Block: rec.Block, First: rec.First, Data: rec.Data})
				bytes += len(rec.Data)
			}
			if rec.Origin == arena.ByFault {
				d.noteHot(rec)
			}
			if err != nil || len(runs) == batchRuns || bytes >= batchBytes {
				break
			}
			rec, ok, _, _ = r.Next(0) // an end or an error comes again
		}
		// Behind a full ring of faults a guest waits; behind the scanner's nobody does.
		if err == nil {
			err = d.pace(ctx, bytes, urgent)
		}
		if err == nil {
			err = d.w.WriteRuns(runs)
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
