package image

import (
	"bytes"
	"fmt"
	"path/filepath"

	"github.com/cespare/xxhash/v2"

	"github.com/ckagent/ckagent/agent/image/fsys"
	"github.com/ckagent/ckagent/agent/problem"
)

// sliceBytes is how much is hashed before it is written. Small enough that the
// kernel's copy finds in the cache what the hash has just read, large enough that
// ext4 gets large folios: of 256 KiB, 512 KiB and 1 MiB this was the fastest.
const sliceBytes = 512 << 10

// maxParts is the most runs of pages worth writing in one slice.
const maxParts = sliceBytes / MinPageBytes

// frameBuffer is how many bytes of frames are collected before a write.
const frameBuffer = 256 << 10

// lane is what one call of WritePages owns while it runs. A file of its own,
// because the kernel lets one writer into a file at a time.
type lane struct {
	raw    *segment
	frames *segment
	parts  [][]byte // of the slice at hand
	partsN int      // bytes in parts
	part1  [1][]byte
	comp   *compressor
	out    []byte // frames not yet written
}

// takeLane hands out an idle lane, the last one used first (its buffers are
// warm and fewer segments come into being); it waits if all are in use.
func (w *Writer) takeLane() (*lane, error) {
	p := &w.lanes
	p.Lock()
	defer p.Unlock()
	for len(p.free) == 0 && p.made == w.o.Lanes {
		p.idle.Wait()
	}
	if n := len(p.free); n > 0 {
		l := p.free[n-1]
		p.free = p.free[:n-1]
		return l, nil
	}
	l := &lane{parts: make([][]byte, 0, maxParts)}
	if w.codec != 0 {
		c, err := newCompressor(w.codec)
		if err != nil {
			return nil, problem.New(problem.Failed, "start compression", w.dir, "%w", err)
		}
		l.comp, l.out = c, make([]byte, 0, frameBuffer)
	}
	p.made++
	return l, nil
}

func (w *Writer) putLane(l *lane) {
	p := &w.lanes
	p.Lock()
	p.free = append(p.free, l)
	p.Unlock()
	p.idle.Signal()
}

// room makes sure that *s is a segment with room for n more bytes.
func (w *Writer) room(s **segment, kind SegmentKind, n int) error {
	if *s != nil && (*s).size+uint64(n) <= w.o.SegmentBytes {
		return nil
	}
	w.segs.Lock()
	defer w.segs.Unlock()
	index := len(w.segs.list)
	if index == MaxSegments {
		return problem.New(problem.Refused, "start segment", w.dir, "more than %d segments", MaxSegments)
	}
	name := fmt.Sprintf(segmentPattern, index)
	path := filepath.Join(w.dir, name)
	f, err := w.fs.Create(path)
	if err != nil {
		return fsys.Problem("start segment", path, err)
	}
	*s = &segment{index: index, path: path, name: name, kind: kind, f: f}
	w.segs.list = append(w.segs.list, *s)
	return nil
}

func (w *Writer) append(s *segment, bufs [][]byte, n int) error {
	if err := s.f.WriteVec(bufs, int64(s.size)); err != nil {
		return fsys.Problem("write segment", at(s.path, int64(s.size)), err)
	}
	s.size += uint64(n)
	if pending := s.size - s.started; w.o.WritebackBytes > 0 && pending >= uint64(w.o.WritebackBytes) {
		s.f.StartWriteback(int64(s.started), int64(pending))
		s.started = s.size
	}
	return nil
}

// write stores claimed pages and fills in their entries.
func (l *lane) write(w *Writer, block int, first uint64, data []byte) (zeros, stored uint64, err error) {
	page := int(w.blocks[block].PageBytes)
	step := max(sliceBytes, page)
	for len(data) > 0 {
		part := data[:min(step, len(data))]
		n := uint64(len(part) / page)
		var z, s uint64
		if w.codec == 0 {
			z, s, err = l.writeRaw(w, block, first, part)
		} else {
			z, s, err = l.writeFrames(w, block, first, part)
		}
		zeros, stored = zeros+z, stored+s
		if err != nil {
			break
		}
		first += n
		data = data[len(part):]
	}
	// Keep no reference to the caller's memory.
	clear(l.parts[:cap(l.parts)])
	l.parts, l.part1[0] = l.parts[:0], nil
	return zeros, stored, err
}

