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

// directSlice is the same for writes past the page cache, which are as fast as they
// are large.
const directSlice = 2 << 20

// maxParts is the most runs of pages worth writing in one slice.
const maxParts = directSlice / MinPageBytes

// frameBuffer is how many bytes of frames are collected before a write.
const frameBuffer = 256 << 10

// lane is what one call of WritePages owns while it runs. A file of its own,
// because the kernel lets one writer into a file at a time.
type lane struct {
	raw    *segment
	frames *segment
	parts  [][]byte // pages that go to raw with the next write
	partsN int      // bytes in parts
	part1  [1][]byte
	run1   [1]Run
	tag    Tag // of the page at hand
	comp   *compressor
	out    []byte // frames not yet written
	chosen []int  // pages of the slice at hand that go into the next frame
	gather []byte // them, where they do not lie in a row
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
	index := len(w.base) + len(w.segs.list)
	if index == MaxSegments {
		return problem.New(problem.Refused, "start segment", w.dir, "more than %d segments", MaxSegments)
	}
	name := w.fileName(fmt.Sprintf(segmentPattern, len(w.segs.list)))
	path := filepath.Join(w.dir, name)
	f, err := w.fs.Create(path)
	if err != nil {
		return fsys.Problem("start segment", path, err)
	}
	if w.o.Direct {
		f.Direct()
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

// write stores claimed pages and fills in their entries. Short runs share a write.
func (l *lane) write(w *Writer, runs []Run) (zeros, stored uint64, err error) {
	for _, r := range runs {
		var z, s uint64
		z, s, err = l.put(w, r)
		zeros, stored = zeros+z, stored+s
		if err != nil {
			break
		}
	}
	if err == nil {
		err = l.flushRaw(w)
	}
	if err == nil {
		err = l.flush(w)
	}
	// Keep no reference to the caller's memory.
	clear(l.parts[:cap(l.parts)])
	l.parts, l.partsN, l.part1[0], l.run1[0].Data = l.parts[:0], 0, nil, nil
	return zeros, stored, err
}

// put takes one run in, a slice at a time.
func (l *lane) put(w *Writer, r Run) (zeros, stored uint64, err error) {
	page := int(w.blocks[r.Block].PageBytes)
	step := max(sliceBytes, page)
	if w.o.Direct {
		step = max(directSlice, page)
	}
	for data, first := r.Data, r.First; len(data) > 0; {
		part := data[:min(step, len(data))]
		n := len(part) / page
		if l.partsN+len(part) > step || len(l.parts)+n > maxParts {
			if err := l.flushRaw(w); err != nil {
				return zeros, stored, err
			}
		}
		var z, s uint64
		if w.codec == 0 {
			z, s, err = l.putRaw(w, r.Block, first, part)
		} else {
			z, s, err = l.putFrames(w, r.Block, first, part)
		}
		zeros, stored = zeros+z, stored+s
		if err != nil {
			return zeros, stored, err
		}
		first += uint64(n)
		data = data[len(part):]
	}
	return zeros, stored, nil
}

// putRaw hashes one slice page by page and notes its runs of non-zero pages for the
// next write, which takes them straight from the caller's memory.
func (l *lane) putRaw(w *Writer, block int, first uint64, data []byte) (zeros, stored uint64, err error) {
	page := int(w.blocks[block].PageBytes)
	number := w.layout.firstEntry[block] + first
	entries := w.entriesOf(block, first, uint64(len(data)/page))
	zero := zeroPage[:page]
	zeroSum := w.zeroSum[block]
	var off uint64
	run := 0 // start of the run of pages to store that ends here
	for i := 0; i < len(data); i, number, entries = i+page, number+1, entries[entryBytes:] {
		p := data[i : i+page]
		isZero := p[0] == 0 && bytes.Equal(p, zero)
		if isZero {
			putEntry(entries, zeroLocation, zeroSum)
			zeros++
		}
		if isZero || l.settled(w, number, p) {
			if i > run {
				l.parts = append(l.parts, data[run:i])
			}
			run = i + page
			continue
		}
		if stored == 0 { // the first one: only now is a segment needed
			if off, err = l.rawRoom(w, len(data)-i); err != nil {
				return zeros, 0, err
			}
		}
		putEntry(entries, rawLocation(l.raw.index, off+stored), xxhash.Sum64(p))
		w.known(number, 1, uint64(page))
		stored += uint64(page)
	}
	if run < len(data) {
		l.parts = append(l.parts, data[run:])
	}
	l.partsN += int(stored)
	return zeros, stored, nil
}

// rawRoom makes room for n bytes behind the parts that wait for the next write, and
// returns where they will lie in the raw segment.
func (l *lane) rawRoom(w *Writer, n int) (off uint64, err error) {
	if l.partsN > 0 && l.raw.size+uint64(l.partsN+n) > w.o.SegmentBytes {
		if err := l.flushRaw(w); err != nil { // what waits has its place in this one
			return 0, err
		}
	}
	if err := w.room(&l.raw, SegmentRaw, l.partsN+n); err != nil {
		return 0, err
	}
	return l.raw.size + uint64(l.partsN), nil
}

// putFrames compresses one slice, a frame at a time; what does not shrink goes
// to the raw segment.
func (l *lane) putFrames(w *Writer, block int, first uint64, data []byte) (zeros, stored uint64, err error) {
	b := w.blocks[block]
	page := int(b.PageBytes)
	number := w.layout.firstEntry[block] + first
	l.chosen = l.chosen[:0]
	put := func() error {
		n, err := l.frame(w, b, number, data)
		stored += n
		l.chosen = l.chosen[:0]
		return err
	}
	for i := range len(data) / page {
		p := data[i*page : (i+1)*page]
		isZero := IsZero(p)
		if isZero {
			putEntry(w.entries[(number+uint64(i))*entryBytes:], zeroLocation, w.zeroSum[block])
			zeros++
		}
		if !isZero && !l.settled(w, number+uint64(i), p) {
			if l.chosen = append(l.chosen, i); len(l.chosen) < framePages(b.PageBytes) {
				continue
			}
		} else if w.tags != nil {
			continue // a frame goes on behind pages that need none
		}
		if err := put(); err != nil {
			return zeros, stored, err
		}
	}
	return zeros, stored, put()
}

// frame stores the chosen pages of data, at most a frame's worth; number is that of
// data's first page.
func (l *lane) frame(w *Writer, b Block, number uint64, data []byte) (stored uint64, err error) {
	k := len(l.chosen)
	if k == 0 {
		return 0, nil
	}
	page := int(b.PageBytes)
	at := func(i int) []byte { return data[l.chosen[i]*page:][:page] }
	put := func(i int, place location) {
		n := number + uint64(l.chosen[i])
		putEntry(w.entries[n*entryBytes:], place, xxhash.Sum64(at(i)))
		w.known(n, 1, b.PageBytes)
	}
	content := data[l.chosen[0]*page : (l.chosen[k-1]+1)*page]
	if len(content) > k*page { // with gaps
		l.gather = l.gather[:0]
		for i := range k {
			l.gather = append(l.gather, at(i)...)
		}
		content = l.gather
	}
	if f := l.comp.frame(content, pageShift(b.PageBytes)); f != nil {
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
		for i := range k {
			put(i, frameLocation(l.frames.index, off, i))
		}
		if len(f) > cap(l.out) { // a huge page: too large to collect
			l.part1[0] = f
			return uint64(len(f)), w.append(l.frames, l.part1[:], len(f))
		}
		l.out = append(l.out, f...)
		return uint64(len(f)), nil
	}
	n := k * page
	off, err := l.rawRoom(w, n)
	if err != nil {
		return 0, err
	}
	for i := range k {
		put(i, rawLocation(l.raw.index, off+uint64(i*page)))
	}
	for i := 0; i < k; { // rows of pages, from where they lie
		row := i + 1
		for row < k && l.chosen[row] == l.chosen[row-1]+1 {
			row++
		}
		l.parts = append(l.parts, data[l.chosen[i]*page:(l.chosen[row-1]+1)*page])
		i = row
	}
	l.partsN += n
	return uint64(n), nil
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
