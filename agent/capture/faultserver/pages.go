package faultserver

import (
	"math/bits"
	"sync/atomic"

	"github.com/ckagent/ckagent/agent/capture/source"
)

const (
	pageBytes = source.PageBytes
	wordPages = 64                    // pages per bitmap word: the scanner's step
	hugePages = 512                   // pages per huge page
	hugeWords = hugePages / wordPages // bitmap words per huge page
)

// pageTable is the state of a RAMBlock's pages. Each bit is set by an atomic
// operation and has one meaning:
//
//	dirty      tracking: written since it was last armed, so it is not armed.
//	populated  had content when the memory was frozen; file-backed blocks only.
//	held       would lose its content without a trace if it were discarded
//	           (see source.Held); file-backed blocks only.
//	claimed    capturing: one thread owns the page and will make it done.
//	done       captured, proved, and its protection lifted or about to be.
//	hot        was dirty in tracking: scanned first.
//	huge       one bit per huge page: was mapped huge when it was armed.
//	same       bears its mark since the freeze of the capture before (Config.Kept):
//	           what clears the bit is done before the page is marked again.
//
// armed -> (fault, tracking) dirty -> (re-arm) armed -> claimed -> done.
type pageTable struct {
	block     source.Block
	dirty     []uint64
	populated []uint64 // nil for anonymous memory
	held      []uint64 // nil for anonymous memory
	claimed   []uint64
	done      []uint64
	hot       []uint64
	same      []uint64 // nil unless marks were kept, and for file-backed memory
	huge      []uint64
	hugeOK    bool // the block starts on a huge page boundary
	whole     bool // it consists of huge pages that cannot be split: pages are claimed 512 at a time
}

func newPageTable(b source.Block) *pageTable {
	words := int((b.Pages + wordPages - 1) / wordPages)
	t := &pageTable{
		block:   b,
		dirty:   make([]uint64, words),
		claimed: make([]uint64, words),
		done:    make([]uint64, words),
		hot:     make([]uint64, words),
		huge:    make([]uint64, (words+hugeWords*wordPages-1)/(hugeWords*wordPages)+1),
		hugeOK:  b.HVA%(hugePages*pageBytes) == 0,
		whole:   b.Whole,
	}
	if t.whole {
		for i := range t.huge {
			t.huge[i] = ^uint64(0)
		}
	}
	if b.Kind != source.Anonymous {
		t.populated = make([]uint64, words)
		t.held = make([]uint64, words)
	}
	return t
}

// words is the number of bitmap words.
func (t *pageTable) words() int { return len(t.claimed) }

// full is the mask of the pages of word w that exist.
func (t *pageTable) full(w int) uint64 {
	left := t.block.Pages - uint64(w)*wordPages
	if left >= wordPages {
		return ^uint64(0)
	}
	return 1<<left - 1
}

// claim takes the pages of mask in word w that nobody has and returns them.
func (t *pageTable) claim(w int, mask uint64) uint64 {
	return mask &^ atomic.OrUint64(&t.claimed[w], mask)
}

// claimHuge takes pages of the huge page that starts at first, word by word, up
// to the first word that somebody has begun on, and returns how many: 512 if it
// got all. What it took it must capture; giving it back would leave a fault that
// came in between waiting for nobody.
func (t *pageTable) claimHuge(first uint64) uint64 {
	words := t.claimed[first/wordPages:][:hugeWords]
	for i := range words {
		if !atomic.CompareAndSwapUint64(&words[i], 0, ^uint64(0)) {
			return uint64(i) * wordPages
		}
	}
	return hugePages
}

// claimRuns claims the pages [first, first+n) and calls won for each run of them that
// nobody had, until it reports false.
func (t *pageTable) claimRuns(first, n uint64, won func(first, n uint64) bool) bool {
	return eachRun(first, n, t.claim, won)
}

// eachRun calls do for each run among the pages [first, first+n) that take picks, word by
// word, until it reports false.
func eachRun(first, n uint64, take func(w int, mask uint64) uint64, do func(first, n uint64) bool) bool {
	var run, length uint64
	for at, end := first, first+n; at < end; {
		off := at % wordPages
		k := min(end-at, wordPages-off)
		for got := take(int(at/wordPages), maskOf(off, k)); got != 0; {
			o, m := lowestRun(got)
			got &^= maskOf(o, m)
			if page := at - off + o; page != run+length {
				if length > 0 && !do(run, length) {
					return false
				}
				run, length = page, 0
			}
			length += m
		}
		at += k
	}
	return length == 0 || do(run, length)
}

