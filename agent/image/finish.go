package image

import (
	"context"
	"io"
	"path/filepath"

	"github.com/cespare/xxhash/v2"
	"golang.org/x/sync/errgroup"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// WriteDeviceState stores the device state, once; Finish makes it durable.
func (w *Writer) WriteDeviceState(r io.Reader) error {
	const op = "write device state"
	w.life.RLock()
	defer w.life.RUnlock()
	if err := w.usable(); err != nil {
		return err
	}
	w.state.Lock()
	defer w.state.Unlock()
	path := filepath.Join(w.dir, deviceStateName)
	if w.state.written {
		return w.fail(problem.New(problem.Failed, op, path, "written twice"))
	}
	w.state.written = true
	data, err := io.ReadAll(io.LimitReader(r, MaxDeviceStateBytes+1))
	if err != nil {
		return w.fail(problem.New(problem.Failed, op, path, "%w", err))
	}
	if len(data) > MaxDeviceStateBytes {
		return w.fail(problem.New(problem.Refused, op, path, "more than %d bytes", MaxDeviceStateBytes))
	}
	f, err := w.fs.Create(path)
	if err != nil {
		return w.fail(fsys.Problem(op, path, err))
	}
	w.state.f = f // Finish syncs it, along with the others
	if len(data) > 0 {
		if err := f.WriteVec([][]byte{data}, 0); err != nil {
			return w.fail(fsys.Problem(op, path, err))
		}
	}
	w.state.ref = FileRef{Name: deviceStateName, Bytes: uint64(len(data)), Checksum: Sum(data)}
	w.storedBytes.Add(uint64(len(data)))
	return nil
}

// Summary is what a finished Writer knows; Apply puts it into a manifest.
type Summary struct {
	Blocks      []Block
	DeviceState FileRef
	Pagemap     PagemapRef
	Segments    []Segment
	Tags        *TagsRef
	RAMBytes    uint64
	Pages       uint64
	ZeroPages   uint64
	StoredBytes uint64
}

// Apply sets the fields of a manifest that follow from the written files.
func (s Summary) Apply(m *Manifest) {
	m.Blocks, m.DeviceState, m.Pagemap, m.Segments, m.Tags = s.Blocks, s.DeviceState, s.Pagemap, s.Segments, s.Tags
	m.Stats.RAMBytes, m.Stats.Pages = s.RAMBytes, s.Pages
	m.Stats.ZeroPages, m.Stats.StoredBytes = s.ZeroPages, s.StoredBytes
}

// Finish writes the pagemap and makes every file durable. It fails with
// ErrIncomplete if a page or the device state was never written. Whatever it
// returns, the Writer is closed afterwards.
func (w *Writer) Finish(ctx context.Context) (Summary, error) {
	w.life.Lock()
	defer w.life.Unlock()
	if err := w.usable(); err != nil {
		w.close()
		return Summary{}, err
	}
	s, err := w.finish(ctx)
	if cerr := w.close(); err == nil {
		err = cerr
	}
	if err != nil {
		return Summary{}, w.fail(err)
	}
	return s, nil
}

func (w *Writer) finish(ctx context.Context) (Summary, error) {
	const op = "finish image"
	for i := range w.blocks {
		if m := w.Missing(i); len(m) > 0 {
			var n uint64
			for _, r := range m {
				n += r.Pages
			}
			return Summary{}, problem.New(problem.Failed, op, "RAMBlock "+w.blocks[i].Name,
				"%w: %d pages were never written, the first is %d", ErrIncomplete, n, m[0].First)
		}
	}
	if !w.state.written {
		return Summary{}, problem.New(problem.Failed, op, w.dir, "%w: no device state", ErrIncomplete)
	}
	if err := ctx.Err(); err != nil {
		return Summary{}, cancelled(op, w.dir, err)
	}
	s := Summary{Blocks: w.blocks, DeviceState: w.state.ref,
		Pages: w.layout.entries, ZeroPages: w.zeroPages.Load(), StoredBytes: w.state.ref.Bytes}
	for _, b := range w.blocks {
		s.RAMBytes += b.UsedBytes
	}
	if err := w.settleSegments(&s); err != nil {
		return Summary{}, err
	}
	var g errgroup.Group
	g.SetLimit(8)
	for _, seg := range w.segs.list {
		g.Go(func() error {
			if ctx.Err() != nil {
				return cancelled(op, w.dir, ctx.Err())
			}
			return fsys.Problem("sync segment", seg.path, seg.f.Sync())
		})
	}
	if w.state.f != nil {
		g.Go(func() error {
			return fsys.Problem("sync device state", filepath.Join(w.dir, deviceStateName), w.state.f.Sync())
		})
	}
	if w.tags != nil {
		g.Go(func() (err error) {
			s.Tags, err = w.writeTags()
			return err
		})
	}
	g.Go(func() (err error) {
		s.Pagemap, err = w.writePagemap(len(s.Segments))
		return err
	})
	if err := g.Wait(); err != nil {
		return Summary{}, err
	}
	s.StoredBytes += s.Pagemap.Bytes
	if s.Tags != nil {
		s.StoredBytes += s.Tags.Bytes
	}
	if err := w.fs.SyncDir(w.dir); err != nil {
		return Summary{}, fsys.Problem("sync directory", w.dir, err)
	}
	return s, nil
}

func (w *Writer) writePagemap(segments int) (PagemapRef, error) {
	const op = "write pagemap"
	name := w.fileName(pagemapName)
	path := filepath.Join(w.dir, name)
	sums := make([]uint64, 0, w.layout.chunks)
	for i := range w.blocks {
		e := w.entriesOf(i, 0, w.blocks[i].Pages())
		for len(e) > 0 {
			n := min(len(e), chunkBytes)
			sums = append(sums, xxhash.Sum64(e[:n]))
			e = e[n:]
		}
	}
	head := encodeHead(w.blocks, w.layout, segments, sums)
	if err := w.writeWhole(path, [][]byte{head, w.entries}); err != nil {
		return PagemapRef{}, fsys.Problem(op, path, err)
	}
	return PagemapRef{Name: name, Bytes: w.layout.fileBytes(),
		HeadBytes: w.layout.headBytes, HeadChecksum: Sum(head)}, nil
}

// writeWhole writes a file and makes its content durable.
func (w *Writer) writeWhole(path string, bufs [][]byte) error {
	f, err := w.fs.Create(path)
	if err != nil {
		return err
	}
	err = f.WriteVec(bufs, 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// Abort closes the files; the caller removes the directory. Harmless after
// Finish or another Abort.
func (w *Writer) Abort() {
	w.life.Lock()
	defer w.life.Unlock()
	w.close()
}

// close needs life held for writing.
func (w *Writer) close() error {
	if w.closed {
		return nil
	}
	w.closed = true
	var first error
	for _, s := range w.segs.list {
		if err := s.f.Close(); err != nil && first == nil {
			first = fsys.Problem("close segment", s.path, err)
		}
	}
	if w.state.f != nil {
		if err := w.state.f.Close(); err != nil && first == nil {
			first = fsys.Problem("close device state", w.dir, err)
		}
	}
	for _, l := range w.lanes.free { // all of them: no call is under way
		if l.comp != nil {
			l.comp.close()
		}
	}
	w.entries, w.tags, w.index, w.lanes.free = nil, nil, nil, nil
	return first
}