// writeRaw hashes one slice page by page and writes its runs of non-zero pages
// in one call, straight from the caller's memory.
func (l *lane) writeRaw(w *Writer, block int, first uint64, data []byte) (zeros, stored uint64, err error) {
	if err := w.room(&l.raw, SegmentRaw, len(data)); err != nil {
		return 0, 0, err
	}
	page := int(w.blocks[block].PageBytes)
	entries := w.entriesOf(block, first, uint64(len(data)/page))
	zero := zeroPage[:page]
	zeroSum := w.zeroSum[block]
	off := l.raw.size
	l.parts = l.parts[:0]
	run := 0 // start of the run of non-zero pages that ends here
	for i := 0; i < len(data); i += page {
		p := data[i : i+page]
		if p[0] == 0 && bytes.Equal(p, zero) {
			putEntry(entries, zeroLocation, zeroSum)
			zeros++
			if i > run {
				l.parts = append(l.parts, data[run:i])
			}
			run = i + page
		} else {
			putEntry(entries, rawLocation(l.raw.index, off), xxhash.Sum64(p))
			off += uint64(page)
		}
		entries = entries[entryBytes:]
	}
	if run < len(data) {
		l.parts = append(l.parts, data[run:])
	}
	stored = off - l.raw.size
	if stored == 0 {
		return zeros, 0, nil
	}
	return zeros, stored, w.append(l.raw, l.parts, int(stored))
}

// writeFrames compresses one slice, a frame at a time; what does not shrink goes
// to the raw segment.
func (l *lane) writeFrames(w *Writer, block int, first uint64, data []byte) (zeros, stored uint64, err error) {
	b := w.blocks[block]
	page := int(b.PageBytes)
	entries := w.entriesOf(block, first, uint64(len(data)/page))
	l.parts, l.partsN = l.parts[:0], 0
	for i := 0; i < len(data); {
		if IsZero(data[i : i+page]) {
			putEntry(entries[i/page*entryBytes:], zeroLocation, w.zeroSum[block])
			zeros++
			i += page
			continue
		}
		end := i + page
		for end < len(data) && (end-i)/page < framePages(b.PageBytes) && !IsZero(data[end:end+page]) {
			end += page
		}
		n, err := l.frame(w, b, data[i:end], entries[i/page*entryBytes:])
		stored += n
		if err != nil {
			return zeros, stored, err
		}
		i = end
	}
	if err := l.flushRaw(w); err != nil {
		return zeros, stored, err
	}
	return zeros, stored, l.flush(w)
}

// frame stores one run of non-zero pages, at most a frame's worth.
func (l *lane) frame(w *Writer, b Block, run, entries []byte) (stored uint64, err error) {
	page := int(b.PageBytes)
	if f := l.comp.frame(run, pageShift(b.PageBytes)); f != nil {
		if len(l.out)+len(f) > cap(l.out) ||
			l.frames != nil && l.frames.size+uint64(len(l.out)+len(f)) > w.o.SegmentBytes {
			// Also before another segment: what is collected has its place in this one.
			if err := l.flush(w); err != nil {
				return 0, err
			}
		}
		if err := w.room(&l.frames, SegmentFrames, len(l.out)+len(f)); err != nil {
			return 0, err
		}
		off := l.frames.size + uint64(len(l.out))
		for i := 0; i*page < len(run); i++ {
			putEntry(entries[i*entryBytes:], frameLocation(l.frames.index, off, i), xxhash.Sum64(run[i*page:(i+1)*page]))
		}
		if len(f) > cap(l.out) { // a huge page: too large to collect
			l.part1[0] = f
			return uint64(len(f)), w.append(l.frames, l.part1[:], len(f))
		}
		l.out = append(l.out, f...)
		return uint64(len(f)), nil
	}
	if l.partsN > 0 && l.raw.size+uint64(l.partsN+len(run)) > w.o.SegmentBytes {
		if err := l.flushRaw(w); err != nil {
			return 0, err
		}
	}
	if err := w.room(&l.raw, SegmentRaw, l.partsN+len(run)); err != nil {
		return 0, err
	}
	off := l.raw.size + uint64(l.partsN)
	for i := 0; i*page < len(run); i++ {
		putEntry(entries[i*entryBytes:], rawLocation(l.raw.index, off+uint64(i*page)), xxhash.Sum64(run[i*page:(i+1)*page]))
	}
	l.parts = append(l.parts, run)
	l.partsN += len(run)
	return uint64(len(run)), nil
}

// flushRaw writes the runs that did not shrink.
func (l *lane) flushRaw(w *Writer) error {
	if l.partsN == 0 {
		return nil
	}
	err := w.append(l.raw, l.parts, l.partsN)
	l.parts, l.partsN = l.parts[:0], 0
	return err
}

// flush writes the collected frames.
func (l *lane) flush(w *Writer) error {
	if len(l.out) == 0 {
		return nil
	}
	l.part1[0] = l.out
	n := len(l.out)
	l.out = l.out[:0]
	return w.append(l.frames, l.part1[:], n)
}
