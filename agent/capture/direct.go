package capture

import (
	"context"
	"sync/atomic"

	"golang.org/x/sync/errgroup"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/image"
)

const (
	directStep    = 1 << 20 / source.PageBytes // pages per read and write
	directWorkers = 2
)

// writeDirect reads the stopped VM's RAM and writes it to the image, in steps
// that workers take in turn.
func writeDirect(ctx context.Context, src *source.Source, w *image.Writer) error {
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
	for range directWorkers {
		g.Go(func() error {
			buf := make([]byte, directStep*source.PageBytes)
			var runs []source.Run
			for ctx.Err() == nil {
				k := next.Add(1) - 1
				if k >= int64(len(steps)) {
					return nil
				}
				s := steps[k]
				var err error
				if runs, err = src.Runs(s.block, s.first, s.n, runs[:0]); err != nil {
					return err
				}
				for _, r := range runs {
					if r.Zero {
						err = w.WriteZero(s.block, r.First, r.Pages)
					} else if err = src.Read(s.block, r.First, buf[:r.Pages*source.PageBytes]); err == nil {
						err = w.WritePages(s.block, r.First, buf[:r.Pages*source.PageBytes])
					}
					if err != nil {
						return err
					}
				}
			}
			return ctx.Err()
		})
	}
	return g.Wait()
}
