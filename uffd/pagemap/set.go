package pagemap

import (
	"iter"
	"math/bits"
)

// Set is a set of page numbers 0..Len-1, one bit each. It is not safe for
// concurrent use; one owner at a time.
type Set struct {
	words []uint64
	n     uint64
}

// Run is Count consecutive pages from First on.
type Run struct {
	First, Count uint64
}

// NewSet makes an empty set for n pages.
func NewSet(n uint64) *Set { return &Set{words: make([]uint64, (n+63)/64), n: n} }

// Len is the number of pages the set can hold, in it or not.
func (s *Set) Len() uint64 { return s.n }

// Words is the bitmap itself, bit i of word w being page 64w+i; bits at and
// above Len are 0. Changing it changes the set.
func (s *Set) Words() []uint64 { return s.words }

// Has reports whether the page is in the set.
func (s *Set) Has(page uint64) bool { return page < s.n && s.words[page/64]>>(page%64)&1 != 0 }

// Add puts a page in and reports whether it was not there before. page < Len.
func (s *Set) Add(page uint64) bool {
	s.check(page)
	w, m := &s.words[page/64], uint64(1)<<(page%64)
	was := *w & m
	*w |= m
	return was == 0
}

// Remove takes a page out and reports whether it was there. page < Len.
func (s *Set) Remove(page uint64) bool {
	s.check(page)
	w, m := &s.words[page/64], uint64(1)<<(page%64)
	was := *w & m
	*w &^= m
	return was != 0
}

func (s *Set) check(page uint64) {
	if page >= s.n {
		panic("pagemap: page outside the set")
	}
}

// eachWord calls f with every word that [first, first+count) touches and the
// mask of the bits concerned.
func (s *Set) eachWord(first, count uint64, f func(w *uint64, mask uint64)) {
	if count == 0 {
		return
	}
	if first >= s.n || count > s.n-first {
		panic("pagemap: range outside the set")
	}
	last := first + count - 1
	for i := first / 64; i <= last/64; i++ {
		mask := ^uint64(0)
		if i == first/64 {
			mask &= ^uint64(0) << (first % 64)
		}
		if i == last/64 {
			mask &= ^uint64(0) >> (63 - last%64)
		}
		f(&s.words[i], mask)
	}
}

// AddRange puts count pages from first on in.
func (s *Set) AddRange(first, count uint64) {
	s.eachWord(first, count, func(w *uint64, m uint64) { *w |= m })
}

// RemoveRange takes count pages from first on out.
func (s *Set) RemoveRange(first, count uint64) {
	s.eachWord(first, count, func(w *uint64, m uint64) { *w &^= m })
}

// AddRegion puts the pages of a scanned region in, for a block that starts at
// virtual address base; what lies outside the block is ignored.
func (s *Set) AddRegion(base uint64, r Region) {
	start, end := max(r.Start, base), min(r.End, base+s.n*PageBytes)
	if start < end {
		s.AddRange((start-base)/PageBytes, (end-start)/PageBytes)
	}
}

// Count is the number of pages in the set.
func (s *Set) Count() uint64 {
	var c int
	for _, w := range s.words {
		c += bits.OnesCount64(w)
	}
	return uint64(c)
}

// CountRange is the number of pages of [first, first+count) in the set.
func (s *Set) CountRange(first, count uint64) uint64 {
	var c int
	s.eachWord(first, count, func(w *uint64, m uint64) { c += bits.OnesCount64(*w & m) })
	return uint64(c)
}

// Fill puts all pages in.
func (s *Set) Fill() { s.AddRange(0, s.n) }

// Clear takes all pages out.
func (s *Set) Clear() { clear(s.words) }

// Clone is a copy.
func (s *Set) Clone() *Set {
	return &Set{words: append([]uint64(nil), s.words...), n: s.n}
}

// Union adds the pages of o. Both have the same Len.
func (s *Set) Union(o *Set) {
	s.same(o)
	for i, w := range o.words {
		s.words[i] |= w
	}
}

// Subtract removes the pages of o. Both have the same Len.
func (s *Set) Subtract(o *Set) {
	s.same(o)
	for i, w := range o.words {
		s.words[i] &^= w
	}
}

// Intersect keeps only pages also in o. Both have the same Len.
func (s *Set) Intersect(o *Set) {
	s.same(o)
	for i, w := range o.words {
		s.words[i] &= w
	}
}

// Contains reports whether every page of o is in s. Both have the same Len.
func (s *Set) Contains(o *Set) bool {
	s.same(o)
	for i, w := range o.words {
		if w&^s.words[i] != 0 {
			return false
		}
	}
	return true
}

func (s *Set) same(o *Set) {
	if s.n != o.n {
		panic("pagemap: sets of different length")
	}
}

// Next is the first page >= from in the set, or false.
func (s *Set) Next(from uint64) (uint64, bool) { return s.next(from, 0) }

// NextAbsent is the first page >= from not in the set, or false.
func (s *Set) NextAbsent(from uint64) (uint64, bool) { return s.next(from, ^uint64(0)) }

// next finds the first set bit of the words xor flip.
func (s *Set) next(from, flip uint64) (uint64, bool) {
	if from >= s.n {
		return 0, false
	}
	i := from / 64
	w := (s.words[i] ^ flip) &^ (uint64(1)<<(from%64) - 1)
	for w == 0 {
		if i++; i >= uint64(len(s.words)) {
			return 0, false
		}
		w = s.words[i] ^ flip
	}
	p := i*64 + uint64(bits.TrailingZeros64(w))
	return p, p < s.n
}

// Runs are the maximal runs of pages in the set, ascending. The set must not
// change meanwhile, except behind the run just given.
func (s *Set) Runs() iter.Seq[Run] {
	return func(yield func(Run) bool) {
		for at := uint64(0); ; {
			first, ok := s.Next(at)
			if !ok {
				return
			}
			end, ok := s.NextAbsent(first)
			if !ok {
				end = s.n
			}
			if !yield(Run{first, end - first}) {
				return
			}
			at = end
		}
	}
}
