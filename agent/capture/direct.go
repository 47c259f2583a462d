package capture

import (
	"context"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
)

const directStep = 1 << 20 / source.PageBytes // pages per read and write

// storeStall is how long a store may take nothing while the VM stands still for it.
const storeStall = 10 * time.Second

// direct is one writing of a stopped VM's RAM to the image.
type direct struct {
	workers int          // threads of write
	steps   atomic.Int64 // done
	ended   chan struct{}
}

// run returns when work has, when ctx ends, or when no step was done for stall:
// a write that hangs in the kernel ends for nobody, and the VM must not wait for it.
// join waits for the rest.
func (d *direct) run(ctx context.Context, stall time.Duration, work func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	d.ended = make(chan struct{})
	var err error
	go func() { // joined by join
		defer close(d.ended)
		defer cancel()
		err = work(ctx)
	}()
	tick := time.NewTicker(stall)
	defer tick.Stop()
	for last := int64(0); ; {
		select {
		case <-d.ended:
			return err
		case <-ctx.Done():
			// It may be the work's own end.
			select {
			case <-d.ended:
				return err
			case <-time.After(cancelGrace):
				return ctx.Err()
			}
		case <-tick.C:
			now := d.steps.Load()
			if now == last {
				cancel()
				return problem.New(problem.Store, "write RAM", "", "the store took nothing for %v while the VM was stopped for it", stall).
					WithHint("the store hangs; the checkpoint was given up and the VM goes on")
			}
			last = now
		}
	}
}

// cancelGrace is how long a cancelled writing may take to end by itself.
const cancelGrace = 100 * time.Millisecond

// join waits until nothing is read or written any more.
func (d *direct) join() {
	if d.ended != nil {
		<-d.ended
	}
}

// write reads the stopped VM's RAM and writes it to the image, in steps that
// workers take in turn.
func (d *direct) write(ctx context.Context, src *source.Source, w *image.Writer, written *Written) error {
	type step struct {
		block    int
		first, n uint64
	}
	var steps []step
	for i := range src.Blocks() {
		for first, end := uint64(0), src.Block(i).Pages; first < end; first += directStep {
			steps = append(steps, step{i, first, min(directStep, end-first)})
		}
	}
	var next atomic.Int64
	g, ctx := errgroup.WithContext(ctx)
	for range d.workers {
		g.Go(func() error {
			buf := make([]byte, directStep*source.PageBytes)
			var runs []pageRun
			var scratch []source.Run
			for ctx.Err() == nil {
				k := next.Add(1) - 1
				if k >= int64(len(steps)) {
					return nil
				}
				s := steps[k]
				var err error
				if runs, err = written.runs(src, s.block, s.first, s.n, runs[:0], &scratch); err != nil {
					return err
				}
				for _, r := range runs {
					if r.unchanged {
						err = w.WriteUnchanged(s.block, r.First, r.Pages)
					} else if r.Zero {
						err = w.WriteZero(s.block, r.First, r.Pages)
					} else if err = src.Read(s.block, r.First, buf[:r.Pages*source.PageBytes]); err == nil {
						err = w.WritePages(s.block, r.First, buf[:r.Pages*source.PageBytes])
					}
					if err != nil {
						return err
					}
				}
				d.steps.Add(1)
			}
			return ctx.Err()
		})
	}
	return g.Wait()
}
