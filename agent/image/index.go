package image

import (
	"encoding/binary"
	"sync/atomic"
)

// tagIndex finds a page by its content: among the donors' pages, and among those that
// its Writer has stored so far. It is a hash table of open addressing with numbers of
// pages in it, at most half full and never enlarged, so that lanes search and insert
// without a lock.
type tagIndex struct {
	w     *Writer
	slots []atomic.Uint32 // number of a page + 1; 0: free
	mask  uint64
	limit int64 // most entries
	used  atomic.Int64

	// The donors' pages; their numbers follow those of the Writer's.
	tags      []Tag
	locations []location
	sums      []uint64
}

// maxIndexed bounds the pages that an index knows: 8 bytes for each, and 32 more for
// one of a donor. 2^22 of them are 16 GiB of content.
const maxIndexed = 1 << 22

// newTagIndex makes an index for the pages of a Writer and of donors.
func newTagIndex(w *Writer, donors int) *tagIndex {
	n := min(w.layout.entries+uint64(donors), maxIndexed)
	size := uint64(2)
	for size < 2*n {
		size *= 2
	}
	return &tagIndex{w: w, slots: make([]atomic.Uint32, size), mask: size - 1, limit: int64(size / 2)}
}

// tagOf is the tag of a numbered page. That of the Writer's own is final once its
// number is in a slot.
func (x *tagIndex) tagOf(number uint64) Tag {
	if own := x.w.layout.entries; number >= own {
		return x.tags[number-own]
	}
	return x.w.tagOf(number)
}

// find looks for a page with this tag.
func (x *tagIndex) find(t *Tag) (l location, sum uint64, ok bool) {
	for i := binary.LittleEndian.Uint64(t[:]) & x.mask; ; i = (i + 1) & x.mask {
		n := x.slots[i].Load()
		if n == 0 {
			return 0, 0, false
		}
		number := uint64(n - 1)
		if x.tagOf(number) != *t {
			continue
		}
		if own := x.w.layout.entries; number >= own {
			return x.locations[number-own], x.sums[number-own], true
		}
		l, sum = getEntry(x.w.entries[number*entryBytes:])
		return l, sum, true
	}
}

// add makes a page known whose tag and entry are final. A full index takes no more:
// what is not found is stored again, which costs room and nothing else.
func (x *tagIndex) add(number uint64) {
	if number >= 1<<32-1 || x.used.Add(1) > x.limit {
		return
	}
	t := x.tagOf(number)
	for i := binary.LittleEndian.Uint64(t[:]) & x.mask; ; i = (i + 1) & x.mask {
		if n := x.slots[i].Load(); n == 0 && x.slots[i].CompareAndSwap(0, uint32(number+1)) {
			return
		}
	}
}

// addDonor makes a page of another image known. Not concurrent with anything.
func (x *tagIndex) addDonor(t Tag, l location, sum uint64) {
	if int64(len(x.tags)) >= x.limit/2 {
		return // leave half of the room to the Writer's own
	}
	if _, _, known := x.find(&t); known {
		return
	}
	x.tags, x.locations, x.sums = append(x.tags, t), append(x.locations, l), append(x.sums, sum)
	x.add(x.w.layout.entries + uint64(len(x.tags)) - 1)
}
