package faultserver

import (
	"github.com/ckagent/ckagent/uffd/pagemap"
)

// What this file does rests on one rule: a page whose bit in pageTable.same is set was
// not marked again since the freeze of the capture before. So if it bears a mark, that is
// the mark it got then, and nobody has written or discarded it since. File-backed memory
// is left out: of what is discarded there the mark tells nothing.

// arm marks a piece of a block.
func (s *server) arm(_ *pageTable, start, length uint64) error {
	return s.h.WriteProtect(start, length)
}

// armChanged notes which pages of a piece bear their marks still, and marks the others.
func (s *server) armChanged(t *pageTable, start, length uint64) error {
	var regions [128]pagemap.Region
	at, end := start, start+length
	var failed error
	gap := func(to uint64) bool {
		if to > at {
			failed = s.h.WriteProtect(at, to-at)
		}
		return failed == nil
	}
	err := s.pm.Armed(start, end, regions[:], func(r pagemap.Region) bool {
		if !gap(r.Start) {
			return false
		}
		setRange(t.same, (r.Start-t.block.HVA)/pageBytes, r.Pages(pageBytes))
		at = r.End
		return true
	})
	if err == nil && failed == nil {
		gap(end)
	}
	if err != nil {
		return err
	}
	return failed
}

// changed notes that pages are about to be marked again, or were.
func (t *pageTable) changed(first, n uint64) {
	if t.same != nil {
		clearRange(t.same, first, n)
	}
}

// unchanged delivers the pages of the words [w, end) that were not written since the
// capture before, without a look at their content. It reports whether to go on.
func (c *kernelScanner) unchanged(block int, t *pageTable, w, end int) bool {
	if t.same == nil {
		return true
	}
	first := uint64(w) * wordPages
	n := min(uint64(end)*wordPages, t.block.Pages) - first
	return c.eachArmed(block, t, first, n, func(first, n uint64) bool {
		same := func(w int, mask uint64) uint64 { return t.same[w] & mask }
		return eachRun(first, n, same, func(first, n uint64) bool {
			return t.claimRuns(first, n, func(first, n uint64) bool {
				for !c.ring.PublishSame(block, first, n, reserveWait) {
					if c.over() {
						return false
					}
				}
				c.pages += n
				c.same += n
				c.e.settled(block, first, n)
				return true
			})
		})
	})
}

// unwritten are the pages of word w that were not written since the capture before.
func (t *pageTable) unwritten(w int) uint64 {
	if t.same == nil {
		return 0
	}
	return t.same[w]
}

// apart cuts a run short before the first page that was not written since the capture
// before; 0: it begins with one.
func (t *pageTable) apart(first, n uint64) uint64 {
	for i := range n {
		if p := first + i; t.unwritten(int(p/wordPages))>>(p%wordPages)&1 != 0 {
			return i
		}
	}
	return n
}
