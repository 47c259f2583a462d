package order

import (
	"math/bits"
	"sync/atomic"
)

// Run is a row of pages of one block.
type Run struct {
	Block int    `json:"block"`
	First uint64 `json:"first"`
	Pages uint64 `json:"pages"`
}

// End is the page after the last.
func (r Run) End() uint64 { return r.First + r.Pages }

// plane is the bitmaps of one block, one bit a page.
type plane struct {
	pages  uint64
	needed []atomic.Uint64 // still to be brought in
	held   []atomic.Uint64 // needed, but not to be offered for now
}

// Need is the set of pages that still have to be brought in. All methods may be
// called concurrently.
type Need struct {
	blocks []plane
	left   atomic.Int64
	held   atomic.Int64
}

// NewNeed returns an empty set over blocks of so many pages.
func NewNeed(pages []uint64) *Need {
	n := &Need{blocks: make([]plane, len(pages))}
	for i, p := range pages {
		words := (p + 63) / 64
		n.blocks[i] = plane{pages: p, needed: make([]atomic.Uint64, words), held: make([]atomic.Uint64, words)}
	}
	return n
}

// Blocks is how many blocks there are, Pages how many pages one has.
func (n *Need) Blocks() int            { return len(n.blocks) }
func (n *Need) Pages(block int) uint64 { return n.blocks[block].pages }

// Left is how many pages are needed, held ones included; Held how many are held.
func (n *Need) Left() int64 { return n.left.Load() }
func (n *Need) Held() int64 { return n.held.Load() }

// clip bounds a run to its block.
func (n *Need) clip(r Run) Run {
	if r.Block < 0 || r.Block >= len(n.blocks) || r.First >= n.blocks[r.Block].pages {
		return Run{}
	}
	if max := n.blocks[r.Block].pages - r.First; r.Pages > max {
		r.Pages = max
	}
	return r
}

// eachWord calls f for every word the run touches with the mask of its bits there.
func eachWord(r Run, f func(word int, mask uint64)) {
	for p := r.First; p < r.End(); {
		word, bit := p/64, p%64
		count := min(64-bit, r.End()-p)
		mask := ^uint64(0)
		if count < 64 {
			mask = (1<<count - 1) << bit
		}
		f(int(word), mask)
		p += count
	}
}

// Add marks the pages of a run as needed and returns how many were not before.
func (n *Need) Add(r Run) (added uint64) {
	r = n.clip(r)
	eachWord(r, func(w int, mask uint64) {
		old := n.blocks[r.Block].needed[w].Or(mask)
		added += uint64(bits.OnesCount64(mask &^ old))
	})
	n.left.Add(int64(added))
	return added
}

// Settle takes the pages of a run out of the set (brought in, or known to need
// nothing) and returns how many of them were needed. A held page is released.
func (n *Need) Settle(r Run) (settled uint64) {
	r = n.clip(r)
	var released uint64
	eachWord(r, func(w int, mask uint64) {
		b := &n.blocks[r.Block]
		old := b.needed[w].And(^mask)
		settled += uint64(bits.OnesCount64(old & mask))
		if b.held[w].Load()&mask != 0 {
			old = b.held[w].And(^mask)
			released += uint64(bits.OnesCount64(old & mask))
		}
	})
	if settled != 0 {
		n.left.Add(-int64(settled))
	}
	if released != 0 {
		n.held.Add(-int64(released))
	}
	return settled
}

// SettlePage is Settle for one page, without the loops: the fault path.
func (n *Need) SettlePage(block int, page uint64) bool {
	b := &n.blocks[block]
	mask := uint64(1) << (page % 64)
	if b.needed[page/64].And(^mask)&mask == 0 {
		return false
	}
	n.left.Add(-1)
	if b.held[page/64].Load()&mask != 0 && b.held[page/64].And(^mask)&mask != 0 {
		n.held.Add(-1)
	}
	return true
}

// Needed reports whether a page is in the set.
func (n *Need) Needed(block int, page uint64) bool {
	return n.blocks[block].needed[page/64].Load()>>(page%64)&1 == 1
}

// IsHeld reports whether a page is held.
func (n *Need) IsHeld(block int, page uint64) bool {
	return n.blocks[block].held[page/64].Load()>>(page%64)&1 == 1
}

// Hold keeps a needed page from being offered; false if it is not needed (any more)
// or held already.
func (n *Need) Hold(block int, page uint64) bool {
	b := &n.blocks[block]
	mask := uint64(1) << (page % 64)
	if b.needed[page/64].Load()&mask == 0 || b.held[page/64].Or(mask)&mask != 0 {
		return false
	}
	n.held.Add(1)
	// A settle between the load and the or would leave the bit behind.
	if b.needed[page/64].Load()&mask == 0 && b.held[page/64].And(^mask)&mask != 0 {
		n.held.Add(-1)
		return false
	}
	return true
}

// Release lets every held page be offered again and returns how many there were.
func (n *Need) Release() (released uint64) {
	for i := range n.blocks {
		for w := range n.blocks[i].held {
			released += uint64(bits.OnesCount64(n.blocks[i].held[w].Swap(0)))
		}
	}
	n.held.Add(-int64(released))
	return released
}

// offered is the bits of a word that may be handed out.
func (b *plane) offered(w uint64) uint64 { return b.needed[w].Load() &^ b.held[w].Load() }

// Next returns the first row of offered pages inside r, cut to r.
func (n *Need) Next(r Run) (Run, bool) {
	r = n.clip(r)
	if r.Pages == 0 {
		return Run{}, false
	}
	b := &n.blocks[r.Block]
	first, ok := b.find(r.First, r.End(), false)
	if !ok {
		return Run{}, false
	}
	end, ok := b.find(first, r.End(), true)
	if !ok {
		end = r.End()
	}
	return Run{Block: r.Block, First: first, Pages: end - first}, true
}

// find returns the first page in [from, to) whose offered bit is set (clear if invert).
func (b *plane) find(from, to uint64, invert bool) (uint64, bool) {
	for p := from; p < to; {
		word := b.offered(p / 64)
		if invert {
			word = ^word
		}
		word >>= p % 64
		if word != 0 {
			p += uint64(bits.TrailingZeros64(word))
			return p, p < to
		}
		p = p - p%64 + 64
	}
	return 0, false
}

// HeldRuns lists up to max rows of held pages.
func (n *Need) HeldRuns(max int) (runs []Run) {
	for i := range n.blocks {
		for w := range n.blocks[i].held {
			word := n.blocks[i].held[w].Load()
			for word != 0 {
				page := uint64(w)*64 + uint64(bits.TrailingZeros64(word))
				word &= word - 1
				if k := len(runs) - 1; k >= 0 && runs[k].Block == i && runs[k].End() == page {
					runs[k].Pages++
					continue
				}
				if len(runs) == max {
					return runs
				}
				runs = append(runs, Run{Block: i, First: page, Pages: 1})
			}
		}
	}
	return runs
}
