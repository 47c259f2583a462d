package ingest

import (
	"context"
	"errors"
	"os"

	"golang.org/x/sys/unix"

	"github.com/ckagent/ckagent/agent/image"
	"github.com/ckagent/ckagent/agent/problem"
	"github.com/ckagent/ckagent/agent/vm/ramstream"
)

// What is known of a page.
const (
	unsent = iota
	zero
	data
)

// spoolBytes is what is gathered for a write, and read at once.
const spoolBytes = 1 << 20

// spool takes the pages of a stream as they come, and gives them back in order. It
// is a ramstream.Sink.
type spool struct {
	f         *os.File
	dir       string
	blocks    []spoolBlock
	pages     uint64
	dataPages uint64 // that came with content, at least once
	resent    uint64

	buf []byte // pages that follow each other and were not written yet
	at  int64  // where the first of them belongs
}

type spoolBlock struct {
	name  string
	bytes uint64
	base  int64  // in the file
	state []byte // a page each
}

// newSpool makes a file that vanishes with its descriptor.
func newSpool(dir string) (*spool, error) {
	f, err := os.OpenFile(spoolPath(dir), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err == nil {
		if err = os.Remove(spoolPath(dir)); err != nil {
			err = errors.Join(err, f.Close())
		}
	}
	if err != nil {
		return nil, problem.New(problem.Store, "make spool", dir, "%w", err)
	}
	return &spool{f: f, dir: dir, buf: make([]byte, 0, spoolBytes)}, nil
}

func (s *spool) close() error { return s.f.Close() }

// failed is an error of the store's file system.
func (s *spool) failed(op string, err error) error {
	code := problem.Store
	if errors.Is(err, unix.EINVAL) {
		code = problem.Failed
	}
	return problem.New(code, op, s.dir, "%w", err)
}

// Blocks implements ramstream.Sink.
func (s *spool) Blocks(_ string, blocks []ramstream.Block) error {
	for _, b := range blocks {
		s.pages += b.UsedBytes / ramstream.PageBytes
	}
	if err := mayHold(s.pages); err != nil {
		return err
	}
	var base int64
	for _, b := range blocks {
		s.blocks = append(s.blocks, spoolBlock{b.Name, b.UsedBytes, base, make([]byte, b.UsedBytes/ramstream.PageBytes)})
		base += int64(b.UsedBytes)
	}
	return nil
}

// mark notes what a page is now.
func (s *spool) mark(block int, offset uint64, what byte) {
	p := &s.blocks[block].state[offset/ramstream.PageBytes]
	if *p != unsent {
		s.resent++
	}
	if *p == data {
		s.dataPages--
	}
	if *p = what; what == data {
		s.dataPages++
	}
}

// Page implements ramstream.Sink.
func (s *spool) Page(block int, offset uint64, content []byte) error {
	if image.IsZero(content) {
		return s.Zero(block, offset)
	}
	s.mark(block, offset, data)
	at := s.blocks[block].base + int64(offset)
	if len(s.buf) == cap(s.buf) || len(s.buf) > 0 && at != s.at+int64(len(s.buf)) {
		if err := s.flush(); err != nil {
			return err
		}
	}
	if len(s.buf) == 0 {
		s.at = at
	}
	s.buf = append(s.buf, content...)
	return nil
}

// Zero implements ramstream.Sink. What the file holds of the page no longer matters.
func (s *spool) Zero(block int, offset uint64) error {
	s.mark(block, offset, zero)
	return nil
}

func (s *spool) flush() error {
	if len(s.buf) == 0 {
		return nil
	}
	_, err := s.f.WriteAt(s.buf, s.at)
	s.buf = s.buf[:0]
	if err != nil {
		return s.failed("write spool", err)
	}
	return nil
}

// unsent is how many pages were in no record.
func (s *spool) unsent() (n uint64) {
	for i := range s.blocks {
		for _, p := range s.blocks[i].state {
			if p == unsent {
				n++
			}
		}
	}
	return n
}

// copyTo writes every page to an image, once.
func (s *spool) copyTo(ctx context.Context, w *image.Writer) error {
	if err := s.flush(); err != nil {
		return err
	}
	buf := s.buf[:cap(s.buf)]
	const step = spoolBytes / ramstream.PageBytes
	for i := range s.blocks {
		b := &s.blocks[i]
		for first := 0; first < len(b.state); {
			if err := ctx.Err(); err != nil {
				return context.Cause(ctx)
			}
			n := 1
			stored := b.state[first] == data
			for first+n < len(b.state) && (b.state[first+n] == data) == stored && (!stored || n < step) {
				n++
			}
			if !stored {
				if err := w.WriteZero(i, uint64(first), uint64(n)); err != nil {
					return err
				}
			} else {
				run := buf[:n*ramstream.PageBytes]
				if _, err := s.f.ReadAt(run, b.base+int64(first)*ramstream.PageBytes); err != nil {
					return s.failed("read spool", err)
				}
				if err := w.WritePages(i, uint64(first), run); err != nil {
					return err
				}
			}
			first += n
		}
	}
	return nil
}
