package image

import (
	"fmt"

	"github.com/cespare/xxhash/v2"
)

// chunk is a piece of the pagemap that matched its checksum.
type chunk struct{ entries []byte }

// entry looks a page up, reading its chunk if this is the first page of it.
func (r *Reader) entry(block int, page uint64) (location, uint64, error) {
	ci := r.layout.firstChunk[block] + page/chunkEntries
	c := r.chunks[ci].Load()
	if c == nil {
		var err error
		if c, err = r.loadChunk(block, page/chunkEntries); err != nil {
			return 0, 0, err
		}
	}
	l, sum := getEntry(c.entries[page%chunkEntries*entryBytes:])
	return l, sum, r.checkEntry(block, page, l, sum)
}

// checkEntry bounds what an entry says.
func (r *Reader) checkEntry(block int, page uint64, l location, sum uint64) error {
	if err := l.check(r.manifest.Segments, r.manifest.Blocks[block].PageBytes); err != nil {
		return r.entryError(block, page, err)
	}
	if l == zeroLocation && sum != r.zeroSum[block] {
		return r.entryError(block, page, fmt.Errorf("zero page with checksum %016x: expected %016x", sum, r.zeroSum[block]))
	}
	return nil
}

func (r *Reader) entryError(block int, page uint64, err error) error {
	off := r.layout.headBytes + (r.layout.firstEntry[block]+page)*entryBytes
	return corrupt("read pagemap", at(r.path(r.manifest.Pagemap.Name), int64(off)), "%s: %w", r.pageName(block, page), err)
}

func (r *Reader) pageName(block int, page uint64) string {
	return fmt.Sprintf("RAMBlock %s page %d", r.manifest.Blocks[block].Name, page)
}

// loadChunk reads and checks one chunk. Two callers may load the same one: both
// get the same content and one of them is kept.
func (r *Reader) loadChunk(block int, index uint64) (*chunk, error) {
	c, err := r.readChunk(block, index)
	if err != nil {
		return nil, err
	}
	ci := r.layout.firstChunk[block] + index
	if !r.chunks[ci].CompareAndSwap(nil, c) {
		return c, nil
	}
	p := &r.loaded
	p.Lock()
	defer p.Unlock()
	if len(p.ring) < cap(p.ring) {
		p.ring = append(p.ring, ci)
		return c, nil
	}
	r.chunks[p.ring[p.next]].Store(nil)
	p.ring[p.next] = ci
	p.next = (p.next + 1) % len(p.ring)
	return c, nil
}

func (r *Reader) readChunk(block int, index uint64) (*chunk, error) {
	first := index * chunkEntries
	n := min(r.manifest.Blocks[block].Pages()-first, chunkEntries)
	c := &chunk{entries: make([]byte, n*entryBytes)}
	off := int64(r.layout.headBytes + (r.layout.firstEntry[block]+first)*entryBytes)
	path := r.path(r.manifest.Pagemap.Name)
	if err := readFull("read pagemap", path, r.pagemap, c.entries, off); err != nil {
		return nil, err
	}
	want := r.sums[r.layout.firstChunk[block]+index]
	if got := xxhash.Sum64(c.entries); got != want {
		return nil, corrupt("read pagemap", at(path, off), "checksum of the chunk of %d entries is %016x: expected %016x", n, got, want)
	}
	return c, nil
}

// Extent says how many pages from first on, at most max, are alike: all recorded
// as zeros, or all stored. A pager plans with it without reading a page.
func (r *Reader) Extent(block int, first, max uint64) (pages uint64, zero bool, err error) {
	const op = "read pagemap"
	if err := r.enter(op); err != nil {
		return 0, false, err
	}
	defer r.life.RUnlock()
	if err := r.bounds(op, block, first, 0); err != nil {
		return 0, false, err
	}
	max = min(max, r.manifest.Blocks[block].Pages()-first)
	for ; pages < max; pages++ {
		l, _, err := r.entry(block, first+pages)
		if err != nil {
			return 0, false, err
		}
		if z := l.kind() == kindZero; pages == 0 {
			zero = z
		} else if z != zero {
			break
		}
	}
	return pages, zero, nil
}

// PageChecksum is the recorded xxHash64 of a page's content.
func (r *Reader) PageChecksum(block int, page uint64) (Checksum, error) {
	const op = "read pagemap"
	if err := r.enter(op); err != nil {
		return 0, err
	}
	defer r.life.RUnlock()
	if err := r.bounds(op, block, page, 1); err != nil {
		return 0, err
	}
	_, sum, err := r.entry(block, page)
	return Checksum(sum), err
}
