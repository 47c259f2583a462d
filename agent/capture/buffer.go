package capture

import (
	"context"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/capture/source"
	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/procstat"
)

// pageBuffer keeps the pages of a stopped VM in memory until they are written.
// It is allocated and made present before the pause.
type pageBuffer struct {
	mem  []byte
	used int
	runs []bufferedRun
}

type bufferedRun struct {
	block        int
	first, pages uint64
	offset       int // in mem, or what follows
}

// What a run without an offset is.
const (
	bufferedZero      = -1
	bufferedUnchanged = -2
)

// bufferSlack is room for what the guest populates between the estimate and the
// pause.
const bufferSlack = 64 << 20

// populateStep is how much memory is made present in one call: the call holds our
// address space's lock, and with it everything that has to grow or fault, the
// heartbeat that the guardian waits for included.
const populateStep = 4 << 20

// newPageBuffer allocates a buffer for what the VM holds now, and an eighth more.
func newPageBuffer(ctx context.Context, src *source.Source, limit uint64) (*pageBuffer, error) {
	var content uint64
	for i := range src.Blocks() {
		err := src.Each(i, func(r source.Run) {
			if !r.Zero {
				content += r.Pages * source.PageBytes
			}
		})
		if err != nil {
			return nil, fmt.Errorf("estimate the buffer: %w", err)
		}
	}
	if limit == 0 {
		available, err := procstat.AvailableMemory()
		if err != nil {
			return nil, err
		}
		limit = available / 2
	}
	size := content + content/8 + bufferSlack
	if size > limit {
		return nil, problem.New(problem.Refused, "buffer RAM", fmt.Sprintf("%d bytes", size),
			"the VM's pages and slack need more than the limit of %d bytes", limit).
			WithHint("use mode cow or stop, or raise the buffer's limit")
	}
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("buffer of %d bytes: %w", size, err)
	}
	// Huge pages make both the populating and the copying quicker; without them
	// it works as well.
	_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	b := &pageBuffer{mem: mem, runs: make([]bufferedRun, 0, 1<<16)}
	for at := 0; at < len(mem); at += populateStep {
		if err := ctx.Err(); err != nil {
			b.free()
			return nil, err
		}
		if err := unix.Madvise(mem[at:min(at+populateStep, len(mem))], unix.MADV_POPULATE_WRITE); err != nil {
			b.free()
			return nil, problem.New(problem.Refused, "buffer RAM", fmt.Sprintf("%d bytes", size), "%w", err).
				WithHint("the host lacks the memory; use mode cow or stop")
		}
	}
	return b, nil
}

func (b *pageBuffer) free() {
	if b.mem != nil {
		_ = unix.Munmap(b.mem) // of our own mapping: cannot fail
		b.mem = nil
	}
}

// fill copies the stopped VM's RAM.
func (b *pageBuffer) fill(ctx context.Context, src *source.Source, written *Written) error {
	const step = 64 << 20 / source.PageBytes
	var runs []pageRun
	var scratch []source.Run
	for i := range src.Blocks() {
		for first, end := uint64(0), src.Block(i).Pages; first < end; first += step {
			if err := ctx.Err(); err != nil {
				return err
			}
			var err error
			if runs, err = written.runs(src, i, first, min(step, end-first), runs[:0], &scratch); err != nil {
				return err
			}
			for _, r := range runs {
				if r.unchanged {
					b.runs = append(b.runs, bufferedRun{i, r.First, r.Pages, bufferedUnchanged})
					continue
				}
				if r.Zero {
					b.runs = append(b.runs, bufferedRun{i, r.First, r.Pages, bufferedZero})
					continue
				}
				n := int(r.Pages * source.PageBytes)
				if b.used+n > len(b.mem) {
					return problem.New(problem.Failed, "buffer RAM", "", "the guest filled more memory than the buffer's slack of %d bytes while it was prepared", bufferSlack).
						WithHint("take it again, or use mode cow")
				}
				if err := src.Read(i, r.First, b.mem[b.used:b.used+n]); err != nil {
					return err
				}
				b.runs = append(b.runs, bufferedRun{i, r.First, r.Pages, b.used})
				b.used += n
			}
		}
	}
	return nil
}

// write hands the buffered pages to the image.
func (b *pageBuffer) write(ctx context.Context, w *image.Writer, pace func(context.Context, int, bool) error) error {
	const step = 1 << 20
	for _, r := range b.runs {
		if r.offset == bufferedUnchanged {
			if err := w.WriteUnchanged(r.block, r.first, r.pages); err != nil {
				return err
			}
			continue
		}
		if r.offset == bufferedZero {
			if err := w.WriteZero(r.block, r.first, r.pages); err != nil {
				return err
			}
			continue
		}
		data := b.mem[r.offset:][:r.pages*source.PageBytes]
		for at := 0; at < len(data); at += step {
			if err := errors.Join(ctx.Err(), pace(ctx, min(step, len(data)-at), false)); err != nil {
				return err
			}
			if err := w.WritePages(r.block, r.first+uint64(at/source.PageBytes), data[at:min(at+step, len(data))]); err != nil {
				return err
			}
		}
	}
	return nil
}