func (t *pageTable) isDone(page uint64) bool {
	return atomic.LoadUint64(&t.done[page/wordPages])>>(page%wordPages)&1 != 0
}

// setRange sets the bits of pages [first, first+n) in a bitmap.
func setRange(bitmap []uint64, first, n uint64) {
	for n > 0 {
		off := first % wordPages
		k := min(n, wordPages-off)
		atomic.OrUint64(&bitmap[first/wordPages], maskOf(off, k))
		first, n = first+k, n-k
	}
}

// clearRange clears the bits of pages [first, first+n) in a bitmap that nobody
// else uses.
func clearRange(bitmap []uint64, first, n uint64) {
	for n > 0 {
		off := first % wordPages
		k := min(n, wordPages-off)
		bitmap[first/wordPages] &^= maskOf(off, k)
		first, n = first+k, n-k
	}
}

// maskOf is n ones from bit off on; off+n <= 64.
func maskOf(off, n uint64) uint64 {
	if n == wordPages {
		return ^uint64(0)
	}
	return (1<<n - 1) << off
}

// isHuge reports whether page was mapped by a huge page when it was armed. A fault that is
// tracked before that is known lets less through at once.
func (t *pageTable) isHuge(page uint64) bool {
	region := page / hugePages
	return t.hugeOK && atomic.LoadUint64(&t.huge[region/64])>>(region%64)&1 != 0
}

func (t *pageTable) markHuge(region uint64) {
	atomic.OrUint64(&t.huge[region/64], 1<<(region%64))
}

// granule is the run of pages around page that tracking lets through at once:
// the whole huge page where there is one, so that it is not split; 16 pages of
// anonymous memory, because re-arming costs per call and not per page; one page
// of file-backed memory, whose populated pages must be known exactly.
func (t *pageTable) granule(page uint64) (first, n uint64) {
	switch {
	case t.isHuge(page):
		first, n = page&^(hugePages-1), hugePages
	case t.populated == nil:
		first, n = page&^15, 16
	default:
		return page, 1
	}
	return first, min(n, t.block.Pages-first)
}

// takeDirty clears the dirty bits, remembers them as hot, and calls arm for each
// run of pages that was dirty, merging runs across words.
func (t *pageTable) takeDirty(arm func(first, n uint64) error) (runs int, err error) {
	var first, n uint64
	flush := func() error {
		if n == 0 {
			return nil
		}
		runs++
		err := arm(first, n)
		n = 0
		return err
	}
	for w := range t.dirty {
		if atomic.LoadUint64(&t.dirty[w]) == 0 {
			continue
		}
		m := atomic.SwapUint64(&t.dirty[w], 0)
		t.hot[w] |= m
		for m != 0 {
			off, k := lowestRun(m)
			m &^= maskOf(off, k)
			at := uint64(w)*wordPages + off
			if n > 0 && at == first+n {
				n += k
				continue
			}
			if err := flush(); err != nil {
				return runs, err
			}
			first, n = at, k
		}
	}
	return runs, flush()
}

// lowestRun is the lowest run of ones in m, which is not zero.
func lowestRun(m uint64) (off, n uint64) {
	off = uint64(bits.TrailingZeros64(m))
	return off, uint64(bits.TrailingZeros64(^(m >> off)))
}

// around picks the pages to capture with page when the guest faulted on it: up
// to n pages of its word, aligned to n, that nobody has claimed yet and that are
// contiguous with it. n is a power of two of at most 64.
func (t *pageTable) around(page, n uint64) uint64 {
	off := page % wordPages
	free := ^atomic.LoadUint64(&t.claimed[page/wordPages]) & maskOf(off&^(n-1), n) & t.full(int(page/wordPages))
	if free>>off&1 == 0 {
		return 0
	}
	up := uint64(bits.TrailingZeros64(^(free >> off)))         // ones from off upwards
	down := uint64(bits.LeadingZeros64(^(free << (63 - off)))) // ones from off downwards
	return maskOf(off+1-down, up+down-1)
}
